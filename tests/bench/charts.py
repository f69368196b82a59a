"""What the plot shows, taken from the results: panels of bars, whatever draws them. Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.contestants import CONMON_ALONE, RUNTIME_ALONE
from bench.relay import SPLICE_ALONE
from bench.results import Results
from bench.stats import Samples, median, percentile
from bench.targets import speeds

_LEFT_OUT = (CONMON_ALONE,)
"""What is of interest to those alone who look for where the time goes; it is in the tables."""

_FLOORS = (RUNTIME_ALONE, SPLICE_ALONE)


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure, and between what most of its samples lie, if that is shown. None is what was not measured."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One contestant's bars, one for each of the panel's series."""

    contestant: str
    runtime: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram. Rows of a runtime stand together, and the floor is the first of them."""

    title: str
    better: str
    """Which are better: "less" or "more"."""
    series: tuple[str, ...]
    rows: tuple[Row, ...]
    stacked: bool = False


def panels(results: Results) -> list[Panel]:
    """Return what there is to show; a measure that was not taken has no panel."""
    drawn = [
        Panel("Latency of one exec, ms", "less", ("median, 10th to 90th percentile",), _latency(results)),
        Panel(
            "Execs a second",
            "more",
            tuple(f"{parallel} at once" for parallel in results.rate),
            _rows(_names(results.rate.values()), lambda name: [_median(one, name) for one in results.rate.values()]),
        ),
        Panel(
            "One stream, MB/s",
            "more",
            ("stdout", "stdin"),
            _rows(
                _names([results.stdout, results.stdin]),
                lambda name: [Bar(median(speeds(way.get(name, ())))) for way in (results.stdout, results.stdin)],
            ),
        ),
        Panel("An idle session, KiB PSS", "less", ("the service", "its monitor"), _memory(results), stacked=True),
    ]
    return [panel for panel in drawn if panel.rows]


def _latency(results: Results) -> tuple[Row, ...]:
    def bars(name: str) -> list[Bar]:
        samples = [None if one is None else one * 1000 for one in results.latency[name]]
        return [Bar(median(samples), percentile(samples, 0.1), percentile(samples, 0.9))]

    return _rows(results.latency, bars)


def _memory(results: Results) -> tuple[Row, ...]:
    def bars(name: str) -> list[Bar]:
        found = [one for one in results.memory[name] if one is not None]
        return [
            Bar(median([one.service.pss / 1024 for one in found])),
            Bar(median([one.monitors.pss / 1024 for one in found])),
        ]

    return _rows(results.memory, bars)


def _median(samples: Mapping[str, Samples], name: str) -> Bar:
    return Bar(median(samples.get(name, ())))


def _names(measures: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for samples in measures for name in samples))


def _rows(labels: Iterable[str], bars: Callable[[str], Sequence[Bar]]) -> tuple[Row, ...]:
    rows = []
    for label in labels:
        name, _, runtime = label.rpartition(" (")
        if name not in _LEFT_OUT:
            rows.append(Row(name, runtime.rstrip(")"), tuple(bars(label))))
    runtimes = list(dict.fromkeys(row.runtime for row in rows))
    return tuple(sorted(rows, key=lambda row: (runtimes.index(row.runtime), row.contestant not in _FLOORS)))
