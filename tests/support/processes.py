"""Processes of this host by what is on their command lines, and their end."""

import os
import signal
from collections.abc import Iterable
from pathlib import Path


def processes_of(marker: str) -> frozenset[int]:
    """Return the pids of the processes that have `marker` on their command line; never this process."""
    wanted, own = os.fsencode(marker), os.getpid()
    return frozenset(
        int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != own and _names(name, wanted)
    )


def kill_all(pids: Iterable[int]) -> None:
    """Send SIGKILL to these processes; harmless when they have ended."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _names(pid: str, marker: bytes) -> bool:
    try:
        return marker in Path("/proc", pid, "cmdline").read_bytes()
    except OSError:  # it has ended
        return False


def children(pid: int) -> frozenset[int]:
    """Return the pids of a process's children."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found.update(map(int, (task / "children").read_text().split()))
        except OSError:  # that thread ended, or the kernel was built without CONFIG_PROC_CHILDREN
            continue
    return frozenset(found)
