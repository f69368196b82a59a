"""The benchmark's arithmetic, its tables, and its reading of streams; the figures themselves are not tested."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from bench.client import ApiError, Frames
from bench.interactive import Felt
from bench.measures import Flow, IdleMemory
from bench.processes import Memory
from bench.results import Results
from bench.stats import median, paired_difference, paired_ratio, percentile
from bench.tables import number, ratio, table

NONE: Sequence[float | None] = (None, None)


def test_median_ignores_what_was_not_measured() -> None:
    assert median([3.0, None, 1.0, 2.0]) == 2.0
    assert median(NONE) is None
    assert median([]) is None


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 1.0), (0.5, 5.0), (0.9, 9.0), (0.91, 10.0), (1.0, 10.0)])
def test_percentile_is_a_sample(fraction: float, expected: float) -> None:
    assert percentile([float(n) for n in range(10, 0, -1)], fraction) == expected


def test_percentile_of_nothing() -> None:
    assert percentile(NONE, 0.9) is None


def test_pairs_are_taken_within_a_round() -> None:
    # The machine was three times as slow in the second round; the comparison does not notice.
    assert paired_ratio([2.0, 6.0, 2.0], [1.0, 3.0, 1.0]) == 2.0
    assert paired_difference([2.0, 6.0, 2.0], [1.0, 3.0, 1.0]) == 1.0


def test_pairs_need_both_sides() -> None:
    assert paired_ratio([None, 4.0], [1.0, 2.0]) == 2.0
    assert paired_ratio([4.0, 4.0], [None, 0.0]) is None
    assert paired_difference([1.0], [None]) is None
    assert paired_difference([1.0, 2.0], []) is None


def test_figures_are_shown() -> None:
    assert number(1.25, 1) == "1.2"
    assert number(None) == "-"
    assert ratio(0.5) == "0.50x"
    assert ratio(None) == "-"


def test_table_is_aligned_markdown() -> None:
    assert table(["", "ms"], [["execgate", "1.5"], ["podman", "100.0"]]).splitlines() == [
        "|          |    ms |",
        "| -------- | ----: |",
        "| execgate |   1.5 |",
        "| podman   | 100.0 |",
    ]


def test_table_rejects_a_ragged_row() -> None:
    with pytest.raises(ValueError, match="zip"):
        table(["", "a", "b"], [["x", "1"]])


def frame(stream: int, payload: bytes) -> bytes:
    return bytes([stream, 0, 0, 0]) + len(payload).to_bytes(4, "big") + payload


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 1000])
def test_frames_are_counted_whatever_the_chunks(size: int) -> None:
    data = frame(1, b"one") + frame(2, b"error") + frame(1, b"") + frame(1, b"two")
    frames = Frames()
    for at in range(0, len(data), size):
        frames.feed(memoryview(data[at : at + size]))
    assert frames.payload == 11
    assert frames.start == b"onetwo"


def test_frames_keep_only_the_start() -> None:
    frames = Frames()
    frames.feed(memoryview(frame(1, b"x" * 3 * Frames.KEPT)))
    assert frames.payload == 3 * Frames.KEPT
    assert frames.start == b"x" * Frames.KEPT


def test_frames_refuse_what_is_no_frame() -> None:
    with pytest.raises(ApiError, match="stream 72"):
        Frames().feed(memoryview(b"HTTP/1.1 500 no"))


def results(**fields: Any) -> Results:
    given: Mapping[str, Any] = {"machine": {}, "versions": {}, "options": {}, "absent": {}} | fields
    return Results(**given)


LATENCY = {
    "runtime alone (runc)": [0.020, 0.030],
    "conmon alone (runc)": [0.023, 0.033],
    "execgate (runc)": [0.026, 0.037],
}


def test_report_tells_cost_and_ratios() -> None:
    report = results(latency=LATENCY, latency_cpu={"execgate (runc)": 0.0042}).report()
    row = next(line for line in report.splitlines() if line.startswith("| execgate (runc)"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["31.5", "37.0", "1.27x", "6.5", "3.5", "4.2"]


def test_latency_verdicts() -> None:
    assert results(latency=LATENCY).verdicts() == [
        "execgate (runc): an exec costs at most 5 ms more than the runtime alone: 6.5 ms, NOT reached"
    ]
    fast = {"execgate (crun)": [0.010], "runtime alone (crun)": [0.0055], "dockerd (runc)": [0.050]}
    assert results(latency=fast).verdicts() == [
        "execgate (crun): an exec costs at most 5 ms more than the runtime alone: 4.5 ms, reached",
        "execgate (crun): as fast as dockerd on runc, at least 4x: 5.00x, reached",
    ]


def test_rate_verdicts() -> None:
    rate = {
        8: {"execgate (runc)": [1.0], "dockerd (runc)": [40.0]},
        32: {"execgate (runc)": [60.0], "runtime alone (runc)": [75.0], "dockerd (runc)": [40.0]},
    }
    assert results(rate=rate).verdicts() == [
        "execgate (runc): execs/s at 32 parallel of the runtime alone, at least 0.75x: 0.80x, reached",
        "execgate (runc): execs/s at 32 parallel of dockerd, at least 2.2x: 1.50x, NOT reached",
    ]


def test_flow_verdicts() -> None:
    stdout = {
        "execgate (crun)": [Flow(3000.0, 0.1)],
        "dockerd (runc)": [Flow(500.0, 2.0)],
        "splice alone (crun)": [Flow(5000.0, 0.1)],
    }
    assert results(stdout=stdout, stdin={"execgate (crun)": [Flow(1000.0, 0.4)]}).verdicts() == [
        "execgate (crun): stdout of dockerd, at least 3x: 6.00x, reached",
        "execgate (crun): stdout of a bare splice loop, at least 0.75x: 0.60x, NOT reached",
        "execgate (crun): stdout costs the service less than 0.3 CPU-s/GB: 0.10, reached",
        "execgate (crun): stdin costs the service less than 0.3 CPU-s/GB: 0.40, NOT reached",
    ]


def test_what_is_felt() -> None:
    felt = Felt(echo=(0.0005, 0.0009, 0.0004), monitor=(0.0001, 0.0003, 0.0002), pings=(0.001,) * 98 + (0.030, 0.040))
    found = results(interactive={"execgate (runc)": [felt, None]})
    assert found.verdicts() == [
        "execgate (runc): the service adds less than 0.3 ms to a key's echo: 0.30 ms, NOT reached",
        "execgate (runc): 99 % of the pings below 20 ms: 30.0 ms, NOT reached",
    ]
    row = next(line for line in found.report().splitlines() if line.startswith("| execgate (runc)"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["0.50", "0.90", "0.20", "1.00", "30.00"]


def test_memory_verdicts() -> None:
    ours = IdleMemory(Memory(), Memory(pss=50 * 1024), Memory(pss=300 * 1024))
    memory = {
        "execgate (runc)": [ours],
        "dockerd (runc)": [IdleMemory(Memory(), Memory(pss=200 * 1024), Memory())],
        "podman (runc)": [IdleMemory(Memory(), Memory(pss=200 * 1024), Memory(pss=300 * 1024))],
    }
    assert results(memory=memory).verdicts() == [
        "execgate (runc): an idle session costs the service less than 40 KiB: 50 KiB, NOT reached",
        "execgate (runc): an idle session and its monitor cost less than one of dockerd: 350 and 200 KiB, NOT reached",
        "execgate (runc): an idle session and its monitor cost less than one of podman: 350 and 500 KiB, reached",
    ]


def test_what_is_missing_is_told() -> None:
    report = results(absent={"dockerd (crun)": "does not start"}, failures={"stdin: podman (runc)": "hung"}).report()
    assert "- dockerd (crun): does not start" in report
    assert "- stdin: podman (runc): hung" in report


def test_a_failed_contestant_leaves_dashes() -> None:
    report = results(latency={"execgate (runc)": [None]}, stdout={"execgate (runc)": [None]}).report()
    assert "| execgate (runc) |      - |" in report


def test_results_are_json() -> None:
    memory = IdleMemory(Memory(2048, 1024), Memory(20, 10), Memory(4, 2))
    full = results(
        latency=LATENCY,
        rate={1: {"execgate (runc)": [60.0]}},
        stdout={"execgate (runc)": [Flow(1000.0, 0.5)]},
        memory={"execgate (runc)": [memory]},
    )
    data = json.loads(json.dumps(full.as_json()))
    assert data["stdout"]["execgate (runc)"] == [{"megabytes_per_second": 1000.0, "cpu_seconds_per_gigabyte": 0.5}]
    assert data["memory"]["execgate (runc)"][0]["base"] == {"rss": 2048, "pss": 1024}
    assert data["verdicts"]


def test_memory_is_shared_out() -> None:
    assert (Memory(300, 30) - Memory(100, 10)).divided(2) == Memory(100, 10)
