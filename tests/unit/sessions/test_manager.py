"""The manager: the order that everything rests on, told by fakes that write down what happens when."""

import asyncio
import contextlib
import gc
import json
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from execgate.model.access import Grant, Record
from execgate.model.config import ConsoleSize, ExecConfig, ResolvedUser
from execgate.model.container import Container, ContainerBinding, ContainerStatus, OciRuntime
from execgate.model.errors import Conflict, Exhausted, Forbidden, Internal, NotFound, StartFailed, Unavailable
from execgate.model.ids import ContainerId, SessionId
from execgate.model.process import ProcessIdentity
from execgate.model.session import ExecSession, ExitSource, ExitStatus, SessionState
from execgate.runtime.spawning import ExecRequest
from execgate.runtime.streams import ExecStreams
from execgate.runtime.tree import ProcessTree, SessionCgroups
from execgate.sessions.events import EventBus
from execgate.sessions.ledger import Witness
from execgate.sessions.manager import AlreadyStarted, Limits, SessionManager, Spec
from execgate.sessions.recording import Recording, Recordings, Unrecorded
from execgate.sessions.store import SessionStore

INIT = ProcessIdentity(4_000_000, 1)
PROCESS = ProcessIdentity(4_000_001, 2)
SIZE = ConsoleSize(height=40, width=120)
SOON = 2.0


class FakeContainers:
    """One container, `c1`, whose state the test sets."""

    def __init__(self) -> None:
        runtime = OciRuntime("runc", Path("/bin/runc"), Path("/run/runc"))
        self.container: Container | None = Container(
            id=ContainerId("c1"), name="name", runtime=runtime, bundle=Path("/b"), status=ContainerStatus.RUNNING,
            created=0.0, init=INIT,
        )  # fmt: skip

    def set(self, **changes: Any) -> None:
        assert self.container is not None
        self.container = replace(self.container, **changes)

    def find(self, ref: str) -> Container:
        if self.container is None or ref not in ("c1", "name"):
            raise NotFound(f"No such container: {ref}")
        return self.container

    def get(self, container_id: ContainerId) -> Container | None:
        return self.container

    def spec(self, container: Container) -> Mapping[str, Any]:
        return {"process": {"args": ["init"], "env": [], "cwd": "/", "user": {"uid": 0, "gid": 0}}}

    def binding(self, container: Container) -> ContainerBinding:
        assert container.init is not None
        return ContainerBinding(container.id, container.name, container.init, "boot")


class FakeExecution:
    starting = False

    """A process that starts and ends when the test says so."""

    def __init__(self, said: list[str]) -> None:
        self.streams = ExecStreams()
        self.monitor: ProcessIdentity | None = ProcessIdentity(4_000_002, 3)
        self.process: ProcessIdentity | None = None
        self.started: asyncio.Future[ProcessIdentity] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()
        self.sizes: list[ConsoleSize] = []
        self.tree: ProcessTree | None = None
        self.disposable = asyncio.Event()
        self.disposable.set()
        self._said = said

    async def start(self) -> ProcessIdentity:
        self._said.append("start")
        return await asyncio.shield(self.started)

    async def wait(self) -> ExitStatus:
        return await asyncio.shield(self.ended)

    def resize(self, size: ConsoleSize) -> None:
        self.sizes.append(size)

    async def dispose(self) -> None:
        await self.disposable.wait()
        self._said.append("dispose")

    async def abort(self) -> None:
        self._said.append("abort")

    def leave(self) -> None:
        self._said.append("leave")

    def end(self, code: int = 0) -> None:
        self.ended.set_result(ExitStatus(code, ExitSource.SYNC_PIPE))


class FakeRuntime:
    """Hands out fake executions; `before` is called with each request, and may raise."""

    def __init__(self, said: list[str]) -> None:
        self.said = said
        self.requests: list[ExecRequest] = []
        self.begun: list[ExecRequest] = []
        self.executions: list[FakeExecution] = []
        self.records: list[str] = []
        self.adopted: ProcessIdentity | None = None
        self.before: Callable[[ExecRequest], None] = lambda _: None
        self.gate = asyncio.Event()
        self.gate.set()
        self.spawned = asyncio.Event()
        self.spawned.set()
        self.kept: set[SessionId] = set()

    async def prepare(self, request: ExecRequest, intend: Callable[[], str]) -> FakeExecution:
        await self.spawned.wait()
        self.records.append(intend())
        self.said.append("prepare")  # from here on there is something to run
        self.requests.append(request)
        self.before(request)
        await self.gate.wait()
        self.executions.append(FakeExecution(self.said))
        return self.executions[-1]

    def begin(self, request: ExecRequest) -> None:
        self.begun.append(request)

    async def close(self) -> None:
        self.said.append("close")

    def adopt(self, session: ExecSession) -> FakeExecution:
        self.said.append("adopt")
        self.executions.append(FakeExecution(self.said))
        self.executions[-1].process = self.adopted
        return self.executions[-1]

    def sweep(self, keep: Collection[SessionId]) -> None:
        self.kept = set(keep)


class FakeClient:
    """An attached client that says nothing."""

    def __init__(self, said: list[str]) -> None:
        self._said = said
        self._closed = asyncio.Event()
        self.messages: list[str] = []

    async def send(self, stream: int, data: bytes) -> None:
        self._said.append("send")

    async def receive(self) -> bytes:
        await self._closed.wait()
        return b""

    async def finish(self, message: str = "") -> None:
        if not self._closed.is_set():
            self._said.append("finish")
            self.messages.append(message)
            self._closed.set()

    def abandon(self) -> None:
        self._said.append("abandon")
        self._closed.set()

    async def wait_closed(self) -> None:
        await self._closed.wait()


class RecordingStore(SessionStore):
    """Writes down every step of a session, and can be told to fail."""

    said: list[str]
    full = False

    def move(self, before: ExecSession, after: ExecSession) -> ExecSession:
        if self.full:
            raise Unavailable("the session store is not available", hint="database or disk is full")
        moved = super().move(before, after)
        self.said.append(after.state.value)
        return moved


@dataclass
class World:
    """A manager and all that it talks to. `said` is what happened, in order."""

    said: list[str]
    store: RecordingStore
    containers: FakeContainers
    runtime: FakeRuntime
    events: EventBus
    manager: SessionManager
    clients: list[FakeClient] = field(default_factory=list)

    async def take_over(self) -> FakeClient:
        self.said.append("head")
        self.clients.append(FakeClient(self.said))
        return self.clients[-1]

    async def create(self, **config: Any) -> ExecSession:
        return await self.manager.create("c1", ExecConfig(args=("true",), **config))

    def state(self, session: ExecSession) -> SessionState:
        return self.manager.inspect(session.id).state

    async def wait_for(self, word: str) -> None:
        async with asyncio.timeout(SOON):
            while word not in self.said:
                await asyncio.sleep(0)


@pytest.fixture
async def world(tmp_path: Path) -> Any:
    world = make_world(tmp_path)
    yield world
    await world.manager.close()
    world.store.close()


def make_world(
    path: Path,
    recordings: Recordings | None = None,
    record: Record = Record.NOTHING,
    *,
    witness: Witness | None = None,
    **limits: Any,
) -> World:
    said: list[str] = []
    store = RecordingStore(path / "sessions.db", boot_id="boot")
    store.said = said
    containers, runtime, events = FakeContainers(), FakeRuntime(said), EventBus()
    manager = SessionManager(
        containers=containers,
        runtime=runtime,
        store=store,
        events=events,
        read_accounts=lambda _pid: (b"root:x:0:0::/root:/bin/sh\n", b"root:x:0:\n"),
        all_capabilities=(),
        limits=Limits(**{"drain": 0.0, **limits}),
        captures=path / "captures",
        witness=witness,
        recordings=recordings,
        record=record,
        record_or_end=recordings is not None,
    )
    return World(said, store, containers, runtime, events, manager)


@contextlib.contextmanager
def no_loop_errors() -> Iterator[None]:
    """Fail when a task's exception was never retrieved."""
    loop = asyncio.get_running_loop()
    seen: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: seen.append(context))
    yield
    gc.collect()
    loop.set_exception_handler(None)
    assert not seen, seen


async def test_the_order_of_an_attached_session(world: World) -> None:
    session = await world.create(attach_stdout=True)
    task = asyncio.create_task(world.manager.start_attached(session.id, None, world.take_over))
    await world.wait_for("start")
    assert world.state(session) is SessionState.STARTING
    assert world.manager.inspect(session.id).running
    world.runtime.executions[0].started.set_result(PROCESS)
    await world.wait_for("running")
    assert world.manager.inspect(session.id).process == PROCESS
    world.runtime.executions[0].end(7)
    await asyncio.wait_for(task, SOON)
    await world.wait_for("dispose")
    assert world.said == ["starting", "prepare", "head", "start", "running", "stopped", "finish", "dispose"]
    ended = world.manager.inspect(session.id)
    assert ended.exit == ExitStatus(7, ExitSource.SYNC_PIPE)
    assert world.manager.live == 0


async def test_the_order_of_a_detached_session(world: World) -> None:
    session = await world.create(attach_stdout=True)
    task = asyncio.create_task(world.manager.start_detached(session.id))
    await world.wait_for("start")
    assert not task.done(), "it is answered once the pid is known"
    world.runtime.executions[0].started.set_result(PROCESS)
    assert (await asyncio.wait_for(task, SOON)).process == PROCESS
    assert not world.runtime.requests[0].attached
    world.runtime.executions[0].end(1)
    await world.wait_for("dispose")
    assert world.said == ["starting", "prepare", "start", "running", "stopped", "dispose"]


async def test_the_events_tell_the_same_story(world: World) -> None:
    session = await world.create(env=("SECRET=hunter2",))
    task = asyncio.create_task(world.manager.start_detached(session.id))
    await world.wait_for("start")
    world.runtime.executions[0].started.set_result(PROCESS)
    await task
    world.runtime.executions[0].end(9)
    await world.wait_for("dispose")
    events = world.events.past(0)
    assert [event.action for event in events] == ["exec_create: true", "exec_start: true", "exec_die"]
    assert events[2].attributes["exitCode"] == "9"
    assert all(event.attributes["execID"] == session.id for event in events)
    assert "hunter2" not in repr(events)


@pytest.mark.parametrize("way", ["detached", "attached"])
async def test_of_many_starts_one_wins(world: World, way: str) -> None:
    session = await world.create()
    world.runtime.gate.clear()

    async def start() -> str:
        try:
            if way == "detached":
                await world.manager.start_detached(session.id)
            else:
                await world.manager.start_attached(session.id, None, world.take_over)
        except AlreadyStarted:
            return "lost"
        return "won"

    tasks = [asyncio.create_task(start()) for _ in range(10)]
    await world.wait_for("prepare")
    world.runtime.gate.set()
    await world.wait_for("start")
    world.runtime.executions[0].started.set_result(PROCESS)
    world.runtime.executions[0].end()
    results = await asyncio.wait_for(asyncio.gather(*tasks), SOON)
    assert sorted(results) == ["lost"] * 9 + ["won"]
    assert world.said.count("prepare") == 1


async def test_a_size_that_comes_while_a_start_is_prepared(world: World) -> None:
    """It is later than what the start was asked for with, and reaches the terminal."""
    session = await world.create(tty=True)
    world.runtime.spawned.clear()
    starting = asyncio.create_task(world.manager.start_detached(session.id, ConsoleSize(height=1, width=2)))
    await asyncio.sleep(0)
    await world.manager.resize(session.id, SIZE)
    world.runtime.spawned.set()
    await world.wait_for("start")
    world.runtime.executions[0].started.set_result(PROCESS)
    await asyncio.wait_for(starting, SOON)
    assert world.runtime.executions[0].sizes == [SIZE]


async def test_started_twice(world: World) -> None:
    session = await world.create()
    task = asyncio.create_task(world.manager.start_detached(session.id))
    await world.wait_for("start")
    with pytest.raises(AlreadyStarted, match="is already running"):
        await world.manager.start_detached(session.id)
    world.runtime.executions[0].started.set_result(PROCESS)
    await task
    world.runtime.executions[0].end()
    await world.wait_for("dispose")
    with pytest.raises(AlreadyStarted, match="has already run"):
        await world.manager.start_attached(session.id, None, world.take_over)
    assert "head" not in world.said


async def test_a_start_that_comes_while_another_is_prepared(world: World) -> None:
    """Its intent is not on record yet, and there can be but one directory: the later one waits for what comes of it."""
    session = await world.create()
    world.runtime.spawned.clear()
    first, second = (asyncio.create_task(world.manager.start_detached(session.id)) for _ in range(2))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()  # it never came to be, so the other may
    with pytest.raises(asyncio.CancelledError):
        await first
    third = asyncio.create_task(world.manager.start_detached(session.id))
    world.runtime.spawned.set()
    with pytest.raises(AlreadyStarted):
        await asyncio.wait_for(third, SOON)
    await world.wait_for("start")
    world.runtime.executions[0].started.set_result(PROCESS)
    world.runtime.executions[0].end()
    assert (await asyncio.wait_for(second, SOON)).process == PROCESS
    assert world.said.count("prepare") == 1


@pytest.mark.parametrize("error", [ConnectionResetError("gone"), asyncio.CancelledError()], ids=["gone", "cancelled"])
async def test_a_take_over_that_fails_undoes_the_start(world: World, error: BaseException) -> None:
    session = await world.create()

    async def take_over() -> FakeClient:
        raise error

    with pytest.raises(type(error)):
        await world.manager.start_attached(session.id, None, take_over)
    assert world.said == ["starting", "prepare", "abort", "stopped"]
    ended = world.manager.inspect(session.id)
    assert ended.exit == ExitStatus(128, ExitSource.START_FAILURE)
    assert world.manager.live == 0


async def test_a_host_that_cannot_prepare(world: World) -> None:
    """Refused with a status, before any head, and the session is over: it is not left between two states."""
    session = await world.create()

    def refuse(_: ExecRequest) -> None:
        raise Unavailable("no descriptors")

    world.runtime.before = refuse
    with pytest.raises(Unavailable):
        await world.manager.start_attached(session.id, None, world.take_over)
    assert "head" not in world.said
    ended = world.manager.inspect(session.id)
    assert (ended.state, ended.error) == (SessionState.STOPPED, "no descriptors")
    assert world.manager.live == 0


async def test_a_runtime_that_refuses_an_attached_start(world: World) -> None:
    """The client is told in the stream, after the code is known to whoever asks."""
    session = await world.create()
    task = asyncio.create_task(world.manager.start_attached(session.id, None, world.take_over))
    await world.wait_for("start")
    world.runtime.executions[0].started.set_exception(StartFailed("no such file", 127))
    await asyncio.wait_for(task, SOON)
    await world.wait_for("finish")
    assert world.clients[0].messages == ["no such file"]
    assert world.said == ["starting", "prepare", "head", "start", "stopped", "finish"]
    assert world.manager.inspect(session.id).exit == ExitStatus(127, ExitSource.START_FAILURE)


async def test_a_runtime_that_refuses_a_detached_start(world: World) -> None:
    session = await world.create()
    task = asyncio.create_task(world.manager.start_detached(session.id))
    await world.wait_for("start")
    world.runtime.executions[0].started.set_exception(StartFailed("no such file", 127))
    with pytest.raises(StartFailed):
        await asyncio.wait_for(task, SOON)
    assert world.manager.inspect(session.id).exit == ExitStatus(127, ExitSource.START_FAILURE)


async def test_the_request_of_a_detached_start_may_be_gone(world: World) -> None:
    """Its cancellation is not the session's; and a failure that nobody waits for is no error of the loop."""
    with no_loop_errors():
        session = await world.create()
        task = asyncio.create_task(world.manager.start_detached(session.id))
        await world.wait_for("start")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        world.runtime.executions[0].started.set_exception(StartFailed("too late", 128))
        await world.wait_for("stopped")
        del task
    assert world.manager.inspect(session.id).error == "too late"


# -- sizes


async def test_a_size_before_the_start_is_kept_for_it(world: World) -> None:
    session = await world.create(tty=True, console_size=ConsoleSize(1, 1))
    await world.manager.resize(session.id, ConsoleSize(2, 2))
    await world.manager.resize(session.id, SIZE)
    task = asyncio.create_task(world.manager.start_detached(session.id))
    await world.wait_for("start")
    assert world.runtime.requests[0].process["consoleSize"] == {"height": 40, "width": 120}
    world.runtime.executions[0].started.set_result(PROCESS)
    await task


async def test_the_starts_own_size_comes_first(world: World) -> None:
    session = await world.create(tty=True, console_size=ConsoleSize(1, 1))
    await world.manager.resize(session.id, ConsoleSize(2, 2))
    task = asyncio.create_task(world.manager.start_detached(session.id, SIZE))
    await world.wait_for("start")
    assert world.runtime.requests[0].process["consoleSize"] == {"height": 40, "width": 120}
    world.runtime.executions[0].started.set_result(PROCESS)
    await task


@pytest.mark.parametrize("during", ["prepare", "start"])
async def test_a_size_during_the_start_is_set_after_it(world: World, during: str) -> None:
    session = await world.create(tty=True)
    if during == "prepare":
        world.runtime.gate.clear()
    task = asyncio.create_task(world.manager.start_detached(session.id))
    await world.wait_for(during)
    await world.manager.resize(session.id, ConsoleSize(9, 9))
    await world.manager.resize(session.id, SIZE)
    world.runtime.gate.set()
    await world.wait_for("start")
    world.runtime.executions[0].started.set_result(PROCESS)
    await task
    assert world.runtime.executions[0].sizes == [SIZE]
    await world.manager.resize(session.id, ConsoleSize(3, 3))
    assert world.runtime.executions[0].sizes == [SIZE, ConsoleSize(3, 3)]


async def test_sizes_that_do_not_matter(world: World) -> None:
    session = await world.create(tty=False)
    await world.manager.resize(session.id, SIZE)
    task = asyncio.create_task(world.manager.start_detached(session.id))
    await world.wait_for("start")
    world.runtime.executions[0].started.set_result(PROCESS)
    await task
    await world.manager.resize(session.id, SIZE)
    assert world.runtime.executions[0].sizes == []
    world.runtime.executions[0].end()
    await world.wait_for("dispose")
    with pytest.raises(Conflict):
        await world.manager.resize(session.id, SIZE)


# -- containers


@pytest.mark.parametrize("status", [ContainerStatus.PAUSED, ContainerStatus.EXITED, ContainerStatus.CREATED])
async def test_a_container_that_cannot_take_it(world: World, status: ContainerStatus) -> None:
    session = await world.create()
    world.containers.set(status=status)
    with pytest.raises(Conflict):
        await world.manager.create("c1", ExecConfig(args=("true",)))
    with pytest.raises(Conflict):
        await world.manager.start_detached(session.id)
    assert world.said == []
    world.containers.set(status=ContainerStatus.RUNNING)
    assert world.state(session) is SessionState.CREATED, "a refusal must not use it up"


async def test_another_incarnation_is_another_container(world: World) -> None:
    session = await world.create()
    world.containers.set(init=ProcessIdentity(INIT.pid, INIT.start_time + 1))
    for attempt in (world.manager.start_detached(session.id), world.manager.resize(session.id, SIZE)):
        with pytest.raises(Conflict):
            await attempt
    world.containers.container = None
    with pytest.raises(NotFound):
        await world.manager.start_detached(session.id)
    assert world.said == []
    assert world.manager.inspect(session.id).state is SessionState.CREATED


@pytest.mark.parametrize(
    "session_id", ["", "..", "0" * 63, "0" * 65, "A" * 64, "0" * 64, "0" * 64 + "\n", "x" * 10_000]
)
async def test_ids_of_nobody(world: World, session_id: str) -> None:
    with pytest.raises(NotFound) as failure:
        world.manager.inspect(session_id)
    assert len(failure.value.message) < 200


# -- limits and time


async def test_a_cap_and_a_lifetime(tmp_path: Path) -> None:
    world = make_world(tmp_path, sessions=3, created_lifetime=-1.0)
    for _ in range(3):
        session = await world.create(tty=True)
        await world.manager.resize(session.id, SIZE)
    with pytest.raises(Exhausted):
        await world.create()
    assert world.manager.sweep() == 3
    assert world.manager.sweep() == 0
    assert world.manager._early_sizes == {}, "what was said of them is forgotten with them"
    await world.create()
    world.store.close()


# -- the service's own end


async def test_a_stop_leaves_the_processes_alone(world: World) -> None:
    session = await world.create(attach_stdout=True)
    task = asyncio.create_task(world.manager.start_attached(session.id, None, world.take_over))
    await world.wait_for("start")
    world.runtime.executions[0].started.set_result(PROCESS)
    await world.wait_for("running")
    await asyncio.wait_for(world.manager.close(), SOON)
    await asyncio.wait_for(task, SOON)
    assert world.said[-2:] == ["leave", "abandon"]
    assert world.state(session) is SessionState.RUNNING


async def test_a_stop_during_a_start(world: World) -> None:
    """Nobody may be left waiting, and the record says that a process may exist."""
    session, other = await world.create(), await world.create()
    attached = asyncio.create_task(world.manager.start_attached(session.id, None, world.take_over))
    await world.wait_for("start")
    detached = asyncio.create_task(world.manager.start_detached(other.id))
    async with asyncio.timeout(SOON):
        while world.said.count("start") < 2:
            await asyncio.sleep(0)
    await asyncio.wait_for(world.manager.close(), SOON)
    _, pending = await asyncio.wait([attached, detached], timeout=0.5)
    for task in pending:
        task.cancel()
    await asyncio.gather(attached, detached, return_exceptions=True)
    assert world.state(session) is SessionState.STARTING
    assert not pending, "a request waits for a start that nobody sees to any more"
    assert world.said.count("leave") == 2, "their descriptors are held"


async def test_recovery(world: World) -> None:
    session = await world.create()
    task = asyncio.create_task(world.manager.start_detached(session.id))
    await world.wait_for("start")
    world.runtime.executions[0].started.set_result(PROCESS)
    await task
    await world.manager.close()
    assert await world.manager.recover() == 1
    assert "adopt" in world.said
    world.runtime.executions[1].end(5)
    await world.wait_for("dispose")
    assert world.manager.inspect(session.id).exit == ExitStatus(5, ExitSource.SYNC_PIPE)


@pytest.mark.parametrize(("process", "state"), [(PROCESS, SessionState.RUNNING), (None, SessionState.STARTING)])
async def test_recovery_of_a_start(world: World, process: ProcessIdentity | None, state: SessionState) -> None:
    """The service died before it knew the pid, and conmon wrote it down, or did not."""
    session = await world.create()
    started = replace(session, state=SessionState.STARTING, started_at=1.0)
    world.store.move(session, started)
    world.runtime.adopted = process
    assert await world.manager.recover() == 1
    assert (world.state(session), world.manager.inspect(session.id).process) == (state, process)
    world.runtime.executions[0].end(5)
    await world.wait_for("dispose")
    assert world.manager.inspect(session.id).exit == ExitStatus(5, ExitSource.SYNC_PIPE)


async def test_a_start_is_kept_beside_its_process(world: World) -> None:
    session = await world.create(env=("SECRET=1",))
    task = asyncio.create_task(world.manager.start_detached(session.id))
    await world.wait_for("start")
    (record,) = world.runtime.records
    fields = json.loads(record)
    assert (fields["id"], fields["state"], fields["config"].get("env")) == (session.id, "starting", None)
    world.runtime.executions[0].started.set_result(PROCESS)
    await task


# -- a store that fails


async def test_a_store_that_is_full_at_the_start(world: World) -> None:
    session = await world.create()
    world.store.full = True
    with pytest.raises(Unavailable):
        await world.manager.start_detached(session.id)
    assert "prepare" not in world.said, "the effect came before the intent"
    world.store.full = False
    assert world.state(session) is SessionState.CREATED


@pytest.mark.parametrize("moment", ["running", "stopped"])
async def test_a_store_that_becomes_full_meanwhile(world: World, moment: str) -> None:
    """The client gets its end, and nothing is held for ever; no error is lost in the loop."""
    with no_loop_errors():
        session = await world.create(attach_stdout=True)
        task = asyncio.create_task(world.manager.start_attached(session.id, None, world.take_over))
        await world.wait_for("start")
        if moment == "running":
            world.store.full = True
        world.runtime.executions[0].started.set_result(PROCESS)
        if moment == "stopped":
            await world.wait_for("running")
            world.store.full = True
        world.runtime.executions[0].end(3)
        await asyncio.wait_for(task, SOON)
        await asyncio.wait_for(world.clients[0].wait_closed(), SOON)
        world.store.full = False
        async with asyncio.timeout(SOON):  # what is held else: descriptors, directory and monitor
            while not {"dispose", "leave"} & set(world.said):
                await asyncio.sleep(0)
    assert world.manager.live == 0


# -- what is over, and not cleared up yet


async def disposing(world: World) -> tuple[ExecSession, FakeExecution]:
    """Return a session whose end is on record, and whose disposal waits."""
    session = await world.create(attach_stdout=True)
    task = asyncio.create_task(world.manager.start_detached(session.id))
    await world.wait_for("start")
    execution = world.runtime.executions[0]
    execution.disposable.clear()
    execution.started.set_result(PROCESS)
    await task
    execution.end(3)
    await world.wait_for("stopped")
    await asyncio.sleep(0)
    assert world.manager.live == 0
    return session, execution


async def test_a_stop_waits_for_disposals(world: World) -> None:
    session, execution = await disposing(world)
    world.manager.sweep()
    assert world.runtime.kept == {session.id}, "what is being cleared up was swept away under its hands"
    closing = asyncio.create_task(world.manager.close())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not closing.done()
    execution.disposable.set()
    await asyncio.wait_for(closing, SOON)
    assert world.said[-1] == "dispose"
    world.manager.sweep()
    assert world.runtime.kept == set()


async def test_a_stop_does_not_wait_for_ever(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("execgate.sessions.manager._END_GRACE", 0.05)
    with no_loop_errors():
        await disposing(world)
        before = asyncio.all_tasks()
        await asyncio.wait_for(world.manager.close(), SOON)
        assert asyncio.all_tasks() < before, "its task is still there"


async def test_captures_of_nobody_are_removed(world: World, tmp_path: Path) -> None:
    session = await world.create(capture_stdout=True)
    known, stray = tmp_path / "captures" / session.id[:32], tmp_path / "captures" / ("0" * 32)
    for directory in (known, stray):
        directory.mkdir(parents=True)
        (directory / f"{0:020d}").write_bytes(b"")
    await world.manager.recover()
    assert known.exists()
    assert not stray.exists()
    await world.manager.remove(session.id)
    assert not known.exists()


async def test_a_store_that_is_full_when_the_process_runs_does_not_lose_it(world: World) -> None:
    session = await world.create()
    task = asyncio.create_task(world.manager.start_detached(session.id))
    await world.wait_for("start")
    world.store.full = True
    world.runtime.executions[0].started.set_result(PROCESS)
    assert (await asyncio.wait_for(task, SOON)).process == PROCESS
    world.runtime.executions[0].end(5)
    await world.wait_for("dispose")
    assert world.manager.inspect(session.id).exit == ExitStatus(5, ExitSource.SYNC_PIPE)
    world.store.full = False
    world.manager.sweep()
    assert world.store.get(session.id) == world.manager.inspect(session.id)


# -- removal


class Mortal(ProcessTree):
    """A tree whose KILL ends a fake execution."""

    def __init__(self, execution: FakeExecution) -> None:
        super().__init__(SessionCgroups(None), SessionId("0" * 64), PROCESS)
        self._execution = execution

    async def kill(self, monitor: ProcessIdentity | None) -> bool:
        self._execution.end(137)
        return True


async def start_mortal(world: World) -> ExecSession:
    """Create and start a session that can be killed."""
    session = await world.create()
    number = len(world.runtime.executions)
    task = asyncio.create_task(world.manager.start_detached(session.id))
    async with asyncio.timeout(SOON):
        while len(world.runtime.executions) == number:
            await asyncio.sleep(0)
    execution = world.runtime.executions[number]
    execution.tree = Mortal(execution)
    execution.started.set_result(PROCESS)
    await task
    return session


async def test_a_running_session_is_removed_by_force_only(world: World) -> None:
    session = await start_mortal(world)
    with pytest.raises(Conflict, match="it is running"):
        await world.manager.remove(session.id)
    waiting = asyncio.create_task(world.manager.wait(session.id))
    await asyncio.sleep(0)
    await asyncio.wait_for(world.manager.remove(session.id, force=True), SOON)
    assert (await asyncio.wait_for(waiting, SOON)).exit == ExitStatus(137, ExitSource.SYNC_PIPE)
    with pytest.raises(NotFound):
        world.manager.inspect(session.id)


async def test_a_removal_by_force_does_not_wait_for_ever(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a client does not read the last of the output, a session is not over, however dead its process is."""
    monkeypatch.setattr("execgate.sessions.manager._KILL_TIMEOUT", 0.05)
    session = await start_mortal(world)
    execution = world.runtime.executions[0]
    monkeypatch.setattr(execution, "end", lambda _code: None)
    with pytest.raises(Conflict, match="waits for a client to read"):
        await asyncio.wait_for(world.manager.remove(session.id, force=True), SOON)
    assert world.manager.inspect(session.id).running
    execution.ended.set_result(ExitStatus(137, ExitSource.SYNC_PIPE))
    assert (await asyncio.wait_for(world.manager.wait(session.id), SOON)).exit is not None
    await world.manager.remove(session.id)


async def test_whoever_waits_for_one_that_is_removed_unstarted(world: World) -> None:
    session = await world.create()
    waiting = asyncio.create_task(world.manager.wait(session.id))
    await asyncio.sleep(0)
    await world.manager.remove(session.id)
    with pytest.raises(NotFound):
        await asyncio.wait_for(waiting, SOON)


async def test_all_of_a_container_are_removed(world: World) -> None:
    created, running = await world.create(), await start_mortal(world)
    with pytest.raises(NotFound):
        await world.manager.remove_all("another")
    assert set(await world.manager.remove_all("name", force=True)) == {created.id, running.id}
    assert world.manager.list() == []
    assert list(await world.manager.remove_all("c1")) == []
    with pytest.raises(NotFound):
        await world.manager.remove_all("c2", force=True)


async def test_without_force_one_that_runs_is_in_the_way(world: World) -> None:
    running = await start_mortal(world)
    with pytest.raises(Conflict):
        await world.manager.remove_all("c1")
    assert world.manager.inspect(running.id).running
    await world.manager.remove(running.id, force=True)


async def test_a_container_that_is_gone_is_named_by_its_id(world: World) -> None:
    session = await world.create()
    world.containers.container = None
    assert [one.id for one in world.manager.list("c1")] == [session.id]
    assert list(await world.manager.remove_all("c1")) == [session.id]
    with pytest.raises(NotFound):
        world.manager.list("c1")


async def test_a_start_whose_monitor_comes_during_a_reload(world: World) -> None:
    """It is waited for, so that the next service gets the session with its client."""
    session = await world.create(attach_stdout=True)
    world.runtime.spawned.clear()
    starting = asyncio.create_task(world.manager.start_attached(session.id, None, world.take_over))
    await asyncio.sleep(0)
    world.manager.close_gate()
    handing = asyncio.create_task(world.manager.hand_over())
    for _ in range(10):
        await asyncio.sleep(0)
    assert not handing.done()
    world.runtime.spawned.set()
    await world.wait_for("start")
    world.runtime.executions[0].started.set_result(PROCESS)
    handed = (await asyncio.wait_for(handing, SOON))[session.id]
    assert [one.client for one in handed.live.attachments] == world.clients
    await starting


async def test_a_start_whose_monitor_comes_too_late_for_a_reload(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the next service's: in this one it never gets on record."""
    monkeypatch.setattr("execgate.sessions.manager._START_GRACE", 0.01)
    session = await world.create(attach_stdout=True)
    world.runtime.spawned.clear()
    starting = asyncio.create_task(world.manager.start_attached(session.id, None, world.take_over))
    await asyncio.sleep(0)
    world.manager.close_gate()
    assert await asyncio.wait_for(world.manager.hand_over(), SOON) == {}
    world.runtime.spawned.set()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not starting.done()
    assert world.state(session) is SessionState.CREATED
    assert world.said == ["close"]
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)


# -- a caller


class Warden:
    """Lets be created what it is asked for, with a bound, and refuses starts while the test says so."""

    def __init__(self, world: World) -> None:
        self.refuses = False
        self.confirmed: list[ExecSession] = []
        self._world = world

    def find(self, ref: str) -> Container:
        return self._world.containers.find(ref)

    def grant(self, container: Container, spec: Spec, config: ExecConfig, user: ResolvedUser) -> Grant:
        assert user.uid == 0
        return Grant(owner="unix:7", rule=f"in {container.name}", config=replace(config, timeout=9.0), max_sessions=2)

    def confirm(self, container: Container, spec: Spec, session: ExecSession) -> None:
        assert container.id == session.container.container_id
        if self.refuses:
            raise Forbidden("not any more")
        self.confirmed.append(session)


async def test_what_is_granted_is_what_is_kept(world: World) -> None:
    warden = Warden(world)
    session = await world.manager.create("name", ExecConfig(args=("true",)), warden)
    assert (session.owner, session.rule, session.config.timeout) == ("unix:7", "in name", 9.0)
    await world.manager.create("name", ExecConfig(args=("true",)), warden)
    with pytest.raises(Exhausted, match="as many as you may"):
        await world.manager.create("name", ExecConfig(args=("true",)), warden)
    await world.manager.remove(session.id)
    assert (await world.manager.create("name", ExecConfig(args=("true",)), warden)).owner == "unix:7"
    assert (await world.create()).owner == "program:self"  # who has a bound of its own


async def test_a_start_is_permitted_when_its_turn_has_come(world: World) -> None:
    """Refused, nothing has begun; and it may be asked again."""
    warden = Warden(world)
    session = await world.manager.create("name", ExecConfig(args=("true",)), warden)
    warden.refuses = True
    with pytest.raises(Forbidden):
        await world.manager.start_detached(session.id, caller=warden)
    with pytest.raises(Forbidden):
        await world.manager.start_attached(session.id, None, world.take_over, caller=warden)
    assert world.state(session) is SessionState.CREATED
    assert not world.runtime.executions
    warden.refuses = False
    task = asyncio.create_task(world.manager.start_detached(session.id, caller=warden))
    await world.wait_for("start")
    assert [one.id for one in warden.confirmed] == [session.id]
    world.runtime.executions[0].started.set_result(PROCESS)
    await asyncio.wait_for(task, SOON)
    world.runtime.executions[0].end()


# -- a witness


class SaidWitness:
    """Writes down what it is told, beside what happens, and refuses what the test says."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.refuses = ""
        self.flushing = asyncio.Event()
        self.flushing.set()

    def step(self, session: ExecSession) -> None:
        self._refuse(session.state.value)
        self.said.append(f"witnessed {session.state.value}")

    async def flushed(self) -> None:
        await self.flushing.wait()
        self._refuse("flushed")
        self.said.append("flushed")

    def _refuse(self, word: str) -> None:
        if self.refuses == word:
            raise Unavailable("the audit log cannot be written")


@pytest.fixture
async def witnessed(tmp_path: Path) -> Any:
    witness = SaidWitness()
    world = make_world(tmp_path, witness=witness)
    witness.said = world.said
    yield world, witness
    await world.manager.close()
    world.store.close()


async def test_a_witness_is_told_first(witnessed: tuple[World, SaidWitness]) -> None:
    world, _ = witnessed
    session = await world.create()
    task = asyncio.create_task(world.manager.start_detached(session.id))
    await world.wait_for("start")
    world.runtime.executions[0].started.set_result(PROCESS)
    await asyncio.wait_for(task, SOON)
    world.runtime.executions[0].end(7)
    await world.wait_for("dispose")
    assert world.said == [
        "witnessed created",
        *("witnessed starting", "starting", "prepare", "flushed", "start"),
        *("witnessed running", "running", "witnessed stopped", "stopped", "dispose"),
    ]


async def test_what_a_witness_refuses_has_not_begun(witnessed: tuple[World, SaidWitness]) -> None:
    world, witness = witnessed
    witness.refuses = "created"
    with pytest.raises(Unavailable):
        await world.create()
    assert world.manager.list() == []
    witness.refuses = "starting"
    session = await world.create()
    with pytest.raises(Unavailable):
        await world.manager.start_detached(session.id)
    assert world.said == ["witnessed created"]
    assert world.state(session) is SessionState.CREATED
    witness.refuses = ""
    task = asyncio.create_task(world.manager.start_detached(session.id))
    await world.wait_for("start")
    world.runtime.executions[0].started.set_result(PROCESS)
    await asyncio.wait_for(task, SOON)
    world.runtime.executions[0].end()


@pytest.mark.parametrize("way", ["detached", "attached"])
async def test_what_cannot_be_flushed_is_not_run(witnessed: tuple[World, SaidWitness], way: str) -> None:
    world, witness = witnessed
    witness.refuses = "flushed"
    session = await world.create()
    if way == "detached":
        start: Awaitable[object] = world.manager.start_detached(session.id)
    else:
        start = world.manager.start_attached(session.id, None, world.take_over)
    with pytest.raises(Unavailable):
        await start
    assert world.said[-3:] == ["abort", "witnessed stopped", "stopped"]
    assert not {"head", "start"} & set(world.said)
    ended = world.manager.inspect(session.id)
    assert ended.exit == ExitStatus(128, ExitSource.START_FAILURE)
    assert ended.error == "the audit log cannot be written"
    assert world.manager.live == 0


async def test_a_start_that_is_given_up_while_it_waits_for_the_disk(witnessed: tuple[World, SaidWitness]) -> None:
    world, witness = witnessed
    witness.flushing.clear()
    session = await world.create()
    task = asyncio.create_task(world.manager.start_attached(session.id, None, world.take_over))
    await world.wait_for("prepare")
    for _ in range(10):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert world.said[-3:] == ["abort", "witnessed stopped", "stopped"]
    assert world.manager.inspect(session.id).error == "the client left before the start"
    assert world.manager.live == 0


@pytest.mark.parametrize("spec", [{}, {"process": []}, {"process": {"args": ["init"], "env": 5}}])
async def test_a_configuration_that_is_none(world: World, spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exec in a container whose config.json was broken since is refused, at create and at start."""
    session = await world.create()
    monkeypatch.setattr(world.containers, "spec", lambda _: spec)
    with pytest.raises(Internal, match="cannot be read"):
        await world.create()
    with pytest.raises(Internal, match="cannot be read"):
        await world.manager.start_detached(session.id)
    assert not world.runtime.executions


# -- recordings


class FakeRecordings:
    """Begins recordings, or refuses to; writes down what is asked of it."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.full = False

    async def begin(self, session: ExecSession, size: ConsoleSize | None) -> Recording:
        self.said.append(f"begin {session.record} {size}")
        if self.full:
            raise Unavailable("the session cannot be recorded, and must not run without")
        return FakeRecording(self.said)

    def resume(self, session: ExecSession, *, in_order: bool) -> Recording:
        self.said.append(f"resume {in_order}")
        return FakeRecording(self.said)

    async def close(self) -> None:
        self.said.append("close")


class FakeRecording(Unrecorded):
    def __init__(self, said: list[str]) -> None:
        self._said = said

    def finish(self, status: ExitStatus, remark: str = "") -> None:
        self._said.append(f"finish {status.code} {remark}")

    def leave(self) -> None:
        self._said.append("leave")

    def discard(self) -> None:
        self._said.append("discard")


@pytest.fixture
async def recorded(tmp_path: Path) -> Any:
    recordings = FakeRecordings()
    world = make_world(tmp_path, recordings, Record.ALL)
    yield world, recordings
    await world.manager.close()
    world.store.close()


async def test_what_cannot_be_recorded_is_not_started(recorded: tuple[World, FakeRecordings]) -> None:
    """Nothing has happened, and it can be started once that is possible."""
    world, recordings = recorded
    recordings.full = True
    session = await world.create(console_size=SIZE, tty=True)
    assert (session.record, session.record_or_end) == (Record.ALL, True)
    with pytest.raises(Unavailable):
        await world.manager.start_detached(session.id)
    with pytest.raises(Unavailable):
        await world.manager.start_attached(session.id, None, world.take_over)
    assert world.said == []
    assert world.state(session) is SessionState.CREATED
    assert recordings.said == [f"begin all {SIZE}"] * 2
    recordings.full = False
    task = asyncio.create_task(world.manager.start_detached(session.id))
    await world.wait_for("start")
    world.runtime.executions[0].started.set_result(PROCESS)
    await task
    request = world.runtime.requests[0]
    assert (request.stdin, request.stdout, request.stderr) == (False, True, True), "nobody asked for it, but it is read"
    world.runtime.executions[0].end(7)
    await world.wait_for("dispose")
    assert recordings.said[2:] == [f"begin all {SIZE}", "finish 7 "]


async def test_a_start_that_was_not_begun_leaves_no_recording(recorded: tuple[World, FakeRecordings]) -> None:
    """One that was begun and failed is recorded as such."""
    world, recordings = recorded
    session = await world.create()
    world.store.full = True
    with pytest.raises(Unavailable):
        await world.manager.start_detached(session.id)
    assert recordings.said == ["begin all None", "discard"]
    world.store.full = False

    def fail(_request: ExecRequest) -> None:
        raise Unavailable("no process")

    world.runtime.before = fail
    with pytest.raises(Unavailable):
        await world.manager.start_detached(session.id)
    assert recordings.said[2:] == ["begin all None", "finish 128 no process"]


async def test_recordings_through_two_services(recorded: tuple[World, FakeRecordings]) -> None:
    world, recordings = recorded
    session = await world.create()
    task = asyncio.create_task(world.manager.start_detached(session.id))
    await world.wait_for("start")
    world.runtime.executions[0].started.set_result(PROCESS)
    await task
    handed = await world.manager.hand_over()
    assert recordings.said == ["begin all None", "close"]
    for before in (handed, None):
        said = FakeRecordings()
        following = SessionManager(
            containers=world.containers, runtime=world.runtime, store=world.store, events=world.events,
            read_accounts=lambda _: (b"", b""), all_capabilities=(), limits=Limits(drain=0.0),
            captures=world.manager._captures, recordings=said,
        )  # fmt: skip
        world.runtime.adopted = PROCESS
        assert await following.recover(before) == 1
        assert said.said == [f"resume {before is not None}"]
        await following.close()
        assert said.said[1:] == ["leave", "close"]
