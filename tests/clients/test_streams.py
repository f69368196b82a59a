"""The bytes: every one, in order, in both directions, whatever the client does, and in bounded memory.

The data is random and does not repeat within 16 MiB, so that a hash notices what is lost, doubled or moved.
"""

import asyncio
import contextlib
import hashlib
import os
import random
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from execgate.wire import stdcopy
from support.leaks import resident_bytes
from support.runtimes import TestContainer
from support.service import Service
from support.streams import RawClient, RawStream, answer_on, start_request

pytestmark = pytest.mark.usefixtures("no_leaks")

MIB = 1 << 20
TIMEOUT = 120
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

    async def open(self) -> None:
        """Let go; returns once the process has come to the gate."""
        await asyncio.to_thread(self._path.write_bytes, b"go\n")


@pytest.fixture(autouse=True)
async def in_time() -> AsyncIterator[None]:
    """No test of this file takes minutes; one that hangs is cancelled, and its traceback says where it was."""
    own = asyncio.current_task()

    def cancel_all() -> None:
        for task in asyncio.all_tasks() - {own}:
            task.cancel()

    handle = asyncio.get_running_loop().call_later(TIMEOUT, cancel_all)
    yield
    handle.cancel()


class Hashes:
    """The SHA-256 and the length of each output stream."""

    def __init__(self) -> None:
        self._hashes = {stdcopy.STDOUT: hashlib.sha256(), stdcopy.STDERR: hashlib.sha256()}
        self.sizes = {stdcopy.STDOUT: 0, stdcopy.STDERR: 0}

    async def take(self, stream: RawStream) -> None:
        """Read a stream to its end."""
        async for number, data in stream.pieces():
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


@contextlib.contextmanager
def closing(stream: RawStream) -> Iterator[RawStream]:
    """Hang up at the end of a `with`."""
    try:
        yield stream
    finally:
        stream.close()


# -- every byte -------------------------------------------------------------------------------------------------------


@pytest.mark.soak
async def test_a_gigabyte_through_all_three_streams_at_once(
    raw: RawClient, container: TestContainer, data_file: str, block: bytes
) -> None:
    """1 GiB on each."""
    times = 64
    copies = f"for i in $(seq {times}); do cat {data_file}; done"
    script = f"({copies}) & ({copies}) >&2 & sha256sum >/tmp/stdin.sha256; wait"
    session_id = await raw.create(container.id, "sh", "-c", script)
    hashes = Hashes()
    with closing(await raw.start(session_id)) as stream:

        async def send() -> None:
            for _ in range(times):
                await stream.write(block)
            stream.end_input()

        await asyncio.gather(send(), hashes.take(stream))
    expected = await asyncio.to_thread(repeated_hash, block, times)
    assert hashes.sizes == {1: times * len(block), 2: times * len(block)}
    assert (hashes.of(1), hashes.of(2)) == (expected, expected)
    assert (container.rootfs / "tmp/stdin.sha256").read_text().split()[0] == expected
    assert (await raw.inspect(session_id))["ExitCode"] == 0


async def test_a_million_writes_of_one_byte(
    raw: RawClient, container: TestContainer, data_file: str, block: bytes
) -> None:
    done = await raw.run(container.id, "dd", "bs=1", "count=1000000", f"if={data_file}")
    assert done.stdout == block[:1_000_000]
    assert done.exit_code == 0


async def test_a_million_bytes_of_input_one_by_one(raw: RawClient, container: TestContainer, block: bytes) -> None:
    session_id = await raw.create(container.id, "sha256sum")
    with closing(await raw.start(session_id)) as stream:

        def send() -> None:
            with socket.socket(fileno=os.dup(stream.connection.fileno())) as copy:
                copy.setblocking(True)
                for position in range(1_000_000):
                    copy.send(block[position : position + 1])

        await asyncio.to_thread(send)
        stream.connection.setblocking(False)
        stream.end_input()
        stdout, _ = await stream.output()
    assert stdout.split()[0].decode() == hashlib.sha256(block[:1_000_000]).hexdigest()


async def test_a_reader_of_one_byte_at_a_time(
    raw: RawClient, container: TestContainer, data_file: str, block: bytes
) -> None:
    session_id = await raw.create(container.id, "head", "-c", "30000", data_file)
    received = b""
    with closing(await raw.start(session_id)) as stream:
        while byte := await stream.read(1):
            received += byte
    demultiplexer = stdcopy.Demultiplexer()
    assert b"".join(piece for _, piece in demultiplexer.feed(received)) == block[:30000]
    assert demultiplexer.at_boundary


async def test_all_values_of_a_byte_come_back(raw: RawClient, container: TestContainer) -> None:
    done = await raw.run(container.id, "sh", "-c", "tee /dev/stderr", stdin=EVERY_BYTE * 100)
    assert (done.stdout, done.stderr, done.exit_code) == (EVERY_BYTE * 100, EVERY_BYTE * 100, 0)


async def test_bytes_of_a_raw_terminal_come_back(raw: RawClient, container: TestContainer) -> None:
    """Even those that are detach keys elsewhere: these are set to something that does not occur."""
    data = bytes(reversed(EVERY_BYTE)) * 8
    script = f"stty raw -echo; echo ready; head -c {len(data)}"
    session_id = await raw.create(container.id, "sh", "-c", script, Tty=True, DetachKeys="a,a,a")
    with closing(await raw.start(session_id, tty=True)) as stream:
        before = await stream.output_until(b"ready")
        await stream.write(data)
        stdout, _ = await stream.output()
    # Raw is raw both ways: the line of `echo` ends in a bare newline.
    assert (before + stdout).removeprefix(b"ready\n") == data


async def test_random_pieces_at_random_sizes(raw: RawClient, container: TestContainer, block: bytes) -> None:
    """A dialogue with `cat`: what goes in comes out, however it was cut."""
    sizes = random.Random(3)
    session_id = await raw.create(container.id, "cat")
    hashes = Hashes()
    with closing(await raw.start(session_id)) as stream:

        async def send() -> None:
            position = 0
            while position < len(block):
                size = sizes.choice((1, 7, 4095, 4096, 4097, 65536, 1_000_003))
                await stream.write(block[position : position + size])
                position += size
            stream.end_input()

        await asyncio.gather(send(), hashes.take(stream))
    assert hashes.of(1) == hashlib.sha256(block).hexdigest()


# -- bounded memory ---------------------------------------------------------------------------------------------------


async def test_a_slow_reader_slows_the_process_and_costs_no_memory(
    raw: RawClient, service: Service, container: TestContainer, data_file: str, block: bytes
) -> None:
    """1 KB a second of 112 MiB, and then the rest: it was all there, and none of it in the service."""
    times = 7
    assert (await raw.run(container.id, "cat", data_file)).stdout == block  # what is grown once stays
    before = resident_bytes(service)
    argv = ["sh", "-c", f"exec cat {' '.join([data_file] * times)}"]
    session_id = await raw.create(container.id, *argv)
    received = Hashes()
    with closing(await raw.start(session_id)) as stream:
        taken = b""
        for _ in range(5):
            taken += await stream.read(1024)
            await asyncio.sleep(1)  # this is the slowness, nothing is waited for
            written = process_io((await raw.inspect(session_id))["Pid"])["wchar"]
            assert written - len(taken) <= 4 * MIB
            assert resident_bytes(service) - before <= 16 * MIB
        stream.unread(taken)
        await received.take(stream)
    assert received.sizes[1] == times * len(block)
    assert received.of(1) == repeated_hash(block, times)


async def test_input_that_nobody_reads_is_held_back(
    raw: RawClient, service: Service, container: TestContainer, gate: Gate, block: bytes
) -> None:
    """100 MB: at most 2 MiB of it leave the client before the process reads, and all of it arrives in the end."""
    data = (block * 6)[:100_000_000]
    before = resident_bytes(service)
    session_id = await raw.create(container.id, "sh", "-c", f"{Gate.WAIT}; sha256sum")
    with closing(await raw.start(session_id)) as stream:
        accepted = await send_until_blocked(stream.connection, data)
        assert 64 * 1024 <= accepted <= 2 * MIB
        assert resident_bytes(service) - before <= 16 * MIB
        await gate.open()
        await stream.write(data[accepted:])
        stream.end_input()
        stdout, _ = await stream.output()
    assert stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()


async def send_until_blocked(connection: socket.socket, data: bytes, *, patience: float = 2.0) -> int:
    """Send until nothing more is accepted for `patience` seconds, and return how many bytes were."""
    sent = 0
    while sent < len(data):
        try:
            sent += connection.send(data[sent : sent + MIB])
        except BlockingIOError:
            if not await becomes_writable(connection, patience):
                break
    return sent


async def becomes_writable(connection: socket.socket, patience: float) -> bool:
    """Wait for room in a socket, and return whether there was any within `patience` seconds."""
    loop = asyncio.get_running_loop()
    room = asyncio.Event()
    loop.add_writer(connection.fileno(), room.set)
    try:
        async with asyncio.timeout(patience):
            return await room.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_writer(connection.fileno())


async def test_a_process_that_ends_frees_the_client_that_it_did_not_read(
    raw: RawClient, container: TestContainer, gate: Gate, block: bytes
) -> None:
    """The client is told of the end, with the exit code, while it is still stuck in its input."""
    session_id = await raw.create(container.id, "sh", "-c", f"{Gate.WAIT}; echo enough; exit 3")
    with closing(await raw.start(session_id)) as stream:
        await send_until_blocked(stream.connection, block)
        await gate.open()
        assert await stream.output() == (b"enough\n", b"")
    assert (await raw.inspect(session_id))["ExitCode"] == 3


async def test_one_stream_that_is_full_does_not_hold_the_others(
    raw: RawClient, container: TestContainer, gate: Gate, block: bytes
) -> None:
    """Input is stuck, output flows."""
    session_id = await raw.create(container.id, "sh", "-c", f"head -c 5000000 /dev/zero; {Gate.WAIT}; exec cat")
    with closing(await raw.start(session_id)) as stream:
        accepted = await send_until_blocked(stream.connection, block)
        assert accepted < len(block)
        hashes = Hashes()

        async def rest() -> None:
            await gate.open()
            await stream.write(block[accepted:])
            stream.end_input()

        await asyncio.gather(hashes.take(stream), rest())
    assert hashes.of(1) == hashlib.sha256(bytes(5_000_000) + block).hexdigest()


# -- the beginning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upgrade", [True, False])
@pytest.mark.parametrize("size", [0, 1, 5, 70_000])
async def test_input_and_its_end_together_with_the_request(
    raw: RawClient, container: TestContainer, block: bytes, size: int, upgrade: bool
) -> None:
    session_id = await raw.create(container.id, "sh", "-c", "cat; echo late >&2")
    with closing(await raw.start(session_id, stdin=block[:size], end=True, upgrade=upgrade)) as stream:
        assert stream.status == (101 if upgrade else 200)
        assert await stream.output() == (block[:size], b"late\n")
    assert (await raw.inspect(session_id))["ExitCode"] == 0


async def test_input_that_looks_like_http_is_input(raw: RawClient, container: TestContainer) -> None:
    request = b"POST /containers/x/exec HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    assert (await raw.run(container.id, "cat", stdin=request * 3)).stdout == request * 3


@pytest.mark.parametrize("upgrade", [True, False])
async def test_a_request_in_pieces_with_input_behind_it(
    raw: RawClient, container: TestContainer, upgrade: bool
) -> None:
    """Each byte in a write of its own, the last of the request and the first of the input included."""
    session_id = await raw.create(container.id, "cat")
    connection = await raw.connect()
    loop = asyncio.get_running_loop()
    for byte in start_request(session_id, upgrade=upgrade) + b"input":
        await loop.sock_sendall(connection, bytes([byte]))
    connection.shutdown(socket.SHUT_WR)
    with closing(await answer_on(connection, multiplexed=True)) as stream:
        assert await stream.output() == (b"input", b"")


async def test_much_input_before_the_head_of_the_answer(raw: RawClient, container: TestContainer, block: bytes) -> None:
    """A client that does not wait: everything is under way before it reads the first byte of the answer."""
    session_id = await raw.create(container.id, "sha256sum")
    connection = await raw.connect()
    loop = asyncio.get_running_loop()
    sending = asyncio.ensure_future(loop.sock_sendall(connection, start_request(session_id) + block))
    with closing(await answer_on(connection, multiplexed=True)) as stream:
        await sending
        stream.end_input()
        stdout, _ = await stream.output()
    assert stdout.split()[0].decode() == hashlib.sha256(block).hexdigest()


async def test_the_head_is_there_before_the_process_has_said_anything(
    raw: RawClient, container: TestContainer, gate: Gate
) -> None:
    session_id = await raw.create(container.id, "sh", "-c", f"{Gate.WAIT}; echo now")
    with closing(await raw.start(session_id)) as stream:
        assert stream.status == 101
        await gate.open()
        assert await stream.output() == (b"now\n", b"")


# -- the end ----------------------------------------------------------------------------------------------------------


async def test_the_end_of_input_at_the_takeover(raw: RawClient, container: TestContainer) -> None:
    session_id = await raw.create(container.id, "sh", "-c", "cat; echo late")
    with closing(await raw.start(session_id)) as stream:
        stream.end_input()
        assert await stream.output() == (b"late\n", b"")


async def test_the_end_of_input_in_the_midst_of_output(raw: RawClient, container: TestContainer, gate: Gate) -> None:
    script = f"echo first; cat; {Gate.WAIT}; head -c 1000000 /dev/zero; echo late >&2; exit 4"
    session_id = await raw.create(container.id, "sh", "-c", script)
    with closing(await raw.start(session_id)) as stream:
        assert await stream.output_until(b"first\n") == b"first\n"
        await stream.write(b"typed")
        stream.end_input()
        assert await stream.output_until(b"typed") == b"typed"
        await gate.open()
        assert await stream.output() == (bytes(1_000_000), b"late\n")
    assert (await raw.inspect(session_id))["ExitCode"] == 4


async def test_the_exit_code_is_there_when_the_stream_ends(raw: RawClient, container: TestContainer) -> None:
    """Asked over and over, because this is a race that a service can lose."""
    for code in range(50):
        assert (await raw.run(container.id, "sh", "-c", f"echo x; exit {code}")).exit_code == code


async def test_the_client_that_never_half_closes(raw: RawClient, container: TestContainer) -> None:
    """docker-py does not: without AttachStdin, or once the process has ended, nothing waits for it."""
    session_id = await raw.create(container.id, "echo", "hello")
    with closing(await raw.start(session_id)) as stream:
        assert await stream.output() == (b"hello\n", b"")


async def test_a_grandchild_that_holds_the_output_is_not_waited_for(
    raw: RawClient, new_container: Callable[[], TestContainer]
) -> None:
    container = new_container()
    loop = asyncio.get_running_loop()
    began = loop.time()
    done = await raw.run(container.id, "sh", "-c", "(sleep 300; echo late) & echo out; echo err >&2; exit 5")
    assert (done.stdout, done.stderr, done.exit_code) == (b"out\n", b"err\n", 5)
    assert loop.time() - began < 10


async def test_what_a_grandchild_says_at_once_is_not_lost(raw: RawClient, container: TestContainer) -> None:
    """It writes after its parent's end, and ends within the time that a drain takes."""
    script = "(while kill -0 $$ 2>/dev/null; do :; done; echo from the grandchild) & exit 6"
    done = await raw.run(container.id, "sh", "-c", script)
    assert (done.stdout, done.stderr, done.exit_code) == (b"from the grandchild\n", b"", 6)


# -- clients that go --------------------------------------------------------------------------------------------------


def close_in_order(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def close_with_output_unread(connection: socket.socket) -> None:
    """The kernel makes this a reset (unix(7): ECONNRESET)."""
    connection.close()


@pytest.mark.parametrize("leave", [close_in_order, close_with_output_unread])
@pytest.mark.parametrize("tty", [False, True])
async def test_a_client_that_vanishes_in_the_midst_of_output(
    raw: RawClient, container: TestContainer, gate: Gate, leave: Callable[[socket.socket], None], tty: bool
) -> None:
    """The process does not notice: 20 MB go nowhere, and its exit code is kept."""
    witness = container.rootfs / "tmp/witness"
    zeros = "head -c {} /dev/zero"
    script = f"{zeros.format(300_000)}; {Gate.WAIT}; {zeros.format(20_000_000)} && echo lived >/tmp/witness; exit 7"
    session_id = await raw.create(container.id, "sh", "-c", script, Tty=tty)
    stream = await raw.start(session_id, tty=tty)
    await stream.output_until(b"\0")
    leave(stream.connection)
    await gate.open()
    assert await raw.ended(session_id) == 7
    assert witness.read_text() == "lived\n"
    witness.unlink()
    found = await raw.inspect(session_id)
    assert (found["Running"], found["ExitCode"]) == (False, 7)


async def test_a_client_that_vanishes_ends_the_input(raw: RawClient, container: TestContainer) -> None:
    session_id = await raw.create(container.id, "sh", "-c", "echo ready; cat >/dev/null; exit 8")
    stream = await raw.start(session_id)
    assert await stream.output_until(b"ready\n") == b"ready\n"
    stream.close()
    assert await raw.ended(session_id) == 8


async def test_a_client_that_vanishes_before_the_answer(raw: RawClient, container: TestContainer) -> None:
    """It either ran, without anybody, or never started; and the service goes on."""
    session_id = await raw.create(container.id, "sh", "-c", "exit 9")
    connection = await raw.connect()
    await asyncio.get_running_loop().sock_sendall(connection, start_request(session_id))
    connection.close()
    assert await raw.ended(session_id) in (9, 128)
    assert (await raw.run(container.id, "echo", "next")).stdout == b"next\n"


async def test_a_client_that_vanishes_with_its_input_stuck(
    raw: RawClient, container: TestContainer, gate: Gate, block: bytes
) -> None:
    session_id = await raw.create(container.id, "sh", "-c", f"{Gate.WAIT}; cat >/dev/null; exit 10")
    stream = await raw.start(session_id)
    assert await send_until_blocked(stream.connection, block) < len(block)
    stream.close()
    await gate.open()
    assert await raw.ended(session_id) == 10


# -- /dev/stdout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["", "app", "4321"])
@pytest.mark.parametrize("tty", [False, True])
async def test_the_devices_of_the_streams_are_writable(
    raw: RawClient, container: TestContainer, user: str, tty: bool, request: pytest.FixtureRequest
) -> None:
    """moby#31243: a program that logs to /dev/stdout and is not root."""
    if container.host.name == "crun" and tty and user:
        reason = "crun 1.8 gives pipes to the user of an exec, but not the terminal"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=False))
    script = "echo out >/dev/stdout && echo err >/dev/stderr && read x </dev/stdin && echo $x"
    session_id = await raw.create(container.id, "sh", "-c", script, User=user, Tty=tty)
    with closing(await raw.start(session_id, tty=tty, stdin=b"in\n")) as stream:
        stdout, stderr = await stream.output()
    assert (await raw.inspect(session_id))["ExitCode"] == 0
    if tty:
        assert stdout.replace(b"\r", b"").endswith(b"in\n")
    else:
        assert (stdout, stderr) == (b"out\nin\n", b"err\n")
