"""The service's own life: its end, its second life on the same directory, its sockets, its service manager."""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.api import OUTPUT, RawApi, start_bytes
from support.errors import HostError
from support.faults import faulty_runtime
from support.notify import NotifySocket
from support.runtimes import RuntimeHost, TestContainer
from support.service import Service, execgate_program, write_config
from support.unharmed import WatchedServices

NewService = Callable[..., Service]


def test_stops_within_seconds_and_the_processes_live_on(
    new_service: NewService, container: TestContainer, host_dir: Path
) -> None:
    """Clients of every kind hang on; a second life shows the sessions running, then stopped with the right code."""
    service = new_service()
    api = RawApi(service.socket)
    (container.rootfs / "tmp/end").unlink(missing_ok=True)
    script = "while [ ! -e /tmp/end ]; do sleep 0.05; done; exit 6"
    detached = api.create(container.id, "sh", "-c", script)
    assert api.start_detached(detached).status == 200
    with (
        api.open(container.id, "sh", "-c", script, stdin=True) as attached,
        api.open(container.id, "sh", "-c", f"trap '' HUP; {script}", stdin=True, tty=True) as terminal,
        api.connect() as events,
        api.connect() as idle,
        api.connect() as half,
    ):
        events.send(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
        assert events.read_head().status == 200
        assert idle.request("GET", "/_ping").status == 200
        half.send(b"POST /containers/x/exec HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
        running = [detached, attached.id, terminal.id]
        pids = [api.inspect(one)["Pid"] for one in running]
        begun = time.monotonic()
        service.stop()
        assert time.monotonic() - begun < 5
        for connection in (attached.connection, terminal.connection, events, idle, half):
            connection.read_until_closed()
    for pid in pids:
        os.kill(pid, 0)
    second = new_service(service.directory)
    api = RawApi(second.socket)
    assert [api.inspect(one)["Running"] for one in running] == [True] * 3
    assert api.start_detached(detached).status == 409
    (container.rootfs / "tmp/end").touch()
    assert [api.wait_stopped(one)["ExitCode"] for one in running] == [6, 6, 6]
    second.stop()
    assert not list((second.state_dir / "sessions").iterdir())


def test_killed_and_back(watched_service: WatchedServices, container: TestContainer) -> None:
    """SIGKILL instead of SIGTERM; one session ends while no service is there."""
    service = watched_service(dies="service")
    api = RawApi(service.socket)
    early = api.create(container.id, "sh", "-c", "sleep 0.3; exit 11")
    late = api.create(container.id, "sh", "-c", "sleep 1.5; exit 12")
    never = api.create(container.id, "true", **OUTPUT)
    for one in (early, late):
        assert api.start_detached(one).status == 200
    pid = api.inspect(early)["Pid"]
    service.kill()
    pidfd = os.pidfd_open(pid)
    try:
        _wait_readable(pidfd)  # conmon saw it end; the exit file is all that is left to tell
    finally:
        os.close(pidfd)
    second = watched_service.again(service)
    api = RawApi(second.socket)
    assert api.wait_stopped(early)["ExitCode"] == 11
    assert api.wait_stopped(late)["ExitCode"] == 12
    assert api.start_detached(never).status == 200
    assert api.wait_stopped(never)["ExitCode"] == 0


def _wait_readable(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(10_000)


def test_a_second_signal_ends_it_at_once(new_service: NewService) -> None:
    service = new_service()
    service.process.send_signal(signal.SIGTERM)
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(5) in (0, -signal.SIGTERM)
    service.kill()


def test_sigint_is_an_end_too(new_service: NewService) -> None:
    service = new_service()
    service.process.send_signal(signal.SIGINT)
    service.stop()


def test_a_stale_socket_is_replaced(new_service: NewService, host_dir: Path) -> None:
    first = new_service()
    first.kill()
    assert first.socket.is_socket()
    second = new_service(first.directory)
    assert RawApi(second.socket).call("GET", "/_ping").status == 200


def test_a_live_socket_is_respected(new_service: NewService, host_dir: Path) -> None:
    first = new_service()
    with pytest.raises(HostError, match=r"served by another process|in use"):
        new_service(flags=[f"--listen=unix://{first.socket}"])
    assert RawApi(first.socket).call("GET", "/_ping").status == 200


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
def test_what_is_no_socket_is_left_alone(new_service: NewService, host_dir: Path, kind: str) -> None:
    path = host_dir / f"in-the-way-{kind.replace(' ', '-')}"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(host_dir / "nowhere")
    with pytest.raises(HostError, match="is no socket") as failure:
        new_service(flags=[f"--listen=unix://{path}"])
    assert "Traceback" not in str(failure.value)
    assert os.path.lexists(path)


def test_one_state_directory_one_service(new_service: NewService, host_dir: Path) -> None:
    first = new_service()
    with pytest.raises(HostError, match="belongs to another running execgate") as failure:
        new_service(flags=[f"--state-dir={first.state_dir}"])
    assert "Traceback" not in str(failure.value)


def test_no_service_without_the_power_to_take_powers_away(new_service: NewService) -> None:
    """A runtime that cannot drop capabilities fails with a strange error today, and handed all of them on in 2022."""
    without = ("setpriv", "--inh-caps=-setpcap", "--bounding-set=-setpcap")
    with pytest.raises(HostError, match="CAP_SETPCAP is missing") as failure:
        new_service(wrapper=without)
    assert "CapabilityBoundingSet" in str(failure.value)


def test_the_socket_is_private(new_service: NewService) -> None:
    service = new_service(flags=["--socket-mode=0600"])
    assert service.socket.stat().st_mode & 0o777 == 0o600
    assert service.state_dir.stat().st_mode & 0o777 == 0o700
    assert (service.state_dir / "sessions.db").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "database",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"not a database" * 100, id="garbage"),
        pytest.param(b"SQLite format 3\0" + b"\0" * 5000, id="zeros"),
    ],
)
def test_a_broken_database_is_no_end(new_service: NewService, host_dir: Path, database: bytes) -> None:
    """Row 19: the service starts, and says nothing of tracebacks."""
    first = new_service()
    first.stop()
    for old in first.state_dir.glob("sessions.db*"):
        old.unlink()
    (first.state_dir / "sessions.db").write_bytes(database)
    second = new_service(first.directory)
    assert RawApi(second.socket).call("GET", "/_ping").status == 200


@pytest.mark.parametrize("damage", [b"not a database" * 400, b"\0" * 4096], ids=["garbage", "zeros"])
def test_a_broken_database_loses_no_session_that_runs(
    watched_service: WatchedServices, runc_container: TestContainer, damage: bytes
) -> None:
    """Row 19: what runs is known from its directory. Captured output and exit codes are as if nothing had happened."""
    first = watched_service(dies="service")
    api = RawApi(first.socket)
    script = "echo begun; until [ -e /tmp/go-on ]; do sleep 0.05; done; echo ended; exit 6"
    (runc_container.rootfs / "tmp/go-on").unlink(missing_ok=True)
    labels = {"job": "one"}
    plain = api.create(runc_container.id, "sh", "-c", script, CaptureStdout=True, Labels=labels)
    terminal = api.create(runc_container.id, "sh", "-c", script, Tty=True)
    for one in (plain, terminal):
        assert api.call("POST", f"/exec/{one}/start", {"Detach": True}).status == 200
    pids = {one: api.inspect(one)["Pid"] for one in (plain, terminal)}
    first.kill()
    for rest in first.state_dir.glob("sessions.db-*"):
        rest.unlink()
    (first.state_dir / "sessions.db").write_bytes(damage)
    second = watched_service.again(first)
    api = RawApi(second.socket)
    for one in (plain, terminal):
        inspected = api.inspect(one)
        assert (inspected["Running"], inspected["Pid"]) == (True, pids[one])
    assert api.inspect(plain)["Labels"] == labels
    (runc_container.rootfs / "tmp/go-on").touch()
    for one in (plain, terminal):
        assert api.call("POST", f"/exec/{one}/wait").json["StatusCode"] == 6
    frames = (b"\1\0\0\0\0\0\0\6" + text for text in (b"begun\n", b"ended\n"))
    assert api.call("GET", f"/exec/{plain}/logs").body == b"".join(frames)
    assert (first.state_dir / "sessions.broken").read_bytes() == damage
    assert "3 sessions are taken over" in second.log(), "these, and the bystander"


def test_what_the_service_ignores_its_processes_do_not(new_service: NewService, runc_container: TestContainer) -> None:
    """A shell starts what it puts in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        service = new_service()
    finally:
        signal.signal(signal.SIGINT, before)
    body = {"Cmd": ["grep", "SigIgn", "/proc/self/status"]}
    answer = RawApi(service.socket).call("POST", f"/containers/{runc_container.id}/exec/run", body)
    ignored = int(answer.json["Stdout"].split()[1], 16)
    glibcs_own = 3 << 31  # 32 and 33: posix_spawn(3) leaves them so
    assert ignored & ~glibcs_own == 0


# -- systemd

_ACTIVATE = """
import os, sys
os.dup2({fd}, 3) if {fd} != 3 else os.set_inheritable(3, True)
os.set_inheritable(3, True)
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = "{count}"
os.environ["LISTEN_FDNAMES"] = "execgate.socket"
os.execv(sys.argv[1], sys.argv[1:])
"""


def _activated(
    directory: Path, hosts: list[RuntimeHost], listener: int, *, count: str = "1", event_loop: str = "auto"
) -> "tuple[subprocess.Popen[bytes], NotifySocket]":
    directory.mkdir(exist_ok=True)
    notify = NotifySocket(directory / "notify")
    code = _ACTIVATE.format(fd=listener, count=count)
    argv = [
        sys.executable,
        "-c",
        code,
        str(execgate_program()),
        "serve",
        "--config",
        str(write_config(directory, hosts)),
    ]
    with (directory / "service.log").open("ab") as log:
        environment = {"PATH": os.environ["PATH"], "NOTIFY_SOCKET": str(notify.path), "EXECGATE_EVENT_LOOP": event_loop}
        process = subprocess.Popen(argv, stdout=log, stderr=log, env=environment, pass_fds=[listener])
    return process, notify


def test_socket_activation(
    hosts: list[RuntimeHost], runc_container: TestContainer, host_dir: Path, event_loop_name: str
) -> None:
    """The socket is systemd's: it is served, clients that came before the service too, and it stays when it goes."""
    directory = host_dir / "activated"
    path = host_dir / "activated.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        api = RawApi(path)
        early = api.connect()
        early.send(b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n")
        process, notify = _activated(directory, hosts, listener.fileno(), event_loop=event_loop_name)
        try:
            notify.wait_for("READY=1", process, timeout=15)
            assert early.read_answer().body == b"OK"
            assert not (directory / "execgate.sock").exists(), "it listens where it was not told to"
            with api.open(runc_container.id, "sh", "-c", "env; ls -l /proc/self/fd") as session:
                stdout, _ = session.finish()
            assert b"LISTEN_" not in stdout
            assert b"NOTIFY_SOCKET" not in stdout
            process.send_signal(signal.SIGTERM)
            notify.wait_for("STOPPING=1", process, timeout=5)
            assert process.wait(5) == 0
        finally:
            process.kill()
            process.wait()
            notify.close()
            early.close()
        assert path.is_socket(), "the socket file is systemd's"
        log = (directory / "service.log").read_text()
        assert "Traceback" not in log, log
        second, notify = _activated(directory, hosts, listener.fileno(), event_loop=event_loop_name)
        try:
            notify.wait_for("READY=1", second, timeout=15)
            assert api.call("GET", "/_ping").body == b"OK"
        finally:
            second.terminate()  # to kill the keeper would leave its worker
            assert second.wait(10) == 0
            notify.close()


def _end_of(
    directory: Path, process: "subprocess.Popen[bytes]", notify: NotifySocket, *, serves: bool
) -> tuple[int, str]:
    """Return the exit code and the log of an activated service, of one that serves after TERM; it has no traceback."""
    try:
        if serves:
            notify.wait_for("READY=1", process, timeout=15)
            process.send_signal(signal.SIGTERM)
        code = process.wait(15)
    finally:
        process.kill()
        process.wait()
        notify.close()
    log = (directory / "service.log").read_text()
    assert "Traceback" not in log, log
    return code, log


@pytest.mark.parametrize(("host", "serves"), [("127.0.0.1", True), ("0.0.0.0", False)])
def test_socket_activation_without_tls_is_for_this_host_alone(
    hosts: list[RuntimeHost], host_dir: Path, host: str, serves: bool
) -> None:
    """Tokens in plain text are not for a network, whoever has opened the socket."""
    directory = host_dir / f"activated-{host}"
    with socket.create_server((host, 0)) as listener:
        process, notify = _activated(directory, hosts, listener.fileno())
        code, log = _end_of(directory, process, notify, serves=serves)
    assert (code == 0) is serves
    assert ("loopback" in log) is not serves, log


@pytest.mark.parametrize("count", ["1", "2", "99", "²"])
def test_socket_activation_with_something_else(hosts: list[RuntimeHost], host_dir: Path, count: str) -> None:
    """A descriptor that is no socket, or none at all: an error in words, or none, and no traceback."""
    directory = host_dir / f"misactivated-{ord(count[0])}-{len(count)}"
    with open(os.devnull) as null:
        process, notify = _activated(directory, hosts, null.fileno(), count=count)
        code, log = _end_of(directory, process, notify, serves=count == "²")
    assert code == (0 if count == "²" else 1), log
    assert count == "²" or "execgate:" in log


def test_stop_while_a_start_is_under_way(
    new_service: NewService, runc: RuntimeHost, runc_container: TestContainer, host_dir: Path
) -> None:
    """The runtime is slow, the service stops: it does not wait, and its second life knows what became of it."""
    slow = faulty_runtime(runc, host_dir / "slow", "runc", 'sleep 1; exec "$REAL" "$@"')
    service = new_service(flags=[f"--runtime=runc={slow.program}"])
    api = RawApi(service.socket)
    exec_id = api.create(runc_container.id, "sh", "-c", "sleep 1; exit 8")
    attached_id = api.create_attached(runc_container.id, "sh", "-c", "sleep 1; exit 8")
    with api.connect() as detached, api.connect() as attached:
        detached.send(start_bytes(exec_id, Detach=True))
        attached.send(start_bytes(attached_id))
        assert attached.read_head().status == 101
        begun = time.monotonic()
        service.stop()
        assert time.monotonic() - begun < 5
        attached.read_until_closed()
        detached.read_until_closed()
    second = new_service(service.directory, flags=[f"--runtime=runc={slow.program}"])
    api = RawApi(second.socket)
    for one in (exec_id, attached_id):
        # It was let go on, or ended: but not "255 unknown" while the process still runs, and nothing made up.
        inspected = api.wait_stopped(one)
        assert inspected["ExitCode"] in (8, 128, 255), inspected
    deadline = time.monotonic() + 5
    left = (["sleep", "1"], ["sh", "-c", "sleep 1; exit 8"])
    while any(argv in left for argv in runc_container.processes().values()):
        assert api.inspect(exec_id)["Running"] or api.inspect(attached_id)["Running"], (
            "a process runs that nobody knows of"
        )
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second.stop()
    assert not list((second.state_dir / "sessions").iterdir())


def test_what_a_service_starts_has_the_usual_priority(new_service: NewService, container: TestContainer) -> None:
    """Although the service itself comes first, where it may."""
    service = new_service()
    policy_and_nice = "cut -d' ' -f19,41 /proc/self/stat"
    result = RawApi(service.socket).pipe(container.id, "sh", "-c", policy_and_nice)
    assert result.stdout == b"0 0\n", result
    assert os.getpriority(os.PRIO_PROCESS, service.pid) in (0, -5)
