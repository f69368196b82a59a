"""Rows 20 and 22 of the fault matrix: a number that was a session's process is somebody else's now, who is never hit.

The numbers are used again for real: by another process that the kernel gives the same pid, and, of another boot, by one
that even has the same start time.
"""

import contextlib
import os
import select
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from execgate.containers import proc
from execgate.model.process import ProcessIdentity
from support.api import RawApi
from support.faults import fifo
from support.programs import find_program
from support.raw import request_bytes
from support.runtimes import TestContainer
from support.service import Service
from support.unharmed import Watched

NewService = Callable[..., Service]
KeepUnharmed = Callable[..., AbstractContextManager[Watched]]

SOON = 20.0
LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
"""What the next process gets is one more than this: pid_namespaces(7)."""


@contextlib.contextmanager
def stranger(pid: int = 0) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a process that has nothing to do with any session, with the pid `pid` if that is given, and is free."""
    deadline = time.monotonic() + SOON
    while True:
        if pid:
            LAST_PID.write_text(str(pid - 1))
        with subprocess.Popen(["sleep", "1000"]) as process:
            try:
                if pid in (0, process.pid):
                    yield process
                    return
                # Another process was faster; there are always some on a host.
                assert time.monotonic() < deadline, f"pid {pid} cannot be had again"
            finally:
                process.kill()


def _end_and_wait(end: Callable[[], None], pid: int) -> None:
    """Return when a process that is told to end has given its pid back."""
    pidfd = os.pidfd_open(pid)
    end()
    assert select.select([pidfd], [], [], SOON)[0]
    os.close(pidfd)
    deadline = time.monotonic() + SOON
    while proc.start_time(pid) is not None:  # until its conmon has taken the exit code
        assert time.monotonic() < deadline
        time.sleep(0.002)


# -- row 22: a pid is used again


def test_a_pid_that_is_used_again_while_nobody_serves(
    new_service: NewService, runc_container: TestContainer, keep_unharmed: KeepUnharmed
) -> None:
    """The next service finds a living process of that number, with a time limit that is over, and lets it be."""
    service = new_service()
    api = RawApi(service.socket)
    with keep_unharmed(service, runc_container, dies="service") as watched, fifo(runc_container, "end") as end:
        session = api.create(runc_container.id, "sh", "-c", "read x < /tmp/end; exit 5", Timeout=1)
        assert api.start_detached(session).status == 200
        pid = api.inspect(session)["Pid"]
        service.kill()
        _end_and_wait(end, pid)
        with stranger(pid) as other:
            watched.service = new_service(service.directory)
            ended = api.wait_stopped(session)
            assert (ended["ExitCode"], ended["Pid"]) == (5, 0)
            for path in ("kill", "kill?signal=TERM", "stop"):
                assert api.call("POST", f"/exec/{session}/{path}").status == 409
            assert api.call("DELETE", f"/exec/{session}?force=true").status in (200, 204)
            time.sleep(1.5)  # its time is over by now, twice
            assert other.poll() is None, "another process was hit"


def test_a_pid_that_is_used_again_under_a_busy_service(
    new_service: NewService, runc_container: TestContainer, keep_unharmed: KeepUnharmed
) -> None:
    """The worker has not heard of the end yet, and meets the end, the time limit and three kills all at once."""
    service = new_service()
    api = RawApi(service.socket)
    with (
        keep_unharmed(service, runc_container),
        fifo(runc_container, "end") as end,
        contextlib.ExitStack() as connections,
    ):
        session = api.create(runc_container.id, "sh", "-c", "read x < /tmp/end; exit 5", Timeout=1)
        assert api.start_detached(session).status == 200
        pid, worker = api.inspect(session)["Pid"], service.pid
        asking = {path: connections.enter_context(api.connect()) for path in ("kill?signal=TERM", "stop?t=1", "kill")}
        for connection in asking.values():
            assert connection.request("GET", "/_ping").status == 200
        os.kill(worker, signal.SIGSTOP)
        try:
            _end_and_wait(end, pid)
            with stranger(pid) as other:
                for path, connection in asking.items():
                    connection.send(request_bytes("POST", f"/exec/{session}/{path}"))
                time.sleep(1.2)  # the time limit
                os.kill(worker, signal.SIGCONT)
                assert {connection.read_answer().status for connection in asking.values()} <= {200, 204, 409}
                ended = api.wait_stopped(session)
                assert ended["ExitCode"] == 5, ended
                assert other.poll() is None, "another process was hit"
        finally:
            os.kill(worker, signal.SIGCONT)


# -- row 20: records of another boot


def test_records_of_another_boot(
    new_service: NewService, runc_container: TestContainer, keep_unharmed: KeepUnharmed, host_dir: Path
) -> None:
    """All that they name lives, by pid and start time, with its time over: it is unknown, and nobody is hit."""
    soon = {"EXECGATE_RETENTION_SECONDS": "1"}
    first = new_service(env=soon)
    api = RawApi(first.socket)
    with fifo(runc_container, "plain") as end_plain, fifo(runc_container, "terminal") as end_terminal:
        plain, terminal = (
            api.create(runc_container.id, "sh", "-c", f"read x < /tmp/{name}", Timeout=2, Tty=name == "terminal")
            for name in ("plain", "terminal")
        )
        waiting = api.create(runc_container.id, "true")
        for one in (plain, terminal):
            assert api.call("POST", f"/exec/{one}/start", {"Detach": True, "Tty": one == terminal}).status == 200
        found = [ProcessIdentity(pid, proc.start_time(pid) or 0) for pid in _pids(api, plain, terminal)]
        first.kill()
        second = new_service(first.directory, env=soon, wrapper=_in_another_boot(host_dir))
        api = RawApi(second.socket)
        with keep_unharmed(second, runc_container):
            for one in (plain, terminal, waiting):
                assert api.call("GET", f"/exec/{one}/json").status == 404
                assert api.call("POST", f"/exec/{one}/kill").status == 404
            time.sleep(2)  # their time is over by now, and a sweep was here
            assert all(map(proc.is_alive, found)), "a process was hit"
        end_plain()
        end_terminal()
        _await_none(second.state_dir / "sessions")


def _pids(api: RawApi, *sessions: str) -> list[int]:
    return [int(api.inspect(one)["Pid"]) for one in sessions]


def _in_another_boot(directory: Path) -> list[str]:
    """Return what runs a program so that it sees the id of another boot."""
    boot_id = directory / "another-boot"
    boot_id.write_text(f"{uuid.uuid4()}\n")
    script = f'mount --bind {boot_id} /proc/sys/kernel/random/boot_id && exec "$@"'
    return [str(find_program("unshare")), "--mount", "sh", "-c", script, "sh"]


def _await_none(directory: Path) -> None:
    deadline = time.monotonic() + SOON
    while left := list(directory.iterdir()):  # until the next sweep
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.02)
