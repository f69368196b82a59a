"""A hijacked connection: after its head it is a raw byte stream in both directions, and never HTTP again.

The rules, and who needs them:

- The head is on the wire before the process starts, and output waits until the client has *read* the head:
  docker-py throws away what arrives in the same read. On a unix socket the kernel tells when (SIOCOUTQ); over TCP
  a few milliseconds are the best there is.
- A half-close of the client is data: the end of its input. Output goes on.
- Room is asked for before more is sent: nothing here grows with output.
- The end is a half-close of ours, and then a bounded wait for the client's, while what it still sends is thrown
  away. A plain close with unread input would make the kernel reset the connection and lose the last output.
"""

import asyncio
import fcntl
import select
import socket
import struct
import termios
from collections import deque
from collections.abc import Callable

from execgate.http.dialects import ErrorLine
from execgate.runtime.readiness import readable
from execgate.sessions.pump import ClientGone
from execgate.wire import stdcopy

READ_LIMIT = 256 * 1024
"""Bytes of input that wait for the process before the client's socket is no longer read."""

WRITE_LIMIT = 256 * 1024
"""Bytes of output that wait for the client before the process's pipe is no longer read."""

_HEAD_READ_TIMEOUT = 1.0
_HEAD_READ_POLL = 0.001
_TCP_HEAD_PAUSE = 0.005
_LINGER = 2.0


class HijackedStream(asyncio.Protocol):
    """The client's side of an attached session (`sessions.manager.AttachedClient`).

    `multiplexed` frames the output with `wire.stdcopy`; otherwise stdout and stderr are one raw stream. `error_line`
    is how the client's API words an error in a stream.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        held: bytes,
        eof: bool,
        *,
        multiplexed: bool,
        error_line: ErrorLine,
        lost: Callable[[Exception | None], None],
    ) -> None:
        self._transport = transport
        self._multiplexed = multiplexed
        self._error_line = error_line
        self._tell_lost = lost
        self._input: deque[bytes] = deque([held] if held else [])
        self._input_size = len(held)
        self._eof = eof
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._head_read: asyncio.Task[None] | None = None
        self._hang_up: asyncio.Task[None] | None = None
        self._finished = False
        transport.set_write_buffer_limits(high=WRITE_LIMIT)

    def __repr__(self) -> str:
        return f"<HijackedStream input={self._input_size} eof={self._eof} finished={self._finished}>"

    def begin(self, head: bytes) -> None:
        """Put the head of the answer on the wire."""
        self._transport.write(head)
        self._head_read = asyncio.ensure_future(self._wait_for_head())
        if self._eof:
            self._await_hang_up()
        if self._input_size < READ_LIMIT:
            self._transport.resume_reading()

    # -- sessions.pump.Client, sessions.manager.AttachedClient ------------------------------------------------------

    async def send(self, stream: int, data: bytes) -> None:
        """Send output, waiting for room. ClientGone."""
        await self._ready()
        if self._multiplexed:
            self._transport.writelines((stdcopy.frame_header(stream, len(data)), data))
        else:
            self._transport.write(data)
        if not self._room.is_set():
            await self._room.wait()
            self._check()

    async def receive(self) -> bytes:
        """Return input; b"" once the client has ended it. ClientGone."""
        while not self._input:
            self._check()
            if self._eof:
                return b""
            self._arrived.clear()
            await self._arrived.wait()
        data = self._input.popleft()
        before, self._input_size = self._input_size, self._input_size - len(data)
        if before >= READ_LIMIT > self._input_size:
            self._transport.resume_reading()
        return data

    async def finish(self, message: str = "") -> None:
        """Send `message` if any, as a line in the stream, then end the connection in order."""
        if self._finished:
            return
        self._finished = True
        if message:
            text = self._error_line.form.format(message).encode(errors="replace")
            try:
                await self.send(self._error_line.stream, text)
            except ClientGone:
                return
        self._discard_input()
        if self._transport.is_closing():
            return
        if self._eof or not self._transport.can_write_eof():
            self._transport.close()
            return
        self._transport.write_eof()
        self._transport.resume_reading()
        asyncio.get_running_loop().call_later(_LINGER, self._transport.close)

    def abandon(self) -> None:
        """Close at once."""
        self._finished = True
        self._transport.close()

    async def wait_closed(self) -> None:
        """Return once the connection is gone."""
        await asyncio.shield(self._closed)

    # -- asyncio.Protocol -------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._finished:
            return
        self._input.append(data)
        before, self._input_size = self._input_size, self._input_size + len(data)
        if before < READ_LIMIT <= self._input_size:
            self._transport.pause_reading()
        self._arrived.set()

    def eof_received(self) -> bool:
        """Take the client's end of input for what it is, and keep the connection open for the output."""
        connection: socket.socket = self._transport.get_extra_info("socket")
        # Not ended its input, but gone: over TCP the two look alike.
        if connection.family == socket.AF_UNIX and hung_up(connection):
            self._transport.abort()
        self._eof = True
        self._arrived.set()
        if not self._finished:
            self._await_hang_up()
        return not self._finished

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        self._room.clear()

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._room.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        if not self._closed.done():
            self._closed.set_result(None)
        self._arrived.set()
        self._room.set()
        for task in (self._head_read, self._hang_up):
            if task is not None:
                task.cancel()
        self._tell_lost(exc)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._closed.done() or self._transport.is_closing():
            raise ClientGone

    async def _ready(self) -> None:
        """Wait until the head was read and there is room."""
        if self._head_read is not None:
            await asyncio.wait([self._head_read])
            self._head_read = None
        if not self._room.is_set():
            await self._room.wait()
        self._check()

    async def _wait_for_head(self) -> None:
        """Wait, not for ever, until the client has read all that was sent."""
        connection: socket.socket = self._transport.get_extra_info("socket")
        if connection.family != socket.AF_UNIX:
            await asyncio.sleep(_TCP_HEAD_PAUSE)
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _HEAD_READ_TIMEOUT
        while self._transport.get_write_buffer_size() or _unread(connection):
            if loop.time() > deadline or self._transport.is_closing():
                return
            await asyncio.sleep(_HEAD_READ_POLL)  # the kernel has no event for "your peer has read it"

    def _await_hang_up(self) -> None:
        """After the end of input nobody looks at the socket any more: let the kernel tell when the client is gone.

        On a unix socket, that is; over TCP a half-close and a close look alike until something is sent.
        """
        connection: socket.socket = self._transport.get_extra_info("socket")
        if connection.family == socket.AF_UNIX and self._hang_up is None:
            self._hang_up = asyncio.ensure_future(self._abort_at_hang_up(connection))

    async def _abort_at_hang_up(self, connection: socket.socket) -> None:
        with select.epoll() as epoll:
            epoll.register(connection.fileno(), 0)  # EPOLLHUP and EPOLLERR are told always, epoll_ctl(2)
            await readable(epoll.fileno())
        self._transport.abort()

    def _discard_input(self) -> None:
        self._input.clear()
        self._input_size = 0


def hung_up(connection: socket.socket) -> bool:
    """Return whether a connection is closed in both directions: on a unix socket, whether the peer has closed it."""
    poll = select.poll()
    poll.register(connection.fileno(), 0)  # POLLHUP is told always, poll(2)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


def _unread(connection: socket.socket) -> int:
    """Return how many of the bytes sent on a unix socket the peer has not read (SIOCOUTQ, unix(7))."""
    try:
        answer = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
    except OSError:  # closed meanwhile
        return 0
    return int(struct.unpack("=i", answer)[0])
