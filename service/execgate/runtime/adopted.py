"""A process that an earlier service started, taken back by this one."""

import asyncio
import contextlib
import logging
import math
import os
import socket
import time
from pathlib import Path

from execgate.model.config import ConsoleSize
from execgate.model.process import ProcessIdentity
from execgate.model.session import UNKNOWN_EXIT, ExecSession, ExitSource, ExitStatus
from execgate.runtime import failures, pidfd
from execgate.runtime.directory import (
    NO_CODE,
    Held,
    connect_attach,
    exit_file_code,
    exit_file_status,
    forget_process,
    read_held,
    read_pid_file,
    remove_directory,
    resize_terminal,
    runtime_log,
)
from execgate.runtime.fdstore import OUTPUT_ROLES, FdStore, Role, drop_all, stream_name
from execgate.runtime.monitor import KILLED_BY_MONITOR, MONITOR_GRACE, TIMED_OUT, SyncPipe, kill_group
from execgate.runtime.readiness import Descriptor
from execgate.runtime.spawning import stdin_input
from execgate.runtime.streams import AttachInput, AttachOutput, ExecStreams, Output, PipeOutput
from execgate.runtime.tree import ProcessTree, SessionCgroups
from execgate.wire.sync_pipe import SyncMessage

log = logging.getLogger(__name__)

_CODE_MAX = 255
_LAST_WORD = 0.1
"""Seconds in which a sync pipe that still has a writer is read to its end, once its conmon should be gone."""


class AdoptedExec:
    """A process that an earlier service started, or was about to start: its client is gone, and nothing else.

    What the keeper has kept is taken back: stdin that has not ended, output that nobody has read, the pipe that tells
    pid and exit code. Without a keeper the output pipes are those that conmon holds, a terminal is attached to anew
    (and what it wrote in between is lost: conmon keeps nothing for a terminal that nobody looks at), stdin has ended.

    The service may have died during the start. Then conmon was let go by that death, and says on the kept sync pipe
    what becomes of it; without that pipe there is the file into which the runtime has written the pid.
    """

    def __init__(
        self, directory: Path, session: ExecSession, cgroups: SessionCgroups, store: FdStore, start_timeout: float
    ) -> None:
        held = read_held(directory) or Held({}, None, "")
        self.monitor = session.monitor or held.monitor
        self.tree: ProcessTree | None = None
        self._session_id = session.id
        self._directory = directory
        self._cgroups = cgroups
        self._store = store
        self._start_timeout = start_timeout
        self._deadline = _deadline(session)
        sync = self._take(Role.SYNC)
        self._sync = SyncPipe(sync) if sync is not None else None
        self.streams = self._streams(session, held)
        self._process: ProcessIdentity | None = None
        self._pidfd: Descriptor | None = None
        if (process := session.process or read_pid_file(directory)) is not None:
            self._know(process)

    @property
    def process(self) -> ProcessIdentity | None:
        """Who it is; None while that is not known."""
        return self._process

    @property
    def starting(self) -> bool:
        """Whether the start is still to be waited for."""
        return self._process is None and self._sync is not None

    async def start(self) -> ProcessIdentity:
        """Return who it is, once conmon says so if need be. StartFailed when it never came to be."""
        message: SyncMessage | None = None
        if self._process is None and self._sync is not None:
            with contextlib.suppress(TimeoutError):
                message = await asyncio.wait_for(self._sync.next(), self._start_timeout)
            process = read_pid_file(self._directory)
            if process is None and message is not None and message.data is not None and message.data > 0:
                process = ProcessIdentity(message.data, 0)  # it ran, and is over already
            if process is not None:
                self._know(process)
        if self._process is None:
            reason = failures.last_error(runtime_log(self._directory))
            if not reason and message is not None:
                reason = message.message
            await self._undo()
            raise failures.start_failure(reason or "the service ended during the start")
        forget_process(self._directory)
        return self._process

    async def wait(self) -> ExitStatus:
        """Return how it ended: from the exit file, the sync pipe, the kernel, else unknown."""
        if self._pidfd is not None:
            await pidfd.ended(self._pidfd)
        if self.monitor is not None and (monitor := pidfd.open_pidfd(self.monitor)):
            with contextlib.closing(monitor), contextlib.suppress(TimeoutError):
                await asyncio.wait_for(pidfd.ended(monitor), MONITOR_GRACE)  # it writes the exit file, then ends
        message = await self._last_message()
        if message is not None and message.message == TIMED_OUT:
            return KILLED_BY_MONITOR
        if time.monotonic() >= self._deadline and exit_file_code(self._directory) == NO_CODE:
            return KILLED_BY_MONITOR
        if status := exit_file_status(self._directory):
            return status
        if message is not None and message.data is not None and 0 <= message.data <= _CODE_MAX:
            return ExitStatus(message.data, ExitSource.SYNC_PIPE)
        return await pidfd.kernel_status(self._process, self._pidfd) or UNKNOWN_EXIT

    def resize(self, size: ConsoleSize) -> None:
        """Set the terminal's size."""
        resize_terminal(self._directory, size)

    def leave(self) -> None:
        """Let go of it."""
        self.streams.close()
        if self._sync is not None:
            self._sync.close()
        if self._pidfd is not None:
            self._pidfd.close()

    async def dispose(self) -> None:
        """Remove what is left of it. Its monitor is no child of ours and ends by itself."""
        self.leave()
        drop_all(self._store, self._session_id)
        self._cgroups.remove(self._session_id)
        remove_directory(self._directory)

    async def abort(self) -> None:
        """There is no start to undo."""
        await self.dispose()

    def _know(self, process: ProcessIdentity) -> None:
        """Note who it is. The pidfd that was kept tells the exit code of a process that is long gone."""
        self._process = process
        self._pidfd = self._take(Role.PROCESS) or pidfd.open_pidfd(process)
        self.tree = ProcessTree(self._cgroups, self._session_id, process)

    async def _undo(self) -> None:
        """End a start that came to nothing, or to nothing that is known, with all that belongs to it."""
        if self.monitor is not None and (monitor := pidfd.open_pidfd(self.monitor)):
            with contextlib.closing(monitor):
                kill_group(self.monitor.pid, monitor)
        await self.dispose()

    async def _last_message(self) -> SyncMessage | None:
        """Return the last thing that conmon has said, without waiting for more: it has ended, or is stuck."""
        last: SyncMessage | None = None
        if self._sync is not None:
            with contextlib.suppress(TimeoutError):
                while message := await asyncio.wait_for(self._sync.next(), _LAST_WORD):
                    last = message
        return last

    def _take(self, role: Role) -> Descriptor | None:
        fd = self._store.take(stream_name(self._session_id, role))
        return None if fd is None else Descriptor(fd)

    def _streams(self, session: ExecSession, held: Held) -> ExecStreams:
        """Take the streams back: those that were kept, else what a living conmon has for us."""
        terminal = self._take(Role.TERMINAL)
        if terminal is not None:
            return _terminal_streams(socket.socket(fileno=terminal.detach()), session)
        if session.config.tty or self._sync is None:
            return _reopen(self._directory, session, held, self.monitor)
        kept = {number: self._take(role) for number, role in OUTPUT_ROLES.items()}
        outputs = [PipeOutput(pipe, number) for number, pipe in kept.items() if pipe is not None]
        stdin = self._take(Role.STDIN)
        return ExecStreams(outputs=outputs, input=stdin_input(stdin, session.id, self._store) if stdin else None)


def _deadline(session: ExecSession) -> float:
    """Return the time (seconds, monotonic) from which on conmon may have ended a session by itself."""
    if session.config.timeout is None or session.started_at is None:
        return math.inf
    return session.since + session.config.timeout


def _reopen(directory: Path, session: ExecSession, held: Held, monitor: ProcessIdentity | None) -> ExecStreams:
    """Take back what a living conmon has for us: its attach socket, else the output pipes that it holds."""
    if monitor is None or pidfd.identify(monitor.pid) != monitor:
        return ExecStreams()
    if session.config.tty:
        return _reattach(directory, session)
    outputs: list[Output] = []
    try:
        for stream, number in held.streams.items():
            pipe = Descriptor(os.open(f"/proc/{monitor.pid}/fd/{number}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            outputs.append(PipeOutput(pipe, stream))
    except OSError as error:
        log.warning("the output of %s cannot be taken back: %s", directory.name, error)
    return ExecStreams(outputs=outputs)


def _reattach(directory: Path, session: ExecSession) -> ExecStreams:
    """Connect to the attach socket of a terminal anew; without one it was started with nothing attached."""
    try:
        connection = connect_attach(directory)
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            log.warning("the terminal of %s cannot be taken back: %s", directory.name, error)
        return ExecStreams()
    return _terminal_streams(connection, session)


def _terminal_streams(connection: socket.socket, session: ExecSession) -> ExecStreams:
    return ExecStreams(
        outputs=(AttachOutput(connection),), input=AttachInput(connection) if session.config.attach_stdin else None
    )
