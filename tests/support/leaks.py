"""What a service holds, and what runs in a container: compare before and after.

A service holds descriptors, threads, children, monitors and directories. In a container that tests share, whatever
one of them leaves behind stands in the way of the next: a process, its terminal, its open files.
"""

import contextlib
import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from support.bundle import SLEEP_FOREVER
from support.processes import children
from support.runtimes import TestContainer, pid_namespace, processes_within
from support.service import Service


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one service holds at one moment.

    `descriptors` are told by kind (`socket`, `pipe`, `anon_inode:[pidfd]`, or a path), because their numbers
    mean nothing. `monitors` are the pids of its conmon processes, whoever their parent is by now.
    """

    descriptors: tuple[str, ...]
    kept: tuple[str, ...]
    threads: int
    children: frozenset[int]
    monitors: frozenset[int]
    session_directories: frozenset[str]

    def leaked_since(self, before: "Footprint") -> list[str]:
        """Say what there is now that was not there before; empty when nothing leaked.

        Threads may stay in a pool, so growth of a few is no leak; anything else is exact.
        """
        found = []
        if extra := _surplus(self.descriptors, before.descriptors):
            found.append(f"descriptors: {extra}")
        if extra := _surplus(self.kept, before.kept):
            found.append(f"descriptors of the keeper: {extra}")
        if self.threads > before.threads + _POOL_THREADS:
            found.append(f"threads: {before.threads} before, {self.threads} now")
        found += [
            f"{what}: {sorted(more)}"
            for what in ("children", "monitors", "session_directories")
            if (more := getattr(self, what) - getattr(before, what))
        ]
        return found


# asyncio.to_thread keeps its threads, at most this many; concurrent.futures.ThreadPoolExecutor.
_POOL_THREADS = min(32, (os.cpu_count() or 1) + 4)


def footprint(service: Service) -> Footprint:
    """Take the footprint of a running service."""
    pid = service.pid
    return Footprint(
        descriptors=descriptors(pid),
        kept=descriptors(service.keeper),
        threads=len(os.listdir(f"/proc/{pid}/task")),
        children=children(pid),
        monitors=monitors(service.state_dir),
        session_directories=_session_directories(service.state_dir),
    )


def assert_no_leaks(service: Service, before: Footprint, *, timeout: float = 30.0) -> None:
    """Wait until the service holds nothing more than `before`; fail with the rest after `timeout` seconds.

    This polls: there is no event for a descriptor that another process closes.
    """
    deadline = time.monotonic() + timeout
    while leaked := footprint(service).leaked_since(before):
        if time.monotonic() > deadline:
            raise AssertionError(f"left behind after {timeout:g} s: {'; '.join(leaked)}")
        time.sleep(0.02)


class SharedContainer:
    """What goes on in a container that tests share: its processes, its terminals, and who starts and watches them.

    Its init must run, and live as long as this object is used.
    """

    def __init__(self, container: TestContainer) -> None:
        self._id = os.fsencode(container.id)
        init = container.init_pid  # asked once: a runtime takes its time to answer
        self._namespace = pid_namespace(init)
        self._terminals = Path(f"/proc/{init}/root/dev/pts")

    def look(self) -> dict[str, str]:
        """Say what there is by name: terminals, processes, and the conmon of each session, with what to tell of it.

        A terminal keeps its number as long as somebody has it open: a conmon, which keeps it listed, or a process. A
        session that is about to start has nothing in the container yet, but a conmon before its client has an answer.
        """
        found = {f"/dev/pts/{name}": "open" for name in os.listdir(self._terminals) if name.isdigit()}
        found |= {f"pid {pid}": "conmon" for pid, argv in _conmons() if self._id in argv}
        for pid, argv in processes_within(self._namespace).items():
            if argv not in _IDLE:
                found[f"pid {pid}"] = f"{' '.join(argv)}, {_terminal(pid)}"
        return found


# The init and its sleep are there for ever. A zombie holds nothing, and waits for the host's own init, not for a test.
_IDLE = (list(SLEEP_FOREVER), ["sleep", "2147483"], [""])


def assert_nothing_stays(container: SharedContainer, before: Collection[str], *, timeout: float = 30.0) -> None:
    """Wait until `container` holds nothing but `before`; fail with the rest after `timeout` seconds.

    This polls: there is no event for the end of a process that nobody has named.
    """
    deadline = time.monotonic() + timeout
    while left := {name: what for name, what in container.look().items() if name not in before}:
        if time.monotonic() > deadline:
            raise AssertionError(f"left behind in a shared container after {timeout:g} s: {left}")
        time.sleep(0.02)


def monitors(state_dir: Path) -> frozenset[int]:
    """The pids of the conmon processes below `state_dir`: a session's paths are on its command line."""
    marker = os.fsencode(state_dir)
    return frozenset(pid for pid, argv in _conmons() if _mentions(argv, marker))


def resident_bytes(service: Service) -> int:
    """The memory the service has in RAM, in bytes."""
    pages = int(Path(f"/proc/{service.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _terminal(pid: int) -> str:
    """Say which terminal a process has as one of its streams."""
    with contextlib.suppress(OSError):
        targets = [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
        return next((f"on {name}" for name in targets if name.startswith("/dev/pts/")), "on no terminal")
    return "ending"


def descriptors(pid: int) -> tuple[str, ...]:
    """Return what a process has open, by kind."""
    kinds = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:  # closed between the listing and here
            continue
        kinds.append(target.partition(":")[0] if target.startswith(("socket:", "pipe:")) else target)
    return tuple(sorted(kinds))


def _surplus(now: tuple[str, ...], before: tuple[str, ...]) -> list[str]:
    left = list(before)
    extra = []
    for kind in now:
        if kind in left:
            left.remove(kind)
        else:
            extra.append(kind)
    return extra


def _session_directories(state_dir: Path) -> frozenset[str]:
    return frozenset(entry.name for entry in os.scandir(state_dir) if entry.is_dir()) | frozenset(
        f"{entry.parent.name}/{entry.name}" for entry in state_dir.glob("sessions/*")
    )


def _conmons() -> Iterator[tuple[int, list[bytes]]]:
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        argv = _cmdline(pid)
        if argv and argv[0].endswith(b"conmon"):
            yield pid, argv


def _cmdline(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def _mentions(argv: list[bytes], marker: bytes) -> bool:
    return any(argument == marker or argument.startswith(marker + b"/") for argument in argv)
