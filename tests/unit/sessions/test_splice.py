"""Much output and much input: moved by the kernel or copied, the bytes are the same, and so is all around them."""

import asyncio
import contextlib
import errno
import os
import random
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import hypothesis
import hypothesis.strategies as st
import pytest

from execgate.http.hijack import HijackedStream, OpenStreams, StreamState
from execgate.http.takeover import restore
from execgate.model.session import ExitSource, ExitStatus
from execgate.runtime.readiness import Descriptor
from execgate.runtime.streams import BULK_PIPE_SIZE, ExecStreams, PipeInput, PipeOutput, buffered
from execgate.sessions.backlog import MemoryBacklog
from execgate.sessions.pump import Departure, Feeder, Pump, Stdin
from execgate.wire.stdcopy import STDERR, STDOUT, Demultiplexer

BOTH = frozenset({STDOUT, STDERR})
SOON = 20.0
"""Seconds within which a test is over, or has failed."""
MUCH = 8_000_000

Splice = Callable[..., int]


class Spliced:
    """Counts what the kernel moves, and refuses it if told to."""

    def __init__(self, splice: Splice) -> None:
        self._splice = splice
        self.refuse: int | None = None
        self.calls = 0
        self.moved = 0

    def __call__(self, *args: int, **options: int) -> int:
        self.calls += 1
        if self.refuse is not None:
            raise OSError(self.refuse, os.strerror(self.refuse))
        moved = self._splice(*args, **options)
        self.moved += moved
        return moved


@pytest.fixture
def spliced(monkeypatch: pytest.MonkeyPatch) -> Spliced:
    counter = Spliced(os.splice)
    monkeypatch.setattr(os, "splice", counter)
    return counter


@pytest.fixture(params=["moved", "refused", "copied"])
def path(request: pytest.FixtureRequest, spliced: Spliced) -> str:
    """Which way the bytes go: the kernel moves them, or refuses to, or there is somebody who watches."""
    if request.param == "refused":
        spliced.refuse = errno.EINVAL
    return str(request.param)


class Session:
    """A process's ends of its pipes, a client's end of its connection, and all that is between them."""

    def __init__(self, family: int = socket.AF_UNIX, *, multiplexed: bool = True) -> None:
        self.backlog = MemoryBacklog()
        self.streams = OpenStreams()
        self.departed: list[Departure] = []
        self.exited: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()
        pipes = [os.pipe() for _ in range(3)]
        self.process = [pipes[0][0], pipes[1][1], pipes[2][1]]  # its stdin, stdout, stderr
        self._ends = [pipes[0][1], pipes[1][0], pipes[2][0]]
        ours, self.peer = _pair(family)
        state = StreamState(dialect="docker", multiplexed=multiplexed, unsent=b"", head=None, unread=b"", eof=False)
        self.client = restore(ours.detach(), state, self.streams)
        self._open(b"")

    def _open(self, rest: bytes) -> None:
        stdin, stdout, stderr = (Descriptor(fd) for fd in self._ends)
        self.pipes = ExecStreams([PipeOutput(stdout, STDOUT), PipeOutput(stderr, STDERR)], PipeInput(stdin))
        self.stdin = Stdin(self.pipes.input)
        self.pump = Pump(self.pipes, self.stdin, self.backlog, captured=BOTH)
        self.feeder = Feeder(self.client, self.stdin, b"", rest=rest)
        self.pump.join(self.client, self.feeder, wanted=BOTH, left=self.departed.append)
        self.task = asyncio.create_task(self.pump.run(self.exited, drain=0.0))

    async def hand_over(self) -> None:
        """Stop, and go on with what was handed over, as the next service does."""
        self.stdin.freeze()
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        handed = self.client.hand_over()
        assert handed is not None
        self.client.abandon()
        self.client = restore(*handed, self.streams)
        self._ends = [os.dup(fd) for fd in self._ends]
        self.pipes.close()
        self._open(self.feeder.rest)

    def exit(self) -> None:
        self.exited.set_result(ExitStatus(0, ExitSource.SYNC_PIPE))

    async def end(self) -> None:
        """The process has ended, and its pipes with it; wait until everything is delivered."""
        for fd in self.process[1:]:
            with contextlib.suppress(OSError):
                os.close(fd)
        if not self.exited.done():
            self.exit()
        await self.task
        await self.client.finish()

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.client.abandon()
        self.pipes.close()
        self.peer.close()
        for fd in self.process:
            with contextlib.suppress(OSError):
                os.close(fd)
        await self.client.wait_closed()


def _pair(family: int) -> tuple[socket.socket, socket.socket]:
    if family == socket.AF_UNIX:
        return socket.socketpair()
    client = socket.socket()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client.connect(listener.getsockname())
        return listener.accept()[0], client


@contextlib.asynccontextmanager
async def session(family: int = socket.AF_UNIX, *, multiplexed: bool = True) -> AsyncIterator[Session]:
    one = Session(family, multiplexed=multiplexed)
    try:
        async with asyncio.timeout(SOON):
            yield one
    finally:
        await one.close()


@contextlib.contextmanager
def watched(one: Session, path: str) -> Iterator[None]:
    with one.backlog.reader() if path == "copied" else contextlib.nullcontext():
        yield


def bulk(seed: int, size: int = MUCH) -> bytes:
    return random.Random(seed).randbytes(size)


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def read_all(connection: socket.socket, most: int = 1 << 18, *, seed: int | None = None) -> bytes:
    """Read to the end; in pieces of any size, if a seed is given."""
    connection.setblocking(True)
    dice = random.Random(seed)
    pieces = []
    while piece := connection.recv(most if seed is None else dice.choice([1, 7, 5000, most])):
        pieces.append(piece)
    return b"".join(pieces)


def outputs(data: bytes) -> dict[int, bytes]:
    """Take a multiplexed stream apart, which has to be whole."""
    demultiplexer = Demultiplexer()
    found = {STDOUT: bytearray(), STDERR: bytearray()}
    for stream, piece in demultiplexer.feed(data):
        found[stream] += piece
    assert demultiplexer.at_boundary
    return {stream: bytes(content) for stream, content in found.items()}


in_thread = asyncio.to_thread


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
@pytest.mark.parametrize("multiplexed", [True, False])
async def test_both_outputs(path: str, spliced: Spliced, family: int, multiplexed: bool) -> None:
    async with session(family, multiplexed=multiplexed) as one:
        with watched(one, path):
            reading = asyncio.create_task(in_thread(read_all, one.peer, seed=1))
            if multiplexed:
                contents = {STDOUT: bulk(1), STDERR: bulk(2)}
                await asyncio.gather(*[in_thread(write_all, one.process[of], data) for of, data in contents.items()])
            else:
                contents = {STDOUT: bulk(1)}
                await in_thread(write_all, one.process[STDOUT], contents[STDOUT])
            await one.end()
            found = await reading
        assert (outputs(found) if multiplexed else {STDOUT: found}) == contents
        assert one.pump.transferred.stdout == MUCH
        assert one.backlog.end == sum(map(len, contents.values()))
    if path == "moved":
        assert spliced.moved > 0
    elif path == "refused":
        assert spliced.calls <= len(contents)  # it is not tried again and again


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
async def test_input(path: str, spliced: Spliced, family: int) -> None:
    data = bulk(3)
    async with session(family) as one:
        one.peer.setblocking(True)

        def send() -> None:
            one.peer.sendall(data)
            one.peer.shutdown(socket.SHUT_WR)

        def receive() -> bytes:
            pieces = []
            while piece := os.read(one.process[0], 100_000):
                pieces.append(piece)
            return b"".join(pieces)

        _, received = await asyncio.gather(in_thread(send), in_thread(receive))
        assert received == data
        assert one.pump.transferred.stdin == MUCH
    if path != "refused":
        assert spliced.moved > 0
    else:
        assert spliced.calls <= 1


async def test_little_is_not_worth_a_splice(spliced: Spliced) -> None:
    async with session() as one:
        for _ in range(50):
            os.write(one.process[STDOUT], b"x" * 1000)
            await asyncio.sleep(0)
        reading = asyncio.create_task(in_thread(read_all, one.peer))
        await one.end()
        assert outputs(await reading)[STDOUT] == b"x" * 50_000
    assert not spliced.calls


async def test_a_client_that_does_not_read_costs_nothing(spliced: Spliced) -> None:
    """The process is stopped by its full pipe, and nobody spins."""
    async with session() as one:
        writing = asyncio.create_task(in_thread(write_all, one.process[STDOUT], bulk(4)))
        while not spliced.calls:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # in which one who spins would call thousands of times
        before = spliced.calls
        await asyncio.sleep(0.1)
        assert spliced.calls - before <= 1
        assert not writing.done()
        reading = asyncio.create_task(in_thread(read_all, one.peer))
        await writing
        await one.end()
        assert outputs(await reading)[STDOUT] == bulk(4)


async def test_input_that_nobody_reads_costs_nothing(spliced: Spliced) -> None:
    async with session() as one:
        one.peer.setblocking(True)
        sending = asyncio.create_task(in_thread(one.peer.sendall, bulk(5)))
        await asyncio.sleep(0.2)  # everything is full by then, and whoever spins does
        before = spliced.calls
        await asyncio.sleep(0.1)
        assert spliced.calls - before <= 1
        assert not sending.done()
        received = 0
        while received < MUCH:
            received += len(await in_thread(os.read, one.process[0], 1 << 20))
        await sending


async def test_urgent_data_does_not_make_it_spin(spliced: Spliced) -> None:
    """TCP's out-of-band byte is counted as waiting, and is not in the stream."""
    async with session(socket.AF_INET) as one:
        one.peer.setblocking(True)
        sending = asyncio.create_task(in_thread(one.peer.sendall, b"a" * 300_000))
        received = b""
        while len(received) < 100_000:
            received += await in_thread(os.read, one.process[0], 1 << 20)
        await sending
        await in_thread(one.peer.send, b"!", socket.MSG_OOB)
        await in_thread(one.peer.sendall, b"b" * 300_000)
        one.peer.shutdown(socket.SHUT_WR)
        while piece := await in_thread(os.read, one.process[0], 1 << 20):
            received += piece
        assert received.replace(b"!", b"") == b"a" * 300_000 + b"b" * 300_000
        assert spliced.calls < 500


async def test_a_client_that_goes_in_the_midst_of_a_frame(path: str) -> None:
    """What was promised to it is read, and thrown away, and counted once; the process goes on."""
    async with session() as one:
        with watched(one, path):
            writing = asyncio.create_task(in_thread(write_all, one.process[STDOUT], bulk(6)))
            await in_thread(one.peer.recv, 1 << 18)
            one.peer.close()
            await writing
            await one.end()
        assert one.departed == [Departure.GONE]
        assert one.pump.transferred.stdout == MUCH
        assert one.backlog.end == MUCH


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
async def test_the_last_input_of_a_client_that_goes_while_output_flows(path: str, family: int) -> None:
    """Its absence shows in the output first. What it had sent is input all the same, and then it has left."""
    data = bulk(14, 150_000)
    async with session(family) as one:
        with watched(one, path):
            writing = asyncio.create_task(in_thread(write_all, one.process[STDOUT], bulk(15)))
            one.peer.setblocking(True)
            await in_thread(one.peer.sendall, data)
            await asyncio.sleep(0.05)  # output waits for a client that does not read
            one.peer.close()
            await writing
            received = b""
            while len(received) < len(data):
                received += await in_thread(os.read, one.process[0], 5_000)
            assert received == data
            async with asyncio.timeout(1):
                while not one.departed:
                    await asyncio.sleep(0.01)
            assert one.departed == [Departure.GONE]
            await one.end()


async def test_the_last_input_is_not_waited_for_for_ever(path: str) -> None:
    async with session() as one:
        with watched(one, path):
            one.peer.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    one.peer.send(bytes(100_000))
                    await asyncio.sleep(0)
            one.peer.close()
            await one.client.wait_closed()
            one.pump.lose()
            while not one.departed:
                await asyncio.sleep(0.01)
            assert one.departed == [Departure.GONE]
            await one.end()


async def test_a_cut_in_the_midst_of_a_frame(path: str) -> None:
    """A background child holds the output: what is there when the process ends is delivered, and nothing after it."""
    first = bulk(7, BULK_PIPE_SIZE)
    async with session() as one:
        with watched(one, path):
            await in_thread(write_all, one.process[STDOUT], bulk(8, 200_000))  # so that it becomes a busy pipe
            writing = asyncio.create_task(in_thread(write_all, one.process[STDOUT], first))
            await writing  # all of it is in the pipe, or on its way
            one.exit()
            await asyncio.sleep(0.05)
            os.set_blocking(one.process[STDOUT], False)
            with contextlib.suppress(BlockingIOError):
                os.write(one.process[STDOUT], b"too late" * 1000)
            reading = asyncio.create_task(in_thread(read_all, one.peer))
            await one.task
            await one.client.finish()
            assert outputs(await reading)[STDOUT] == bulk(8, 200_000) + first


async def test_a_watcher_sees_all_that_comes_after_it(spliced: Spliced) -> None:
    async with session() as one:
        reading = asyncio.create_task(in_thread(read_all, one.peer))
        await in_thread(write_all, one.process[STDOUT], bulk(9))
        while one.backlog.end < MUCH:
            await asyncio.sleep(0.001)
        with one.backlog.reader():
            begin = one.backlog.end
            await in_thread(write_all, one.process[STDOUT], bulk(10, 500_000))
            seen = b""
            while len(seen) < 500_000:
                seen += b"".join([chunk.data for chunk in await one.backlog.read(begin + len(seen))])
            assert seen == bulk(10, 500_000)
            moved = spliced.moved
        await in_thread(write_all, one.process[STDOUT], bulk(11))
        await one.end()
        assert outputs(await reading)[STDOUT] == bulk(9) + bulk(10, 500_000) + bulk(11)
        assert spliced.moved > moved


async def test_one_busy_stream_does_not_starve_another() -> None:
    """Between two pieces of it everybody else has a turn."""
    async with session() as busy, session() as quiet:
        reading = asyncio.create_task(in_thread(read_all, busy.peer))
        writing = asyncio.create_task(in_thread(write_all, busy.process[STDOUT], bulk(12, 60_000_000)))
        quiet.peer.setblocking(True)
        echoes = 0
        while not writing.done():
            await in_thread(quiet.peer.sendall, b"?")
            assert await in_thread(os.read, quiet.process[0], 10) == b"?"
            echoes += 1
        await busy.end()
        await reading
        assert echoes > 20


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 2**32),
    pauses=st.lists(st.floats(0, 0.004), min_size=1, max_size=4),
    multiplexed=st.booleans(),
    most=st.sampled_from([3000, 1 << 16, 1 << 20]),
)
async def test_handed_over_in_the_midst(seed: int, pauses: list[float], multiplexed: bool, most: int) -> None:
    """Both directions busy, whatever the moment: no byte is lost, none comes twice."""
    out, into = bulk(seed), bulk(seed + 1)
    async with session(multiplexed=multiplexed) as one:
        one.peer.setblocking(True)
        received: list[bytes] = []

        def receive() -> None:
            left = MUCH
            while left:
                received.append(os.read(one.process[0], most))
                left -= len(received[-1])

        reading = asyncio.create_task(in_thread(read_all, one.peer, most))
        tasks = [
            asyncio.create_task(in_thread(write_all, one.process[STDOUT], out)),
            asyncio.create_task(in_thread(one.peer.sendall, into)),
            asyncio.create_task(in_thread(receive)),
        ]
        for pause in pauses:
            await asyncio.sleep(pause)
            await one.hand_over()
        await asyncio.gather(*tasks)
        await one.end()
        found = await reading
        assert (outputs(found)[STDOUT] if multiplexed else found) == out
        assert b"".join(received) == into


async def test_promised_output_is_taken_along(spliced: Spliced) -> None:
    """A frame whose client has not read it: the rest of it leaves the pipe with the connection, not before."""
    async with session() as one:
        writing = asyncio.create_task(in_thread(write_all, one.process[STDOUT], bulk(13)))
        while not spliced.moved:
            await asyncio.sleep(0.001)
        client: HijackedStream = one.client
        await asyncio.sleep(0.05)
        assert "unsent=0" not in repr(client)
        await one.hand_over()
        reading = asyncio.create_task(in_thread(read_all, one.peer))
        await writing
        await one.end()
        assert outputs(await reading)[STDOUT] == bulk(13)


async def read_back(one: Session) -> None:
    """Write much, and take out of the pipe all that the client has not got, as a process can do with its own pipe."""
    thief = os.open(f"/proc/self/fd/{one.process[STDOUT]}", os.O_RDONLY | os.O_NONBLOCK)
    writing = asyncio.create_task(in_thread(write_all, one.process[STDOUT], bulk(14)))
    while "unsent=0" in repr(one.client):
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)
    taken = 0
    while not writing.done() or buffered(thief):
        with contextlib.suppress(BlockingIOError):
            taken += len(os.read(thief, 1 << 20))
        await asyncio.sleep(0)
    os.close(thief)
    assert taken


async def test_a_process_that_reads_its_own_output(spliced: Spliced) -> None:
    """What was promised to its client does not come: that costs this client its stream, and nobody else anything."""
    async with session() as one:
        await read_back(one)
        await in_thread(read_all, one.peer)
        assert one.departed == [Departure.GONE]
        await in_thread(write_all, one.process[STDOUT], bulk(15))  # the process goes on
        await one.end()
        assert spliced.calls < 1000


async def test_a_process_that_reads_its_own_output_before_a_reload(spliced: Spliced) -> None:
    """All other connections are handed over."""
    async with session() as one:
        await read_back(one)
        one.task.cancel()
        await asyncio.gather(one.task, return_exceptions=True)
        assert one.client.hand_over() is None
        assert await asyncio.wait_for(in_thread(read_all, one.peer), SOON)
