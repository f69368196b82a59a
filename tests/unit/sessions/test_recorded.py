"""A recording in the way of the bytes: what it is given, when it is waited for, and what follows when it is lost."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from execgate.model.access import Record
from execgate.model.config import ConsoleSize
from execgate.model.process import ProcessIdentity
from execgate.model.session import ExecSession, ExitSource, ExitStatus, SessionState
from execgate.runtime.streams import UNRECORDED, ExecStreams, Inflow, Recorders
from execgate.runtime.tree import ProcessTree, SessionCgroups
from execgate.sessions.backlog import MemoryBacklog
from execgate.sessions.events import EventBus
from execgate.sessions.ledger import Ledger
from execgate.sessions.live import BOTH, LiveSession
from execgate.sessions.pump import ClientGone, Feeder, Interrupted, Pump, Stdin
from execgate.sessions.recording import Recording
from execgate.sessions.store import SessionStore
from support.records import new_session

SOON = 5.0
PROCESS, MONITOR = ProcessIdentity(4_000_001, 2), ProcessIdentity(4_000_002, 3)
OVER = ExitStatus(0, ExitSource.SYNC_PIPE)


class FakeRecording:
    """Writes down what it is given, in `said`, which it may share; has room, and closes, when the test says so."""

    def __init__(self, said: list[Any] | None = None) -> None:
        self.output = self.input = True
        self.said: list[Any] = [] if said is None else said
        self.has_room, self.may_close = asyncio.Event(), asyncio.Event()
        self.has_room.set()
        self.may_close.set()
        self._tell: Callable[[str], None] = lambda _: None

    def wrote(self, stream: int, data: bytes) -> None:
        self.said.append(("wrote", data))

    def given(self, data: bytes) -> None:
        if data:
            self.said.append(("given", data))

    def resized(self, size: ConsoleSize) -> None:
        self.said.append(("resized", size))

    async def room(self) -> None:
        await self.has_room.wait()

    def when_lost(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def lose(self) -> None:
        self.output = self.input = False
        self._tell("its recording ends: the disk is full")

    def finish(self, status: ExitStatus, remark: str = "") -> None:
        self.said.append(("finish", status.code, remark))

    def leave(self) -> None:
        self.said.append("leave")

    def discard(self) -> None:
        self.said.append("discard")

    async def closed(self) -> None:
        await self.may_close.wait()
        self.said.append("closed")


class FakeOutput:
    """Yields what the test puts in; counts what was taken."""

    def __init__(self, chunks: Iterable[bytes] = ()) -> None:
        self.chunks: asyncio.Queue[bytes] = asyncio.Queue()
        self.taken = 0
        for chunk in chunks:
            self.chunks.put_nowait(chunk)

    async def read(self, recorders: Recorders = UNRECORDED) -> tuple[int, bytes] | None:
        data = await self.chunks.get()
        self.taken += 1
        return (1, data) if data else None

    async def bulk(self) -> None:
        return None

    def cut(self) -> None:
        self.chunks.put_nowait(b"")

    def close(self) -> None:
        pass


class FakeInput:
    """Takes what there is room for."""

    def __init__(self, room: int = 10**9) -> None:
        self.got, self._room = b"", room
        self.spliced = False
        self.is_closed = False

    @property
    def written(self) -> int:
        return len(self.got)

    async def write(self, data: bytes) -> None:
        self.got += data[: self._room - len(self.got)]
        if len(self.got) == self._room:
            await asyncio.get_running_loop().create_future()

    async def splice(self, inflow: Inflow) -> bool:
        self.spliced = True
        return False

    def close(self) -> None:
        self.is_closed = True


class FakeClient:
    """A client that says nothing and writes down what it gets."""

    def __init__(self, said: list[Any]) -> None:
        self.said = said
        self.is_closed = asyncio.Event()
        self.message = ""

    async def send(self, stream: int, data: bytes) -> None:
        self.said.append(("sent", data))

    def splice(self, target: int) -> int:
        raise AssertionError("nobody would have looked at it")

    async def send_waiting(self, waiting: object) -> None:
        raise AssertionError("nobody would have looked at it")

    async def receive(self) -> bytes:
        await self.is_closed.wait()
        raise ClientGone

    async def finish(self, message: str = "") -> None:
        self.message = message
        self.is_closed.set()

    def abandon(self) -> None:
        self.is_closed.set()

    async def wait_closed(self) -> None:
        await self.is_closed.wait()


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


# -- the pump


def pump_of(recording: Recording, *outputs: FakeOutput) -> Pump:
    return Pump(ExecStreams(outputs=outputs), Stdin(None), MemoryBacklog(), captured=BOTH, recording=recording)


async def test_the_recording_is_given_each_piece_before_the_client() -> None:
    said: list[Any] = []
    client = FakeClient(said)
    pump = pump_of(FakeRecording(said), FakeOutput([b"a", b"b", b""]))
    pump.join(client, Feeder(client, Stdin(None), b""), wanted=BOTH, left=lambda _: None)
    exited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    exited.set_result(None)
    await asyncio.wait_for(pump.run(exited, SOON), SOON)
    assert said == [("wrote", b"a"), ("sent", b"a"), ("wrote", b"b"), ("sent", b"b")]


async def test_nothing_is_read_without_room_for_it() -> None:
    """Whoever is stopped while he waits for room has taken nothing that nobody has."""
    recording = FakeRecording()
    output = FakeOutput([b"a", b"b"])
    running = asyncio.ensure_future(pump_of(recording, output).run(asyncio.get_running_loop().create_future(), SOON))
    await turns()
    recording.has_room.clear()
    output.chunks.put_nowait(b"c")
    await turns()
    assert (output.taken, recording.said) == (3, [("wrote", b"a"), ("wrote", b"b"), ("wrote", b"c")])
    output.chunks.put_nowait(b"d")
    await turns()
    assert output.taken == 3
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert output.chunks.qsize() == 1


async def test_a_pump_that_was_hushed_goes_on_reading() -> None:
    said: list[Any] = []
    client, output = FakeClient(said), FakeOutput([b"a"])
    pump = pump_of(FakeRecording(), output)
    pump.join(client, Feeder(client, Stdin(None), b""), wanted=BOTH, left=lambda _: None)
    running = asyncio.ensure_future(pump.run(asyncio.get_running_loop().create_future(), SOON))
    await turns()
    pump.hush()
    output.chunks.put_nowait(b"b")
    await turns()
    assert (output.taken, said) == (2, [("sent", b"a")])
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


# -- stdin


async def test_input_is_recorded_as_far_as_it_went() -> None:
    """What is left is the next service's to write, and to record."""
    recording, target = FakeRecording(), FakeInput(room=3)
    writing = asyncio.ensure_future(Stdin(target, recording).write(b"abcdef"))
    await turns()
    writing.cancel()
    with pytest.raises(Interrupted) as interrupted:
        await writing
    assert (interrupted.value.rest, recording.said) == (b"def", [("given", b"abc")])


async def test_input_waits_for_room() -> None:
    recording, target = FakeRecording(), FakeInput()
    recording.has_room.clear()
    stdin = Stdin(target, recording)
    writing = asyncio.ensure_future(stdin.write(b"abc"))
    await turns()
    assert target.got == b""
    writing.cancel()
    with pytest.raises(Interrupted) as interrupted:
        await writing
    assert (interrupted.value.rest, recording.said) == (b"abc", [])
    recording.has_room.set()
    await stdin.write(b"abc")
    assert (target.got, stdin.written, recording.said) == (b"abc", 3, [("given", b"abc")])


@pytest.mark.parametrize("recorded", [True, False])
async def test_input_that_is_recorded_is_not_moved_by_the_kernel(*, recorded: bool) -> None:
    recording, target = FakeRecording(), FakeInput()
    recording.input = recorded
    await Stdin(target, recording).splice(FakeClient([]))
    assert target.spliced is not recorded


# -- the session


class FakeTree(ProcessTree):
    def __init__(self, execution: "FakeExecution") -> None:
        super().__init__(SessionCgroups(None), new_session().id, PROCESS)
        self._execution = execution

    @property
    def alive(self) -> bool:
        return not self._execution.ended.done()

    async def kill(self, monitor: ProcessIdentity | None) -> bool:
        self._execution.end(ExitStatus(137, ExitSource.SYNC_PIPE))
        return True


class FakeExecution:
    process: ProcessIdentity | None = PROCESS
    starting = False

    def __init__(self) -> None:
        self.output, self.input = FakeOutput(), FakeInput()
        self.streams = ExecStreams(outputs=(self.output,), input=self.input)
        self.monitor: ProcessIdentity | None = MONITOR
        self.ended: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()
        self.tree: ProcessTree | None = FakeTree(self)

    def end(self, status: ExitStatus = OVER) -> None:
        if not self.ended.done():
            self.ended.set_result(status)
            self.output.chunks.put_nowait(b"")

    async def start(self) -> ProcessIdentity:
        return PROCESS

    async def wait(self) -> ExitStatus:
        return await asyncio.shield(self.ended)

    def resize(self, size: ConsoleSize) -> None:
        pass

    async def dispose(self) -> None:
        pass

    async def abort(self) -> None:
        pass

    def leave(self) -> None:
        pass


class Stage:
    """One live session that is recorded, and all around it."""

    def __init__(self, path: Path, *, record_or_end: bool) -> None:
        self.store = SessionStore(path / "sessions.db", boot_id="boot")
        self.ledger = Ledger(self.store, EventBus())
        session = new_session(attach_stdout=True, attach_stdin=True, tty=True)
        session = replace(session, record=Record.OUTPUT, record_or_end=record_or_end)
        self.ledger.created(session)
        self.said: list[Any] = []
        self.recording, self.client = FakeRecording(self.said), FakeClient(self.said)
        self.execution = FakeExecution()
        self.live = LiveSession(
            self.ledger.starting(session), self.ledger, MemoryBacklog(), drain=0, grace=SOON, over=lambda _: None,
            recording=self.recording,
        )  # fmt: skip
        self.live.execution = self.execution

    async def run(self) -> None:
        self.live.run(self.client)
        await asyncio.wait_for(asyncio.shield(self.live.settled), SOON)
        await turns()

    def record(self) -> ExecSession:
        found = self.ledger.get(self.live.session.id)
        assert found is not None
        return found

    async def ended(self) -> ExecSession:
        assert self.live.task is not None
        await asyncio.wait_for(self.live.task, SOON)
        assert self.record().state is SessionState.STOPPED
        return self.record()


@pytest.fixture
async def new_stage(tmp_path: Path) -> AsyncIterator[Callable[..., Stage]]:
    made: list[Stage] = []

    def make(*, record_or_end: bool = False) -> Stage:
        made.append(Stage(tmp_path, record_or_end=record_or_end))
        return made[-1]

    yield make
    for stage in made:
        await stage.live.close()
        stage.store.close()


async def test_the_recording_is_whole_before_the_end_is_on_record(new_stage: Callable[..., Stage]) -> None:
    stage = new_stage()
    await stage.run()
    stage.live.resize(ConsoleSize(40, 120))
    stage.execution.output.chunks.put_nowait(b"x")
    await turns()
    stage.recording.may_close.clear()
    stage.execution.end(ExitStatus(3, ExitSource.SYNC_PIPE))
    await turns()
    assert stage.said == [("resized", ConsoleSize(40, 120)), ("wrote", b"x"), ("sent", b"x"), ("finish", 3, "")]
    assert stage.record().running
    assert not stage.client.is_closed.is_set()
    stage.recording.may_close.set()
    assert (await stage.ended()).error == ""
    assert stage.said[-1] == "closed"


async def test_without_its_recording_it_may_go_on(new_stage: Callable[..., Stage]) -> None:
    stage = new_stage()
    await stage.run()
    stage.recording.lose()
    stage.execution.output.chunks.put_nowait(b"x")
    await turns()
    stage.execution.end()
    ended = await stage.ended()
    assert (ended.exit, ended.error, stage.client.message) == (OVER, "", "")
    assert ("sent", b"x") in stage.said


async def test_without_its_recording_it_must_not_go_on(new_stage: Callable[..., Stage]) -> None:
    """It is killed, its client is told why and gets nothing more of what it writes, and so is on record."""
    stage = new_stage(record_or_end=True)
    await stage.run()
    stage.execution.output.chunks.put_nowait(b"seen")
    await turns()
    stage.execution.output.chunks.put_nowait(b"not seen")
    stage.recording.lose()
    assert stage.record().error == "its recording ends: the disk is full"
    ended = await stage.ended()
    assert ended.exit == ExitStatus(137, ExitSource.SYNC_PIPE)
    assert (ended.error, ended.timed_out) == ("its recording ends: the disk is full", False)
    assert [word for word in stage.said if word[0] == "sent"] == [("sent", b"seen")]
    assert stage.client.message == "the session is ended: its recording ends: the disk is full"
    assert stage.execution.input.is_closed


async def test_a_recording_that_is_lost_at_its_end(new_stage: Callable[..., Stage]) -> None:
    """The process has ended by itself; that its recording is not whole is on record."""
    stage = new_stage(record_or_end=True)
    await stage.run()
    stage.recording.may_close.clear()
    stage.execution.end()
    await turns()
    stage.recording.lose()
    stage.recording.may_close.set()
    ended = await stage.ended()
    assert (ended.exit, ended.error) == (OVER, "its recording ends: the disk is full")


async def test_a_recording_that_is_lost_while_all_is_handed_over(new_stage: Callable[..., Stage]) -> None:
    """What follows is the next service's to say."""
    stage = new_stage(record_or_end=True)
    await stage.run()
    await stage.live.hand_over()
    stage.recording.lose()
    await turns()
    assert not stage.execution.ended.done()
    assert stage.record().error == ""


async def test_a_session_that_is_parted_from_leaves_its_recording(new_stage: Callable[..., Stage]) -> None:
    stage = new_stage()
    await stage.run()
    await stage.live.close()
    assert stage.said == ["leave"]
