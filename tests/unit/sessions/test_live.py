"""One session between its start and its end: its clients, its time, and what becomes of it without them."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from execgate.model.config import ConsoleSize, OnDisconnect
from execgate.model.errors import Conflict, Internal
from execgate.model.process import ProcessIdentity
from execgate.model.session import ExecSession, ExitSource, ExitStatus, SessionState
from execgate.runtime.streams import UNRECORDED, ExecStreams, Inflow, Recorders
from execgate.runtime.tree import ProcessTree, SessionCgroups
from execgate.sessions import live as live_module
from execgate.sessions.backlog import Backlog, CaptureBacklog, MemoryBacklog
from execgate.sessions.events import EventBus
from execgate.sessions.ledger import Ledger
from execgate.sessions.live import BOTH, LiveSession
from execgate.sessions.pump import ClientGone
from execgate.sessions.store import SessionStore
from support.records import new_session

SOON = 5.0
PROCESS, MONITOR = ProcessIdentity(4_000_001, 2), ProcessIdentity(4_000_002, 3)
KILLED = ExitStatus(137, ExitSource.SYNC_PIPE)


class FakeTree(ProcessTree):
    """Writes down what it gets. A KILL ends the process; so does a signal that it does not ignore."""

    def __init__(self, execution: "FakeExecution") -> None:
        super().__init__(SessionCgroups(None), new_session().id, PROCESS)
        self._execution = execution
        self.got: list[int] = []
        self.ignores: set[int] = set()

    @property
    def alive(self) -> bool:
        return not self._execution.ended.done()

    def signal(self, number: int) -> bool:
        if not self.alive:
            return False
        self.got.append(number)
        if number not in self.ignores:
            self._execution.end(128 + number)
        return True

    async def kill(self, monitor: ProcessIdentity | None) -> bool:
        assert monitor == MONITOR
        self.got.append(signal.SIGKILL)
        self._execution.end(137)
        return True


class FakeOutput:
    """Says what it is told to, and ends with the process."""

    def __init__(self) -> None:
        self.chunks: asyncio.Queue[bytes] = asyncio.Queue()

    async def read(self, recorders: Recorders = UNRECORDED) -> tuple[int, bytes] | None:
        data = await self.chunks.get()
        return (1, data) if data else None

    async def bulk(self) -> None:
        return None

    def cut(self) -> None:
        self.chunks.put_nowait(b"")

    def close(self) -> None:
        pass


class FakeInput:
    def __init__(self) -> None:
        self.got = b""
        self.closed = asyncio.Event()

    @property
    def written(self) -> int:
        return len(self.got)

    async def write(self, data: bytes) -> None:
        self.got += data

    async def splice(self, inflow: Inflow) -> bool:
        return False

    def close(self) -> None:
        self.closed.set()


class FakeExecution:
    process: ProcessIdentity | None = PROCESS
    starting = False

    def __init__(self) -> None:
        self.output, self.input = FakeOutput(), FakeInput()
        self.streams = ExecStreams(outputs=(self.output,), input=self.input)
        self.monitor: ProcessIdentity | None = MONITOR
        self.ended: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()
        self.tree: ProcessTree | None = FakeTree(self)
        self.disposable, self.said = asyncio.Event(), list[str]()
        self.terminal = True
        self.disposable.set()

    def end(self, code: int = 0, source: ExitSource = ExitSource.SYNC_PIPE) -> None:
        if not self.ended.done():
            self.ended.set_result(ExitStatus(code, source))
            self.output.chunks.put_nowait(b"")

    async def start(self) -> ProcessIdentity:
        return PROCESS

    async def wait(self) -> ExitStatus:
        return await asyncio.shield(self.ended)

    def resize(self, size: ConsoleSize) -> None:
        if not self.terminal:
            raise Internal("the terminal cannot be resized")
        self.said.append("resize")

    async def dispose(self) -> None:
        await self.disposable.wait()
        self.said.append("dispose")

    async def abort(self) -> None:
        self.said.append("abort")

    def leave(self) -> None:
        self.said.append("leave")


class FakeClient:
    """A client that types what the test says, and goes when it says so."""

    def __init__(self) -> None:
        self.typed: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.got = b""
        self.heard = asyncio.Event()
        self.closed = asyncio.Event()
        self.message = ""
        self.end = ""

    async def send(self, stream: int, data: bytes) -> None:
        if self.closed.is_set():
            raise ClientGone
        self.got += data
        self.heard.set()

    async def receive(self) -> bytes:
        data = await self.typed.get()
        if data is None:
            raise ClientGone
        return data

    def go(self) -> None:
        self.typed.put_nowait(None)
        self.closed.set()

    def half_close(self) -> None:
        self.typed.put_nowait(b"")

    async def finish(self, message: str = "") -> None:
        self.end, self.message = "finish", message
        self.closed.set()

    def abandon(self) -> None:
        self.end = "abandon"
        self.closed.set()

    async def wait_closed(self) -> None:
        await self.closed.wait()


class Stage:
    """A live session with all around it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = SessionStore(path / "sessions.db", boot_id="boot")
        self.events = EventBus()
        self.ledger = Ledger(self.store, self.events)
        self.over: list[LiveSession] = []
        self.all: list[LiveSession] = []

    def live(
        self, *, grace: float = SOON, drain: float = 0, backlog: Backlog | None = None, **config: Any
    ) -> LiveSession:
        session = new_session(**({"attach_stdout": True, "attach_stdin": True} | config))
        self.ledger.created(session)
        live = LiveSession(
            self.ledger.starting(session), self.ledger, backlog or MemoryBacklog(), drain=drain, grace=grace,
            over=self.over.append,
        )  # fmt: skip
        live.execution = FakeExecution()
        self.all.append(live)
        return live

    async def running(
        self, client: FakeClient | None = None, **options: Any
    ) -> tuple[LiveSession, FakeExecution, FakeTree]:
        live = self.live(**options)
        live.run(client)
        await asyncio.wait_for(asyncio.shield(live.settled), SOON)
        await turns()
        execution = live.execution
        assert isinstance(execution, FakeExecution)
        assert isinstance(execution.tree, FakeTree)
        return live, execution, execution.tree

    async def ended(self, live: LiveSession) -> ExecSession:
        """Wait until all of it is over."""
        assert live.task is not None
        await asyncio.wait_for(live.task, SOON)
        found = self.ledger.get(live.session.id)
        assert found is not None
        assert found.state is SessionState.STOPPED
        return found


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    made = Stage(tmp_path)
    yield made
    for live in made.all:
        await live.close()
    made.store.close()


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON):
        while not reached():
            await asyncio.sleep(0.001)


# -- without a client


@pytest.mark.parametrize(
    ("policy", "signals", "stdin_ends"),
    [
        (OnDisconnect.DOCKER, [], True),
        (OnDisconnect.KEEP, [], False),
        (OnDisconnect.HUP, [signal.SIGHUP], True),
        (OnDisconnect.KILL, [signal.SIGKILL], True),
    ],
)
@pytest.mark.parametrize("way", ["while it reads", "after its end of input"])
async def test_what_follows_when_the_client_is_gone(
    stage: Stage, policy: OnDisconnect, signals: list[int], stdin_ends: bool, way: str
) -> None:
    client = FakeClient()
    live, execution, tree = await stage.running(client, on_disconnect=policy)
    if way == "after its end of input":
        client.half_close()
        await turns()
        assert tree.got == [], "an end of input is no absence"
        stdin_ends = True
    client.go()
    await turns()
    assert tree.got == signals
    assert execution.input.closed.is_set() is stdin_ends
    execution.end(0)
    ended = await stage.ended(live)
    assert ended.exit == ExitStatus(128 + signals[0] if signals else 0, ExitSource.SYNC_PIPE)
    assert execution.said == ["dispose"]


@pytest.mark.parametrize("policy", [OnDisconnect.HUP, OnDisconnect.KILL])
async def test_only_the_last_client_counts(stage: Stage, policy: OnDisconnect) -> None:
    first, second = FakeClient(), FakeClient()
    live, execution, tree = await stage.running(first, on_disconnect=policy)
    watching = asyncio.create_task(live.attach(second, 0, stdin=True, wanted=BOTH))
    await turns()
    first.go()
    await turns()
    assert tree.got == []
    second.typed.put_nowait(b"still here")
    await until(lambda: execution.input.got == b"still here")
    second.go()
    await asyncio.wait_for(watching, SOON)
    await turns()
    assert tree.got == [{OnDisconnect.HUP: signal.SIGHUP, OnDisconnect.KILL: signal.SIGKILL}[policy]]
    await stage.ended(live)


@pytest.mark.parametrize(
    ("policy", "start", "signals"),
    [
        (OnDisconnect.KILL, "attached", [signal.SIGKILL]),
        (OnDisconnect.HUP, "attached", [signal.SIGHUP]),
        (OnDisconnect.KILL, "detached", []),
        (OnDisconnect.KILL, "detached by the keys", []),
        (OnDisconnect.KILL, "comes back", []),
        (OnDisconnect.DOCKER, "attached", []),
        (OnDisconnect.KEEP, "attached", []),
    ],
)
async def test_a_client_that_was_lost_with_a_service(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, policy: OnDisconnect, start: str, signals: list[int]
) -> None:
    """It has a while to come back. Then the same follows as if it had gone, and only if there was one."""
    monkeypatch.setattr(live_module, "_REATTACH_GRACE", 0.05)
    client = None if start == "detached" else FakeClient()
    dead, _, _ = await stage.running(client, tty=True, on_disconnect=policy)
    if start == "detached by the keys":
        assert client is not None
        client.typed.put_nowait(b"\x10\x11")
        await until(lambda: client.end == "finish")
    record = stage.ledger.get(dead.session.id)
    assert record is not None
    await dead.close()
    live = LiveSession(record, stage.ledger, MemoryBacklog(), drain=0, grace=SOON, over=stage.over.append)
    stage.all.append(live)
    live.execution = execution = FakeExecution()
    live.adopt(execution, None)
    tasks = []
    if start == "comes back":
        tasks.append(asyncio.create_task(live.attach(FakeClient(), 0, stdin=True, wanted=BOTH)))
    await asyncio.sleep(0.1)
    assert isinstance(execution.tree, FakeTree)
    assert execution.tree.got == signals
    execution.end()
    await asyncio.gather(*tasks)
    await stage.ended(live)


async def test_a_watcher_that_goes_after_its_end_of_input(stage: Stage) -> None:
    live, execution, _ = await stage.running(None, on_disconnect=OnDisconnect.KEEP)
    watcher = FakeClient()
    watching = asyncio.create_task(live.attach(watcher, 0, stdin=False, wanted=BOTH))
    watcher.half_close()
    await turns()
    assert not watching.done()
    watcher.go()
    await asyncio.wait_for(watching, SOON)
    assert not execution.input.closed.is_set(), "it was no writer"
    execution.end()
    await stage.ended(live)


async def test_the_keys_detach_and_nothing_follows(stage: Stage) -> None:
    client = FakeClient()
    live, execution, tree = await stage.running(client, tty=True, on_disconnect=OnDisconnect.KILL)
    client.typed.put_nowait(b"a\x10\x11")
    await until(lambda: client.end == "finish")
    assert tree.got == []
    assert execution.input.got == b"a"
    assert not execution.input.closed.is_set()
    assert [event.action for event in stage.events.past(0)][-1] == "exec_detach"
    execution.end()
    await stage.ended(live)


async def test_whoever_comes_after_the_end_and_goes_in_the_middle(stage: Stage) -> None:
    """What was captured is read by one who hangs up: there is no process that this could mean anything to."""
    backlog = CaptureBacklog(stage.path / "capture", 1 << 20)
    backlog.append(1, b"kept")
    session = new_session(on_disconnect=OnDisconnect.KILL, capture_stdout=True)
    live = LiveSession(session, stage.ledger, backlog, drain=0, grace=0, over=stage.over.append)
    client = FakeClient()
    watching = asyncio.create_task(live.attach(client, 0, stdin=True, wanted=BOTH))
    await asyncio.wait_for(client.heard.wait(), SOON)
    client.go()
    await asyncio.wait_for(watching, SOON)
    assert client.got == b"kept"


# -- attach


async def test_everybody_hears_it_and_each_may_type(stage: Stage) -> None:
    clients = [FakeClient() for _ in range(3)]
    live, execution, _ = await stage.running(clients[0])
    with live.backlog.reader():
        watching = [asyncio.create_task(live.attach(one, 0, stdin=True, wanted=BOTH)) for one in clients[1:]]
        await turns()
        execution.output.chunks.put_nowait(b"hello")
        for number, client in enumerate(clients):
            await asyncio.wait_for(client.heard.wait(), SOON)
            client.typed.put_nowait(b"%d" % number)
        await until(lambda: sorted(execution.input.got) == sorted(b"012"))
        execution.end(4)
        ended = await stage.ended(live)
        await asyncio.wait_for(asyncio.gather(*watching), SOON)
    assert [client.got for client in clients] == [b"hello"] * 3
    assert [client.end for client in clients] == ["finish"] * 3
    assert ended.exit == ExitStatus(4, ExitSource.SYNC_PIPE)
    assert (ended.transferred.stdin, ended.transferred.stdout) == (3, 5)


async def test_only_the_slow_watcher_suffers(stage: Stage) -> None:
    live, execution, _ = await stage.running(None, backlog=MemoryBacklog(limit=10))
    slow = FakeClient()
    with live.backlog.reader():
        watching = asyncio.create_task(live.attach(slow, 0, stdin=False, wanted=BOTH))
        for _ in range(100):
            live.backlog.append(1, b"12345678")
        await asyncio.wait_for(watching, SOON)
    assert slow.end == "finish"
    assert "too slowly" in slow.message
    execution.end()
    await stage.ended(live)


# -- time


async def test_in_time(stage: Stage) -> None:
    live, execution, tree = await stage.running(None, timeout=SOON)
    execution.end(0)
    assert not (await stage.ended(live)).timed_out
    assert tree.got == []


async def test_asked_to_end_and_does(stage: Stage) -> None:
    live, _, tree = await stage.running(None, timeout=0.05)
    ended = await stage.ended(live)
    assert ended.timed_out
    assert ended.exit == ExitStatus(143, ExitSource.SYNC_PIPE)
    assert tree.got == [signal.SIGTERM, signal.SIGKILL], "what is left of its tree goes too"


async def test_asked_to_end_and_does_not(stage: Stage) -> None:
    live = stage.live(timeout=0.05, grace=0.05)
    execution = live.execution
    assert isinstance(execution, FakeExecution)
    assert isinstance(execution.tree, FakeTree)
    execution.tree.ignores.add(signal.SIGTERM)
    live.run(None)
    ended = await stage.ended(live)
    assert ended.timed_out
    assert ended.exit == KILLED
    assert execution.tree.got == [signal.SIGTERM, signal.SIGKILL]


async def test_a_child_that_holds_the_output_is_no_timeout(stage: Stage) -> None:
    live, execution, tree = await stage.running(None, timeout=0.1, drain=0.3)
    execution.ended.set_result(ExitStatus(0, ExitSource.SYNC_PIPE))  # and its output stays open
    ended = await stage.ended(live)
    assert (ended.timed_out, tree.got) == (False, [])


async def adopted(stage: Stage, status: ExitStatus | None) -> tuple[ExecSession, FakeTree]:
    """Take over a session whose time has been over for long, and that has ended with `status` or runs."""
    live = stage.live(timeout=0.0)
    live.session = stage.ledger.running(live.session, PROCESS, MONITOR)
    execution = FakeExecution()
    if status is not None:
        execution.end(status.code, status.source)
    live.adopt(execution, None)
    assert isinstance(execution.tree, FakeTree)
    return await stage.ended(live), execution.tree


async def test_its_time_was_over_while_no_service_ran(stage: Stage) -> None:
    """The monitor ended the process and nothing else: the rest of the tree is ended now."""
    ended, tree = await adopted(stage, ExitStatus(137, ExitSource.TIMEOUT))
    assert (ended.exit, ended.timed_out) == (ExitStatus(137, ExitSource.TIMEOUT), True)
    assert tree.got == [signal.SIGKILL]


async def test_it_ended_in_time_while_no_service_ran(stage: Stage) -> None:
    ended, tree = await adopted(stage, ExitStatus(0, ExitSource.EXIT_FILE))
    assert (ended.timed_out, tree.got) == (False, [])


async def test_its_time_is_over_when_the_next_service_comes(stage: Stage) -> None:
    ended, tree = await adopted(stage, None)
    assert ended.timed_out
    assert tree.got[0] == signal.SIGTERM


# -- signals


async def test_signals(stage: Stage) -> None:
    live, _, tree = await stage.running(None)
    tree.ignores.add(signal.SIGUSR1)
    await live.signal(signal.SIGUSR1)
    await live.signal(signal.SIGKILL)
    assert tree.got == [signal.SIGUSR1, signal.SIGKILL]
    assert (await stage.ended(live)).exit == KILLED
    with pytest.raises(Conflict):
        await live.signal(signal.SIGTERM)


async def test_what_does_not_run_gets_no_signal(stage: Stage) -> None:
    live = stage.live()
    for attempt in (live.signal(signal.SIGKILL), live.stop(1)):
        with pytest.raises(Conflict):
            await attempt
    await live.undo()


async def test_sizes(stage: Stage) -> None:
    """A terminal that is gone because its process is, is no failure of ours; any other is."""
    live, execution, _ = await stage.running(None, tty=True)
    live.resize(ConsoleSize(1, 2))
    assert execution.said == ["resize"]
    execution.terminal = False
    with pytest.raises(Internal):
        live.resize(ConsoleSize(1, 2))
    execution.ended.set_result(ExitStatus(0, ExitSource.SYNC_PIPE))
    with pytest.raises(Conflict):
        live.resize(ConsoleSize(1, 2))


# -- the end


async def test_the_end_is_on_record_before_the_client_hears_of_it(stage: Stage) -> None:
    client = FakeClient()
    live, execution, _ = await stage.running(client)
    execution.disposable.clear()
    execution.end(6)
    await until(lambda: client.end == "finish")
    found = stage.ledger.get(live.session.id)
    assert found is not None
    assert found.exit == ExitStatus(6, ExitSource.SYNC_PIPE)
    assert stage.over == [live]
    execution.disposable.set()
    await stage.ended(live)


async def test_closed_while_it_runs(stage: Stage) -> None:
    client = FakeClient()
    live, execution, tree = await stage.running(client)
    await asyncio.wait_for(live.close(), SOON)
    assert (client.end, execution.said, tree.got) == ("abandon", ["leave"], [])
    assert stage.over == [live]


@pytest.mark.parametrize("policy", [OnDisconnect.HUP, OnDisconnect.KILL])
async def test_a_watcher_that_goes_with_the_service(stage: Stage, policy: OnDisconnect) -> None:
    """It was the last client, and the process lives on all the same: it is the service that leaves."""
    first, watcher = FakeClient(), FakeClient()
    live, execution, tree = await stage.running(first, on_disconnect=policy)
    watching = asyncio.create_task(live.attach(watcher, 0, stdin=True, wanted=BOTH))
    await turns()
    first.go()
    await turns()
    await asyncio.wait_for(live.close(), SOON)
    watcher.go()
    await asyncio.wait_for(watching, SOON)
    await turns()
    assert (execution.said, tree.got) == (["leave"], [])


async def test_a_disposal_that_fails_is_no_lost_exception(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    live, execution, _ = await stage.running(None)

    async def fail() -> None:
        raise ValueError("the descriptor is closed")

    execution.dispose = fail  # type: ignore[method-assign]
    execution.end(2)
    ended = await stage.ended(live)
    assert ended.exit == ExitStatus(2, ExitSource.SYNC_PIPE)
    assert "the descriptor is closed" in caplog.text
    assert execution.said == ["leave"]


async def test_an_undo_that_is_cancelled_is_an_end_too(stage: Stage) -> None:
    live = stage.live()
    execution = live.execution
    assert isinstance(execution, FakeExecution)

    async def never() -> None:
        await asyncio.Event().wait()

    execution.abort = never  # type: ignore[method-assign]
    undoing = asyncio.create_task(live.undo())
    await turns()
    undoing.cancel()
    await asyncio.gather(undoing, return_exceptions=True)
    assert live.settled.done(), "its turn at the gate is never given back"
    found = stage.ledger.get(live.session.id)
    assert found is not None
    assert found.exit == ExitStatus(128, ExitSource.START_FAILURE)
