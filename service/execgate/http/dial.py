"""A client's way to a service through TLS, for streams: ordinary requests leave it to their HTTP library."""

import asyncio
import contextlib
import socket
import ssl

from execgate.http.hang_ups import HangUps
from execgate.http.tunnel import READ_SIZE, Channel, Tunnel


class Secured:
    """A stream of plain bytes that a tunnel carries: `reader` and `writer`. `close` it.

    Half-closing the writer is the end of the input, and says so to the service. When `reader` is at its end, `failure`
    tells whether that is one: without it the service has said so; otherwise the connection was cut.
    """

    def __init__(self, tunnel: Tunnel, channel: Channel) -> None:
        self.failure: OSError | None = None
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter
        self._tunnel = tunnel
        self._channel = channel

    async def open(self, limit: int) -> None:
        """Begin; `limit` is the reader's."""
        plain, pair = socket.socketpair()
        self._task = asyncio.create_task(self._run(pair))
        self.reader, self.writer = await asyncio.open_unix_connection(sock=plain, limit=limit)

    async def close(self, *, hang_up: bool) -> None:
        """Deliver what was written, and end the connection; with `hang_up` as one that left, not as one that ended."""
        self._tunnel.polite = not hang_up
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()
        await asyncio.wait([self._task])

    async def _run(self, pair: socket.socket) -> None:
        try:
            with pair:
                await self._relay(pair)
            if self.failure is None:
                await self._tunnel.part()
        finally:
            self._tunnel.close()

    async def _relay(self, pair: socket.socket) -> None:
        try:
            await self._tunnel.relay(self._channel, pair)
        except OSError as error:
            self.failure = error


async def dial(host: str, port: int, context: ssl.SSLContext) -> Secured:
    """Connect, and shake hands with the service, which has to be `host` by its certificate. OSError.

    With TLS 1.3 a service refuses a client's certificate behind that: it is the failure of the stream.
    """
    tunnel = Tunnel(await _connected(host, port), HangUps())
    try:
        channel = Channel(context, host)
        await tunnel.handshake(channel)
        secured = Secured(tunnel, channel)
        await secured.open(READ_SIZE)
    except BaseException:
        tunnel.close()
        raise
    return secured


async def _connected(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    failure: OSError | None = None
    for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.setblocking(False)
            await loop.sock_connect(connection, address)
        except OSError as error:
            connection.close()
            failure = error
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise failure or OSError(f"{host} has no address")
