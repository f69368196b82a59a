"""What a service holds: descriptors, threads, children, monitors, directories. Compare before and after."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from support.service import Service


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one service holds at one moment.

    `descriptors` are told by kind (`socket`, `pipe`, `anon_inode:[pidfd]`, or a path), because their numbers
    mean nothing. `monitors` are the pids of its conmon processes, whoever their parent is by now.
    """

    descriptors: tuple[str, ...]
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
        descriptors=_descriptors(pid),
        threads=len(os.listdir(f"/proc/{pid}/task")),
        children=_children(pid),
        monitors=monitors(service.state_dir),
        session_directories=_session_directories(service.state_dir),
    )


def assert_no_leaks(service: Service, before: Footprint, *, timeout: float = 10.0) -> None:
    """Wait until the service holds nothing more than `before`; fail with the rest after `timeout` seconds.

    This polls: there is no event for a descriptor that another process closes.
    """
    deadline = time.monotonic() + timeout
    while leaked := footprint(service).leaked_since(before):
        if time.monotonic() > deadline:
            raise AssertionError(f"left behind after {timeout:g} s: {'; '.join(leaked)}")
        time.sleep(0.02)


def monitors(state_dir: Path) -> frozenset[int]:
    """The pids of the conmon processes below `state_dir`: a session's paths are on its command line."""
    marker = os.fsencode(state_dir)
    return frozenset(
        pid for pid in _pids() if (argv := _cmdline(pid)) and argv[0].endswith(b"conmon") and _mentions(argv, marker)
    )


def resident_bytes(service: Service) -> int:
    """The memory the service has in RAM, in bytes."""
    pages = int(Path(f"/proc/{service.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _descriptors(pid: int) -> tuple[str, ...]:
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


def _children(pid: int) -> frozenset[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found.update(map(int, (task / "children").read_text().split()))
        except OSError:  # that thread ended, or the kernel was built without CONFIG_PROC_CHILDREN
            continue
    return frozenset(found)


def _session_directories(state_dir: Path) -> frozenset[str]:
    return frozenset(entry.name for entry in os.scandir(state_dir) if entry.is_dir()) | frozenset(
        f"{entry.parent.name}/{entry.name}" for entry in state_dir.glob("sessions/*")
    )


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _cmdline(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def _mentions(argv: list[bytes], marker: bytes) -> bool:
    return any(argument == marker or argument.startswith(marker + b"/") for argument in argv)
