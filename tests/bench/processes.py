"""What the kernel accounts to processes: processor time and memory."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes in RAM: `rss` counts shared pages in full, `pss` (proportional set size) each sharer's part."""

    rss: int = 0
    pss: int = 0

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(self.rss + other.rss, self.pss + other.pss)

    def __sub__(self, other: "Memory") -> "Memory":
        return Memory(self.rss - other.rss, self.pss - other.pss)

    def divided(self, parts: int) -> "Memory":
        """Return one part's share."""
        return Memory(self.rss // parts, self.pss // parts)


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the processor time, in the kernel and outside, that these processes have used; ended ones count 0."""
    return sum(map(_cpu_ticks, pids)) / _TICKS


def memory(pids: Iterable[int]) -> Memory:
    """Return what these processes have in RAM together; ended ones count 0."""
    return sum(map(_memory, pids), Memory())


def _cpu_ticks(pid: int) -> int:
    try:
        # proc(5): the name, in parentheses, may contain anything; utime and stime are fields 14 and 15.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def _memory(pid: int) -> Memory:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return Memory()
    kilobytes = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
    return Memory(rss=kilobytes.get("Rss", 0) * 1024, pss=kilobytes.get("Pss", 0) * 1024)


def run_seconds(pid: int) -> float:
    """Return the time for which the threads of a process were on a processor, to the nanosecond."""
    # Documentation/scheduler/sched-stats.rst: the first field of schedstat.
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9
