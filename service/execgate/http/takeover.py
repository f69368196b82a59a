"""Turning a request into a stream: the connection changes hands, and aiohttp learns that nothing is left to do."""

from collections.abc import Mapping
from typing import Any

from aiohttp import web

from execgate.http.dialects import Dialect, upgrade_head
from execgate.http.front import front_of
from execgate.http.hijack import HijackedStream


def hijack(
    request: web.Request, dialect: Dialect, *, multiplexed: bool, headers: Mapping[str, str] | None = None
) -> HijackedStream:
    """Take the request's connection over and put the head of the answer, with `headers`, on the wire."""
    front = front_of(request)
    stream: HijackedStream | None = None

    def successor(transport: Any, held: bytes, eof: bool) -> HijackedStream:
        nonlocal stream
        stream = HijackedStream(
            transport,
            held,
            eof,
            multiplexed=multiplexed,
            error_line=dialect.error_line,
            lost=front.connection_lost,
        )
        return stream

    front.take_over(successor)
    assert stream is not None
    upgrade = "Upgrade" in request.headers
    head = upgrade_head(
        dialect, dialect.version_of(request), upgrade=upgrade, multiplexed=multiplexed, headers=headers or {}
    )
    stream.begin(head)
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
