"""The audit log of a service that is killed, reloaded, moved from under, and has no room: nothing runs unwitnessed.

Each test ends with `execgate audit verify`: whatever happened, the chain is whole.
"""

import contextlib
import json
import os
import random
import select
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from execgate import cli
from execgate.runtime.readiness import Descriptor
from support.api import RawApi
from support.errors import HostError
from support.faults import killed_at, steps_taken
from support.leaks import assert_no_leaks, footprint
from support.programs import run_program
from support.runtimes import TestContainer
from support.service import Service, execgate_program
from support.unharmed import WatchedServices

NewService = Callable[..., Service]

SOON = 20.0
SETTLED = 0.2
"""Seconds after the last step of an end in which a worker that does nothing more has done nothing more."""


def audited(path: Path, **settings: object) -> Mapping[str, str]:
    """Return the environment of a service whose audit log is `path`."""
    return {"EXECGATE_AUDIT_FILE": str(path), **{f"EXECGATE_AUDIT_{name}": str(settings[name]) for name in settings}}


def entries(*files: Path) -> list[dict[str, Any]]:
    """Return all entries; what is torn is none."""
    found = []
    for line in b"".join(file.read_bytes() for file in files).splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def rotated(path: Path) -> list[Path]:
    """Return a log and the files that it was before, the oldest first."""
    older = [one for one in path.parent.glob(f"{path.name}.*") if one.suffix[1:].isdigit()]
    return [*sorted(older, key=lambda one: -int(one.suffix[1:])), path]


def assert_whole(*files: Path) -> str:
    """Verify a log as its reader does; return what is said."""
    said = run_program([execgate_program(), "audit", "verify", *files])
    assert "the chain is whole" in said
    return said


def events_of(session: str, found: Sequence[Mapping[str, Any]]) -> list[str]:
    return [entry["event"] for entry in found if entry.get("session") == session]


def run(api: RawApi, container: TestContainer, *cmd: str, **fields: Any) -> Mapping[str, Any]:
    answer = api.call("POST", f"/containers/{container.id}/exec/run", {"Cmd": cmd, **fields})
    assert answer.status == 200, answer
    found: Mapping[str, Any] = answer.json
    return found


def test_a_session(new_service: NewService, container: TestContainer, tmp_path: Path) -> None:
    """Each step once, with what matters and nobody's secrets; on the disk before it ran."""
    path = tmp_path / "audit.log"
    service = new_service(env=audited(path, STRICT=True, SYNC=True))
    api = RawApi(service.socket)
    done = run(api, container, "sh", "-c", "cat; echo \x1b[31m; exit 7", Stdin="s3cret", Env=["TOKEN=hunter2"])
    found = [entry for entry in entries(path) if entry.get("session") == done["Id"]]
    assert [entry["event"] for entry in found] == ["created", "start", "running", "exit"]
    created, _, running, end = found
    assert (created["container_id"], created["env"]) == (container.id, ["TOKEN"])
    assert running["pid"] > 1
    assert (end["code"], end["source"], end["stdin_bytes"], end["stdout_bytes"]) == (7, "sync-pipe", 6, 12)
    data = path.read_bytes()
    assert not [one for one in (b"hunter2", b"s3cret", b"\x1b") if one in data]
    service.stop()
    assert entries(path)[-1]["event"] == "closed"
    assert_whole(path)


def test_what_is_asked_of_a_session(new_service: NewService, runc_container: TestContainer, tmp_path: Path) -> None:
    """By whom: the gate tells it, before it is done."""
    path = tmp_path / "audit.log"
    service = new_service(env=audited(path))
    api = RawApi(service.socket)
    session = api.create(runc_container.id, "sleep", "100", OnDisconnect="keep")
    assert api.start_detached(session).status == 200
    with api.reattach(session):
        assert api.call("POST", f"/exec/{session}/kill?signal=CONT").status == 204
    assert api.call("POST", f"/exec/{session}/stop?t=0").status == 204
    assert api.call("DELETE", f"/exec/{session}").status == 204
    found = entries(path)
    (allowed,) = [entry for entry in found if entry["event"] == "allowed"]
    assert (allowed["who"], allowed["peer_uid"], allowed["container_id"]) == ("unix:0", 0, runc_container.id)
    asked = ["attach", "signal", "stop", "exit", "remove"]
    assert events_of(session, found) == ["created", "start", "running", *asked]
    assert {entry["who"] for entry in found if "session" in entry} == {"unix:0"}
    assert [entry["signal"] for entry in found if entry["event"] == "signal"] == ["SIGCONT"]


# -- killed


@pytest.mark.soak
def test_killed_at_any_step(new_service: NewService, runc_container: TestContainer, tmp_path: Path) -> None:
    """Before each write of a session's life, to the log or to its record: the next service tells what is left."""
    path = tmp_path / "audit.log"
    service = new_service(env=audited(path, STRICT=True))
    api = RawApi(service.socket)
    with steps_taken(service.pid) as steps:
        whole = api.create(runc_container.id, "true")
        assert api.start_detached(whole).status == 200
        api.wait_stopped(whole)
        time.sleep(SETTLED)
    steps = [step for step in steps if step.call in ("write", "pwrite64")]
    killed, started, told_twice = 0, 0, 0
    for step in steps:
        with contextlib.closing(Descriptor(os.pidfd_open(service.pid))) as worker:
            session = ""
            with killed_at(service.pid, step), contextlib.suppress(OSError, EOFError, AssertionError):
                session = api.create(runc_container.id, "true")
                api.start_detached(session)
                api.wait_stopped(session, timeout=SETTLED)
            if select.select([worker.fileno()], [], [], SETTLED)[0]:
                killed += 1
                service.await_ready()
        if not session:
            continue
        if api.inspect(session)["Pid"] or api.inspect(session)["ExitCode"] is not None:
            api.wait_stopped(session)
            told = Counter(events_of(session, entries(path)))
            assert told["created"] >= 1
            assert told["start"] >= 1
            assert told["exit"] >= 1, (step, told)
            started += 1
            told_twice += told["exit"] > 1
    print(f"{killed} of {len(steps)} killed, {started} had been started, {told_twice} ends told twice")
    assert len(steps) >= 20
    assert killed > len(steps) // 2
    assert started > 5
    assert told_twice, "an end is told before it is on record"
    assert_whole(path)


@pytest.mark.soak
def test_killed_under_load(new_service: NewService, runc_container: TestContainer, tmp_path: Path) -> None:
    """Twenty times, whatever it is about: who ran has a start and an end, and who has a start has an end, or never ran.

    A start without an end is that of a service which died before it was on record: the session can still be started.
    """
    path = tmp_path / "audit.log"
    service = new_service(env=audited(path, STRICT=True, MAX_BYTES=65536, KEEP=1000))
    api = RawApi(service.socket)
    marks = runc_container.rootfs / "tmp/audited"
    marks.write_bytes(b"")
    with _clients(api, runc_container):
        for _ in range(20):
            time.sleep(random.uniform(0.05, 0.4))  # they are somewhere in the midst, wherever that is
            service.crash()
    _await_ends(api)
    ran = set(marks.read_text().split())
    marks.unlink()
    found = entries(*rotated(path))
    by_session: dict[str, Counter[str]] = {}
    for entry in found:
        if "session" in entry:
            by_session.setdefault(entry["session"], Counter())[entry["event"]] += 1
    names = {entry["session"]: entry["argv"][-1] for entry in found if entry["event"] == "created"}
    for session, told in by_session.items():
        assert told["created"], told
        if names[session] in ran:
            assert told["start"], told
            assert told["exit"], told
        elif told["start"] and not told["exit"]:
            assert api.inspect(session)["ExitCode"] is None
    assert ran <= set(names.values()), "there is one that nobody has told of"
    assert len(ran) > 20
    said = assert_whole(path)
    assert Counter(entry["event"] for entry in found)["opened"] == 21, said


@contextlib.contextmanager
def _clients(api: RawApi, container: TestContainer) -> Iterator[None]:
    """Start sessions from four sides, each of which leaves its name in the container."""
    over = threading.Event()

    def client(name: int) -> None:
        number = 0
        while not over.is_set():
            number += 1
            with contextlib.suppress(OSError, EOFError, AssertionError):  # the service dies, and its answer with it
                session = api.create(container.id, "sh", "-c", "echo $0 >>/tmp/audited; sleep 0.1", f"{name}.{number}")
                api.start_detached(session)

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, name) for name in range(4)]
        try:
            yield
        finally:
            over.set()
        for one in clients:
            one.result()


def _await_ends(api: RawApi) -> None:
    deadline = time.monotonic() + SOON
    while any(one["Running"] for one in api.call("GET", "/exec/json").json):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("who", ["keeper", "keeper and worker"])
def test_the_keeper_is_killed(new_service: NewService, runc_container: TestContainer, tmp_path: Path, who: str) -> None:
    """Alone, and its worker hands over to the next service; or with it, and ends that nobody saw are told later."""
    path = tmp_path / "audit.log"
    service = new_service(env=audited(path))
    api = RawApi(service.socket)
    session = api.create(runc_container.id, "sleep", "0.2")
    assert api.start_detached(session).status == 200
    if who == "keeper":
        service.process.kill()
        service.process.wait()
    else:
        service.kill()
    service = new_service(service.directory, env=audited(path))
    assert RawApi(service.socket).wait_stopped(session)["ExitCode"] == 0
    assert events_of(session, entries(path)) == ["created", "start", "running", "exit"]
    assert_whole(path)


# -- reloads and rotations


def test_reloads_and_rotations_under_load(
    new_service: NewService, runc_container: TestContainer, tmp_path: Path
) -> None:
    """Every session has each of its lines once: a reload repeats nothing, and loses nothing."""
    path = tmp_path / "audit.log"
    service = new_service(env=audited(path, STRICT=True, MAX_BYTES=16384, KEEP=1000))
    api = RawApi(service.socket)
    over = threading.Event()

    def client() -> list[str]:
        done = []
        while not over.is_set():
            done.append(run(api, runc_container, "sh", "-c", "sleep 0.05; exit 3")["Id"])
        return done

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client) for _ in range(4)]
        try:
            for _ in range(6):
                time.sleep(0.5)
                service.reload()
        finally:
            over.set()
        sessions = [session for one in clients for session in one.result()]
    files = rotated(path)
    found = entries(*files)
    assert len(files) > 3
    assert all(file.stat().st_size <= 16384 for file in files)
    for session in sessions:
        assert events_of(session, found) == ["created", "start", "running", "exit"]
    assert Counter(entry["event"] for entry in found)["opened"] == 7
    assert_whole(path)
    service.assert_clean_log()


def test_moved_away(new_service: NewService, runc_container: TestContainer, tmp_path: Path) -> None:
    """By logrotate, with a reload behind it, with a crash, with nothing at all."""
    path = tmp_path / "audit.log"
    service = new_service(env=audited(path, MAX_BYTES=0))
    api = RawApi(service.socket)
    moved: list[Path] = []
    for what in (service.reload, service.crash, lambda: None):
        run(api, runc_container, "true")
        moved.append(path.rename(tmp_path / f"audit.log-{len(moved)}"))
        what()
    run(api, runc_container, "true")
    said = assert_whole(*moved, path)
    assert "seq 1 to" in said
    assert [entry["event"] for entry in entries(path)] == ["allowed", "created", "start", "running", "exit"]


# -- no room


@pytest.fixture
def small_disk(host_dir: Path) -> Iterator[Path]:
    """A file system of its own for the log, with room for a few hundred entries."""
    directory = host_dir / "small-log"
    directory.mkdir()
    run_program(["mount", "-t", "tmpfs", "-o", "size=256k,mode=0700", "tmpfs", directory])
    yield directory
    run_program(["umount", "--lazy", directory])
    directory.rmdir()


def _fill(directory: Path) -> Path:
    """Leave no page; return the file to remove."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return ballast


def test_no_room_and_strict(small_disk: Path, watched_service: WatchedServices, runc_container: TestContainer) -> None:
    """Nothing is created, nothing runs, what runs goes on; and all is well once there is room."""
    path = small_disk / "audit.log"
    service = watched_service(env=audited(path, STRICT=True))
    api = RawApi(service.socket)
    marks = runc_container.rootfs / "tmp/unwitnessed"
    marks.unlink(missing_ok=True)
    before = footprint(service)
    running = api.create(runc_container.id, "cat", AttachStdin=True, AttachStdout=True, OnDisconnect="keep")
    assert api.start_detached(running).status == 200
    sessions = [
        api.create(runc_container.id, "sh", "-c", "echo $0 >>/tmp/unwitnessed", f"{number}") for number in range(20)
    ]
    ballast = _fill(small_disk)
    answers = [api.start_detached(session) for session in sessions]
    refused = [session for session, answer in zip(sessions, answers, strict=True) if answer.status == 503]
    assert len(refused) > 5, "the file's last page has room for some"
    assert {answer.status for answer in answers} <= {200, 503}
    assert "the audit log cannot be written" in answers[-1].json["message"]
    created = api.call("POST", f"/containers/{runc_container.id}/exec", {"Cmd": ["true"]})
    assert created.status == 503, created
    assert api.call("POST", f"/exec/{running}/kill").status == 503
    assert api.inspect(running)["Running"]
    for session in sessions:
        if session not in refused:
            api.wait_stopped(session)
    assert [api.inspect(session)["ExitCode"] for session in refused] == [None] * len(refused)
    assert len(marks.read_text().split()) == len(sessions) - len(refused)
    assert len(service_monitors(service)) == 2, "the bystander's and that of `cat`"
    ballast.unlink()
    for session in refused:
        assert api.start_detached(session).status == 200
        api.wait_stopped(session)
    assert sorted(map(int, marks.read_text().split())) == list(range(20))
    marks.unlink()
    api.call("POST", f"/exec/{running}/kill")
    api.wait_stopped(running)
    found = entries(path)
    for session in sessions:
        assert events_of(session, found)[:2] == ["created", "start"]
    told = sum(entry.get("session") in (running, *sessions) for entry in found)
    lost = sum(entry["lines"] for entry in found if entry["event"] == "lost")
    assert told + lost == 4 * 21 + 1, "ends cannot be refused, and are counted"
    assert_whole(path)
    assert_no_leaks(service, before)
    assert service.log().count("the audit log is not written") == 1
    assert service.log().count("the audit log is written again") == 1


def service_monitors(service: Service) -> frozenset[int]:
    """Return the monitors of a service, once those are gone that were begun for starts which may not be."""
    deadline = time.monotonic() + SOON
    while len(found := footprint(service).monitors) > 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def test_no_room_and_not_strict(new_service: NewService, small_disk: Path, runc_container: TestContainer) -> None:
    """Everything goes on, over a crash and a reload, and the log says how much it lacks."""
    path = small_disk / "audit.log"
    service = new_service(env=audited(path))
    api = RawApi(service.socket)
    ballast = _fill(small_disk)
    for end in (service.crash, service.reload, lambda: None):
        for _ in range(10):
            run(api, runc_container, "true")
        end()
    written = sum("container_id" in entry for entry in entries(path))
    ballast.unlink()
    run(api, runc_container, "true")
    lost = sum(entry["lines"] for entry in entries(path) if entry["event"] == "lost")
    # What the other workers have said of themselves is lost too; a step of which one died may be told by the next.
    assert 150 - written <= lost <= 150 - written + 4
    assert "could not be written" in assert_whole(path)
    service.assert_clean_log()


# -- who else


def test_a_second_service_on_the_same_log(new_service: NewService, tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    new_service(env=audited(path))
    with pytest.raises(HostError, match="belongs to another running execgate"):
        new_service(env=audited(path))
    assert_whole(path)


def test_a_log_that_can_never_be_written(new_service: NewService, tmp_path: Path) -> None:
    """It is told before anything else; a reload with it leaves the service as it was."""
    with pytest.raises(HostError, match="cannot be written: Is a directory"):
        new_service(env=audited(tmp_path))
    service = new_service()
    config = service.directory / "execgate.toml"
    config.write_text(f"audit_file = {json.dumps(str(tmp_path))}\n" + config.read_text())
    service.process.send_signal(1)
    service.await_ready()
    assert "the reload failed" in service.log()
    assert RawApi(service.socket).call("GET", "/_ping").status == 200


def test_stdout(new_service: NewService, runc_container: TestContainer, tmp_path: Path) -> None:
    """As journald gets it, among the lines of the service's own log: one chain, over a crash and a reload."""
    service = new_service(env={"EXECGATE_AUDIT_STDOUT": "true"})
    api = RawApi(service.socket)
    for end in (service.crash, service.reload, lambda: None):
        run(api, runc_container, "true")
        end()
    lines = [line for line in service.log().splitlines() if line.startswith('{"seq":')]
    extract = tmp_path / "extract"
    extract.write_text("\n".join(lines) + "\n")
    assert "seq 1 to" in assert_whole(extract)
    assert Counter(entry["event"] for entry in entries(extract))["exit"] == 3
    assert cli.main(["audit", "show", str(extract)]) == 0
