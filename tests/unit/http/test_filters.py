"""Docker's `filters` parameter, in both of its forms."""

import pytest

from execgate.http.filters import matches_label, parse_filters
from execgate.model.errors import InvalidArgument

KNOWN = {"name", "label"}


@pytest.mark.parametrize(
    ("text", "filters"),
    [
        ("", {}),
        ("{}", {}),
        ('{"name": ["a", "b"]}', {"name": ["a", "b"]}),
        ('{"name": {"a": true, "b": true}}', {"name": ["a", "b"]}),
        ('{"name": {"a": true, "b": false}}', {"name": ["a"]}),
        ('{"name": [], "label": ["x=y"]}', {"name": [], "label": ["x=y"]}),
    ],
)
def test_both_forms(text: str, filters: dict[str, list[str]]) -> None:
    assert parse_filters(text, KNOWN) == filters


@pytest.mark.parametrize(
    "text",
    ["[]", "1", '"x"', "null", "{", "[" * 100_000, '{"name": "a"}', '{"name": 1}', '{"name": [1]}', '{"name": null}',
     '{"name": {"a": 1}}', '{"name": {"a": true, "b": "true"}}',
     '{"unknown": ["a"]}', '{"NAME": ["a"]}', '{"' + "x" * 10_000 + '": ["a"]}', "9" * 5000],
)  # fmt: skip
def test_what_is_none(text: str) -> None:
    with pytest.raises(InvalidArgument) as failure:
        parse_filters(text, KNOWN)
    assert len(failure.value.message) < 200


@pytest.mark.parametrize(
    ("wanted", "matches"),
    [
        ("a", True),
        ("a=1", True),
        ("a=2", False),
        ("b", False),
        ("b=", False),
        ("e", True),
        ("e=", True),
        ("c=x=y", True),
        ("c=x", False),
    ],
)
def test_labels(wanted: str, matches: bool) -> None:
    assert matches_label({"a": "1", "c": "x=y", "e": ""}, wanted) is matches
