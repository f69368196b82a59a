"""The engine: everything but HTTP, assembled from a configuration. The service is one user of it, programs are others.

::

    async with open_engine(Config(state_dir="/run/my-agent")) as engine:
        result = await engine.run("web", ["ls", "/"], timeout=10)
        print(result.exit_code, result.stdout.decode())
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import resource
import signal as signals
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Unpack

from execgate import __version__
from execgate.config import Config
from execgate.containers import proc
from execgate.containers.catalog import Catalog
from execgate.containers.host import host_catalog
from execgate.gate.audit import open_audit
from execgate.gate.equivalence import HostEquivalence
from execgate.gate.policy import default_policy
from execgate.gate.rules import Policy
from execgate.model.config import ConsoleSize
from execgate.model.errors import Conflict, StartFailed, Unavailable
from execgate.model.events import Event
from execgate.model.ids import SessionId
from execgate.model.options import ExecOptions, exec_config
from execgate.model.session import ExecSession, ExitSource
from execgate.oci import capabilities
from execgate.runtime.conmon import ConmonRuntime
from execgate.runtime.fdstore import FdStore, NoFdStore
from execgate.runtime.rootfs import read_in_container
from execgate.runtime.tree import SessionCgroups
from execgate.runtime.versions import BACKPORTS, runtime_version
from execgate.sessions.events import EventBus
from execgate.sessions.ledger import Witness
from execgate.sessions.live import BOTH
from execgate.sessions.local import LocalStream
from execgate.sessions.manager import HandedSession, Limits, SessionManager
from execgate.sessions.oneshot import RunResult
from execgate.sessions.oneshot import run as run_once
from execgate.sessions.store import SessionStore

log = logging.getLogger(__name__)

DATABASE = "sessions.db"
_SWEEP_INTERVAL = 15.0
_SETPCAP = "CAP_SETPCAP"


class Engine:
    """The containers of this host, the sessions in them, and the events of these. Made by `open_engine`.

    Its methods are what programs need most; `containers` (a `Catalog`), `sessions` (a `SessionManager`) and `events`
    (an `EventBus`) are all there is. `options` are the fields of `ExecConfig`, both outputs attached if nothing else
    is said. Errors are the categories of `execgate.model.errors`.
    """

    def __init__(self, containers: Catalog, sessions: SessionManager, events: EventBus) -> None:
        self.containers = containers
        self.sessions = sessions
        self.events = events

    async def run(
        self,
        container: str,
        args: Sequence[str],
        *,
        stdin: bytes = b"",
        limit: int = 1024 * 1024,
        preserved: Sequence[int] = (),
        sizes: AsyncIterable[ConsoleSize] | None = None,
        **options: Unpack[ExecOptions],
    ) -> RunResult:
        """Run a command to its end and return what it wrote; see `sessions.oneshot.run`."""
        return await run_once(
            self.sessions,
            container,
            exec_config(args, options),
            stdin=stdin,
            limit=limit,
            preserved=preserved,
            sizes=sizes,
        )

    async def create(self, container: str, args: Sequence[str], **options: Unpack[ExecOptions]) -> ExecSession:
        """Register an exec in a running container. NotFound, Conflict, InvalidArgument, Exhausted."""
        return await self.sessions.create(container, exec_config(args, options))

    async def start_detached(self, session_id: str) -> ExecSession:
        """Start with nothing attached; return once the process runs. StartFailed, Conflict, NotFound, Exhausted."""
        return await self.sessions.start_detached(session_id)

    async def start(
        self,
        session_id: str,
        *,
        size: ConsoleSize | None = None,
        preserved: Sequence[int] = (),
        sizes: AsyncIterable[ConsoleSize] | None = None,
    ) -> LocalStream:
        """Start, attached to what the session was created to attach; return once the process runs.

        StartFailed, Conflict, NotFound, Exhausted, Unavailable. `preserved` are descriptors of this program that the
        process gets as 3, 4, …; they stay the caller's, to be closed once this returns. The terminal takes on each of
        `sizes` as it comes.
        """
        stream = LocalStream(self.sessions, self.sessions.inspect(session_id).id)

        async def serving() -> None:
            await self.sessions.start_attached(session_id, size, stream.take_over, preserved=preserved)
            await stream.wait_closed()

        await stream.serve(serving(), sizes)
        session = self.sessions.inspect(session_id)
        if session.exit is not None and session.exit.source is ExitSource.START_FAILURE:
            await stream.close()
            raise StartFailed(session.error, session.exit.code)
        return stream

    async def attach(
        self, session_id: str, *, after: int | None = None, stdin: bool = True, wanted: frozenset[int] = BOTH
    ) -> LocalStream:
        """Attach to a running session, or to what is captured of one that is over; see `SessionManager.attach`."""
        stream = LocalStream(self.sessions, self.sessions.inspect(session_id).id)
        await stream.serve(
            self.sessions.attach(session_id, stream.take_over_at, after=after, stdin=stdin, wanted=wanted)
        )
        return stream

    def inspect(self, session_id: str) -> ExecSession:
        """Return a session as it is now. NotFound."""
        return self.sessions.inspect(session_id)

    async def kill(self, session_id: str, signal: int = signals.SIGKILL) -> None:
        """Send a signal to the process, SIGKILL to its whole tree, which is then over. Conflict."""
        await self.sessions.kill(session_id, signal)

    async def stop(self, session_id: str, grace: float | None = None) -> ExecSession:
        """Send SIGTERM, after `grace` seconds SIGKILL to what is left, and return the end. Conflict."""
        return await self.sessions.stop(session_id, grace)

    async def wait(self, session_id: str) -> ExecSession:
        """Return the session once it is over. NotFound when it is forgotten before it was ever started."""
        return await self.sessions.wait(session_id)

    async def remove(self, session_id: str, *, force: bool = False) -> None:
        """Forget a session that does not run; with `force` kill it first. Conflict."""
        await self.sessions.remove(session_id, force=force)


@contextlib.asynccontextmanager
async def open_engine(
    config: Config,
    store: FdStore | None = None,
    handed: Mapping[SessionId, HandedSession] | None = None,
    *,
    told: Sequence[Event] = (),
    next_event: int = 0,
    witness: Witness | None = None,
) -> AsyncIterator[Engine]:
    """Open the engine of a state directory, which is then locked, and take back the sessions that live in it.

    `store` keeps descriptors for the next engine; without one a process without a terminal loses its stdin in between.
    Who has one is a service that others wait for: it is open before it has looked around.
    `handed` is what an earlier one has said of its sessions in a graceful reload, `told` the events that it remembered,
    `next_event` the number of the one that would have come next. `witness` is told of every step of a session; without
    one it is the audit log of the configuration.
    At the end running processes are left alive. Raises the category of whatever keeps it from opening: Conflict when
    another program has the state directory, Unavailable when the host lacks something.
    """
    async with contextlib.AsyncExitStack() as cleanup:
        _check_powers()
        _take_state_dir(config.state_dir, cleanup)
        if witness is None:
            witness = cleanup.enter_context(open_audit(config.audit(), version=__version__))
        cgroups = SessionCgroups.open()
        cleanup.callback(cgroups.close)
        runtime = _runtime(config, cgroups, store or NoFdStore())
        records = SessionStore(config.state_dir / DATABASE, boot_id=proc.boot_id(), lost=runtime.records)
        cleanup.callback(records.close)
        events = EventBus()
        cleanup.callback(events.close)
        captures = config.state_dir / "captures"
        captures.mkdir(mode=0o700, exist_ok=True)
        catalog = catalog_of(config)
        if store is None:
            await asyncio.to_thread(look_around, catalog, config)
        manager = SessionManager(
            containers=catalog,
            runtime=runtime,
            store=records,
            events=events,
            read_accounts=_read_accounts,
            all_capabilities=capabilities.names(proc.own_capability_bounds()),
            limits=limits_of(config),
            captures=captures,
            witness=witness,
        )
        cleanup.push_async_callback(manager.close)
        past = told or manager.ends()
        events.restore(past, max(next_event, len(past)))  # before any session that is taken back can end
        if recovered := await manager.recover(handed):
            log.info("took back %d running sessions of an earlier service", recovered)
        sweeper = asyncio.create_task(_sweep(manager, min(_SWEEP_INTERVAL, config.retention_seconds)), name="sweeper")
        cleanup.push_async_callback(_end, sweeper)
        yield Engine(catalog, manager, events)


def catalog_of(config: Config) -> Catalog:
    """Return the catalog of the configured engines."""
    return host_catalog(
        config.places(),
        config.roots(),
        config.runtime_paths(),
        engines=config.engines,
        labels=config.label_filters(),
    )


def host_equivalence_of(config: Config) -> HostEquivalence:
    """Return what tells whether root in a container is root on this host; who reaches this service may be, too."""
    sockets = [str(address.path) for address in config.addresses if address.path is not None]
    return HostEquivalence(sockets=sockets, directories=[str(config.state_dir)])


def default_policy_of(config: Config, owner_uid: int) -> Policy:
    """Return the policy of a service that has no file of it."""
    return default_policy(
        owner_uid, allow_privileged=config.allow_privileged, allow_host_equivalent=config.allow_host_equivalent
    )


def look_around(catalog: Catalog, config: Config) -> None:
    """Read what there is once, so that the first request need not, and warn of runtimes with known holes. Blocks."""
    with contextlib.suppress(Unavailable):
        found = catalog.list()
        programs = {container.runtime.path for container in found if container.init is not None}
        for program in sorted(programs | set(config.runtime_paths().values())):
            for warning in runtime_version(program).warnings:
                log.warning("%s: %s (%s)", program, warning, BACKPORTS)


def limits_of(config: Config) -> Limits:
    """Return the bounds of a configuration."""
    return Limits(
        drain=config.drain_seconds,
        retention=config.retention_seconds,
        created_lifetime=config.created_lifetime_seconds,
        stop_timeout=config.stop_timeout_seconds,
        timeout_grace=config.timeout_grace_seconds,
        sessions=config.max_sessions,
        created=config.max_created,
        container_sessions=config.max_sessions_per_container,
        parallel_starts=config.parallel_starts,
        queued_starts=config.queued_starts,
        capture=config.capture_bytes,
    )


def _runtime(config: Config, cgroups: SessionCgroups, store: FdStore) -> ConmonRuntime:
    conmon = config.conmon_path()
    if conmon is None:
        raise Unavailable("conmon is not installed", hint="install it, or set `conmon` to its path")
    directory = config.state_dir / "sessions"
    directory.mkdir(mode=0o700, exist_ok=True)
    runtime = ConmonRuntime(
        conmon=conmon,
        directory=directory,
        start_timeout=config.start_timeout_seconds,
        cgroups=cgroups,
        store=store,
    )
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return runtime


def _read_accounts(pid: int) -> tuple[bytes, bytes]:
    return read_in_container(pid, "/etc/passwd"), read_in_container(pid, "/etc/group")


def _check_powers() -> None:
    """Unavailable for a root that cannot take capabilities away: runtimes of some ages hand them all on then."""
    if os.geteuid() == 0 and _SETPCAP not in capabilities.names(proc.own_capabilities()):
        raise Unavailable(
            f"{_SETPCAP} is missing: without it a runtime cannot drop the capabilities that a container must not have",
            hint="give it back to the service: CapabilityBoundingSet= of its unit, --cap-add of its container",
        )


def _take_state_dir(path: Path, cleanup: contextlib.AsyncExitStack) -> None:
    """Make the state directory, private, and lock it. Conflict when another service has it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Unavailable(f"the state directory {path} cannot be used: {error.strerror}") from error
    cleanup.callback(os.close, lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Conflict(f"the state directory {path} belongs to another running execgate") from error


async def _sweep(manager: SessionManager, interval: float) -> None:
    """Forget old sessions, for ever; first of all those that earlier services had no time to."""
    while True:
        try:
            manager.sweep()
        except Unavailable as error:
            log.warning("old sessions are not forgotten: %s (%s)", error, error.hint)
        await asyncio.sleep(interval)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
