"""The service put together: the only place where things are constructed and handed to each other."""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Awaitable

from execgate import __version__
from execgate.config import Config
from execgate.containers.top import top
from execgate.engine import open_engine
from execgate.http.listeners import (
    inherited_listeners,
    open_listener,
    remove_socket_file,
    socket_identity,
)
from execgate.http.routes import all_trees
from execgate.http.server import HttpServer, build_application
from execgate.systemd import Notifier

log = logging.getLogger(__name__)


async def serve(config: Config) -> None:
    """Run the service until SIGTERM or SIGINT. Raises the category of whatever keeps it from starting."""
    notifier = Notifier()
    stop = _stop_signal()
    async with contextlib.AsyncExitStack() as cleanup:
        engine = await cleanup.enter_async_context(open_engine(config))
        listeners = _listeners(config, cleanup)
        trees = all_trees(catalog=engine.containers, manager=engine.sessions, events=engine.events, top=top)
        server = HttpServer(build_application(trees))
        cleanup.push_async_callback(server.close)
        await server.start(listeners)
        # What is here now stays: collections need not go over every module again and again.
        gc.collect()
        gc.freeze()
        notifier.tell("READY=1")
        log.info("execgate %s serves on %s", __version__, ", ".join(_names(listeners)))
        await stop
        notifier.tell("STOPPING=1")
        await server.stop_accepting()
        engine.events.close()
        if engine.sessions.live:
            log.info("stops; %d running processes live on", engine.sessions.live)
        await engine.sessions.close()


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


def _listeners(config: Config, cleanup: contextlib.AsyncExitStack) -> list[socket.socket]:
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
