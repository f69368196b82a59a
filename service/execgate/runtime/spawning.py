"""Spawning conmon: its pipes, its command line, its environment, and nothing that it should not have."""

import asyncio
import contextlib
import fcntl
import math
import os
import resource
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from execgate.model.container import Container
from execgate.model.errors import Unavailable
from execgate.model.ids import SessionId
from execgate.runtime.directory import new_process_file
from execgate.runtime.fdstore import FdStore, Role, stream_name
from execgate.runtime.monitor import Monitor, SyncPipe
from execgate.runtime.posix_spawn import Child, PosixSpawn
from execgate.runtime.readiness import Descriptor
from execgate.runtime.streams import ExecStreams, Input, Output, PipeInput, PipeOutput
from execgate.wire import stdcopy

_CHILD_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_PARALLEL = 4
"""Spawns at once."""

_TIMEOUT_MARGIN = 2
"""Seconds that conmon's own timeout comes later than ours, which is gentler and knows more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecRequest:
    """One process to run: where, what (the runtime's process.json), and which streams somebody will hold.

    `timeout` is the seconds after which conmon ends it, whoever else is there. `preserved` are descriptors of ours
    that the process gets as 3, 4, …. Two that differ in nothing but `process` are equal: conmon learns it last.
    """

    session_id: SessionId
    container: Container
    process: Mapping[str, Any] = field(compare=False)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawned:
    """A conmon that waits for the end of its start pipe, and our ends of its pipes.

    `held`: which of its descriptors are the read ends of the output pipes, by stream. `process_file`: what the
    process.json is called that its runtime will read.
    """

    monitor: Monitor
    sync: SyncPipe
    start_pipe: Descriptor
    attach_pipe: Descriptor | None
    streams: ExecStreams
    held: Mapping[int, int]
    process_file: str


class Spawner:
    """Spawns the program `conmon`. What it starts inherits `nofile`, soft and hard, as its RLIMIT_NOFILE.

    Each spawn waits in a thread for the child's execve, which on a busy machine takes milliseconds: meanwhile the event
    loop serves the other sessions.
    """

    def __init__(self, conmon: Path, *, nofile: tuple[int, int], store: FdStore) -> None:
        self._conmon = conmon
        self._nofile = nofile
        self._store = store
        # Its own: one that reads a container's files can be kept waiting by the container.
        self._threads = ThreadPoolExecutor(_PARALLEL, thread_name_prefix="spawn")
        # All of them now: a thread that cannot be had later is reported, and its work is done by another all the same.
        here = threading.Barrier(_PARALLEL + 1)
        try:
            for _ in range(_PARALLEL):
                self._threads.submit(here.wait)
        except RuntimeError as error:
            here.abort()
            raise Unavailable("the host has no threads left", hint=str(error)) from error
        here.wait()

    async def spawn(self, request: ExecRequest, directory: Path) -> Spawned:
        """Make the pipes and spawn conmon; OSError, and then nothing is left of either."""
        ends = _Ends()
        try:
            spawned = await self._spawn(request, directory, ends)
        except BaseException:
            ends.close_ours()
            raise
        finally:
            ends.close_theirs()
        return spawned

    async def _spawn(self, request: ExecRequest, directory: Path, ends: "_Ends") -> Spawned:
        sync, sync_write = ends.pipe()
        start_write, start_read = ends.pipe(ours_writes=True)
        theirs_by_name = {"_OCI_SYNCPIPE": sync_write, "_OCI_STARTPIPE": start_read}
        attach: Descriptor | None = None
        if request.tty and request.attached:
            attach, theirs_by_name["_OCI_ATTACHPIPE"] = ends.pipe()
        streams, stdio = _standard_streams(request, ends, self._store)
        outputs = [output for output in streams.outputs if isinstance(output, PipeOutput)]
        # What conmon gets, in the order of the numbers that it gets there; None is /dev/null.
        given = [*stdio, *request.preserved, *theirs_by_name.values()]
        held = {output.stream: len(given) + index for index, output in enumerate(outputs)}
        given += [output.fileno() for output in outputs]
        first = len(stdio) + len(request.preserved)
        environment = {name: str(first + index) for index, name in enumerate(theirs_by_name)}
        environment |= {"PATH": _CHILD_PATH, "TMPDIR": str(directory)}
        if runtime_dir := os.environ.get("XDG_RUNTIME_DIR"):
            environment["XDG_RUNTIME_DIR"] = runtime_dir
        process_file = new_process_file()
        arguments = _arguments(self._conmon, request, directory, process_file)
        child = await self._run(PosixSpawn(arguments, environment, ends.above(given)))
        with contextlib.suppress(OSError):
            resource.prlimit(child.pid, resource.RLIMIT_NOFILE, self._nofile)
        return Spawned(
            monitor=Monitor(child),
            sync=SyncPipe(sync),
            start_pipe=start_write,
            attach_pipe=attach,
            streams=streams,
            held=held,
            process_file=process_file,
        )

    async def _run(self, spawn: PosixSpawn) -> Child:
        """Return what was spawned. Before that nothing that it gets may be closed, so a cancel waits. OSError."""
        running = asyncio.get_running_loop().run_in_executor(self._threads, spawn.run)
        cancelled: asyncio.CancelledError | None = None
        while not running.done():
            try:
                await asyncio.wait([running])
            except asyncio.CancelledError as error:
                cancelled = error
        child = running.result()
        if cancelled is not None:
            _end(child.pid)
            raise cancelled
        return child


def _end(pid: int) -> None:
    """Kill a child that nobody wants any more, and reap it."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def stdin_input(pipe: Descriptor, session_id: SessionId, store: FdStore) -> PipeInput:
    """Return the process's stdin, whose end is the end of the duplicate that is kept, too."""
    return PipeInput(pipe, ended=lambda: store.drop([stream_name(session_id, Role.STDIN)]))


def _arguments(conmon: Path, request: ExecRequest, directory: Path, process_file: str) -> list[str]:
    runtime = request.container.runtime
    arguments = [str(conmon), "--api-version", "1", "--sync"]
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
    return [*arguments, "-e", "--exec-process-spec", f"{directory}/{process_file}"]


class _Ends:
    """The ends of pipes: ours are closed when the spawn fails, conmon's in any case."""

    __slots__ = ("_ours", "_theirs")

    def __init__(self) -> None:
        self._ours: list[Descriptor] = []
        self._theirs: list[int] = []

    def pipe(self, *, ours_writes: bool = False) -> tuple[Descriptor, int]:
        """Make a pipe; return (our end, conmon's end)."""
        read, write = os.pipe2(os.O_CLOEXEC)
        mine, other = Descriptor(write if ours_writes else read), read if ours_writes else write
        self._ours.append(mine)
        self._theirs.append(other)
        return mine, other

    def above(self, given: Sequence[int | None]) -> list[int | None]:
        """Return `given` with a duplicate for each descriptor whose number is that of a place in it.

        So none overwrites another in the child. Everything else that this process has open is close-on-exec (PEP 446)
        and does not reach it (CVE-2024-21626).
        """
        least = len(given)
        moved = {fd: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, least) for fd in given if fd is not None and fd < least}
        self._theirs += moved.values()
        return [fd if fd is None else moved.get(fd, fd) for fd in given]

    def close_ours(self) -> None:
        for end in self._ours:
            end.close()

    def close_theirs(self) -> None:
        for fd in self._theirs:
            os.close(fd)


def _standard_streams(request: ExecRequest, ends: _Ends, store: FdStore) -> tuple[ExecStreams, list[int | None]]:
    """Return the streams that we hold, and what conmon gets as its descriptors 0, 1 and 2."""
    stdio: list[int | None] = [None] * 3
    if request.tty:
        return ExecStreams(), stdio
    stdin: Input | None = None
    outputs: list[Output] = []
    if request.stdin:
        mine, stdio[0] = ends.pipe(ours_writes=True)
        stdin = stdin_input(mine, request.session_id, store)
    for wanted, number in ((request.stdout, stdcopy.STDOUT), (request.stderr, stdcopy.STDERR)):
        if wanted:
            mine, stdio[number] = ends.pipe()
            outputs.append(PipeOutput(mine, number))
    return ExecStreams(outputs=outputs, input=stdin), stdio
