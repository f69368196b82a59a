"""`docker top`: the processes of a container, as the host's ps shows them.

Like dockerd this runs the host's `ps` with the caller's arguments, never a program of the container, and keeps the
lines of the container's own processes.
"""

import re
import subprocess
from dataclasses import dataclass

from execgate.containers import proc
from execgate.model.container import Container
from execgate.model.errors import Conflict, InvalidArgument, Unavailable

_TIMEOUT = 10.0
_MAX_ARGS = 256
# moby: a column called PID that is not the pid would let a caller list any process.
_RENAMED_PID = re.compile(r"\s+([^\s]*)=\s*(PID[^\s]*)")


@dataclass(frozen=True, slots=True)
class Top:
    """A table: its titles, and a row of as many cells for each process."""

    titles: list[str]
    processes: list[list[str]]


def top(container: Container, ps_args: str) -> Top:
    """Run `ps` and keep what belongs to the container. Blocks; Conflict, InvalidArgument, Unavailable."""
    if container.init is None:
        raise Conflict(f"container {container.id} is not running")
    for column, title in _RENAMED_PID.findall(" " + ps_args):
        if column != "pid":
            raise InvalidArgument(f'specifying "{column}={title}" is not allowed')
    if len(ps_args) > _MAX_ARGS or "\0" in ps_args:
        raise InvalidArgument("invalid ps_args")
    return parse(_ps(ps_args.split()), set(proc.pids_in_cgroup(container.init.pid)))


def parse(output: str, pids: set[int]) -> Top:
    """Keep the lines of `pids`. The last column takes what is left of its line: a command has spaces."""
    lines = output.splitlines()
    titles = lines[0].split() if lines else []
    if "PID" not in titles:
        raise InvalidArgument("Couldn't find PID field in ps output")
    column = titles.index("PID")
    rows = (line.split(maxsplit=len(titles) - 1) for line in lines[1:])
    return Top(
        titles,
        [row for row in rows if len(row) > column and row[column].isdigit() and int(row[column]) in pids],
    )


def _ps(arguments: list[str]) -> str:
    try:
        done = subprocess.run(
            ["ps", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT,
            check=False,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise Unavailable("the host has no ps", hint="install procps") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable("ps cannot be run now", hint=str(error)) from error
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise InvalidArgument(f"ps: {reason}")
    return done.stdout.decode(errors="replace")
