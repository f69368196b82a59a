"""Turning a request into a stream: the connection changes hands, and aiohttp learns that nothing is left to do."""

import asyncio
import socket
from collections.abc import Callable, Mapping

from aiohttp import web

from execgate.http.dialects import Dialect, upgrade_head
from execgate.http.front import FrontProtocol, front_of
from execgate.http.hijack import HijackedStream, OpenStreams, StreamState
from execgate.http.parking import Parking, duplicate
from execgate.model.errors import Unavailable

OPEN_STREAMS = web.AppKey("open_streams", OpenStreams)


def hijack(
    request: web.Request, dialect: Dialect, *, multiplexed: bool, headers: Mapping[str, str] | None = None
) -> HijackedStream:
    """Take the request's connection over; the head of the answer, with `headers`, is the first to go on the wire.

    Unavailable when the host has no room for it, and the request can still be answered.
    """
    upgrade = "Upgrade" in request.headers
    head = upgrade_head(
        dialect, dialect.version_of(request), upgrade=upgrade, multiplexed=multiplexed, headers=headers or {}
    )
    front = front_of(request)
    stream: HijackedStream | None = None

    def successor(transport: asyncio.Transport, held: bytes, eof: bool) -> Parking:
        nonlocal stream
        state = StreamState(
            dialect=dialect.name, multiplexed=multiplexed, unsent=head, head=len(head), unread=held, eof=eof
        )
        stream, parking = _park(transport, state, request.app[OPEN_STREAMS], front)
        return parking

    front.take_over(successor)
    assert stream is not None
    return stream


def restore(fd: int, state: StreamState, streams: OpenStreams) -> HijackedStream:
    """Go on with a connection that `HijackedStream.hand_over` gave away; `fd` is the stream's from now on. OSError."""
    return _stream(socket.socket(fileno=fd), state, streams)


def _park(
    transport: asyncio.Transport, state: StreamState, streams: OpenStreams, front: FrontProtocol
) -> tuple[HijackedStream, Parking]:
    try:
        connection = duplicate(transport)
        parking = Parking(transport, front.connection_lost)
        return _stream(connection, state, streams, parking, front.cut_off), parking
    except OSError as error:
        raise Unavailable("the host is out of resources", hint=f"a client's connection: {error}") from error


def _stream(
    connection: socket.socket,
    state: StreamState,
    streams: OpenStreams,
    parking: Parking | None = None,
    cut_off: Callable[[], object] | None = None,
) -> HijackedStream:
    try:
        return HijackedStream(connection, state, streams, parking, cut_off)
    except OSError:
        connection.close()
        raise


class AlreadyAnswered(web.StreamResponse):
    """Tells aiohttp that nothing is left to be written: the connection is ours."""

    def __init__(self) -> None:
        super().__init__()
        self.force_close()

    async def prepare(self, request: web.BaseRequest) -> None:
        """Write no head."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Write no end."""
