"""The HTTP application: routes, middlewares, and a front before each connection."""

import asyncio
import contextlib
import functools
import logging
import socket
import ssl
import sys
from collections.abc import Callable, Iterable
from typing import Any, cast

from aiohttp import web
from aiohttp.typedefs import Middleware

from execgate.http.dialects import dialect_of
from execgate.http.errors import error_middleware, json_error
from execgate.http.front import FrontProtocol, front_middleware
from execgate.http.hijack import OpenStreams
from execgate.http.listeners import BACKLOG, Listener
from execgate.http.peers import kernels_word
from execgate.http.progress import Progress
from execgate.http.takeover import OPEN_STREAMS
from execgate.http.tls import TlsServer
from execgate.http.tree import Tree
from execgate.model.principal import Principal
from execgate.wire.request_head import MAX_HEAD, MAX_REQUEST_LINE

log = logging.getLogger(__name__)

MAX_BODY = 1024 * 1024
"""Bytes of a request body."""

KEEPALIVE = 75.0
"""Seconds that an idle connection is kept."""

_SHUTDOWN_TIMEOUT = 2.0
_DRAIN_TIMEOUT = 0.5
"""Seconds that clients get to read what they were answered, before a connection is handed over."""

_GREETING_TIMEOUT = 0.25
"""Seconds that a connection over TLS that has just begun has for its request, before it ends with this service."""

_GREETING_POLL = 0.002

_TURNS = 5
"""Turns of the event loop in which a connection that was accepted gets its protocol, and uvloop writes what it has."""

# From Python 3.13 on a loop removes a unix socket's file when its server closes. An inherited socket's is systemd's.
_KEEP_SOCKET_FILE: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}


def build_application(
    trees: Iterable[Tree], streams: OpenStreams, middlewares: Iterable[Middleware] = ()
) -> web.Application:
    """Return the application that serves these trees, and hijacks connections into `streams`.

    `middlewares` stand before the handlers, and what they raise is answered in the words of the tree.
    """
    around = [front_middleware, error_middleware, *middlewares]
    app = web.Application(client_max_size=MAX_BODY, middlewares=around)
    app[OPEN_STREAMS] = streams
    for tree in trees:
        for method, path, handler in tree.routes():
            app.router.add_route(method, path, handler)

    async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(dialect_of(request.path).headers())

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
        self.streams = app[OPEN_STREAMS]
        self._servers: list[asyncio.Server] = []
        self._tls: TlsServer | None = None
        self._accepting = False
        self._fronts: set[FrontProtocol] = set()
        self._changed = asyncio.Event()

    async def start(self, listeners: Iterable[Listener], tls: ssl.SSLContext | None = None) -> None:
        """Accept connections from now on; `tls` is for the listeners that want it."""
        await self._runner.setup()
        self._accepting = True
        if tls is not None:
            self._tls = TlsServer(tls, self._serve_decrypted, self.streams.hang_ups)
        for listener in listeners:
            if not listener.tls:
                self._servers.append(await self._serve(listener.socket))
            elif self._tls is not None:
                self._tls.listen(listener.socket)

    async def _serve(self, listener: socket.socket) -> asyncio.Server:
        loop = asyncio.get_running_loop()  # which listens anew, and would cut the backlog to a hundred
        connection = functools.partial(self._new_connection, identify=kernels_word)
        if listener.family == socket.AF_UNIX:
            return await loop.create_unix_server(connection, sock=listener, backlog=BACKLOG, **_KEEP_SOCKET_FILE)
        return await loop.create_server(connection, sock=listener, backlog=BACKLOG)

    async def _serve_decrypted(
        self, connection: socket.socket, peer: Principal | None, cut_off: Callable[[], object]
    ) -> None:
        """Serve what a TLS tunnel leads to: a socket of our own, whose peer by the kernel is ourselves."""
        new_connection = functools.partial(self._new_connection, peer=peer, cut_off=cut_off)
        await asyncio.get_running_loop().connect_accepted_socket(new_connection, connection)

    async def stop_accepting(self) -> None:
        """Close the listening sockets; connections that are open stay, those that were accepted just now among them.

        asyncio drops a connection whose server is closed before it has got its protocol (`Server._attach`). So first
        it is to accept no more; uvloop knows no such reader, and needs none of this.
        """
        self._accepting = False
        if self._tls is not None:
            self._tls.stop_accepting()
        if self._servers:
            for listener in (one for server in self._servers for one in server.sockets):
                asyncio.get_running_loop().remove_reader(listener.fileno())
            await self.settle()
        while self._servers:
            self._servers.pop().close()

    async def quiesce(self) -> None:
        """Accept and read no more, and wait, not for ever, for answers that come soon, until they are on the wire."""
        await self.stop_accepting()
        for front in self._fronts:
            front.freeze()
        if self._tls is not None:
            await self._greeted(self._tls)
        await self._until_none(lambda front: front.busy, _SHUTDOWN_TIMEOUT)
        await self._until_none(lambda front: front.owing, _DRAIN_TIMEOUT)
        await self._until_none(lambda front: front.unsent, _DRAIN_TIMEOUT)
        await self.settle()

    async def _greeted(self, tls: TlsServer) -> None:
        """Let those who are just connecting over TLS ask what they want to: nobody else can answer it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GREETING_TIMEOUT):
                while tls.greeting or any(front.fresh for front in self._fronts):  # noqa: ASYNC110
                    await asyncio.sleep(_GREETING_POLL)
        for front in tuple(self._fronts):
            front.dismiss()

    async def settle(self) -> None:
        """Let what was accepted get its protocol, and what was answered just now get on the wire."""
        for _ in range(_TURNS):
            await asyncio.sleep(0)

    async def deliver(self) -> None:
        """Let what was sent over TLS arrive, as far as that takes not long: those connections end with this process."""
        if self._tls is not None:
            await self._tls.drained(_DRAIN_TIMEOUT)

    def hand_over(self) -> list[tuple[int, bytes, Progress | None]]:
        """Return the connections that can go on elsewhere; after `quiesce`.

        Each is a descriptor, the caller's; what was read from it of requests that are still to be answered; and what
        was done of the first of them.
        """
        return [found for front in self._fronts if (found := front.hand_over()) is not None]

    async def adopt(self, fd: int, read: bytes, progress: Progress | None) -> None:
        """Go on with a connection that another server has handed over."""
        loop = asyncio.get_running_loop()
        connection = functools.partial(self._new_connection, read, progress, KEEPALIVE, identify=kernels_word)
        await loop.connect_accepted_socket(connection, socket.socket(fileno=fd))

    async def close(self) -> None:
        """End what is still open."""
        await self.stop_accepting()
        await self._runner.cleanup()
        for stream in self.streams:
            stream.abandon()
        if self._tls is not None:
            await self._tls.drained(_DRAIN_TIMEOUT)
            await self._tls.close()

    async def _until_none(self, of_kind: Callable[[FrontProtocol], bool], seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while any(map(of_kind, self._fronts)):
                    self._changed.clear()
                    await self._changed.wait()

    def _new_connection(
        self,
        read: bytes = b"",
        progress: Progress | None = None,
        idle: float | None = None,
        *,
        peer: Principal | None = None,
        identify: Callable[[asyncio.BaseTransport], Principal | None] = lambda _: None,
        cut_off: Callable[[], object] | None = None,
    ) -> FrontProtocol:
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
        front = FrontProtocol(
            inner,
            max_body=MAX_BODY,
            told=self._told,
            read=read,
            resumed=progress,
            idle=idle,
            peer=peer,
            identify=identify,
            cut_off=cut_off,
        )
        self._fronts.add(front)
        if not self._accepting:  # accepted at the last moment
            front.freeze()
        return front

    def _told(self, front: FrontProtocol) -> None:
        if not front.open:
            self._fronts.discard(front)
        self._changed.set()


class _Connection(web.RequestHandler):
    """aiohttp's protocol, with our words for what its parser refuses and the front let pass."""

    __slots__ = ()

    # aiohttp looks them up for each connection, and nobody asks: who is at the other end is told by `peers`.
    peername = None
    sockname = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer in JSON. What the client did wrong is no news for the log."""
        if status >= 500:
            log.error("a request failed outside its handler", exc_info=exc)
            message = "internal error; the service's log has the details"
        response = json_error(dialect_of(request.path), status, message or "bad request")
        response.force_close()
        return response
