"""Docker's `filters` parameter: JSON, `{"name": ["a", "b"]}` or the older `{"name": {"a": true}}`."""

import json
from collections.abc import Collection, Mapping

from execgate.model.errors import InvalidArgument


def parse_filters(text: str, known: Collection[str]) -> dict[str, list[str]]:
    """Return the values of each filter. InvalidArgument for what is malformed or not in `known`."""
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidArgument("invalid filter: not a JSON object")
    filters = {name: _values(name, values) for name, values in value.items()}
    for name in filters:
        if name not in known:
            raise InvalidArgument(f"invalid filter {name[:64]!r}")
    return filters


def _values(name: str, values: object) -> list[str]:
    if isinstance(values, dict) and all(isinstance(wanted, bool) for wanted in values.values()):
        values = [value for value, wanted in values.items() if wanted]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise InvalidArgument(f"invalid filter {name[:64]!r}: its values must be strings")
    return values


def matches_label(labels: Mapping[str, str], wanted: str) -> bool:
    """Return whether `labels` has `key`, or `key=value`."""
    key, equals, value = wanted.partition("=")
    return key in labels and (not equals or labels[key] == value)
