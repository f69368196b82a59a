"""`python -m bench.stages`: where the milliseconds of an exec go, and what it costs the processors.

The client notes the time of each step. `perf record` notes when a process is forked, calls execve and exits, by the
same clock (CLOCK_MONOTONIC); from both come the stages of one exec after the other, as medians. The processor time is
that of cgroups: all that the client and the service start is in one (v1, cpuacct), what the runtime puts into the
container in the container's own. Needs perf, the tracepoints of the scheduler, and for the second part a cpuacct
hierarchy.
"""

import argparse
import bisect
import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import machine
from bench.arena import RUNTIMES, open_arena
from bench.contestants import CONMON_ALONE, EXECGATE, RUNTIME_ALONE, Served
from bench.measures import exec_rate
from bench.processes import run_seconds
from execgate.status import read_status

_WARM_UP = 10
_PAUSE = 0.02  # seconds between two execs, in which the end of the first is over
_CPUACCT = Path("/sys/fs/cgroup/cpuacct")
_EVENT = re.compile(r"\s*.*?\s+(\d+)\s+(\d+\.\d+):\s+sched:sched_process_(\w+):\s+(.*)")


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a process; `what` is fork, exec or exit."""

    at: float
    what: str
    pid: int
    detail: str


@dataclass(frozen=True, slots=True)
class Steps:
    """When the client did what, seconds of CLOCK_MONOTONIC."""

    begun: float
    created: float
    head: float
    end: float
    inspected: float


def main() -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(prog="bench.stages", description=__doc__)
    parser.add_argument("--runtime", choices=RUNTIMES, default="runc")
    parser.add_argument("--execs", type=int, default=100)
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("bench: containers of runc and crun need root: run as root", file=sys.stderr)
        return 1
    print(f"{options.runtime}, load {machine.load()}")
    with (
        _own_cgroup() as cgroup,
        open_arena([RUNTIME_ALONE, CONMON_ALONE, EXECGATE], [options.runtime], [], print) as arena,
    ):
        served = next(one for one in arena.contestants if isinstance(one, Served))
        status = read_status(served.socket.parent / "state")
        assert status is not None
        worker = status.worker.pid
        _print_stages(*_traced(served, options.execs), worker)
        if cgroup is None:
            return 0
        for parallel in (1, 32):
            for one in arena.contestants:
                before, own, begun = _usage(cgroup, served.container), run_seconds(worker), time.process_time()
                count = exec_rate(one, parallel, 3.0) * 3.0
                used, own = (_usage(cgroup, served.container) - before) / count, (run_seconds(worker) - own) / count
                client = (time.process_time() - begun) / count
                print(
                    f"{parallel:3} parallel, {one.name:14} {used * 1000:6.2f} ms of processors an exec"
                    f" (worker {own * 1000:.2f}, client {client * 1000:.2f})"
                )
    return 0


def _traced(served: Served, count: int) -> tuple[list[Steps], list[Event]]:
    """Run execs one after the other, and return what the client and the kernel have noted of them."""
    with Path(f"/tmp/bench-stages-{os.getpid()}").open("wb") as file, contextlib.closing(served.client()) as client:
        argv = ["perf", "record", "-q", "-a", "-k", "CLOCK_MONOTONIC", "-o", file.name]
        for what in ("fork", "exec", "exit"):
            argv += ["-e", f"sched:sched_process_{what}"]
        steps = []
        try:
            for _ in range(_WARM_UP):
                client.run(served.container, ("true",))
            with subprocess.Popen(argv) as perf:
                time.sleep(1)  # perf says nowhere that it records
                for _ in range(count):
                    begun = time.perf_counter()
                    session = client.create(served.container, ("true",))
                    created = time.perf_counter()
                    with contextlib.closing(client.start(session)) as stream:
                        head = time.perf_counter()
                        stream.receive_all()
                        end = time.perf_counter()
                    assert client.exit_code(session) == 0
                    steps.append(Steps(begun, created, head, end, time.perf_counter()))
                    time.sleep(_PAUSE)
                perf.send_signal(signal.SIGINT)
            script = ["perf", "script", "-i", file.name, "-F", "comm,pid,time,event,trace"]
            text = subprocess.run(script, capture_output=True, text=True, check=True).stdout
        finally:
            Path(file.name).unlink(missing_ok=True)
    found = filter(None, map(_EVENT.match, text.splitlines()))
    return steps, sorted((Event(float(m[2]), m[3], int(m[1]), m[4]) for m in found), key=lambda event: event.at)


def _print_stages(steps: list[Steps], events: list[Event], worker: int) -> None:
    samples: dict[str, list[float]] = {}
    for step in steps:
        for stage, seconds in _stages(step, events, worker).items():
            samples.setdefault(stage, []).append(seconds * 1000)
    for stage, values in samples.items():
        values.sort()
        print(
            f"{stage:<46} median {statistics.median(values):6.2f} ms"
            f"   10 % {values[len(values) // 10]:6.2f}   90 % {values[len(values) * 9 // 10]:6.2f}   ({len(values)})"
        )


def _stages(step: Steps, events: list[Event], worker: int) -> dict[str, float]:
    """Return how long each stage of one exec took; empty when an event of it is missing."""
    begin, end = (
        bisect.bisect_left(events, at, key=lambda event: event.at) for at in (step.begun, step.inspected + 0.01)
    )
    mine = events[begin:end]
    monitor = next((_child(event) for event in mine if event.what == "fork" and event.pid in _threads(worker)), None)
    forked = next((event.at for event in mine if event.what == "fork" and _child(event) == monitor), None)
    runtime = next((_child(event) for event in mine if event.what == "fork" and event.pid == monitor), None)
    loaded, begun = (
        next((event.at for event in mine if event.what == "exec" and event.pid == pid), None)
        for pid in (monitor, runtime)
    )
    process = next((event for event in mine if event.what == "exec" and "filename=/bin/true" in event.detail), None)
    ended = {event.pid: event.at for event in mine if event.what == "exit"}
    if None in (forked, loaded, begun, process) or runtime not in ended or monitor not in ended:
        return {}
    assert forked is not None
    assert loaded is not None
    assert begun is not None
    assert process is not None
    done = max(ended[runtime], ended.get(process.pid, 0.0))
    return {
        "create: request to answer": step.created - step.begun,
        "answer of the create to conmon's fork": forked - step.created,
        "conmon: fork to execve": loaded - forked,
        "start: request to head": step.head - step.created,
        "conmon: execve to the runtime's execve": begun - loaded,
        "head to the runtime's execve": begun - step.head,
        "the runtime: its execve to its end": ended[runtime] - begun,
        "end of runtime and process to end of stream": step.end - done,
        "end of runtime and process to conmon's end": ended[monitor] - done,
        "inspect: request to answer": step.inspected - step.end,
        "all": step.inspected - step.begun,
    }


def _child(event: Event) -> int:
    found = re.search(r"child_pid=(\d+)", event.detail)
    return int(found[1]) if found else 0


def _threads(pid: int) -> frozenset[int]:
    return frozenset(int(path.name) for path in Path(f"/proc/{pid}/task").iterdir())


@contextlib.contextmanager
def _own_cgroup() -> Iterator[Path | None]:
    """Put this process, and all that it starts from now on, into a cgroup that accounts for it."""
    cgroup = _CPUACCT / f"bench-{os.getpid()}"
    try:
        cgroup.mkdir()
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        print(f"no accounts of processor time: {error}")
        yield None
        return
    try:
        yield cgroup
    finally:
        (_CPUACCT / "cgroup.procs").write_text(str(os.getpid()))
        with contextlib.suppress(OSError):  # somebody is still ending in there
            cgroup.rmdir()


def _usage(cgroup: Path, container: str) -> float:
    """Return the processor seconds of our cgroup and of the container's."""
    directories = [cgroup, *_CPUACCT.glob(f"execgate-{container}-*")]
    return sum(int((directory / "cpuacct.usage").read_text()) for directory in directories) / 1e9


if __name__ == "__main__":
    sys.exit(main())
