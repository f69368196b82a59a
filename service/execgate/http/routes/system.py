"""What clients ask before anything else: ping, version, info."""

import asyncio
import os
import platform
import socket
from collections import Counter

from aiohttp import web

from execgate import __version__
from execgate.containers.catalog import Catalog
from execgate.http.dialects import Dialect, dotted
from execgate.model.container import ContainerStatus


class SystemRoutes:
    """Docker's system queries."""

    def __init__(self, catalog: Catalog, dialect: Dialect) -> None:
        self._catalog = catalog
        self._dialect = dialect

    async def ping(self, request: web.Request) -> web.Response:
        """GET and HEAD /_ping."""
        headers = {"Cache-Control": "no-cache, no-store, must-revalidate", "Docker-Experimental": "false"}
        return web.Response(text="" if request.method == "HEAD" else "OK", headers=headers)

    async def version(self, _request: web.Request) -> web.Response:
        """GET /version."""
        host = platform.uname()
        numbers = {
            "ApiVersion": dotted(self._dialect.maximum),
            "MinAPIVersion": dotted(self._dialect.minimum),
            "GitCommit": "",
            "GoVersion": "",
            "Os": "linux",
            "Arch": _architecture(host.machine),
            "KernelVersion": host.release,
            "BuildTime": "",
        }
        return web.json_response(
            {
                "Platform": {"Name": "execgate"},
                "Components": [{"Name": "execgate", "Version": __version__, "Details": numbers}],
                "Version": __version__,
                **numbers,
            }
        )

    async def info(self, _request: web.Request) -> web.Response:
        """GET /info."""
        host = platform.uname()
        counts = Counter(container.status for container in await asyncio.to_thread(self._catalog.list))
        running, paused = counts[ContainerStatus.RUNNING], counts[ContainerStatus.PAUSED]
        return web.json_response(
            {
                "ID": "",
                "Name": socket.gethostname(),
                "ServerVersion": __version__,
                "Containers": counts.total(),
                "ContainersRunning": running,
                "ContainersPaused": paused,
                "ContainersStopped": counts.total() - running - paused,
                "Images": 0,
                "Driver": "oci",
                "DriverStatus": [],
                "Plugins": {"Volume": [], "Network": [], "Authorization": [], "Log": []},
                "OperatingSystem": "execgate",
                "OSType": "linux",
                "Architecture": host.machine,
                "KernelVersion": host.release,
                "NCPU": os.cpu_count() or 1,
                "MemTotal": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
                "DefaultRuntime": "",
                "Runtimes": {},
                "Swarm": {"LocalNodeState": "inactive"},
                "Labels": [],
                "Warnings": [],
                "SecurityOptions": [],
                "ExperimentalBuild": False,
            }
        )


def _architecture(machine: str) -> str:
    """Return Go's name for a machine."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)
