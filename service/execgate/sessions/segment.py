"""One file of captured output, written so that a SIGKILL at any instant loses no byte and keeps none twice.

The theory. What is taken from a pipe or a socket is nowhere else any more, and what is left there comes again. So
consuming and keeping are one step, or it can be told afterwards how far that step had come:

- **Bytes of a pipe** are spliced: one system call moves them into the file, and the kernel consumes what it wrote, no
  more and no less, also in the middle of a kill. The header is written before, because it says whose bytes these are.
  So the last header of a file may claim more than there is: what *is* there was consumed, and is kept.
- **A packet** cannot be spliced, because its first byte is not output. It is written behind a header with a mark, then
  consumed, then the mark is cleared. A marked frame that is not whole was not consumed, and is cut off. Of one that is
  whole nobody knows; the next packet tells (`CaptureBacklog.packet`).

The mark is in the file only, in a byte of the header that `wire.stdcopy` leaves unused. Whatever order a page is
written in, each step here leaves a file that can be understood: a header at the end of a file is there or not, a mark
is one byte, and a length is only ever made smaller, from its last byte on (`_claim`).
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from execgate.runtime.readiness import Descriptor
from execgate.wire import stdcopy

_MARK_AT = 1
"""The place of the mark in a header: the first of its unused bytes."""

_LENGTH_AT = 4
"""The place of the length in a header; it has the rest of it."""


class Frame(NamedTuple):
    """A whole frame of a file: the place of its header there, its stream, its bytes; `marked`: see above."""

    position: int
    stream: int
    data: bytes
    marked: bool


class Segment:
    """A file of frames: the offset of its first byte, and its size.

    What is behind `size` is being written, or was not written whole, and is nobody's business. The file is made when
    it is first written to, and stays open for that until `close`.
    """

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        self.start = start
        self.size = 0
        self._file: Descriptor | None = None

    def __repr__(self) -> str:
        return f"<Segment {self.path.name} size={self.size}{' open' if self._file else ''}>"

    def splice(self, stream: int, pipe: int, size: int) -> bytes:
        """Move up to `size` bytes from a pipe, and return them; b"" at its end.

        BlockingIOError when nothing is there. Any other OSError: the file does not take it; the pipe still has it.
        """
        begin, moved = self.size + stdcopy.HEADER_SIZE, 0
        with self._cut_unless_grown():
            self._write(stdcopy.frame_header(stream, size))
            # The flag: here the kernel does not look at the pipe's own O_NONBLOCK.
            moved = os.splice(pipe, self._open(), size, offset_dst=begin, flags=os.SPLICE_F_NONBLOCK)
            if not moved:
                return b""
            if moved < size:
                self._claim(moved)
            self.size = begin + moved
        return os.pread(self._open(), moved, begin)

    def append(self, stream: int, data: bytes, *, marked: bool = False) -> None:
        """Write a frame, whole or not at all. OSError."""
        header = bytearray(stdcopy.frame_header(stream, len(data)))
        header[_MARK_AT] = marked
        with self._cut_unless_grown():
            self._write(header, data)
            self.size += len(header) + len(data)

    def unmark(self, position: int) -> None:
        """Take the mark from the frame at `position`."""
        with contextlib.suppress(OSError):  # it is looked at in a last frame only, so the next one clears it, too
            os.pwrite(self._open(), b"\0", position + _MARK_AT)

    def load(self) -> list[Frame]:
        """Return what an earlier service left, and repair the end of the file, where it was killed. OSError."""
        data = self.path.read_bytes()
        found = list(frames(data))
        self.size = sum(stdcopy.HEADER_SIZE + len(frame.data) for frame in found)
        rest = data[self.size :]
        if len(rest) > stdcopy.HEADER_SIZE and not rest[_MARK_AT]:  # consumed from a pipe
            stream, _ = stdcopy.parse_header(rest)
            found.append(Frame(self.size, stream, rest[stdcopy.HEADER_SIZE :], marked=False))
            self._claim(len(rest) - stdcopy.HEADER_SIZE)
            self.size = len(data)
        if self.size < len(data):
            os.truncate(self.path, self.size)
        self.close()
        return found

    def close(self) -> None:
        """Stop writing, for now or for ever. A file that nothing was written to goes."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if not self.size:
            self.path.unlink(missing_ok=True)

    def _open(self) -> int:
        """Return the file's descriptor. No O_APPEND: nothing can be spliced into such a file (EINVAL)."""
        if self._file is None:
            self._file = Descriptor(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        return self._file.fileno()

    def _write(self, *parts: bytes | bytearray) -> None:
        """Write at the end, without growing yet. OSError, also when there was not room for all."""
        if os.pwritev(self._open(), parts, self.size) < sum(map(len, parts)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _claim(self, length: int) -> None:
        """Make the length in the header at the end a smaller one.

        Where a page ends between its bytes, a kill can end the write there. From the last byte on, what the header
        claims is too much in between, and never too little.
        """
        header = stdcopy.frame_header(0, length)
        for place in reversed(range(_LENGTH_AT, stdcopy.HEADER_SIZE)):
            os.pwrite(self._open(), header[place : place + 1], self.size + place)

    @contextlib.contextmanager
    def _cut_unless_grown(self) -> Iterator[None]:
        """Leave nothing behind the end, unless the body has moved the end behind it."""
        before = self.size
        try:
            yield
        finally:
            if self.size == before and self._file is not None:
                os.ftruncate(self._file.fileno(), before)


def frames(data: bytes) -> Iterator[Frame]:
    """Yield the frames that `data`, which begins with one, holds as a whole."""
    position = 0
    while len(data) - position >= stdcopy.HEADER_SIZE:
        stream, length = stdcopy.parse_header(data, position)
        begin = position + stdcopy.HEADER_SIZE
        if begin + length > len(data):
            return
        yield Frame(position, stream, data[begin : begin + length], bool(data[position + _MARK_AT]))
        position = begin + length
