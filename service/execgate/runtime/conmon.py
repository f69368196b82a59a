"""Driving conmon, which drives runc or crun: one monitor for one exec'd process.

The order of things, and why (facts: conmon 2.1.6's `src/conmon.c`):

1. `prepare` makes the session's directory and the pipes and spawns conmon, which blocks in a read of the *start
   pipe*. Whatever this host cannot give (descriptors, processes, space) fails here, while the caller can still answer
   with a status.
2. With a TTY conmon gets one byte now, opens its attach socket, says so on the *attach pipe*, and blocks again. Only
   when that is connected to process.json is written: conmon is let go by our death too, and would run it unheard.
3. The caller puts the head of its answer on the wire.
4. `start` lets conmon go: the runtime runs, and the pid comes over the *sync pipe*, or the pipe ends: the start
   failed, and the runtime's log has the reason. (In passthrough conmon has nothing to say itself: the runtime's
   stderr is the process's.)
5. `wait` reads the exit code from the sync pipe, else from the exit file (conmon writes it first), else from the
   kernel by pidfd, else says "unknown".
6. `dispose` removes the directory and waits for conmon, which ends by itself.

Without a TTY conmon runs in *passthrough*: its stdin, stdout and stderr become the process's, and it lets go of
them as soon as the runtime has them. The service reads the very pipe that the process writes.

conmon also inherits the *read* ends of the output pipes and keeps them, unused, while the process lives (podman does
the same with listening ports). So a pipe outlives the service: the process is not killed by SIGPIPE, it waits, and
the next service opens the pipe anew through `/proc/CONMON/fd` (`adopt`). The runtimes do not pass them on.

conmon is started with `--sync`, which forks once less: it is our child, its pid is known, and we reap it. If the
service dies, it lives on as a child of init, and the exit file tells the code.

All of it is bounded: `start` by `start_timeout`, the rest by the life of the process itself.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import math
import os
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from execgate.model.config import ConsoleSize
from execgate.model.container import Container
from execgate.model.errors import Internal, StartFailed, Unavailable
from execgate.model.ids import SessionId
from execgate.model.process import ProcessIdentity
from execgate.model.session import UNKNOWN_EXIT, ExecSession, ExitSource, ExitStatus
from execgate.runtime import failures, pidfd
from execgate.runtime.fdstore import FdStore, Role, stream_name
from execgate.runtime.readiness import Descriptor, readable
from execgate.runtime.streams import (
    UNRECORDED,
    AttachInput,
    AttachOutput,
    ExecStreams,
    Input,
    Output,
    PipeInput,
    PipeOutput,
    Recorders,
)
from execgate.runtime.tree import ProcessTree, SessionCgroups
from execgate.wire import stdcopy
from execgate.wire.sync_pipe import SyncLines, SyncMessage

log = logging.getLogger(__name__)

_CHILD_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_STUCK_AFTER = 2.0
"""Seconds after the end of a process in a terminal in which its conmon has to say something."""

_MONITOR_GRACE = 5.0
"""Seconds that conmon gets to end after its process; it needs milliseconds."""

_FILES = ("process.json", "pid", "held", "oci-log", "ctl", "winsz", "attach")
"""What a session's directory holds, beside the directory of the exit file."""

_HELD = "held"
"""The file with what the next service needs to know: see `Held`."""

_ALL_SIGNALS = tuple(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
"""What is ignored is inherited, by way of conmon and the runtime. Python ignores SIGPIPE, and a process that did so
would outlive `yes | head`; a service that was started in the background of a shell ignores SIGINT."""

_RESIZE_INTERVAL = 0.02
"""Seconds between two sizes for one terminal."""

_TIMEOUT_MARGIN = 2
"""Seconds that conmon's own timeout comes later than ours, which is gentler and knows more."""

_TIMED_OUT = "command timed out"
"""What conmon says when its own timeout ended the process (`TIMED_OUT_MESSAGE`)."""

_NO_CODE = -1
"""What conmon writes as the exit code when it has none: after its timeout, or when it cannot tell."""

_KILLED_BY_MONITOR = ExitStatus(128 + signal.SIGKILL, ExitSource.TIMEOUT)

_CODE_MAX = 255
_LAST_WORD = 0.1
"""Seconds in which a sync pipe that still has a writer is read to its end, once its conmon should be gone."""

_OUTPUT_ROLES = {stdcopy.STDOUT: Role.STDOUT, stdcopy.STDERR: Role.STDERR}

_REAP_ATTEMPTS = 20
_REAP_INTERVAL = 0.05

CONSOLE_SOCKET_NAME = "/conmon-term.XXXXXX"
"""conmon makes a socket of this name in the session's directory; with it the path must fit sun_path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecRequest:
    """One process to run: where, what (the runtime's process.json), and which streams somebody will hold.

    `timeout` is the seconds after which conmon ends it, whoever else is there. `preserved` are descriptors of ours
    that the process gets as 3, 4, ….
    """

    session_id: SessionId
    container: Container
    process: Mapping[str, Any]
    stdin: bool = False
    stdout: bool = False
    stderr: bool = False
    timeout: float | None = None
    preserved: tuple[int, ...] = ()

    @property
    def tty(self) -> bool:
        """Whether the process gets a terminal."""
        return bool(self.process.get("terminal"))

    @property
    def attached(self) -> bool:
        """Whether anything is attached at all."""
        return self.stdin or self.stdout or self.stderr


def session_directory(parent: Path, session_id: SessionId) -> Path:
    """Return where a session keeps its files: half of its id names it, for the sake of the limit of sun_path."""
    return parent / session_id[:32]


@dataclass(frozen=True, slots=True)
class Held:
    """What a session's directory keeps for the next service.

    `streams`: which of conmon's descriptors are the read ends of the output pipes, by stream. `record` is that of the
    session when it was started, in case the database is lost.
    """

    streams: Mapping[int, int]
    monitor: ProcessIdentity | None
    record: str


class ConmonRuntime:
    """Starts processes in containers.

    `directory` gets one 0700 directory a live session. `start_timeout` is the seconds a runtime may take to start
    a process before it and everything it began is killed.
    """

    def __init__(
        self, *, conmon: Path, directory: Path, start_timeout: float, cgroups: SessionCgroups, store: FdStore
    ) -> None:
        self._conmon = conmon
        self._cgroups = cgroups
        self._store = store
        self._directory = directory
        self._start_timeout = start_timeout
        # As it is now: the service may raise its own later, and a container without one must not inherit that.
        self._nofile = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def prepare(self, request: ExecRequest, intend: Callable[[], str]) -> "ConmonExec":
        """Make everything ready for `request`, up to the last step. Unavailable when the host cannot.

        `intend` is called when the host has given what it takes, and before there is anything to run: process.json
        is written after it. A service that dies in between leaves a conmon whose runtime finds no process. It returns
        the session's record, which is kept beside the process: see `records`.
        """
        directory = session_directory(self._directory, request.session_id)
        try:
            directory.mkdir(mode=0o700)
            with contextlib.ExitStack() as ours:
                ours.callback(shutil.rmtree, directory, ignore_errors=True)
                execution = self._spawn(request, directory, ours)
                ours.pop_all()
        except OSError as error:
            raise _out_of_resources(directory, error) from error
        try:
            # conmon initialises meanwhile, on another processor.
            self._cgroups.add(request.session_id, execution.monitor_pid)
            record = intend()
            # What runs is kept, and somebody listens to it: before there is anything to run.
            execution.keep()
            if request.tty and request.attached:
                await asyncio.wait_for(execution.connect(), self._start_timeout)
            _write_files(directory, request.process, Held(execution.held, execution.monitor, record))
        except BaseException as error:
            await execution.abort()
            if isinstance(error, TimeoutError | ConnectionError):
                raise Unavailable("the monitor did not answer", hint=f"conmon in {directory}: {error!r}") from error
            if isinstance(error, OSError):
                raise _out_of_resources(directory, error) from error
            raise
        return execution

    def adopt(self, session: ExecSession) -> "AdoptedExec":
        """Take back a process that an earlier service started."""
        directory = session_directory(self._directory, session.id)
        return AdoptedExec(directory, session, self._cgroups, self._store, self._start_timeout)

    def records(self) -> Iterator[str]:
        """Yield the record of each session that may still run, as it was when it was about to be started."""
        for directory in sorted(self._directory.iterdir()):
            held = _read_held(directory)
            if held is not None and held.record:
                yield held.record

    def sweep(self, keep: Collection[SessionId]) -> None:
        """Clear away what belongs to no session of `keep`: cgroups without a process, directories without a living one.

        A service that was killed while it finished a session leaves such a directory behind.
        """
        self._cgroups.sweep()
        kept = {session_directory(self._directory, one) for one in keep}
        for directory in self._directory.iterdir():
            if directory not in kept and _pid_file_identity(directory) is None:
                log.info("a directory that no session has any more is removed: %s", directory.name)
                _remove_directory(directory)

    def _spawn(self, request: ExecRequest, directory: Path, ours: contextlib.ExitStack) -> "ConmonExec":
        """Make the pipes and spawn conmon. What is to be kept on success is pushed on `ours`."""
        with contextlib.ExitStack() as theirs:
            sync_read, sync_write = _pipe(ours, theirs)
            start_write, start_read = _pipe(ours, theirs, ours_writes=True)
            attach_read, attach_write = _pipe(ours, theirs)
            streams, stdio = _standard_streams(request, ours, theirs, self._store)
            outputs = [output for output in streams.outputs if isinstance(output, PipeOutput)]
            theirs_by_name = {
                "_OCI_SYNCPIPE": sync_write,
                "_OCI_STARTPIPE": start_read,
                "_OCI_ATTACHPIPE": attach_write,
            }
            # What conmon gets, in the order of the numbers that it gets there.
            given = [*stdio, *request.preserved, *(pipe.fileno() for pipe in theirs_by_name.values())]
            held = {output.stream: len(given) + index for index, output in enumerate(outputs)}
            given += [output.fileno() for output in outputs]
            first = len(stdio) + len(request.preserved)
            environment = {name: str(first + index) for index, name in enumerate(theirs_by_name)}
            environment |= {"PATH": _CHILD_PATH, "TMPDIR": str(directory)}
            if runtime_dir := os.environ.get("XDG_RUNTIME_DIR"):
                environment["XDG_RUNTIME_DIR"] = runtime_dir
            # Copies above all the numbers that are given, so that none overwrites another. Everything else this
            # process has open is close-on-exec (PEP 446) and does not reach conmon (CVE-2024-21626).
            copies = [_copy_above(fd, len(given), theirs) for fd in given]
            pid = os.posix_spawn(
                self._conmon,
                self._arguments(request, directory),
                environment,
                file_actions=[(os.POSIX_SPAWN_DUP2, copy, number) for number, copy in enumerate(copies)],
                setsigmask=(),
                setsigdef=_ALL_SIGNALS,
            )
        with contextlib.suppress(OSError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, self._nofile)
        return ConmonExec(
            request=request,
            directory=directory,
            monitor=_Monitor(pid),
            sync=_SyncPipe(sync_read),
            start_pipe=start_write,
            attach_pipe=attach_read,
            streams=streams,
            held=held,
            start_timeout=self._start_timeout,
            cgroups=self._cgroups,
            store=self._store,
        )

    def _arguments(self, request: ExecRequest, directory: Path) -> list[str]:
        runtime = request.container.runtime
        arguments = [str(self._conmon), "--api-version", "1", "--sync"]
        arguments += ["-c", request.container.id, "-u", request.session_id, "-n", request.container.name]
        arguments += ["-r", str(runtime.path), "-b", str(directory), "-p", f"{directory}/pid"]
        arguments += ["--exit-dir", f"{directory}/exit", "--full-attach", "--log-level", "error"]
        for argument in (f"--root={runtime.root}", f"--log={directory}/oci-log", "--log-format=json"):
            arguments += ["--runtime-arg", argument]
        if runtime.systemd_cgroup:
            arguments += ["--runtime-arg", "--systemd-cgroup"]
        if request.tty:
            arguments += ["-l", "none", "-t", "-i", "--leave-stdin-open"]
            arguments += ["--exec-attach"] if request.attached else []
        else:
            arguments += ["-l", "passthrough"]
        if request.timeout is not None:
            arguments += ["--timeout", str(math.ceil(request.timeout) + _TIMEOUT_MARGIN)]
        if request.preserved:
            arguments += ["--runtime-opt", f"--preserve-fds={len(request.preserved)}"]
        return [*arguments, "-e", "--exec-process-spec", f"{directory}/process.json"]


class ConmonExec:
    """One process: prepared, then started, then waited for, then disposed of; aborted at any point before the end."""

    def __init__(
        self,
        *,
        request: ExecRequest,
        directory: Path,
        monitor: "_Monitor",
        sync: "_SyncPipe",
        start_pipe: Descriptor,
        attach_pipe: Descriptor,
        streams: ExecStreams,
        held: Mapping[int, int],
        start_timeout: float,
        cgroups: SessionCgroups,
        store: FdStore,
    ) -> None:
        self.streams = streams
        self._store = store
        self.held = held
        self.tree: ProcessTree | None = None
        self._cgroups = cgroups
        self._request = request
        self._directory = directory
        self._monitor = monitor
        self._sync = sync
        self._start_pipe = start_pipe
        self._attach_pipe = attach_pipe
        self._start_timeout = start_timeout
        self._process: ProcessIdentity | None = None
        self._pidfd: Descriptor | None = None
        self._resizing: asyncio.TimerHandle | None = None
        self._next_size: ConsoleSize | None = None

    def __repr__(self) -> str:
        return f"<ConmonExec {self._request.session_id[:12]} monitor={self._monitor.identity}>"

    @property
    def monitor(self) -> ProcessIdentity | None:
        """conmon itself."""
        return self._monitor.identity

    @property
    def monitor_pid(self) -> int:
        """conmon's pid."""
        return self._monitor.pid

    def keep(self) -> None:
        """Have what the next service needs kept: the pipes, and the one that tells the end."""
        descriptors = {Role.SYNC: self._sync.fileno()}
        if isinstance(self.streams.input, PipeInput):
            descriptors[Role.STDIN] = self.streams.input.fileno()
        for output in self.streams.outputs:
            if isinstance(output, PipeOutput):
                descriptors[_OUTPUT_ROLES[output.stream]] = output.fileno()
        self._keep(descriptors)

    def _keep(self, descriptors: Mapping[Role, int]) -> None:
        self._store.keep({stream_name(self._request.session_id, role): fd for role, fd in descriptors.items()})

    async def connect(self) -> None:
        """Step 2: let conmon open its attach socket and take the one connection to it."""
        os.write(self._start_pipe.fileno(), b"\n")
        ready = await _SyncPipe(self._attach_pipe).next()
        if ready is None or ready.data != 0:
            raise ConnectionError(f"conmon has no attach socket: {ready}")
        connection = _connect_seqpacket(self._directory / "attach")
        self._keep({Role.TERMINAL: connection.fileno()})
        wants_input, wants_output = self._request.stdin, self._request.stdout or self._request.stderr
        output = AttachOutput(connection)
        self.streams = ExecStreams(
            outputs=(output if wants_output else _Discarded(output),),
            input=AttachInput(connection) if wants_input else None,
        )

    async def start(self) -> ProcessIdentity:
        """Step 4: run it. StartFailed when the runtime refuses or takes too long; nothing is left then."""
        self._start_pipe.close()  # conmon takes the end of the pipe as its byte
        self._attach_pipe.close()
        try:
            message = await asyncio.wait_for(self._sync.next(), self._start_timeout)
        except TimeoutError:
            await self.abort()
            raise StartFailed(
                f"the runtime did not start the process within {self._start_timeout:g} seconds",
                128,
                hint=f"{self._request.container.runtime.path} hangs in container {self._request.container.id}",
            ) from None
        if message is None or message.data is None or message.data <= 0:
            raise await self._start_failure(message)
        with contextlib.suppress(OSError):
            (self._directory / "process.json").unlink()  # it holds secrets
        self._process = pidfd.identify(message.data) or ProcessIdentity(message.data, 0)
        self._pidfd = pidfd.open_pidfd(self._process)
        if self._pidfd is not None:
            self._keep({Role.PROCESS: self._pidfd.fileno()})
        self.tree = ProcessTree(self._cgroups, self._request.session_id, self._process)
        return self._process

    async def wait(self) -> ExitStatus:
        """Step 5: return how the process ended, and how we know."""
        message = await self._exit_message()
        if message is not None and message.message == _TIMED_OUT:
            return _KILLED_BY_MONITOR
        if message is not None and message.data is not None and message.data >= 0:
            return ExitStatus(message.data, ExitSource.SYNC_PIPE)
        if self._pidfd is not None and message is None:
            await pidfd.ended(self._pidfd)  # conmon died, or could not write: the process may live on
        return exit_file_status(self._directory) or await kernel_status(self._process, self._pidfd) or UNKNOWN_EXIT

    async def _exit_message(self) -> SyncMessage | None:
        """Return conmon's last message.

        A conmon that writes input which the terminal will never take is stuck in that write, its process dead or
        not (seen with 2.1.6: raw mode, 20 KB of input that nobody reads). It is killed, and the kernel asked.
        """
        message = asyncio.ensure_future(self._sync.next())
        try:
            if self._request.tty and self._pidfd is not None:
                ended = asyncio.ensure_future(pidfd.ended(self._pidfd))
                await asyncio.wait([message, ended], return_when=asyncio.FIRST_COMPLETED)
                ended.cancel()
                while not (await asyncio.wait([message], timeout=_STUCK_AFTER))[0]:
                    if self._input_stuck():
                        log.warning("conmon of exec %s is stuck and is killed", self._request.session_id[:12])
                        self._monitor.kill_group()
            return await message
        finally:
            message.cancel()

    def _input_stuck(self) -> bool:
        """Whether conmon takes no input and has no output for us either."""
        stdin, outputs = self.streams.input, self.streams.outputs
        return (
            isinstance(stdin, AttachInput)
            and stdin.blocked
            and not any(output.waiting() for output in outputs if isinstance(output, AttachOutput))
        )

    def resize(self, size: ConsoleSize) -> None:
        """Set the terminal's size. Internal when conmon does not take it.

        Of a storm of sizes only the latest counts: conmon loses lines that come faster than it reads them.
        """
        if self._resizing is not None:
            self._next_size = size
            return
        resize_terminal(self._directory, size)
        self._resizing = asyncio.get_running_loop().call_later(_RESIZE_INTERVAL, self._resize_again)

    def _resize_again(self) -> None:
        self._resizing = None
        size, self._next_size = self._next_size, None
        if size is not None:
            with contextlib.suppress(Internal):  # the process may be over
                self.resize(size)

    def leave(self) -> None:
        """Let go of every descriptor. The process and its monitor live on, and the exit file will tell."""
        if self._resizing is not None:
            self._resizing.cancel()
        self.streams.close()
        self._start_pipe.close()
        self._attach_pipe.close()
        self._sync.close()
        if self._pidfd is not None:
            self._pidfd.close()

    async def dispose(self) -> None:
        """Step 6: leave nothing behind: no descriptor, no directory, no monitor."""
        self.leave()
        _drop(self._store, self._request.session_id)
        await self._monitor.gone(_MONITOR_GRACE)
        self._cgroups.remove(self._request.session_id)
        _remove_directory(self._directory)

    async def abort(self) -> None:
        """Kill a start that is under way, the runtime included, and dispose of it."""
        self._monitor.kill_group()
        await self.dispose()

    async def _start_failure(self, message: SyncMessage | None) -> StartFailed:
        reason = failures.last_error(_tail(self._directory / "oci-log"))
        if not reason and message is not None:
            reason = message.message
        if not reason:
            reason = await self._runtime_stderr()
        failure = failures.start_failure(reason)
        await self.dispose()
        return failure

    async def _runtime_stderr(self) -> str:
        """What the runtime said on the stderr that would have been the process's."""
        if self._request.tty:
            return ""
        for output in self.streams.outputs:
            output.cut()
            while (chunk := await output.read()) is not None:
                if chunk[0] == stdcopy.STDERR:
                    return chunk[1][: failures.MESSAGE_LIMIT].decode(errors="replace")
        return ""


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
        held = _read_held(directory) or Held({}, None, "")
        self.monitor = session.monitor or held.monitor
        self.tree: ProcessTree | None = None
        self._session_id = session.id
        self._directory = directory
        self._cgroups = cgroups
        self._store = store
        self._start_timeout = start_timeout
        self._deadline = _deadline(session)
        sync = self._take(Role.SYNC)
        self._sync = _SyncPipe(sync) if sync is not None else None
        self.streams = self._streams(session, held)
        self._process: ProcessIdentity | None = None
        self._pidfd: Descriptor | None = None
        if (process := session.process or _pid_file_identity(directory)) is not None:
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
            process = _pid_file_identity(self._directory)
            if process is None and message is not None and message.data is not None and message.data > 0:
                process = ProcessIdentity(message.data, 0)  # it ran, and is over already
            if process is not None:
                self._know(process)
        if self._process is None:
            reason = failures.last_error(_tail(self._directory / "oci-log"))
            if not reason and message is not None:
                reason = message.message
            await self._undo()
            raise failures.start_failure(reason or "the service ended during the start")
        with contextlib.suppress(OSError):
            (self._directory / "process.json").unlink()
        return self._process

    async def wait(self) -> ExitStatus:
        """Return how it ended: from the exit file, the sync pipe, the kernel, else unknown."""
        if self._pidfd is not None:
            await pidfd.ended(self._pidfd)
        if self.monitor is not None and (monitor := pidfd.open_pidfd(self.monitor)):
            with contextlib.closing(monitor), contextlib.suppress(TimeoutError):
                await asyncio.wait_for(pidfd.ended(monitor), _MONITOR_GRACE)  # it writes the exit file, then ends
        message = await self._last_message()
        if message is not None and message.message == _TIMED_OUT:
            return _KILLED_BY_MONITOR
        if time.time() >= self._deadline and exit_file_code(self._directory) == _NO_CODE:
            return _KILLED_BY_MONITOR
        if status := exit_file_status(self._directory):
            return status
        if message is not None and message.data is not None and 0 <= message.data <= _CODE_MAX:
            return ExitStatus(message.data, ExitSource.SYNC_PIPE)
        return await kernel_status(self._process, self._pidfd) or UNKNOWN_EXIT

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
        _drop(self._store, self._session_id)
        self._cgroups.remove(self._session_id)
        _remove_directory(self._directory)

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
            with contextlib.closing(monitor), contextlib.suppress(OSError):
                if os.getpgid(self.monitor.pid) == self.monitor.pid:
                    os.killpg(self.monitor.pid, signal.SIGKILL)
                else:
                    signal.pidfd_send_signal(monitor.fileno(), signal.SIGKILL)
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
        kept = {number: self._take(role) for number, role in _OUTPUT_ROLES.items()}
        outputs = [PipeOutput(pipe, number) for number, pipe in kept.items() if pipe is not None]
        stdin = self._take(Role.STDIN)
        return ExecStreams(outputs=outputs, input=_stdin(stdin, session.id, self._store) if stdin else None)


class _Monitor:
    """conmon, our child: reaped when it ends, killed with all its group when a start must be undone."""

    def __init__(self, pid: int) -> None:
        self.pid = self._pid = pid
        self._reaped = False
        self._identity: ProcessIdentity | None = None
        try:
            # Now, and not at the end: with no descriptor left a start can still be refused, an end cannot.
            self._pidfd = Descriptor(os.pidfd_open(pid))
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise

    @property
    def identity(self) -> ProcessIdentity | None:
        """conmon's name. Read late: while a process is in execve, reading its /proc waits for it."""
        if self._identity is None and not self._reaped:
            self._identity = pidfd.identify(self._pid)
        return self._identity

    def kill_group(self) -> None:
        """Kill conmon and the runtime. Before its setsid conmon is still in our group: then only itself."""
        if self._reaped:
            return
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(self._pid) == self._pid:
                os.killpg(self._pid, signal.SIGKILL)
            else:
                os.kill(self._pid, signal.SIGKILL)

    async def gone(self, grace: float) -> None:
        """Reap conmon, at the latest after `grace` seconds with SIGKILL."""
        if not self._try_reap():
            try:
                await asyncio.wait_for(pidfd.ended(self._pidfd), grace)
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


class _SyncPipe:
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
        return self._pipe.fileno()

    def close(self) -> None:
        self._pipe.close()


class _Discarded:
    """An output that nobody asked for and that has to be read all the same."""

    def __init__(self, output: Output) -> None:
        self._output = output

    async def read(self, recorders: Recorders = UNRECORDED) -> tuple[int, bytes] | None:
        while (await self._output.read(recorders)) is not None:
            pass
        return None

    async def bulk(self) -> None:
        return None

    def cut(self) -> None:
        self._output.cut()

    def close(self) -> None:
        self._output.close()


async def kernel_status(process: ProcessIdentity | None, fd: Descriptor | None) -> ExitStatus | None:
    """Ask the kernel, which tells of an ended process in one place before it is reaped and in another after."""
    if process is None or fd is None:
        return None
    for _ in range(_REAP_ATTEMPTS):
        if status := pidfd.zombie_status(process) or pidfd.exit_status(fd):
            return status
        await asyncio.sleep(_REAP_INTERVAL)  # the kernel has no event for "reaped"
    return None


def resize_terminal(directory: Path, size: ConsoleSize) -> None:
    """Tell the conmon of a session's directory the size of its terminal: one line into its ctl FIFO."""
    try:
        fd = os.open(directory / "ctl", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.closing(Descriptor(fd)):
            os.write(fd, f"1 {size.height} {size.width}\n".encode())
    except OSError as error:
        raise Internal("the terminal cannot be resized", hint=f"conmon's ctl FIFO: {error}") from error


def exit_file_code(directory: Path) -> int | None:
    """Read the exit file of a session's directory: conmon writes a bare decimal. None when there is none."""
    with contextlib.suppress(OSError, ValueError):
        for entry in (directory / "exit").iterdir():
            return int(entry.read_text(encoding="ascii")[:8])
    return None


def exit_file_status(directory: Path) -> ExitStatus | None:
    """Return what the exit file of a session's directory tells, if it does."""
    code = exit_file_code(directory)
    return None if code is None or code < 0 else ExitStatus(code, ExitSource.EXIT_FILE)


def _deadline(session: ExecSession) -> float:
    """Return the time (seconds since the epoch) from which on conmon may have ended a session by itself."""
    if session.config.timeout is None or session.started_at is None:
        return math.inf
    return session.started_at + session.config.timeout


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
        connection = _connect_seqpacket(directory / "attach")
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            log.warning("the terminal of %s cannot be taken back: %s", directory.name, error)
        return ExecStreams()
    return _terminal_streams(connection, session)


def _terminal_streams(connection: socket.socket, session: ExecSession) -> ExecStreams:
    return ExecStreams(
        outputs=(AttachOutput(connection),), input=AttachInput(connection) if session.config.attach_stdin else None
    )


def _pid_file_identity(directory: Path) -> ProcessIdentity | None:
    try:
        return pidfd.identify(int((directory / "pid").read_text(encoding="ascii")))
    except (OSError, ValueError):
        return None


def _out_of_resources(directory: Path, error: OSError) -> Unavailable:
    return Unavailable("the host cannot start another process now", hint=f"preparing an exec in {directory}: {error}")


def _copy_above(fd: int, least: int, theirs: contextlib.ExitStack) -> int:
    """Duplicate a descriptor to a number of at least `least`, to be closed by `theirs`."""
    copy = Descriptor(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, least))
    theirs.callback(copy.close)
    return copy.fileno()


def _read_held(directory: Path) -> Held | None:
    """Return what a session's directory says of it; None when it says nothing that can be understood."""
    try:
        fields = json.loads((directory / _HELD).read_text(encoding="utf-8"))
        streams = {int(stream): int(number) for stream, number in fields["streams"].items()}
        monitor = ProcessIdentity(*map(int, fields["monitor"])) if fields["monitor"] else None
        return Held(streams, monitor, str(fields["record"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            log.warning("what %s says of its session cannot be understood: %r", directory.name, error)
        return None


def _write_files(directory: Path, process: Mapping[str, Any], held: Held) -> None:
    """Write what conmon and its runtime read once they are let go, and what the next service reads."""
    text = str(directory)
    os.mkdir(f"{text}/exit", 0o700)  # noqa: PTH102  (Path costs more than the system call)
    monitor = [held.monitor.pid, held.monitor.start_time] if held.monitor is not None else None
    fields = {"streams": held.streams, "monitor": monitor, "record": held.record}
    _write_new(f"{text}/{_HELD}", json.dumps(fields).encode())
    # surrogateescape: an environment may hold bytes that are no UTF-8, and they must arrive as they were
    _write_new(f"{text}/process.json", json.dumps(process, ensure_ascii=False).encode(errors="surrogateescape"))


def _write_new(path: str, data: bytes) -> None:
    """Write a private file that is not there yet. OSError."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb", buffering=0) as file:  # noqa: PTH123
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]


def _remove_directory(directory: Path) -> None:
    """Remove a session's directory: what we know to be in it, and if that was not all, whatever it holds."""
    text = str(directory)
    for name in _FILES:
        with contextlib.suppress(OSError):
            os.unlink(f"{text}/{name}")  # noqa: PTH108  (Path costs more than the system call)
    try:
        for name in os.listdir(f"{text}/exit"):  # noqa: PTH208
            os.unlink(f"{text}/exit/{name}")  # noqa: PTH108
        os.rmdir(f"{text}/exit")  # noqa: PTH106
        os.rmdir(text)  # noqa: PTH106
    except OSError:
        shutil.rmtree(directory, ignore_errors=True)


def _pipe(
    ours: contextlib.ExitStack, theirs: contextlib.ExitStack, *, ours_writes: bool = False
) -> tuple[Descriptor, Descriptor]:
    """Make a pipe; return (our end, conmon's end), each to be closed by the stack it belongs to."""
    read, write = (Descriptor(fd) for fd in os.pipe2(os.O_CLOEXEC))
    mine, other = (write, read) if ours_writes else (read, write)
    ours.callback(mine.close)
    theirs.callback(other.close)
    return mine, other


def _standard_streams(
    request: ExecRequest, ours: contextlib.ExitStack, theirs: contextlib.ExitStack, store: FdStore
) -> tuple[ExecStreams, list[int]]:
    """Return the streams that we hold, and what conmon gets as its descriptors 0, 1 and 2."""
    null = Descriptor(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
    theirs.callback(null.close)
    stdio = [null.fileno()] * 3
    if request.tty:
        return ExecStreams(), stdio
    stdin: Input | None = None
    outputs: list[Output] = []
    if request.stdin:
        mine, other = _pipe(ours, theirs, ours_writes=True)
        stdin, stdio[0] = _stdin(mine, request.session_id, store), other.fileno()
    for wanted, number in ((request.stdout, stdcopy.STDOUT), (request.stderr, stdcopy.STDERR)):
        if wanted:
            mine, other = _pipe(ours, theirs)
            outputs.append(PipeOutput(mine, number))
            stdio[number] = other.fileno()
    return ExecStreams(outputs=outputs, input=stdin), stdio


def _stdin(pipe: Descriptor, session_id: SessionId, store: FdStore) -> PipeInput:
    """Return the process's stdin, whose end is the end of the duplicate that is kept, too."""
    return PipeInput(pipe, ended=lambda: store.drop([stream_name(session_id, Role.STDIN)]))


def _drop(store: FdStore, session_id: SessionId) -> None:
    """Have nothing of a session kept any more."""
    store.drop([stream_name(session_id, role) for role in Role])


def _connect_seqpacket(path: Path) -> socket.socket:
    """Connect to a unix socket whose path may be longer than sun_path: by way of its directory's descriptor."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.setblocking(False)
        with contextlib.closing(Descriptor(os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))) as parent:
            connection.connect(f"/proc/self/fd/{parent.fileno()}/{path.name}")
    except BaseException:
        connection.close()
        raise
    return connection


def _tail(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - failures.LOG_LIMIT))
            return file.read(failures.LOG_LIMIT)
    except OSError:
        return b""


def longest_state_dir() -> int:
    """Return how many bytes the path of a state directory may have.

    conmon makes a console socket in the session's directory, and the path of a unix socket ends at 107 bytes.
    """
    return 107 - len("/sessions/") - 32 - len(CONSOLE_SOCKET_NAME)
