"""The service put together: the only place where things are constructed and handed to each other."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import ssl
import threading
import urllib.parse
from dataclasses import replace
from enum import Enum
from pathlib import Path

from execgate import __version__, handover, orphan
from execgate.config import Config
from execgate.containers.top import top
from execgate.engine import Engine, host_equivalence_of, look_around, open_engine
from execgate.gate.access import Gate
from execgate.gate.audit import Audit, open_audit
from execgate.gate.rules import Policy
from execgate.gate.tokens import Tokens
from execgate.http.hijack import OpenStreams
from execgate.http.identity import Doorkeeper
from execgate.http.listeners import (
    Address,
    Listener,
    adopt_activated,
    adopt_listener,
    adopt_unix_listener,
    open_listener,
    remove_socket_file,
    socket_identity,
)
from execgate.http.routes import all_trees
from execgate.http.server import HttpServer, build_application
from execgate.keeper.protocol import ACTIVATED, Message
from execgate.status import write_status
from execgate.worker import KeeperLink

log = logging.getLogger(__name__)

_LISTENER = "listen."
"""Begins the names under which the keeper has our listening sockets."""


_NICE = -5
"""Three times the share of an ordinary process, nice(2)."""


class Ending(Enum):
    """How a service ends: for good, or in favour of the next one."""

    STOP = "stop"
    LEAVE = "leave"


async def serve(config: Config, link: KeeperLink, policy: Policy, tls: ssl.SSLContext | None = None) -> None:
    """Run the service until the keeper says so, by `policy`. Raises the category of what keeps it from starting.

    `tls` is what TLS is spoken with; without it nobody is let in at addresses that want it.
    """
    ending = _ending(link, config.state_dir)
    async with contextlib.AsyncExitStack() as cleanup:
        if adopted := orphan.adopt(config.state_dir, link):
            log.info("takes over from a service that had lost its keeper: %d descriptors", adopted)
        streams = OpenStreams()
        before = handover.take(link, streams) or handover.Handover()
        # The service before this one, whoever it was, has ended: it writes no audit log any more.
        audit = cleanup.enter_context(open_audit(config.audit(), version=__version__))
        engine = await cleanup.enter_async_context(
            open_engine(config, link, before.sessions, told=before.events, next_event=before.next_event, witness=audit)
        )
        listeners = _listeners(config, link, cleanup)
        link.drop_rest()
        gate = Gate(
            policy=policy,
            journal=audit,
            catalog=engine.containers,
            sessions=engine.sessions,
            events=engine.events,
            host_equivalent=host_equivalence_of(config),
        )
        doorkeeper = Doorkeeper(gate, Tokens(config.tokens))
        server = HttpServer(build_application(all_trees(top), streams, [doorkeeper.middleware]))
        cleanup.push_async_callback(server.close)
        await server.start(listeners, tls)
        for connection in before.connections:
            await server.adopt(connection.fd, connection.read, connection.progress)
        # What is here now stays: collections need not go over every module again and again.
        gc.collect()
        gc.freeze()
        _come_first()
        write_status(config.state_dir)
        link.tell("ready", *(["standby"] if config.standby else []))
        threading.Thread(target=look_around, args=(engine.containers, config), name="look around", daemon=True).start()
        log.info("execgate %s serves on %s", __version__, ", ".join(map(str, listeners)))
        how = await ending
        if how is Ending.LEAVE:
            await _leave(engine, server, streams, link, audit)
        await server.stop_accepting()
        engine.events.close()
        if engine.sessions.live:
            log.info("stops; %d running processes live on", engine.sessions.live)
        await engine.sessions.close()


def _come_first() -> None:
    """Run before the processes of the sessions, if we may. What we start has the usual priority.

    One thread serves all sessions, and each of them is a handful of processes. On a busy machine a fair share of the
    processors would be too little for it, and all of them would wait.
    """
    try:
        if os.getpriority(os.PRIO_PROCESS, 0) or os.sched_getscheduler(0) != os.SCHED_OTHER:
            return  # somebody has chosen another one
        # sched(7): with this flag no child gets a higher priority than 0.
        os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    except OSError as error:  # no CAP_SYS_NICE, a seccomp filter, or a libc or kernel that has no such call
        log.debug("the service has the usual priority: %s", error)


async def _leave(engine: Engine, server: HttpServer, streams: OpenStreams, link: KeeperLink, audit: Audit) -> None:
    """End in favour of the next service, which gets everything as it stands: nothing is closed or undone."""
    log.info("hands over %d running processes", engine.sessions.live)
    engine.sessions.close_gate()
    await server.quiesce()
    sessions = await engine.sessions.hand_over()
    await server.settle()  # those that ended meanwhile
    await server.deliver()
    connections = [handover.Connection(*found) for found in server.hand_over()]
    handover.give(link, streams, sessions, connections, engine.events)
    await link.flushed()
    audit.close()
    logging.shutdown()
    os._exit(0)


def _ending(link: KeeperLink, state_dir: Path) -> "asyncio.Future[Ending]":
    """Return what is done when the service is to end. A second signal ends the process at once."""
    loop = asyncio.get_running_loop()
    ending: asyncio.Future[Ending] = loop.create_future()

    def end(how: Ending) -> None:
        if not ending.done():
            ending.set_result(how)

    def signalled(number: signal.Signals) -> None:
        # The keeper ends us by a message. A signal is somebody else's, who need not know that there is a keeper.
        log.info("received %s", number.name)
        end(Ending.LEAVE if link.alive else Ending.STOP)
        loop.remove_signal_handler(number)

    def told(message: Message | None) -> None:
        if message is None:
            log.error("the keeper is dead: this service goes on until `execgate serve` is started anew, and takes over")
            orphan.wait_for_successor(state_dir, link, lambda: end(Ending.LEAVE))
        elif message.verb == "failed":
            failure = " ".join(message.words)
            log.error("the reload failed: %s", failure)
            write_status(state_dir, failure)
        elif message.verb in (Ending.STOP.value, Ending.LEAVE.value):
            end(Ending(message.verb))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled, number)
    # It is the keeper's to reload; one that is sent to us instead must not end us.
    loop.add_signal_handler(signal.SIGHUP, log.info, "received SIGHUP: a reload is asked of the keeper")
    link.listen(told)
    return ending


def _listeners(config: Config, link: KeeperLink, cleanup: contextlib.AsyncExitStack) -> list[Listener]:
    """Return where to serve: on the sockets of systemd if it passed any, else on those of the configuration.

    Those that an earlier service had are taken over, with whoever waits in their queues.
    """
    if activated := link.take_all(ACTIVATED):
        return [adopt_activated(fd, tls=config.tls is not None) for _, fd in sorted(activated.items())]
    listeners = []
    for address in config.addresses:
        listener = _inherited(address, config, link) or open_listener(
            address, mode=int(config.socket_mode, 8), group=config.socket_group
        )
        link.keep({_listener_name(address): listener.fileno()})
        cleanup.callback(listener.close)
        if address.path is not None:
            cleanup.callback(remove_socket_file, address.path, socket_identity(address.path))
        listeners.append(Listener(listener, tls=address.tls))
    for name, fd in link.take_all(_LISTENER).items():  # addresses that are not configured any more
        with adopt_listener(fd):
            link.drop([name])
        scheme, _, path = urllib.parse.unquote(name.removeprefix(_LISTENER)).partition("://")
        if scheme == "unix":
            remove_socket_file(Path(path), socket_identity(Path(path)))
    return listeners


def _inherited(address: Address, config: Config, link: KeeperLink) -> socket.socket | None:
    fd = link.take(_listener_name(address))
    if fd is None:
        return None
    if address.path is None:
        return adopt_listener(fd)
    return adopt_unix_listener(fd, address.path, mode=int(config.socket_mode, 8), group=config.socket_group)


def _listener_name(address: Address) -> str:
    """Return the name under which the keeper has a socket: the same with TLS as without, for a reload to change."""
    return _LISTENER + urllib.parse.quote(str(replace(address, tls=False)), safe="/")
