"""Recordings in files: killed at every byte, bounded, in time, in order; a disk that is slow, stuck or full."""

import asyncio
import fcntl
import gzip
import os
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from execgate.gate import recording as recording_module
from execgate.gate.recording import BOUND, PIECE, RESTARTED, FileRecording, FileRecordings, about_of, file_name
from execgate.model.access import Record
from execgate.model.config import ConsoleSize
from execgate.model.errors import Unavailable
from execgate.model.session import ExecSession, ExitSource, ExitStatus
from support.recordings import Recorded
from support.records import new_session

AMPLE = 10**9
SOON = 10.0
OVER = ExitStatus(3, ExitSource.SYNC_PIPE)


def session_of(*, record: Record = Record.OUTPUT, record_or_end: bool = False, **config: Any) -> ExecSession:
    return replace(new_session(container="web", **config), record=record, record_or_end=record_or_end)


class Shelves:
    """Services, one after the other, that record in one directory."""

    def __init__(self, directory: Path, *, session_bytes: int = AMPLE, total_bytes: int = AMPLE) -> None:
        self.directory = directory
        self._bounds = session_bytes, total_bytes
        self.now = self._new()

    def _new(self) -> FileRecordings:
        session_bytes, total_bytes = self._bounds
        return FileRecordings(self.directory, session_bytes=session_bytes, total_bytes=total_bytes)

    async def begin(self, session: ExecSession) -> FileRecording:
        made = await self.now.begin(session, None)
        assert isinstance(made, FileRecording)
        return made

    async def leave(self) -> None:
        await self.now.close()
        self.now = self._new()

    def crash(self) -> None:
        """What a SIGKILL leaves of a service: nothing but its files, which it has not locked any more."""
        for one in list(self.now._open):
            one._file._close()
        self.now = self._new()

    async def resume(self, session: ExecSession, *, in_order: bool) -> FileRecording:
        made = self.now.resume(session, in_order=in_order)
        assert isinstance(made, FileRecording)
        return made

    def path(self, session: ExecSession) -> Path:
        return self.directory / file_name(session)

    def read(self, session: ExecSession) -> Recorded:
        return Recorded.read(self.path(session))


@pytest.fixture
async def shelves(tmp_path: Path) -> Any:
    made = Shelves(tmp_path / "r")
    yield made
    await made.now.close()


async def finished(recording: FileRecording) -> None:
    recording.finish(OVER)
    async with asyncio.timeout(SOON):
        await recording.closed()


async def written(recording: FileRecording) -> None:
    """Have all that a recording holds written now."""
    async with asyncio.timeout(SOON):
        while recording._held or recording._writing is not None:
            if recording._writing is None:
                recording._begin_write()
            await asyncio.sleep(0.001)


# -- names and modes


async def test_where_it_is_and_who_may_read_it(shelves: Shelves) -> None:
    session = replace(session_of(tty=True), created_at=1_700_000_000.9)
    session = replace(session, container=replace(session.container, name="a/../b ü\n"))
    await finished(await shelves.begin(session))
    (path,) = shelves.directory.iterdir()
    assert path.name == f"20231114T221320Z-a%2F..%2Fb%20%C3%BC%0A-{session.id[:12]}.cast.gz"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(shelves.directory.stat().st_mode) == 0o700
    assert recording_module._OURS.fullmatch(path.name)


def test_a_name_is_short_enough() -> None:
    session = session_of()
    session = replace(session, container=replace(session.container, name="ü" * 500))
    assert len(file_name(session)) < 255
    assert recording_module._OURS.fullmatch(file_name(session))
    assert recording_module._OURS.fullmatch(file_name(replace(session, container=replace(session.container, name=""))))


def test_what_the_head_tells_of_the_environment() -> None:
    session = session_of(tty=True, env=("A=secret", "TERM=vt100", "SHELL=/bin/zsh", "TERMINFO=secret", "BARE"))
    assert about_of(session, None).environment == {"TERM": "vt100", "SHELL": "/bin/zsh"}
    assert about_of(session_of(tty=True), None).environment == {"TERM": "xterm"}
    assert about_of(session_of(), None).environment == {}
    assert about_of(session, ConsoleSize(0, 0)).size == ConsoleSize(height=24, width=80)


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
async def test_a_directory_that_others_can_write_to(shelves: Shelves, mode: int) -> None:
    shelves.directory.mkdir()
    shelves.directory.chmod(mode)
    with pytest.raises(Unavailable) as failure:
        await shelves.now.begin(session_of(record_or_end=True), None)
    assert "others can write to" in failure.value.hint
    assert not (await shelves.now.begin(session_of(), None)).output
    assert list(shelves.directory.iterdir()) == []


async def test_a_link_in_its_place(shelves: Shelves, tmp_path: Path) -> None:
    session = session_of(record_or_end=True)
    shelves.directory.mkdir()
    (tmp_path / "precious").write_bytes(b"precious")
    shelves.path(session).symlink_to(tmp_path / "precious")
    with pytest.raises(Unavailable):
        await shelves.now.begin(session, None)
    assert (tmp_path / "precious").read_bytes() == b"precious"


# -- in time, in order, bounded


async def test_what_little_there_is_is_written_soon(shelves: Shelves) -> None:
    session = session_of()
    recording = await shelves.begin(session)
    recording.wrote(1, b"a little")
    assert shelves.read(session).stdout == b""
    async with asyncio.timeout(SOON):
        while shelves.read(session).stdout != b"a little":
            await asyncio.sleep(0.05)
    before = shelves.path(session).stat()
    await asyncio.sleep(2 * recording_module.INTERVAL)
    assert shelves.path(session).stat().st_mtime_ns == before.st_mtime_ns, "it is written to when there is nothing"
    await finished(recording)


@pytest.mark.parametrize("tty", [False, True])
async def test_everything_in_order(shelves: Shelves, *, tty: bool) -> None:
    session = session_of(record=Record.ALL, tty=tty)
    recording = await shelves.begin(session)
    pieces = [b"%d " % number for number in range(3000)]
    for piece in pieces:
        recording.wrote(1, piece)
        recording.given(piece.upper())
        await recording.room()
    await finished(recording)
    found = shelves.read(session)
    assert (found.stdout, found.stdin) == (b"".join(pieces), b"".join(pieces))
    assert [event.data for event in found.events[::2]][:-1] == pieces
    assert found.notes == ["exit code 3 (sync-pipe)"]
    assert [event.time for event in found.events] == sorted(event.time for event in found.events)


class Disk:
    """Stands in the way of what a recording's thread writes: each write waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slow = False
        self.go = threading.Event()
        self.waits = threading.Event()
        self._real = os.pwrite
        monkeypatch.setattr(os, "pwrite", self._write)

    def _write(self, fd: int, data: bytes, at: int) -> int:
        if self.slow:
            self.waits.set()
            assert self.go.wait(SOON)
        return self._real(fd, data, at)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk(monkeypatch)
    yield made
    made.go.set()


@pytest.mark.parametrize("size", [1, 1000, PIECE])
async def test_a_slow_disk_slows_the_session(shelves: Shelves, disk: Disk, size: int) -> None:
    """It holds no more than its bound and what comes at once; then `room` waits, until the disk has taken some."""
    session = session_of()
    recording = await shelves.begin(session)
    disk.slow = True
    sent = 0
    while True:
        recording.wrote(1, b"x" * size)
        sent += size
        try:
            async with asyncio.timeout(0.05):
                await recording.room()
        except TimeoutError:
            break
        assert sent <= BOUND
    assert recording._held <= BOUND + size + 128
    assert len(recording._events) < 10_000
    disk.go.set()
    async with asyncio.timeout(SOON):
        await recording.room()
    await finished(recording)
    assert len(shelves.read(session).stdout) == sent


async def test_a_disk_that_is_stuck(shelves: Shelves, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recording is lost, nobody waits for it any more, and the file is let go when the thread is."""
    monkeypatch.setattr(recording_module, "_PATIENCE", 0.2)
    session = session_of()
    recording = await shelves.begin(session)
    lost: list[str] = []
    recording.when_lost(lost.append)
    disk.slow = True
    while recording.output:
        recording.wrote(1, b"x" * PIECE)
        await recording.room()
    assert lost == ["its recording ends: the disk does not take it in time"]
    async with asyncio.timeout(SOON):
        await recording.closed()
    again: list[str] = []
    recording.when_lost(again.append)
    assert again == lost
    recording.wrote(1, b"x" * 2 * BOUND)
    await recording.room()
    disk.go.set()
    async with asyncio.timeout(SOON):
        while True:
            with shelves.path(session).open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(0.01)


async def test_a_disk_that_is_stuck_keeps_no_start_and_no_reload(
    shelves: Shelves, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start is refused, or goes on without; what could not be written at a reload is told by the next service."""
    monkeypatch.setattr(recording_module, "_BEGIN_PATIENCE", 0.1)
    monkeypatch.setattr(recording_module, "_LEAVE_PATIENCE", 0.1)
    session = session_of()
    recording = await shelves.begin(session)
    disk.slow = True
    with pytest.raises(Unavailable):
        await shelves.now.begin(session_of(record_or_end=True), None)
    assert not (await shelves.now.begin(session_of(), None)).output
    recording.wrote(1, b"missing")
    await asyncio.wait_for(shelves.now.close(), SOON)
    shelves.crash()  # which is what becomes of a thread that is stuck
    disk.slow = False
    await finished(await shelves.resume(session, in_order=True))
    assert shelves.read(session).notes == [RESTARTED, "exit code 3 (sync-pipe)"]
    disk.go.set()


# -- killed, left, gone on with


async def recorded(shelves: Shelves, *, tty: bool) -> tuple[ExecSession, list[int]]:
    """Record some pieces and a character that is cut, be killed, and return where the members of the file end."""
    session = session_of(tty=tty)
    recording = await shelves.begin(session)
    ends = [shelves.path(session).stat().st_size]
    for data in (b"first", b"second \xe2\x82", b"\xac third", b"fourth"):
        recording.wrote(1, data)
        await written(recording)
        ends.append(shelves.path(session).stat().st_size)
    shelves.crash()
    return session, ends


@pytest.mark.parametrize("tty", [False, True])
async def test_killed_at_every_byte(shelves: Shelves, *, tty: bool) -> None:
    """What was whole can be read, by anybody's gunzip too once it goes on; what was torn is cut off, and told."""
    session, ends = await recorded(shelves, tty=tty)
    path, whole = shelves.path(session), shelves.path(session).read_bytes()
    text = "firstsecond € thirdfourth".encode()
    # In a cast the cut character comes with its second half.
    upto = [0, 5, 12 if tty else 14, 21, 27]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        members = sum(end <= length for end in ends)
        if members:
            found = shelves.read(session)
            assert found.torn == (length not in ends)
            assert text.startswith(found.stdout)
            assert len(found.stdout) >= upto[members - 1]
        again = await shelves.resume(session, in_order=False)
        again.wrote(1, b" on")
        await finished(again)
        found = shelves.read(session)
        assert not found.torn
        if members:
            assert found.notes == [RESTARTED, "exit code 3 (sync-pipe)"]
            assert found.stdout == text[: upto[members - 1]] + b" on", length
        else:
            assert "what was recorded before is missing" in found.notes[0]
            assert found.stdout == b" on"
        assert gzip.decompress(path.read_bytes()).count(b"execgate") == 1


async def test_garbage_behind_what_is_whole(shelves: Shelves) -> None:
    session, ends = await recorded(shelves, tty=False)
    with shelves.path(session).open("ab") as file:
        file.write(b"\0" * 1000)
    assert shelves.read(session).torn
    again = await shelves.resume(session, in_order=False)
    await written(again)
    await finished(again)
    assert not shelves.read(session).torn
    assert ends[-1] < shelves.path(session).stat().st_size < ends[-1] + 500


@pytest.mark.parametrize("tty", [False, True])
async def test_left_in_order(shelves: Shelves, *, tty: bool) -> None:
    """No word of it is in the recording, not even if there was nothing to write, or a character is cut."""
    session = session_of(tty=tty, record=Record.ALL)
    recording = await shelves.begin(session)
    data = "aä€🙂".encode()
    for at, byte in enumerate(data):
        recording.wrote(1, bytes([byte]))
        recording.given(bytes([byte]))
        if at % 2:
            await written(recording)
        await shelves.leave()
        assert recording.input, "whoever writes input now would have nobody know it"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(recording.room(), 0.001)
        recording = await shelves.resume(session, in_order=True)
    await finished(recording)
    found = shelves.read(session)
    assert (found.stdout, found.stdin) == (data, data)
    assert found.notes == ["exit code 3 (sync-pipe)"]


async def test_left_in_order_and_then_killed(shelves: Shelves) -> None:
    """The last word in the file is that of the one that left; the one that was killed had written nothing."""
    session = session_of()
    (await shelves.begin(session)).wrote(1, b"a")
    await shelves.leave()
    await written(await shelves.resume(session, in_order=True))
    shelves.crash()
    await finished(await shelves.resume(session, in_order=False))
    assert shelves.read(session).notes == [RESTARTED, "exit code 3 (sync-pipe)"]


async def test_an_end_that_only_the_recording_knows(shelves: Shelves) -> None:
    """The service was killed between the two: it is not ended twice."""
    session = session_of()
    await finished(await shelves.begin(session))
    before = shelves.path(session).read_bytes()
    shelves.crash()
    recording = await shelves.resume(session, in_order=False)
    recording.wrote(1, b"nobody's")
    await finished(recording)
    assert shelves.path(session).read_bytes() == before


async def test_one_that_was_lost_stays_lost(tmp_path: Path) -> None:
    shelves = Shelves(tmp_path / "r", session_bytes=5000)
    session = session_of()
    recording = await shelves.begin(session)
    recording.wrote(1, os.urandom(10_000))
    async with asyncio.timeout(SOON):
        await recording.closed()
    shelves.crash()
    again, lost = await shelves.resume(session, in_order=True), list[str]()
    again.when_lost(lost.append)
    async with asyncio.timeout(SOON):
        await again.closed()
    assert lost == ["its recording ends: it had ended before the service was restarted"]
    assert not again.output


async def test_one_that_is_gone_or_another_s(shelves: Shelves) -> None:
    """It begins anew, and says so."""
    session, other = session_of(), session_of()
    (await shelves.begin(session)).wrote(1, b"before")
    await finished(await shelves.begin(other))
    for spoil in (shelves.path(session).unlink, lambda: shelves.path(other).rename(shelves.path(session))):
        shelves.crash()
        spoil()
        recording = await shelves.resume(session, in_order=True)
        recording.wrote(1, b"after")
        await written(recording)
        found = shelves.read(session)
        assert found.head["execgate"]["session"] == session.id
        assert found.stdout == b"after"
        assert len(found.notes) == 1


async def test_a_start_that_came_to_nothing(shelves: Shelves) -> None:
    """It leaves nothing; and if the service is killed before it can see to that, the next start begins anew."""
    session = session_of()
    recording = await shelves.begin(session)
    recording.discard()
    assert list(shelves.directory.iterdir()) == []
    recording = await shelves.begin(session)
    recording.wrote(1, b"never was")
    await written(recording)
    shelves.crash()
    await finished(await shelves.begin(session))
    assert shelves.read(session).stdout == b""


async def test_a_start_whose_client_leaves_meanwhile(shelves: Shelves, disk: Disk) -> None:
    disk.slow = True
    beginning = asyncio.ensure_future(shelves.now.begin(session_of(), None))
    await asyncio.to_thread(disk.waits.wait)
    beginning.cancel()
    with pytest.raises(asyncio.CancelledError):
        await beginning
    disk.go.set()
    async with asyncio.timeout(SOON):
        while list(shelves.directory.iterdir()):
            await asyncio.sleep(0.01)


async def test_one_that_another_writes(shelves: Shelves, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_module, "_LOCK_PATIENCE", 0.1)
    session = session_of(record_or_end=True)
    recording = await shelves.begin(session)
    recording.wrote(1, b"mine")
    other = FileRecordings(shelves.directory, session_bytes=AMPLE, total_bytes=AMPLE)
    with pytest.raises(Unavailable) as failure:
        await other.begin(session, None)
    assert failure.value.hint == "another service writes it"
    await finished(recording)
    assert shelves.read(session).stdout == b"mine"


# -- bounds


@pytest.mark.parametrize("tty", [False, True])
async def test_the_bound_of_one(tmp_path: Path, *, tty: bool) -> None:
    """It is kept to the byte, the end is told, and what there is room for is there."""
    limit = 100_000
    shelves = Shelves(tmp_path / "r", session_bytes=limit)
    session = session_of(tty=tty)
    recording, lost = await shelves.begin(session), list[str]()
    recording.when_lost(lost.append)
    text, sent = "", 0
    while recording.output:
        piece = os.urandom(2000).hex()
        recording.wrote(1, piece.encode())
        text += piece
        sent += 1
        await written(recording)
        assert sent < 1000
    assert lost == [f"its recording ends: recording_bytes ({limit}) is reached"]
    found = shelves.read(session)
    assert found.notes == [f"the recording ends here: recording_bytes ({limit}) is reached"]
    assert text.encode().startswith(found.stdout)
    assert limit - 5000 < shelves.path(session).stat().st_size <= limit


async def test_the_end_has_its_room(tmp_path: Path) -> None:
    """A recording that comes close to its bound is not lost at its end."""
    shelves = Shelves(tmp_path / "r", session_bytes=5000)
    session = session_of()
    recording = await shelves.begin(session)
    recording.wrote(1, b"a")
    await written(recording)
    size = shelves.path(session).stat().st_size
    shelves.now._session_bytes = recording._file._limit = size + 1000
    await finished(recording)
    assert shelves.read(session).notes == ["exit code 3 (sync-pipe)"]


async def finished_of(shelves: Shelves, size: int) -> ExecSession:
    session = session_of()
    recording = await shelves.begin(session)
    recording.wrote(1, os.urandom(size))
    await finished(recording)
    return session


async def test_the_bound_of_all(tmp_path: Path) -> None:
    """The oldest that are over go; none that is under way, of this service or another, and nobody else's files."""
    shelves = Shelves(tmp_path / "r", total_bytes=500_000)
    running = session_of()
    recording = await shelves.begin(running)
    recording.wrote(1, os.urandom(50_000))
    await written(recording)
    elsewhere = FileRecordings(shelves.directory, session_bytes=AMPLE, total_bytes=AMPLE)
    foreign = session_of()
    await elsewhere.begin(foreign, None)
    (shelves.directory / "notes.txt").write_bytes(b"x" * 1_000_000)
    done = []
    for _ in range(12):
        done.append(await finished_of(shelves, 50_000))
        await asyncio.sleep(0.01)  # so that their times differ
        there = [path for path in shelves.directory.iterdir() if path.name != "notes.txt"]
        assert sum(path.stat().st_size for path in there) <= 500_000
    kept = [session for session in done if shelves.path(session).exists()]
    assert kept == done[-len(kept) :]
    assert len(kept) >= 6
    assert shelves.path(running).exists()
    assert shelves.path(foreign).exists()
    assert (shelves.directory / "notes.txt").exists()
    await elsewhere.close()


async def test_all_that_is_under_way_reaches_the_bound(tmp_path: Path) -> None:
    shelves = Shelves(tmp_path / "r", total_bytes=200_000)
    sessions = [session_of() for _ in range(3)]
    recordings = [await shelves.begin(session) for session in sessions]
    for recording in recordings:
        recording.wrote(1, os.urandom(80_000))
        await written(recording)
    assert [recording.output for recording in recordings] == [True, True, False]
    assert "recordings_total_bytes (200000) is reached" in shelves.read(sessions[2]).notes[0]
    await finished(recordings[0])
    fourth = await finished_of(shelves, 80_000)  # which the first one makes room for
    assert not shelves.path(sessions[0]).exists()
    assert len(shelves.read(fourth).stdout) == 80_000
    await finished(recordings[1])


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """Room for 16 pages."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", directory], check=True)
    yield directory
    subprocess.run(["umount", directory], check=True)  # which fails if a file of it is still open


async def test_a_disk_that_becomes_full(tiny_disk: Path) -> None:
    """What was whole is whole, the end is told, and nothing half written stays."""
    shelves = Shelves(tiny_disk)
    session = session_of()
    recording = await shelves.begin(session)
    text = b""
    while recording.output:
        piece = os.urandom(1500).hex().encode()
        text += piece
        recording.wrote(1, piece)
        await written(recording)
    found = shelves.read(session)
    assert not found.torn
    assert found.notes in ([], ["the recording ends here: No space left on device"])
    assert text.startswith(found.stdout)
    assert len(found.stdout) > 60_000
    assert (await shelves.now.begin(session_of(), None)).output is False
    with pytest.raises(Unavailable) as failure:
        await shelves.now.begin(session_of(record_or_end=True), None)
    assert failure.value.hint == "No space left on device"
    assert len(list(tiny_disk.iterdir())) == 1
    await shelves.now.close()


async def test_it_costs_the_loop_little(shelves: Shelves) -> None:
    """Compressing and writing are a thread's: while megabytes are recorded, nobody waits long for his turn."""
    session = session_of()
    recording = await shelves.begin(session)
    slowest = 0.0
    over = asyncio.Event()

    async def watch() -> None:
        nonlocal slowest
        while not over.is_set():
            before = time.perf_counter()
            await asyncio.sleep(0)
            slowest = max(slowest, time.perf_counter() - before)
            await asyncio.sleep(0.001)

    watching = asyncio.create_task(watch())
    data = os.urandom(PIECE)
    for _ in range(40):
        recording.wrote(1, data)
        await recording.room()
    await finished(recording)
    over.set()
    await watching
    assert slowest < 2.0  # which a busy machine may take; on a quiet one it is milliseconds
    assert shelves.read(session).stdout == data * 40
