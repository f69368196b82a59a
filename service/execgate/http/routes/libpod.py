"""What Podman's API has and Docker's has not: whether a container exists, and removing a session."""

from collections.abc import Sequence

from aiohttp import web

from execgate.http.bodies import RemoveBody, read_body
from execgate.http.identity import access_of
from execgate.http.tree import Route


class LibpodRoutes:
    """The routes of the libpod tree alone."""

    def routes(self) -> Sequence[Route]:
        """See tree.RouteGroup."""
        return [
            ("GET", "/containers/{name}/exists", self.exists),
            ("POST", "/exec/{id}/remove", self.remove),
        ]

    async def exists(self, request: web.Request) -> web.Response:
        """GET /libpod/containers/{name}/exists: 204 or 404."""
        access_of(request).find(request.match_info["name"])
        return web.Response(status=204)

    async def remove(self, request: web.Request) -> web.Response:
        """POST /libpod/exec/{id}/remove."""
        body = await read_body(request, RemoveBody, typed=False)
        await access_of(request).remove(request.match_info["id"], force=body.force)
        return web.Response()
