"""What clients ask of a container around an exec: list, inspect, top."""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence

from aiohttp import web

from execgate.containers.top import Top
from execgate.http.answers.subjects import Subject
from execgate.http.dialects import Dialect
from execgate.http.filters import matches_label, parse_filters
from execgate.http.identity import access_of
from execgate.http.query import flag
from execgate.http.tree import Route
from execgate.model.container import Container, ContainerStatus
from execgate.model.errors import InvalidArgument, NotFound

_FILTERS = frozenset({"name", "id", "label", "status"})
_LIMIT = re.compile(r"[+-]?[0-9]+", re.ASCII)
_LIMIT_DIGITS = 10


class ContainerRoutes:
    """The container queries, in the manner of one dialect."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect

    def routes(self) -> Sequence[Route]:
        """See tree.RouteGroup."""
        return [("GET", "/containers/json", self.list), ("GET", "/containers/{name}/json", self.inspect)]

    async def list(self, request: web.Request) -> web.Response:
        """GET /containers/json?all=&limit=&filters=."""
        filters = parse_filters(request.query.get("filters", ""), _FILTERS)
        limit = _limit(request)
        everything = flag(request, "all") or "status" in filters or limit > 0
        # In a thread: to ask the kernel about a thousand containers takes its time.
        found = await asyncio.to_thread(access_of(request).containers)
        chosen = [
            container
            for container in sorted(found, key=lambda c: c.created, reverse=True)
            if (everything or container.init is not None) and matches(container, filters)
        ]
        summary = self._dialect.answers.summary
        return web.json_response([summary(Subject(container, {})) for container in chosen[: limit or None]])

    async def inspect(self, request: web.Request) -> web.Response:
        """GET /containers/{name}/json."""
        access = access_of(request)
        container = access.find(request.match_info["name"])
        try:
            spec = access.spec(container)
        except NotFound:
            if container.init is not None:
                raise
            spec = {}  # an engine keeps its record of a container that has ended, and not always the bundle
        subject = Subject(container, spec, access.running_in(container.id))
        return web.json_response(self._dialect.answers.container(subject, self._dialect.version_of(request)))


class TopRoutes:
    """`docker top`."""

    def __init__(self, top: Callable[[Container, str], Top]) -> None:
        self._top = top

    def routes(self) -> Sequence[Route]:
        """See tree.RouteGroup."""
        return [("GET", "/containers/{name}/top", self.top)]

    async def top(self, request: web.Request) -> web.Response:
        """GET /containers/{name}/top?ps_args=."""
        container = access_of(request).for_top(request.match_info["name"])
        top = await asyncio.to_thread(self._top, container, request.query.get("ps_args") or "-ef")
        return web.json_response({"Titles": top.titles, "Processes": top.processes})


def matches(container: Container, filters: Mapping[str, list[str]]) -> bool:
    """Return whether a container passes: any value of a filter, all filters (labels: all values)."""
    tests: dict[str, Callable[[str], bool]] = {
        "name": lambda value: _name_matches(container.name, value),
        "id": container.id.startswith,
        "status": lambda value: _status(value) is container.status,
    }
    if not all(matches_label(container.labels, label) for label in filters.get("label", [])):
        return False
    return all(any(map(tests[key], values)) for key, values in filters.items() if key in tests and values)


def _name_matches(name: str, value: str) -> bool:
    """Match part of a name, as Docker does, with its usual anchors; no other regular expression from outside."""
    start, end = value.startswith("^"), value.endswith("$")
    text = value[start : len(value) - end].removeprefix("/")
    if start and end:
        return name == text
    if start:
        return name.startswith(text)
    return name.endswith(text) if end else text in name


def _status(value: str) -> ContainerStatus:
    try:
        return ContainerStatus(value)
    except ValueError:
        raise InvalidArgument(f"invalid filter 'status={value[:32]}'") from None


def _limit(request: web.Request) -> int:
    text = request.query.get("limit") or "0"
    if not _LIMIT.fullmatch(text):
        raise InvalidArgument(f"invalid limit {text[:32]!r}")
    return max(0, int(text[:_LIMIT_DIGITS]))  # there are not more containers than that
