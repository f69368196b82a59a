"""Faults that are put where a test wants them: runtimes that misbehave, processes that die at one system call."""

import collections
import contextlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from support.programs import find_program
from support.runtimes import RuntimeHost, TestContainer


def faulty_runtime(host: RuntimeHost, directory: Path, name: str, on_exec: str) -> RuntimeHost:
    """Return `host` with a program that runs the shell text `on_exec` in place of `exec`, and is itself otherwise.

    In `on_exec`, `"$REAL" "$@"` is what was asked for.
    """
    directory.mkdir(parents=True, exist_ok=True)
    script = directory / name
    script.write_text(
        "#!/bin/sh\n"
        f"REAL={shlex.quote(str(host.program))}\n"
        'case " $* " in\n'
        f"*' exec '*)\n{on_exec}\n;;\n"
        '*) exec "$REAL" "$@" ;;\n'
        "esac\n"
    )
    script.chmod(0o755)
    return replace(host, program=script)


@contextlib.contextmanager
def fifo(container: TestContainer, name: str) -> Iterator[Callable[[], None]]:
    """Make a FIFO /tmp/`name` in a container: what reads a line of it goes on when what is returned is called."""
    path = container.rootfs / "tmp" / name
    path.unlink(missing_ok=True)  # the container may be one that other tests share
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR)  # which waits for nobody
    try:
        yield lambda: [os.write(fd, b"now\n")].clear()
    finally:
        os.close(fd)
        path.unlink()


_CHANGING = (
    "read,recvfrom,write,pwrite64,pwritev2,splice,ftruncate,close,sendmsg,sendto,wait4,waitid,unlink,unlinkat,rmdir"
)
"""System calls that take something from somewhere, or leave something behind: between two of them nothing changes."""


@dataclass(frozen=True, slots=True)
class Step:
    """The `number`th call of one kind that a process makes from a moment on."""

    call: str
    number: int


@contextlib.contextmanager
def steps_taken(pid: int) -> Iterator[list[Step]]:
    """Say at the end of the `with` what a process's main thread did in it that changes something, in order."""
    steps: list[Step] = []
    names = ",".join(f"?{name}" for name in _CHANGING.split(","))  # not every architecture has every one
    with tempfile.NamedTemporaryFile("r") as log:
        with _strace(pid, "-o", log.name, "-e", f"trace={names}", "-e", "signal=none"):
            yield steps
        counts: collections.Counter[str] = collections.Counter()
        for line in log:
            call, bracket, _ = line.partition("(")
            if bracket:
                counts[call] += 1
                steps.append(Step(call, counts[call]))


def killed_at(pid: int, step: Step) -> contextlib.AbstractContextManager[None]:
    """Kill a process when its main thread is about to take this step, as counted from the beginning of the `with`.

    It is not taken. The end of the `with` leaves alone a process that did not come so far.
    """
    return _strace(pid, "-o", os.devnull, "-e", f"inject={step.call}:signal=KILL:when={step.number}")


@contextlib.contextmanager
def _strace(pid: int, *options: str) -> Iterator[None]:
    argv = [str(find_program("strace")), "-p", str(pid), *options]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        told = strace.stderr.readline()
        try:
            assert "attached" in told, told
            yield
        finally:
            strace.terminate()
