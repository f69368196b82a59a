"""What execgate wants to reach, and whether it does. Pure.

Each target is a ratio or a difference within one run, so that it can be held against any machine.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.contestants import DOCKERD, EXECGATE, GUARDED, PODMAN, RUNTIME_ALONE, WITH_CONMON
from bench.interactive import Felt
from bench.measures import Flow, IdleMemory
from bench.relay import SPLICE_ALONE
from bench.stats import Samples, median, paired_difference, paired_ratio, percentile

OWN_COST = 0.005
GATE_COST = 0.0003
FASTER_THAN_DOCKERD = {"runc": 1.7, "crun": 4.0}
"""How many times as fast as dockerd, which always uses runc, one exec is."""

RATE_PARALLEL = 32
RATE_OF_RUNTIME = {"runc": 0.75, "crun": 0.60}
RATE_OF_DOCKERD = 2.2
STDOUT_OF_DOCKERD = 3.0
STDOUT_OF_SPLICE = 0.75
STDIN_OF_DOCKERD = 4.0
CPU_PER_GIGABYTE = 0.3
ECHO_ADDED = 0.0003
PING_P99 = 0.020
SESSION_MEMORY = 40 * 1024


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target, what was found, and whether that is enough."""

    target: str
    found: str
    reached: bool

    @property
    def word(self) -> str:
        """Return the verdict itself."""
        return "reached" if self.reached else "NOT reached"

    def __str__(self) -> str:
        return f"{self.target}: {self.found}, {self.word}"


def of(label: str, name: str, runtime: str | None = None) -> str:
    """Return the label of the contestant `name` under the same runtime, or under another one."""
    return f"{name} ({runtime or label.rpartition('(')[2].rstrip(')')})"


def own(samples: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return execgate's labels, with whatever conmon, and the runtime of each."""
    labels = [label for label in samples if label.startswith((f"{EXECGATE} (", WITH_CONMON))]
    return [(label, label.rpartition("(")[2].rstrip(")")) for label in labels]


def latency(samples: Mapping[str, Samples]) -> Iterator[Verdict]:
    """One exec after the other: seconds."""
    for label, runtime in own(samples):
        cost = paired_difference(samples[label], samples.get(of(label, RUNTIME_ALONE), ()))
        if cost is not None:
            target = f"{label}: an exec costs at most {OWN_COST * 1000:g} ms more than the runtime alone"
            yield Verdict(target, f"{cost * 1000:.1f} ms", cost <= OWN_COST)
        gate = paired_difference(samples.get(of(label, GUARDED), ()), samples[label])
        if gate is not None and not label.startswith(WITH_CONMON):
            target = f"{label}: policy and audit cost an exec less than {GATE_COST * 1000:g} ms"
            yield Verdict(target, f"{gate * 1000:.2f} ms", gate < GATE_COST)
        factor = paired_ratio(samples.get(of(label, DOCKERD, "runc"), ()), samples[label])
        yield from _at_least(f"{label}: as fast as dockerd on runc", factor, FASTER_THAN_DOCKERD.get(runtime))


def rate(samples: Mapping[str, Samples]) -> Iterator[Verdict]:
    """Execs a second, RATE_PARALLEL at once."""
    for label, runtime in own(samples):
        bare = paired_ratio(samples[label], samples.get(of(label, RUNTIME_ALONE), ()))
        name = f"{label}: execs/s at {RATE_PARALLEL} parallel"
        yield from _at_least(f"{name} of the runtime alone", bare, RATE_OF_RUNTIME.get(runtime))
        if runtime == "runc":
            engine = paired_ratio(samples[label], samples.get(of(label, DOCKERD), ()))
            yield from _at_least(f"{name} of dockerd", engine, RATE_OF_DOCKERD)


def flow(stdout: Mapping[str, Sequence[Flow | None]], stdin: Mapping[str, Sequence[Flow | None]]) -> Iterator[Verdict]:
    """Bytes of one stream."""
    for way, flows, of_dockerd in (("stdout", stdout, STDOUT_OF_DOCKERD), ("stdin", stdin, STDIN_OF_DOCKERD)):
        for label, _ in own(flows):
            speed = speeds(flows[label])
            engine = paired_ratio(speed, speeds(flows.get(of(label, DOCKERD, "runc"), ())))
            yield from _at_least(f"{label}: {way} of dockerd", engine, of_dockerd)
            if way == "stdout":
                bare = paired_ratio(speed, speeds(flows.get(of(label, SPLICE_ALONE), ())))
                yield from _at_least(f"{label}: stdout of a bare splice loop", bare, STDOUT_OF_SPLICE)
            cpu = median([one.cpu_seconds_per_gigabyte for one in flows[label] if one is not None])
            if cpu is not None:
                target = f"{label}: {way} costs the service less than {CPU_PER_GIGABYTE:g} CPU-s/GB"
                yield Verdict(target, f"{cpu:.2f}", cpu < CPU_PER_GIGABYTE)


def interactive(samples: Mapping[str, Sequence[Felt | None]]) -> Iterator[Verdict]:
    """What is felt while another session streams."""
    for label, _ in own(samples):
        felt = [one for one in samples[label] if one is not None]
        added = median([difference for one in felt if (difference := echo_added(one)) is not None])
        if added is not None:
            target = f"{label}: the service adds less than {ECHO_ADDED * 1000:g} ms to a key's echo"
            yield Verdict(target, f"{added * 1000:.2f} ms", added < ECHO_ADDED)
        slow = percentile([ping for one in felt for ping in one.pings], 0.99)
        if slow is not None:
            target = f"{label}: 99 % of the pings below {PING_P99 * 1000:g} ms"
            yield Verdict(target, f"{slow * 1000:.1f} ms", slow < PING_P99)


def memory(samples: Mapping[str, Sequence[IdleMemory | None]]) -> Iterator[Verdict]:
    """An idle session."""
    for label, runtime in own(samples):
        ours = _first(samples[label])
        if ours is None:
            continue
        target = f"{label}: an idle session costs the service less than {SESSION_MEMORY // 1024} KiB"
        yield Verdict(target, f"{ours.service.pss // 1024} KiB", ours.service.pss < SESSION_MEMORY)
        total = (ours.service + ours.monitors).pss
        for engine in (DOCKERD, PODMAN):
            theirs = _first(samples.get(of(label, engine, "runc" if engine == DOCKERD else runtime), ()))
            if theirs is not None:
                other = (theirs.service + theirs.monitors).pss
                target = f"{label}: an idle session and its monitor cost less than one of {engine}"
                yield Verdict(target, f"{total // 1024} and {other // 1024} KiB", total < other)


def echo_added(one: Felt) -> float | None:
    """Return what a key's echo takes longer through the service than past it; None where nobody can go past it."""
    through, past = median(one.echo), median(one.monitor)
    return None if through is None or past is None else through - past


def speeds(flows: Sequence[Flow | None]) -> list[float | None]:
    """Return the megabytes a second."""
    return [one.megabytes_per_second if one is not None else None for one in flows]


def _at_least(name: str, factor: float | None, least: float | None) -> Iterator[Verdict]:
    if factor is not None and least is not None:
        yield Verdict(f"{name}, at least {least:g}x", f"{factor:.2f}x", factor >= least)


def _first(samples: Sequence[IdleMemory | None]) -> IdleMemory | None:
    return next((one for one in samples if one is not None), None)
