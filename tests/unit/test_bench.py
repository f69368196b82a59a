"""The benchmark's arithmetic, its tables, and its reading of streams; the figures themselves are not tested."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import page, stored
from bench.charts import Bar, panels
from bench.client import ApiError, Frames
from bench.engines import find_engines
from bench.interactive import Felt
from bench.measures import Flow, IdleMemory
from bench.processes import Memory
from bench.results import Results
from bench.stats import median, paired_difference, paired_ratio, percentile
from bench.tables import number, ratio, table
from support.programs import find_every_program, version_of

DOCS = Path(__file__).parents[2] / "docs"
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


def told(found: Results) -> list[str]:
    return [str(verdict) for verdict in found.verdicts()]


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
    assert told(results(latency=LATENCY)) == [
        "execgate (runc): an exec costs at most 5 ms more than the runtime alone: 6.5 ms, NOT reached"
    ]
    fast = {"execgate (crun)": [0.010], "runtime alone (crun)": [0.0055], "dockerd (runc)": [0.050]}
    assert told(results(latency=fast)) == [
        "execgate (crun): an exec costs at most 5 ms more than the runtime alone: 4.5 ms, reached",
        "execgate (crun): as fast as dockerd on runc, at least 4x: 5.00x, reached",
    ]


def test_rate_verdicts() -> None:
    rate = {
        8: {"execgate (runc)": [1.0], "dockerd (runc)": [40.0]},
        32: {"execgate (runc)": [60.0], "runtime alone (runc)": [75.0], "dockerd (runc)": [40.0]},
    }
    assert told(results(rate=rate)) == [
        "execgate (runc): execs/s at 32 parallel of the runtime alone, at least 0.75x: 0.80x, reached",
        "execgate (runc): execs/s at 32 parallel of dockerd, at least 2.2x: 1.50x, NOT reached",
    ]


def test_flow_verdicts() -> None:
    stdout = {
        "execgate (crun)": [Flow(3000.0, 0.1)],
        "dockerd (runc)": [Flow(500.0, 2.0)],
        "splice alone (crun)": [Flow(5000.0, 0.1)],
    }
    assert told(results(stdout=stdout, stdin={"execgate (crun)": [Flow(1000.0, 0.4)]})) == [
        "execgate (crun): stdout of dockerd, at least 3x: 6.00x, reached",
        "execgate (crun): stdout of a bare splice loop, at least 0.75x: 0.60x, NOT reached",
        "execgate (crun): stdout costs the service less than 0.3 CPU-s/GB: 0.10, reached",
        "execgate (crun): stdin costs the service less than 0.3 CPU-s/GB: 0.40, NOT reached",
    ]


def test_what_is_felt() -> None:
    felt = Felt(echo=(0.0005, 0.0009, 0.0004), monitor=(0.0001, 0.0003, 0.0002), pings=(0.001,) * 98 + (0.030, 0.040))
    found = results(interactive={"execgate (runc)": [felt, None]})
    assert told(found) == [
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
    assert told(results(memory=memory)) == [
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


OPTIONS = {"quick": False, "rounds": 5, "latency_rounds": 100, "seconds": 1.5, "megabytes": 256, "tries": 200}
OPTIONS |= {"sessions": 50}


def measured() -> Results:
    """One of every kind of sample, and of some a gap."""
    return results(
        machine={"date": "2026-01-02 03:04 UTC", "load before": "0.10 0.20 0.30"},
        versions={"execgate": "1.0"},
        options=OPTIONS,
        absent={"dockerd (crun)": "does not start"},
        failures={"stdin: podman (runc)": "hung"},
        latency=LATENCY | {"podman (runc)": [None, 0.0901234]},
        latency_cpu={"execgate (runc)": 0.004},
        rate={1: {"execgate (runc)": [20.5]}, 32: {"execgate (runc)": [60.0], "podman (runc)": [None]}},
        stdout={"execgate (runc)": [Flow(3000.0, 0.1)], "splice alone (runc)": [Flow(4000.0, 0.1)]},
        stdin={"execgate (runc)": [Flow(1000.0, 0.5)], "podman (runc)": [None]},
        memory={"execgate (runc)": [IdleMemory(Memory(2, 1), Memory(40960, 20480), Memory(409600, 307200))]},
        interactive={"execgate (runc)": [Felt((0.0005,), (0.0001,), (0.001, 0.002)), None]},
    )


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    stored.write(measured(), tmp_path / "r.json")
    assert stored.read(tmp_path / "r.json") == measured()
    assert json.loads((tmp_path / "r.json").read_text())["verdicts"] == told(measured())


def test_stored_are_tenths_of_microseconds_and_a_line_for_each_contestant(tmp_path: Path) -> None:
    stored.write(results(latency={"a (runc)": [0.01234567891, None], "b (runc)": [1.0]}), tmp_path / "r.json")
    lines = (tmp_path / "r.json").read_text().splitlines()
    assert '  "a (runc)": [0.0123457,null],' in lines
    assert '  "b (runc)": [1.0]' in lines


@pytest.mark.parametrize("data", ["{}", "[]", "no", '{"rate": {"x": {}}}'])
def test_what_bench_did_not_write_changes_no_page(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"{page.BEGIN}\n{page.END}\n"
    (tmp_path / "r.json").write_text(data)
    (tmp_path / "p.md").write_text(text)
    assert page.main([str(tmp_path / "r.json"), str(tmp_path / "p.md")]) == 1
    assert str(tmp_path / "r.json") in capsys.readouterr().err
    assert (tmp_path / "p.md").read_text() == text


def test_a_page_is_renewed_between_its_comments(tmp_path: Path) -> None:
    stored.write(measured(), tmp_path / "r.json")
    written = tmp_path / "benchmarks.md"
    written.write_text(f"# Before\n\n{page.BEGIN}\nold\n{page.END}\n\nAfter.\n")
    for _ in range(2):  # the second time changes nothing
        assert page.main([str(tmp_path / "r.json"), str(written)]) == 0
        before, _, rest = written.read_text().partition(f"{page.BEGIN}\n")
        figures, _, after = rest.partition(f"{page.END}\n")
        assert (before, after) == ("# Before\n\n", "\nAfter.\n")
        assert figures.strip() == page.figures(measured(), "benchmarks")
    assert stored.read(tmp_path / "benchmarks.json") == measured()
    for piece in ("date: 2026-01-02", "load before: 0.10", "](benchmarks.svg)", "NOT reached |", "100 of latency"):
        assert piece in figures
    assert "--quick" not in figures


def test_a_page_says_that_its_run_was_quick() -> None:
    assert "`--quick`" in page.figures(results(options=OPTIONS | {"quick": True}), "benchmarks")


@pytest.mark.parametrize(
    "text", ["", page.BEGIN + "\n", f"{page.END}\n{page.BEGIN}\n", 2 * f"{page.BEGIN}\n{page.END}\n"]
)
def test_a_page_without_its_comments_is_left_alone(text: str) -> None:
    with pytest.raises(ValueError, match="must have one line"):
        page.renewed(text, "figures")


def test_the_published_page_can_be_renewed_and_is_what_was_measured() -> None:
    text = (DOCS / "benchmarks.md").read_text()
    assert "figures" in page.renewed(text, "figures")
    for published in DOCS.glob("benchmarks.json"):
        again = page.renewed(text, page.figures(stored.read(published), "benchmarks"))
        assert again == text, "renew it: make plot JSON=docs/benchmarks.json"


def test_panels_show_the_floor_first_and_runtimes_together() -> None:
    latency = {"execgate (runc)": [0.02], "podman (crun)": [0.03], "runtime alone (crun)": [0.01]}
    latency |= {"conmon alone (runc)": [0.015], "runtime alone (runc)": [0.01]}
    (panel,) = panels(results(latency=latency))
    assert [(row.contestant, row.runtime) for row in panel.rows] == [
        ("runtime alone", "runc"),
        ("execgate", "runc"),
        ("runtime alone", "crun"),
        ("podman", "crun"),
    ]


def test_panels_of_every_measure() -> None:
    latency, rate, flow, memory = panels(measured())
    assert latency.rows[1].bars == (Bar(31.5, 26.0, 37.0),)
    assert rate.series == ("1 at once", "32 at once")
    assert [row.bars for row in rate.rows] == [(Bar(20.5), Bar(60.0)), (Bar(None), Bar(None))]
    assert [(row.contestant, row.bars) for row in flow.rows] == [
        ("splice alone", (Bar(4000.0), Bar(None))),
        ("execgate", (Bar(3000.0), Bar(1000.0))),
        ("podman", (Bar(None), Bar(None))),
    ]
    assert memory.rows[0].bars == (Bar(20.0), Bar(300.0))
    assert panels(results()) == []


def program(path: Path, says: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{says}\n")
    path.chmod(0o755)
    return path


def test_a_program_with_two_paths_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = program(tmp_path / "a" / "eg-nosuch", "exit 0"), program(tmp_path / "b" / "eg-nosuch", "exit 0")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "eg-nosuch").symlink_to(first)
    monkeypatch.setenv("PATH", f"{tmp_path}/none:{tmp_path}/a:{tmp_path}/b:{tmp_path}/c")
    assert find_every_program("eg-nosuch") == [first, second]


def test_each_engine_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}/own:{tmp_path}/on-path")
    program(tmp_path / "own" / "podman", "echo podman version 4.3.1")
    on_path = program(tmp_path / "on-path" / "podman", "echo podman version 5.6.0-rc1, build x")
    same = program(tmp_path / "same" / "podman", "echo podman version 5.6.0-rc1")
    silent = program(tmp_path / "silent" / "podman", "exit 1")
    found = find_engines("podman", [same, silent])
    # A machine may have one more in the directories for root, which are always searched.
    ours = {one.name: one.path for one in found if one.path is None or one.path.is_relative_to(tmp_path)}
    assert ours == {
        "podman": None,
        "podman 5.6.0-rc1": on_path,
        f"podman {same}": same,
        f"podman {silent}": silent,
    }


def test_a_program_that_cannot_run_has_no_version(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")
    assert version_of(tmp_path / "text") == ""
