"""The service dies, or is replaced, under living sessions and clients: nothing of theirs is lost."""

import contextlib
import hashlib
import os
import random
import select
import shutil
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.api import RawApi, demultiplex
from support.faults import faulty_runtime
from support.leaks import assert_no_leaks, footprint
from support.processes import children
from support.raw import request_bytes
from support.runtimes import RuntimeHost, TestContainer
from support.service import Service, execgate_program, write_config
from support.systemd import Manager

NewService = Callable[..., Service]

# Numbered lines, so many a session, as fast as somebody takes them: what is missing or repeated shows.
LINES = 60_000
STREAM = f"i=0; while [ $i -lt {LINES} ]; do echo line $i of the output of this session; i=$((i+1)); done; exit 7"
EXPECTED = b"".join(b"line %d of the output of this session\n" % number for number in range(LINES))


def test_killed_again_and_again(watched_service: NewService, container: TestContainer) -> None:
    """Row 1: sessions of all kinds, a worker that is killed at random: every exit code, and every stdin, is there."""
    service = watched_service(dies="worker")
    api = RawApi(service.socket)
    script = "while read line; do echo got $line; done; exit 9"
    reading = api.create(container.id, "sh", "-c", script, AttachStdin=True, CaptureStdout=True, OnDisconnect="keep")
    plain = api.create(container.id, "sh", "-c", "sleep 4; exit 5")
    terminal = api.create(container.id, "sh", "-c", "sleep 4; exit 6", Tty=True)
    for one in (reading, plain, terminal):
        assert api.call("POST", f"/exec/{one}/start", {"Detach": True, "Tty": one == terminal}).status == 200
    dice = random.Random(20261127)
    answers = []
    for number in range(8):
        assert api.call("POST", f"/exec/{reading}/stdin", b"%d\n" % number).status == 204
        begun = time.monotonic()
        service.crash()
        assert api.call("GET", "/_ping").status == 200
        answers.append(time.monotonic() - begun)
        time.sleep(dice.uniform(0.0, 1.2))  # the moment is the input here: nothing is waited for
    assert api.call("POST", f"/exec/{reading}/stdin?eof=1", b"end\n").status == 204
    ends = {one: api.wait_stopped(one) for one in (reading, plain, terminal)}
    assert [ends[one]["ExitCode"] for one in (reading, plain, terminal)] == [9, 5, 6]
    print(f"answered again after {statistics.median(answers):.3f} s (median), {max(answers):.3f} s at most")


# The worker is the parent of conmon, which is the runtime's; the exec that finds the mark meets this, and no other.
_ONCE = """
if rmdir "$MARK" 2>/dev/null; then kill -9 "$(cut -d' ' -f4 /proc/$PPID/stat)"; fi
exec "$REAL" "$@"
"""


def test_killed_between_the_spawn_and_the_pid_file(
    watched_service: NewService, runc: RuntimeHost, runc_container: TestContainer, host_dir: Path
) -> None:
    """Row 3: the start goes on without the worker, and the next one takes it up: no orphan, the right code."""
    mark = host_dir / "kill-in-a-start"
    script = f"MARK={mark}; {_ONCE}"
    faulty = faulty_runtime(runc, host_dir / "kills", "runc", script)
    service = watched_service(dies="worker", flags=[f"--runtime=runc={faulty.program}"])
    api = RawApi(service.socket)
    session = api.create(runc_container.id, "sh", "-c", "echo here; sleep 1; exit 8", CaptureStdout=True)
    mark.mkdir()
    with pytest.raises(EOFError):
        api.start_detached(session)
    service.await_ready()
    ended = api.wait_stopped(session)
    assert ended["ExitCode"] == 8, (ended, service.log())
    assert b"here" in api.call("GET", f"/exec/{session}/logs").body
    assert api.pipe(runc_container.id, "true").exit_code == 0


def test_killed_between_the_record_and_the_spawn(
    watched_service: NewService, runc_container: TestContainer, host_dir: Path
) -> None:
    """Row 2: conmon is there, and what it is to run may not be: the session never ran, or it did, and says which."""
    conmon = host_dir / "conmon-that-kills"
    real = shutil.which("conmon")
    mark = host_dir / "kill-before-a-start"
    conmon.write_text(f'#!/bin/sh\nif rmdir {mark} 2>/dev/null; then kill -9 $PPID; fi\nexec {real} "$@"\n')
    conmon.chmod(0o755)
    service = watched_service(dies="worker", flags=[f"--conmon={conmon}"])
    api = RawApi(service.socket)
    ran = runc_container.rootfs / "tmp/ran-after-all"
    ran.unlink(missing_ok=True)
    session = api.create(runc_container.id, "sh", "-c", "touch /tmp/ran-after-all; exit 8")
    _wait_until_gone(service.state_dir / "sessions" / session[:32])  # the monitor that was begun at the create
    mark.mkdir()
    with pytest.raises(EOFError):
        api.start_detached(session)
    service.await_ready()
    found = api.inspect(session)  # once: it may end between two looks
    if found["ExitCode"] is None and not found["Running"]:
        assert not ran.exists()
        assert api.start_detached(session).status == 200  # its start was not on record: it can be had again
    code = api.wait_stopped(session)["ExitCode"]
    assert (code == 8) == ran.exists(), f"{code}, and it did {'' if ran.exists() else 'not '}run"
    assert code in (8, 126, 127, 128, 255)
    assert api.pipe(runc_container.id, "true").exit_code == 0


def test_killed_while_a_terminal_is_set_up(
    new_service: NewService, runc_container: TestContainer, host_dir: Path
) -> None:
    """conmon keeps nothing of what a terminal shows before somebody listens: nothing may run by then."""
    conmon = host_dir / "conmon-that-takes-its-time"
    mark = host_dir / "delayed-once"
    real = shutil.which("conmon")
    conmon.write_text(f'#!/bin/sh\nif mkdir {mark} 2>/dev/null; then sleep 1; fi\nexec {real} "$@"\n')
    conmon.chmod(0o755)
    service = new_service(flags=[f"--conmon={conmon}"])
    api = RawApi(service.socket)
    ran = runc_container.rootfs / "tmp/ran-unheard"
    ran.unlink(missing_ok=True)
    session = api.create(
        runc_container.id, "sh", "-c", "touch /tmp/ran-unheard; echo here; exit 8", Tty=True, CaptureStdout=True
    )
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(api.start_detached, session)
        deadline = time.monotonic() + 20
        while not mark.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3)  # the worker waits for conmon by now
        assert list(service.state_dir.glob("sessions/*"))
        assert not list(service.state_dir.glob("sessions/*/process*.json")), "what conmon is to run"
        service.crash()
        with pytest.raises((EOFError, ConnectionError)):
            starting.result()
    code = api.wait_stopped(session)["ExitCode"]
    shown = api.call("GET", f"/exec/{session}/logs").body
    assert (shown, ran.exists()) == ((b"here\r\n", True) if code == 8 else (b"", False)), code
    assert api.pipe(runc_container.id, "true").exit_code == 0


def test_killed_while_a_monitor_waits_for_its_start(new_service: NewService, runc_container: TestContainer) -> None:
    """It is begun at the create. Let go by the death of its service it finds nothing to run, whatever comes later."""
    service = new_service()
    api = RawApi(service.socket)
    session = api.create(runc_container.id, "sh", "-c", "echo once >> /tmp/how-often; exit 8")
    (directory,) = _wait_for_any(service.state_dir / "sessions")
    service.crash()
    assert api.inspect(session)["ExitCode"] is None
    assert api.start_detached(session).status == 200
    assert api.wait_stopped(session)["ExitCode"] == 8
    assert (runc_container.rootfs / "tmp/how-often").read_text() == "once\n"
    assert api.pipe(runc_container.id, "true").exit_code == 0
    service.stop()
    assert not directory.exists()


def _wait_until_gone(directory: Path) -> None:
    """Wait until a directory was there, if it is to be, and is not any more."""
    deadline = time.monotonic() + 10
    while not directory.exists() and time.monotonic() < deadline - 9:
        time.sleep(0.001)
    while directory.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _wait_for_any(directory: Path) -> list[Path]:
    deadline = time.monotonic() + 10
    while not (found := list(directory.iterdir())):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return found


def test_a_session_ends_while_nobody_serves(watched_service: NewService, runc_container: TestContainer) -> None:
    """The exit code comes from what conmon left in the pipe or the file, although its service is stopped or dead."""
    service = watched_service(dies="worker", env={"EXECGATE_STANDBY": "false"})
    api = RawApi(service.socket)
    session = api.create(runc_container.id, "sh", "-c", "sleep 0.3; exit 11")
    assert api.start_detached(session).status == 200
    pidfd = os.pidfd_open(api.inspect(session)["Pid"])
    os.kill(service.pid, signal.SIGSTOP)
    _wait_for_end(pidfd)
    service.crash()
    assert api.wait_stopped(session)["ExitCode"] == 11


def test_killed_while_it_ends_what_has_had_its_time(new_service: NewService, runc_container: TestContainer) -> None:
    """The process was told to end; the worker that knows why does not live to see it."""
    service = new_service()
    api = RawApi(service.socket)
    script = "trap 'echo told; sleep 1; exit 3' TERM; while :; do sleep 0.05; done"
    session = api.create(runc_container.id, "sh", "-c", script, Timeout=1, CaptureStdout=True)
    assert api.start_detached(session).status == 200
    pidfd = os.pidfd_open(api.inspect(session)["Pid"])
    _wait_for_output(api, session)
    os.kill(service.pid, signal.SIGSTOP)
    _wait_for_end(pidfd)
    service.crash()
    ended = api.wait_stopped(session)
    assert (ended["ExitCode"], ended["TimedOut"]) == (3, True)


def _wait_for_output(api: RawApi, session: str, *, after: int = 0) -> None:
    """Return once something was captured from that offset on."""
    with api.connect() as connection:
        connection.send(request_bytes("GET", f"/exec/{session}/logs?follow=1&after={after}"))
        assert connection.read_head().status == 200
        next(connection.read_chunks())


def _wait_for_end(pidfd: int) -> None:
    select.select([pidfd], [], [], 20)
    os.close(pidfd)


@pytest.mark.parametrize("clients", [6])
def test_clients_notice_no_reload(watched_service: NewService, container: TestContainer, clients: int) -> None:
    """Row 5: the docker CLI, both streams busy, under reloads: all bytes in both directions, and the exit codes."""
    service = watched_service()
    data = random.Random(5).randbytes(3_000_000)
    with ThreadPoolExecutor(2 * clients) as pool:
        cats = [pool.submit(_cat, service, container, data) for _ in range(clients // 2)]
        streams = [pool.submit(_docker, service, container, ["sh", "-c", STREAM]) for _ in range(clients // 2)]
        for _ in range(5):
            time.sleep(0.2)  # clients are somewhere in the midst, wherever that is
            service.reload()
        for cat in cats:
            assert cat.result() == (0, hashlib.sha256(data).hexdigest(), b"")
        for stream in streams:
            code, output, errors = stream.result()
            assert (code, errors) == (7, b"")
            assert output == EXPECTED
    service.assert_clean_log()


def _cat(service: Service, container: TestContainer, data: bytes) -> tuple[int, str, bytes]:
    """Send `data` through `docker exec -i cat` in pieces; return its exit code, the hash of what came back, stderr."""
    argv = ["docker", "-H", service.host, "exec", "-i", container.id, "cat"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        stdin, stdout, stderr = process.stdin, process.stdout, process.stderr
        assert stdin is not None
        assert stdout is not None
        assert stderr is not None

        def send() -> None:
            for begin in range(0, len(data), 60_000):
                stdin.write(data[begin : begin + 60_000])
                time.sleep(0.04)  # so that it takes as long as the reloads do
            stdin.close()

        sender = threading.Thread(target=send)
        sender.start()
        digest = hashlib.sha256()
        while piece := stdout.read(65536):
            digest.update(piece)
        sender.join()
        return process.wait(), digest.hexdigest(), stderr.read()


def _docker(service: Service, container: TestContainer, command: Sequence[str]) -> tuple[int, bytes, bytes]:
    argv = ["docker", "-H", service.host, "exec", container.id, *command]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_a_terminal_and_its_watchers_notice_no_reload(watched_service: NewService, container: TestContainer) -> None:
    service = watched_service()
    api = RawApi(service.socket)
    with api.open(container.id, "cat", stdin=True, tty=True) as terminal:
        for number in range(3):
            line = b"line %d\r\n" % number
            terminal.send(line.replace(b"\r\n", b"\n"))
            terminal.output_until(line + line)  # the terminal's echo, and cat's
            service.reload()
        assert api.inspect(terminal.id)["Running"]
        api.call("POST", f"/exec/{terminal.id}/kill")


def test_a_wait_and_an_idle_connection_notice_no_reload(
    watched_service: NewService, runc_container: TestContainer
) -> None:
    service = watched_service()
    api = RawApi(service.socket)
    session = api.create(runc_container.id, "sh", "-c", "sleep 2; exit 3")
    assert api.start_detached(session).status == 200
    with api.connect() as idle, ThreadPoolExecutor(1) as pool:
        assert idle.request("GET", "/_ping").status == 200
        waiting = pool.submit(api.call, "POST", f"/exec/{session}/wait")
        time.sleep(0.2)  # it is under way
        service.reload()
        assert idle.request("GET", "/_ping").status == 200
        answer = waiting.result()
    assert answer.status == 200
    assert answer.json["StatusCode"] == 3


def test_a_stop_keeps_its_grace_in_a_reload(new_service: NewService, runc_container: TestContainer) -> None:
    service = new_service()
    api = RawApi(service.socket)
    script = "trap 'echo told; sleep 2; exit 7' TERM; echo; while :; do sleep 0.05; done"
    session = api.create(runc_container.id, "sh", "-c", script, CaptureStdout=True)
    assert api.start_detached(session).status == 200
    _wait_for_output(api, session)  # its trap is set
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(api.call, "POST", f"/exec/{session}/stop?t=20")
        _wait_for_output(api, session, after=1)
        service.reload()
        assert stopping.result().status == 204
    assert api.inspect(session)["ExitCode"] == 7


def test_logs_that_are_being_read_notice_no_reload(new_service: NewService, runc_container: TestContainer) -> None:
    """What is captured already is an answer that comes soon: it is not cut."""
    service = new_service()
    api = RawApi(service.socket)
    session = api.create(runc_container.id, "sh", "-c", STREAM, CaptureStdout=True)
    assert api.start_detached(session).status == 200
    assert api.wait_stopped(session)["ExitCode"] == 7
    with api.connect() as connection, ThreadPoolExecutor(1) as pool:
        connection.send(request_bytes("GET", f"/exec/{session}/logs"))
        assert connection.read_head().status == 200
        before = service.pid
        os.kill(service.keeper, signal.SIGHUP)
        reloaded = pool.submit(service.await_ready)
        chunks = connection.read_chunks()
        body = next(chunks)
        while service.log().count("hands over") == 0:  # the rest is read while that goes on
            time.sleep(0.01)
        body += b"".join(chunks)
        reloaded.result()
    assert demultiplex(body) == (EXPECTED, b"")
    assert service.pid != before


def test_a_reload_that_fails_changes_nothing(watched_service: NewService, runc_container: TestContainer) -> None:
    service = watched_service()
    config = service.directory / "execgate.toml"
    good = config.read_text()
    before = service.pid
    config.write_text("nonsense = 1\n" + good)
    argv = [str(execgate_program()), "reload", f"--state-dir={service.state_dir}"]
    failed = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert failed.returncode == 1
    assert "the reload failed" in failed.stderr
    assert service.pid == before
    assert RawApi(service.socket).call("GET", "/_ping").status == 200
    config.write_text(good)
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert service.pid != before


def test_a_keeper_that_is_killed_costs_nothing(new_service: NewService, runc_container: TestContainer) -> None:
    """The worker goes on; the next `execgate serve` takes everything over from it, the client's connection too."""
    first = new_service()
    api = RawApi(first.socket)
    with api.open(runc_container.id, "cat", stdin=True) as control:
        assert control.echo(b"one\n") == b"one\n"
        worker = os.pidfd_open(first.pid)
        first.process.kill()
        first.process.wait()
        assert control.echo(b"two\n") == b"two\n"
        second = new_service(first.directory)
        _wait_for_end(worker)
        assert control.echo(b"three\n") == b"three\n"
        control.half_close()
        assert control.finish() == (b"", b"")
        assert control.exit_code() == 0
    second.stop()


def test_a_keeper_that_is_killed_beside_something_that_is_stopped(
    new_service: NewService, runc_container: TestContainer, host_dir: Path
) -> None:
    """The kernel sends a SIGHUP to an orphaned process group in which somebody is stopped: the worker's is none."""
    conmon = host_dir / "conmon-that-stops"
    mark = host_dir / "stopped-once"
    mark.mkdir()
    real = shutil.which("conmon")
    conmon.write_text(f'#!/bin/sh\nif mkdir {mark} 2>/dev/null; then kill -STOP $$; fi\nexec {real} "$@"\n')
    conmon.chmod(0o755)
    flags = [f"--conmon={conmon}"]
    first = new_service(flags=flags)
    api = RawApi(first.socket)
    with api.open(runc_container.id, "cat", stdin=True) as control, ThreadPoolExecutor(1) as pool:
        assert control.echo(b"none\n") == b"none\n"  # its own conmon is past the mark
        mark.rmdir()
        hanging = pool.submit(api.start_detached, api.create(runc_container.id, "true"))
        stopped = _wait_for_stopped_child(first.pid)
        first.process.kill()
        first.process.wait()
        os.kill(stopped, signal.SIGCONT)
        assert hanging.result().status == 200
        assert control.echo(b"one\n") == b"one\n"
        second = new_service(first.directory, flags=flags)
        assert control.echo(b"two\n") == b"two\n"
        control.half_close()
        assert control.finish() == (b"", b"")
    assert api.pipe(runc_container.id, "true").exit_code == 0
    second.stop()


def _wait_for_stopped_child(pid: int) -> int:
    """Return a child once it is stopped; what has no event for anybody but its parent."""
    deadline = time.monotonic() + 20
    while not (stopped := list(filter(_is_stopped, children(pid)))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return stopped[0]


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(OSError):  # it has ended meanwhile
        return ") T " in Path(f"/proc/{pid}/stat").read_text()
    return False


def test_old_sessions_are_forgotten_although_no_worker_lives_long(
    new_service: NewService, runc_container: TestContainer
) -> None:
    service = new_service(env={"EXECGATE_RETENTION_SECONDS": "3"})
    api = RawApi(service.socket)
    session = api.create(runc_container.id, "true")
    assert api.start_detached(session).status == 200
    api.wait_stopped(session)
    deadline = time.monotonic() + 30
    while api.call("GET", f"/exec/{session}/json").status == 200:
        assert time.monotonic() < deadline
        time.sleep(1.0)  # a third of the time after which a worker sweeps again
        service.crash()


def test_nothing_stays_in_the_keeper(new_service: NewService, runc_container: TestContainer) -> None:
    service = new_service()
    api = RawApi(service.socket)
    api.pipe(runc_container.id, "true")
    before = footprint(service)
    for _ in range(20):
        api.pipe(runc_container.id, "true")
    with api.open(runc_container.id, "cat", stdin=True, tty=True) as terminal:
        api.call("POST", f"/exec/{terminal.id}/kill")
    assert_no_leaks(service, before)
    service.crash()
    assert len(children(service.keeper)) <= 2
    api.pipe(runc_container.id, "true")
    after = footprint(service)
    assert len(after.kept) <= len(before.kept) + 1


def test_a_service_that_never_came_up_is_no_service(host_dir: Path, hosts: object) -> None:
    """Its keeper ends as it does, with its words and its exit code, and tries no second time."""
    argv = [str(execgate_program()), "serve", f"--state-dir={host_dir}/none", "--listen=nonsense"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("nonsense") == 1, done.stderr


def test_a_restart_by_the_service_manager_loses_nothing(
    hosts: list[RuntimeHost], container: TestContainer, host_dir: Path, event_loop_name: str
) -> None:
    """`systemctl restart` with a descriptor store: keeper and worker end, and a client in the midst does not notice."""
    directory = host_dir / f"managed-{container.host.name}"
    directory.mkdir()
    manager = Manager(directory)
    argv = [str(execgate_program()), "serve", "--config", str(write_config(directory, hosts))]
    environ = {"PATH": os.environ["PATH"], "EXECGATE_EVENT_LOOP": event_loop_name}
    log = directory / "service.log"
    process = manager.start(argv, environ, log)
    try:
        api = RawApi(directory / "execgate.sock")
        with (
            api.open(container.id, "cat", stdin=True) as control,
            api.open(container.id, "cat", stdin=True, tty=True) as terminal,
        ):
            for line in (b"one\n", b"two\n", b"three\n"):
                assert control.echo(line) == line
                process.send_signal(signal.SIGTERM)
                control.send(b"meanwhile ")  # nobody is there to read it yet
                manager.listen(process)
                assert process.wait() == 0, log.read_text()
                process = manager.start(argv, environ, log)
                control.output_until(b"meanwhile ")
            terminal.send(b"still here\n")
            terminal.output_until(b"still here\r\nstill here\r\n")
            terminal.send(b"\x04")
            control.half_close()
            assert control.finish() == (b"", b"")
            assert control.exit_code() == 0
            assert api.wait_stopped(terminal.id)["ExitCode"] == 0
        assert "Traceback" not in log.read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        manager.listen(process)
        process.wait()
        manager.close()
