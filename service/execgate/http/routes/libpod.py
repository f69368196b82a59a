"""What Podman's API has and Docker's has not: whether a container exists, and removing a session."""

from collections.abc import Sequence

from aiohttp import web

from execgate.containers.catalog import Catalog
from execgate.http.bodies import RemoveBody, read_body
from execgate.http.tree import Route
from execgate.sessions.manager import SessionManager


class LibpodRoutes:
    """The routes of the libpod tree alone."""

    def __init__(self, catalog: Catalog, manager: SessionManager) -> None:
        self._catalog = catalog
        self._manager = manager

    def routes(self) -> Sequence[Route]:
        """See tree.RouteGroup."""
        return [
            ("GET", "/containers/{name}/exists", self.exists),
            ("POST", "/exec/{id}/remove", self.remove),
        ]

    async def exists(self, request: web.Request) -> web.Response:
        """GET /libpod/containers/{name}/exists: 204 or 404."""
        self._catalog.find(request.match_info["name"])
        return web.Response(status=204)

    async def remove(self, request: web.Request) -> web.Response:
        """POST /libpod/exec/{id}/remove."""
        body = await read_body(request, RemoveBody, typed=False)
        await self._manager.remove(request.match_info["id"], force=body.force)
        return web.Response()
