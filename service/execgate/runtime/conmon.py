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
import logging
import os
import resource
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from execgate.model.config import ConsoleSize
from execgate.model.errors import Internal, StartFailed, Unavailable
from execgate.model.ids import SessionId
from execgate.model.process import ProcessIdentity
from execgate.model.session import UNKNOWN_EXIT, ExecSession, ExitSource, ExitStatus
from execgate.runtime import failures, pidfd
from execgate.runtime.adopted import AdoptedExec
from execgate.runtime.ahead import Ahead
from execgate.runtime.directory import (
    Held,
    connect_attach,
    exit_file_status,
    forget_process,
    read_held,
    read_pid_file,
    remove_directory,
    resize_terminal,
    runtime_log,
    session_directory,
    write_files,
)
from execgate.runtime.fdstore import OUTPUT_ROLES, FdStore, Role, drop_all, stream_name
from execgate.runtime.monitor import KILLED_BY_MONITOR, MONITOR_GRACE, TIMED_OUT, SyncPipe
from execgate.runtime.readiness import Descriptor
from execgate.runtime.spawning import ExecRequest, Spawned, Spawner
from execgate.runtime.streams import (
    UNRECORDED,
    AttachInput,
    AttachOutput,
    ExecStreams,
    Output,
    PipeInput,
    PipeOutput,
    Recorders,
)
from execgate.runtime.tree import ProcessTree, SessionCgroups
from execgate.wire import stdcopy
from execgate.wire.sync_pipe import SyncMessage

log = logging.getLogger(__name__)

_STUCK_AFTER = 2.0
"""Seconds after the end of a process in a terminal in which its conmon has to say something."""

_RESIZE_INTERVAL = 0.02
"""Seconds between two sizes for one terminal."""


class ConmonRuntime:
    """Starts processes in containers.

    `directory` gets one 0700 directory a live session. `start_timeout` is the seconds a runtime may take to start
    a process before it and everything it began is killed.
    """

    def __init__(
        self, *, conmon: Path, directory: Path, start_timeout: float, cgroups: SessionCgroups, store: FdStore
    ) -> None:
        self._cgroups = cgroups
        self._store = store
        self._directory = directory
        self._start_timeout = start_timeout
        self._ahead = Ahead(self._spawn, self._undo)
        self._begun: set[Path] = set()  # directories of starts that are not on record yet
        # As it is now: the service may raise its own later, and a container without one must not inherit that.
        self._spawner = Spawner(conmon, nofile=resource.getrlimit(resource.RLIMIT_NOFILE), store=store)

    async def prepare(self, request: ExecRequest, intend: Callable[[], str]) -> "ConmonExec":
        """Make everything ready for `request`, up to the last step. Unavailable when the host cannot.

        `intend` is called when the host has given what it takes, and before there is anything to run: process.json
        is written after it. A service that dies in between leaves a conmon whose runtime finds no process. It returns
        the session's record, which is kept beside the process: see `records`.
        """
        execution = await self._begun_ahead(request) or await self._spawn(request)
        try:
            # conmon initialises meanwhile, on another processor.
            # What runs is kept, and somebody listens to it: before there is anything to run.
            record = intend()
            execution.keep()
            if request.tty and request.attached:
                await asyncio.wait_for(execution.connect(), self._start_timeout)
            execution.write(request.process, record)
        except BaseException as error:
            await self._undo(execution)
            if isinstance(error, TimeoutError | ConnectionError):
                raise Unavailable("the monitor did not answer", hint=f"{execution!r}: {error!r}") from error
            if isinstance(error, OSError):
                raise _out_of_resources(error) from error
            raise
        self._begun.discard(execution.directory)  # from here on the session has a record of its start
        return execution

    async def _begun_ahead(self, request: ExecRequest) -> "ConmonExec | None":
        """Return what was begun for this start, unless it has ended since: the host may have run out of memory."""
        execution = await self._ahead.take(request)
        if execution is not None and not execution.waits:
            await self._undo(execution)
            return None
        return execution

    def begin(self, request: ExecRequest) -> None:
        """Spawn a monitor for a start that will probably come soon; its `process` need only say whether it is a TTY."""
        self._ahead.begin(request)

    async def close(self) -> None:
        """End the monitors of starts that have not come."""
        await self._ahead.close()

    async def _spawn(self, request: ExecRequest) -> "ConmonExec":
        """Spawn a monitor, in a directory and a cgroup of its own. Unavailable, and then nothing is left of it."""
        directory = session_directory(self._directory, request.session_id)
        try:
            directory.mkdir(mode=0o700)
            self._begun.add(directory)
            try:
                spawned = await self._spawner.spawn(request, directory)
            except BaseException:
                remove_directory(directory)
                self._begun.discard(directory)
                raise
        except OSError as error:
            raise _out_of_resources(error) from error
        execution = ConmonExec(
            request, directory, spawned, cgroups=self._cgroups, store=self._store, start_timeout=self._start_timeout
        )
        try:
            self._cgroups.add(request.session_id, spawned.monitor.pid)
        except OSError as error:
            await self._undo(execution)
            raise _out_of_resources(error) from error
        return execution

    async def _undo(self, execution: "ConmonExec") -> None:
        await execution.abort()
        self._begun.discard(execution.directory)

    def adopt(self, session: ExecSession) -> AdoptedExec:
        """Take back a process that an earlier service started."""
        directory = session_directory(self._directory, session.id)
        return AdoptedExec(directory, session, self._cgroups, self._store, self._start_timeout)

    def records(self) -> Iterator[str]:
        """Yield the record of each session that may still run, as it was when it was about to be started."""
        for directory in sorted(self._directory.iterdir()):
            held = read_held(directory)
            if held is not None and held.record:
                yield held.record

    def sweep(self, keep: Collection[SessionId]) -> None:
        """Clear away what belongs to no session of `keep`: cgroups without a process, directories without a living one.

        A service that was killed while it finished a session leaves such a directory behind.
        """
        self._cgroups.sweep()
        kept = self._begun | {session_directory(self._directory, one) for one in keep}
        for directory in self._directory.iterdir():
            if directory not in kept and read_pid_file(directory) is None:
                log.info("a directory that no session has any more is removed: %s", directory.name)
                remove_directory(directory)


class ConmonExec:
    """One process: prepared, then started, then waited for, then disposed of; aborted at any point before the end."""

    def __init__(
        self,
        request: ExecRequest,
        directory: Path,
        spawned: Spawned,
        *,
        cgroups: SessionCgroups,
        store: FdStore,
        start_timeout: float,
    ) -> None:
        self.streams = spawned.streams
        self.tree: ProcessTree | None = None
        self.directory = directory
        self._request = request
        self._monitor = spawned.monitor
        self._sync = spawned.sync
        self._start_pipe = spawned.start_pipe
        self._attach_pipe = spawned.attach_pipe
        self._held = spawned.held
        self._process_file = spawned.process_file
        self._cgroups = cgroups
        self._store = store
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
    def waits(self) -> bool:
        """Whether its monitor is there to be let go."""
        return self._monitor.alive

    def keep(self) -> None:
        """Have what the next service needs kept: the pipes, and the one that tells the end."""
        descriptors = {Role.SYNC: self._sync.fileno()}
        if isinstance(self.streams.input, PipeInput):
            descriptors[Role.STDIN] = self.streams.input.fileno()
        for output in self.streams.outputs:
            if isinstance(output, PipeOutput):
                descriptors[OUTPUT_ROLES[output.stream]] = output.fileno()
        self._keep(descriptors)

    def write(self, process: Mapping[str, Any], record: str) -> None:
        """Write who has what, with the session's record, for the next service, and then what is to run. OSError."""
        write_files(self.directory, Held(self._held, self.monitor, record), self._process_file, process)

    def _keep(self, descriptors: Mapping[Role, int]) -> None:
        self._store.keep({stream_name(self._request.session_id, role): fd for role, fd in descriptors.items()})

    async def connect(self) -> None:
        """Step 2: let conmon open its attach socket and take the one connection to it."""
        assert self._attach_pipe is not None
        os.write(self._start_pipe.fileno(), b"\n")
        ready = await SyncPipe(self._attach_pipe).next()
        self._attach_pipe.close()
        if ready is None or ready.data != 0:
            raise ConnectionError(f"conmon has no attach socket: {ready}")
        connection = connect_attach(self.directory)
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
        try:
            async with asyncio.timeout(self._start_timeout):
                message = await self._sync.next()
        except TimeoutError:
            await self.abort()
            raise StartFailed(
                f"the runtime did not start the process within {self._start_timeout:g} seconds",
                128,
                hint=f"{self._request.container.runtime.path} hangs in container {self._request.container.id}",
            ) from None
        if message is None or message.data is None or message.data <= 0:
            raise await self._start_failure(message)
        forget_process(self.directory, self._process_file)
        self._process, self._pidfd = pidfd.hold(message.data)
        if self._pidfd is not None:
            self._keep({Role.PROCESS: self._pidfd.fileno()})
        self.tree = ProcessTree(self._cgroups, self._request.session_id, self._process)
        return self._process

    async def wait(self) -> ExitStatus:
        """Step 5: return how the process ended, and how we know."""
        message = await self._exit_message()
        if message is not None and message.message == TIMED_OUT:
            return KILLED_BY_MONITOR
        if message is not None and message.data is not None and message.data >= 0:
            return ExitStatus(message.data, ExitSource.SYNC_PIPE)
        if self._pidfd is not None and message is None:
            await pidfd.ended(self._pidfd)  # conmon died, or could not write: the process may live on
        return exit_file_status(self.directory) or await pidfd.kernel_status(self._process, self._pidfd) or UNKNOWN_EXIT

    async def _exit_message(self) -> SyncMessage | None:
        """Return conmon's last message.

        A conmon that writes input which the terminal will never take is stuck in that write, its process dead or
        not (seen with 2.1.6: raw mode, 20 KB of input that nobody reads). It is killed, and the kernel asked.
        """
        if not self._request.tty or self._pidfd is None:
            return await self._sync.next()
        message = asyncio.ensure_future(self._sync.next())
        try:
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
        resize_terminal(self.directory, size)
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
        if self._attach_pipe is not None:
            self._attach_pipe.close()
        self._sync.close()
        if self._pidfd is not None:
            self._pidfd.close()

    async def dispose(self) -> None:
        """Step 6: leave nothing behind: no descriptor, no directory, no monitor."""
        self.leave()
        drop_all(self._store, self._request.session_id)
        await self._monitor.gone(MONITOR_GRACE)
        self._cgroups.remove(self._request.session_id)
        remove_directory(self.directory)

    async def abort(self) -> None:
        """Kill a start that is under way, the runtime included, and dispose of it."""
        self._monitor.kill_group()
        await self.dispose()

    async def _start_failure(self, message: SyncMessage | None) -> StartFailed:
        reason = failures.last_error(runtime_log(self.directory))
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


def _out_of_resources(error: OSError) -> Unavailable:
    return Unavailable("the host cannot start another process now", hint=f"preparing an exec: {error}")
