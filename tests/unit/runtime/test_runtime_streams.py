"""Streams over real pipes and sockets, on the event loop of this run."""

import asyncio
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from execgate.runtime.readiness import Descriptor, ReadWaiter, WriteWaiter, readable
from execgate.runtime.streams import READ_SIZE, AttachInput, AttachOutput, InputClosed, PipeInput, PipeOutput, buffered

SOON = 5.0


class Pipe:
    """A pipe whose ends are closed at the end of the test, whoever had them."""

    def __init__(self) -> None:
        read, write = os.pipe2(os.O_CLOEXEC)
        self.read, self.write = Descriptor(read), Descriptor(write)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.read.close()
    made.write.close()


@pytest.fixture
def attach() -> Iterator[tuple[socket.socket, socket.socket]]:
    """(ours, conmon's): a SEQPACKET pair."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


async def everything(output: PipeOutput | AttachOutput) -> bytes:
    data = b""
    async with asyncio.timeout(SOON):
        while (chunk := await output.read()) is not None:
            assert chunk[1], "an empty chunk"
            assert len(chunk[1]) <= READ_SIZE
            data += chunk[1]
    return data


async def test_a_pipe_to_its_end(pipe: Pipe) -> None:
    output = PipeOutput(pipe.read, 2)
    reading = asyncio.create_task(output.read())
    await asyncio.sleep(0)
    os.write(pipe.write.fileno(), b"one")
    assert await asyncio.wait_for(reading, SOON) == (2, b"one")
    os.write(pipe.write.fileno(), b"two")
    pipe.write.close()
    assert await everything(output) == b"two"
    assert await output.read() is None


async def test_much_through_a_pipe(pipe: Pipe) -> None:
    data = os.urandom(8 << 20)
    output, stdin = PipeOutput(pipe.read, 1), PipeInput(pipe.write)

    async def write() -> None:
        await stdin.write(data)
        stdin.close()

    writing = asyncio.create_task(write())
    assert await everything(output) == data
    await writing


async def test_a_read_that_is_cancelled_loses_nothing(pipe: Pipe) -> None:
    """Large reads make way for others, and a service may stop just then."""
    output, data = PipeOutput(pipe.read, 1), os.urandom(60_000)
    os.set_blocking(pipe.write.fileno(), False)
    for _ in range(3):
        os.write(pipe.write.fileno(), b"x" * 65536)
        chunk = await output.read()
        assert chunk is not None
        assert len(chunk[1]) == 65536
        os.write(pipe.write.fileno(), data)
        reading = asyncio.create_task(output.read())
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        chunk = await output.read()
        assert chunk is not None
        assert chunk[1] == data


async def test_a_cut_delivers_what_is_there_and_no_more(pipe: Pipe) -> None:
    output = PipeOutput(pipe.read, 1)
    os.write(pipe.write.fileno(), b"x" * 50_000)
    output.cut()
    os.write(pipe.write.fileno(), b"late" * 1000)
    assert await everything(output) == b"x" * 50_000
    output.cut()
    assert await output.read() is None


async def test_a_cut_ends_a_read_that_waits(pipe: Pipe) -> None:
    output = PipeOutput(pipe.read, 1)
    reading = asyncio.create_task(output.read())
    await asyncio.sleep(0)
    output.cut()
    assert await asyncio.wait_for(reading, SOON) is None


async def test_a_cut_does_not_wait_for_what_somebody_else_has_read(pipe: Pipe) -> None:
    """Whoever may write to a pipe can open it and read it back; and here the writer stays."""
    output = PipeOutput(pipe.read, 1)
    os.write(pipe.write.fileno(), b"x" * 50_000)
    output.cut()
    assert len(os.read(pipe.read.fileno(), 20_000)) == 20_000
    assert await everything(output) == b"x" * 30_000


async def test_a_cut_after_the_close(pipe: Pipe) -> None:
    output = PipeOutput(pipe.read, 1)
    output.close()
    output.close()
    output.cut()


async def test_stdin_without_a_reader(pipe: Pipe) -> None:
    stdin = PipeInput(pipe.write)
    pipe.read.close()
    for _ in range(2):
        with pytest.raises(InputClosed):
            await stdin.write(b"x")
    stdin.close()


async def test_a_reader_that_leaves_while_stdin_waits(pipe: Pipe) -> None:
    stdin = PipeInput(pipe.write)
    writing = asyncio.create_task(stdin.write(b"x" * (4 << 20)))
    await asyncio.sleep(0.01)
    assert not writing.done()
    pipe.read.close()
    with pytest.raises(InputClosed):
        await asyncio.wait_for(writing, SOON)


async def test_a_write_that_is_cancelled_leaves_the_loop_clean(pipe: Pipe) -> None:
    stdin = PipeInput(pipe.write)
    writing = asyncio.create_task(stdin.write(b"x" * (4 << 20)))
    await asyncio.sleep(0.01)
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    stdin.close()
    # Its number comes back with another file behind it: nobody may still watch the old one.
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        assert not asyncio.get_running_loop().remove_writer(write)
        assert not asyncio.get_running_loop().remove_reader(read)
    finally:
        os.close(read)
        os.close(write)


def test_buffered(pipe: Pipe) -> None:
    assert buffered(pipe.read.fileno()) == 0
    os.write(pipe.write.fileno(), b"12345")
    assert buffered(pipe.read.fileno()) == 5


async def test_attach_output(attach: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = attach
    output = AttachOutput(ours)
    theirs.send(b"\x02out")
    theirs.send(b"\x03err")
    assert await output.read() == (1, b"out")
    assert await output.read() == (2, b"err")
    reading = asyncio.create_task(output.read())
    await asyncio.sleep(0)
    theirs.send(b"\x02" + b"x" * 8192)
    assert await asyncio.wait_for(reading, SOON) == (1, b"x" * 8192)
    theirs.close()
    assert await everything(output) == b""


async def test_attach_output_of_a_conmon_that_left_input_unread(attach: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = attach
    await AttachInput(ours).write(b"never read")
    theirs.send(b"\x02last")
    theirs.close()
    assert await everything(AttachOutput(ours)) == b"last"


async def test_attach_cut(attach: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = attach
    output = AttachOutput(ours)
    theirs.send(b"\x02there")
    output.cut()
    assert await everything(output) == b"there"


class Keeping:
    """Keeps what it records in memory, and says what it was asked for. `before_consuming` happens at that moment."""

    def __init__(self, before_consuming: Callable[[], None] = lambda: None) -> None:
        self.kept: list[tuple[int, bytes]] = []
        self.sizes: list[int] = []
        self.settled = 0
        self._before_consuming = before_consuming

    def from_pipe(self, stream: int, pipe: int, size: int) -> bytes:
        data = os.read(pipe, size)
        self.sizes.append(size)
        self.kept.append((stream, data))
        return data

    def packet(self, stream: int, payload: bytes, consume: Callable[[], None]) -> None:
        self.kept.append((stream, payload))
        self._before_consuming()
        consume()

    def settle(self) -> None:
        self.settled += 1


async def test_a_pipe_that_is_recorded(pipe: Pipe) -> None:
    """The recorder takes it out, no more than a cut leaves, and is asked for the end of file, too."""
    output, keeping = PipeOutput(pipe.read, 2), Keeping()
    reading = asyncio.create_task(output.read({2: keeping}))
    await asyncio.sleep(0.01)
    assert not reading.done()
    os.write(pipe.write.fileno(), b"first")
    assert await asyncio.wait_for(reading, SOON) == (2, b"first")
    os.write(pipe.write.fileno(), b"there")
    output.cut()
    os.write(pipe.write.fileno(), b"late")
    assert await output.read({2: keeping}) == (2, b"there")
    assert await output.read({2: keeping}) is None
    assert keeping.kept == [(2, b"first"), (2, b"there")]
    assert keeping.sizes == [READ_SIZE, 5]


async def test_a_recorded_pipe_to_its_end(pipe: Pipe) -> None:
    output, keeping = PipeOutput(pipe.read, 1), Keeping()
    pipe.write.close()
    assert await output.read({1: keeping}) is None
    assert keeping.kept == [(1, b"")]


async def test_a_pipe_of_which_only_another_is_recorded(pipe: Pipe) -> None:
    keeping = Keeping()
    os.write(pipe.write.fileno(), b"out")
    assert await PipeOutput(pipe.read, 1).read({2: keeping}) == (1, b"out")
    assert keeping.kept == []


async def test_a_terminal_that_is_recorded(attach: tuple[socket.socket, socket.socket]) -> None:
    """A packet is in its queue until it is kept; and that none waits is told."""
    ours, theirs = attach
    queue: list[bytes] = []
    keeping = Keeping(lambda: queue.append(ours.recv(9000, socket.MSG_PEEK)))
    output = AttachOutput(ours)
    packets = [b"\x02one", b"\x02" + b"x" * 8192, b"\x03two"]
    for packet in packets:
        theirs.send(packet)
    got = [await output.read({1: keeping, 2: keeping}) for _ in packets]
    assert got == keeping.kept == [(1, b"one"), (1, b"x" * 8192), (2, b"two")]
    assert queue == packets
    assert keeping.settled == 0
    reading = asyncio.create_task(output.read({1: keeping}))
    await asyncio.sleep(0.01)
    assert not reading.done()
    assert keeping.settled == 1
    theirs.send(b"\x03not kept")
    assert await asyncio.wait_for(reading, SOON) == (2, b"not kept")
    theirs.close()
    assert await output.read({1: keeping}) is None
    assert keeping.kept == got


async def test_a_terminal_whose_conmon_goes_while_a_packet_is_kept(
    attach: tuple[socket.socket, socket.socket],
) -> None:
    """It leaves input unread, which the kernel tells before the packet: that has been kept, and must be consumed."""
    ours, theirs = attach
    await AttachInput(ours).write(b"never read")
    keeping, output = Keeping(theirs.close), AttachOutput(ours)
    for packet in (b"\x02one", b"\x02two"):
        theirs.send(packet)
    assert await output.read({1: keeping}) == (1, b"one")
    assert await output.read({1: keeping}) == (1, b"two")
    assert await output.read({1: keeping}) is None
    assert keeping.kept == [(1, b"one"), (1, b"two")]


async def test_attach_input_in_packets_that_conmon_takes_whole(attach: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = attach
    data = os.urandom(300_000)
    writing = asyncio.create_task(AttachInput(ours).write(data))
    got = b""
    theirs.setblocking(False)
    async with asyncio.timeout(SOON):
        while len(got) < len(data):
            await readable(theirs.fileno())
            packet = theirs.recv(1 << 20)
            assert 0 < len(packet) <= 32768
            got += packet
    await writing
    assert got == data


async def test_attach_input_without_conmon(attach: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = attach
    stdin = AttachInput(ours)
    theirs.close()
    with pytest.raises(InputClosed):
        await stdin.write(b"x")
    ours.close()
    with pytest.raises(InputClosed):
        await stdin.write(b"x")


async def test_a_waiter_that_is_woken(pipe: Pipe) -> None:
    waiter = ReadWaiter(pipe.read.fileno())
    waiter.wake()
    waiting = asyncio.create_task(waiter.wait())
    await asyncio.sleep(0)
    assert not waiting.done(), "a wake before the wait must not count"
    waiter.wake()
    waiter.wake()
    await asyncio.wait_for(waiting, SOON)


async def test_writable(pipe: Pipe) -> None:
    os.set_blocking(pipe.write.fileno(), False)
    waiter = WriteWaiter(pipe.write.fileno())
    await asyncio.wait_for(waiter.wait(), SOON)
    assert os.write(pipe.write.fileno(), b"x" * (1 << 20)) < 1 << 20, "it is not full"
    waiting = asyncio.create_task(waiter.wait())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    os.read(pipe.read.fileno(), 65536)
    await asyncio.wait_for(waiting, SOON)


async def test_a_close_ends_a_write_that_waits(pipe: Pipe, attach: tuple[socket.socket, socket.socket]) -> None:
    """And forgets the descriptor before its number can be another's."""
    for stdin in (PipeInput(pipe.write), AttachInput(attach[0])):
        writing = asyncio.create_task(stdin.write(b"x" * (4 << 20)))
        await asyncio.sleep(0.01)
        assert not writing.done()
        stdin.close()
        assert not asyncio.get_running_loop().remove_writer(attach[0].fileno())
        with pytest.raises(InputClosed):
            await asyncio.wait_for(writing, SOON)


def test_a_descriptor_is_closed_once() -> None:
    read, write = os.pipe2(os.O_CLOEXEC)
    os.close(write)
    one = Descriptor(read)
    assert one
    one.close()
    reused, other = os.pipe2(os.O_CLOEXEC)
    try:
        one.close()
        os.fstat(reused)
        assert not one
        assert "closed" in repr(one)
        with pytest.raises(ValueError, match="closed"):
            one.fileno()
        with pytest.raises(ValueError, match="closed"):
            one.detach()
    finally:
        os.close(reused)
        os.close(other)
