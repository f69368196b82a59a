"""A service whose keeper has died, and the one that takes over from it.

Nothing is lost at that moment: the worker has everything open itself. It goes on, and waits at a socket in its state
directory for the next `execgate serve`, whose worker finds it there, because the directory is locked, and is given all
that a keeper would have had, and what is handed over in a reload. So a keeper that is killed costs nobody anything, as
long as its worker lives; killed together, they cost what only they had (docs/reliability.md).
"""

import asyncio
import contextlib
import logging
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from execgate.worker import KeeperLink

log = logging.getLogger(__name__)

_NAME = "orphan"
_TIMEOUT = 20.0
"""Seconds that a service may take to say what it has: longer than it gives answers that are under way."""


def wait_for_successor(state_dir: Path, link: KeeperLink, found: Callable[[], None]) -> None:
    """Listen for the next service. `found` is called once it is there, and has been given what is kept."""
    path = state_dir / _NAME
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with _short(path) as name:
            listener.bind(name)
        listener.listen(1)
    except OSError as error:
        listener.close()
        log.error("no other service can take over from this one: %s", error)
        return
    listener.setblocking(False)
    loop = asyncio.get_running_loop()

    def accept() -> None:
        with contextlib.suppress(OSError):
            successor, _ = listener.accept()
            loop.remove_reader(listener.fileno())
            listener.close()
            path.unlink(missing_ok=True)
            link.hand_to(successor)
            found()

    loop.add_reader(listener.fileno(), accept)


def adopt(state_dir: Path, link: KeeperLink) -> int:
    """Take over from a service that has lost its keeper, if there is one; return how many descriptors came. Blocks."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as orphan:
        orphan.settimeout(_TIMEOUT)
        try:
            with _short(state_dir / _NAME) as name:
                orphan.connect(name)
        except OSError:  # nobody is there; or a file is left of somebody who was
            return 0
        try:
            found = link.inherit_from(orphan)
            _wait_for_end(orphan)
            return found
        except OSError as error:
            log.error("the service that has lost its keeper does not hand over: %s", error)
            return 0


def _wait_for_end(orphan: socket.socket) -> None:
    """Wait until the peer's process is gone, and with it what it has locked; it has said its last word. OSError."""
    credentials = orphan.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, _, _ = struct.unpack("3i", credentials)
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            select.select([pidfd], [], [], _TIMEOUT)
        finally:
            os.close(pidfd)


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """Yield a name of `path` that fits sun_path: by way of its directory's descriptor."""
    parent = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{parent}/{path.name}"
    finally:
        os.close(parent)
