"""A TLS connection, and the plain one in this process that it becomes.

Why it exists. On both event loops a TLS transport closes when the peer's close_notify comes. But that is only the end
of what the peer sends, such as a process's stdin (RFC 8446, 6.1), and what the process still writes has to reach it.
Nor can a stream work on a TLS transport's socket, as the plain ones do (`http.hijack`).

What it does. One end of a socketpair is served like any unix socket, so that everything behind it knows of no TLS:
hijack, parking, half-close, splice, hang-ups. The tunnel moves bytes between the other end and the network:

    client ══ TCP, records ══ tunnel ── socketpair ── whoever serves, or, in a client, whoever asks

Rules, and what always holds:

- An end is data, in both directions: a close_notify becomes shutdown(SHUT_WR) on the pair and the other way round, and
  the opposite direction goes on.
- An end that is not said is none (RFC 8446, 6.1): when the network's side ends without a close_notify, its end of the
  pair is closed altogether, which is a hang-up and never an end of input.
- It is a cut unless we say that it is an end: the connection is reset (SO_LINGER of 0), by whatever way it ends, a
  SIGKILL included, unless a close_notify went before. Many clients take a bare FIN for an end.
- Each direction waits by itself, and holds one piece: READ_SIZE bytes and the records made of them.
- What was received is decrypted and taken out at once, so nothing of it is in OpenSSL when we say our end: there it
  would be an error (SSL_shutdown(3)).
"""

import asyncio
import contextlib
import fcntl
import socket
import ssl
import struct
import termios
from typing import Any

from execgate.http.hang_ups import HangUps
from execgate.runtime.readiness import ReadWaiter, WriteWaiter

READ_SIZE = 64 * 1024
"""The most that one read takes, of records or of what becomes records: four of them."""

FAREWELL = 2.0
"""Seconds that the peer has to end its side once ours has ended."""

_RESET = struct.pack("ii", 1, 0)
_NO_RESET = struct.pack("ii", 0, 0)
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
"""A peer that has vanished without a word, its host with it, is noticed after two minutes."""


class Channel:
    """One side of a TLS connection, without a socket: bytes in, bytes out. ssl.SSLError where they are no TLS."""

    def __init__(self, context: ssl.SSLContext, server_hostname: str | None = None) -> None:
        """A server's side, unless `server_hostname` is whom a client's side wants to speak with."""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_hostname is None, server_hostname=server_hostname
        )
        self.ended = False
        """Whether the peer has said its end."""

    @property
    def unsent(self) -> int:
        """How many bytes are to be taken."""
        return self._outgoing.pending

    def handshake(self) -> bool:
        """Go on with the handshake; return whether it is complete."""
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def feed(self, records: bytes) -> None:
        """Take in what came from the peer."""
        self._incoming.write(records)

    def read(self) -> bytes:
        """Return what the peer has said, as far as its records are complete."""
        pieces = []
        while not self.ended:
            try:
                piece = self.tls.read(READ_SIZE)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLZeroReturnError:  # what `read` raises instead of returning b"" once we have said our own
                piece = b""
            pieces.append(piece)
            self.ended = not piece
        return b"".join(pieces)

    def write(self, data: bytes) -> None:
        """Say something to the peer; take the records."""
        self.tls.write(data)

    def end(self) -> None:
        """Say our end; what the peer says can still be read. All that was fed has to be read before."""
        with contextlib.suppress(ssl.SSLWantReadError):  # it would now wait for the peer's
            self.tls.unwrap()

    def take(self) -> bytes:
        """Take out what is to be sent to the peer."""
        return self._outgoing.read()


class Tunnel:
    """The network's side of one TLS connection. `connection` is its own from now on; `close` it in the end."""

    def __init__(self, connection: socket.socket, hang_ups: HangUps) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self.polite = True
        """Whether the end of the pair's other side is to be said to the peer. Otherwise it is a hang-up."""
        self._connection = connection
        self._hang_ups = hang_ups
        self._readable, self._writable = ReadWaiter(connection.fileno()), WriteWaiter(connection.fileno())
        self._turn = asyncio.Lock()  # whose turn it is to send
        self._pair: socket.socket | None = None
        self.greeted = False
        """Whether a handshake has begun, and has not failed."""

    @property
    def in_transit(self) -> bool:
        """Whether anything that was said to the peer has not reached it."""
        if self._connection.fileno() < 0:
            return False
        said = _waiting(self._pair, termios.FIONREAD) if self._pair is not None else 0
        return bool(said or self._turn.locked() or _waiting(self._connection, termios.TIOCOUTQ))

    def close(self) -> None:
        """Close everything: a reset, unless `part` went before."""
        self._connection.close()

    # -- before, and after ------------------------------------------------------------------------------------------

    async def receive(self) -> bytes:
        """Return what comes from the network, b"" at its end. OSError."""
        while True:
            try:
                return self._connection.recv(READ_SIZE)
            except BlockingIOError:
                await self._readable.wait()

    async def send(self, data: bytes) -> None:
        """Send as it is, in the order of the calls. OSError."""
        async with self._turn:
            rest = memoryview(data)
            while rest:
                try:
                    rest = rest[self._connection.send(rest) :]
                except BlockingIOError:
                    await self._writable.wait()

    async def handshake(self, channel: Channel, received: bytes = b"") -> None:
        """Shake hands; `received` is what has come already. ssl.SSLError, after which the peer is told; OSError."""
        self.greeted = True
        channel.feed(received)
        try:
            while not channel.handshake():
                await self._flush(channel)
                if not (data := await self.receive()):
                    raise ConnectionResetError("the connection ended within the handshake")
                channel.feed(data)
        except BaseException:
            self.greeted = False
            raise
        finally:
            await self._flush(channel)

    async def answer(self, channel: Channel, text: bytes) -> None:
        """Say a last word once the peer has asked for one: instead of a relay. ssl.SSLError, OSError."""
        while not channel.read():
            if channel.ended or not (data := await self.receive()):
                return
            channel.feed(data)
        channel.write(text)
        channel.end()
        await self._flush(channel)

    async def part(self) -> None:
        """End the connection in order, and give the peer some time to end its side.

        A close with anything unread would be a reset, and could cost the peer what it has not read yet.
        """
        with contextlib.suppress(OSError, TimeoutError):
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_RESET)
            self._connection.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(FAREWELL):
                while await self.receive():  # noqa: ASYNC110  (it is not the sleep that waits)
                    await asyncio.sleep(0)

    # -- the relay --------------------------------------------------------------------------------------------------

    async def relay(self, channel: Channel, pair: socket.socket) -> None:
        """Move bytes between the network and `pair` until both directions have ended.

        When whoever has the other side of the pair has closed it, only what it has left there is still to be sent. A
        cut is an OSError or an ssl.SSLError; the caller closes `pair`, and that tells the other side.
        """
        pair.setblocking(False)
        self._pair = pair
        loop = asyncio.get_running_loop()
        gone: asyncio.Future[None] = loop.create_future()
        closed: asyncio.Future[None] = loop.create_future()
        inward = asyncio.create_task(self._inward(channel, pair))
        outward = asyncio.create_task(self._outward(channel, pair))
        try:
            self._hang_ups.watch(self._connection.fileno(), lambda: gone.set_result(None))
            self._hang_ups.watch(pair.fileno(), lambda: closed.set_result(None))
            while not (outward.done() and (inward.done() or closed.done())):
                waited: set[asyncio.Future[Any]] = {inward, outward, gone, closed}
                await asyncio.wait({one for one in waited if not one.done()}, return_when=asyncio.FIRST_COMPLETED)
                for direction in (inward, outward):
                    if direction.done():
                        direction.result()
                if gone.done():
                    raise ConnectionResetError("the peer is gone")
        finally:
            self._hang_ups.forget(self._connection.fileno())
            self._hang_ups.forget(pair.fileno())
            inward.cancel()
            outward.cancel()
            await asyncio.gather(inward, outward, return_exceptions=True)
            self._pair = None

    async def _inward(self, channel: Channel, pair: socket.socket) -> None:
        """From the network to the pair, up to the peer's end."""
        room = WriteWaiter(pair.fileno())
        while True:
            await _deliver(pair, channel.read(), room)
            if channel.ended:
                break
            if channel.unsent:  # an answer of TLS itself, to a change of keys
                await self._flush(channel)
            await asyncio.sleep(0)  # a peer that sends without a pause must not starve the others
            if not (data := await self.receive()):
                raise ConnectionResetError("the connection was cut: it ended without a close_notify")
            channel.feed(data)
        with contextlib.suppress(OSError):
            pair.shutdown(socket.SHUT_WR)

    async def _outward(self, channel: Channel, pair: socket.socket) -> None:
        """From the pair to the network, up to the end of the other side."""
        ready = ReadWaiter(pair.fileno())
        while True:
            try:
                data = pair.recv(READ_SIZE)
            except BlockingIOError:
                await ready.wait()
                continue
            except ConnectionResetError:  # it closed, and has not read everything; what it wrote came before
                data = b""
            if not data:
                break
            channel.write(data)
            await self._flush(channel)
            await asyncio.sleep(0)
        if self.polite:
            channel.end()
            await self._flush(channel)

    async def _flush(self, channel: Channel) -> None:
        await self.send(channel.take())


async def _deliver(pair: socket.socket, data: bytes, room: WriteWaiter) -> None:
    """Write to the pair; nobody may be there to read it any more."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[pair.send(rest) :]
        except BlockingIOError:
            await room.wait()
        except OSError:
            return


def _waiting(connection: socket.socket, request: int) -> int:
    """Return how many bytes wait to be read (FIONREAD) or to reach the peer (TIOCOUTQ, tcp(7))."""
    answer = fcntl.ioctl(connection.fileno(), request, b"\0\0\0\0")
    return int(struct.unpack("=i", answer)[0])
