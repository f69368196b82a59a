"""conmon as a process and as a speaker: who it is, how it ends or is ended, and what it says on its pipes."""

import asyncio
import contextlib
import logging
import os
import signal

from execgate.model.process import ProcessIdentity
from execgate.model.session import ExitSource, ExitStatus
from execgate.runtime import pidfd
from execgate.runtime.posix_spawn import Child
from execgate.runtime.readiness import Descriptor, readable
from execgate.wire.sync_pipe import SyncLines, SyncMessage

log = logging.getLogger(__name__)

MONITOR_GRACE = 5.0
"""Seconds that conmon gets to end after its process; it needs milliseconds."""

TIMED_OUT = "command timed out"
"""What conmon says when its own timeout ended the process (`TIMED_OUT_MESSAGE`)."""

KILLED_BY_MONITOR = ExitStatus(128 + signal.SIGKILL, ExitSource.TIMEOUT)


class Monitor:
    """conmon, our child: reaped when it ends, killed with all its group when a start must be undone."""

    def __init__(self, child: Child) -> None:
        self.pid = self._pid = pid = child.pid
        self._reaped = False
        self._identity = None if child.start_time is None else ProcessIdentity(pid, child.start_time)
        try:
            # Now, and not at the end: with no descriptor left a start can still be refused, an end cannot.
            self._pidfd = Descriptor(os.pidfd_open(pid))
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise

    @property
    def identity(self) -> ProcessIdentity | None:
        """conmon's name. Read late, if it has to be: while a process is in execve, reading its /proc waits for it."""
        if self._identity is None and not self._reaped:
            self._identity = pidfd.identify(self._pid)
        return self._identity

    @property
    def alive(self) -> bool:
        """Whether conmon has not ended."""
        return not self._try_reap()

    def kill_group(self) -> None:
        """Kill conmon and the runtime, at once."""
        if not self._reaped:
            kill_group(self._pid, self._pidfd)

    async def gone(self, grace: float) -> None:
        """Reap conmon, at the latest after `grace` seconds with SIGKILL."""
        if not self._try_reap():
            try:
                async with asyncio.timeout(grace):
                    await pidfd.ended(self._pidfd)
            except TimeoutError:
                log.warning("conmon %d did not end by itself and is killed", self._pid)
                self.kill_group()
                await pidfd.ended(self._pidfd)
            self._try_reap()
        self._pidfd.close()

    def _try_reap(self) -> bool:
        if not self._reaped:
            try:
                self._reaped = os.waitpid(self._pid, os.WNOHANG)[0] == self._pid
            except ChildProcessError:  # somebody else waited for all children
                self._reaped = True
        return self._reaped


class SyncPipe:
    """The messages of conmon's sync (or attach) pipe, one at a time."""

    def __init__(self, pipe: Descriptor) -> None:
        os.set_blocking(pipe.fileno(), False)
        self._pipe = pipe
        self._lines = SyncLines()
        self._messages: list[SyncMessage] = []

    async def next(self) -> SyncMessage | None:
        """Return the next message, or None when conmon will send no more."""
        while not self._messages:
            try:
                data = os.read(self._pipe.fileno(), 4096)
            except BlockingIOError:
                await readable(self._pipe.fileno())
                continue
            if not data:
                return None
            self._messages.extend(self._lines.feed(data))
        return self._messages.pop(0)

    def fileno(self) -> int:
        """Return the pipe's descriptor."""
        return self._pipe.fileno()

    def close(self) -> None:
        """Hear no more of it."""
        self._pipe.close()


def kill_group(pid: int, fd: Descriptor) -> None:
    """Kill a conmon, and its runtime. `fd` is its pidfd.

    Before its setsid it is still in the group of the service that started it: then only itself.
    """
    with contextlib.suppress(OSError):  # it is over
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        else:
            signal.pidfd_send_signal(fd.fileno(), signal.SIGKILL)
