"""The service put together: the only place where things are constructed and handed to each other."""

import asyncio
import contextlib
import fcntl
import gc
import logging
import os
import resource
import signal
import socket
from collections.abc import Awaitable
from pathlib import Path

from execgate import __version__
from execgate.config import Config
from execgate.containers import proc
from execgate.containers.catalog import Catalog
from execgate.containers.top import top
from execgate.http.listeners import (
    inherited_listeners,
    open_listener,
    remove_socket_file,
    socket_identity,
)
from execgate.http.routes import all_trees
from execgate.http.server import HttpServer, build_application
from execgate.model.errors import Conflict, Unavailable
from execgate.oci import capabilities
from execgate.runtime.conmon import ConmonRuntime
from execgate.runtime.rootfs import read_in_container
from execgate.sessions.events import EventBus
from execgate.sessions.manager import Limits, SessionManager
from execgate.sessions.store import SessionStore
from execgate.systemd import Notifier

log = logging.getLogger(__name__)

DATABASE = "sessions.db"
_SWEEP_INTERVAL = 15.0


def catalog_of(config: Config) -> Catalog:
    """Return the catalog of the configured roots."""
    return Catalog(config.roots(), config.runtime_paths())


async def serve(config: Config) -> None:
    """Run the service until SIGTERM or SIGINT. Raises the category of whatever keeps it from starting."""
    notifier = Notifier()
    stop = _stop_signal()
    with contextlib.ExitStack() as cleanup:
        _take_state_dir(config.state_dir, cleanup)
        listeners = _listeners(config, cleanup)
        store = SessionStore(config.state_dir / DATABASE, boot_id=proc.boot_id())
        cleanup.callback(store.close)
        events = EventBus()
        catalog = catalog_of(config)
        manager = SessionManager(
            containers=catalog,
            runtime=_runtime(config),
            store=store,
            events=events,
            read_accounts=_read_accounts,
            all_capabilities=capabilities.names(proc.own_capability_bounds()),
            limits=Limits(
                drain=config.drain_seconds,
                retention=config.retention_seconds,
                created_lifetime=config.created_lifetime_seconds,
                sessions=config.max_sessions,
            ),
        )
        server = HttpServer(build_application(all_trees(catalog=catalog, manager=manager, events=events, top=top)))
        if recovered := manager.recover():
            log.info("took back %d running sessions of an earlier service", recovered)
        sweeper = asyncio.create_task(_sweep(manager, min(_SWEEP_INTERVAL, config.retention_seconds)), name="sweeper")
        try:
            await server.start(listeners)
            # What is here now stays: collections need not go over every module again and again.
            gc.collect()
            gc.freeze()
            notifier.tell("READY=1")
            log.info("execgate %s serves on %s", __version__, ", ".join(_names(listeners)))
            await stop
        finally:
            notifier.tell("STOPPING=1")
            await server.stop_accepting()
            events.close()
            if manager.live:
                log.info("stops; %d running processes live on", manager.live)
            await manager.close()
            await server.close()
            sweeper.cancel()
            await asyncio.gather(sweeper, return_exceptions=True)


def _stop_signal() -> Awaitable[None]:
    """Return what is done at the first SIGTERM or SIGINT; a second one ends the process at once."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def received(number: signal.Signals) -> None:
        log.info("received %s", number.name)
        if not stop.done():
            stop.set_result(None)
        loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, received, number)
    return stop


def _runtime(config: Config) -> ConmonRuntime:
    conmon = config.conmon_path()
    if conmon is None:
        raise Unavailable("conmon is not installed", hint="install it, or set `conmon` to its path")
    directory = config.state_dir / "sessions"
    directory.mkdir(mode=0o700, exist_ok=True)
    runtime = ConmonRuntime(conmon=conmon, directory=directory, start_timeout=config.start_timeout_seconds)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return runtime


def _read_accounts(pid: int) -> tuple[bytes, bytes]:
    return read_in_container(pid, "/etc/passwd"), read_in_container(pid, "/etc/group")


def _take_state_dir(path: Path, cleanup: contextlib.ExitStack) -> None:
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


def _listeners(config: Config, cleanup: contextlib.ExitStack) -> list[socket.socket]:
    """Return the sockets to serve on: those of systemd if it passed any, else those of the configuration."""
    if inherited := inherited_listeners():
        return inherited
    listeners = []
    for address in config.addresses:
        listener = open_listener(address, mode=int(config.socket_mode, 8), group=config.socket_group)
        cleanup.callback(listener.close)
        if address.path is not None:
            cleanup.callback(remove_socket_file, address.path, socket_identity(address.path))
        listeners.append(listener)
    return listeners


def _names(listeners: list[socket.socket]) -> list[str]:
    names = (listener.getsockname() for listener in listeners)
    return [f"unix://{name}" if isinstance(name, str) else f"tcp://{name[0]}:{name[1]}" for name in names]


async def _sweep(manager: SessionManager, interval: float) -> None:
    """Forget old sessions, for ever."""
    while True:
        await asyncio.sleep(interval)
        try:
            manager.sweep()
        except Unavailable as error:
            log.warning("old sessions are not forgotten: %s (%s)", error, error.hint)
