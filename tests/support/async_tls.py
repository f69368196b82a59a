"""A TLS client for tests in one event loop with what they test.

It sends records in its own pieces, and tells one end from another.
"""

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import Awaitable
from typing import Literal, TypeVar

_T = TypeVar("_T")

SOON = 10.0

End = Literal["close_notify", "fin", "reset"]


async def soon(awaitable: Awaitable[_T]) -> _T:
    """Return what comes within a time that no machine needs."""
    return await asyncio.wait_for(awaitable, SOON)


class TlsPeer:
    """One connection to a TLS server, from the first byte on. With `piece` it sends so many bytes at a time."""

    def __init__(self, address: tuple[str, int], context: ssl.SSLContext, *, piece: int = 0) -> None:
        self.tcp = socket.create_connection(address)
        self.tcp.setblocking(False)
        self.tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._in, self._out, server_hostname="127.0.0.1")
        self._piece = piece
        self._over: End | None = None

    async def handshake(self) -> None:
        """Shake hands. ssl.SSLError, ConnectionError."""
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._push()
                await self._pull()
        await self._push()

    async def send(self, data: bytes) -> None:
        self.tls.write(data)
        await self._push()

    def records(self, data: bytes) -> bytes:
        """Return what would be sent, for the test to send it."""
        self.tls.write(data)
        return self._out.read()

    async def send_raw(self, data: bytes) -> None:
        await soon(asyncio.get_running_loop().sock_sendall(self.tcp, data))

    async def half_close(self) -> None:
        """Say our end, and nothing of TCP's."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        await self._push()

    async def read(self, size: int) -> bytes:
        """Return exactly so much."""
        data = bytearray()
        while len(data) < size:
            piece = await self._some(size - len(data))
            assert piece, f"{self._over} after {len(data)} of {size} bytes"
            data += piece
        return bytes(data)

    async def read_to_end(self) -> tuple[bytes, End]:
        """Return what comes, and how it ends. ssl.SSLError for an alert."""
        data = bytearray()
        while piece := await self._some(1 << 20):
            data += piece
        assert self._over is not None
        return bytes(data), self._over

    def fin(self) -> None:
        """End our side of TCP, without a word of TLS."""
        self.tcp.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        self.tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.tcp.close()

    def close(self) -> None:
        self.tcp.close()

    async def _some(self, size: int) -> bytes:
        while self._over is None:
            try:
                if data := self.tls.read(size):
                    return data
                self._over = "close_notify"
            except ssl.SSLZeroReturnError:
                self._over = "close_notify"
            except ssl.SSLWantReadError:
                with contextlib.suppress(ConnectionError):
                    await self._push()
                    await self._pull()
        return b""

    async def _push(self) -> None:
        data = self._out.read()
        size = self._piece or len(data)
        for begin in range(0, len(data), size or 1):
            await self.send_raw(data[begin : begin + size])
            if self._piece:
                await asyncio.sleep(0)

    async def _pull(self) -> None:
        try:
            data = await soon(asyncio.get_running_loop().sock_recv(self.tcp, 1 << 18))
        except ConnectionResetError:
            self._over = "reset"
            raise
        if not data:
            self._over = "fin"
            raise ConnectionError("it ended within TLS")
        self._in.write(data)
