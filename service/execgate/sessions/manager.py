"""The sessions' whole life: create, start, attach, signal, resize, inspect, wait, end, remove.

The order that everything rests on:

1. the monitor is prepared, so that what the host cannot give is refused with a status;
2. the record says `starting` before the monitor has anything that it could run (intent before effect);
3. the client's connection is taken over: the head of the answer is on the wire;
4. the process starts; the record says `running`;
5. when all output is delivered and the exit code is known, the record says `stopped`;
6. only then the client's stream is closed: clients ask for the code at once, and read a missing one as 0.

The manager finds sessions, checks what may be done to them, and owns the bounds. What happens between the start and
the end of one session is `live`'s; what is kept and told is the `ledger`'s.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal as signals
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from execgate.containers import proc
from execgate.model.access import Grant, Record
from execgate.model.config import ConsoleSize, ExecConfig, OnDisconnect, ResolvedUser
from execgate.model.container import Container, ContainerBinding, ContainerStatus
from execgate.model.errors import Conflict, Exhausted, InvalidArgument, NotFound, StartFailed, Unavailable
from execgate.model.events import Event
from execgate.model.ids import ContainerId, SessionId, new_session_id, parse_session_id
from execgate.model.principal import PROGRAM
from execgate.model.session import ByteCounts, ExecSession, ExitSource, SessionState
from execgate.oci.process import build_process, process_of, validate_config
from execgate.oci.users import container_user, resolve_user
from execgate.runtime.spawning import ExecRequest
from execgate.sessions.backlog import Backlog, CaptureBacklog, MemoryBacklog, Remembered
from execgate.sessions.events import EventBus
from execgate.sessions.gate import StartGate
from execgate.sessions.ledger import Ledger, Witness
from execgate.sessions.live import BOTH, Adopted, AttachedClient, Execution, Handed, LiveSession
from execgate.sessions.recording import NoRecordings, Recording, Recordings, Unrecorded
from execgate.sessions.store import SessionStore, StateChanged

log = logging.getLogger(__name__)

_KILL_TIMEOUT = 10.0
"""Seconds that a kill waits for the end: a process in the kernel's hands can take longer, and so can slow readers."""

_START_GRACE = 1.0
"""Seconds that starts under way get when the service stops."""

_END_GRACE = 2.0
"""Seconds that sessions which are over get to clear up when the service stops."""


_PROCESSORS = os.cpu_count() or 1

Spec = Mapping[str, Any]
"""A container's config.json."""


class Runtime(Protocol):
    """What runs processes in containers."""

    async def prepare(self, request: ExecRequest, intend: Callable[[], str]) -> Execution:
        """Make everything ready but the last step; call `intend` before anything could run. Unavailable.

        What it returns, the session's record, is kept as long as the process may run.
        """

    def begin(self, request: ExecRequest) -> None:
        """Take note that a start will probably come soon; of its process only `terminal` is known."""

    async def close(self) -> None:
        """Part from what was begun for starts that have not come."""

    def adopt(self, session: ExecSession) -> Adopted:
        """Take back a process that an earlier service started."""

    def sweep(self, keep: Collection[SessionId]) -> None:
        """Clear away what only now is not needed any more, and what belongs to no session of `keep`."""


class Containers(Protocol):
    """Which containers there are (`containers.catalog.Catalog`)."""

    def find(self, ref: str, /) -> Container:
        """Look one up by id, name or unique prefix; NotFound, InvalidArgument."""

    def get(self, container_id: ContainerId) -> Container | None:
        """Look one up by its id."""

    def spec(self, container: Container) -> Spec:
        """Return its bundle's config.json."""

    def binding(self, container: Container) -> ContainerBinding:
        """Return which incarnation it is."""


class Caller(Protocol):
    """On whose behalf a session is created or started. `spec` is the config.json that is built upon."""

    def find(self, ref: str) -> Container:
        """Look up one of the containers that the caller may see; NotFound, InvalidArgument."""

    def grant(self, container: Container, spec: Spec, config: ExecConfig, user: ResolvedUser) -> Grant:
        """Permit an exec as it would run. Forbidden."""

    def confirm(self, container: Container, spec: Spec, session: ExecSession) -> None:
        """Permit what was created to start now, in its container as it is now. Forbidden."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of the manager; times are seconds.

    `drain`: how long a background child may hold the output open. `retention`: how long a session can be inspected
    after its end. `created_lifetime`: how long one may wait for its start. `stop_timeout`: between SIGTERM and SIGKILL
    when neither a stop nor the container says anything else; `timeout_grace`: the same when a session's own time is
    over. `sessions`: how many are known at most; `created`: how many of them may wait for their start;
    `container_sessions`: how many may be created or running in one container. `parallel_starts` run at once,
    `queued_starts` wait for their turn. `capture`: bytes of output kept of one session.
    """

    drain: float = 2.0
    retention: float = 600.0
    created_lifetime: float = 3600.0
    stop_timeout: float = 10.0
    timeout_grace: float = 5.0
    sessions: int = 10_000
    created: int = 5_000
    container_sessions: int = 5_000
    parallel_starts: int = 64
    queued_starts: int = 2_000
    capture: int = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class HandedSession:
    """What one service leaves to the next of a session that runs."""

    live: Handed
    output: Remembered


class _Program:
    """This program itself: it has its rights from the kernel, and needs no rule."""

    def __init__(self, containers: Containers) -> None:
        self._containers = containers

    def find(self, ref: str) -> Container:
        """See `Caller`."""
        return self._containers.find(ref)

    def grant(self, container: Container, spec: Spec, config: ExecConfig, user: ResolvedUser) -> Grant:  # noqa: ARG002
        """See `Caller`."""
        return Grant(owner=PROGRAM.id, rule="", config=config)

    def confirm(self, container: Container, spec: Spec, session: ExecSession) -> None:
        """See `Caller`."""


class _TooLate(Exception):
    """A start is ready when all that runs is handed over already."""


class AlreadyStarted(Conflict):
    """A session is started once. Attached clients get this in the stream, as from dockerd."""


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
        captures: Path,
        witness: Witness | None = None,
        recordings: Recordings | None = None,
        record: Record = Record.NOTHING,
        record_or_end: bool = False,
    ) -> None:
        """`captures` is the directory of captured output; it is made when it is needed.

        `record` and `record_or_end` say how sessions are recorded of which no rule says it.
        """
        self._containers = containers
        self._runtime = runtime
        self._store = store
        self._ledger = Ledger(store, events, witness)
        self._read_accounts = read_accounts
        self._all_capabilities = all_capabilities
        self._limits = limits
        self._captures = captures
        self._recordings = recordings or NoRecordings()
        self._program = _Program(containers)
        self._record = record
        self._record_or_end = record_or_end
        self._gate = StartGate(limits.parallel_starts, limits.queued_starts)
        self._live: dict[SessionId, LiveSession] = {}
        self._ending: set[LiveSession] = set()  # over, and on record as such, but not cleared up yet
        self._watched: weakref.WeakSet[LiveSession] = weakref.WeakSet()  # anybody attached to them later; may be over
        self._backlogs: dict[SessionId, CaptureBacklog] = {}
        self._early_sizes: dict[SessionId, ConsoleSize] = {}
        self._preparing: dict[SessionId, asyncio.Future[None]] = {}  # whose start is not on record yet
        self._handing_over = False  # no start may get on record any more

    # -- create and look ---------------------------------------------------------------------------------------------

    async def create(self, container_ref: str, config: ExecConfig, caller: Caller | None = None) -> ExecSession:
        """Register an exec in a running container; without a `caller` for this program itself.

        NotFound, Conflict, InvalidArgument, Exhausted, Forbidden.
        """
        caller = caller or self._program
        validate_config(config)
        container = running(caller.find(container_ref))
        spec = self._containers.spec(container)
        user = await self._resolve_user(container, spec, config.user)
        grant = caller.grant(container, spec, config, user)
        self._check_room(container.id, grant)
        told = bool(grant.record)
        session = ExecSession(
            id=new_session_id(),
            container=self._containers.binding(container),
            config=grant.config,
            user=user,
            state=SessionState.CREATED,
            created_at=time.time(),
            since=time.monotonic(),
            container_labels=container.labels,
            aliases=container.aliases,
            engine=container.engine,
            image=container.image,
            owner=grant.owner,
            rule=grant.rule,
            record=grant.record if told else self._record,
            record_or_end=grant.record_or_end if told else self._record_or_end,
        )
        self._ledger.created(session)
        # Behind the answer, while the client reads it.
        asyncio.get_running_loop().call_soon(self._begin_ahead, session, container)
        return session

    def inspect(self, session_id: str) -> ExecSession:
        """Return a session by its full id. NotFound."""
        known = parse_session_id(session_id)
        session = self._ledger.get(known) if known else None
        if session is None:
            raise NotFound(f"No such exec instance: {session_id[:64]}")
        return session

    def list(
        self,
        container_ref: str | None = None,
        *,
        states: Collection[SessionState] = (),
        labels: Mapping[str, str | None] | None = None,
    ) -> Sequence[ExecSession]:
        """Return the sessions, oldest first: of one container, in one of `states`, with all `labels` (None: any value).

        NotFound for a container that is neither there nor known from a session.
        """
        sessions: Iterable[ExecSession]
        sessions = self._ledger.all() if container_ref is None else self._of_container(container_ref)
        return [
            session
            for session in sessions
            if (not states or session.state in states)
            and all(
                name in session.config.labels and value in (None, session.config.labels[name])
                for name, value in (labels or {}).items()
            )
        ]

    def active(self, container_ref: str) -> Sequence[ExecSession]:
        """Return the sessions of a container that run, each verified against the kernel by pid and start time."""
        return [
            session
            for session in self._of_container(container_ref)
            if session.running and (session.process is None or proc.is_alive(session.process))
        ]

    def of_id(self, container_id: ContainerId) -> Sequence[ExecSession]:
        """Return the sessions of a container, which may be gone, by its full id."""
        return self._ledger.of_container(container_id)

    def running_in(self, container_id: ContainerId) -> Sequence[SessionId]:
        """Return the ids of the sessions that run in a container."""
        return self._store.running_in(container_id)

    def transferred(self, session: ExecSession) -> ByteCounts:
        """Return the bytes that a session has moved so far."""
        live = self._live.get(session.id)
        return live.transferred if live is not None else session.transferred

    @property
    def live(self) -> int:
        """How many sessions run now."""
        return len(self._live)

    # -- start -------------------------------------------------------------------------------------------------------

    async def start_detached(
        self,
        session_id: str,
        size: ConsoleSize | None = None,
        *,
        intended: Callable[[], None] = lambda: None,
        caller: Caller | None = None,
    ) -> ExecSession:
        """Start with nothing attached; return once the pid is known. StartFailed, AlreadyStarted, Forbidden, …

        `intended` is called once the start is on record: from then on `started` tells its outcome. `caller` is asked
        when the start's turn has come.
        """
        live = await self._prepare(session_id, size, attach=False, preserved=(), intended=intended, caller=caller)
        begun: asyncio.Future[ExecSession] = asyncio.get_running_loop().create_future()
        begun.add_done_callback(asyncio.Future.exception)  # the request may be gone before its answer is known
        live.run(None, begun)
        return await asyncio.shield(begun)

    async def started(self, session_id: str) -> ExecSession:
        """Return a session once a start that is on record, be it an earlier service's, has its outcome. StartFailed."""
        await self._settled(self.inspect(session_id).id)
        session = self.inspect(session_id)
        if session.exit is not None and session.exit.source is ExitSource.START_FAILURE:
            raise StartFailed(session.error, session.exit.code)
        return session

    async def start_attached(
        self,
        session_id: str,
        size: ConsoleSize | None,
        take_over: Callable[[], Awaitable[AttachedClient]],
        *,
        preserved: Sequence[int] = (),
        caller: Caller | None = None,
    ) -> None:
        """Start with a client; return once it is the session's business. As `start_detached`.

        `take_over` is awaited once all is ready, and puts the head of the answer on the wire; what is raised before
        can still be answered with a status. What goes wrong after is told in the stream. `preserved` are descriptors
        of this program that the process gets as 3, 4, …; they stay the caller's.
        """
        live = await self._prepare(session_id, size, attach=True, preserved=preserved, caller=caller)
        try:
            client = await take_over()
        except BaseException:
            await live.undo()
            raise
        live.run(client)

    async def resize(self, session_id: str, size: ConsoleSize) -> None:
        """Set the size of the session's terminal; before the start it is kept for the start."""
        session = self.inspect(session_id)
        self._container_of(session)
        if session.state is SessionState.STOPPED:
            raise _not_running(session)
        if not session.config.tty:
            return  # as in dockerd: clients resize without asking what they started
        live = self._live.get(session.id)
        if live is None:
            self._early_sizes[session.id] = size
        else:
            live.resize(size)

    # -- while it runs -----------------------------------------------------------------------------------------------

    async def attach(
        self,
        session_id: str,
        take_over: Callable[[int], Awaitable[AttachedClient]],
        *,
        after: int | None = None,
        stdin: bool = True,
        wanted: frozenset[int] = BOTH,
    ) -> None:
        """Attach one more client; return when its stream is over.

        It gets the output from the offset `after` on as far as that is captured, then what comes; None is "from
        now on". `take_over` is told the offset at which the output really begins. Conflict when there is nothing to
        attach to.
        """
        session = self.inspect(session_id)
        backlog = await self.output(session_id, captured=False)
        if after is not None and after > backlog.end:
            raise InvalidArgument(f"the output has {backlog.end} bytes; it cannot begin after {after}")
        with backlog.reader():
            offset = backlog.end if after is None else max(after, backlog.start)
            client = await take_over(offset)
            live = self._live.get(session.id)
            if live is None:
                live = self._known_only(session, backlog)
            self._watched.add(live)
            await live.attach(client, offset, stdin=stdin, wanted=wanted)
            await client.wait_closed()

    async def output(self, session_id: str, *, captured: bool = True) -> Backlog:
        """Return what is kept of a session's output. Conflict when that is nothing.

        With `captured` False the output of a running session that is not captured counts too: it can be read from
        now on.
        """
        await self._settled(self.inspect(session_id).id)
        session = self.inspect(session_id)
        live = self._live.get(session.id)
        if live is not None and live.started and (session.config.captured or not captured):
            return live.backlog
        if not session.config.captured:
            if captured:
                raise Conflict(f"the output of exec {session.id} is not captured")
            raise _not_running(session)
        if session.state is SessionState.CREATED:
            raise _not_running(session)
        return await self._captured(session)

    async def write_stdin(self, session_id: str, data: bytes, *, eof: bool = False) -> None:
        """Write to the process's stdin, and end it. Conflict when it has none that is open."""
        live = await self._running(session_id)
        if not live.stdin.open:
            raise Conflict(f"the stdin of exec {live.session.id} is not open")
        await live.stdin.write(data)
        if eof:
            live.stdin.close()

    async def kill(self, session_id: str, signal: int = signals.SIGKILL) -> None:
        """Send a signal: SIGKILL to the whole tree of the session, any other to its process. Conflict.

        SIGKILL returns when the end is on record, so that whoever asks next sees it.
        """
        live = await self._running(session_id)
        await live.signal(signal)
        if signal == signals.SIGKILL:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ledger.end_of(live.session), _KILL_TIMEOUT)

    async def stop(self, session_id: str, grace: float | None = None) -> ExecSession:
        """Send SIGTERM, after `grace` seconds SIGKILL to what is left, and return the end. Conflict."""
        live = await self._running(session_id)
        await live.stop(self._stop_timeout(live.session) if grace is None else grace)
        return await self.wait(session_id)

    async def wait(self, session_id: str) -> ExecSession:
        """Return the session once it is over. NotFound when it is forgotten before it was ever started."""
        session = await self._ledger.end_of(self.inspect(session_id))
        if session is None:
            raise NotFound(f"No such exec instance: {session_id[:64]}")
        return session

    # -- the end -----------------------------------------------------------------------------------------------------

    async def remove(self, session_id: str, *, force: bool = False) -> None:
        """Forget a session that does not run; with `force` kill it first. Conflict."""
        session = self.inspect(session_id)
        if session.running:
            if not force:
                raise Conflict(f"cannot remove exec session {session.id}: it is running; stop it, or use force")
            await self._settled(session.id)
            live = self._live.get(session.id)
            if live is not None and live.started:
                await live.signal(signals.SIGKILL)
            try:
                await asyncio.wait_for(self._ledger.end_of(session), _KILL_TIMEOUT)
            except TimeoutError:
                raise Conflict(
                    f"cannot remove exec session {session.id}: it is killed, and its end waits for a client to read",
                    hint="a client that is attached takes its last output very slowly, or not at all",
                ) from None
        self._forget(lambda _: True, [session.id])

    async def remove_all(self, container_ref: str, *, force: bool = False) -> Sequence[SessionId]:
        """Forget every session of a container, as `remove` does, and return which those were."""
        removed = []
        for session in self._of_container(container_ref):
            await self.remove(session.id, force=force)
            removed.append(session.id)
        return removed

    async def recover(self, handed: Mapping[SessionId, HandedSession] | None = None) -> int:
        """Take back the sessions that ran when an earlier service ended; return how many.

        `handed` is what that one had time to say of them: then their clients are still there. Else these are gone, what
        the sessions write is captured if it was, and else thrown away. Their exit codes are kept either way.
        """
        handed = handed or {}
        adopted = [session for session in self._ledger.all() if session.running]
        for session in adopted:
            before = handed.get(session.id)
            backlog = await self._captured(session) if session.config.captured else MemoryBacklog()
            backlog.finished = False
            if before is not None and isinstance(backlog, MemoryBacklog):
                backlog.restore(before.output)
            execution = self._runtime.adopt(session)
            recording = self._recordings.resume(session, in_order=before is not None) if session.record else None
            live = self._new_live(self._known_to_run(session, execution), backlog, recording)
            live.adopt(execution, before.live if before is not None else None)
            self._watched.add(live)
        for session_id in handed.keys() - self._live.keys():
            await self._follow_again(session_id, handed[session_id])
        self._clear_away()
        self._remove_strays()
        return len(adopted)

    async def hand_over(self) -> dict[SessionId, HandedSession]:
        """Stop everything as it stands, and return what the next service needs to know of the running sessions."""
        await self.settle()
        await self._runtime.close()
        self._handing_over = True
        lives = list(self._live.values())
        ending = {live.task for live in self._ending if live.task is not None}
        handed = await asyncio.gather(*[live.hand_over() for live in lives])
        if ending:
            await asyncio.wait(ending, timeout=_END_GRACE)
        told = {live.session.id: _handed(live, one) for live, one in zip(lives, handed, strict=True)}
        for live in set(self._watched) - set(lives):  # over, and still read
            watchers = await live.hand_over_watchers()
            if (other := told.get(live.session.id)) is not None:  # the same capture
                watchers += other.live.attachments
            told[live.session.id] = _handed(live, Handed(attachments=watchers))
        await self._recordings.close()  # what will be written from here on is the next service's
        return told

    def ends(self) -> Sequence[Event]:
        """Return the events of the ends on record, oldest first, for a service that nobody has handed any events."""
        return self._ledger.ends()

    def close_gate(self) -> None:
        """Let no more starts begin: those that wait are for the next service."""
        self._gate.close()

    async def settle(self) -> None:
        """Let starts that are under way come to their outcome, for a moment."""
        until = time.monotonic() + _START_GRACE
        while (left := until - time.monotonic()) > 0:
            starts = [*self._preparing.values(), *(one.settled for one in self._live.values())]
            starts = [one for one in starts if not one.done()]
            if not starts:
                return
            # A conmon that cannot report the pid of its process gives up.
            await asyncio.wait(starts, timeout=left)

    async def close(self) -> None:
        """Stop serving. The processes live on; their monitors write exit files for whoever comes next."""
        await self.settle()
        await self._runtime.close()
        await asyncio.gather(*[live.close() for live in {*self._live.values(), *self._watched} - self._ending])
        ending = {live.task for live in self._ending if live.task is not None}
        if ending:
            await asyncio.wait(ending, timeout=_END_GRACE)
            await asyncio.gather(*[live.close() for live in list(self._ending)])
        await self._recordings.close()

    def sweep(self) -> int:
        """Forget what is past its time; return how many sessions that were."""
        now = time.monotonic()  # a clock that is set right must not forget what has just ended
        retention, lifetime = self._limits.retention, self._limits.created_lifetime

        def old(session: ExecSession) -> bool:
            return session.since < now - (retention if session.finished_at is not None else lifetime)

        self._clear_away()
        return self._forget(old)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _check_room(self, container_id: ContainerId, grant: Grant) -> None:
        limits = self._limits
        if grant.max_sessions is not None and self._store.unfinished_of(grant.owner, grant.rule) >= grant.max_sessions:
            raise Exhausted(
                f"you have {grant.max_sessions} exec sessions already, as many as you may; try again later",
                hint=f"max_sessions of rule {grant.rule}, for {grant.owner}",
            )
        if self._ledger.count() >= limits.sessions:
            raise Exhausted(
                f"{limits.sessions} exec sessions are known already; try again later",
                hint="raise max_sessions, or lower retention_seconds",
            )
        if self._store.created >= limits.created:
            raise Exhausted(
                f"{limits.created} exec sessions wait for their start already; try again later",
                hint="raise max_created, or lower created_lifetime_seconds",
            )
        if self._store.unfinished_in(container_id) >= limits.container_sessions:
            raise Exhausted(
                f"container {container_id} has {limits.container_sessions} exec sessions already; try again later",
                hint="raise max_sessions_per_container",
            )

    async def _resolve_user(self, container: Container, spec: Spec, user: str) -> ResolvedUser:
        default = container_user(process_of(spec))
        if not user:  # most execs. HOME, where the container's environment has none, is set by the runtime
            return default
        assert container.init is not None
        # Off the event loop: a container can make its own file system slow.
        passwd, group = await asyncio.to_thread(self._read_accounts, container.init.pid)
        return resolve_user(user, passwd=passwd, group=group, default=default)

    def _stop_timeout(self, session: ExecSession) -> float:
        """Return the stop timeout of a session's container, in seconds; our own where its engine knows none."""
        container = self._containers.get(session.container.container_id)
        told = container.stop_timeout if container is not None else None
        return self._limits.stop_timeout if told is None else told

    def _of_container(self, ref: str) -> Sequence[ExecSession]:
        """Return the sessions of a container, which may be gone, and is then named by its full id."""
        try:
            return self._ledger.of_container(self._containers.find(ref).id)
        except NotFound:
            if sessions := self._ledger.of_container(ContainerId(ref)):
                return sessions
            raise

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
        self,
        session_id: str,
        size: ConsoleSize | None,
        *,
        attach: bool,
        preserved: Sequence[int],
        intended: Callable[[], None] = lambda: None,
        caller: Caller | None = None,
    ) -> LiveSession:
        whose = self.inspect(session_id).container.container_id
        async with self._gate.turn(whose) as turn, self._preparation(session_id) as settled:
            session = self.inspect(session_id)
            container = self._container_of(session)  # dockerd looks at the container first, too
            if session.state is not SessionState.CREATED:
                raise _already_started(session)
            spec = self._containers.spec(container)
            (caller or self._program).confirm(container, spec, session)
            asked_before = self._early_sizes.get(session.id)
            request = self._request(session, container, spec, size, attach=attach, preserved=preserved)
            recording = await self._begin_recording(session, size or asked_before or session.config.console_size)
            begun: LiveSession | None = None

            def intend() -> str:
                nonlocal begun
                if self._handing_over:
                    raise _TooLate
                begun = self._new_live(self._ledger.starting(session), self._new_backlog(session), recording)
                asked = self._early_sizes.pop(session.id, None)
                if asked is not None and asked is not asked_before:  # while the monitor was spawned
                    begun.resize(asked)
                intended()
                settled()
                return self._store.text_of(session.id)

            try:
                execution = await self._runtime.prepare(request, intend)
            except StateChanged:
                recording.discard()
                raise _already_started(self.inspect(session_id)) from None
            except _TooLate:  # nothing was begun: the next service is asked once more
                recording.discard()
                await asyncio.get_running_loop().create_future()
                raise
            except BaseException as error:
                if begun is not None:
                    await begun.fail(StartFailed(str(error), 128))
                else:  # nothing was begun, and it may be started again
                    recording.discard()
                raise
            assert begun is not None
            begun.execution = execution
            turn.until = begun.settled
            await self._witnessed(begun)
            return begun

    async def _witnessed(self, begun: LiveSession) -> None:
        """Wait until a start may be acted upon, and undo it if it may not. Unavailable."""
        try:
            await self._ledger.witnessed()
        except Unavailable as error:
            await begun.undo(error.message)
            raise
        except BaseException:
            await begun.undo()
            raise

    async def _begin_recording(self, session: ExecSession, size: ConsoleSize | None) -> Recording:
        return await self._recordings.begin(session, size) if session.record else Unrecorded()

    @contextlib.asynccontextmanager
    async def _preparation(self, session_id: str) -> AsyncIterator[Callable[[], None]]:
        """Let one start of a session be prepared at a time; what it yields says that its intent is on record."""
        known = SessionId(session_id)
        while (other := self._preparing.get(known)) is not None:
            await asyncio.wait([other])
        prepared = self._preparing[known] = asyncio.get_running_loop().create_future()

        def settle() -> None:
            if not prepared.done():
                del self._preparing[known]
                prepared.set_result(None)

        try:
            yield settle
        finally:
            settle()

    def _request(
        self,
        session: ExecSession,
        container: Container,
        spec: Spec,
        size: ConsoleSize | None,
        *,
        attach: bool,
        preserved: Sequence[int],
    ) -> ExecRequest:
        config = session.config
        process = build_process(
            process_of(spec),
            config,
            session.user,
            console_size=size or self._early_sizes.get(session.id) or config.console_size,
            all_capabilities=self._all_capabilities,
            manner=container.manner,
            default_limits=proc.limits(container.init.pid) if container.init is not None else {},
        )
        return self._request_to_run(process, session, container, attach=attach, preserved=preserved)

    def _begin_ahead(self, session: ExecSession, container: Container) -> None:
        """Begin what a start of a new session will need, as it will be if the client has told what it wants.

        While starts keep all processors busy there is nothing to gain.
        """
        is_new = self._store.get(session.id) is session and session.id not in self._preparing
        if is_new and self._gate.active < _PROCESSORS:
            process = {"terminal": session.config.tty}
            self._runtime.begin(self._request_to_run(process, session, container, attach=True, preserved=()))

    def _request_to_run(
        self,
        process: Mapping[str, Any],
        session: ExecSession,
        container: Container,
        *,
        attach: bool,
        preserved: Sequence[int],
    ) -> ExecRequest:
        config = session.config
        # What may be attached to later has to be there from the start.
        attach = attach or config.on_disconnect is OnDisconnect.KEEP
        # Whoever records, or waits for a pause, has to have all output.
        all_output = session.record is not Record.NOTHING or config.idle_timeout is not None
        limit = None
        if config.timeout is not None:  # the monitor's own is for the time in which no service runs
            limit = config.timeout + self._limits.timeout_grace
        return ExecRequest(
            session_id=session.id,
            container=container,
            process=process,
            stdin=attach and config.attach_stdin,
            stdout=all_output or (attach and config.attach_stdout) or config.capture_stdout,
            stderr=all_output or (attach and config.attach_stderr) or config.capture_stderr,
            timeout=limit,
            preserved=tuple(preserved),
        )

    def _new_live(self, session: ExecSession, backlog: Backlog, recording: Recording | None) -> LiveSession:
        def over(live: LiveSession) -> None:
            if self._live.get(session.id) is live:
                del self._live[session.id]
            if live.task is not None and not live.task.done():
                self._ending.add(live)
                live.task.add_done_callback(lambda _: self._ending.discard(live))
            self._early_sizes.pop(session.id, None)

        live = self._live[session.id] = LiveSession(
            session,
            self._ledger,
            backlog,
            drain=self._limits.drain,
            grace=self._limits.timeout_grace,
            over=over,
            recording=recording,
        )
        return live

    def _known_only(self, session: ExecSession, backlog: Backlog) -> LiveSession:
        """Return a session that is over, for those who read what it has written."""
        return LiveSession(session, self._ledger, backlog, drain=0, grace=0, over=lambda _: None)

    async def _follow_again(self, session_id: SessionId, before: HandedSession) -> None:
        """Go on with those who read what a session that is over has written."""
        session = self._ledger.get(session_id)
        if session is None:  # removed while they read
            for one in before.live.attachments:
                one.client.abandon()
            return
        backlog = await self._captured(session) if session.config.captured else MemoryBacklog()
        if isinstance(backlog, MemoryBacklog):
            backlog.restore(before.output)
        backlog.finish()
        live = self._known_only(session, backlog)
        live.follow_again(before.live.attachments)
        self._watched.add(live)

    def _new_backlog(self, session: ExecSession) -> Backlog:
        if not session.config.captured:
            return MemoryBacklog()
        backlog = CaptureBacklog(self._capture_path(session.id), self._limits.capture)
        self._backlogs[session.id] = backlog
        return backlog

    async def _captured(self, session: ExecSession) -> CaptureBacklog:
        """Return a session's captured output, from an earlier service if need be."""
        if session.id not in self._backlogs:
            loaded = await CaptureBacklog.load(self._capture_path(session.id), self._limits.capture)
            loaded.finished = not session.running
            self._backlogs.setdefault(session.id, loaded)
        return self._backlogs[session.id]

    def _known_to_run(self, session: ExecSession, execution: Adopted) -> ExecSession:
        """Return the record of a process that was taken back: with who it is, if only its start is on record."""
        if session.state is not SessionState.STARTING or execution.process is None:
            return session
        return self._ledger.running(session, execution.process, execution.monitor)

    def _clear_away(self) -> None:
        self._runtime.sweep({*self._live, *(live.session.id for live in self._ending)})

    def _remove_strays(self) -> None:
        """Remove captured output that no session has any more."""
        known = {self._capture_path(session.id) for session in self._ledger.all()}
        for directory in self._captures.glob("*"):
            if directory not in known:
                shutil.rmtree(directory, ignore_errors=True)

    def _capture_path(self, session_id: SessionId) -> Path:
        return self._captures / session_id[:32]

    async def _running(self, session_id: str) -> LiveSession:
        """Return a session that runs, once a start that is under way has its outcome. Conflict."""
        session = self.inspect(session_id)
        await self._settled(session.id)  # a client has the head of its start's answer before the process is there
        live = self._live.get(session.id)
        if live is None or not live.started:
            raise _not_running(session)
        return live

    async def _settled(self, session_id: SessionId) -> None:
        """Wait for the outcome of a start that is under way."""
        live = self._live.get(session_id)
        if live is not None:
            await asyncio.wait([live.settled])

    def _forget(self, old: Callable[[ExecSession], bool], among: Iterable[SessionId] | None = None) -> int:
        gone = self._ledger.forget(old, among)
        for session_id in gone:
            self._early_sizes.pop(session_id, None)
            self._backlogs.pop(session_id, None)
            shutil.rmtree(self._capture_path(session_id), ignore_errors=True)
        return len(gone)


def _handed(live: LiveSession, stands: Handed) -> HandedSession:
    backlog = live.backlog
    return HandedSession(stands, backlog.remembered() if isinstance(backlog, MemoryBacklog) else Remembered())


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


def _not_running(session: ExecSession) -> Conflict:
    return Conflict(f"exec command {session.id} is not running")
