"""`python -m bench.page build/bench.json docs/benchmarks.md`: the figures of a page, made anew.

Replaced is what stands between two comments of the page; the samples are kept beside it, with its name. The prose round
them is written by hand.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.results import Results
from bench.stored import read, write

BEGIN = "<!-- Figures: `make plot` writes what is below, from benchmarks.json. -->"
END = "<!-- End of the figures. -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and its JSON; return the exit code."""
    parser = argparse.ArgumentParser(prog="bench.page", description=__doc__)
    parser.add_argument("json", type=Path, help="what `make bench` wrote")
    parser.add_argument("page", type=Path, help="the page, with its two comments")
    options = parser.parse_args(arguments)
    try:
        results = read(options.json)
        page = renewed(options.page.read_text(), figures(results, options.page.stem))
    except (OSError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    write(results, options.page.with_suffix(".json"))
    options.page.write_text(page)
    return 0


def renewed(page: str, text: str) -> str:
    """Return the page with `text` between its comments; ValueError unless it has each of them once, in order."""
    before, begin, rest = page.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"the page must have one line {BEGIN!r} and one line {END!r} below")
    return f"{before}{begin}\n{text}\n\n{end}{after}"


def figures(results: Results, name: str) -> str:
    """Return the picture, how much was measured, and all tables; `name` is that of the picture without `.svg`."""
    picture = f"![execgate beside the bare runtime and the engines: the figures of the tables below]({name}.svg)"
    return "\n\n".join(part for part in (picture, _warning(results), _amount(results), results.report("###")) if part)


def _warning(results: Results) -> str:
    if not results.options["quick"]:
        return ""
    return "**A run with `--quick`: it shows that everything works; its figures mean little.**"


def _amount(results: Results) -> str:
    asked = results.options
    return (
        f"Rounds: {asked['latency_rounds']} of latency, {asked['rounds']} of what else has rounds; "
        f"{asked['seconds']:g} s in a turn of execs per second, {asked['megabytes']} MiB through a stream, "
        f"{asked['tries']} keys and pings in a round, {asked['sessions']} idle sessions. "
        f"Every sample is in [benchmarks.json](benchmarks.json)."
    )


if __name__ == "__main__":
    sys.exit(main())
