"""Turning a request into a stream: the connection changes hands, and aiohttp learns that nothing is left to do."""

import asyncio
from collections.abc import Mapping

from aiohttp import web

from execgate.http.dialects import Dialect, upgrade_head
from execgate.http.front import front_of
from execgate.http.hijack import HijackedStream, OpenStreams, StreamState
from execgate.http.parking import Parking, duplicate
from execgate.model.errors import Unavailable

OPEN_STREAMS: web.AppKey[OpenStreams] = web.AppKey("open_streams", OpenStreams)
"""Where an application has its hijacked connections."""


def hijack(
    request: web.Request, dialect: Dialect, *, multiplexed: bool, headers: Mapping[str, str] | None = None
) -> HijackedStream:
    """Take the request's connection over and put the head of the answer, with `headers`, on the wire. Unavailable."""
    front = front_of(request)
    head = upgrade_head(
        dialect,
        dialect.version_of(request),
        upgrade="Upgrade" in request.headers,
        multiplexed=multiplexed,
        headers=headers or {},
    )
    streams = request.app[OPEN_STREAMS]
    stream: HijackedStream | None = None

    def successor(transport: asyncio.Transport, held: bytes, eof: bool) -> Parking:
        nonlocal stream
        state = StreamState(
            dialect=dialect.name, multiplexed=multiplexed, unsent=head, head=len(head), unread=held, eof=eof
        )
        connection = duplicate(transport)
        parking = Parking(transport, front.connection_lost)
        stream = HijackedStream(connection, state, streams, parking)
        return parking

    try:
        front.take_over(successor)
    except ConnectionError:
        raise
    except OSError as error:
        raise Unavailable("the host has no room for another connection", hint=str(error)) from error
    assert stream is not None
    return stream


class AlreadyAnswered(web.StreamResponse):
    """Tells aiohttp that nothing is left to be written: the connection was ours, and is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.force_close()

    async def prepare(self, request: web.BaseRequest) -> None:
        """Write no head."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Write no end."""
