"""What clients ask before anything else: ping, version, info."""

import asyncio
import os
import platform
import socket
from collections import Counter
from collections.abc import Sequence

from aiohttp import web

from execgate import __version__
from execgate.http.answers.subjects import Counts, Host
from execgate.http.dialects import Dialect, dotted
from execgate.http.identity import access_of
from execgate.http.tree import Route
from execgate.model.container import ContainerStatus


class SystemRoutes:
    """The system queries, in the manner of one dialect."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect

    def routes(self) -> Sequence[Route]:
        """See tree.RouteGroup."""
        return [
            ("GET", "/_ping", self.ping),
            ("HEAD", "/_ping", self.ping),
            ("GET", "/version", self.version),
            ("GET", "/info", self.info),
        ]

    async def ping(self, request: web.Request) -> web.Response:
        """GET and HEAD /_ping."""
        headers = {"Cache-Control": "no-cache, no-store, must-revalidate", "Docker-Experimental": "false"}
        return web.Response(text="" if request.method == "HEAD" else "OK", headers=headers)

    async def version(self, _request: web.Request) -> web.Response:
        """GET /version."""
        return web.json_response(self._dialect.answers.version(self._host()))

    async def info(self, request: web.Request) -> web.Response:
        """GET /info."""
        states = Counter(container.status for container in await asyncio.to_thread(access_of(request).containers))
        counts = Counts(states.total(), states[ContainerStatus.RUNNING], states[ContainerStatus.PAUSED])
        return web.json_response(self._dialect.answers.info(self._host(), counts))

    def _host(self) -> Host:
        host = platform.uname()
        return Host(
            name=socket.gethostname(),
            system="linux",
            machine=host.machine,
            architecture=_architecture(host.machine),
            kernel=host.release,
            processors=os.cpu_count() or 1,
            memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            version=__version__,
            api_version=dotted(self._dialect.maximum),
            oldest_api_version=dotted(self._dialect.minimum),
        )


def _architecture(machine: str) -> str:
    """Return Go's name for a machine."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)
