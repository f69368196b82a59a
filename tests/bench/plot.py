"""`python -m bench.plot docs/benchmarks.json docs/benchmarks.svg`: the figures as one picture.

The same figures give the same bytes: no date, no random ids.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.charts import Panel, Row, panels
from bench.contestants import DOCKERD, EXECGATE, PODMAN
from bench.results import Results
from bench.stored import read

_COLOURS = {EXECGATE: "#0072b2", DOCKERD: "#e69f00", PODMAN: "#cc79a7"}  # Okabe and Ito: for all kinds of eyes
_FLOOR = "#8c8c8c"
_STRENGTHS = (1.0, 0.6, 0.35)
"""Of a row's bars, by series."""

_STYLE = {
    "svg.hashsalt": "execgate",
    "svg.fonttype": "none",  # text stays text: small, and found by a search
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # what it is laid out with; viewers without it take their own
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}
_COLUMNS = 2
_FOOTNOTE = 170
"""Characters of a line."""

_THICKNESS = 0.8
"""Of a row, whose share is 1."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw; return the exit code."""
    parser = argparse.ArgumentParser(prog="bench.plot", description=__doc__)
    parser.add_argument("json", type=Path, help="what `make bench` wrote")
    parser.add_argument("svg", type=Path, help="where the picture goes")
    options = parser.parse_args(arguments)
    try:
        results = read(options.json)
    except (OSError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if not panels(results):
        print(f"bench: {options.json} has nothing to draw", file=sys.stderr)
        return 1
    with mpl.rc_context(_STYLE):
        draw(results).savefig(options.svg, metadata={"Date": None, "Title": "execgate beside the engines"})
    return 0


def draw(results: Results) -> Any:
    """Return a matplotlib Figure with a panel for each measure."""
    drawn = panels(results)
    lines = -(-len(drawn) // _COLUMNS)
    rows = max((len(panel.rows) for panel in drawn), default=0)
    figure = Figure(figsize=(10, 0.6 + (1.2 + 0.27 * rows) * lines), layout="constrained")
    axes = figure.subplots(lines, _COLUMNS, squeeze=False).flat
    for axis, panel in zip(axes, drawn, strict=False):
        _draw_panel(axis, panel)
    for axis in list(axes)[len(drawn) :]:
        axis.set_axis_off()
    figure.supxlabel(textwrap.fill(_footnote(results), _FOOTNOTE), x=0.01, ha="left", fontsize=7, color="#555555")
    return figure


def _footnote(results: Results) -> str:
    machine, versions = results.machine, results.versions
    engines = [version for name, version in versions.items() if name.split()[0] in (DOCKERD, PODMAN)]
    told = [f"execgate {versions['execgate']}", versions["runc"], versions["crun"], *engines]
    taken = f"{machine['date']}; {machine['processors']}, Linux {machine['kernel']}"
    load = f"load {machine['load before']} before, {machine['load after']} after"
    return f"{taken}; {load}; {', '.join(told)}"


def _draw_panel(axis: Any, panel: Panel) -> None:
    places = _places(panel.rows)
    for row, place in zip(panel.rows, places, strict=True):
        _draw_row(axis, panel, row, place)
    axis.set_yticks(places, [row.contestant for row in panel.rows])
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(places[-1] + 0.6, -1.2)
    axis.set_xlim(0, axis.get_xlim()[1] * 1.08)
    for row, place in zip(panel.rows, places, strict=True):
        if row == next(one for one in panel.rows if one.runtime == row.runtime):
            axis.text(0, place - 0.75, row.runtime, weight="bold", va="center", clip_on=False)
    axis.grid(axis="x", color="#e0e0e0", linewidth=0.5)
    axis.set_axisbelow(True)
    axis.set_title(f"{panel.title} ({panel.better} is better)", pad=18)
    samples = [
        Patch(color=_FLOOR, alpha=strength, label=name, linewidth=0)
        for name, strength in zip(panel.series, _STRENGTHS, strict=False)
    ]
    # Above the bars, as no corner is free of them in every run.
    axis.legend(handles=samples, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(samples), frameon=False,
                fontsize=7, borderpad=0, borderaxespad=0.4, handlelength=1)  # fmt: skip


def _places(rows: Sequence[Row]) -> list[float]:
    """Rows are one apart; a runtime's name has a place of its own above its rows."""
    runtimes = list(dict.fromkeys(row.runtime for row in rows))
    return [number + 1.0 * runtimes.index(row.runtime) for number, row in enumerate(rows)]


def _draw_row(axis: Any, panel: Panel, row: Row, place: float) -> None:
    colour = _COLOURS.get(row.contestant.split()[0].rstrip(","), _FLOOR)
    height = _THICKNESS if panel.stacked else _THICKNESS / len(row.bars)
    left = 0.0
    for number, bar in enumerate(row.bars):
        if bar.value is None:
            continue
        y = place if panel.stacked else place - _THICKNESS / 2 + height * (number + 0.5)
        axis.barh(y, bar.value, height, left=left, color=colour, alpha=_STRENGTHS[number % len(_STRENGTHS)])
        end = left + bar.value
        if bar.low is not None and bar.high is not None:
            axis.plot([bar.low, bar.high], [y, y], color="#333333", linewidth=1, marker="|", markersize=4)
            end = max(end, bar.high)
        left = end if panel.stacked else 0.0
        if not panel.stacked or number == len(row.bars) - 1:
            shown = end if panel.stacked else bar.value
            axis.annotate(f"{shown:.3g}" if shown < 100 else f"{shown:.0f}", (end, y), (3, 0),
                          textcoords="offset points", va="center", fontsize=6)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
