"""Events as Docker shows them, and which of them pass a filter."""

from types import SimpleNamespace
from typing import Any

import pytest

from execgate.http.routes.events import _timestamp, matches, message
from execgate.model.errors import InvalidArgument
from execgate.model.events import Event
from execgate.model.ids import ContainerId

EVENT = Event(
    action="exec_create: sh -c true",
    container_id=ContainerId("abcdef"),
    time_ns=1_700_000_000_123_456_789,
    attributes={"name": "web", "image": "img", "tier": "front", "execID": "e"},
)


def test_the_message() -> None:
    shown = message(EVENT)
    assert (shown["Type"], shown["Action"], shown["status"]) == ("container", EVENT.action, EVENT.action)
    assert (shown["id"], shown["Actor"]["ID"], shown["from"]) == ("abcdef", "abcdef", "img")
    assert (shown["time"], shown["timeNano"]) == (1_700_000_000, 1_700_000_000_123_456_789)
    assert shown["Actor"]["Attributes"]["execID"] == "e"


@pytest.mark.parametrize(
    ("filters", "passes"),
    [
        ({}, True),
        ({"container": ["web"]}, True),
        ({"container": ["/web"]}, True),
        ({"container": ["abc"]}, True),
        ({"container": ["we"]}, False),
        ({"container": [""]}, False),
        ({"container": []}, True),
        ({"container": ["other", "web"]}, True),
        ({"event": ["exec_create"]}, True),
        ({"event": ["exec_create: sh -c true"]}, True),
        ({"event": ["exec_start", "exec_die"]}, False),
        ({"type": ["container"]}, True),
        ({"type": ["image"]}, False),
        ({"label": ["tier"]}, True),
        ({"label": ["tier=front"]}, True),
        ({"label": ["tier=front", "nope"]}, False),
        ({"image": ["img"], "event": ["exec_die"]}, False),
        ({"scope": ["local"]}, True),
        ({"scope": ["swarm"]}, False),
    ],
)
def test_filters(filters: dict[str, list[str]], passes: bool) -> None:
    assert matches(EVENT, filters) is passes


def request(value: str) -> Any:
    return SimpleNamespace(query={"since": value})


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("", None),
        ("0", None),
        ("1", 1_000_000_000),
        ("1.5", 1_500_000_000),
        ("1700000000.123456789", 1_700_000_000_123_456_789),
        ("-1", -1_000_000_000),
    ],
)
def test_timestamps(text: str, nanoseconds: int | None) -> None:
    assert _timestamp(request(text), "since") == nanoseconds


@pytest.mark.parametrize(
    "text", ["x", "NaN", "Infinity", "1e400", "1e9999999", "1e20", "2026-01-01T00:00:00Z", "1.2.3", "9" * 40]
)
def test_what_is_no_timestamp(text: str) -> None:
    with pytest.raises(InvalidArgument, match="since"):
        _timestamp(request(text), "since")
