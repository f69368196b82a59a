"""From samples to what is reported: tables, verdicts, JSON. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench import targets
from bench.contestants import CONMON_ALONE, EXECGATE, RUNTIME_ALONE
from bench.interactive import Felt
from bench.measures import Flow, IdleMemory
from bench.stats import Samples, median, paired_difference, paired_ratio, percentile
from bench.tables import number, ratio, table
from bench.targets import Verdict

_KIB = 1024


@dataclass(slots=True)
class Results:
    """Everything that one run found out. Samples are by label, `NAME (RUNTIME)`, one for each round."""

    machine: Mapping[str, str]
    versions: Mapping[str, str]
    options: Mapping[str, Any]
    absent: Mapping[str, str]
    failures: Mapping[str, str] = field(default_factory=dict)
    latency: Mapping[str, Samples] = field(default_factory=dict)
    latency_cpu: Mapping[str, float] = field(default_factory=dict)
    rate: Mapping[int, Mapping[str, Samples]] = field(default_factory=dict)
    stdout: Mapping[str, Sequence[Flow | None]] = field(default_factory=dict)
    stdin: Mapping[str, Sequence[Flow | None]] = field(default_factory=dict)
    memory: Mapping[str, Sequence[IdleMemory | None]] = field(default_factory=dict)
    interactive: Mapping[str, Sequence[Felt | None]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return all samples, and the figures drawn from them, as plain data."""
        return asdict(self) | {"verdicts": [str(verdict) for verdict in self.verdicts()]}

    def report(self, heading: str = "##") -> str:
        """Return the whole report as Markdown."""
        parts = [
            ("Machine", _listing(self.machine)),
            ("Versions", _listing(self.versions)),
            ("Not measured", _listing(self.absent)),
            ("Failed", _listing(self.failures)),
            ("Latency of one exec, ms", self._latency_table()),
            ("Execs per second, and ratio to the runtime alone", self._rate_table()),
            ("Throughput of one stream, and ratio to execgate", self._flow_table()),
            ("A key and a ping while another session streams, ms", self._interactive_table()),
            ("Memory, KiB PSS (RSS)", self._memory_table()),
            ("Targets", self._verdict_table()),
        ]
        return "\n\n".join(f"{heading} {title}\n\n{text}" for title, text in parts if text)

    def verdicts(self) -> list[Verdict]:
        """Say of each target whether it is reached."""
        return [
            *targets.latency(self.latency),
            *targets.rate(self.rate.get(targets.RATE_PARALLEL, {})),
            *targets.flow(self.stdout, self.stdin),
            *targets.interactive(self.interactive),
            *targets.memory(self.memory),
        ]

    def _latency_table(self) -> str:
        rows = []
        for name, samples in self.latency.items():
            bare = self.latency.get(targets.of(name, RUNTIME_ALONE), ())
            conmon = self.latency.get(targets.of(name, CONMON_ALONE), ())
            rows.append(
                [
                    name,
                    _ms(median(samples)),
                    _ms(percentile(samples, 0.9)),
                    ratio(paired_ratio(samples, bare)),
                    _ms(paired_difference(samples, bare)),
                    _ms(paired_difference(samples, conmon)),
                    _ms(self.latency_cpu.get(name)),
                ]
            )
        header = ["", "median", "p90", "ratio to runtime", "less runtime", "less conmon + runtime", "service CPU"]
        return table(header, rows) if rows else ""

    def _rate_table(self) -> str:
        names = list(dict.fromkeys(name for samples in self.rate.values() for name in samples))
        rows = [[name, *(self._rate_cell(parallel, name) for parallel in self.rate)] for name in names]
        return table(["", *(f"{parallel} parallel" for parallel in self.rate)], rows) if rows else ""

    def _rate_cell(self, parallel: int, name: str) -> str:
        samples = self.rate[parallel].get(name, ())
        bare = self.rate[parallel].get(targets.of(name, RUNTIME_ALONE), ())
        return f"{number(median(samples))} ({ratio(paired_ratio(samples, bare))})"

    def _flow_table(self) -> str:
        header = ["", "stdout MB/s", "CPU-s/GB", "stdin MB/s", "CPU-s/GB"]
        rows = [
            [name, *_flow_cells(self.stdout, name), *_flow_cells(self.stdin, name)]
            for name in dict.fromkeys([*self.stdout, *self.stdin])
        ]
        return table(header, rows) if rows else ""

    def _interactive_table(self) -> str:
        rows = []
        for name, found in self.interactive.items():
            felt = [one for one in found if one is not None]
            echo, past = ([sample for one in felt for sample in samples(one)] for samples in (_echo, _monitor))
            pings = [ping for one in felt for ping in one.pings]
            figures = (median(echo), percentile(echo, 0.99), median(past), median(pings), percentile(pings, 0.99))
            rows.append([name, *map(_fine_ms, figures)])
        header = ["", "echo", "p99", "past the service", "ping", "p99"]
        return table(header, rows) if rows else ""

    def _memory_table(self) -> str:
        header = ["", "service, idle", "a session: service", "a session: monitors", "a session: all"]
        rows = []
        for name, found in self.memory.items():
            for figures in found:
                if figures is not None:
                    shares = (figures.base, figures.service, figures.monitors, figures.service + figures.monitors)
                    rows.append([name, *(f"{share.pss // _KIB} ({share.rss // _KIB})" for share in shares)])
        return table(header, rows) if rows else ""

    def _verdict_table(self) -> str:
        rows = [[one.target, one.found, one.word] for one in self.verdicts()]
        return table(["target", "found", ""], rows) if rows else ""


def _flow_cells(flows: Mapping[str, Sequence[Flow | None]], name: str) -> tuple[str, str]:
    own, reference = targets.speeds(flows.get(name, ())), targets.speeds(flows.get(targets.of(name, EXECGATE), ()))
    cpu = [flow.cpu_seconds_per_gigabyte for flow in flows.get(name, ()) if flow is not None]
    return f"{number(median(own), 0)} ({ratio(paired_ratio(own, reference))})", number(
        statistics.median(cpu) if cpu else None, 2
    )


def _echo(one: Felt) -> Samples:
    return one.echo


def _monitor(one: Felt) -> Samples:
    return one.monitor


def _fine_ms(seconds: float | None) -> str:
    return number(None if seconds is None else seconds * 1000, 2)


def _ms(seconds: float | None) -> str:
    return number(None if seconds is None else seconds * 1000)


def _listing(items: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in items.items())
