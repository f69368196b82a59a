"""Trees of paths: which groups of routes are served in which dialect.

A group is an object with some routes; it is made for one dialect, whose data tells its handlers apart, and is mounted
in that dialect's tree. Routes that all dialects share are one class of which each tree has an instance.
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from aiohttp import web

from execgate.http.dialects import Dialect

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

Route = tuple[str, str, Handler]
"""Method, path without version and prefix, handler."""

_VERSION = r"/v{version:[0-9.]+}"

_NAME = "{name}"
_ANY_NAME = r"{name:.+}"
"""A container's name may have slashes: `pod/container`. Clients send them as they are, or as %2F."""


class RouteGroup(Protocol):
    """Some routes that belong together."""

    def routes(self) -> Sequence[Route]:
        """Return them."""


@dataclass(frozen=True, slots=True)
class Tree:
    """The paths of one dialect."""

    dialect: Dialect
    groups: Sequence[RouteGroup]

    def routes(self) -> Iterator[Route]:
        """Yield every route as the router takes it: with a version and, where the dialect has that, without.

        The router takes the first that fits, and a name fits much: `/containers/NAME/exec/json` comes before
        `/containers/NAME/json`.
        """
        routes = [route for group in self.groups for route in group.routes()]
        for method, plain_path, handler in sorted(routes, key=lambda route: -route[1].count("/")):
            path = plain_path.replace(_NAME, _ANY_NAME)
            checked = self._with_known_version(handler)
            yield method, _VERSION + self.dialect.prefix + path, checked
            if not self.dialect.versioned_only:
                yield method, self.dialect.prefix + path, checked

    def _with_known_version(self, handler: Handler) -> Handler:
        async def checked(request: web.Request) -> web.StreamResponse:
            self.dialect.version_of(request)
            return await handler(request)

        return checked
