"""The HTTP application: routes, middlewares, and a front before each connection."""

import asyncio
import logging
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any, cast

from aiohttp import web
from aiohttp.typedefs import Middleware

from execgate.http.dialects import DOCKER, Dialect
from execgate.http.errors import error_middleware, json_error
from execgate.http.front import FrontProtocol, front_middleware
from execgate.http.routes.containers import ContainerRoutes
from execgate.http.routes.events import EventRoutes
from execgate.http.routes.execs import ExecRoutes
from execgate.http.routes.system import SystemRoutes
from execgate.wire.request_head import MAX_HEAD, MAX_REQUEST_LINE

log = logging.getLogger(__name__)

MAX_BODY = 1024 * 1024
"""Bytes of a request body."""

KEEPALIVE = 75.0
"""Seconds that an idle connection is kept."""

_SHUTDOWN_TIMEOUT = 2.0

# From Python 3.13 on a loop removes a unix socket's file when its server closes. An inherited socket's is systemd's.
_KEEP_SOCKET_FILE: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_application(
    execs: ExecRoutes,
    containers: ContainerRoutes,
    events: EventRoutes,
    system: SystemRoutes,
    dialect: Dialect = DOCKER,
) -> web.Application:
    """Return the application: every route with and without an API version."""
    app = web.Application(
        client_max_size=MAX_BODY,
        middlewares=[front_middleware, error_middleware, _version_middleware(dialect)],
    )
    routes: list[tuple[str, str, Handler]] = [
        ("GET", "/_ping", system.ping),
        ("HEAD", "/_ping", system.ping),
        ("GET", "/version", system.version),
        ("GET", "/info", system.info),
        ("GET", "/events", events.stream),
        ("GET", "/containers/json", containers.list),
        ("GET", "/containers/{name}/json", containers.inspect),
        ("GET", "/containers/{name}/top", containers.top),
        ("POST", "/containers/{name}/exec", execs.create),
        ("POST", "/exec/{id}/start", execs.start),
        ("POST", "/exec/{id}/resize", execs.resize),
        ("GET", "/exec/{id}/json", execs.inspect),
    ]
    for method, path, handler in routes:
        app.router.add_route(method, path, handler)
        app.router.add_route(method, r"/v{version:[0-9.]+}" + path, handler)
    headers = dialect.headers()

    async def add_headers(_request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(headers)

    app.on_response_prepare.append(add_headers)
    return app


class HttpServer:
    """Serves an application on listening sockets."""

    def __init__(self, app: web.Application) -> None:
        # Cancelling a handler when its client leaves would be wrong here: a start goes on.
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=False,
            shutdown_timeout=_SHUTDOWN_TIMEOUT,
        )
        self._servers: list[asyncio.Server] = []

    async def start(self, listeners: list[socket.socket]) -> None:
        """Accept connections from now on."""
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        for listener in listeners:
            if listener.family == socket.AF_UNIX:
                server = await loop.create_unix_server(self._new_connection, sock=listener, **_KEEP_SOCKET_FILE)
            else:
                server = await loop.create_server(self._new_connection, sock=listener)
            self._servers.append(server)

    async def stop_accepting(self) -> None:
        """Close the listening sockets; connections that are open stay."""
        for server in self._servers:
            server.close()

    async def close(self) -> None:
        """End what is still open."""
        await self.stop_accepting()
        await self._runner.cleanup()

    def _new_connection(self) -> FrontProtocol:
        server = self._runner.server
        assert server is not None
        inner = _Connection(
            server,
            loop=asyncio.get_running_loop(),
            access_log=cast("logging.Logger", None),  # aiohttp itself passes None to turn it off
            keepalive_timeout=KEEPALIVE,
            # The front has its own bounds and words; aiohttp's must not come first.
            max_line_size=2 * MAX_REQUEST_LINE,
            max_field_size=2 * MAX_HEAD,
        )
        return FrontProtocol(inner, max_body=MAX_BODY)


class _Connection(web.RequestHandler):
    """aiohttp's protocol, with our words for what its parser refuses and the front let pass."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,  # noqa: ARG002
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer in JSON. What the client did wrong is no news for the log."""
        if status >= 500:
            log.error("a request failed outside its handler", exc_info=exc)
            message = "internal error; the service's log has the details"
        response = json_error(status, message or "bad request")
        response.force_close()
        return response


def _version_middleware(dialect: Dialect) -> Middleware:
    @web.middleware
    async def check_version(request: web.Request, handler: Handler) -> web.StreamResponse:
        dialect.version_of(request)
        return await handler(request)

    return check_version
