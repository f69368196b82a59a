"""Spans of time as people write them: `90`, `1.5s`, `30m`, `12h`, `7d`."""

import re

_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)(ms|s|m|h|d)?", re.ASCII)
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, None: 1.0}


def parse_duration(text: str) -> float:
    """Return seconds; a number without a unit is seconds. ValueError."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise ValueError(f"{text[:32]!r} is no span of time: a number of seconds, or 30s, 15m, 12h, 7d")
    return float(found[1]) * _UNITS[found[2]]
