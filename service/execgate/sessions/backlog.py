"""What a session has written, for those who come later: captured output, and the little that watchers share.

The theory. All output of a session that is recorded lies on one line of *offsets*: the first byte is 0, and every
piece, of stdout or stderr, begins where the one before it ended. A reader is nothing but an offset: it asks for what
comes next, waits at the end until there is more, and is never waited for. What it has not read before it was
dropped it has lost, and it can tell: the piece that it gets begins beyond the offset that it asked for.

- `MemoryBacklog` remembers only while somebody reads, and only its last `limit` bytes.
- `CaptureBacklog` keeps frames of `wire.stdcopy` in segment files named by the offset of their first byte, drops the
  oldest segment when all of them hold more than `limit`, and survives the service, however that ends: it is a
  `runtime.streams.Recorder`, which takes output from where it waits (`sessions.segment` tells how). Recording happens
  on the event loop, because nothing may come between taking a byte and keeping it: a bounded piece into the page cache.
  Readers read in threads (aiofiles).
"""

import asyncio
import bisect
import contextlib
import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiofiles

from execgate.runtime.streams import READ_SIZE, Recorder, buffered
from execgate.sessions.segment import Frame, Segment, frames
from execgate.wire import stdcopy

log = logging.getLogger(__name__)

MEMORY_LIMIT = 1024 * 1024
"""Bytes of output that a slow watcher of a session without capture may lag behind."""

_INDEX_EVERY = 64 * 1024
_READ_SIZE = READ_SIZE + 2 * _INDEX_EVERY
"""Enough for a whole frame of the largest size behind the place that the index knows."""

_SEGMENTS = 8


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some output: where it begins, its stream (1 stdout, 2 stderr), its bytes (at least one)."""

    offset: int
    stream: int
    data: bytes

    @property
    def end(self) -> int:
        """The offset of the byte after it."""
        return self.offset + len(self.data)


@dataclass(frozen=True, slots=True)
class Remembered:
    """What a `MemoryBacklog` holds, between two services."""

    end: int = 0
    chunks: Sequence[Chunk] = ()


class Backlog(ABC):
    """The output of one session, from `start` (what is older was dropped) to `end`; `finished`: no more will come."""

    def __init__(self) -> None:
        self.start = 0
        self.end = 0
        self.finished = False
        self._changed: asyncio.Event | None = None  # somebody waits for it

    @property
    def recorder(self) -> Recorder | None:
        """Who adds output while taking it from its source. If there is one, `append` need not be called for that."""
        return None

    @contextlib.contextmanager
    def reader(self) -> Iterator[None]:
        """Be a reader for the length of a `with`; before it nothing may be remembered."""
        yield

    @property
    def watched(self) -> bool:
        """Whether what is added now is remembered, for somebody who reads or for later."""
        return True

    @abstractmethod
    def append(self, stream: int, data: bytes) -> None:
        """Add output."""

    def skip(self, size: int) -> None:
        """Add output that was not looked at; only while nothing is remembered."""
        self.start = self.end = self.end + size

    def close(self) -> None:  # noqa: B027  (one of the two has nothing to do)
        """Hold nothing open that only adding needs. It can be gone on with."""

    def finish(self) -> None:
        """Say that no more will come."""
        self.close()
        self.finished = True
        self._tell()

    async def read(self, offset: int) -> Sequence[Chunk]:
        """Return what follows `offset`, bounded, waiting until there is some; nothing at all at the end.

        If the first piece begins later than `offset`, what is between was dropped.
        """
        while True:
            changed = self._changed = self._changed or asyncio.Event()
            finished = self.finished  # as it was *before* the look
            if chunks := await self.read_now(offset):
                return chunks
            if finished:
                return ()
            await changed.wait()

    @abstractmethod
    async def read_now(self, offset: int) -> Sequence[Chunk]:
        """Return what follows `offset` without waiting for more."""

    def _tell(self) -> None:
        changed, self._changed = self._changed, None
        if changed is not None:
            changed.set()


class MemoryBacklog(Backlog):
    """Remembers the last `limit` bytes, and nothing while nobody reads."""

    def __init__(self, limit: int = MEMORY_LIMIT) -> None:
        super().__init__()
        self._limit = limit
        self._chunks: deque[Chunk] | None = None  # as long as anybody reads; even an empty one is 600 bytes
        self._readers = 0

    @contextlib.contextmanager
    def reader(self) -> Iterator[None]:
        """See `Backlog.reader`."""
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1
            if not self._readers:
                self._chunks = None
                self.start = self.end

    @property
    def watched(self) -> bool:
        """See `Backlog.watched`."""
        return self._readers > 0

    def remembered(self) -> Remembered:
        """Return what it holds."""
        return Remembered(self.end, tuple(self._chunks or ()))

    def restore(self, before: Remembered) -> None:
        """Hold what another one held."""
        self._chunks = deque(before.chunks)
        self.end = before.end
        self.start = before.chunks[0].offset if before.chunks else self.end

    def append(self, stream: int, data: bytes) -> None:
        """See `Backlog.append`."""
        chunk = Chunk(self.end, stream, data)
        self.end = chunk.end
        if not self._readers:
            self.start = self.end
            return
        if self._chunks is None:
            self._chunks = deque()
        self._chunks.append(chunk)
        while self.end - self.start > self._limit and len(self._chunks) > 1:
            self.start = self._chunks.popleft().end
        self._tell()

    async def read_now(self, offset: int) -> Sequence[Chunk]:
        """See `Backlog.read_now`."""
        found: list[Chunk] = []
        size = 0
        for chunk in self._chunks or ():
            if chunk.end > offset:
                found.append(_from(chunk, offset))
                size += len(chunk.data)
                if size >= _READ_SIZE:
                    break
        return found


class CaptureBacklog(Backlog):
    """Keeps the newest `limit` bytes (to within a segment, an eighth of it) in files of `directory`.

    Output that cannot be written, because the disk is full, is lost to readers and to nobody else: the process and
    its client go on. `failed` says so. Once there is room again a new segment begins, and its name tells of the gap.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        super().__init__()
        self.failed = False
        self._broken = False  # the last write failed: what comes does not follow what is there
        self._directory = directory
        self._limit = limit
        self._segments: deque[Segment] = deque()  # those with something in them
        self._newest: Segment | None = None
        self._index: list[tuple[int, Segment, int]] = []  # offset, segment, place in its file; every 64 KiB or so
        self._unsettled: Frame | None = None  # the last frame of the newest segment, if it may not be consumed yet

    @classmethod
    async def load(cls, directory: Path, limit: int) -> "CaptureBacklog":
        """Return what an earlier service kept in `directory`: all that it had consumed, wherever it was killed."""
        found = cls(directory, limit)
        await asyncio.to_thread(found._scan)
        return found

    def remove(self) -> None:
        """Delete the files."""
        shutil.rmtree(self._directory, ignore_errors=True)

    # -- recording ---------------------------------------------------------------------------------------------------

    @property
    def recorder(self) -> Recorder:
        """See `Backlog.recorder`."""
        return self

    def from_pipe(self, stream: int, pipe: int, size: int) -> bytes:
        """See `Recorder.from_pipe`."""
        waiting = min(size, buffered(pipe))
        size = waiting or size  # nothing is there: it may come just now, or there may be an end of file
        try:
            segment = self._room(stdcopy.HEADER_SIZE + max(waiting, 1))
            position = segment.size
            data = segment.splice(stream, pipe, size)
        except BlockingIOError:
            raise
        except OSError:  # the disk is full, or of a kind that nothing can be spliced to
            if data := os.read(pipe, size):
                self.append(stream, data)
            return data
        if data:
            self._added(segment, position, len(data))
        return data

    def packet(self, stream: int, payload: bytes, consume: Callable[[], None]) -> None:
        """See `Recorder.packet`.

        A packet that equals the last frame, if that is not known to be consumed, is that one: it was written by an
        earlier service that was killed before it consumed it. This is wrong in one case: it was killed just after it
        had consumed it, within microseconds, and an equal packet was waiting behind. That one is missing then.
        """
        if (kept := self._unsettled) is None or (kept.stream, kept.data) != (stream, payload):
            self._append(stream, payload, marked=True)
        consume()
        self.settle()

    def settle(self) -> None:
        """See `Recorder.settle`."""
        frame, self._unsettled = self._unsettled, None
        if frame is not None and self._newest is not None:
            self._newest.unmark(frame.position)

    def append(self, stream: int, data: bytes) -> None:
        """See `Backlog.append`. For what is consumed already."""
        self._append(stream, data, marked=False)

    def close(self) -> None:
        """See `Backlog.close`."""
        if self._newest is not None:
            self._newest.close()

    def _append(self, stream: int, data: bytes, *, marked: bool) -> None:
        self.settle()
        try:
            segment = self._room(stdcopy.HEADER_SIZE + len(data))
            position = segment.size
            segment.append(stream, data, marked=marked)
        except OSError as error:
            self._lost(len(data), error)
            return
        if marked:
            self._unsettled = Frame(position, stream, data, marked)
        self._added(segment, position, len(data))

    def _room(self, size: int) -> Segment:
        """Return the segment that the next `size` bytes of frames go to. OSError."""
        segment = self._newest
        if segment is None or self._broken or segment.size + size > max(self._limit // _SEGMENTS, size):
            self.close()
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            segment = self._newest = Segment(self._directory / f"{self.end:020d}", self.end)
        return segment

    def _added(self, segment: Segment, position: int, length: int) -> None:
        """Take note of a frame with `length` bytes of output."""
        self._broken = False
        self._find(segment, position)
        self.end += length
        while len(self._segments) > 1 and sum(segment.size for segment in self._segments) > self._limit:
            self._drop_oldest()
        self._tell()

    def _lost(self, length: int, error: OSError) -> None:
        """Take note of a gap."""
        if not self._broken:
            log.error("output from %d on is not captured: %s: %s", self.end, self._directory, error)
        self.failed = self._broken = True
        self.end += length
        self._tell()

    def _drop_oldest(self) -> None:
        oldest = self._segments.popleft()
        oldest.path.unlink(missing_ok=True)
        self._index = [entry for entry in self._index if entry[1] is not oldest]
        self.start = self._segments[0].start

    def _find(self, segment: Segment, position: int) -> None:
        """Have the frame at `position`, which begins at `end`, found by readers."""
        if not position:
            self._segments.append(segment)
        if not position or position - self._index[-1][2] >= _INDEX_EVERY:
            self._index.append((self.end, segment, position))

    def _scan(self) -> None:
        for path in sorted(self._directory.glob("[0-9]*")):
            segment = Segment(path, int(path.name))
            found = segment.load()
            for frame in found:
                if not frame.position:
                    self.end = segment.start
                self._find(segment, frame.position)
                self.end += len(frame.data)
            if found:
                self._newest, self._unsettled = segment, found[-1] if found[-1].marked else None
        if self._segments:
            self.start = self._segments[0].start

    # -- reading -----------------------------------------------------------------------------------------------------

    async def read_now(self, offset: int) -> Sequence[Chunk]:
        """See `Backlog.read_now`."""
        place = self._place(max(offset, self.start))
        if place is None or offset >= self.end:
            return ()
        at, segment, position = place
        # Not up to the end of the file, where something may be half written when the thread comes to it.
        size = min(_READ_SIZE, segment.size - position)
        try:
            async with aiofiles.open(segment.path, "rb") as file:
                await file.seek(position)
                data = await file.read(size)
        except OSError:  # dropped meanwhile
            return () if self._place(max(offset, self.start)) in (None, place) else await self.read_now(offset)
        chunks = [_from(chunk, offset) for chunk in _chunks(data, at) if chunk.end > offset]
        if chunks or segment is self._segments[-1]:
            return chunks
        # This segment is read to its end.
        following = next((segment.start for segment in self._segments if segment.start > at), None)
        return () if following is None else await self.read_now(max(offset, following))

    def _place(self, offset: int) -> tuple[int, Segment, int] | None:
        """Return the last known place at or before `offset`."""
        index = bisect.bisect_right(self._index, offset, key=lambda entry: entry[0])
        return self._index[index - 1] if index else None


def _chunks(data: bytes, offset: int) -> Iterator[Chunk]:
    """Yield the output in whole frames, the first one being at `offset`."""
    for frame in frames(data):
        yield Chunk(offset, frame.stream, frame.data)
        offset += len(frame.data)


def _from(chunk: Chunk, offset: int) -> Chunk:
    """Return the part of a chunk that is at or after `offset`."""
    if chunk.offset >= offset:
        return chunk
    return Chunk(offset, chunk.stream, chunk.data[offset - chunk.offset :])
