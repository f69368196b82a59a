"""Results as a file, and back: JSON with one line for each contestant, so that two runs can be compared by eye."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.interactive import Felt
from bench.measures import Flow, IdleMemory
from bench.processes import Memory
from bench.results import Results

_DIGITS = 7
"""After the point: a tenth of a microsecond, and the file has half its size."""


def write(results: Results, path: Path) -> None:
    """Write all samples, and the verdicts drawn from them."""
    path.write_text(_lines(_rounded(results.as_json())) + "\n")


def read(path: Path) -> Results:
    """Return what `write` wrote; the verdicts are drawn anew. OSError, or ValueError for anything else."""
    try:
        return _results(json.loads(path.read_text()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is nothing that the benchmark wrote: {error!r}") from error


def _results(data: Mapping[str, Any]) -> Results:
    plain = {name: value for name, value in data.items() if name != "verdicts"}
    return Results(
        **plain
        | {
            "rate": {int(parallel): samples for parallel, samples in data["rate"].items()},
            "stdout": _each(data["stdout"], Flow),
            "stdin": _each(data["stdin"], Flow),
            "memory": _each(data["memory"], _idle_memory),
            "interactive": _each(data["interactive"], _felt),
        }
    )


def _each(samples: Mapping[str, list[Any]], make: Any) -> dict[str, list[Any]]:
    return {name: [None if one is None else make(**one) for one in rounds] for name, rounds in samples.items()}


def _idle_memory(**parts: dict[str, int]) -> IdleMemory:
    return IdleMemory(**{name: Memory(**part) for name, part in parts.items()})


def _felt(**samples: list[float]) -> Felt:
    return Felt(**{name: tuple(one) for name, one in samples.items()})


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, Mapping):
        return {str(name): _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def _lines(value: Any, indent: str = "") -> str:
    """Objects have a line for each member, lists have one line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, separators=(",", ":"))
    members = [f"{indent} {json.dumps(name)}: {_lines(one, indent + ' ')}" for name, one in value.items()]
    return "{\n" + ",\n".join(members) + f"\n{indent}}}"
