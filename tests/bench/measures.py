"""What is measured. Every measure takes turns: one sample of each contestant, then the next of each."""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from bench.client import ApiError, Stream
from bench.contestants import Contestant, Exec, Served, label
from bench.interactive import Felt, felt
from bench.processes import Memory, cpu_seconds, memory
from bench.relay import SpliceAlone
from support.errors import HostError

MEGABYTE = 1_000_000  # rates are decimal, as those of disks and networks
GIGABYTE = 1000 * MEGABYTE
BLOCK = 1 << 20
"""Bytes that dd moves at a time; sizes are multiples of it."""

_READY = 1  # a process says that it runs with one empty line
_WARM_UP = 10  # execs

Streaming = Served | SpliceAlone
"""Those whose processes have streams."""

_C = TypeVar("_C", Contestant, Served, Streaming)
_T = TypeVar("_T")

_FAILURES = (HostError, ApiError, OSError)
_RENEW_EVERY = 20  # execs


@dataclass(frozen=True, slots=True)
class Flow:
    """One stream's throughput: megabytes a second, and the processor time of the service, seconds a gigabyte."""

    megabytes_per_second: float
    cpu_seconds_per_gigabyte: float


@dataclass(frozen=True, slots=True)
class IdleMemory:
    """Bytes. `base` is the service with nothing to do; the others are for one idle session: what the service
    itself grew by, and what was started for it (monitors)."""

    base: Memory
    service: Memory
    monitors: Memory


class Turns:
    """Runs measures round by round and keeps what failed.

    The order within a round is shuffled, always in the same way, so that nobody is always the one who comes after
    the noisiest neighbour.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._random = random.Random(0)  # the same order in every run
        self.failures: dict[str, str] = {}
        """`measure: contestant` to reason."""

    def latency(
        self, contestants: Sequence[Contestant], rounds: int
    ) -> tuple[dict[str, list[float | None]], dict[str, float]]:
        """Measure one exec after the other; return the seconds of each, and the service's own processor seconds for
        one on average: not those of the monitor and the runtime, which end with the exec.
        """
        used = {label(one): 0.0 for one in contestants if isinstance(one, Served)}
        with contextlib.ExitStack() as stack:
            workers = {label(one): stack.enter_context(one.worker()) for one in contestants}
            count = dict.fromkeys(workers, 0)

            def measure(contestant: Contestant) -> float:
                name = label(contestant)
                if count[name] % _RENEW_EVERY == 0:
                    contestant.renew()
                count[name] += 1
                service = contestant.processes() if isinstance(contestant, Served) else frozenset()
                cpu, begin = cpu_seconds(service), time.perf_counter()
                workers[name]()
                elapsed = time.perf_counter() - begin
                if service:
                    used[name] += cpu_seconds(service) - cpu
                return elapsed

            samples = self._take("latency", contestants, rounds, measure)
        return samples, {name: total / count[name] for name, total in used.items()}

    def rate(
        self, contestants: Sequence[Contestant], rounds: int, *, parallel: int, seconds: float
    ) -> dict[str, list[float | None]]:
        """Measure execs a second, by so many clients at once that each do one after the other."""

        def measure(contestant: Contestant) -> float:
            contestant.renew()
            return exec_rate(contestant, parallel, seconds)

        return self._take(f"rate at {parallel}", contestants, rounds, measure)

    def throughput(
        self, contestants: Sequence[Streaming], rounds: int, size: int
    ) -> tuple[dict[str, list[Flow | None]], dict[str, list[Flow | None]]]:
        """Measure `size` bytes out of one process, and as many into one; return (stdout, stdin)."""
        out = self._take("stdout", contestants, rounds, lambda one: stdout_flow(one, size))
        return out, self._take("stdin", contestants, rounds, lambda one: stdin_flow(one, size))

    def interactive(self, contestants: Sequence[Served], rounds: int, tries: int) -> dict[str, list[Felt | None]]:
        """Measure the echo of a key, and a ping, so many times a round, while another session streams."""
        return self._take("interactive", contestants, rounds, lambda one: felt(one, tries))

    def memory(self, contestants: Sequence[Served], sessions: int) -> dict[str, list[IdleMemory | None]]:
        """Measure so many idle sessions, once."""
        return self._take("memory", contestants, 1, lambda one: idle_memory(one, sessions))

    def _take(
        self, name: str, contestants: Sequence[_C], rounds: int, measure: Callable[[_C], _T]
    ) -> dict[str, list[_T | None]]:
        samples: dict[str, list[_T | None]] = {label(one): [] for one in contestants}
        for number in range(1, rounds + 1):
            self._say(f"{name}: round {number} of {rounds}")
            for contestant in self._random.sample(contestants, len(contestants)):
                samples[label(contestant)].append(self._attempt(name, contestant, measure))
        return samples

    def _attempt(self, name: str, contestant: _C, measure: Callable[[_C], _T]) -> _T | None:
        """Who fails is out of this measure: the figures of a broken contestant would mean nothing."""
        key = f"{name}: {label(contestant)}"
        if key in self.failures:
            return None
        try:
            return measure(contestant)
        except _FAILURES as error:
            self.failures[key] = f"{type(error).__name__}: {error}"
            return None


def exec_rate(contestant: Contestant, parallel: int, seconds: float) -> float:
    """Return execs a second. Each client begins no exec after `seconds`; those begun are counted to their end."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(parallel) as pool:
        workers = [stack.enter_context(contestant.worker()) for _ in range(parallel)]
        gate = threading.Barrier(parallel)

        def work(run: Exec) -> tuple[float, float, int]:
            gate.wait()
            begin = time.perf_counter()
            count = 0
            while time.perf_counter() < begin + seconds:
                run()
                count += 1
            return begin, time.perf_counter(), count

        done = list(pool.map(work, workers))
    begins, ends = [begin for begin, _, _ in done], [end for _, end, _ in done]
    return sum(count for _, _, count in done) / (max(ends) - min(begins))


def stdout_flow(contestant: Streaming, size: int) -> Flow:
    """Let a process write `size` bytes, and count what arrives."""
    script = f"echo; read go; dd if=/dev/zero bs={BLOCK} count={size // BLOCK} 2>/dev/null; read end"

    def move(stream: Stream) -> None:
        stream.send(b"\n")
        stream.receive_until(_READY + size)

    return _flow(contestant, script, size, move)


def stdin_flow(contestant: Streaming, size: int) -> Flow:
    """Write `size` bytes to a process that reads them all and then says so."""
    script = f"echo; dd of=/dev/null bs={BLOCK} count={size // BLOCK} iflag=fullblock 2>/dev/null; echo; read end"
    block = memoryview(bytes(BLOCK))

    def move(stream: Stream) -> None:
        for _ in range(size // BLOCK):
            stream.send(block)
        stream.receive_until(_READY + 1)

    return _flow(contestant, script, size, move)


def _flow(contestant: Streaming, script: str, size: int, move: Callable[[Stream], None]) -> Flow:
    """Time `move` alone: the process has said that it runs, and ends, with its monitor, only after the accounts."""
    contestant.renew()
    with contestant.attached(("sh", "-c", script)) as stream:
        stream.receive_until(_READY)
        pids = contestant.processes()
        cpu, begin = cpu_seconds(pids), time.perf_counter()
        move(stream)
        elapsed, used = time.perf_counter() - begin, cpu_seconds(pids) - cpu
    return Flow(size / MEGABYTE / elapsed, used / (size / GIGABYTE))


def idle_memory(contestant: Served, sessions: int) -> IdleMemory:
    """Open so many sessions of a process that waits for input, and see what became larger and what is new."""
    contestant.renew()
    _warm_up(contestant)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(contextlib.closing(contestant.client()))
        before = contestant.processes()
        base = memory(before)
        for _ in range(sessions):
            stream = stack.enter_context(client.attached(contestant.container, ("sh", "-c", "echo; read end")))
            stream.receive_until(_READY)
        service = memory(before) - base
        monitors = memory(contestant.processes() - before)
        return IdleMemory(base, service.divided(sessions), monitors.divided(sessions))


def _warm_up(contestant: Contestant) -> None:
    """What a service loads at its first execs is not what a session costs."""
    with contestant.worker() as run:
        for _ in range(_WARM_UP):
            run()
