"""The pump: bytes from a client to a process and back, and everybody who may leave in between."""

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Set
from pathlib import Path

import pytest

from execgate.model.session import ByteCounts, ExitSource, ExitStatus
from execgate.runtime.readiness import Descriptor
from execgate.runtime.streams import UNRECORDED, ExecStreams, Inflow, InputClosed, Output, PipeOutput, Recorders
from execgate.sessions.backlog import Backlog, CaptureBacklog, Chunk, MemoryBacklog
from execgate.sessions.pump import ClientGone, Departure, Feeder, Pump, Stdin

CTRL_P_CTRL_Q = b"\x10\x11"
SOON = 2.0
"""Seconds within which whatever should end has ended, or the test fails."""


class FakeOutput:
    """Yields chunks, then waits for `cut` (or ends at once), like a pipe that a background child may hold open."""

    def __init__(self, chunks: Iterable[bytes], stream: int = 1, *, held_open: bool = False) -> None:
        self._chunks = list(chunks)
        self._stream = stream
        self._end = asyncio.Event()
        self.cuts = 0
        if not held_open:
            self._end.set()

    async def read(self, recorders: Recorders = UNRECORDED) -> tuple[int, bytes] | None:
        await asyncio.sleep(0)
        if self._chunks:
            return self._stream, self._chunks.pop(0)
        await self._end.wait()
        return None

    async def bulk(self) -> None:
        return None

    def cut(self) -> None:
        self.cuts += 1
        self._end.set()

    def close(self) -> None:
        self._end.set()


class FakeInput:
    """Remembers what it got; after `takes` bytes nobody reads it any more."""

    def __init__(self, takes: int | None = None) -> None:
        self.got = bytearray()
        self.closed = asyncio.Event()
        self._takes = takes

    @property
    def written(self) -> int:
        return len(self.got)

    async def write(self, data: bytes) -> None:
        assert data, "an empty write would be an end of file"
        assert not self.closed.is_set(), "written to after its end"
        if self._takes is not None and len(self.got) + len(data) > self._takes:
            raise InputClosed
        self.got += data

    async def splice(self, inflow: Inflow) -> bool:
        return False

    def close(self) -> None:
        self.closed.set()


class FakeClient:
    """Sends what it was given, then its end, its loss, or nothing more; takes output slowly if asked to."""

    def __init__(self, *sends: bytes, then: str = "end") -> None:
        self._sends = list(sends)
        self._then = then
        self.got: list[tuple[int, bytes]] = []
        self.gone_after: int | None = None
        self.gone = asyncio.Event()
        self.room = asyncio.Event()
        self.room.set()
        self.all_sent = asyncio.Event()

    async def receive(self) -> bytes:
        await asyncio.sleep(0)
        if self._sends:
            return self._sends.pop(0)
        self.all_sent.set()
        if self._then == "gone":
            raise ClientGone
        if self._then == "silence":
            await self.gone.wait()
            raise ClientGone
        return b""

    async def send(self, stream: int, data: bytes) -> None:
        await self.room.wait()
        if self.gone_after is not None and len(self.got) >= self.gone_after:
            self.gone.set()
            raise ClientGone
        self.got.append((stream, data))


def done(code: int = 0) -> "asyncio.Future[ExitStatus]":
    future: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()
    future.set_result(ExitStatus(code, ExitSource.SYNC_PIPE))
    return future


def running() -> "asyncio.Future[ExitStatus]":
    return asyncio.get_running_loop().create_future()


BOTH = frozenset({1, 2})


class Pumped:
    """A pump, its stdin, its backlog, and what its first client's departure was."""

    def __init__(
        self,
        client: FakeClient | None,
        *outputs: Output,
        stdin: FakeInput | None = None,
        tty: bool = False,
        backlog: Backlog | None = None,
        wanted: frozenset[int] = BOTH,
        captured: Set[int] = BOTH,
    ) -> None:
        self.stdin = Stdin(stdin)
        self.backlog = backlog or MemoryBacklog()
        self.departure: asyncio.Future[Departure] = asyncio.get_running_loop().create_future()
        self.on_departure: Callable[[], None] = lambda: None
        self.pump = Pump(
            ExecStreams(outputs=outputs, input=stdin), self.stdin, self.backlog, captured=frozenset(captured)
        )
        self._client, self._wanted, self._keys = client, wanted, CTRL_P_CTRL_Q if tty else b""

    async def run(self, exited: "asyncio.Future[ExitStatus]", drain: float) -> None:
        if self._client is not None:
            feeder = Feeder(self._client, self.stdin, self._keys)
            self.pump.join(self._client, feeder, wanted=self._wanted, left=self._left)
        await self.pump.run(exited, drain)

    def _left(self, departure: Departure) -> None:
        self.departure.set_result(departure)  # InvalidStateError, if it is told twice
        if departure is Departure.GONE:  # what the session does, unless its creator wanted otherwise
            self.stdin.close()


pump_of = Pumped


async def run(pump: Pumped, exited: "asyncio.Future[ExitStatus]", drain: float = 10.0) -> None:
    before = asyncio.all_tasks()
    async with asyncio.timeout(SOON):
        await pump.run(exited, drain)
    assert asyncio.all_tasks() <= before, "the pump left tasks behind"


async def test_both_directions() -> None:
    client, stdin = FakeClient(b"in1", b"in2"), FakeInput()
    await run(pump_of(client, FakeOutput([b"a", b"b"]), FakeOutput([b"c"], 2), stdin=stdin), done())
    assert sorted(client.got) == [(1, b"a"), (1, b"b"), (2, b"c")]


async def test_the_end_of_input_closes_stdin_and_nothing_else() -> None:
    client, stdin = FakeClient(b"all"), FakeInput()
    output, exited = FakeOutput([b"early"], held_open=True), running()
    pump = pump_of(client, output, stdin=stdin)
    task = asyncio.create_task(run(pump, exited, 0))
    await asyncio.wait_for(stdin.closed.wait(), SOON)
    assert bytes(stdin.got) == b"all"
    assert not task.done()
    assert not pump.departure.done()
    exited.set_result(ExitStatus(0, ExitSource.SYNC_PIPE))
    await task
    assert client.got == [(1, b"early")]


@pytest.mark.parametrize("without", ["client", "stdin", "outputs"])
async def test_what_is_not_attached_is_not_missed(without: str) -> None:
    client = None if without == "client" else FakeClient(b"thrown away")
    outputs = () if without == "outputs" else (FakeOutput([b"x"]),)
    await run(pump_of(client, *outputs, stdin=None if without == "stdin" else FakeInput()), done())


async def test_it_waits_for_the_exit_code_when_the_outputs_have_ended() -> None:
    exited = running()
    task = asyncio.create_task(run(pump_of(FakeClient(), FakeOutput([])), exited))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not task.done()
    exited.set_result(ExitStatus(3, ExitSource.SYNC_PIPE))
    await task


async def test_a_slow_client_slows_the_process() -> None:
    """One chunk is under way, and not a second one read."""
    client = FakeClient(then="silence")
    client.room.clear()
    output = FakeOutput([b"1", b"2", b"3"])
    task = asyncio.create_task(run(pump_of(client, output), done()))
    for _ in range(50):
        await asyncio.sleep(0)
    assert output._chunks == [b"2", b"3"]
    client.room.set()
    await task
    assert client.got == [(1, b"1"), (1, b"2"), (1, b"3")]


async def test_client_gone_while_sending() -> None:
    """The rest is read and thrown away, stdin is closed, and the departure is told."""
    client, stdin = FakeClient(then="silence"), FakeInput()
    client.gone_after = 1
    output = FakeOutput([b"1", b"2", b"3"])
    pump = pump_of(client, output, stdin=stdin)
    await run(pump, done())
    assert client.got == [(1, b"1")]
    assert output._chunks == []
    assert stdin.closed.is_set()
    assert pump.departure.result() is Departure.GONE


async def test_client_gone_while_receiving() -> None:
    client, stdin, exited = FakeClient(b"last words", then="gone"), FakeInput(), running()
    pump = pump_of(client, FakeOutput([], held_open=True), stdin=stdin)
    task = asyncio.create_task(run(pump, exited, 0))
    assert await asyncio.wait_for(asyncio.shield(pump.departure), SOON) is Departure.GONE
    await asyncio.wait_for(stdin.closed.wait(), SOON)
    assert bytes(stdin.got) == b"last words"
    assert not task.done(), "the process is never ended for it"
    exited.set_result(ExitStatus(0, ExitSource.SYNC_PIPE))
    await task


async def test_client_gone_in_both_directions_is_told_once() -> None:
    client = FakeClient(then="gone")
    client.gone_after = 0
    pump = pump_of(client, FakeOutput([b"1", b"2"]), FakeOutput([b"3"], 2), stdin=FakeInput())
    await run(pump, done())
    assert pump.departure.result() is Departure.GONE


@pytest.mark.parametrize("sends", [[b"ab\x10\x11cd"], [b"ab\x10", b"\x11cd"], [b"a", b"b", b"\x10", b"\x11", b"cd"]])
async def test_detach_mid_chunk(sends: list[bytes]) -> None:
    """What stood before the keys arrives, what stood behind does not, and stdin stays open."""
    client, stdin, exited = FakeClient(*sends, then="silence"), FakeInput(), running()
    output = FakeOutput([], held_open=True)
    pump = pump_of(client, output, stdin=stdin, tty=True)
    task = asyncio.create_task(run(pump, exited, 0))
    assert await asyncio.wait_for(asyncio.shield(pump.departure), SOON) is Departure.DETACHED
    assert bytes(stdin.got) == b"ab"
    assert not stdin.closed.is_set()
    output._chunks.append(b"nobody hears this")
    exited.set_result(ExitStatus(0, ExitSource.SYNC_PIPE))
    await task
    assert client.got == []


async def test_without_a_terminal_the_keys_are_data() -> None:
    client, stdin, exited = FakeClient(b"a\x10\x11b"), FakeInput(), running()
    pump = pump_of(client, FakeOutput([], held_open=True), stdin=stdin)
    task = asyncio.create_task(run(pump, exited, 0))
    await asyncio.wait_for(stdin.closed.wait(), SOON)
    assert bytes(stdin.got) == b"a\x10\x11b"
    exited.set_result(ExitStatus(0, ExitSource.SYNC_PIPE))
    await task
    assert not pump.departure.done()


async def test_half_a_sequence_before_the_end_is_data() -> None:
    client, stdin, exited = FakeClient(b"a\x10"), FakeInput(), running()
    task = asyncio.create_task(run(pump_of(client, FakeOutput([], held_open=True), stdin=stdin, tty=True), exited, 0))
    await asyncio.wait_for(stdin.closed.wait(), SOON)
    assert bytes(stdin.got) == b"a\x10"
    exited.set_result(ExitStatus(0, ExitSource.SYNC_PIPE))
    await task


async def test_a_process_that_closes_stdin_does_not_block_its_client() -> None:
    client, stdin, exited = FakeClient(*[b"12345"] * 10), FakeInput(takes=10), running()
    pump = pump_of(client, FakeOutput([b"out"], held_open=True), stdin=stdin)
    task = asyncio.create_task(run(pump, exited, 0))
    await asyncio.wait_for(client.all_sent.wait(), SOON)
    assert len(stdin.got) == 10
    exited.set_result(ExitStatus(0, ExitSource.SYNC_PIPE))
    await task
    assert client.got == [(1, b"out")]
    assert not pump.departure.done()


async def test_the_keys_are_heard_after_stdin_closed() -> None:
    client, exited = FakeClient(b"x", b"\x10\x11", then="silence"), running()
    pump = pump_of(client, FakeOutput([], held_open=True), stdin=FakeInput(takes=0), tty=True)
    task = asyncio.create_task(run(pump, exited, 0))
    assert await asyncio.wait_for(asyncio.shield(pump.departure), SOON) is Departure.DETACHED
    exited.set_result(ExitStatus(0, ExitSource.SYNC_PIPE))
    await task


@pytest.mark.parametrize("drain", [0.0, 0.2])
async def test_the_drain_is_bounded(drain: float) -> None:
    """A background child holds the output: after `drain` seconds what is there is delivered, and that is all."""
    client, output = FakeClient(then="silence"), FakeOutput([b"there"], held_open=True)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await run(pump_of(client, output), done(), drain)
    # uvloop's timers and its clock have whole milliseconds, rounded each in its own way.
    assert drain - 0.01 <= loop.time() - begun < drain + 1
    assert output.cuts == 1
    assert client.got == [(1, b"there")]


async def test_no_drain_before_the_process_has_ended() -> None:
    output, exited = FakeOutput([b"x"], held_open=True), running()
    task = asyncio.create_task(run(pump_of(FakeClient(then="silence"), output), exited, 0))
    for _ in range(50):
        await asyncio.sleep(0)
    assert output.cuts == 0
    assert not task.done()
    exited.set_result(ExitStatus(0, ExitSource.SYNC_PIPE))
    await task


async def test_cancelled() -> None:
    """The service stops: no task stays, and nothing is swallowed."""
    before = asyncio.all_tasks()
    pump = pump_of(FakeClient(then="silence"), FakeOutput([b"x"], held_open=True), stdin=FakeInput())
    task = asyncio.create_task(pump.run(running(), 10))
    for _ in range(20):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() <= before


# -- what more than one reads


async def test_only_what_is_captured_is_kept_and_only_what_is_wanted_is_sent() -> None:
    client = FakeClient(then="silence")
    pumped = pump_of(
        client, FakeOutput([b"out"], 1), FakeOutput([b"err"], 2), wanted=frozenset({1}), captured=frozenset({2})
    )
    with pumped.backlog.reader():
        await run(pumped, done())
        assert await pumped.backlog.read_now(0) == [Chunk(0, 2, b"err")]
    assert client.got == [(1, b"out")]


async def test_what_has_passed_is_counted_whoever_wanted_it() -> None:
    client = FakeClient(b"abc", b"de")
    pumped = pump_of(
        client, FakeOutput([b"1", b"23"]), FakeOutput([b"4567"], 2), stdin=FakeInput(), wanted=frozenset(),
        captured=frozenset(),
    )  # fmt: skip
    exited = running()
    task = asyncio.create_task(run(pumped, exited))
    await asyncio.wait_for(client.all_sent.wait(), SOON)
    exited.set_result(ExitStatus(0, ExitSource.SYNC_PIPE))
    await task
    assert pumped.pump.transferred == ByteCounts(stdin=5, stdout=3, stderr=4)


async def test_output_that_was_read_is_captured_even_if_the_service_stops(tmp_path: Path) -> None:
    """The pipe no longer has it: who stops between the two loses it for ever. The first client has not taken it yet."""
    backlog, client = CaptureBacklog(tmp_path / "c", 1 << 20), FakeClient(then="silence")
    client.room.clear()
    with open_pipe() as (read, write):
        pumped = pump_of(client, PipeOutput(read, 1), backlog=backlog)
        task = asyncio.create_task(pumped.run(running(), 10))
        os.write(write.fileno(), b"read")
        async with asyncio.timeout(SOON):
            await backlog.read(0)
        os.write(write.fileno(), b"waiting")
        assert held_open(tmp_path), "nothing was held open while it was recorded"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await backlog.read_now(0) == [Chunk(0, 1, b"read")]
        assert os.read(read.fileno(), 100) == b"waiting"
    assert not held_open(tmp_path)


async def test_one_output_is_captured_and_the_other_is_not(tmp_path: Path) -> None:
    backlog, client = CaptureBacklog(tmp_path / "c", 1 << 20), FakeClient(then="silence")
    with open_pipe() as (out, out_write), open_pipe() as (err, err_write):
        for write, data in ((out_write, b"out"), (err_write, b"err")):
            os.write(write.fileno(), data)
            write.close()
        await run(pump_of(client, PipeOutput(out, 1), PipeOutput(err, 2), backlog=backlog, captured={2}), done())
    assert sorted(client.got) == [(1, b"out"), (2, b"err")]
    assert await backlog.read_now(0) == [Chunk(0, 2, b"err")]
    assert not held_open(tmp_path)


@contextlib.contextmanager
def open_pipe() -> Iterator[tuple[Descriptor, Descriptor]]:
    read, write = (Descriptor(fd) for fd in os.pipe2(os.O_CLOEXEC))
    with contextlib.closing(read), contextlib.closing(write):
        yield read, write


def held_open(directory: Path) -> list[str]:
    """Return which of this process's descriptors are files below `directory`."""
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [link for link in links if link.startswith(str(directory))]


async def test_a_client_that_is_lost_without_a_word() -> None:
    pumped = pump_of(FakeClient(), FakeOutput([], held_open=True), stdin=FakeInput())
    exited = running()
    task = asyncio.create_task(run(pumped, exited, 0))
    await asyncio.sleep(0)
    pumped.pump.lose()
    pumped.pump.lose()
    assert await asyncio.wait_for(asyncio.shield(pumped.departure), SOON) is Departure.GONE
    exited.set_result(ExitStatus(0, ExitSource.SYNC_PIPE))
    await task


async def test_writers_of_stdin_take_turns() -> None:
    target = FakeInput()
    stdin = Stdin(target)
    await asyncio.gather(*[stdin.write(bytes([65 + number]) * 3) for number in range(5)])
    assert bytes(target.got) == b"AAABBBCCCDDDEEE"
    open_before = stdin.open
    stdin.close()
    stdin.close()
    await stdin.write(b"late")
    assert (open_before, stdin.open) == (True, False)
    assert stdin.written == 15
