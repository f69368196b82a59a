"""What the documentation names exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
_NAMED = sorted(
    {
        named
        for page in ("libpod", "reliability", "security")
        for named in _TEST.findall((ROOT / f"docs/{page}.md").read_text(encoding="utf-8"))
    }
)


@cache
def functions(path: str) -> set[str]:
    """Return the names of the test functions in a file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize(("path", "name"), _NAMED)
def test_a_test_that_is_named_exists(path: str, name: str) -> None:
    assert name in functions(path)


def test_every_promise_has_a_test() -> None:
    assert len(_NAMED) > 60
