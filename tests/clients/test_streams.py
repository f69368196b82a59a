"""The bytes: every one, in order, in both directions, whatever the client does, and in bounded memory.

The data is random and does not repeat within 16 MiB, so that a hash notices what is lost, doubled or moved.
"""

import hashlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from execgate.wire import stdcopy
from support.api import RawApi, Stream, demultiplex, meanwhile, start_bytes
from support.leaks import resident_bytes
from support.raw import TIMEOUT, Connection
from support.runtimes import TestContainer
from support.service import Service

pytestmark = pytest.mark.usefixtures("no_leaks")

MIB = 1 << 20
PATIENCE = 2.0
"""Seconds without progress after which a sender counts as blocked."""
EVERY_BYTE = bytes(range(256))


@pytest.fixture(scope="session")
def block() -> bytes:
    """16 MiB of what looks like noise, the same in every run."""
    return random.Random(2).randbytes(16 * MIB)


@pytest.fixture
def data_file(container: TestContainer, block: bytes) -> Iterator[str]:
    """The path inside the container of a file with the block in it."""
    path = container.rootfs / "tmp/data"
    path.write_bytes(block)
    yield "/tmp/data"
    path.unlink()


@pytest.fixture
def gate(container: TestContainer) -> Iterator["Gate"]:
    """A FIFO in the container by which a test holds a process and lets it go."""
    path = container.rootfs / "tmp/gate"
    os.mkfifo(path, 0o666)
    yield Gate(path)
    path.unlink()


class Gate:
    """A process that runs `Gate.WAIT` is held until `open`."""

    WAIT = "read go </tmp/gate"

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self) -> None:
        """Let go; returns once the process has come to the gate."""
        opening = threading.Thread(target=self._path.write_bytes, args=(b"go\n",))
        opening.start()
        opening.join(TIMEOUT)
        if opening.is_alive():
            os.close(os.open(self._path, os.O_RDONLY | os.O_NONBLOCK))  # or the thread would wait for ever
            raise AssertionError("nobody comes to the gate")


class Hashes:
    """The SHA-256 and the length of each output stream."""

    def __init__(self) -> None:
        self._hashes = {stdcopy.STDOUT: hashlib.sha256(), stdcopy.STDERR: hashlib.sha256()}
        self.sizes = {stdcopy.STDOUT: 0, stdcopy.STDERR: 0}

    def take(self, stream: Stream) -> None:
        """Read a stream to its end."""
        for number, data in stream.pieces():
            self._hashes[number].update(data)
            self.sizes[number] += len(data)

    def of(self, number: int) -> str:
        """The hash of what came on stdout (1) or stderr (2)."""
        return self._hashes[number].hexdigest()


def repeated_hash(block: bytes, times: int) -> str:
    """The hash of a block written so many times."""
    found = hashlib.sha256()
    for _ in range(times):
        found.update(block)
    return found.hexdigest()


def process_io(pid: int) -> dict[str, int]:
    """What a process has read and written: proc(5), /proc/PID/io."""
    lines = (line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return {name: int(count) for name, count in lines}


# -- every byte -------------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_a_gigabyte_through_all_three_streams_at_once(
    raw: RawApi, container: TestContainer, data_file: str, block: bytes
) -> None:
    """1 GiB on each."""
    times = 64
    copies = f"for i in $(seq {times}); do cat {data_file}; done"
    script = f"({copies}) & ({copies}) >&2 & sha256sum >/tmp/stdin.sha256; wait"
    session_id = raw.create_attached(container.id, "sh", "-c", script)
    hashes = Hashes()
    with raw.attach(session_id) as stream:

        def send() -> None:
            for _ in range(times):
                stream.send(block)
            stream.half_close()

        with meanwhile(send):
            hashes.take(stream)
    expected = repeated_hash(block, times)
    assert hashes.sizes == {1: times * len(block), 2: times * len(block)}
    assert (hashes.of(1), hashes.of(2)) == (expected, expected)
    assert (container.rootfs / "tmp/stdin.sha256").read_text().split()[0] == expected
    assert raw.inspect(session_id)["ExitCode"] == 0


def test_a_million_writes_of_one_byte(raw: RawApi, container: TestContainer, data_file: str, block: bytes) -> None:
    done = raw.pipe(container.id, "dd", "bs=1", "count=1000000", f"if={data_file}")
    assert done.stdout == block[:1_000_000]
    assert done.exit_code == 0


def test_a_million_bytes_of_input_one_by_one(raw: RawApi, container: TestContainer, block: bytes) -> None:
    session_id = raw.create_attached(container.id, "sha256sum")
    with raw.attach(session_id) as stream:
        for position in range(1_000_000):
            stream.send(block[position : position + 1])
        stream.half_close()
        stdout, _ = stream.output()
    assert stdout.split()[0].decode() == hashlib.sha256(block[:1_000_000]).hexdigest()


def test_a_reader_of_one_byte_at_a_time(raw: RawApi, container: TestContainer, data_file: str, block: bytes) -> None:
    session_id = raw.create_attached(container.id, "head", "-c", "30000", data_file)
    received = b""
    with raw.attach(session_id) as stream:
        while byte := stream.connection.read(1):
            received += byte
    assert demultiplex(received) == (block[:30000], b"")


def test_all_values_of_a_byte_come_back(raw: RawApi, container: TestContainer) -> None:
    done = raw.pipe(container.id, "sh", "-c", "tee /dev/stderr", stdin=EVERY_BYTE * 100)
    assert (done.stdout, done.stderr, done.exit_code) == (EVERY_BYTE * 100, EVERY_BYTE * 100, 0)


def test_bytes_of_a_raw_terminal_come_back(raw: RawApi, container: TestContainer) -> None:
    """Even those that are detach keys elsewhere: these are set to something that does not occur."""
    data = bytes(reversed(EVERY_BYTE)) * 8
    script = f"stty raw -echo; echo ready; head -c {len(data)}"
    session_id = raw.create_attached(container.id, "sh", "-c", script, Tty=True, DetachKeys="a,a,a")
    with raw.attach(session_id, Tty=True) as stream:
        before = stream.output_until(b"ready")
        stream.send(data)
        stdout, _ = stream.output()
    # Raw is raw both ways: the line of `echo` ends in a bare newline.
    assert (before + stdout).removeprefix(b"ready\n") == data


def test_random_pieces_at_random_sizes(raw: RawApi, container: TestContainer, block: bytes) -> None:
    """A dialogue with `cat`: what goes in comes out, however it was cut."""
    sizes = random.Random(3)
    session_id = raw.create_attached(container.id, "cat")
    hashes = Hashes()
    with raw.attach(session_id) as stream:

        def send() -> None:
            position = 0
            while position < len(block):
                size = sizes.choice((1, 7, 4095, 4096, 4097, 65536, 1_000_003))
                stream.send(block[position : position + size])
                position += size
            stream.half_close()

        with meanwhile(send):
            hashes.take(stream)
    assert hashes.of(1) == hashlib.sha256(block).hexdigest()


# -- bounded memory ---------------------------------------------------------------------------------------------------


def test_a_slow_reader_slows_the_process_and_costs_no_memory(
    raw: RawApi, service: Service, container: TestContainer, data_file: str, block: bytes
) -> None:
    """1 KB a second of 112 MiB, and then the rest: it was all there, and none of it in the service."""
    times = 7
    assert raw.pipe(container.id, "cat", data_file).stdout == block  # what is grown once stays
    before = resident_bytes(service)
    argv = ["sh", "-c", f"exec cat {' '.join([data_file] * times)}"]
    session_id = raw.create_attached(container.id, *argv)
    received = Hashes()
    with raw.attach(session_id) as stream:
        taken = b""
        for _ in range(5):
            taken += stream.connection.read(1024)
            time.sleep(1)  # this is the slowness, nothing is waited for
            written = process_io(raw.inspect(session_id)["Pid"])["wchar"]
            assert written - len(taken) <= 4 * MIB
            assert resident_bytes(service) - before <= 16 * MIB
        stream.connection.unread(taken)
        received.take(stream)
    assert received.sizes[1] == times * len(block)
    assert received.of(1) == repeated_hash(block, times)


def test_input_that_nobody_reads_is_held_back(
    raw: RawApi, service: Service, container: TestContainer, gate: Gate, block: bytes
) -> None:
    """100 MB: at most 2 MiB of it leave the client before the process reads, and all of it arrives in the end."""
    data = (block * 6)[:100_000_000]
    before = resident_bytes(service)
    session_id = raw.create_attached(container.id, "sh", "-c", f"{Gate.WAIT}; sha256sum")
    with raw.attach(session_id) as stream:
        accepted = stream.connection.send_until_blocked(data, patience=PATIENCE)
        assert 64 * 1024 <= accepted <= 2 * MIB
        assert resident_bytes(service) - before <= 16 * MIB
        gate.open()
        stream.send(data[accepted:])
        stream.half_close()
        stdout, _ = stream.output()
    assert stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()


def test_a_process_that_ends_frees_the_client_that_it_did_not_read(
    raw: RawApi, container: TestContainer, gate: Gate, block: bytes
) -> None:
    """The client is told of the end, with the exit code, while it is still stuck in its input."""
    session_id = raw.create_attached(container.id, "sh", "-c", f"{Gate.WAIT}; echo enough; exit 3")
    with raw.attach(session_id) as stream:
        stream.connection.send_until_blocked(block, patience=PATIENCE)
        gate.open()
        assert stream.output() == (b"enough\n", b"")
    assert raw.inspect(session_id)["ExitCode"] == 3


def test_one_stream_that_is_full_does_not_hold_the_others(
    raw: RawApi, container: TestContainer, gate: Gate, block: bytes
) -> None:
    """Input is stuck, output flows."""
    session_id = raw.create_attached(container.id, "sh", "-c", f"head -c 5000000 /dev/zero; {Gate.WAIT}; exec cat")
    with raw.attach(session_id) as stream:
        accepted = stream.connection.send_until_blocked(block, patience=PATIENCE)
        assert accepted < len(block)
        hashes = Hashes()

        def rest() -> None:
            gate.open()
            stream.send(block[accepted:])
            stream.half_close()

        with meanwhile(rest):
            hashes.take(stream)
    assert hashes.of(1) == hashlib.sha256(bytes(5_000_000) + block).hexdigest()


# -- the beginning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upgrade", [True, False])
@pytest.mark.parametrize("size", [0, 1, 5, 70_000])
def test_input_and_its_end_together_with_the_request(
    raw: RawApi, container: TestContainer, block: bytes, size: int, upgrade: bool
) -> None:
    session_id = raw.create_attached(container.id, "sh", "-c", "cat; echo late >&2")
    with raw.attach(session_id, stdin=block[:size], end=True, upgrade=upgrade) as stream:
        assert stream.status == (101 if upgrade else 200)
        assert stream.output() == (block[:size], b"late\n")
    assert raw.inspect(session_id)["ExitCode"] == 0


def test_input_that_looks_like_http_is_input(raw: RawApi, container: TestContainer) -> None:
    request = b"POST /containers/x/exec HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    assert raw.pipe(container.id, "cat", stdin=request * 3).stdout == request * 3


@pytest.mark.parametrize("upgrade", [True, False])
def test_a_request_in_pieces_with_input_behind_it(raw: RawApi, container: TestContainer, upgrade: bool) -> None:
    """Each byte in a write of its own, the last of the request and the first of the input included."""
    session_id = raw.create_attached(container.id, "cat")
    with raw.connect() as connection:
        for byte in start_bytes(session_id, upgrade=upgrade) + b"input":
            connection.send(bytes([byte]))
        connection.half_close()
        assert connection.read_head().status == (101 if upgrade else 200)
        assert demultiplex(connection.read_to_end()) == (b"input", b"")


def test_much_input_before_the_head_of_the_answer(raw: RawApi, container: TestContainer, block: bytes) -> None:
    """A client that does not wait: everything is under way before it reads the first byte of the answer."""
    session_id = raw.create_attached(container.id, "sha256sum")
    with raw.connect() as connection:
        with meanwhile(lambda: connection.send(start_bytes(session_id) + block)):
            assert connection.read_head().status == 101
        connection.half_close()
        stdout, _ = demultiplex(connection.read_to_end())
    assert stdout.split()[0].decode() == hashlib.sha256(block).hexdigest()


def test_the_head_is_there_before_the_process_has_said_anything(
    raw: RawApi, container: TestContainer, gate: Gate
) -> None:
    session_id = raw.create_attached(container.id, "sh", "-c", f"{Gate.WAIT}; echo now")
    with raw.attach(session_id) as stream:
        assert stream.status == 101
        gate.open()
        assert stream.output() == (b"now\n", b"")


# -- the end ----------------------------------------------------------------------------------------------------------


def test_the_end_of_input_at_the_takeover(raw: RawApi, container: TestContainer) -> None:
    session_id = raw.create_attached(container.id, "sh", "-c", "cat; echo late")
    with raw.attach(session_id) as stream:
        stream.half_close()
        assert stream.output() == (b"late\n", b"")


def test_the_end_of_input_in_the_midst_of_output(raw: RawApi, container: TestContainer, gate: Gate) -> None:
    script = f"echo first; cat; {Gate.WAIT}; head -c 1000000 /dev/zero; echo late >&2; exit 4"
    session_id = raw.create_attached(container.id, "sh", "-c", script)
    with raw.attach(session_id) as stream:
        assert stream.output_until(b"first\n") == b"first\n"
        stream.send(b"typed")
        stream.half_close()
        assert stream.output_until(b"typed") == b"typed"
        gate.open()
        assert stream.output() == (bytes(1_000_000), b"late\n")
    assert raw.inspect(session_id)["ExitCode"] == 4


def test_the_exit_code_is_there_when_the_stream_ends(raw: RawApi, container: TestContainer) -> None:
    """Asked over and over, because this is a race that a service can lose."""
    for code in range(50):
        assert raw.pipe(container.id, "sh", "-c", f"echo x; exit {code}").exit_code == code


def test_the_client_that_never_half_closes(raw: RawApi, container: TestContainer) -> None:
    """docker-py does not: without AttachStdin, or once the process has ended, nothing waits for it."""
    session_id = raw.create_attached(container.id, "echo", "hello")
    with raw.attach(session_id) as stream:
        assert stream.output() == (b"hello\n", b"")


def test_a_grandchild_that_holds_the_output_is_not_waited_for(
    raw: RawApi, new_container: Callable[[], TestContainer]
) -> None:
    container = new_container()
    began = time.monotonic()
    done = raw.pipe(container.id, "sh", "-c", "(sleep 300; echo late) & echo out; echo err >&2; exit 5")
    assert (done.stdout, done.stderr, done.exit_code) == (b"out\n", b"err\n", 5)
    assert time.monotonic() - began < 10


def test_what_a_grandchild_says_at_once_is_not_lost(raw: RawApi, container: TestContainer) -> None:
    """It writes after its parent's end, and ends within the time that a drain takes."""
    script = "(while kill -0 $$ 2>/dev/null; do :; done; echo from the grandchild) & exit 6"
    done = raw.pipe(container.id, "sh", "-c", script)
    assert (done.stdout, done.stderr, done.exit_code) == (b"from the grandchild\n", b"", 6)


# -- clients that go --------------------------------------------------------------------------------------------------


def close_in_order(connection: Connection) -> None:
    connection.socket.shutdown(socket.SHUT_RDWR)
    connection.close()


def close_with_output_unread(connection: Connection) -> None:
    """The kernel makes this a reset (unix(7): ECONNRESET)."""
    connection.close()


@pytest.mark.parametrize("leave", [close_in_order, close_with_output_unread])
@pytest.mark.parametrize("tty", [False, True])
def test_a_client_that_vanishes_in_the_midst_of_output(
    raw: RawApi, container: TestContainer, gate: Gate, leave: Callable[[Connection], None], tty: bool
) -> None:
    """The process does not notice: 20 MB go nowhere, and its exit code is kept."""
    witness = container.rootfs / "tmp/witness"
    zeros = "head -c {} /dev/zero"
    script = f"{zeros.format(300_000)}; {Gate.WAIT}; {zeros.format(20_000_000)} && echo lived >/tmp/witness; exit 7"
    session_id = raw.create_attached(container.id, "sh", "-c", script, Tty=tty)
    stream = raw.attach(session_id, Tty=tty)
    stream.output_until(b"\0")
    leave(stream.connection)
    gate.open()
    assert raw.ended(session_id) == 7
    assert witness.read_text() == "lived\n"
    witness.unlink()
    found = raw.inspect(session_id)
    assert (found["Running"], found["ExitCode"]) == (False, 7)


def test_a_client_that_vanishes_ends_the_input(raw: RawApi, container: TestContainer) -> None:
    session_id = raw.create_attached(container.id, "sh", "-c", "echo ready; cat >/dev/null; exit 8")
    stream = raw.attach(session_id)
    assert stream.output_until(b"ready\n") == b"ready\n"
    stream.close()
    assert raw.ended(session_id) == 8


def test_a_client_that_vanishes_before_the_answer(raw: RawApi, container: TestContainer) -> None:
    """It either ran, without anybody, or never started; and the service goes on."""
    session_id = raw.create_attached(container.id, "sh", "-c", "exit 9")
    with raw.connect() as connection:
        connection.send(start_bytes(session_id))
    assert raw.ended(session_id) in (9, 128)
    assert raw.pipe(container.id, "echo", "next").stdout == b"next\n"


def test_a_client_that_vanishes_with_its_input_stuck(
    raw: RawApi, container: TestContainer, gate: Gate, block: bytes
) -> None:
    session_id = raw.create_attached(container.id, "sh", "-c", f"{Gate.WAIT}; cat >/dev/null; exit 10")
    stream = raw.attach(session_id)
    assert stream.connection.send_until_blocked(block, patience=PATIENCE) < len(block)
    stream.close()
    gate.open()
    assert raw.ended(session_id) == 10


# -- /dev/stdout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["", "app", "4321"])
@pytest.mark.parametrize("tty", [False, True])
def test_the_devices_of_the_streams_are_writable(
    raw: RawApi, container: TestContainer, user: str, tty: bool, request: pytest.FixtureRequest
) -> None:
    """moby#31243: a program that logs to /dev/stdout and is not root."""
    if container.host.name == "crun" and tty and user:
        reason = "crun 1.8 gives pipes to the user of an exec, but not the terminal"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=False))
    script = "echo out >/dev/stdout && echo err >/dev/stderr && read x </dev/stdin && echo $x"
    session_id = raw.create_attached(container.id, "sh", "-c", script, User=user, Tty=tty)
    with raw.attach(session_id, Tty=tty, stdin=b"in\n") as stream:
        stdout, stderr = stream.output()
    assert raw.inspect(session_id)["ExitCode"] == 0
    if tty:
        assert stdout.replace(b"\r", b"").endswith(b"in\n")
    else:
        assert (stdout, stderr) == (b"out\nin\n", b"err\n")
