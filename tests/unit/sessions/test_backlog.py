"""The backlog: one line of offsets, exact for every reader, and honest about what it lost."""

import asyncio
import contextlib
import errno
import os
import random
import resource
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from execgate.sessions.backlog import Backlog, CaptureBacklog, Chunk, MemoryBacklog

SOON = 20.0
AMPLE = 64 * 1024 * 1024
KINDS = ("memory", "capture")


def new_backlog(kind: str, directory: Path, limit: int = AMPLE) -> Backlog:
    return MemoryBacklog(limit) if kind == "memory" else CaptureBacklog(directory, limit)


def pieces(seed: int, count: int, largest: int) -> list[tuple[int, bytes]]:
    """Random output: mostly little, now and then much, of both streams."""
    chance = random.Random(seed)
    sizes = [chance.choice((1, 7, 80, 4096, largest)) for _ in range(count)]
    return [(chance.choice((1, 2)), chance.randbytes(chance.randint(1, size))) for size in sizes]


class Line:
    """What was written, as one line of bytes, each with its stream."""

    def __init__(self, written: Sequence[tuple[int, bytes]]) -> None:
        self.data = b"".join(data for _, data in written)
        self.streams = b"".join(bytes([stream]) * len(data) for stream, data in written)

    def check(self, chunks: Sequence[Chunk], begin: int) -> None:
        """Fail unless `chunks` are everything from `begin` on, once, in order, of the right streams."""
        offset = begin
        for chunk in chunks:
            assert chunk.offset == offset
            assert chunk.data
            assert chunk.data == self.data[offset : chunk.end]
            assert self.streams[offset : chunk.end] == bytes([chunk.stream]) * len(chunk.data)
            offset = chunk.end
        assert offset == len(self.data)


async def follow(backlog: Backlog, offset: int, *, slowness: int = 0) -> list[Chunk]:
    """Read from `offset` to the end."""
    found: list[Chunk] = []
    async with asyncio.timeout(SOON):
        while chunks := await backlog.read(offset):
            found += chunks
            offset = chunks[-1].end
            for _ in range(slowness):
                await asyncio.sleep(0)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
async def test_every_reader_gets_every_byte_once(kind: str, seed: int, tmp_path: Path) -> None:
    """Some read along, fast and slow, some come later and begin anywhere."""
    written = pieces(seed, 200, 200_000)
    line, backlog, chance = Line(written), new_backlog(kind, tmp_path / "c"), random.Random(seed)
    with backlog.reader():
        readers = [asyncio.create_task(follow(backlog, 0, slowness=slowness)) for slowness in (0, 3, 50)]
        begins = [0, 0, 0]
        for stream, data in written:
            backlog.append(stream, data)
            if chance.random() < 0.05:
                begins.append(chance.randint(0, backlog.end))
                readers.append(asyncio.create_task(follow(backlog, begins[-1], slowness=chance.randint(0, 5))))
        assert backlog.end == len(line.data)
        backlog.finish()
        for begin, reader in zip(begins, readers, strict=True):
            line.check(await reader, begin)
        for begin in (0, 1, len(line.data) // 2, len(line.data) - 1):
            line.check(await follow(backlog, begin), begin)
        assert await follow(backlog, len(line.data)) == []


@pytest.mark.parametrize("kind", KINDS)
async def test_a_reader_waits_at_the_end(kind: str, tmp_path: Path) -> None:
    backlog = new_backlog(kind, tmp_path / "c")
    with backlog.reader():
        reading = asyncio.create_task(backlog.read(0))
        await asyncio.sleep(0.01)
        assert not reading.done()
        backlog.append(2, b"x")
        assert list(await asyncio.wait_for(reading, SOON)) == [Chunk(0, 2, b"x")]
        reading = asyncio.create_task(backlog.read(1))
        await asyncio.sleep(0.01)
        backlog.finish()
        assert list(await asyncio.wait_for(reading, SOON)) == []
        assert list(await backlog.read_now(1)) == []


@pytest.mark.parametrize("kind", KINDS)
async def test_the_end_does_not_overtake_the_last_bytes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last piece and the end come while a reader has looked and found nothing yet."""
    backlog = new_backlog(kind, tmp_path / "c")
    with backlog.reader():
        backlog.append(1, b"first")
        looked, go_on, look = asyncio.Event(), asyncio.Event(), backlog.read_now

        async def slow_look(offset: int) -> Sequence[Chunk]:
            found = await look(offset)
            looked.set()
            await go_on.wait()
            return found

        monkeypatch.setattr(backlog, "read_now", slow_look)
        reading = asyncio.create_task(backlog.read(5))
        await looked.wait()
        backlog.append(1, b"last")
        backlog.finish()
        go_on.set()
        assert list(await asyncio.wait_for(reading, SOON)) == [Chunk(5, 1, b"last")]


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_dropped_is_the_oldest_and_the_gap_can_be_seen(kind: str, tmp_path: Path) -> None:
    limit, written = 64 * 1024, [(1, os.urandom(3000)) for _ in range(200)]
    line, backlog = Line(written), new_backlog(kind, tmp_path / "c", limit)
    with backlog.reader():
        for stream, data in written:
            backlog.append(stream, data)
        backlog.finish()
        assert backlog.end == len(line.data)
        kept = backlog.end - backlog.start
        assert limit * 3 // 4 <= kept <= limit + 3000, kept
        chunks = await follow(backlog, 0)
        assert chunks[0].offset == backlog.start > 0
        line.check(chunks, backlog.start)
        if kind == "capture":
            assert sum(file.stat().st_size for file in (tmp_path / "c").iterdir()) <= limit + 3000


async def test_one_piece_larger_than_the_limit(tmp_path: Path) -> None:
    for kind in KINDS:
        backlog = new_backlog(kind, tmp_path / kind, 1000)
        with backlog.reader():
            for _ in range(3):
                backlog.append(1, b"x" * 200_000)
            backlog.finish()
            chunks = await follow(backlog, backlog.start)
            assert b"".join(chunk.data for chunk in chunks) == b"x" * 200_000


async def test_memory_remembers_only_while_somebody_reads() -> None:
    backlog = MemoryBacklog()
    backlog.append(1, b"nobody")
    assert (backlog.start, backlog.end) == (6, 6)
    with backlog.reader():
        backlog.append(1, b"one")
        with backlog.reader():
            backlog.append(1, b"two")
        assert [chunk.data for chunk in await backlog.read_now(6)] == [b"one", b"two"]
    assert (backlog.start, backlog.end) == (12, 12)
    with backlog.reader():
        assert list(await backlog.read_now(0)) == []


async def test_a_slow_reader_sees_that_it_lost_something() -> None:
    backlog = MemoryBacklog(limit=10)
    with backlog.reader():
        for number in range(5):
            backlog.append(1, bytes([65 + number]) * 4)
        (first, *_) = await backlog.read(0)
        assert first.offset == backlog.start == 12


# -- what an earlier service kept


async def filled(directory: Path, written: Sequence[tuple[int, bytes]], limit: int = AMPLE) -> CaptureBacklog:
    backlog = CaptureBacklog(directory, limit)
    for stream, data in written:
        backlog.append(stream, data)
    return backlog


@pytest.mark.parametrize("limit", [AMPLE, 300_000])
async def test_a_capture_goes_on_in_the_next_service(tmp_path: Path, limit: int) -> None:
    written = pieces(5, 100, 30_000)
    line, first = Line(written), await filled(tmp_path / "c", written[:60], limit)
    second = await CaptureBacklog.load(tmp_path / "c", limit)
    assert (second.start, second.end) == (first.start, first.end)
    for stream, data in written[60:]:
        second.append(stream, data)
    second.finish()
    chunks = await follow(second, second.start)
    line.check(chunks, second.start)


async def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    backlog = await CaptureBacklog.load(tmp_path / "none", AMPLE)
    assert (backlog.start, backlog.end) == (0, 0)
    backlog.finish()
    assert await follow(backlog, 0) == []


async def test_a_segment_that_was_made_and_not_written(tmp_path: Path) -> None:
    await filled(tmp_path / "c", [(1, b"one")])
    (tmp_path / "c" / f"{3:020d}").touch()
    loaded = await CaptureBacklog.load(tmp_path / "c", AMPLE)
    loaded.finish()
    Line([(1, b"one")]).check(await follow(loaded, 0), 0)


# -- a disk that is full


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file of this process may be larger than 4 KiB: the write that crosses that is short, the next one fails.

    pytest's own output may be such a file: nothing may be reported meanwhile.
    """
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


async def test_a_write_that_stops_half_way(tmp_path: Path) -> None:
    """It is taken back as a whole; what comes next begins a segment of its own, and the gap can be seen."""
    with small_files():
        backlog = await filled(tmp_path / "c", [(1, b"a" * 3000), (1, b"b" * 3000), (2, b"c" * 3000)])
    backlog.finish()
    assert backlog.failed
    assert backlog.end == 9000
    expected = [Chunk(0, 1, b"a" * 3000), Chunk(6000, 2, b"c" * 3000)]
    assert await follow(backlog, 0) == expected
    assert await follow(await finished_load(tmp_path / "c"), 0) == expected


async def finished_load(directory: Path) -> CaptureBacklog:
    loaded = await CaptureBacklog.load(directory, AMPLE)
    loaded.finish()
    return loaded


async def test_a_disk_that_is_full_and_then_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The process is not held up, and it is logged once; with room again what comes is captured."""
    backlog = await filled(tmp_path / "c", [(1, b"before")])
    errors = 0

    def full(*_arguments: Any) -> int:
        nonlocal errors
        errors += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        for _ in range(3):
            backlog.append(1, b"lost!!")
    assert errors == 3
    assert backlog.failed
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
    backlog.append(1, b"after")
    backlog.finish()
    assert await follow(backlog, 0) == [Chunk(0, 1, b"before"), Chunk(24, 1, b"after")]


async def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    backlog = await filled(tmp_path / "file" / "c", [(1, b"x"), (1, b"y")])
    backlog.finish()
    assert backlog.failed
    assert backlog.end == 2
    assert await follow(backlog, 0) == []


async def test_a_segment_that_is_dropped_while_it_is_read(tmp_path: Path) -> None:
    """A reader that is overtaken goes on with what is left, and does not fail."""
    backlog = CaptureBacklog(tmp_path / "c", 32 * 1024)
    written = [(1, os.urandom(1500)) for _ in range(400)]
    line = Line(written)

    async def lag() -> int:
        offset = got = 0
        while chunks := await backlog.read(offset):
            for chunk in chunks:
                assert chunk.offset >= offset
                assert chunk.data == line.data[chunk.offset : chunk.end]
                offset, got = chunk.end, got + len(chunk.data)
            await asyncio.sleep(0.002)
        assert offset == len(line.data)
        return got

    reading = asyncio.create_task(lag())
    for stream, data in written:
        backlog.append(stream, data)
    backlog.finish()
    assert 0 < await asyncio.wait_for(reading, SOON) <= len(line.data)
