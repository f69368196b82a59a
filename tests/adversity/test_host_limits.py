"""Rows 15-18 and 30 of the fault matrix: a host, or a service, that has no more of something.

Each fault is the real thing: the container's own pids cgroup, the service's own limit of descriptors, a state directory
that is a file system of one megabyte. What must hold: a clear error, nothing left behind, and once there is room again
the service works as if nothing had been.
"""

import contextlib
import itertools
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from execgate.containers import cgroups
from support.api import RawApi
from support.leaks import assert_no_leaks, footprint, resident_bytes
from support.programs import run_program
from support.runtimes import TestContainer
from support.service import Service

NewService = Callable[..., Service]


# -- row 15: the container has as many processes as it may have


@pytest.fixture
def no_more_processes(
    new_container: Callable[..., TestContainer],
) -> Iterator[tuple[TestContainer, Callable[[], None]]]:
    """A container whose pids cgroup is full, and what lifts the limit."""
    container = new_container()
    directory = next(_pids_cgroups(container.init_pid), None)
    if directory is None:
        pytest.skip("the container has no cgroup of the pids controller here")
    maximum, deadline = directory / "pids.max", time.monotonic() + 20
    # A shell and its sleep; what made the container is not over yet, and counts.
    while len(container.processes()) < 2 or (directory / "pids.current").read_text() != "2\n":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    maximum.write_text("2")

    def lift() -> None:
        maximum.write_text("max")

    yield container, lift
    lift()


def _pids_cgroups(pid: int) -> Iterator[Path]:
    for controller in ("pids", cgroups.V2):
        path = cgroups.memberships(pid).get(controller, "/")
        cgroup = cgroups.find(controller, path) if path != "/" else None
        if cgroup is not None and os.access(f"{cgroup.directory}/pids.max", os.W_OK):
            yield Path(cgroup.directory)


def test_no_more_processes_in_the_container(
    api: RawApi, no_more_processes: tuple[TestContainer, Callable[[], None]], service: Service, unharmed: None
) -> None:
    container, lift = no_more_processes
    before = footprint(service)
    one = api.create(container.id, "true")
    answer = api.call("POST", f"/exec/{one}/start", {"Detach": True})
    assert answer.status in (400, 500), answer
    assert "message" in answer.json
    assert answer.json["message"].isprintable()
    inspected = api.inspect(one)
    assert not inspected["Running"]
    assert inspected["ExitCode"] in (126, 127, 128), inspected
    assert_no_leaks(service, before)
    lift()
    assert _runs(api, container)


# -- row 16: the service can open no more files


def test_no_more_descriptors(watched_service: NewService, runc_container: TestContainer) -> None:
    """It says so, does not spin, and recovers by itself."""
    service = watched_service()
    api = RawApi(service.socket)
    assert _runs(api, runc_container)
    _await_steady(service)
    before = footprint(service)
    _, hard = resource.prlimit(service.pid, resource.RLIMIT_NOFILE)
    with api.connect() as connection:  # one that is there already: none other is accepted from now on
        assert connection.request("GET", "/_ping").status == 200
        sessions = [api.create(runc_container.id, "true") for _ in range(2)]
        _await_no_monitors(service, sessions)
        used = _await_steady(service)
        unused = itertools.filterfalse(used.__contains__, itertools.count())
        limit = next(itertools.islice(unused, 2, None))  # two are left: a start has pipes to make
        resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (limit, hard))
        try:
            answer = connection.request("POST", f"/exec/{sessions[0]}/start", {"Detach": True})
            assert answer.status == 503, answer
            with contextlib.suppress(OSError):
                spun = _processor_time(service.pid)
                with api.connect():
                    time.sleep(1.0)  # the accept loop has nothing else to do but to fail
                assert _processor_time(service.pid) - spun < 0.5
        finally:
            resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (hard, hard))
    assert api.call("POST", f"/exec/{sessions[0]}/start", {"Detach": True}).status == 200, (
        "it could not be started again"
    )
    assert _runs(api, runc_container)
    assert_no_leaks(service, before)
    assert "Traceback" not in service.log()


def _await_no_monitors(service: Service, sessions: Sequence[str]) -> None:
    """Wait until those that were begun at a create are given up."""
    deadline = time.monotonic() + 20
    while any((service.state_dir / "sessions" / session[:32]).exists() for session in sessions):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _await_steady(service: Service) -> frozenset[int]:
    """Wait until what an exec had open is closed, and return the descriptors that are open.

    This polls: there is no event for a descriptor that another process closes.
    """
    deadline = time.monotonic() + 20
    seen, since = _open_in(service), time.monotonic()
    while time.monotonic() < since + 0.5:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        if (now := _open_in(service)) != seen:
            seen, since = now, time.monotonic()
    return seen


def _open_in(service: Service) -> frozenset[int]:
    return frozenset(map(int, os.listdir(f"/proc/{service.pid}/fd")))


def _processor_time(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- rows 17 and 18: the state directory is full


@pytest.fixture
def small_disk(host_dir: Path) -> Iterator[Path]:
    """A state directory with room for two megabytes; its parent is the service's, log included, with room for all."""
    directory = host_dir / "small/state"
    directory.mkdir(parents=True)
    run_program(["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", directory])
    yield directory
    run_program(["umount", "--lazy", directory])
    directory.rmdir()


def _fill(directory: Path) -> Path:
    """Leave no room; return the file to remove."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (65536, 4096, 512, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
    return ballast


def test_full_before_a_start(small_disk: Path, watched_service: NewService, runc_container: TestContainer) -> None:
    """Row 17: it is refused before anything runs, leaves no residue, and can be started later."""
    service = watched_service(directory=small_disk.parent)
    api = RawApi(service.socket)
    assert _runs(api, runc_container)
    one = api.create(runc_container.id, "true")
    sessions = small_disk / "sessions"
    ballast = _fill(small_disk)
    answer = api.call("POST", f"/exec/{one}/start", {"Detach": True})
    assert answer.status == 503, answer
    assert len(list(sessions.iterdir())) == 1, "there is more than the bystander's"
    refused = api.call("POST", f"/containers/{runc_container.id}/exec", {"Cmd": ["true"]})
    assert refused.status in (201, 503), refused  # a page of the database may have room left
    ballast.unlink()
    assert api.call("POST", f"/exec/{one}/start", {"Detach": True}).status == 200
    assert api.call("POST", f"/exec/{one}/wait").json["StatusCode"] == 0
    assert _runs(api, runc_container)
    assert "Traceback" not in service.log()


def test_full_during_a_run(small_disk: Path, watched_service: NewService, runc_container: TestContainer) -> None:
    """Row 18: conmon can write no exit file; the code is known all the same, and on record once there is room."""
    service = watched_service(directory=small_disk.parent)
    api = RawApi(service.socket)
    with api.open(runc_container.id, "sh", "-c", "echo up; read line; echo $line; exit 7", stdin=True) as session:
        session.connection.read_exactly(len("up\n") + 8)
        ballast = _fill(small_disk)
        session.send(b"on\n")
        assert session.finish() == (b"on\n", b"")
        inspected = api.inspect(session.id)
        assert (inspected["Running"], inspected["ExitCode"]) == (False, 7), inspected
        ballast.unlink()
        assert api.inspect(session.id)["ExitCode"] == 7
    assert _runs(api, runc_container)
    assert "Traceback" not in service.log()


# -- row 30: sessions that nobody starts


@pytest.mark.soak
def test_thousands_that_are_never_started(watched_service: NewService, runc_container: TestContainer) -> None:
    """There is a bound, each costs little, a reload takes them along, and they do not wait for ever."""
    service = watched_service(env={"EXECGATE_RETENTION_SECONDS": "1"})
    api, most = RawApi(service.socket), 5000
    before = resident_bytes(service)
    with api.connect() as connection:
        bodies = [{"Cmd": ["sleep", f"{number}"], "Env": [f"N={number}"]} for number in range(most + 100)]
        target = f"/containers/{runc_container.id}/exec"
        statuses = [connection.request("POST", target, body).status for body in bodies]
    accepted = statuses.count(201)
    assert accepted == most - 1, "as many as a container may have, and the bystander is one of them"
    assert statuses == [201] * accepted + [429] * (len(statuses) - accepted)
    each = (resident_bytes(service) - before) / accepted
    print(f"{each / 1024:.1f} KiB each")
    assert each < 8 * 1024
    config = service.directory / "execgate.toml"
    config.write_text("created_lifetime_seconds = 1\n" + config.read_text())
    service.reload()
    deadline = time.monotonic() + 20
    while api.call("POST", target, {"Cmd": ["true"]}).status != 201:  # until the next sweep
        assert time.monotonic() < deadline, "they are never forgotten"
        time.sleep(0.05)
    assert _runs(api, runc_container)


def _runs(api: RawApi, container: TestContainer) -> bool:
    answer = api.call("POST", f"/containers/{container.id}/exec/run", {"Cmd": ["sh", "-c", "exit 3"]})
    assert answer.status == 200, answer
    return bool(answer.json["ExitCode"] == 3)
