"""What stays of an asyncio transport once its connection has become a stream.

asyncio's transports keep what they have not written in a buffer that nobody can take out, and neither asyncio nor
uvloop lets anybody else wait for a descriptor that a transport owns. So a stream works on a duplicate of the socket,
and the transport is parked: it neither reads nor writes, and stays for those who know the connection by it.
"""

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Protocol


class Occupant(Protocol):
    """Who works on the duplicate."""

    def unexpected_input(self, data: bytes) -> None:
        """Take what the transport has read although it was told to stop; b"" is the end of input."""

    def transport_lost(self) -> None:
        """Take note that the transport is closed, by whomever."""


class Parking(asyncio.Protocol):
    """A parked transport, and its protocol from now on. `lost` is told of its end, as the protocol before would be."""

    def __init__(self, transport: asyncio.Transport, lost: Callable[[Exception | None], None]) -> None:
        self._transport = transport
        self._lost = lost
        self._room: asyncio.Future[None] | None = None
        self._occupant: Occupant | None = None

    def admit(self, occupant: Occupant) -> None:
        """Have the transport read no more, and tell `occupant` what happens to it."""
        self._occupant = occupant
        self._transport.pause_reading()

    @property
    def empty(self) -> bool:
        """Whether all that was written before is on the wire."""
        return not self._transport.get_write_buffer_size()

    async def emptied(self) -> None:
        """Return once answers to earlier requests, which may wait in the transport, are on the wire."""
        if not self.empty:
            self._transport.set_write_buffer_limits(high=0)
        while not self.empty:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def end(self) -> None:
        """Close the transport's own descriptor, which says nothing to the client while there is another."""
        self._transport.abort()

    # -- asyncio.Protocol -------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol. A transport that reads on after all does not lose what it reads."""
        if self._occupant is not None:
            self._occupant.unexpected_input(data)

    def eof_received(self) -> bool:
        """See asyncio.Protocol."""
        self.data_received(b"")
        return True

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        if self._occupant is not None:
            self._occupant.transport_lost()
        self._lost(exc)


def duplicate(transport: asyncio.Transport) -> socket.socket:
    """Return a second descriptor of the transport's socket, the caller's. OSError."""
    return socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
