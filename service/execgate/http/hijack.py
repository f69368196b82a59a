"""A hijacked connection: after its head it is a raw byte stream in both directions, and never HTTP again.

The rules, and who needs them:

- The head is on the wire before the process starts, and output waits until the client has *read* the head:
  docker-py throws away what arrives in the same read. On a unix socket the kernel tells when (SIOCOUTQ); over TCP
  a few milliseconds are the best there is.
- A half-close of the client is data: the end of its input. Output goes on.
- Room is waited for before more is taken: nothing here grows with output, and input stays in the kernel until it is
  asked for.
- The end is a half-close of ours, and then a bounded wait for the client's, while what it still sends is thrown
  away. A plain close with unread input would make the kernel reset the connection and lose the last output.
- Much output is not copied: it is promised to the connection, in its turn among what is sent, while it still waits in
  its pipe (`runtime.streams.Waiting`), and the kernel moves it from there. Much input likewise.
- At every moment it is known which bytes are on the wire, so that the connection can be handed to another process,
  in the middle of a frame if need be. Output is *accepted* before anything is awaited: from then on it is the
  stream's, whatever becomes of the caller. Input is taken from the wire by calls that await nothing after it.
"""

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import cast

from execgate.http.dialects import dialect_named
from execgate.http.hang_ups import HangUps, hung_up
from execgate.http.parking import Parking
from execgate.runtime.readiness import ReadWaiter, WriteWaiter
from execgate.runtime.streams import SPLICE_MIN, OutputGone, Unspliceable, Waiting, buffered
from execgate.sessions.pump import ClientGone
from execgate.wire import stdcopy

READ_SIZE = 256 * 1024
"""The most that one read takes."""

SEND_BUFFER = 256 * 1024
"""Bytes that a unix socket takes before its peer reads: a whole read of ours, which by the kernel's default takes two.
The kernel doubles what it is asked for, and uses some of it for its own books (socket(7))."""

_PIECES_AT_ONCE = 16
_HEAD_READ_TIMEOUT = 1.0
_HEAD_READ_POLL = 0.001
_TCP_HEAD_PAUSE = 0.005
_LINGER = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamState:
    """What one needs to know of a hijacked connection, beside its descriptor, to go on with it exactly there."""

    dialect: str
    """`Dialect.name`."""

    multiplexed: bool
    """Whether output is framed with `wire.stdcopy`; otherwise stdout and stderr are one raw stream."""

    unsent: bytes
    """What was accepted and is not on the wire yet: the head, the rest of a frame, whole frames."""

    head: int | None
    """How many bytes of `unsent` are the head, behind which output waits until the client has read it; None: it has."""

    unread: bytes
    """Input that was taken from the wire, and not by the session."""

    eof: bool
    """Whether the client has ended its input, and that was seen."""

    finished: bool = False
    """Whether the session is done with it: what is unsent is to be delivered, and farewell said."""


class OpenStreams:
    """The hijacked connections of a server, those that say farewell included, until each is over."""

    def __init__(self) -> None:
        self._streams: set[HijackedStream] = set()
        self.hang_ups = HangUps()

    def __iter__(self) -> Iterator["HijackedStream"]:
        return iter(tuple(self._streams))

    def __len__(self) -> int:
        return len(self._streams)

    def add(self, stream: "HijackedStream") -> None:
        """Take note of one more."""
        self._streams.add(stream)

    def discard(self, stream: "HijackedStream") -> None:
        """Forget one that is over."""
        self._streams.discard(stream)


class HijackedStream:
    """The client's side of an attached session (`sessions.live.AttachedClient`).

    It goes on where `state` says, on a socket that is its own from now on; `parking` is the transport that has another
    descriptor of it. `cut_off` cuts what carries the connection beyond that socket (`FrontProtocol.cut_off`), for
    whatever is no end of the stream. OSError, and then nothing has happened.
    """

    def __init__(
        self,
        connection: socket.socket,
        state: StreamState,
        streams: OpenStreams,
        parking: Parking | None = None,
        cut_off: Callable[[], object] | None = None,
    ) -> None:
        connection.setblocking(False)
        if connection.family == socket.AF_UNIX:  # one of TCP grows by itself, unless it is told
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._socket = connection
        self._parking = parking
        self._cut_off = cut_off
        self._ended = False  # we have said that nothing more comes
        self._streams = streams
        self._dialect = dialect_named(state.dialect)
        self._multiplexed = state.multiplexed
        self._head = _Outgoing(state.unsent[: state.head or 0])
        self._output = _Outgoing(state.unsent[state.head or 0 :])
        self._held = [state.unread] if state.unread else []
        self._eof = state.eof
        self._finished = state.finished
        self._gone = False
        self._handed_over = False
        self._took = False  # the last step was a read that had not to wait
        self._spliceable = True
        self._turn = asyncio.Lock()  # whose turn it is to write
        self._readable = ReadWaiter(connection.fileno())
        self._writable = WriteWaiter(connection.fileno())
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._opening: asyncio.Task[None] | None = None
        self._resumption: asyncio.Task[None] | None = None
        self._farewell: asyncio.Task[None] | None = None
        streams.hang_ups.watch(connection.fileno(), self._lose)
        streams.add(self)
        if parking is not None:
            parking.admit(self)
        if state.head is not None:
            self._opening = asyncio.create_task(self._open())
        if state.finished:
            self._begin_farewell()
        elif self._output.accepted:
            self._resumption = asyncio.create_task(self._resume())

    def __repr__(self) -> str:
        return (
            f"<HijackedStream unsent={len(self._head) + len(self._output)} eof={self._eof} "
            f"finished={self._finished} gone={self._gone} handed_over={self._handed_over}>"
        )

    # -- sessions.pump.Client, sessions.live.AttachedClient ---------------------------------------------------------

    async def send(self, stream: int, data: bytes) -> None:
        """Send output; return once it is on the wire. ClientGone.

        It is accepted at once: a call that is cancelled while it waits has lost nothing and must not be repeated.
        """
        if not self._gone and not self._handed_over:
            self._accept(stream, data)
        await self._deliver()

    async def send_waiting(self, waiting: Waiting) -> None:
        """Send output that waits in a pipe; return once it is on the wire. ClientGone.

        It is accepted at once, as by `send`: a call that is cancelled must not be repeated, and nobody may read the
        pipe before the connection is handed over, which takes the rest out, or closed.
        """
        if not self._gone and not self._handed_over:
            if self._multiplexed:
                self._output.add(stdcopy.frame_header(waiting.stream, waiting.left))
            self._output.promise(waiting)
        await self._deliver()

    def splice(self, target: int) -> int:
        """Move input that waits to a pipe (`runtime.streams.Inflow`)."""
        closed = self._finished or self._gone or self._handed_over
        if closed or self._held or self._eof or not self._spliceable or buffered(self._socket.fileno()) < SPLICE_MIN:
            return 0
        try:
            return os.splice(self._socket.fileno(), target, READ_SIZE, flags=os.SPLICE_F_NONBLOCK)
        except (BlockingIOError, BrokenPipeError):
            raise
        except OSError:  # `receive` tells whether it is the connection's end, or only that the kernel refuses
            self._spliceable = False
            return 0

    async def receive(self) -> bytes:
        """Return input; b"" once the client has ended it. ClientGone, behind the last that it sent."""
        while not self._finished or self._gone:
            if self._held:
                return self._held.pop(0)
            if (data := await self._read()) is not None:
                return data
        raise ClientGone

    async def finish(self, message: str = "") -> None:
        """Send `message` if any, as a line in the stream, then end the connection in order; both in the background."""
        if self._finished or self._gone or self._handed_over:
            return
        if message:
            line = self._dialect.error_line
            self._accept(line.stream, line.form.format(message).encode(errors="replace"))
        self._finished = True
        self._readable.release()
        self._begin_farewell()

    def abandon(self) -> None:
        """Close at once. One that was handed over is only parted from."""
        if self._handed_over:
            self._settle()
        else:
            self._close()

    async def wait_closed(self) -> None:
        """Return once the connection is gone."""
        await asyncio.shield(self._closed)

    # -- handing over -----------------------------------------------------------------------------------------------

    def hand_over(self) -> tuple[int, StreamState] | None:
        """Stop, and return a descriptor of the connection (the caller's, close-on-exec) and where it stands.

        From now on no byte moves and nothing is accepted. To the session it looks as if the client was silent: `send`,
        `receive` and `wait_closed` wait until they are cancelled, or the session parts from the stream with `abandon`.
        Where the session is done with it already, nobody but the HTTP request waits, and is let go.

        None when there is nothing to hand over: the client is gone, or what it was promised; it was done before; or
        answers to earlier requests are still in the transport's own buffer, where nobody can take them out; or more
        than the socket carries the connection. In these last two cases the stream goes on.
        """
        if self._gone or self._handed_over or (self._parking is not None and not self._parking.empty):
            return None
        if self._cut_off is not None:
            return None
        head = len(self._head) if self._opening is not None and not self._opening.done() else None
        try:
            unsent = self._head.take() + self._output.take()
        except OutputGone:  # its frame cannot be completed
            self._close()
            return None
        state = StreamState(
            dialect=self._dialect.name,
            multiplexed=self._multiplexed,
            unsent=unsent,
            head=head,
            unread=b"".join(self._held),
            eof=self._eof,
            finished=self._finished,
        )
        self._handed_over = True
        self._held.clear()
        self._stop()
        fd = self._socket.detach()
        if self._parking is not None:
            self._parking.end()
        if self._finished:
            self._settle()
        return fd, state

    # -- parking.Occupant -------------------------------------------------------------------------------------------

    def unexpected_input(self, data: bytes) -> None:
        """See `parking.Occupant`."""
        if data:
            self._held.append(data)
        else:
            self._eof = True
        self._readable.wake()

    def transport_lost(self) -> None:
        """See `parking.Occupant`."""
        if not self._handed_over:
            self._close()
            self._settle()

    # -- output -----------------------------------------------------------------------------------------------------

    def _accept(self, stream: int, data: bytes) -> None:
        if self._multiplexed:
            self._output.add(stdcopy.frame_header(stream, len(data)))
        self._output.add(data)

    async def _deliver(self) -> None:
        """Return once all that was accepted by now is on the wire. ClientGone."""
        mark = self._output.accepted
        if self._opening is not None:
            if not self._opening.done():
                await asyncio.wait([self._opening])
            if not self._handed_over:
                self._opening = None
        await self._flush(self._output, mark)

    async def _resume(self) -> None:
        """Deliver what an earlier service had accepted: its process may never write again."""
        with contextlib.suppress(ClientGone):
            await self._deliver()

    async def _flush(self, queue: "_Outgoing", mark: int) -> None:
        async with self._turn:
            while queue.written < mark:
                await self._check()
                try:
                    queue.send(self._socket)
                    continue
                except BlockingIOError:
                    pass
                except OSError as error:  # EPIPE, ECONNRESET; OutputGone: no frame could follow
                    self._lose()
                    raise ClientGone from error
                await self._writable.wait()
        await self._check()

    async def _open(self) -> None:
        """Put the head on the wire, and wait, not for ever, until the client has read all that was sent."""
        if self._parking is not None:
            await self._parking.emptied()
        with contextlib.suppress(ClientGone):
            await self._flush(self._head, self._head.accepted)
            await self._head_read()

    async def _head_read(self) -> None:
        if self._socket.family != socket.AF_UNIX:
            await asyncio.sleep(_TCP_HEAD_PAUSE)
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _HEAD_READ_TIMEOUT
        while _unread(self._socket):
            if loop.time() > deadline:
                return
            await asyncio.sleep(_HEAD_READ_POLL)  # the kernel has no event for "your peer has read it"

    # -- input ------------------------------------------------------------------------------------------------------

    async def _read(self) -> bytes | None:
        """Return what is on the wire, b"" at the end, or None after a wait: look again at everything. ClientGone."""
        if self._took:
            self._took = False
            await asyncio.sleep(0)  # a client that sends without a pause must not starve the others
            return None
        await self._check()
        if self._eof:
            return b""
        try:
            data = self._socket.recv(READ_SIZE)
        except BlockingIOError:
            data = None
        except OSError:
            self._lose()
            return None
        if data is None:
            await self._readable.wait()
            return None
        self._took = True
        if not data:
            self._eof = True
            if hung_up(self._socket):  # not ended its input, but gone
                self._lose()
                return None
        return data

    # -- the end ----------------------------------------------------------------------------------------------------

    async def _check(self) -> None:
        """ClientGone when no byte can move any more; after a handing over, wait."""
        if self._handed_over:
            await self.wait_closed()
            raise ClientGone
        if self._gone:
            raise ClientGone

    def _begin_farewell(self) -> None:
        self._held.clear()
        self._farewell = asyncio.create_task(self._say_farewell())
        self._farewell.add_done_callback(lambda _: self._close())

    async def _say_farewell(self) -> None:
        """Deliver what was accepted, however slow the reader: a client that is gone ends it. Then end in order."""
        discarding = asyncio.create_task(self._discard_input())  # at once: a client may read only once it has sent all
        try:
            await self._deliver()
            self._socket.shutdown(socket.SHUT_WR)
            self._ended = True
            await asyncio.wait([discarding], timeout=_LINGER)
        except (ClientGone, OSError):  # ENOTCONN: it is gone, and that was not noticed yet
            pass
        finally:
            discarding.cancel()

    async def _discard_input(self) -> None:
        with contextlib.suppress(ClientGone):
            while await self._read() != b"":
                pass

    def _lose(self) -> None:
        """Close what the client has left. What it sent before is in the kernel, and still input."""
        last = _last_input(self._socket)  # whoever wants it: unread, it would make our close a reset
        if not self._finished:
            self._held.extend(last)
        self._close()

    def _close(self) -> None:
        if self._gone or self._handed_over:
            return
        self._gone = True
        self._stop()
        if self._cut_off is not None and not self._ended:
            self._cut_off()
        self._socket.close()
        if self._parking is not None:
            self._parking.end()  # and `transport_lost` comes
        else:
            self._settle()

    def _stop(self) -> None:
        """Have nothing wait for the socket: its number may soon be another's."""
        self._streams.hang_ups.forget(self._socket.fileno())
        self._readable.release()
        self._writable.release()
        for task in (self._opening, self._resumption, self._farewell):
            if task is not None:
                task.cancel()

    def _settle(self) -> None:
        self._streams.discard(self)
        if not self._closed.done():
            self._closed.set_result(None)


class _Outgoing:
    """Bytes on their way, in order: some here, some in the pipe where they wait.

    `accepted` and `written` count all that ever were.
    """

    __slots__ = ("_pieces", "accepted", "written")

    def __init__(self, data: bytes) -> None:
        self._pieces: list[memoryview | Waiting] = []  # a few: what is sent is waited for. A deque is never small
        self.accepted = 0
        self.written = 0
        self.add(data)

    def __len__(self) -> int:
        return self.accepted - self.written

    def add(self, data: bytes) -> None:
        """Accept it."""
        if data:
            self._pieces.append(memoryview(data))
            self.accepted += len(data)

    def promise(self, waiting: Waiting) -> None:
        """Accept what is left where it waits."""
        self._pieces.append(waiting)
        self.accepted += waiting.left

    def send(self, connection: socket.socket) -> None:
        """Put on the wire what it takes now. BlockingIOError, another OSError at an end."""
        first = self._pieces[0]
        if isinstance(first, Waiting):
            self._splice(first, connection)
            return
        here = takewhile(lambda piece: isinstance(piece, memoryview), islice(self._pieces, _PIECES_AT_ONCE))
        sent = connection.sendmsg(cast("list[memoryview]", list(here)))
        self.written += sent
        while sent:
            piece = cast("memoryview", self._pieces[0])
            if sent < len(piece):
                self._pieces[0] = piece[sent:]
                return
            del self._pieces[0]
            sent -= len(piece)

    def take(self) -> bytes:
        """Take out what is not on the wire, from the pipes too. OutputGone."""
        rest = b"".join(piece.read() if isinstance(piece, Waiting) else piece for piece in self._pieces)
        self._pieces.clear()
        self.written = self.accepted
        return rest

    def _splice(self, waiting: Waiting, connection: socket.socket) -> None:
        try:
            self.written += waiting.splice(connection.fileno())
        except Unspliceable:
            self._pieces[0] = memoryview(waiting.read())
            return
        if not waiting.left:
            del self._pieces[0]


def _last_input(connection: socket.socket) -> list[bytes]:
    """Return what is there to be read, where no more can come: the kernel's buffer is the bound."""
    pieces = []
    with contextlib.suppress(OSError):
        while data := connection.recv(READ_SIZE):
            pieces.append(data)
    return pieces


def _unread(connection: socket.socket) -> int:
    """Return how many of the bytes sent on a unix socket the peer has not read (SIOCOUTQ, unix(7))."""
    answer = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
    return int(struct.unpack("=i", answer)[0])
