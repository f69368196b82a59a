"""The standard streams of an exec'd process, behind one small interface.

Two kinds exist, and whoever pumps cannot tell them apart:

- **pipes** (no TTY): the process reads and writes them itself, conmon is not in the way;
- **the attach socket** of conmon (TTY): one SEQPACKET connection a session, packets of `wire.attach`.

An `Output` is read to its end: `None` says that no more will come. `cut()` sets the end by hand: what is buffered
*now* is still delivered, however slow the reader, and nothing after it. That is how a background child that keeps
stdout open cannot hold the session (moby#33039). A `read` may be cancelled as long as it waits; from taking output out
of the pipe or socket to returning it, it does not wait. Output that is to outlive the service is not taken out first
and kept afterwards: a `Recorder` does both at once. An `Input` swallows the process's own closing: when nobody reads
stdin any more, `write` says so once and for all by raising `InputClosed`.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from execgate.runtime.readiness import Descriptor, ReadWaiter, WriteWaiter
from execgate.wire import attach

READ_SIZE = 256 * 1024
"""The most that one read takes: one event-loop turn moves a bounded amount a session."""

BULK_PIPE_SIZE = 1 << 20
"""A pipe that proves busy grows to this. Idle ones keep 64 KiB, because the kernel limits an unprivileged user's
pipe pages in total (pipe-user-pages-soft: 64 MiB), and above that gives new pipes a single page."""

INPUT_PIPE_SIZE = 256 * 1024
"""The same for stdin. More makes nothing faster, and what is moved by the kernel is counted in pages of any size: each
4 KiB of a pipe can hold 32 KiB of what came by a unix socket."""

_DEFAULT_PIPE_SIZE = 64 * 1024

SPLICE_MIN = 32 * 1024
"""Below this a copy costs less than asking the kernel how much there is, and then to move it."""

_REFUSALS = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})
"""What splice says when it cannot serve here: the kernel, the kind of the file, or a seccomp filter (EPERM)."""


class InputClosed(Exception):
    """Nobody will ever read what is written to stdin: the process closed it, or is gone."""


class Recorder(Protocol):
    """Takes output from where it waits and keeps it, in one step. What it cannot keep it takes all the same."""

    def from_pipe(self, stream: int, pipe: int, size: int) -> bytes:
        """Take at most `size` bytes of `stream` from a pipe, and return them; b"" at its end, else BlockingIOError."""

    def packet(self, stream: int, payload: bytes, consume: Callable[[], None]) -> None:
        """Keep a packet's payload, and call `consume`, once, which takes the packet from the head of its queue."""

    def settle(self) -> None:
        """Take note that no packet waits: the one that an earlier service kept last has been consumed."""


Recorders = Mapping[int, Recorder]
"""Whoever keeps a stream; one that is missing here is not kept."""

UNRECORDED: Recorders = MappingProxyType({})


class OutputGone(OSError):
    """Output that waited in its pipe is gone. Whoever may write to a pipe can open it and read it back (proc(5))."""


class Unspliceable(Exception):
    """The kernel does not move these bytes; they are where they were, and have to be copied."""


class Waiting:
    """Output that waits in its pipe: the next `left` bytes of `stream`, which are the holder's.

    Nobody else may read the pipe before they are gone, and they may be left where they are: then they are read next.
    """

    __slots__ = ("_output", "left")

    def __init__(self, output: "PipeOutput", size: int) -> None:
        self._output = output
        self.left = size

    def __repr__(self) -> str:
        return f"<Waiting stream={self.stream} left={self.left}>"

    @property
    def stream(self) -> int:
        """1 is stdout, 2 stderr."""
        return self._output.stream

    def splice(self, target: int) -> int:
        """Move what `target` takes now, and return how much that is: at least a byte.

        BlockingIOError when it takes none, Unspliceable when it never will, OutputGone when there is nothing to be
        moved, another OSError when the target is at its end.
        """
        moved = self._output.splice(target, self.left)
        self.left -= moved
        return moved

    def read(self) -> bytes:
        """Copy all of it out. OutputGone."""
        data = self._output.take(self.left)
        self.left = 0
        return data


class Output(Protocol):
    """Where the process's output comes out."""

    async def read(self, recorders: Recorders = UNRECORDED) -> tuple[int, bytes] | None:
        """Return (stream, bytes): 1 is stdout, 2 stderr. None at the end."""

    async def bulk(self) -> Waiting | None:
        """Return much output that is there, to be moved and not read; None when there is little: then `read`."""

    def cut(self) -> None:
        """End after what is buffered now."""

    def close(self) -> None:
        """Let go at once. Must not be called while a read is waiting."""


class Inflow(Protocol):
    """Where input waits that the kernel itself can move."""

    def splice(self, target: int) -> int:
        """Move to a pipe what it takes now; 0 when little waits, or nothing can be moved: then it is to be read.

        BlockingIOError when the pipe is full, BrokenPipeError when nobody reads it.
        """


class Input(Protocol):
    """Where the process's stdin goes in."""

    @property
    def written(self) -> int:
        """How many bytes were accepted so far, those of a call that was cancelled included."""

    async def write(self, data: bytes) -> None:
        """Write all of `data`, waiting for room; InputClosed when nobody reads any more."""

    async def splice(self, inflow: Inflow) -> bool:
        """Take much input that waits, waiting for room; False when there is little, or it has to be written.

        InputClosed when nobody reads any more.
        """

    def close(self) -> None:
        """Give the process its end of file (a TTY has none to give). May be called twice."""


@dataclass(frozen=True, slots=True)
class ExecStreams:
    """What of a process is attached: one `Output` for each source of output, and stdin if it is wanted."""

    outputs: Sequence[Output] = ()
    input: Input | None = None

    def close(self) -> None:
        """Let go of everything; stdin first, because a terminal's two halves are one socket."""
        if self.input is not None:
            self.input.close()
        for output in self.outputs:
            output.close()


def buffered(fd: int) -> int:
    """Return how many bytes wait to be read."""
    answer = fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0")
    return int(struct.unpack("=i", answer)[0])


class PipeOutput:
    """The read end of a pipe that the process writes stdout or stderr to."""

    __slots__ = ("_busy", "_grown", "_left", "_pipe", "_spliceable", "_waiter", "stream")

    def __init__(self, pipe: Descriptor, stream: int) -> None:
        os.set_blocking(pipe.fileno(), False)
        self._pipe = pipe
        self.stream = stream
        self._waiter = ReadWaiter(pipe.fileno())
        self._left: int | None = None  # after a cut: what may still pass
        self._grown = False
        self._busy = False  # the last read was a large one
        self._spliceable = True

    async def read(self, recorders: Recorders = UNRECORDED) -> tuple[int, bytes] | None:
        """See `Output.read`."""
        recorder = recorders.get(self.stream)
        await self._yield()
        while (size := READ_SIZE if self._left is None else min(self._left, READ_SIZE)) > 0:
            try:
                data = self._take(size, recorder)
            except BlockingIOError:
                if self._left is not None:  # what was there at the cut is gone: see `OutputGone`
                    return None
                data = None
            if data is None:  # out here: an exception that is being handled keeps its frames as long as one waits
                await self._waiter.wait()
                continue
            self._passed(len(data))
            if len(data) >= _DEFAULT_PIPE_SIZE:
                self._grown = self._grown or _grow(self._pipe, BULK_PIPE_SIZE)
                self._busy = True
            return (self.stream, data) if data else None
        return None

    async def bulk(self) -> Waiting | None:
        """See `Output.bulk`. The first large piece is read, so that little output costs nothing more."""
        if not self._busy or not self._spliceable:
            return None
        await self._yield()
        size = min(buffered(self._pipe.fileno()), BULK_PIPE_SIZE)
        if self._left is not None:
            size = min(size, self._left)
        if size < SPLICE_MIN:
            return None
        self._busy = True
        return Waiting(self, size)

    def splice(self, target: int, size: int) -> int:
        """See `Waiting.splice`."""
        try:
            moved = os.splice(self._pipe.fileno(), target, size, flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            if not buffered(self._pipe.fileno()):  # it is not the target that one would have to wait for
                raise OutputGone from None
            raise
        except OSError as error:
            if error.errno in _REFUSALS:
                self._spliceable = False
                raise Unspliceable from error
            raise
        if not moved:
            raise OutputGone
        self._passed(moved)
        return moved

    def take(self, size: int) -> bytes:
        """Read `size` bytes that are there. OutputGone, if they are not."""
        pieces = []
        while size:
            try:
                pieces.append(os.read(self._pipe.fileno(), size))
            except BlockingIOError:
                raise OutputGone from None
            if not pieces[-1]:
                raise OutputGone
            size -= len(pieces[-1])
            self._passed(len(pieces[-1]))
        return b"".join(pieces)

    async def _yield(self) -> None:
        """A busy stream must not starve the others. Before a read, so that a cancel loses none."""
        if self._busy:
            self._busy = False
            await asyncio.sleep(0)

    def _passed(self, size: int) -> None:
        if self._left is not None:
            self._left -= size

    def _take(self, size: int, recorder: Recorder | None) -> bytes:
        fd = self._pipe.fileno()
        return os.read(fd, size) if recorder is None else recorder.from_pipe(self.stream, fd, size)

    def fileno(self) -> int:
        """Return the pipe's descriptor."""
        return self._pipe.fileno()

    def cut(self) -> None:
        """See `Output.cut`."""
        if self._pipe and self._left is None:
            self._left = buffered(self._pipe.fileno())
            self._waiter.wake()

    def close(self) -> None:
        """See `Output.close`."""
        self._pipe.close()


class PipeInput:
    """The write end of the pipe that is the process's stdin. `ended` is called when it is closed."""

    __slots__ = ("_ended", "_grown", "_pipe", "_waiter", "written")

    def __init__(self, pipe: Descriptor, ended: Callable[[], None] = lambda: None) -> None:
        os.set_blocking(pipe.fileno(), False)
        self._pipe = pipe
        self._ended = ended
        self.written = 0
        self._waiter = WriteWaiter(pipe.fileno())
        self._grown = False

    async def write(self, data: bytes) -> None:
        """See `Input.write`."""
        view = memoryview(data)
        while view:
            if not self._pipe:
                raise InputClosed
            try:
                count = os.write(self._pipe.fileno(), view)
                self.written += count
                view = view[count:]
                continue
            except BlockingIOError:
                pass
            except BrokenPipeError:
                self.close()
                raise InputClosed from None
            await self._room()

    async def splice(self, inflow: Inflow) -> bool:
        """See `Input.splice`."""
        for _ in range(2):  # a pipe with room takes something; if not, it is a matter for `write`
            if not self._pipe:
                raise InputClosed
            try:
                moved = inflow.splice(self._pipe.fileno())
                self.written += moved
                return moved > 0
            except BlockingIOError:
                pass
            except BrokenPipeError:
                self.close()
                raise InputClosed from None
            await self._room()
        return False

    async def _room(self) -> None:
        if not self._grown:
            self._grown = _grow(self._pipe, INPUT_PIPE_SIZE)
        await self._waiter.wait()

    def fileno(self) -> int:
        """Return the pipe's descriptor."""
        return self._pipe.fileno()

    def close(self) -> None:
        """See `Input.close`."""
        self._waiter.release()
        if self._pipe:
            self._pipe.close()
            self._ended()


class AttachOutput:
    """The output half of conmon's attach socket."""

    __slots__ = ("_cut", "_reset", "_socket", "_waiter")

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._waiter = ReadWaiter(connection.fileno())
        self._cut = False
        self._reset = False

    async def read(self, recorders: Recorders = UNRECORDED) -> tuple[int, bytes] | None:
        """See `Output.read`."""
        while True:
            try:
                return self._take(recorders) if recorders else self._receive()
            except BlockingIOError:
                pass
            except ConnectionResetError:
                # conmon closed with our input unread. The kernel says so once, *before* what still waits to be read.
                if self._reset:
                    return None
                self._reset = True
                continue
            for recorder in recorders.values():
                recorder.settle()
            if self._cut:
                return None
            await self._waiter.wait()

    async def bulk(self) -> Waiting | None:
        """See `Output.bulk`. A packet's first byte is no output."""
        return None

    def _receive(self, flags: int = 0) -> tuple[int, bytes] | None:
        packet = self._socket.recv(attach.PACKET_READ_SIZE, flags)
        return attach.parse_packet(packet) if packet else None

    def _take(self, recorders: Recorders) -> tuple[int, bytes] | None:
        """Receive a packet by way of whoever keeps its stream."""
        if (chunk := self._receive(socket.MSG_PEEK)) is not None:
            recorder = recorders.get(chunk[0])
            if recorder is None:
                self._consume()
            else:
                recorder.packet(*chunk, self._consume)
        return chunk

    def _consume(self) -> None:
        """Take the packet that was looked at from the queue: all of it, whatever the size asked for."""
        try:
            self._socket.recv(1)
        except ConnectionResetError:  # in this moment: see `read`
            self._reset = True
            self._socket.recv(1)

    def waiting(self) -> bool:
        """Return whether there is output that was not read yet."""
        return self._socket.fileno() >= 0 and buffered(self._socket.fileno()) > 0

    def cut(self) -> None:
        """See `Output.cut`. What conmon has not sent yet is not waited for."""
        self._cut = True
        self._waiter.wake()

    def close(self) -> None:
        """See `Output.close`. From now on conmon drops what the process writes."""
        self._socket.close()


class AttachInput:
    """The input half of conmon's attach socket. `blocked` says that conmon takes no more of it now."""

    __slots__ = ("_closed", "_socket", "_waiter", "blocked", "written")

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._waiter = WriteWaiter(connection.fileno())
        self._closed = False
        self.blocked = False
        self.written = 0

    async def write(self, data: bytes) -> None:
        """See `Input.write`."""
        for packet in attach.input_packets(data):
            await self._send(packet)

    async def splice(self, inflow: Inflow) -> bool:  # noqa: ARG002
        """See `Input.splice`. It has to be cut in packets."""
        return False

    async def _send(self, packet: memoryview) -> None:
        while not self._closed:
            try:
                self._socket.send(packet)
                self.written += len(packet)
                return
            except BlockingIOError:
                self.blocked = True
            except OSError as error:  # EPIPE, ECONNRESET: conmon is gone
                raise InputClosed from error
            await self._waiter.wait()
            self.blocked = False
        raise InputClosed

    def close(self) -> None:
        """See `Input.close`. A terminal's end of file is a character, not an event: it is told nothing."""
        self._closed = True
        self._waiter.release()


def _grow(pipe: Descriptor, size: int) -> bool:
    """Enlarge a busy pipe; over the user's limit it stays as it is, which costs speed and nothing else."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, size)
    return True
