"""What a session has written, for those who come later: captured output, and the little that watchers share.

The theory. All output of a session that is recorded lies on one line of *offsets*: the first byte is 0, and every
piece, of stdout or stderr, begins where the one before it ended. A reader is nothing but an offset: it asks for what
comes next, waits at the end until there is more, and is never waited for. What it has not read before it was
dropped it has lost, and it can tell: the piece that it gets begins beyond the offset that it asked for.

- `MemoryBacklog` remembers only while somebody reads, and only its last `limit` bytes.
- `CaptureBacklog` keeps frames of `wire.stdcopy` in segment files named by the offset of their first byte, drops the
  oldest segment when all of them hold more than `limit`, and survives the service. The file system is written and
  read in threads (aiofiles).
"""

import asyncio
import bisect
import contextlib
import errno
import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiofiles

from execgate.runtime.streams import READ_SIZE
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
        self._changed = asyncio.Event()

    @contextlib.contextmanager
    def reader(self) -> Iterator[None]:
        """Be a reader for the length of a `with`; before it nothing may be remembered."""
        yield

    @abstractmethod
    async def append(self, stream: int, data: bytes) -> None:
        """Add output; several callers take turns."""

    def finish(self) -> None:
        """Say that no more will come."""
        self.finished = True
        self._tell()

    async def read(self, offset: int) -> Sequence[Chunk]:
        """Return what follows `offset`, bounded, waiting until there is some; nothing at all at the end.

        If the first piece begins later than `offset`, what is between was dropped.
        """
        while True:
            changed, finished = self._changed, self.finished  # as they were *before* the look
            if chunks := await self.read_now(offset):
                return chunks
            if finished:
                return ()
            await changed.wait()

    @abstractmethod
    async def read_now(self, offset: int) -> Sequence[Chunk]:
        """Return what follows `offset` without waiting for more."""

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class MemoryBacklog(Backlog):
    """Remembers the last `limit` bytes, and nothing while nobody reads."""

    def __init__(self, limit: int = MEMORY_LIMIT) -> None:
        super().__init__()
        self._limit = limit
        self._chunks: deque[Chunk] = deque()
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
                self._chunks.clear()
                self.start = self.end

    def remembered(self) -> Remembered:
        """Return what it holds."""
        return Remembered(self.end, tuple(self._chunks))

    def restore(self, before: Remembered) -> None:
        """Hold what another one held."""
        self._chunks = deque(before.chunks)
        self.end = before.end
        self.start = self._chunks[0].offset if self._chunks else self.end

    async def append(self, stream: int, data: bytes) -> None:
        """See `Backlog.append`."""
        chunk = Chunk(self.end, stream, data)
        self.end = chunk.end
        if not self._readers:
            self.start = self.end
            return
        self._chunks.append(chunk)
        while self.end - self.start > self._limit and len(self._chunks) > 1:
            self.start = self._chunks.popleft().end
        self._tell()

    async def read_now(self, offset: int) -> Sequence[Chunk]:
        """See `Backlog.read_now`."""
        found: list[Chunk] = []
        size = 0
        for chunk in self._chunks:
            if chunk.end > offset:
                found.append(_from(chunk, offset))
                size += len(chunk.data)
                if size >= _READ_SIZE:
                    break
        return found


@dataclass(slots=True)
class _Segment:
    """One file: the offset of its first byte, and how long it is."""

    path: Path
    start: int
    size: int = 0


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
        self._segments: deque[_Segment] = deque()
        self._index: list[tuple[int, Path, int]] = []  # offset, segment, place in its file; every 64 KiB or so
        self._lock = asyncio.Lock()

    @classmethod
    async def load(cls, directory: Path, limit: int) -> "CaptureBacklog":
        """Return what an earlier service kept in `directory`; a last frame that is not whole is cut off."""
        found = cls(directory, limit)
        await asyncio.to_thread(found._scan)
        return found

    def remove(self) -> None:
        """Delete the files."""
        shutil.rmtree(self._directory, ignore_errors=True)

    async def append(self, stream: int, data: bytes) -> None:
        """See `Backlog.append`."""
        async with self._lock:
            offset = self.end
            self.end += len(data)
            try:
                await self._write(offset, stdcopy.frame_header(stream, len(data)) + data)
                self._broken = False
            except OSError as error:
                if not self._broken:
                    log.error("output from %d on is not captured: %s: %s", offset, self._directory, error)
                self.failed = self._broken = True
        self._tell()

    async def read_now(self, offset: int) -> Sequence[Chunk]:
        """See `Backlog.read_now`."""
        place = self._place(max(offset, self.start))
        if place is None or offset >= self.end:
            return ()
        at, path, position = place
        try:
            async with aiofiles.open(path, "rb") as file:
                await file.seek(position)
                data = await file.read(_READ_SIZE)
        except OSError:  # dropped meanwhile
            return () if self._place(max(offset, self.start)) in (None, place) else await self.read_now(offset)
        chunks = [_from(chunk, offset) for chunk in _frames(data, at) if chunk.end > offset]
        if chunks or path == self._segments[-1].path:
            return chunks
        # This segment is read to its end.
        following = next((segment.start for segment in self._segments if segment.start > at), None)
        return () if following is None else await self.read_now(max(offset, following))

    async def _write(self, offset: int, frame: bytes) -> None:
        segment = self._segments[-1] if self._segments else None
        if segment is None or self._broken or segment.size + len(frame) > max(self._limit // _SEGMENTS, len(frame)):
            segment = _Segment(self._directory / f"{offset:020d}", offset)
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        await _append(segment, frame)
        if not segment.size:
            self._segments.append(segment)
        if not segment.size or segment.size - self._index[-1][2] >= _INDEX_EVERY:
            self._index.append((offset, segment.path, segment.size))
        segment.size += len(frame)
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        while len(self._segments) > 1 and sum(segment.size for segment in self._segments) > self._limit:
            oldest = self._segments.popleft()
            oldest.path.unlink(missing_ok=True)
            self._index = [entry for entry in self._index if entry[1] != oldest.path]
            self.start = self._segments[0].start

    def _place(self, offset: int) -> tuple[int, Path, int] | None:
        """Return the last known place at or before `offset`."""
        index = bisect.bisect_right(self._index, offset, key=lambda entry: entry[0])
        return self._index[index - 1] if index else None

    def _scan(self) -> None:
        for path in sorted(self._directory.glob("[0-9]*")):
            segment = _Segment(path, int(path.name))
            at = segment.start
            for chunk in _frames(path.read_bytes(), at):
                if not segment.size or segment.size - self._index[-1][2] >= _INDEX_EVERY:
                    self._index.append((chunk.offset, path, segment.size))
                segment.size += stdcopy.HEADER_SIZE + len(chunk.data)
                at = chunk.end
            with path.open("r+b") as file:
                file.truncate(segment.size)
            if segment.size:
                self._segments.append(segment)
                self.end = at
            else:
                path.unlink()
        if self._segments:
            self.start = self._segments[0].start


async def _append(segment: _Segment, frame: bytes) -> None:
    """Write `frame` at the end of a segment, whole or not at all. OSError."""
    async with aiofiles.open(segment.path, "ab", buffering=0) as file:
        try:
            if await file.write(frame) < len(frame):  # the last bytes that there was room for
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            await file.truncate(segment.size)
            if not segment.size:
                segment.path.unlink()
            raise


def _frames(data: bytes, offset: int) -> list[Chunk]:
    """Return the frames that `data` holds as a whole, the first one being at `offset`."""
    chunks: list[Chunk] = []
    position = 0
    while len(data) - position >= stdcopy.HEADER_SIZE:
        stream, length = stdcopy.parse_header(data, position)
        begin = position + stdcopy.HEADER_SIZE
        position = begin + length
        if position > len(data):
            break
        chunks.append(Chunk(offset, stream, data[begin:position]))
        offset += length
    return chunks


def _from(chunk: Chunk, offset: int) -> Chunk:
    """Return the part of a chunk that is at or after `offset`."""
    if chunk.offset >= offset:
        return chunk
    return Chunk(offset, chunk.stream, chunk.data[offset - chunk.offset :])
