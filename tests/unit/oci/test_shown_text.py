"""Text from outside in messages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from execgate.oci.text import shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("plain text \u00e9", "plain text \u00e9"),
        ("a\nb\x1b[0m\0", r"a\nb\x1b[0m\x00"),
        ("\ud800\u202e", r"\ud800\u202e"),
        ("x" * 200, "x" * 128 + "..."),
    ],
)
def test_shown(text: str, expected: str) -> None:
    assert shown(text) == expected


@given(st.text(st.characters()))
def test_always_one_printable_line(text: str) -> None:
    result = shown(text, 20)
    assert result.isprintable()
    result.encode()
    assert len(result) <= 20 * 10 + 3
