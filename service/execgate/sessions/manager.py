"""The sessions' whole life: create, start, resize, inspect, end.

The order that everything rests on:

1. the monitor is prepared, so that what the host cannot give is refused with a status;
2. the record says `starting` before the monitor has anything that it could run (intent before effect);
3. the client's connection is taken over: the head of the answer is on the wire;
4. the process starts; the record says `running`;
5. when all output is delivered and the exit code is known, the record says `stopped`;
6. only then the client's stream is closed: clients ask for the code at once, and read a missing one as 0.

Each started session has one task of its own, owned here. A client's request waits for that task but is not it:
when the client goes, the session goes on.
"""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from execgate.model.config import ConsoleSize, ExecConfig, ResolvedUser
from execgate.model.container import Container, ContainerBinding, ContainerStatus
from execgate.model.errors import Conflict, ExecgateError, Exhausted, Internal, NotFound, StartFailed, Unavailable
from execgate.model.events import Event
from execgate.model.ids import ContainerId, SessionId, new_session_id, parse_session_id
from execgate.model.process import ProcessIdentity
from execgate.model.session import ExecSession, ExitSource, ExitStatus, SessionState
from execgate.oci.process import build_process, validate_config
from execgate.oci.users import container_user, resolve_user
from execgate.runtime.conmon import ExecRequest
from execgate.runtime.streams import ExecStreams
from execgate.sessions.events import EventBus
from execgate.sessions.pump import Client, Departure, Pump
from execgate.sessions.store import SessionStore, StateChanged

log = logging.getLogger(__name__)


_START_GRACE = 1.0
"""Seconds that starts under way get when the service stops."""


class Execution(Protocol):
    """One process, prepared (`runtime.conmon.ConmonExec`)."""

    @property
    def streams(self) -> ExecStreams:
        """What of it is attached."""

    @property
    def monitor(self) -> ProcessIdentity | None:
        """Its monitor."""

    async def start(self) -> ProcessIdentity:
        """Run it; StartFailed."""

    async def wait(self) -> ExitStatus:
        """Return how it ended."""

    def resize(self, size: ConsoleSize) -> None:
        """Set its terminal's size."""

    async def dispose(self) -> None:
        """Leave nothing of it behind."""

    async def abort(self) -> None:
        """Undo a start that has not happened."""

    def leave(self) -> None:
        """Let go of it without ending it."""


class Runtime(Protocol):
    """What runs processes in containers."""

    async def prepare(self, request: ExecRequest, intend: Callable[[], None]) -> Execution:
        """Make everything ready but the last step; call `intend` before anything could run. Unavailable."""

    def adopt(self, session: ExecSession) -> Execution:
        """Take back a process that an earlier service started."""


class Containers(Protocol):
    """Which containers there are (`containers.catalog.Catalog`)."""

    def find(self, ref: str) -> Container:
        """Look one up by id, name or unique prefix; NotFound, InvalidArgument."""

    def get(self, container_id: ContainerId) -> Container | None:
        """Look one up by its id."""

    def spec(self, container: Container) -> Mapping[str, Any]:
        """Return its bundle's config.json."""

    def binding(self, container: Container) -> ContainerBinding:
        """Return which incarnation it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of the manager, in seconds where not said otherwise.

    `drain`: how long a background child may hold the output open. `retention`: how long a session can be inspected
    after its end. `created_lifetime`: how long one may wait for its start. `sessions`: how many are known at most.
    """

    drain: float = 2.0
    retention: float = 600.0
    created_lifetime: float = 3600.0
    sessions: int = 10_000


class AlreadyStarted(Conflict):
    """A session is started once. Attached clients get this in the stream, as from dockerd."""


class _Live:
    """A session between its start and its end, as far as it is not in the record."""

    __slots__ = ("begin", "execution", "size", "started", "task")

    def __init__(self, size: ConsoleSize | None) -> None:
        self.execution: Execution | None = None
        self.size = size
        self.started = False
        self.begin: asyncio.Future[ExecSession] | None = None
        self.task: asyncio.Task[None] | None = None


class SessionManager:
    """Creates and runs sessions. One per service."""

    def __init__(
        self,
        *,
        containers: Containers,
        runtime: Runtime,
        store: SessionStore,
        events: EventBus,
        read_accounts: Callable[[int], tuple[bytes, bytes]],
        all_capabilities: Sequence[str],
        limits: Limits,
    ) -> None:
        self._containers = containers
        self._runtime = runtime
        self._store = store
        self._events = events
        self._read_accounts = read_accounts
        self._all_capabilities = all_capabilities
        self._limits = limits
        self._live: dict[SessionId, _Live] = {}
        self._early_sizes: dict[SessionId, ConsoleSize] = {}
        self._unsaved: dict[SessionId, tuple[ExecSession, ExecSession]] = {}

    # -- create and inspect ---------------------------------------------------------------------------------------

    async def create(self, container_ref: str, config: ExecConfig) -> ExecSession:
        """Register an exec in a running container. NotFound, Conflict, InvalidArgument, Exhausted."""
        validate_config(config)
        container = running(self._containers.find(container_ref))
        user = await self._resolve_user(container, config.user)
        if self._store.count() >= self._limits.sessions:
            raise Exhausted(
                f"{self._limits.sessions} exec sessions are known already; try again later",
                hint="raise max_sessions, or lower retention_seconds",
            )
        session = ExecSession(
            id=new_session_id(),
            container=self._containers.binding(container),
            config=config,
            user=user,
            state=SessionState.CREATED,
            created_at=time.time(),
            container_labels=container.annotations,
        )
        self._store.add(session)
        self._publish(f"exec_create: {' '.join(config.args)}", session)
        return session

    def inspect(self, session_id: str) -> ExecSession:
        """Return a session by its full id. NotFound."""
        known = parse_session_id(session_id)
        if known in self._unsaved:
            return self._unsaved[known][1]
        session = self._store.get(known) if known else None
        if session is None:
            raise NotFound(f"No such exec instance: {session_id[:64]}")
        return session

    def running_in(self, container_id: ContainerId) -> list[SessionId]:
        """Return the ids of the sessions that run in a container."""
        return self._store.running_in(container_id)

    @property
    def live(self) -> int:
        """How many sessions run now."""
        return len(self._live)

    # -- start ----------------------------------------------------------------------------------------------------

    async def start_detached(self, session_id: str, size: ConsoleSize | None = None) -> ExecSession:
        """Start with nothing attached; return once the pid is known. StartFailed, AlreadyStarted, …"""
        session, live, execution = await self._prepare(session_id, size, attach=False)
        begun: asyncio.Future[ExecSession] = asyncio.get_running_loop().create_future()
        begun.add_done_callback(asyncio.Future.exception)  # the request may be gone before its answer is known
        live.task = asyncio.create_task(
            self._run(session, live, execution, None, begun), name=f"exec {session.id[:12]}"
        )
        return await asyncio.shield(begun)

    async def start_attached(
        self, session_id: str, size: ConsoleSize | None, take_over: Callable[[], Awaitable["AttachedClient"]]
    ) -> None:
        """Start with a client; return when its stream is over, because of the process or of the client.

        `take_over` is awaited once all is ready, and puts the head of the answer on the wire; what is raised before
        can still be answered with a status. What goes wrong after is told in the stream.
        """
        session, live, execution = await self._prepare(session_id, size, attach=True)
        try:
            client = await take_over()
        except BaseException:
            await self._undo(session, execution)
            raise
        live.task = asyncio.create_task(self._run(session, live, execution, client), name=f"exec {session.id[:12]}")
        await client.wait_closed()

    async def resize(self, session_id: str, size: ConsoleSize) -> None:
        """Set the size of the session's terminal; before the start it is kept for the start."""
        session = self.inspect(session_id)
        self._container_of(session)
        if session.state is SessionState.STOPPED:
            raise Conflict(f"exec command {session.id} is not running")
        if not session.config.tty:
            return  # as in dockerd: clients resize without asking what they started
        live = self._live.get(session.id)
        if live is None:
            self._early_sizes[session.id] = size
        elif live.started and live.execution is not None:
            live.execution.resize(size)
        else:
            live.size = size

    # -- the end --------------------------------------------------------------------------------------------------

    def recover(self) -> int:
        """Take back the sessions that ran when an earlier service ended; return how many.

        Their clients are gone, and what they write is read and thrown away; their exit codes are kept.
        """
        adopted = [session for session in self._store.all() if session.running]
        for session in adopted:
            live = self._live[session.id] = _Live(None)
            live.execution, live.started = self._runtime.adopt(session), True
            live.task = asyncio.create_task(
                self._attend(session, live.execution, None), name=f"adopted exec {session.id[:12]}"
            )
        return len(adopted)

    async def close(self) -> None:
        """Stop serving. The processes live on; their monitors write exit files for whoever comes next."""
        starts = [live.begin for live in self._live.values() if live.begin is not None and not live.begin.done()]
        if starts:  # a conmon that cannot report the pid of its process gives up
            await asyncio.wait(starts, timeout=_START_GRACE)
        tasks = [live.task for live in self._live.values() if live.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def remove(self, session_id: str, *, force: bool) -> None:
        """Forget a session. Conflict while it runs, unless `force`: then it is killed, and its end waited for."""
        session = self.inspect(session_id)
        live = self._live.get(session.id)
        if session.running and not force:
            raise Conflict(f"exec command {session.id} is running")
        if live is not None and live.task is not None:
            if session.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(session.process.pid, signal.SIGKILL)
            await asyncio.wait([live.task])
        self._store.remove(session.id)

    def sweep(self) -> int:
        """Forget what is past its time; return how many sessions that were."""
        now = time.time()
        for session_id, (before, after) in list(self._unsaved.items()):
            self._store.move(before, after)
            del self._unsaved[session_id]
        for session_id in [known for known in self._early_sizes if self._store.get(known) is None]:
            del self._early_sizes[session_id]
        retention, lifetime = self._limits.retention, self._limits.created_lifetime

        def old(session: ExecSession) -> bool:
            if session.finished_at is not None:
                return session.finished_at < now - retention
            return session.created_at < now - lifetime

        return self._store.forget(old)

    # -- inside ---------------------------------------------------------------------------------------------------

    async def _resolve_user(self, container: Container, user: str) -> ResolvedUser:
        default = container_user(self._containers.spec(container).get("process", {}))
        if not user:  # most execs. HOME, where the container's environment has none, is set by the runtime
            return default
        assert container.init is not None
        # Off the event loop: a container can make its own file system slow.
        passwd, group = await asyncio.to_thread(self._read_accounts, container.init.pid)
        return resolve_user(user, passwd=passwd, group=group, default=default)

    def _container_of(self, session: ExecSession) -> Container:
        """Return the session's container if it can take a process: the same incarnation, running, not paused."""
        container = self._containers.get(session.container.container_id)
        if container is None:
            raise NotFound(f"No such container: {session.container.container_id}")
        container = running(container)
        if self._containers.binding(container) != session.container:
            raise Conflict(
                f"container {container.id} is not running",
                hint="it was recreated since the exec was created; a session belongs to one incarnation",
            )
        return container

    async def _prepare(
        self, session_id: str, size: ConsoleSize | None, *, attach: bool
    ) -> tuple[ExecSession, _Live, Execution]:
        session = self.inspect(session_id)
        container = self._container_of(session)  # dockerd looks at the container first, too
        if session.state is not SessionState.CREATED:
            raise _already_started(session)
        config = session.config
        process = build_process(
            self._containers.spec(container)["process"],
            config,
            session.user,
            console_size=size or self._early_sizes.get(session.id) or config.console_size,
            all_capabilities=self._all_capabilities,
        )
        live = _Live(None)

        def intend() -> None:
            nonlocal session
            session = self._store.move(session, replace(session, state=SessionState.STARTING, started_at=time.time()))
            self._early_sizes.pop(session.id, None)
            self._live[session.id] = live

        request = ExecRequest(
            session_id=session.id,
            container=container,
            process=process,
            stdin=attach and config.attach_stdin,
            stdout=attach and config.attach_stdout,
            stderr=attach and config.attach_stderr,
        )
        try:
            live.execution = await self._runtime.prepare(request, intend)
        except StateChanged:
            raise _already_started(self.inspect(session_id)) from None
        except BaseException as error:
            if self._live.get(session.id) is live:  # else nothing was begun, and it may be started again
                self._failed(session, StartFailed(str(error), 128))
            raise
        return session, live, live.execution

    async def _undo(self, session: ExecSession, execution: Execution) -> None:
        """The client left, or could not be taken over, before anything ran."""
        await execution.abort()
        self._failed(session, StartFailed("the client left before the start", 128))

    async def _run(
        self,
        session: ExecSession,
        live: _Live,
        execution: Execution,
        client: "AttachedClient | None",
        begun: "asyncio.Future[ExecSession] | None" = None,
    ) -> None:
        """The session's own task: from the start of its process to the end of its record."""
        self._publish(f"exec_start: {' '.join(session.config.args)}", session)
        try:
            live.begin = asyncio.ensure_future(self._begin(session, live, execution))
            session = await live.begin
        except asyncio.CancelledError:
            _settle(begun, Unavailable("the service stops"))
            self._let_go(session, execution, client)
            raise
        except Exception as error:
            known = error if isinstance(error, ExecgateError) else _unforeseen(session, error)
            _settle(begun, known)
            if not isinstance(error, StartFailed):  # after which nothing is left
                self._let_go(session, execution, None)
            if client is not None:
                await client.finish(known.message)
            return
        _settle(begun, session)
        await self._attend(session, execution, client)

    async def _attend(self, session: ExecSession, execution: Execution, client: "AttachedClient | None") -> None:
        """See a running session to its end. Whatever happens, its client is not left waiting."""
        message = ""
        try:
            status = await self._pump(session, execution, client)
            self._ended(session, status)
        except asyncio.CancelledError:  # the service stops; the process does not
            self._let_go(session, execution, client)
            raise
        except Exception as error:
            message = _unforeseen(session, error).message
            self._live.pop(session.id, None)
        if client is not None:
            await client.finish(message)
        await execution.dispose()

    def _let_go(self, session: ExecSession, execution: Execution, client: "AttachedClient | None") -> None:
        """Part from a session whose process may live on."""
        self._live.pop(session.id, None)
        execution.leave()
        if client is not None:
            client.abandon()

    async def _begin(self, session: ExecSession, live: _Live, execution: Execution) -> ExecSession:
        try:
            process = await execution.start()
        except StartFailed as error:
            log.info("exec %s in %s did not start: %s", session.id[:12], session.container.name, error.message)
            self._failed(session, error)
            raise
        session = self._store.move(
            session,
            replace(session, state=SessionState.RUNNING, process=process, monitor=execution.monitor),
        )
        live.started = True
        if live.size is not None:
            with contextlib.suppress(ExecgateError):  # it came during the start, and the process may be over already
                execution.resize(live.size)
        return session

    async def _pump(self, session: ExecSession, execution: Execution, client: "AttachedClient | None") -> ExitStatus:
        """Deliver all output, and return the exit code."""
        config = session.config
        exited = asyncio.ensure_future(execution.wait())
        pump = Pump(execution.streams, client, detach_keys=config.detach_keys, tty=config.tty)
        departure = asyncio.ensure_future(self._watch_departure(session, pump, client))
        try:
            await pump.run(exited, self._limits.drain)
            return exited.result()
        finally:
            for task in (exited, departure):
                task.cancel()
            await asyncio.gather(exited, departure, return_exceptions=True)

    async def _watch_departure(self, session: ExecSession, pump: Pump, client: "AttachedClient | None") -> None:
        departure = await pump.departure
        if departure is Departure.DETACHED:
            self._publish("exec_detach", session)
        log.debug("exec %s lost its client: %s", session.id[:12], departure.value)
        if client is not None:
            await client.finish()

    def _failed(self, session: ExecSession, error: StartFailed) -> None:
        self._ended(session, ExitStatus(error.exit_code, ExitSource.START_FAILURE), error=error.message)

    def _ended(self, session: ExecSession, status: ExitStatus, error: str = "") -> None:
        """Keep the end, then tell it. A store that cannot take it now gets it later; until then it is kept here."""
        self._live.pop(session.id, None)
        self._early_sizes.pop(session.id, None)
        after = replace(session, state=SessionState.STOPPED, finished_at=time.time(), exit=status, error=error)
        try:
            self._store.move(session, after)
        except Unavailable as failure:
            log.error("the end of exec %s is not stored yet: %s (%s)", session.id[:12], failure, failure.hint)
            self._unsaved[session.id] = (session, after)
        self._publish("exec_die", session, exitCode=str(status.code))

    def _publish(self, action: str, session: ExecSession, **attributes: str) -> None:
        labels = session.container_labels
        image = labels.get("org.opencontainers.image.ref.name", "")
        self._events.publish(
            Event(
                action=action,
                container_id=session.container.container_id,
                time_ns=time.time_ns(),
                attributes={
                    **labels,
                    "image": image,
                    "name": session.container.name,
                    "execID": session.id,
                    **attributes,
                },
            )
        )


class AttachedClient(Client, Protocol):
    """A client that the manager can also part from."""

    async def finish(self, message: str = "") -> None:
        """Deliver what was sent, then `message` if any, and close."""

    def abandon(self) -> None:
        """Close at once: the service stops."""

    async def wait_closed(self) -> None:
        """Return once the client's stream is over."""


def running(container: Container) -> Container:
    """Return `container` if a process can be started in it. Conflict."""
    if container.status is ContainerStatus.PAUSED:
        raise Conflict(f"Container {container.id} is paused, unpause the container before exec")
    if container.status is not ContainerStatus.RUNNING or container.init is None:
        raise Conflict(f"container {container.id} is not running")
    return container


def _already_started(session: ExecSession) -> AlreadyStarted:
    tense = "has already run" if session.state is SessionState.STOPPED else "is already running"
    return AlreadyStarted(f"exec command {session.id} {tense}")


def _settle(begun: "asyncio.Future[ExecSession] | None", outcome: ExecSession | ExecgateError) -> None:
    """Tell whoever waits for the start of a detached session."""
    if begun is None or begun.done():
        return
    if isinstance(outcome, ExecgateError):
        begun.set_exception(outcome)
    else:
        begun.set_result(outcome)


def _unforeseen(session: ExecSession, error: Exception) -> Internal:
    """Log what nobody planned for, and return what the client may know of it."""
    log.error("exec %s in %s failed", session.id[:12], session.container.name, exc_info=error)
    return Internal("internal error; the service's log has the details")
