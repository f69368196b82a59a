"""Listeners whose connections are decrypted before they are served (`http.tunnel`).

A handshake is bounded in time, and so is the number of those that are not complete: when there are too many, the
oldest makes room, so that a flood of connections that say nothing keeps nobody out. Nothing is decided here about what
a client may do; but one with a certificate that names nobody is told so, and is not served.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from functools import partial

from execgate.http.certificates import reason
from execgate.http.dialects import DOCKER
from execgate.http.front import error_response
from execgate.http.hang_ups import HangUps
from execgate.http.peers import Unnamed, certificate_peer
from execgate.http.tunnel import Channel, Tunnel
from execgate.model.principal import Principal
from execgate.oci.text import shown

log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT = 10.0
"""Seconds from the connection to the end of the handshake."""

MAX_UNFINISHED = 512
"""Connections whose handshake is not complete."""

_ACCEPTS_PER_TURN = 32
_ACCEPT_PAUSE = 1.0
"""Seconds until connections are accepted again when the host has no room for one."""

_DRAIN_POLL = 0.005

_NOT_HTTPS = (
    b"HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"
    b"Client sent an HTTP request to an HTTPS server.\n"
)
"""Word for word what Go's net/http says, which people look for."""

_NAMELESS = "the client certificate has no subject alternative name that can be used; its common name says nothing"

Serve = Callable[[socket.socket, Principal | None, Callable[[], object]], Awaitable[None]]
"""Serves a connection: its socket, who the certificate says it is, and how to cut it: it must not look complete."""


class TlsServer:
    """Accepts connections on listening sockets and has them served, decrypted."""

    def __init__(self, context: ssl.SSLContext, serve: Serve, hang_ups: HangUps) -> None:
        self._context = context
        self._serve = serve
        self._hang_ups = hang_ups
        self._listeners: list[socket.socket] = []
        self._pauses: set[asyncio.TimerHandle] = set()
        self._tunnels: dict[asyncio.Task[None], Tunnel] = {}
        self._unfinished: dict[asyncio.Task[None], None] = {}  # the oldest first

    def listen(self, listener: socket.socket) -> None:
        """Accept connections of a listening socket, which is ours from now on."""
        self._listeners.append(listener)
        self._watch(listener)

    def stop_accepting(self) -> None:
        """Close the listening sockets. Connections that are open stay, those in their handshake among them."""
        for pause in self._pauses:
            pause.cancel()
        while self._listeners:
            listener = self._listeners.pop()
            asyncio.get_running_loop().remove_reader(listener.fileno())
            listener.close()

    @property
    def greeting(self) -> bool:
        """Whether anybody is in the midst of a handshake, or about to be served."""
        return any(self._tunnels[task].greeted for task in self._unfinished)

    async def drained(self, seconds: float) -> None:
        """Return once all that was said to clients has reached their hosts; not for ever."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while any(tunnel.in_transit for tunnel in self._tunnels.values()):  # noqa: ASYNC110
                    await asyncio.sleep(_DRAIN_POLL)  # the kernel has no event for "your peer has it"

    async def close(self) -> None:
        """Cut what is still open."""
        self.stop_accepting()
        for task in self._tunnels:
            task.cancel()
        await asyncio.gather(*self._tunnels, return_exceptions=True)

    # -- accepting --------------------------------------------------------------------------------------------------

    def _watch(self, listener: socket.socket) -> None:
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                connection, address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptors, no memory: the connection stays where it is
                log.error("no connection can be accepted: %s", error.strerror)
                self._pause(listener)
                return
            self._begin(connection, _address_text(address))

    def _pause(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener.fileno())

        def resume() -> None:
            self._pauses.discard(pause)
            self._watch(listener)

        pause = loop.call_later(_ACCEPT_PAUSE, resume)
        self._pauses.add(pause)

    def _begin(self, connection: socket.socket, who: str) -> None:
        try:
            tunnel = Tunnel(connection, self._hang_ups)
        except OSError as error:  # it is gone already
            log.debug("%s: %s", who, error)
            connection.close()
            return
        if len(self._unfinished) >= MAX_UNFINISHED:
            oldest = next(iter(self._unfinished))
            del self._unfinished[oldest]
            oldest.cancel()
        task = asyncio.create_task(self._attend(tunnel, who), name=f"tls {who}")
        self._tunnels[task] = tunnel
        self._unfinished[task] = None
        task.add_done_callback(partial(self._ended, who))

    def _ended(self, who: str, task: asyncio.Task[None]) -> None:
        tunnel = self._tunnels.pop(task)
        self._unfinished.pop(task, None)
        tunnel.close()  # cancelled before it began, it could not
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the connection of %s failed", who, exc_info=error)

    # -- one connection ---------------------------------------------------------------------------------------------

    async def _attend(self, tunnel: Tunnel, who: str) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                admitted = await self._admit(tunnel, who)
            if admitted is not None:
                await self._serve_through(tunnel, *admitted)
            await tunnel.part()
        except OSError as error:  # SSLError is one, and so is TimeoutError: the handshake took too long
            log.debug("%s: the connection was cut: %s", who, reason(error))
        finally:
            tunnel.close()

    async def _admit(self, tunnel: Tunnel, who: str) -> tuple[Channel, Principal | None] | None:
        """Shake hands; return what is to be served, and whom; None: it was told why it is not. OSError."""
        received = await tunnel.receive()
        if received[:1].isalpha():  # a record begins with its type, a handshake's is 22
            log.debug("%s speaks no TLS, but plain HTTP", who)
            await tunnel.send(_NOT_HTTPS)
            return None
        channel = Channel(self._context)
        try:
            await tunnel.handshake(channel, received)
        except ssl.SSLError as error:
            # Who tries certificates is worth a line, who sends garbage is not.
            about_certificates = any(word in (error.reason or "") for word in ("CERTIFICATE", "UNKNOWN_CA"))
            level = logging.INFO if about_certificates else logging.DEBUG
            log.log(level, "%s: no TLS connection: %s", who, reason(error))
            return None
        try:
            peer = _peer(channel)
        except (Unnamed, ValueError) as error:  # ValueError: a name that is no UTF-8
            log.info("%s is refused, its certificate names nobody: %s", who, shown(str(error), 400))
            await tunnel.answer(channel, error_response(DOCKER, 403, _NAMELESS))
            return None
        log.debug("%s is %s (%s)", who, "nobody known" if peer is None else peer.id, channel.tls.version())
        return channel, peer

    async def _serve_through(self, tunnel: Tunnel, channel: Channel, peer: Principal | None) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            served, ours = socket.socketpair()
        except OSError as error:
            log.warning("a client's connection is lost: %s", error)
            raise
        with ours:
            try:
                served.setblocking(False)
                await self._serve(served, peer, task.cancel)
            except BaseException:
                served.close()
                raise
            self._unfinished.pop(task, None)
            await tunnel.relay(channel, ours)


def _peer(channel: Channel) -> Principal | None:
    """Return who the client's certificate names; None without one. Unnamed, ValueError."""
    certificate = channel.tls.getpeercert()
    return certificate_peer(certificate) if certificate else None


def _address_text(address: tuple[str, int]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
