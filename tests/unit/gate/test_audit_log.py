"""Where the log goes: over restarts, rotations, full disks, readers that do not read; and nothing is lost unsaid."""

import asyncio
import contextlib
import fcntl
import json
import os
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from execgate import cli
from execgate.gate.audit_chain import digest_of
from execgate.gate.audit_log import AuditLog, AuditSettings, check
from execgate.model.errors import Conflict, Unavailable
from support.programs import run_program

_SET_FLAGS, _APPEND_ONLY = 0x40086602, 0x20  # FS_IOC_SETFLAGS, FS_APPEND_FL

NewLog = Callable[..., AuditLog]


@pytest.fixture
def settings(tmp_path: Path) -> AuditSettings:
    return AuditSettings(anchor=tmp_path / "state/audit", path=tmp_path / "log/audit.log")


@pytest.fixture
def new_log(settings: AuditSettings) -> Iterator[NewLog]:
    """Open the log as one service after another would: takes changes of its settings."""
    with contextlib.ExitStack() as opened:

        def open_log(**changes: Any) -> AuditLog:
            log = AuditLog(replace(settings, **changes))
            opened.callback(let_go, log)
            log.begin({"version": "1"})
            return log

        yield open_log


def let_go(log: AuditLog) -> None:
    """Close what a log has open, and write nothing: its service was killed."""
    if log._file is not None:
        log._file.close()
    log._anchor.close()


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def events(path: Path) -> list[str]:
    return [entry["event"] for entry in entries(path)]


def verified(*files: Path | str, code: int = 0, capsys: pytest.CaptureFixture[str]) -> str:
    """Run `execgate audit verify`, and return what it says."""
    capsys.readouterr()
    assert cli.main(["audit", "verify", *map(str, files)]) == code, capsys.readouterr().out
    return capsys.readouterr().out


def test_a_log_is_private_and_has_its_entries(new_log: NewLog, settings: AuditSettings) -> None:
    assert settings.path is not None
    log = new_log()
    log.write("start", {"n": 1})
    log.close()
    assert events(settings.path) == ["opened", "start", "closed"]
    assert [entry["seq"] for entry in entries(settings.path)] == [1, 2, 3]
    for path in (settings.path, settings.path.with_name("audit.log.lock"), settings.anchor):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(settings.path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("anchored", [True, False], ids=["", "after a reboot"])
@pytest.mark.parametrize("killed", [True, False])
def test_the_chain_goes_on(
    new_log: NewLog, settings: AuditSettings, capsys: pytest.CaptureFixture[str], anchored: bool, killed: bool
) -> None:
    assert settings.path is not None
    for number in range(5):
        log = new_log()
        log.write("start", {"n": number})
        let_go(log) if killed else log.close()
        if not anchored:
            settings.anchor.unlink()
    assert "the chain is whole" in verified(settings.path, capsys=capsys)
    assert entries(settings.path)[-1]["seq"] == (10 if killed else 15)


def test_there_is_one_writer(new_log: NewLog, settings: AuditSettings) -> None:
    log = new_log()
    with pytest.raises(Conflict, match="another running execgate"):
        AuditLog(settings).begin({})
    let_go(log)
    new_log()


@pytest.mark.parametrize("kept", [1, 7, 120])
def test_a_torn_line(new_log: NewLog, settings: AuditSettings, capsys: pytest.CaptureFixture[str], kept: int) -> None:
    """A service died amid a write; all that lacks may be the newline."""
    assert settings.path is not None
    log = new_log()
    log.write("start", {"n": 1})
    log.write("start", {"n": 2})
    let_go(log)
    *whole, torn = settings.path.read_bytes().splitlines(keepends=True)
    torn = torn.removesuffix(b"\n")[:kept]
    settings.path.write_bytes(b"".join(whole) + torn)
    settings.anchor.unlink()
    log = new_log()
    log.write("start", {"n": 2})
    lines = settings.path.read_bytes().splitlines()
    assert lines[2] == torn, "it stays"
    told = json.loads(lines[3])
    assert (told["event"], told["torn_bytes"], told["torn_sha256"]) == ("recovered", len(torn), digest_of(torn))
    assert [json.loads(line)["event"] for line in lines[4:]] == ["opened", "start"]
    assert f"{len(torn)} bytes of an entry whose writing was cut short" in verified(settings.path, capsys=capsys)


def test_an_end_that_was_changed_between_two_services(
    new_log: NewLog, settings: AuditSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the file alone cannot tell, the state directory can."""
    assert settings.path is not None
    log = new_log()
    for number in range(5):
        log.write("start", {"n": number})
    let_go(log)
    data = settings.path.read_bytes()
    settings.path.write_bytes(data.replace(b'"n":4', b'"n":5'))
    new_log()
    assert "one of the two was changed" in verified(settings.path, code=1, capsys=capsys)


def test_an_end_that_was_cut_off_between_two_services(
    new_log: NewLog, settings: AuditSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert settings.path is not None
    log = new_log()
    for number in range(5):
        log.write("start", {"n": number})
    let_go(log)
    settings.path.write_bytes(b"".join(settings.path.read_bytes().splitlines(keepends=True)[:3]))
    new_log()
    assert "seq 4 is missing, and the 2 behind it" in verified(settings.path, code=1, capsys=capsys)


@pytest.mark.parametrize("garbage", [b"what is this\n", b"\0" * 5000, b"\0" * 3_000_000, b"\n\n\n"])
def test_garbage_at_the_end(
    new_log: NewLog, settings: AuditSettings, capsys: pytest.CaptureFixture[str], garbage: bytes
) -> None:
    """It keeps no service from going on, and is not passed over."""
    assert settings.path is not None
    log = new_log()
    log.write("start", {"n": 1})
    let_go(log)
    with settings.path.open("ab") as file:
        file.write(garbage)
    log = new_log()
    log.write("start", {"n": 2})
    assert [entry["seq"] for entry in entries_or_none(settings.path)] in ([1, 2, 3, 4], [1, 2, 3, 4, 5])
    if garbage == b"\0" * 5000:  # which may well be a write that did not come to its end
        assert "cut short" in verified(settings.path, capsys=capsys)
    else:
        assert "is no entry" in verified(settings.path, code=1, capsys=capsys)


def entries_or_none(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines() if line.startswith(b"{")]


# -- rotation


def test_rotation(new_log: NewLog, settings: AuditSettings, capsys: pytest.CaptureFixture[str]) -> None:
    assert settings.path is not None
    log = new_log(max_bytes=4096, keep=3)
    settings.path.chmod(0o640)
    os.chown(settings.path, 0, 4)
    for number in range(200):
        log.write("start", {"n": number})
        if number == 100:
            let_go(log)
            log = new_log(max_bytes=4096, keep=3)
    names = sorted(path.name for path in settings.path.parent.iterdir())
    assert names == ["audit.log", "audit.log.1", "audit.log.2", "audit.log.3", "audit.log.lock"]
    files = [settings.path.with_name(name) for name in names[3:0:-1]] + [settings.path]
    for path in files:
        assert path.stat().st_size <= 4096
        assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_gid) == (0o640, 4), path
    said = verified(settings.path, capsys=capsys)
    assert "seq 202" in said
    found = [entry["n"] for path in files for entry in entries(path) if entry["event"] == "start"]
    assert found == list(range(found[0], 200))


def test_an_entry_that_is_larger_than_a_file_may_be(new_log: NewLog, settings: AuditSettings) -> None:
    assert settings.path is not None
    log = new_log(max_bytes=100)
    log.write("start", {"n": "x" * 1000})
    log.write("start", {"n": "y"})
    assert events(settings.path) == ["start"]
    assert events(settings.path.with_name("audit.log.1")) == ["start"]


def test_swapped_files(new_log: NewLog, settings: AuditSettings, capsys: pytest.CaptureFixture[str]) -> None:
    path = settings.path
    assert path is not None
    log = new_log(max_bytes=2048)
    for number in range(40):
        log.write("start", {"n": number})
    one, two = path.with_name("audit.log.1"), path.with_name("audit.log.2")
    assert "the chain is whole" in verified(two, one, path, capsys=capsys)
    first_data, second_data = one.read_bytes(), two.read_bytes()
    one.write_bytes(second_data)
    two.write_bytes(first_data)
    assert "BROKEN" in verified(path, code=1, capsys=capsys)
    two.write_bytes(second_data)
    one.unlink()
    assert "missing" in verified(path, code=1, capsys=capsys)


@pytest.mark.parametrize("renamed", [0, 1, 2], ids=["before", "within", "behind"])
def test_killed_within_a_rotation(
    new_log: NewLog, settings: AuditSettings, capsys: pytest.CaptureFixture[str], renamed: int
) -> None:
    """At whichever rename; after a reboot the file before tells how the chain goes on."""
    path = settings.path
    assert path is not None
    log = new_log(max_bytes=2048)
    while not path.with_name("audit.log.1").exists():
        log.write("start", {})
    let_go(log)
    settings.anchor.unlink()
    names = [(path.with_name("audit.log.1"), path.with_name("audit.log.2")), (path, path.with_name("audit.log.1"))]
    for source, target in names[:renamed]:
        source.rename(target)
    new_log().write("start", {})
    assert "the chain is whole" in verified(path, capsys=capsys)


@pytest.mark.parametrize("reloaded", [True, False])
@pytest.mark.parametrize("name", ["audit.log.1", "audit.log-20260131", "old/audit.log"])
def test_moved_by_somebody_else(
    new_log: NewLog, settings: AuditSettings, capsys: pytest.CaptureFixture[str], name: str, reloaded: bool
) -> None:
    """Logrotate, say: the chain goes on in a new file, wherever the old one is."""
    path = settings.path
    assert path is not None
    log = new_log()
    log.write("start", {})
    moved = path.parent / name
    moved.parent.mkdir(exist_ok=True)
    path.rename(moved)
    if reloaded:
        let_go(log)
        log = new_log()
    log.write("start", {})
    assert events(path) == (["opened", "start"] if reloaded else ["start"])
    assert "the chain is whole" in verified(moved, path, capsys=capsys)


def test_removed(new_log: NewLog, settings: AuditSettings, capsys: pytest.CaptureFixture[str]) -> None:
    """What comes is not lost with it, and what was there is known to be missing."""
    assert settings.path is not None
    log = new_log()
    log.write("start", {})
    settings.path.unlink()
    log.write("start", {})
    assert "1 entries, seq 3 to 3" in verified(settings.path, capsys=capsys)


# -- what cannot be written


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for some pages."""
    directory = tmp_path / "small"
    directory.mkdir()
    run_program(["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", directory])
    yield directory
    run_program(["umount", "--lazy", directory])


def fill(directory: Path) -> Path:
    """Leave no page; return the file to remove."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return ballast


def write_until_refused(log: AuditLog, **fields: Any) -> tuple[int, Unavailable]:
    """Write entries until one is refused, and return its number and what was said."""
    for number in range(10_000):
        try:
            log.write("start", {"n": number, **fields}, refusable=True)
        except Unavailable as refused:
            return number, refused
    raise AssertionError("it is never full")


def test_strict_refuses_what_is_to_come(
    new_log: NewLog, small_disk: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """And has no half line to show for it; what has happened already is counted."""
    path = small_disk / "audit.log"
    log = new_log(path=path, strict=True)
    ballast = fill(small_disk)
    number, refused = write_until_refused(log)
    assert refused.message.startswith("the audit log cannot be written")
    assert refused.hint == f"{path}: No space left on device"
    size = path.stat().st_size
    for _ in range(3):
        log.write("exit", {})
        with pytest.raises(Unavailable):
            log.write("start", {"n": number}, refusable=True)
    assert path.stat().st_size == size
    assert path.read_bytes().endswith(b"\n")
    ballast.unlink()
    log.write("start", {"n": number}, refusable=True)
    assert [entry["n"] for entry in entries(path) if entry["event"] == "start"] == list(range(number + 1))
    assert entries(path)[-2]["event"] == "lost"
    assert entries(path)[-2]["lines"] == 3
    assert "3 entries before it could not be written" in verified(path, capsys=capsys)
    told = [record.message for record in caplog.records]
    assert told == [
        "the audit log is not written: [Errno 28] No space left on device",
        "the audit log is written again",
    ]


def test_not_strict_goes_on(new_log: NewLog, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lost ones are told as soon as that is possible, by the next service if need be."""
    path = small_disk / "audit.log"
    log = new_log(path=path)
    ballast = fill(small_disk)
    for _ in range(100):
        log.write("start", {"n": "x" * 100}, refusable=True)
    let_go(log)
    written = events(path).count("start")
    log = new_log(path=path)  # without room for its first word either
    log.write("start", {})
    ballast.unlink()
    log.write("start", {})
    assert events(path)[-3:] == ["opened", "lost", "start"]
    assert entries(path)[-2]["lines"] == 101 - written
    assert "could not be written" in verified(path, capsys=capsys)


def test_an_append_only_file(new_log: NewLog, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody may cut half a line off, us included: it is told as torn. Nor is it rotated: no reason to stop."""
    path = small_disk / "audit.log"
    log = new_log(path=path, strict=True, max_bytes=16384)
    with path.open("rb") as file:
        fcntl.ioctl(file, _SET_FLAGS, struct.pack("l", _APPEND_ONLY))
        try:
            ballast = fill(small_disk)
            write_until_refused(log, text="x" * 1000)
            assert not path.read_bytes().endswith(b"\n")
            ballast.unlink()
            for number in range(20):
                log.write("start", {"n": number}, refusable=True)
            assert "cut short" in verified(path, capsys=capsys)
            for _ in range(200):
                log.write("start", {"n": "y" * 100}, refusable=True)
            assert path.stat().st_size > 16384
        finally:
            fcntl.ioctl(file, _SET_FLAGS, struct.pack("l", 0))
    assert "the chain is whole" in verified(path, capsys=capsys)


def test_a_directory_that_goes_and_comes_back(new_log: NewLog, settings: AuditSettings, tmp_path: Path) -> None:
    path = tmp_path / "a/b/audit.log"
    path.parent.mkdir(parents=True)
    log = new_log(path=path, strict=True)
    (tmp_path / "a").rename(tmp_path / "c")
    with pytest.raises(Unavailable):
        log.write("start", {}, refusable=True)
    (tmp_path / "c").rename(tmp_path / "a")
    log.write("start", {}, refusable=True)
    assert events(path) == ["opened", "start"]


def test_what_can_never_be_a_log(settings: AuditSettings, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.touch()
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "directory", "fifo", "no/such/directory/at/all", "target/below"):
        with pytest.raises(Unavailable, match="cannot be written"):
            check(replace(settings, path=tmp_path / name))
        log = AuditLog(replace(settings, path=tmp_path / name, strict=True))
        log.begin({})
        with pytest.raises(Unavailable):
            log.write("start", {}, refusable=True)
        let_go(log)
    assert target.read_bytes() == b""
    check(settings)
    check(replace(settings, path=None))


def test_what_may_pass_keeps_no_service_from_starting(settings: AuditSettings, small_disk: Path) -> None:
    fill(small_disk)
    for number in range(1000):  # as many as there are inodes
        try:
            (small_disk / f"{number}").touch()
        except OSError:
            break
    check(replace(settings, path=small_disk / "audit.log"))


# -- stdout


@contextlib.contextmanager
def stdout() -> Iterator[int]:
    """Yield what reads our standard output: a pipe. No fixture, because pytest has its hands on it between these."""
    reader, writer = os.pipe()
    before = os.dup(1)
    os.dup2(writer, 1)
    os.close(writer)
    try:
        yield reader
    finally:
        os.dup2(before, 1)
        os.close(before)
        os.close(reader)


def test_stdout_alone(new_log: NewLog) -> None:
    """The chain goes on from one service to the next, which has nothing to read it from."""
    with stdout() as reader:
        for number in range(3):
            log = new_log(path=None, stdout=True)
            log.write("start", {"n": number})
            let_go(log)
        found = [json.loads(line) for line in os.read(reader, 65536).splitlines()]
    assert [entry["seq"] for entry in found] == [1, 2, 3, 4, 5, 6]


def test_stdout_is_a_copy(new_log: NewLog, settings: AuditSettings) -> None:
    assert settings.path is not None
    with stdout() as reader:
        log = new_log(stdout=True)
        log.write("start", {})
        assert os.read(reader, 65536) == settings.path.read_bytes()


def test_nobody_reads_stdout(new_log: NewLog, settings: AuditSettings) -> None:
    """The service waits for no reader of its log."""
    assert settings.path is not None
    with stdout() as reader:
        strict = new_log(path=None, stdout=True, strict=True)
        write_until_refused(strict)
        copy = new_log(stdout=True, strict=True)
        for _ in range(10):
            copy.write("start", {}, refusable=True)
        assert len(entries(settings.path)) == 11
        os.read(reader, 65536)
        strict.write("start", {}, refusable=True)


# -- flushed


async def test_one_flush_serves_all(new_log: NewLog, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    flush = os.fdatasync

    def count(fd: int) -> None:
        flushed.append(fd)
        flush(fd)

    monkeypatch.setattr(os, "fdatasync", count)
    log = new_log(sync=True, max_bytes=4096)
    before = len(os.listdir("/proc/self/fd"))

    async def start(number: int) -> None:
        log.write("start", {"n": number})
        await log.flushed()

    await asyncio.gather(*[start(number) for number in range(100)])
    files = len(flushed)
    assert 2 < files < 30, "every file once or twice, and not every entry"
    await log.flushed()
    assert len(flushed) == files, "there was nothing new"
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_a_flush_that_fails(new_log: NewLog, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = new_log(sync=True, strict=True)

    def fail(_fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as failing:
        failing.setattr(os, "fdatasync", fail)
        strict.write("start", {})
        with pytest.raises(Unavailable, match="the audit log cannot be written"):
            await strict.flushed()
        let_go(strict)
        lax = new_log(sync=True)
        lax.write("start", {})
        await lax.flushed()
    await lax.flushed()


async def test_descriptors_of_rotated_files_are_bounded(new_log: NewLog) -> None:
    """Though nobody starts anything, and so waits for no flush."""
    log = new_log(sync=True, max_bytes=1024)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(500):
        log.write("denied", {})
    assert len(os.listdir("/proc/self/fd")) < before + 10


def test_no_descriptor_is_left(new_log: NewLog, settings: AuditSettings) -> None:
    before = len(os.listdir("/proc/self/fd"))
    log = new_log(max_bytes=1024)
    for _ in range(100):
        log.write("start", {})
    log.close()
    log.close()
    assert len(os.listdir("/proc/self/fd")) == before
