"""Rows 6-14, 23-25, 27-29 of the fault matrix: what happens to conmon, the runtime, the container and the process.

Each fault is the real thing. Each test holds that the exit code is the right one or an honest unknown, that it is
known when the stream ends, and, by the fixture `unharmed`, that nothing is left behind.
"""

import hashlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest

from support.api import OUTPUT, RawApi, Stream, meanwhile, start_bytes
from support.faults import faulty_runtime
from support.leaks import monitors, resident_bytes
from support.runtimes import RuntimeHost, TestContainer
from support.service import Service

UNKNOWN = 255
PROMPT = 5.0
"""Seconds: far more than any of this takes, far less than any timeout of the service that could hide a hang."""


@pytest.fixture
def only_monitor(service: Service, unharmed: None) -> Callable[[], int]:
    """Return the pid of the conmon of the session that was started last, beside the bystander's."""
    before = monitors(service.state_dir)

    def find() -> int:
        (pid,) = monitors(service.state_dir) - before
        return pid

    return find


def host_pid(api: RawApi, exec_id: str) -> int:
    pid = int(api.inspect(exec_id)["Pid"])
    assert pid > 0
    return pid


def end(pid: int) -> None:
    """Kill a process of the host, named by a pidfd."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)


# -- conmon


@pytest.mark.parametrize("tty", [False, True], ids=["pipes", "tty"])
def test_conmon_killed(api: RawApi, container: TestContainer, only_monitor: Callable[[], int], tty: bool) -> None:
    """The process lives on; without a TTY its streams do too. The kernel tells the code to whoever asks in time."""
    script = "echo up; read line; echo $line; exit 7"
    with api.open(container.id, "sh", "-c", script, stdin=True, tty=tty) as session:
        session.connection.read_exactly(4 if tty else 11)
        os.kill(only_monitor(), signal.SIGKILL)
        if tty:
            session.finish()
            # Its terminal went with conmon: the kernel hangs it up.
            expected = {128 + signal.SIGHUP, UNKNOWN}
        else:
            session.send(b"still there\n")
            assert session.finish() == (b"still there\n", b"")
            expected = {7, UNKNOWN}
        inspected = api.inspect(session.id)
    assert not inspected["Running"]
    assert inspected["ExitCode"] in expected, inspected
    assert (inspected["ExitCode"] == UNKNOWN) == (inspected["ExitCodeSource"] == "unknown"), inspected


@pytest.mark.parametrize("tty", [False, True], ids=["pipes", "tty"])
def test_conmon_killed_before_the_start(
    api: RawApi, service: Service, runc_container: TestContainer, unharmed: None, tty: bool
) -> None:
    """The one that waits for the start is none any more: the start gets another."""
    before = monitors(service.state_dir)
    session = api.create(runc_container.id, "sh", "-c", "exit 7", Tty=tty, **OUTPUT)
    deadline = time.monotonic() + PROMPT
    while not (waiting := monitors(service.state_dir) - before):
        assert time.monotonic() < deadline
        session = api.create(runc_container.id, "sh", "-c", "exit 7", Tty=tty, **OUTPUT)
    for pid in waiting:
        os.kill(pid, signal.SIGKILL)
    while monitors(service.state_dir) & waiting:
        assert time.monotonic() < deadline
    with api.attach(session, tty=tty) as stream:
        assert stream.finish() == (b"", b"")
    assert api.wait_stopped(session)["ExitCode"] == 7


@pytest.mark.parametrize("tty", [False, True], ids=["pipes", "tty"])
def test_conmon_stopped_for_a_while(
    api: RawApi, container: TestContainer, only_monitor: Callable[[], int], tty: bool
) -> None:
    with api.open(container.id, "sh", "-c", "echo up; read a; seq 100000; exit 9", stdin=True, tty=tty) as session:
        session.connection.read_exactly(4 if tty else 11)
        monitor = only_monitor()
        os.kill(monitor, signal.SIGSTOP)
        try:
            session.send(b"go\n")
            # Nobody sees the exit code while conmon stands still: the stream must not end.
            received = _receive_for(session, 2.0)
        finally:
            os.kill(monitor, signal.SIGCONT)
        session.connection.unread(received)
        stdout, _ = session.finish()
        assert session.exit_code() == 9
    lines = stdout.replace(b"\r\n", b"\n").removeprefix(b"go\n").splitlines()
    assert lines == [b"%d" % number for number in range(1, 100001)]


def _receive_for(session: Stream, seconds: float) -> bytes:
    data, deadline = b"", time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([session.connection.socket], [], [], left)[0]:
            chunk = session.connection.socket.recv(1 << 16)
            assert chunk, "the stream ended while the exit code could not be known"
            data += chunk
    return data


def test_conmon_terminated(api: RawApi, container: TestContainer, only_monitor: Callable[[], int]) -> None:
    """It forwards the signal, so a stop of the whole cgroup ends the sessions too."""
    with api.open(container.id, "sh", "-c", "echo up; sleep 1000", stdin=True) as session:
        session.connection.read_exactly(11)
        os.kill(only_monitor(), signal.SIGTERM)
        # Only the shell gets the signal; its child holds the output until the bounded drain ends.
        session.finish()
        assert session.exit_code() == 143


# -- the runtime


@pytest.fixture
def faulty_api(
    new_service: Callable[..., Service],
    runc: RuntimeHost,
    runc_container: TestContainer,
    host_dir: Path,
    keep_unharmed: Callable[..., AbstractContextManager[None]],
    request: pytest.FixtureRequest,
) -> Iterator[RawApi]:
    """A service whose runtime does what the test's parameter says in place of an exec, unless told `GOOD=1`."""
    on_exec = 'grep -q GOOD=1 "$(echo "$*" | sed "s/.*--process \\([^ ]*\\).*/\\1/")" && exec "$REAL" "$@"\n'
    faulty = faulty_runtime(runc, host_dir / "faulty", "runc", on_exec + request.param)
    service = new_service(flags=[f"--runtime=runc={faulty.program}"], env={"EXECGATE_START_TIMEOUT_SECONDS": "2"})
    with keep_unharmed(service, runc_container, Env=["GOOD=1"]):
        yield RawApi(service.socket)


def _starts_in_vain(api: RawApi, container: TestContainer, *, tty: bool = False) -> tuple[str, int, float]:
    """Start attached and detached, see both fail alike; return message, exit code and seconds."""
    begun = time.monotonic()
    with api.open(container.id, "true", stdin=True, tty=tty) as session:
        assert session.status == 101
        told, _ = session.finish()
        code = session.exit_code()
    took = time.monotonic() - begun
    exec_id = api.create(container.id, "true", Tty=tty, **OUTPUT)
    answer = api.start_detached(exec_id)
    assert answer.status in (400, 500), answer
    assert answer.message
    # Nobody holds the stderr of a detached start: there the reason may be unknown, but never the failure.
    assert api.inspect(exec_id)["ExitCode"] in (code, 128)
    assert api.start_detached(exec_id).status == 409, "it can be started again"
    return told.decode(), code, took


@pytest.mark.parametrize("tty", [False, True], ids=["pipes", "tty"])
@pytest.mark.parametrize("faulty_api", ["sleep 1000"], indirect=True, ids=["hangs"])
def test_runtime_hangs(faulty_api: RawApi, runc_container: TestContainer, tty: bool) -> None:
    told, code, took = _starts_in_vain(faulty_api, runc_container, tty=tty)
    assert "did not start the process within 2 seconds" in told
    assert code == 128
    assert 2 <= took < 2 + PROMPT


_NOISE = (
    "head -c {size} /dev/urandom | tr -dc '\\001-\\177' >&2; "
    "printf '\\033[2J\\nno such file or directory\\n' >&2; exit 1"
)


# Nobody can tell a runtime's noise from the process's first output before the pid is known, so the pipe is not read
# until then: more than it holds ends in the start timeout, with 128.
_BLOCKED = pytest.mark.xfail(reason="a runtime that writes more than a pipe holds blocks until the start timeout")


@pytest.mark.parametrize(
    "faulty_api",
    [
        pytest.param(_NOISE.format(size=1000), id="1 KB"),
        pytest.param(_NOISE.format(size=4_000_000), id="4 MB", marks=_BLOCKED),
    ],
    indirect=True,
)
def test_runtime_fails_noisily(faulty_api: RawApi, runc_container: TestContainer) -> None:
    """More than a pipe holds must not block it; and the text is bounded, on one line, and harmless."""
    told, code, took = _starts_in_vain(faulty_api, runc_container)
    assert "did not start the process within" not in told, f"its own noise blocked it for {took:.1f} s"
    assert code in (126, 127, 128)
    assert len(told) < 10_000
    assert told.rstrip("\r\n").isprintable()


@pytest.mark.parametrize("tty", [False, True], ids=["pipes", "tty"])
@pytest.mark.parametrize("faulty_api", ["kill -9 $$"], indirect=True, ids=["killed"])
def test_runtime_killed_before_the_pid_file(faulty_api: RawApi, runc_container: TestContainer, tty: bool) -> None:
    told, code, took = _starts_in_vain(faulty_api, runc_container, tty=tty)
    assert told.startswith("OCI runtime exec failed")
    assert code == 128
    assert took < 2, "that was the timeout"


@pytest.mark.parametrize("faulty_api", ["exit 0"], indirect=True, ids=["lies"])
def test_runtime_claims_success_and_did_nothing(faulty_api: RawApi, runc_container: TestContainer) -> None:
    _, code, took = _starts_in_vain(faulty_api, runc_container)
    assert code == 128
    assert took < PROMPT


@pytest.mark.parametrize("faulty_api", ["sleep 1000"], indirect=True, ids=["hangs"])
def test_client_leaves_while_the_runtime_hangs(faulty_api: RawApi, runc_container: TestContainer) -> None:
    exec_id = faulty_api.create_attached(runc_container.id, "true")
    with faulty_api.connect() as connection:
        connection.send(start_bytes(exec_id) + b"x" * 1000)
        assert connection.read_head().status == 101
    inspected = faulty_api.wait_stopped(exec_id)
    assert inspected["ExitCode"] == 128


def test_runtime_is_not_there(
    new_service: Callable[..., Service], runc_container: TestContainer, host_dir: Path
) -> None:
    service = new_service(flags=[f"--runtime=runc={host_dir}/no-such-runtime"])
    api = RawApi(service.socket)
    told, code, _ = _starts_in_vain(api, runc_container)
    assert told
    assert code in (126, 127, 128)


def test_conmon_is_no_conmon(new_service: Callable[..., Service], runc_container: TestContainer) -> None:
    service = new_service(flags=["--conmon=/bin/true"])
    api = RawApi(service.socket)
    _, code, took = _starts_in_vain(api, runc_container)
    assert code == 128
    assert took < PROMPT
    exec_id = api.create(runc_container.id, "true", Tty=True, **OUTPUT)
    with api.connect() as connection:
        connection.send(start_bytes(exec_id, Tty=True))
        assert connection.read_answer().status == 503
    assert api.inspect(exec_id)["ExitCode"] == 128


# -- the container


@pytest.mark.parametrize("tty", [False, True], ids=["pipes", "tty"])
def test_container_killed(api: RawApi, unharmed: None, new_container: Callable[..., TestContainer], tty: bool) -> None:
    victim = new_container()
    with api.open(victim.id, "sh", "-c", "seq 20000; echo end; sleep 1000", tty=tty) as session:
        received = b""
        while b"end" not in received[-20:]:
            received += session.connection.read()
        victim.kill()
        session.connection.unread(received)
        stdout, _ = session.finish()
        assert session.exit_code() == 137
    assert stdout.split()[:20000] == [b"%d" % number for number in range(1, 20001)]


def test_container_recreated_under_the_same_name(api: RawApi, unharmed: None, runtime_host: RuntimeHost) -> None:
    first = runtime_host.run()
    exec_id = api.create(first.id, "true", **OUTPUT)
    first.delete()
    first.bundle.rename(first.bundle.with_suffix(".old"))
    second = runtime_host.run(first.id)
    try:
        assert api.call("GET", f"/containers/{second.id}/json").json["State"]["Running"]
        answer = api.start_detached(exec_id)
        assert answer.status == 409, answer
        assert second.id in answer.message
        with api.connect() as connection:
            connection.send(start_bytes(exec_id))
            assert connection.read_answer().status == 409
        assert ["true"] not in second.processes().values()
        assert api.call("POST", f"/exec/{exec_id}/resize?h=1&w=1").status == 409
    finally:
        second.delete()
    assert api.start_detached(exec_id).status == 404


def test_container_stopped_between_create_and_start(
    api: RawApi, unharmed: None, new_container: Callable[..., TestContainer]
) -> None:
    victim = new_container()
    exec_id = api.create(victim.id, "true", **OUTPUT)
    victim.kill()
    deadline = time.monotonic() + PROMPT
    while victim.state()["status"] != "stopped":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    answer = api.start_detached(exec_id)
    assert answer.status == 409
    assert "is not running" in answer.message


def test_container_paused_between_create_and_start(
    api: RawApi, unharmed: None, new_container: Callable[..., TestContainer]
) -> None:
    victim = new_container()
    exec_id = api.create(victim.id, "true", **OUTPUT)
    victim.pause()
    try:
        begun = time.monotonic()
        answer = api.start_detached(exec_id)
        assert answer.status == 409
        assert "is paused" in answer.message
        with api.connect() as connection:
            connection.send(start_bytes(exec_id))
            assert connection.read_answer().status == 409
        assert time.monotonic() - begun < PROMPT
    finally:
        victim.resume()
    assert api.start_detached(exec_id).status == 200, "the refusal must not have used it up"
    assert api.wait_stopped(exec_id)["ExitCode"] == 0


# -- the process


@pytest.fixture
def ends_what_stays(container: TestContainer) -> Iterator[None]:
    """End what a test leaves running in the container on purpose."""
    before = container.processes().keys()
    yield
    for pid in container.processes().keys() - before:
        with suppress(ProcessLookupError):
            end(pid)


@pytest.mark.parametrize("tty", [False, True], ids=["pipes", "tty"])
def test_grandchild_holds_the_output(
    api: RawApi, container: TestContainer, ends_what_stays: None, unharmed: None, tty: bool
) -> None:
    begun = time.monotonic()
    script = "trap '' HUP; (sleep 30; echo late) & echo early; exit 5"
    with api.open(container.id, "sh", "-c", script, tty=tty) as session:
        stdout, _ = session.finish()
        assert session.exit_code() == 5
    assert stdout.split() == [b"early"]
    assert time.monotonic() - begun < PROMPT


@pytest.mark.parametrize("tty", [False, True], ids=["pipes", "tty"])
def test_grandchild_floods_the_output(api: RawApi, container: TestContainer, unharmed: None, tty: bool) -> None:
    """The drain is bounded in time even when there is always more."""
    script = "trap '' HUP; timeout 20 yes & exit 5"
    begun = time.monotonic()
    with api.open(container.id, "sh", "-c", script, tty=tty) as session:
        session.connection.read_until_closed()
        assert session.exit_code() == 5
    assert time.monotonic() - begun < 2 * PROMPT


def test_process_is_killed(api: RawApi, container: TestContainer, unharmed: None) -> None:
    with api.open(container.id, "sh", "-c", "echo up; exec sleep 1000") as session:
        session.connection.read_exactly(11)
        end(host_pid(api, session.id))
        session.finish()
        assert session.exit_code() == 137


def test_process_closes_its_streams_and_works_on(api: RawApi, container: TestContainer, unharmed: None) -> None:
    script = "exec <&- >&- 2>&-; sleep 0.7; exit 3"
    begun = time.monotonic()
    with api.open(container.id, "sh", "-c", script, stdin=True) as session:
        session.send(b"x" * 1000)
        assert session.finish() == (b"", b"")
        assert session.exit_code() == 3
    assert time.monotonic() - begun > 0.6


def test_one_byte_writes(api: RawApi, runc_container: TestContainer, unharmed: None) -> None:
    """Row 27, both ways: a byte at a time into a process that gives back every one of them."""
    data = os.urandom(1 << 20)
    with api.open(runc_container.id, "dd", "bs=1", stdin=True) as session:
        with meanwhile(lambda: _send_bytewise(session, data[:65536])):
            stdout, _ = session.finish()
        assert session.exit_code() == 0
    assert hashlib.sha256(stdout).digest() == hashlib.sha256(data[:65536]).digest()
    with api.open(runc_container.id, "cat", stdin=True) as session:
        with meanwhile(lambda: _send_bytewise(session, data)):
            stdout, _ = session.finish()
        assert session.exit_code() == 0
    assert hashlib.sha256(stdout).digest() == hashlib.sha256(data).digest()


def _send_bytewise(session: Stream, data: bytes) -> None:
    for position in range(len(data)):
        session.send(data[position : position + 1])
    session.half_close()


@pytest.mark.parametrize("tty", [False, True], ids=["pipes", "tty"])
def test_stdin_that_nobody_reads(
    api: RawApi, container: TestContainer, only_monitor: Callable[[], int], tty: bool
) -> None:
    """Row 28: the client is blocked, soon, and stays so; the session can be ended all the same."""
    # A terminal in its usual mode would throw away what is too much for a line.
    script = f"{'stty raw -echo; ' if tty else ''}printf up; exec sleep 1000"
    with api.open(container.id, "sh", "-c", script, stdin=True, tty=tty) as session:
        session.connection.read_exactly(2 if tty else 10)
        sent = session.connection.send_until_blocked(b"x" * 100_000_000, patience=0.5)
        assert sent <= 2 << 20, f"{sent} bytes are in flight"
        session.connection.socket.settimeout(6)
        monitor = only_monitor()
        end(host_pid(api, session.id))
        try:
            session.connection.read_until_closed()
        except TimeoutError:
            os.kill(monitor, signal.SIGKILL)  # or it would stand in every later test's way
            session.connection.read_until_closed()
            pytest.fail("the process has ended, and its session has not: conmon hangs in a write to the terminal")
        assert session.exit_code() == 137


def test_slow_reader_of_much_output(
    api: RawApi, service: Service, runc_container: TestContainer, unharmed: None
) -> None:
    """Row 23: 1 KB a second of 100 MB holds the process up; then all of it is there, and none of it was in between."""
    line, size = b"0123456789abcdef\n", 100_000_000
    script = f"yes {line.decode().strip()} | head -c {size}; exit 6"
    before, taken = resident_bytes(service), b""
    with api.open(runc_container.id, "sh", "-c", script) as session:
        for _ in range(3):
            taken += session.connection.read_exactly(1024)
            time.sleep(1)  # this is the slowness, nothing is waited for
        assert api.inspect(session.id)["StdoutBytes"] < 4 << 20
        assert resident_bytes(service) - before < 16 << 20
        session.connection.unread(taken)
        digest = hashlib.sha256()
        for _, piece in session.pieces():
            digest.update(piece)
        assert session.exit_code() == 6
    assert digest.digest() == hashlib.sha256((line * (size // len(line) + 1))[:size]).digest()


def test_half_close_while_output_flows(api: RawApi, container: TestContainer, unharmed: None) -> None:
    """Row 25: it is the end of the process's input, and of nothing else."""
    script = "echo up; cat; echo over; seq 100000; echo late >&2; exit 4"
    with api.open(container.id, "sh", "-c", script, stdin=True) as session:
        assert session.output_until(b"up\n") == b"up\n"
        session.send(b"typed\n")
        session.half_close()
        stdout, stderr = session.finish()
        assert session.exit_code() == 4
    assert stdout == b"typed\nover\n" + b"".join(b"%d\n" % number for number in range(1, 100001))
    assert stderr == b"late\n"


def test_client_leaves_with_stdin_under_way(api: RawApi, container: TestContainer, unharmed: None) -> None:
    """All that it sent arrives, then the end: the process does not hang for want of one."""
    exec_id = api.create_attached(container.id, "sh", "-c", "echo up; sleep 0.5; wc -c > /tmp/got")
    with api.connect() as connection:
        connection.send(start_bytes(exec_id))
        connection.read_head()
        connection.read_exactly(11)
        connection.socket.settimeout(0.3)
        try:
            connection.send(b"x" * 4_000_000)
        except TimeoutError:
            pass
        else:
            pytest.fail("nothing blocked: the test shows nothing")
    assert api.wait_stopped(exec_id)["ExitCode"] == 0
    assert int((container.rootfs / "tmp/got").read_text()) > 65536


def test_client_vanishes_while_output_flows(api: RawApi, container: TestContainer, unharmed: None) -> None:
    """The process goes on as if somebody listened."""
    exec_id = api.create(container.id, "sh", "-c", "seq 1000000; exit 4", **OUTPUT)
    with api.connect() as connection:
        connection.send(start_bytes(exec_id))
        connection.read_head()
        connection.read_exactly(1000)
    assert api.wait_stopped(exec_id)["ExitCode"] == 4


def test_hundred_starts_and_leaves(api: RawApi, container: TestContainer, unharmed: None) -> None:
    """A client may leave at any moment of a start: at whichever, the session ends and leaves nothing."""
    exec_ids = []
    for number in range(40):
        exec_ids.append(api.create_attached(container.id, "cat", Tty=number % 4 == 3))
        with api.connect() as connection:
            connection.send(start_bytes(exec_ids[-1], Tty=number % 4 == 3) + b"x" * number)
            if number % 2:
                connection.socket.settimeout(0.001 * number)
                with suppress(TimeoutError):
                    connection.socket.recv(1)
    for number, exec_id in enumerate(exec_ids):
        inspected = api.inspect(exec_id)
        if number % 4 == 3 and inspected["Running"] and inspected["Pid"]:
            end(inspected["Pid"])  # a terminal has no end of file
        api.wait_stopped(exec_id)


def test_typing_ahead_of_the_end(api: RawApi, container: TestContainer, unharmed: None) -> None:
    """conmon ends with input that nobody read: the last output must not be lost for it."""
    for _ in range(5):
        script = "stty raw -echo; printf up; read -n1 x; seq 3000; echo END"
        with api.open(container.id, "sh", "-c", script, stdin=True, tty=True) as session:
            session.connection.read_exactly(2)
            session.send(b"x" * 8_000)  # more than it reads, less than conmon chokes on: that is another test
            stdout, _ = session.finish()
            assert stdout.rstrip().endswith(b"END"), stdout[-40:]
            assert session.exit_code() == 0


def test_no_descriptor_reaches_the_process(api: RawApi, container: TestContainer, unharmed: None) -> None:
    """Not conmon's, not the service's: an open one of the host's is a way out (CVE-2024-21626)."""
    for tty in (False, True):
        with api.open(container.id, "ls", "/proc/self/fd", stdin=True, tty=tty) as session:
            stdout, _ = session.finish()
        assert sorted(stdout.split()) == [b"0", b"1", b"2", b"3"], "3 is the directory that ls reads"
