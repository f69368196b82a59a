"""Taking output and keeping it are one step: nothing is lost and nothing kept twice, whenever the service is killed."""

import contextlib
import fcntl
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import pytest

from execgate.runtime.readiness import Descriptor
from execgate.runtime.streams import READ_SIZE, buffered
from execgate.sessions.backlog import CaptureBacklog, Chunk
from execgate.wire import stdcopy

AMPLE = 64 * 1024 * 1024
SOON = 20.0
PAGE = 4096
BUFFERED = "execgate.sessions.backlog.buffered"
"""What looks how much waits in a pipe; a patch of it makes a splice short."""


class Source:
    """Pipes for stdout and stderr and a terminal's socket, which outlive whoever records them."""

    def __init__(self) -> None:
        self.pipes = {stream: [Descriptor(fd) for fd in os.pipe2(os.O_CLOEXEC)] for stream in (1, 2)}
        for read, _ in self.pipes.values():
            os.set_blocking(read.fileno(), False)
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ours.close()
        self.theirs.close()
        for end in itertools.chain(*self.pipes.values()):
            end.close()

    def write(self, stream: int, data: bytes) -> None:
        assert os.write(self.pipes[stream][1].fileno(), data) == len(data)

    def read(self, stream: int) -> int:
        return self.pipes[stream][0].fileno()


@pytest.fixture
def source() -> Iterator[Source]:
    with Source() as made:
        yield made


async def kept_in(directory: Path) -> list[Chunk]:
    """Return all that another service finds, and that the offsets have no gap but what was lost."""
    loaded = await CaptureBacklog.load(directory, AMPLE)
    loaded.finish()
    return await everything(loaded)


async def everything(backlog: CaptureBacklog) -> list[Chunk]:
    found: list[Chunk] = []
    offset = backlog.start
    while chunks := await backlog.read_now(offset):
        found += chunks
        offset = found[-1].end
    return found


def text_of(chunks: Sequence[Chunk], stream: int) -> bytes:
    return b"".join(chunk.data for chunk in chunks if chunk.stream == stream)


# -- pipes


async def test_what_is_returned_is_what_is_kept(tmp_path: Path, source: Source) -> None:
    """Random pieces of both streams, over many segments, and what comes after the service was left and came back."""
    chance, limit = random.Random(1), 8 * 50_000
    returned: list[tuple[int, bytes]] = []
    for _life in range(3):
        backlog = await CaptureBacklog.load(tmp_path / "c", limit)
        for _ in range(40):
            stream = chance.choice((1, 2))
            data = chance.randbytes(chance.choice((1, 80, PAGE, 60_000)))
            source.write(stream, data)
            returned.append((stream, backlog.from_pipe(stream, source.read(stream), READ_SIZE)))
            assert returned[-1][1] == data
        assert backlog.start > 0, "nothing was dropped: this has no segments"
        assert not backlog.failed
        line = b"".join(data for _, data in returned)
        for chunks in (await everything(backlog), await kept_in(tmp_path / "c")):
            assert chunks[0].offset == backlog.start
            assert chunks[-1].end == backlog.end == len(line)
            assert b"".join(chunk.data for chunk in chunks) == line[backlog.start :]
            assert [(one.stream, one.data) for one in chunks] == returned[-len(chunks) :]
        backlog.close()


async def test_no_more_than_was_asked_for(tmp_path: Path, source: Source) -> None:
    """The rest of a cut, for example."""
    backlog = CaptureBacklog(tmp_path / "c", AMPLE)
    source.write(1, b"0123456789")
    assert backlog.from_pipe(1, source.read(1), 4) == b"0123"
    assert backlog.from_pipe(1, source.read(1), READ_SIZE) == b"456789"
    assert await everything(backlog) == [Chunk(0, 1, b"0123"), Chunk(4, 1, b"456789")]
    backlog.close()


async def test_what_comes_after_the_look_and_before_the_taking(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written at once is kept at once, as it is without a recorder."""
    backlog = CaptureBacklog(tmp_path / "c", AMPLE)
    monkeypatch.setattr(BUFFERED, lambda _: 0)
    source.write(1, b"line\n")
    assert backlog.from_pipe(1, source.read(1), READ_SIZE) == b"line\n"
    backlog.finish()
    assert await everything(backlog) == [Chunk(0, 1, b"line\n")]
    assert await kept_in(tmp_path / "c") == [Chunk(0, 1, b"line\n")]


async def test_a_pipe_with_nothing_in_it_and_one_at_its_end(tmp_path: Path, source: Source) -> None:
    backlog = CaptureBacklog(tmp_path / "c", AMPLE)
    with pytest.raises(BlockingIOError):
        backlog.from_pipe(1, source.read(1), READ_SIZE)
    source.write(1, b"x")
    assert backlog.from_pipe(1, source.read(1), READ_SIZE) == b"x"
    with pytest.raises(BlockingIOError):
        backlog.from_pipe(1, source.read(1), READ_SIZE)
    source.pipes[1][1].close()
    assert backlog.from_pipe(1, source.read(1), READ_SIZE) == b""
    (file,) = (tmp_path / "c").iterdir()
    assert file.read_bytes() == stdcopy.frame_header(1, 1) + b"x"
    backlog.finish()


async def test_to_look_for_more_costs_no_room(tmp_path: Path, source: Source) -> None:
    """A pipe is mostly found empty; small segments are filled all the same."""
    backlog = CaptureBacklog(tmp_path / "c", 8 * 1000)
    for _ in range(50):
        source.write(1, b"x" * 92)
        backlog.from_pipe(1, source.read(1), READ_SIZE)
        with pytest.raises(BlockingIOError):
            backlog.from_pipe(1, source.read(1), READ_SIZE)
    backlog.finish()
    assert [file.stat().st_size for file in (tmp_path / "c").iterdir()] == [1000] * 5


async def test_nothing_at_all_leaves_no_file(tmp_path: Path, source: Source) -> None:
    backlog = CaptureBacklog(tmp_path / "c", AMPLE)
    source.pipes[1][1].close()
    assert backlog.from_pipe(1, source.read(1), READ_SIZE) == b""
    backlog.finish()
    assert list((tmp_path / "c").iterdir()) == []


@pytest.mark.parametrize("there", [1, 300, 65_536])
async def test_a_splice_that_moves_less_than_the_header_says(
    tmp_path: Path, source: Source, there: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header is made to tell the truth, and what follows is in its place."""
    backlog, data = CaptureBacklog(tmp_path / "c", AMPLE), os.urandom(there)
    monkeypatch.setattr(BUFFERED, lambda _: 70_000)
    source.write(1, data)
    assert backlog.from_pipe(1, source.read(1), READ_SIZE) == data
    source.write(2, b"next")
    assert backlog.from_pipe(2, source.read(2), READ_SIZE) == b"next"
    backlog.finish()
    expected = [Chunk(0, 1, data), Chunk(there, 2, b"next")]
    assert await everything(backlog) == expected
    assert await kept_in(tmp_path / "c") == expected


@pytest.mark.parametrize(("claimed", "moved"), [(70_000, 1), (70_000, 65_535), (65_536, 300), (0x1FFFF, 0x100FF)])
async def test_a_header_that_is_corrected_byte_by_byte(
    tmp_path: Path, source: Source, claimed: int, moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill may leave any beginning of a write. The header must never say less than there is."""
    fcntl.fcntl(source.read(1), fcntl.F_SETPIPE_SZ, 1 << 20)
    source.write(1, b"x" * moved)
    backlog, real, written = CaptureBacklog(tmp_path / "c", AMPLE), os.pwrite, list[tuple[int, int]]()

    def remember(fd: int, data: bytes, at: int) -> int:
        written.extend(zip(itertools.count(at), data, strict=False))
        return real(fd, data, at)

    monkeypatch.setattr(BUFFERED, lambda _: claimed)
    monkeypatch.setattr(os, "pwrite", remember)
    assert len(backlog.from_pipe(1, source.read(1), READ_SIZE)) == moved
    backlog.close()
    header = bytearray(stdcopy.frame_header(1, claimed))
    for place, byte in written:
        header[place] = byte
        assert stdcopy.parse_header(bytes(header))[1] >= moved
    assert stdcopy.parse_header(bytes(header)) == (1, moved)


async def test_a_reader_meanwhile(tmp_path: Path) -> None:
    """Whoever reads while something is half written, gets what was whole when he asked."""
    backlog = CaptureBacklog(tmp_path / "c", AMPLE)
    backlog.append(1, b"whole")
    (file,) = (tmp_path / "c").iterdir()
    with file.open("ab") as half:
        half.write(stdcopy.frame_header(1, 4) + b"half")
    assert await everything(backlog) == [Chunk(0, 1, b"whole")]
    backlog.close()


@pytest.mark.parametrize("payload", [b"", b"x" * 30])
async def test_a_file_that_ends_anywhere(tmp_path: Path, source: Source, payload: bytes) -> None:
    """All that is there of the last frame was in the pipe and is not any more. Whatever comes next is behind it."""
    frames = [(1, b"one"), (2, b"two" + payload), (1, b"three")]
    text = b"".join(stdcopy.frame_header(stream, len(data)) + data for stream, data in frames)
    for length in range(len(text) + 1):
        directory = tmp_path / f"c{length}"
        directory.mkdir()
        (directory / f"{100:020d}").write_bytes(text[:length])
        expected: list[tuple[int, bytes]] = []
        left = length
        for stream, data in frames:
            there = data[: max(0, left - stdcopy.HEADER_SIZE)]
            expected += [(stream, there)] if there else []
            left -= stdcopy.HEADER_SIZE + len(data)
        loaded = await CaptureBacklog.load(directory, AMPLE)
        source.write(2, b"four")
        assert loaded.from_pipe(2, source.read(2), READ_SIZE) == b"four"
        loaded.finish()
        chunks = await everything(loaded)
        assert [(chunk.stream, chunk.data) for chunk in chunks] == [*expected, (2, b"four")], length
        assert [chunk.offset for chunk in chunks][:1] == ([100] if expected else [0])
        assert await kept_in(directory) == chunks, length


# -- packets


class Consumed:
    """Counts how often a packet was taken from its queue."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


async def test_packets_are_kept_and_no_mark_stays(tmp_path: Path) -> None:
    backlog, consumed = CaptureBacklog(tmp_path / "c", AMPLE), Consumed()
    for data in (b"same", b"same", b"other"):
        backlog.packet(1, data, consumed)
    backlog.finish()
    assert consumed.times == 3
    (file,) = (tmp_path / "c").iterdir()
    assert file.read_bytes() == b"".join(
        stdcopy.frame_header(1, len(one)) + one for one in (b"same", b"same", b"other")
    )


@pytest.fixture
async def killed(tmp_path: Path) -> Path:
    """What is kept by a service that was killed with its second packet written; whether it was consumed is unknown."""

    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    backlog = CaptureBacklog(tmp_path / "killed", AMPLE)
    backlog.packet(1, b"$ ", Consumed())
    with pytest.raises(Killed):
        backlog.packet(1, b"ls\r\n", kill)
    backlog.close()
    return tmp_path / "killed"


async def test_a_packet_that_was_written_and_not_consumed(killed: Path) -> None:
    """It comes again, and is kept once; one that is like it and comes later is another."""
    loaded, consumed = await CaptureBacklog.load(killed, AMPLE), Consumed()
    assert loaded.end == 6
    for _ in range(2):
        loaded.packet(1, b"ls\r\n", consumed)
    loaded.finish()
    assert consumed.times == 2
    assert text_of(await kept_in(killed), 1) == b"$ ls\r\nls\r\n"


@pytest.mark.parametrize("stream", [1, 2])
async def test_a_packet_that_was_written_and_consumed(killed: Path, stream: int) -> None:
    """Another follows: another text, or the same of another stream."""
    loaded, consumed = await CaptureBacklog.load(killed, AMPLE), Consumed()
    loaded.packet(stream, b"ls\r\n" if stream == 2 else b"file", consumed)
    loaded.finish()
    assert consumed.times == 1
    assert b"".join(one.data for one in await kept_in(killed)) == b"$ ls\r\n" + (b"ls\r\n" if stream == 2 else b"file")


async def test_a_packet_that_was_consumed_and_none_waits(killed: Path) -> None:
    """So what comes later is another one, even if it is the same."""
    consumed = Consumed()
    loaded = await CaptureBacklog.load(killed, AMPLE)
    loaded.settle()
    loaded.close()
    for _ in range(2):  # the second one knows it from the file
        loaded = await CaptureBacklog.load(killed, AMPLE)
        loaded.packet(1, b"ls\r\n", consumed)
        loaded.finish()
    assert consumed.times == 2
    assert text_of(await kept_in(killed), 1) == b"$ ls\r\nls\r\nls\r\n"


async def test_a_packet_that_was_not_written_whole(killed: Path) -> None:
    """It was not consumed, whatever its length is, so it comes again."""
    (file,) = killed.iterdir()
    whole = file.read_bytes()
    for length in range(len(stdcopy.frame_header(1, 2)) + 2, len(whole)):
        file.write_bytes(whole[:length])
        loaded, consumed = await CaptureBacklog.load(killed, AMPLE), Consumed()
        assert loaded.end == 2
        loaded.packet(1, b"ls\r\n", consumed)
        loaded.finish()
        assert text_of(await kept_in(killed), 1) == b"$ ls\r\n"


# -- a disk that is full


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """Room for 16 pages."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={16 * PAGE},mode=0700", "tmpfs", directory], check=True)
    yield directory
    subprocess.run(["umount", directory], check=True)  # which fails if a file of it is still open


async def test_a_disk_that_becomes_full(tmp_path: Path, source: Source, tiny_disk: Path) -> None:
    """What there is room for is kept, to the last byte; the process gets rid of the rest, and the gap can be seen."""
    ballast, data = tiny_disk / "ballast", os.urandom(60_000)
    ballast.write_bytes(b"x" * 5 * PAGE)
    backlog = CaptureBacklog(tiny_disk / "c", AMPLE)
    source.write(1, data)
    first = backlog.from_pipe(1, source.read(1), READ_SIZE)
    assert len(first) == 11 * PAGE - stdcopy.HEADER_SIZE, "a splice up to the end of the disk"
    failed_before = backlog.failed
    rest = backlog.from_pipe(1, source.read(1), READ_SIZE)
    assert first + rest == data
    assert (failed_before, backlog.failed) == (False, True)
    lost = Consumed()
    backlog.packet(1, b"lost", lost)
    assert lost.times == 1
    with pytest.raises(BlockingIOError):
        backlog.from_pipe(1, source.read(1), READ_SIZE)
    ballast.unlink()
    source.write(2, b"after")
    assert backlog.from_pipe(2, source.read(2), READ_SIZE) == b"after"
    source.pipes[1][1].close()
    assert backlog.from_pipe(1, source.read(1), READ_SIZE) == b""
    backlog.finish()
    expected = [Chunk(0, 1, first), Chunk(60_004, 2, b"after")]
    assert [*await backlog.read_now(0), *await backlog.read_now(len(first))] == expected
    loaded = await CaptureBacklog.load(tiny_disk / "c", AMPLE)
    assert [*await loaded.read_now(0), *await loaded.read_now(len(first))] == expected


async def test_a_file_system_that_nothing_can_be_spliced_to(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_splice(*_arguments: Any, **_options: Any) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "splice", no_splice)
    backlog = CaptureBacklog(tmp_path / "c", AMPLE)
    with pytest.raises(BlockingIOError):
        backlog.from_pipe(1, source.read(1), READ_SIZE)
    source.write(1, b"copied")
    assert backlog.from_pipe(1, source.read(1), READ_SIZE) == b"copied"
    backlog.finish()
    assert not backlog.failed
    assert await everything(backlog) == [Chunk(0, 1, b"copied")]


# -- killed at every system call


class Killed(BaseException):
    """Nothing that the service does happens after this."""


class Fate:
    """Kills at the system call number `at`: before it, in the middle of it, or after it."""

    def __init__(self, at: int, how: str) -> None:
        self.calls = 0
        self._at, self._how = at, how
        self._open: set[int] = set()

    def __repr__(self) -> str:
        return f"<killed {self._how} system call {self._at}>"

    def over(self, call: Callable[..., Any], half: Callable[..., Any] = lambda *_, **__: None) -> Callable[..., Any]:
        """Return `call` as it is under this fate."""

        def fated(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls < self._at:
                return call(*arguments, **options)
            if self.calls == self._at and self._how != "before":
                with contextlib.suppress(OSError):
                    (call if self._how == "after" else half)(*arguments, **options)
            raise Killed

        return fated

    @contextlib.contextmanager
    def rules(self) -> Iterator[None]:
        """Have it rule over what a recorder calls; close what is open then, as the kernel does."""
        pwrite, pwritev, splice, close = os.pwrite, os.pwritev, os.splice, os.close

        def half_pwrite(fd: int, data: bytes, at: int) -> None:
            pwrite(fd, data[: len(data) // 2], at)

        def half_pwritev(fd: int, parts: Sequence[bytes], at: int) -> None:
            half_pwrite(fd, b"".join(parts), at)

        def half_splice(source: int, target: int, size: int, **options: Any) -> None:
            splice(source, target, max(1, size // 2), **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "open", self._opened(self.over(os.open)))
            patch.setattr(os, "close", self._closed(os.close))
            for name in ("ftruncate", "truncate", "unlink", "pread"):
                patch.setattr(os, name, self.over(getattr(os, name)))
            patch.setattr(os, "pwrite", self.over(pwrite, half_pwrite))
            patch.setattr(os, "pwritev", self.over(pwritev, half_pwritev))
            patch.setattr(os, "splice", self.over(splice, half_splice))
            yield
        for fd in self._open:
            close(fd)

    def _opened(self, call: Callable[..., int]) -> Callable[..., int]:
        def remembered(*arguments: Any) -> int:
            fd = call(*arguments)
            self._open.add(fd)
            return fd

        return remembered

    def _closed(self, call: Callable[[int], None]) -> Callable[[int], None]:
        def forgotten(fd: int) -> None:
            self._open.discard(fd)
            call(fd)

        return forgotten


def never() -> Fate:
    return Fate(sys.maxsize, "never")


LIMIT = 8 * 6000
"""Small segments, of which none is dropped: there is less output than that."""


async def record_all(directory: Path, source: Source, fate: Fate, fate_of_load: Fate) -> bool:
    """Load what was kept and take all that waits, a piece of each source in turn; return whether it lived to do so."""
    with fate.rules(), contextlib.suppress(Killed):
        with fate_of_load.rules():
            backlog = await CaptureBacklog.load(directory, LIMIT)
        _take_all(backlog, source, fate.over(source.ours.recv))
        backlog.close()
        return True
    return False


def _take_all(backlog: CaptureBacklog, source: Source, receive: Callable[[int], bytes]) -> None:
    waiting = {1, 2, 3}
    while waiting:
        for one in list(waiting):
            try:
                if one == 3:
                    backlog.packet(3, source.ours.recv(9000, socket.MSG_PEEK), lambda: [receive(1)].clear())
                else:
                    backlog.from_pipe(one, source.read(one), 5000)
            except BlockingIOError:
                waiting.remove(one)


def fill_pipes(source: Source) -> dict[int, bytes]:
    chance = random.Random(7)
    texts = {1: chance.randbytes(11_000), 2: chance.randbytes(700)}
    for stream, text in texts.items():
        source.write(stream, text)
    return texts


def fill_socket(source: Source) -> dict[int, bytes]:
    chance = random.Random(7)
    packets = [b"%d:" % number + chance.randbytes(size) for number, size in enumerate((1, 5000, 3, 20, 5000))]
    for packet in packets:
        source.theirs.send(packet)
    return {3: b"".join(packets)}


@pytest.mark.parametrize("how", ["before", "in", "after"])
@pytest.mark.parametrize("fill", [fill_pipes, fill_socket])
async def test_killed_at_every_system_call(
    tmp_path: Path, how: str, fill: Callable[[Source], dict[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then at every one of the repair. The third service has it all."""
    monkeypatch.setattr(BUFFERED, lambda fd: buffered(fd) and buffered(fd) + 1000)  # so that splices are short
    names = itertools.count()
    for at in itertools.count(1):
        for again in itertools.count(1):
            directory, fates = tmp_path / str(next(names)), (Fate(at, how), Fate(again, how))
            with Source() as source:
                texts = fill(source)
                lived = await record_all(directory, source, fates[0], never())
                repaired = await record_all(directory, source, never(), fates[1])
                assert await record_all(directory, source, never(), never())
            chunks = await kept_in(directory)
            for stream, text in texts.items():
                assert text_of(chunks, stream) == text, fates
            if repaired:
                break
        if lived:
            break
    assert at > 20, "there were fewer system calls than there must be"


# -- killed


class Flow(threading.Thread):
    """Writes pieces as fast as they are taken, and tells how many bytes that were."""

    def __init__(self, pieces: Sequence[bytes], send: Callable[[bytes], object], progress: "Progress") -> None:
        super().__init__(daemon=True)
        self._pieces, self._send, self._progress = pieces, send, progress

    def run(self) -> None:
        for piece in self._pieces:
            self._send(piece)
            self._progress.add(len(piece))


class Progress:
    def __init__(self) -> None:
        self._done = 0
        self._changed = threading.Condition()

    def add(self, size: int) -> None:
        with self._changed:
            self._done += size
            self._changed.notify()

    def wait_for(self, done: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._done >= done, SOON), "nobody takes what is written"


async def test_killed_thirty_times(tmp_path: Path) -> None:
    """A pipe and a terminal that are always full, and a recorder that is killed at any instant of its work."""
    chance, limit = random.Random(3), 16 * 1024 * 1024
    pieces = [chance.randbytes(chance.choice((10, 3000, 65_536, 200_000))) for _ in range(120)]
    packets = [b"%d:" % number + chance.randbytes(chance.choice((1, 100, 8000))) for number in range(2500)]
    text, typed, progress = b"".join(pieces), b"".join(packets), Progress()
    with Source() as source:
        read, write = (end.fileno() for end in source.pipes[1])
        inherited = (read, source.ours.fileno())
        recorder = subprocess.Popen(
            [sys.executable, "-m", "support.capturing", tmp_path, str(limit), *map(str, inherited)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=inherited,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
        )
        with recorder:
            assert recorder.stdin is not None
            assert recorder.stdout is not None

            def send_piece(piece: bytes) -> None:
                view = memoryview(piece)
                while view:
                    view = view[os.write(write, view) :]

            flows = [
                Flow(pieces, send_piece, progress),
                Flow(packets, lambda packet: source.theirs.send(b"\x02" + packet), progress),
            ]
            for flow in flows:
                flow.start()
            for moment in sorted(chance.randrange(len(text) + len(typed)) for _ in range(30)):
                print(file=recorder.stdin, flush=True)
                pid = int(recorder.stdout.readline())
                progress.wait_for(moment)
                os.kill(pid, signal.SIGKILL)
                assert int(recorder.stdout.readline()) == -signal.SIGKILL
            print(file=recorder.stdin, flush=True)
            recorder.stdout.readline()
            for flow in flows:
                flow.join(SOON)
            source.pipes[1][1].close()
            source.theirs.close()
            assert int(recorder.stdout.readline()) == 0
    for name, expected in (("pipe", text), ("terminal", typed)):
        chunks = await kept_in(tmp_path / name)
        assert chunks[0].offset == 0
        assert b"".join(chunk.data for chunk in chunks) == expected, name
        assert len(list((tmp_path / name).iterdir())) > 2, "there was only one segment"
