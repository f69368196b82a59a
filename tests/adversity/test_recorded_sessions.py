"""What is recorded of sessions: all of it, once, whatever becomes of the service; and what comes of a full disk."""

import hashlib
import itertools
import os
import random
import select
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from execgate.gate.cast import What
from execgate.gate.recording import RESTARTED
from support.access import EVERYTHING, rule, write_policy
from support.api import OUTPUT, RawApi
from support.faults import fifo
from support.recordings import Recorded, Recordings, recording_service
from support.runtimes import TestContainer
from support.service import Service

NewService = Callable[..., Service]

_SERIAL = itertools.count(1)
FLOOD = 50_000_000
LINES = 40_000
SLOW_LINES = (
    f'i=0; while [ $i -lt {LINES} ]; do echo "line $i of the output"; [ $((i % 1000)) = 0 ] && sleep 0.05; '
    "i=$((i+1)); done"
)
ALL_LINES = b"".join(b"line %d of the output\n" % number for number in range(LINES))


@pytest.fixture
def directory(host_dir: Path) -> Path:
    return host_dir / f"recorded-{next(_SERIAL)}"


@pytest.fixture
def small_disk(host_dir: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    path = host_dir / f"disk-{next(_SERIAL)}"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)  # which fails if a file of it is still open


def random_file(container: TestContainer, size: int) -> bytes:
    """Put random bytes, which no compression makes less, into a container's /tmp/data, and return them."""
    data = random.Random(size).randbytes(size)
    (container.rootfs / "tmp/data").write_bytes(data)
    return data


def same(found: bytes, expected: bytes) -> None:
    """Compare what is too long to be shown."""
    assert len(found) == len(expected)
    assert hashlib.sha256(found).digest() == hashlib.sha256(expected).digest()


def test_pipes(new_service: NewService, container: TestContainer, directory: Path) -> None:
    service, recordings = recording_service(new_service, directory)
    api = RawApi(service.socket)
    script = 'echo out; echo error >&2; printf "\\377\\303"; sleep 0.1; printf "\\244\\n"; cat; exit 5'
    fields = {"Env": ["SECRET=hunter2", "TERM=vt100"]}
    done = api.pipe(container.id, "sh", "-c", script, stdin=b"typed\n", **fields)
    assert (done.stdout, done.stderr, done.exit_code) == (b"out\n\xff\xc3\xa4\ntyped\n", b"error\n", 5)
    (session,) = api.call("GET", "/exec/json").json
    found = recordings.of(session["ID"])
    assert (found.stdout, found.stderr, found.stdin) == (done.stdout, done.stderr, b"")
    assert found.notes == ["exit code 5 (sync-pipe)"]
    assert not found.tty
    about = found.head["execgate"]
    assert (about["session"], about["container"]) == (session["ID"], container.id)
    assert about["args"] == ["sh", "-c", script]
    assert b"hunter2" not in subprocess.run(["zcat", found.path], check=True, capture_output=True).stdout
    assert found.path.name.endswith(f"Z-{container.id}-{session['ID'][:12]}.jsonl.gz")
    assert stat.S_IMODE(found.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(recordings.directory.stat().st_mode) == 0o700
    service.assert_clean_log()


def test_a_terminal(new_service: NewService, container: TestContainer, directory: Path) -> None:
    service, recordings = recording_service(new_service, directory)
    api = RawApi(service.socket)
    session = api.create_attached(
        container.id, "sh", Tty=True, ConsoleSize=[30, 100], Env=["SECRET=hunter2", "TERM=vt100", "SHELL=/bin/sh"]
    )
    with api.attach(session, Detach=False, Tty=True) as stream:
        stream.send("echo $((40+2))ä\n".encode())
        seen = stream.output_until("42ä\r\n".encode())
        assert api.call("POST", f"/exec/{session}/resize?h=40&w=120").status == 200
        stream.send(b"stty size; exit 3\n")
        seen += stream.read_raw()
    found = recordings.of(session)
    assert found.tty
    assert found.stdout == seen
    assert (found.head["version"], found.head["width"], found.head["height"]) == (2, 100, 30)
    assert found.head["env"] == {"TERM": "vt100", "SHELL": "/bin/sh"}
    assert found.head["command"] == "sh"
    assert abs(found.head["timestamp"] - time.time()) < 100
    assert [event.data for event in found.events if event.what is What.SIZE] == [b"120x40"]
    assert found.notes == ["exit code 3 (sync-pipe)"]
    assert b"hunter2" not in subprocess.run(["zcat", found.path], check=True, capture_output=True).stdout
    assert found.path.name.endswith(f"-{session[:12]}.cast.gz")


def test_a_flood(new_service: NewService, container: TestContainer, directory: Path) -> None:
    """Attached and read, and detached with nobody there: every byte of both."""
    service, recordings = recording_service(new_service, directory, recording_bytes=10**9)
    api = RawApi(service.socket)
    data = random_file(container, FLOOD)
    done = api.pipe(container.id, "cat", "/tmp/data")
    same(done.stdout, data)
    detached = api.create(container.id, "sh", "-c", "cat /tmp/data >&2")
    assert api.start_detached(detached).status == 200
    assert api.ended(detached) == 0
    (container.rootfs / "tmp/data").unlink()
    attached = api.call("GET", "/exec/json").json[0]["ID"]
    same(recordings.of(attached).stdout, data)
    same(recordings.of(detached).stderr, data)
    service.assert_clean_log()


def test_input_is_recorded_when_it_is_asked_for(
    new_service: NewService, runc_container: TestContainer, directory: Path
) -> None:
    """More than the kernel would have moved by itself, and from whoever writes to it."""
    service, recordings = recording_service(new_service, directory, "all")
    api = RawApi(service.socket)
    data = random.Random(7).randbytes(5_000_000)
    done = api.pipe(runc_container.id, "sha256sum", stdin=data)
    assert done.stdout.startswith(hashlib.sha256(data).hexdigest().encode())
    (session,) = api.call("GET", "/exec/json").json
    found = recordings.of(session["ID"])
    same(found.stdin, data)
    assert found.stdout == done.stdout
    written = api.create(runc_container.id, "cat", AttachStdin=True, OnDisconnect="keep")
    assert api.start_detached(written).status == 200
    assert api.call("POST", f"/exec/{written}/stdin", b"one ").status == 204
    assert api.call("POST", f"/exec/{written}/stdin?eof=1", b"two").status == 204
    assert api.ended(written) == 0
    found = recordings.of(written)
    assert (found.stdin, found.stdout) == (b"one two", b"one two")
    with api.attach(api.create_attached(runc_container.id, "sh", Tty=True), Detach=False, Tty=True) as stream:
        stream.send("echo ü$((1+1))\n".encode())
        stream.output_until("ü2\r\n".encode())
        stream.send(b"exit\n")
        stream.read_raw()
    assert recordings.of(stream.id).stdin == "echo ü$((1+1))\nexit\n".encode()
    service.assert_clean_log()


def test_a_run_a_failed_start_and_a_client_that_leaves(
    new_service: NewService, runc_container: TestContainer, directory: Path
) -> None:
    service, recordings = recording_service(new_service, directory)
    api = RawApi(service.socket)
    answer = api.call("POST", f"/containers/{runc_container.id}/exec/run", {"Cmd": ["echo", "run"]})
    assert answer.json["Stdout"] == "run\n"
    assert recordings.of(answer.json["Id"]).stdout == b"run\n"
    failed = api.create(runc_container.id, "/no/such/program")
    assert api.start_detached(failed).status == 400
    (note,) = recordings.of(failed).notes
    assert note.startswith("exit code 127 (start-failure): ")
    with fifo(runc_container, "left") as go:
        with api.open(runc_container.id, "sh", "-c", "echo begun; read line </tmp/left; echo alone") as stream:
            stream.output_until(b"begun\n")
        go()
        assert api.ended(stream.id) == 0
    assert recordings.of(stream.id).stdout == b"begun\nalone\n"
    service.assert_clean_log()


@pytest.mark.parametrize("tty", [False, True])
def test_those_who_come_later(
    new_service: NewService, runc_container: TestContainer, directory: Path, *, tty: bool
) -> None:
    """A recorded session can be captured, watched and read again like any other; the offsets are the same."""
    service, recordings = recording_service(new_service, directory)
    api = RawApi(service.socket)
    fields: dict[str, Any] = {
        "Tty": tty,
        "AttachStdin": True,
        "CaptureStdout": True,
        "CaptureStderr": True,
        "OnDisconnect": "keep",
    }
    session = api.create(runc_container.id, "sh", "-c", "echo begun; cat; exit 2", **fields, **OUTPUT)
    with api.attach(session, Detach=False, Tty=tty) as first:
        first.output_until(b"begun")
        with api.reattach(session, after=0, tty=tty) as watcher:
            assert b"begun" in watcher.output_until(b"begun")
            watcher.send(b"typed\n")
            first.output_until(b"typed")
            watcher.send(b"\x04" if tty else b"")
            watcher.half_close()
            later = watcher.output()
            first.output()
    assert api.inspect(session)["ExitCode"] == 2
    found = recordings.of(session)
    with api.reattach(session, after=0, tty=tty) as again:
        assert again.output()[0] == found.stdout
    assert found.stdout.endswith(later[0])
    assert api.inspect(session)["StdoutBytes"] == len(found.stdout)
    service.assert_clean_log()


def crash_in_the_midst(service: Service, api: RawApi, session: str, times: int) -> None:
    for _ in range(times):
        before = api.inspect(session)["StdoutBytes"]
        while api.inspect(session)["StdoutBytes"] == before:  # so that there is something to lose
            time.sleep(0.05)
        service.crash()


@pytest.mark.parametrize("tty", [False, True])
def test_the_worker_is_killed(new_service: NewService, container: TestContainer, directory: Path, *, tty: bool) -> None:
    """The same file goes on; what is missing is missing where it says so, and nothing is there twice."""
    service, recordings = recording_service(new_service, directory)
    api = RawApi(service.socket)
    session = api.create(container.id, "sh", "-c", f"{SLOW_LINES}; exit 9", Tty=tty)
    assert api.start_detached(session).status == 200
    for count in range(1, 4):
        crash_in_the_midst(service, api, session, 1)
        # A worker that is killed within its first second may take its own word with it, and all behind that.
        _await_recorded(recordings, session, notes=count)
    assert api.wait_stopped(session, timeout=120)["ExitCode"] == 9
    found = recordings.of(session)
    assert found.notes[:-1] == [RESTARTED] * 3
    assert found.notes[-1].startswith("exit code 9 (")
    parts = split_at(found, RESTARTED)
    assert len(parts) == 4
    position, missing = 0, 0
    for part in parts:
        text = part.replace(b"\r\n", b"\n")
        at = ALL_LINES.find(text, position)
        assert at >= 0, "something is missing where nothing says so"
        missing += at - position
        position = at + len(text)
    assert position == len(ALL_LINES)
    assert missing < 3 * 1_500_000
    assert len(recordings.paths()) == 1
    service.assert_clean_log()


def split_at(found: Recorded, note: str) -> list[bytes]:
    """Return the output before, between and behind the places where a recording says `note`."""
    parts = [b""]
    for event in found.events:
        if event.what is What.NOTE and event.data.decode() == note:
            parts.append(b"")
        elif event.what is What.STDOUT:
            parts[-1] += event.data
    return parts


@pytest.mark.parametrize("tty", [False, True])
def test_reloads(new_service: NewService, container: TestContainer, directory: Path, *, tty: bool) -> None:
    """Nothing is missing and nothing there twice, of output and of input, though characters are cut anywhere."""
    service, recordings = recording_service(new_service, directory, "all", recording_bytes=10**10)
    api = RawApi(service.socket)
    chance = random.Random(3)
    text = "".join(chance.choices("aä€🙂", k=500_000)).encode()
    data = text if tty else text + chance.randbytes(2_000_000)
    (container.rootfs / "tmp/data").write_bytes(data)
    # conmon writes to a terminal and reads from it in turns: more input than the kernel holds would stop both.
    typed = b"x" * (3000 if tty else 300_000)
    with fifo(container, "reloads") as go:
        script = (
            "stty -opost -echo raw 2>/dev/null; echo ready; read line </tmp/reloads; "
            f"while [ -e /tmp/data ]; do cat /tmp/data; sleep 0.1; done; head -c {len(typed)} | wc -c"
        )
        session = api.create_attached(container.id, "sh", "-c", script, Tty=tty)
        with api.attach(session, Detach=False, Tty=tty) as stream, ThreadPoolExecutor(2) as threads:
            assert stream.output_until(b"ready\n") == b"ready\n"  # before that a terminal echoes
            go()
            sending = threads.submit(stream.send, typed)
            seen = threads.submit(lambda: b"".join(piece for _, piece in stream.pieces()))
            try:
                for _ in range(3):
                    service.reload()
            finally:
                (container.rootfs / "tmp/data").unlink()
            sending.result()
            output = seen.result()
    found = recordings.of(session)
    same(found.stdout, b"ready\n" + output)
    rounds, rest = divmod(len(output), len(data))
    assert output[-rest:] == f"{len(typed)}\n".encode()
    same(output[:-rest], data * rounds)
    same(found.stdin, typed)
    assert len(found.notes) == 1
    assert found.notes[0].startswith("exit code 0 (")
    service.assert_clean_log()


@pytest.mark.parametrize("tty", [False, True])
def test_an_end_that_nobody_saw(
    new_service: NewService, container: TestContainer, directory: Path, *, tty: bool
) -> None:
    """Keeper and worker are killed, and the process ends: the next service writes the end."""
    service, recordings = recording_service(new_service, directory)
    api = RawApi(service.socket)
    with fifo(container, "nobody") as go:
        session = api.create(container.id, "sh", "-c", "echo begun; read line </tmp/nobody; exit 4", Tty=tty)
        assert api.start_detached(session).status == 200
        api.connect().close()
        while not (api.inspect(session)["StdoutBytes"]):
            time.sleep(0.01)
        pid = api.inspect(session)["Pid"]
        service.kill()
        end = os.pidfd_open(pid)
        go()
        select.select([end], [], [], 20)
        os.close(end)
    service, _ = recording_service(new_service, directory)
    api = RawApi(service.socket)
    assert api.wait_stopped(session)["ExitCode"] == 4
    found = recordings.of(session)
    assert found.notes[0] == RESTARTED
    assert found.notes[1].startswith("exit code 4 (")
    assert len(found.notes) == 2
    service.assert_clean_log()


def test_the_rule_says_what_is_recorded(
    new_service: NewService, runc_container: TestContainer, directory: Path
) -> None:
    """One that says nothing of it leaves it to the service; the recording tells whose session and which rule it was."""
    write_policy(
        directory,
        rule("input", ["uid:0"], argv=[["cat"]], record="all", record_failure="closed", **EVERYTHING),
        rule("rest", ["uid:0"], argv=[["wc"]], **EVERYTHING),
    )
    service, recordings = recording_service(new_service, directory, "output")
    api = RawApi(service.socket)
    for command, given, failing in (("cat", b"typed", True), ("wc", b"", False)):
        api.pipe(runc_container.id, command, stdin=b"typed")
        session = api.call("GET", "/exec/json").json[-1]
        found = recordings.of(session["ID"])
        assert found.stdin == given
        assert (found.head["execgate"]["owner"], found.head["execgate"]["rule"]) == (session["Owner"], session["Rule"])
        assert session["Rule"] == ("input" if failing else "rest")
    recordings.directory.chmod(0o777)
    refused = api.call("POST", f"/containers/{runc_container.id}/exec/run", {"Cmd": ["cat"]})
    assert refused.status == 503, refused
    assert api.pipe(runc_container.id, "wc").exit_code == 0
    service.assert_clean_log()


# -- what cannot be written


def fill(disk: Path, left: int) -> Path:
    """Leave `left` bytes of a disk, and return the file that takes the rest."""
    space = os.statvfs(disk)
    ballast = disk / "ballast"
    ballast.write_bytes(b"x" * (space.f_bavail * space.f_frsize - left))
    return ballast


def test_a_full_disk_at_the_start(
    new_service: NewService, runc_container: TestContainer, directory: Path, small_disk: Path
) -> None:
    """What must be recorded is refused with 503 before anything of it exists; else it runs, and the log tells."""
    (small_disk / "recordings").mkdir(mode=0o700)
    ballast = fill(small_disk, 0)
    where = small_disk / "recordings"
    service, recordings = recording_service(
        new_service, directory, recordings_dir=where, record_failure="closed", max_sessions=5
    )
    api = RawApi(service.socket)
    mark = runc_container.rootfs / "tmp/ran"
    session = api.create(runc_container.id, "touch", "/tmp/ran")
    for detach in (True, False):
        refused = api.call("POST", f"/exec/{session}/start", {"Detach": detach})
        assert refused.status == 503, refused
        assert "must not run without" in refused.json["message"]
    assert api.call("POST", f"/containers/{runc_container.id}/exec/run", {"Cmd": ["touch", "/tmp/ran"]}).status == 503
    assert not mark.exists()
    assert recordings.paths() == []
    assert api.inspect(session)["ExitCode"] is None
    ballast.unlink()
    assert api.start_detached(session).status == 200  # and it can be started once there is room
    assert api.ended(session) == 0
    mark.unlink()
    assert recordings.of(session).notes == ["exit code 0 (sync-pipe)"]
    service.stop()
    ballast = fill(small_disk, 0)
    service, _ = recording_service(new_service, directory, recordings_dir=where)
    api = RawApi(service.socket)
    done = api.pipe(runc_container.id, "cat", stdin=b"unrecorded")
    assert (done.stdout, done.exit_code) == (b"unrecorded", 0)
    assert "is not recorded: No space left on device" in service.log()
    assert len(recordings.paths()) == 1
    ballast.unlink()
    service.assert_clean_log()


@pytest.mark.parametrize("failure", ["open", "closed"])
@pytest.mark.parametrize("reason", ["No space left on device", "recording_bytes", "recordings_total_bytes"])
def test_no_room_in_the_midst(
    new_service: NewService,
    runc_container: TestContainer,
    directory: Path,
    small_disk: Path,
    failure: str,
    reason: str,
) -> None:
    """The recording ends with a note; the session goes on, or it is killed, and its end and its client say why."""
    settings: dict[str, Any] = {reason: 1_000_000} if reason.startswith("recording") else {}
    service, recordings = recording_service(
        new_service, directory, recordings_dir=small_disk / "r", record_failure=failure, **settings
    )
    api = RawApi(service.socket)
    data = random_file(runc_container, 8_000_000)
    script = "trap '' TERM HUP; echo begun; cat /tmp/data; echo over; exec sleep 5"
    with api.open(runc_container.id, "sh", "-c", script) as stream:
        stdout, stderr = stream.output() if failure == "closed" else (stream.output_until(b"over\n"), b"")
        if failure == "open":
            assert api.call("POST", f"/exec/{stream.id}/kill").status == 204
    ended = api.wait_stopped(stream.id)
    assert ended["ExitCode"] == 137
    found = recordings.of(stream.id)
    assert reason in found.notes[-1]
    assert found.notes[-1].startswith("the recording ends here: ")
    assert (b"begun\n" + data).startswith(found.stdout)
    assert len(found.stdout) > 500_000
    assert found.path.stat().st_size <= 1_000_000 if settings else 2_100_000
    if failure == "open":
        same(stdout, b"begun\n" + data + b"over\n")
        assert ended["Error"] == ""
    else:
        assert reason in ended["Error"]
        assert not ended["TimedOut"]
        assert b"the session is ended: its recording ends: " in stdout + stderr
        assert len(stdout) < len(found.stdout) + 3_000_000
    assert f"the recording {found.path.name} ends: " in service.log()
    (runc_container.rootfs / "tmp/data").unlink()
    service.assert_clean_log()


def test_the_next_service_cannot_go_on(new_service: NewService, runc_container: TestContainer, directory: Path) -> None:
    """A session that must be recorded ends, another goes on."""
    service, recordings = recording_service(new_service, directory, record_failure="closed")
    api = RawApi(service.socket)
    must = api.create(runc_container.id, "sleep", "60")
    assert api.start_detached(must).status == 200
    service.kill()
    recordings.directory.chmod(0o777)
    service, _ = recording_service(new_service, directory)
    api = RawApi(service.socket)
    ended = api.wait_stopped(must)
    assert ended["ExitCode"] == 137
    assert "others can write to" in ended["Error"]
    may = api.create(runc_container.id, "echo", "unrecorded")
    assert api.start_detached(may).status == 200
    assert api.ended(may) == 0
    assert len(recordings.paths()) == 1
    service.assert_clean_log()


def _await_recorded(recordings: Recordings, session: str, *, notes: int = 0, output: int = 0) -> None:
    """Wait until a recording has this much: while its session runs the last of it may be held for a second.

    This polls: there is no event for what another process writes.
    """
    deadline = time.monotonic() + 20
    while len((found := Recorded.read(recordings.path(session))).notes) < notes or len(found.stdout) < output:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_old_recordings_make_room(new_service: NewService, runc_container: TestContainer, directory: Path) -> None:
    """The oldest that is over goes, and none that is under way."""
    service, recordings = recording_service(new_service, directory, recordings_total_bytes=3_000_000)
    api = RawApi(service.socket)
    random_file(runc_container, 500_000)
    running = api.create(runc_container.id, "sh", "-c", "cat /tmp/data; exec sleep 600")
    assert api.start_detached(running).status == 200
    _await_recorded(recordings, running, output=500_000)  # then it takes its room
    (directory / "recordings/not-ours.gz").write_bytes(b"x" * 5_000_000)
    done = []
    for _ in range(8):
        done.append(api.create(runc_container.id, "cat", "/tmp/data"))
        assert api.start_detached(done[-1]).status == 200
        assert api.ended(done[-1]) == 0
    names = [path.name for path in recordings.paths()]
    kept = [session for session in done if any(session[:12] in name for name in names)]
    assert kept == done[-len(kept) :]
    assert 3 <= len(kept) <= 4
    assert sum(path.stat().st_size for path in recordings.directory.glob("2*")) <= 3_000_000
    assert api.call("POST", f"/exec/{running}/kill").status == 204
    assert len(recordings.of(running).stdout) == 500_000
    assert len(recordings.of(done[-1]).stdout) == 500_000
    (runc_container.rootfs / "tmp/data").unlink()
    service.assert_clean_log()
