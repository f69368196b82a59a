"""API versions, and the head that ends HTTP on a connection."""

from types import SimpleNamespace
from typing import Any

import pytest

from execgate.http.dialects import DOCKER, LIBPOD, Dialect, dialect_of, dotted, upgrade_head
from execgate.model.errors import InvalidArgument


def request(version: str | None) -> Any:
    return SimpleNamespace(match_info={} if version is None else {"version": version})


@pytest.mark.parametrize("text", ["1.24", "1.41", "1.51"])
def test_versions_that_are_spoken(text: str) -> None:
    assert dotted(DOCKER.version_of(request(text))) == text


def test_without_a_version_it_is_the_newest() -> None:
    assert DOCKER.version_of(request(None)) == DOCKER.maximum


@pytest.mark.parametrize(
    ("text", "said"),
    [("1.23", "too old"), ("0.1", "too old"), ("1.52", "too new"), ("9999.9999", "too new"), ("2.0", "too new")],
)
def test_versions_out_of_range(text: str, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        DOCKER.version_of(request(text))


@pytest.mark.parametrize(
    "text", ["", "1", "1.", ".1", "1.2.3", "1.99999", "\u0661.\u0662", "1.4\n", "v1.4", "9" * 5000 + ".1"]
)
def test_what_is_no_version(text: str) -> None:
    with pytest.raises(InvalidArgument) as failure:
        DOCKER.parse_version(text)
    assert len(failure.value.message) < 100


@pytest.mark.parametrize(
    ("version", "upgrade", "multiplexed", "first", "kind"),
    [
        ((1, 42), True, True, "HTTP/1.1 101 UPGRADED", "multiplexed"),
        ((1, 42), True, False, "HTTP/1.1 101 UPGRADED", "raw"),
        ((1, 41), True, True, "HTTP/1.1 101 UPGRADED", "raw"),
        ((1, 51), False, True, "HTTP/1.1 200 OK", "raw"),
    ],
)
def test_the_head(version: tuple[int, int], upgrade: bool, multiplexed: bool, first: str, kind: str) -> None:
    head = upgrade_head(DOCKER, version, upgrade=upgrade, multiplexed=multiplexed)
    assert head.endswith(b"\r\n\r\n")
    assert head.count(b"\r\n\r\n") == 1
    status, *lines = head.decode().rstrip("\r\n").split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines)
    assert status == first
    assert fields["Content-Type"] == f"application/vnd.docker.{kind}-stream"
    assert (fields.get("Connection"), fields.get("Upgrade")) == (("Upgrade", "tcp") if upgrade else (None, None))
    assert fields["Api-Version"] == "1.51"
    assert "Content-Length" not in fields


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v4.3.1/libpod/_ping", LIBPOD),
        ("/libpod/_ping", LIBPOD),
        ("/v4/libpod", LIBPOD),
        ("/vX/libpod/pods/json", LIBPOD),
        ("/_ping", DOCKER),
        ("/v1.41/exec/x/start", DOCKER),
        ("/containers/libpod/json", DOCKER),
        ("/v1.41/containers/libpod/json", DOCKER),
        ("/libpods/x", DOCKER),
        ("/v4.3.1/libpod2/x", DOCKER),
        ("*", DOCKER),
        ("", DOCKER),
    ],
)
def test_a_path_tells_its_dialect(path: str, dialect: Dialect) -> None:
    assert dialect_of(path) is dialect


@pytest.mark.parametrize(
    ("text", "version"), [("4", (4,)), ("4.7", (4, 7)), ("4.3.1", (4, 3, 1)), ("0.0.0", (0, 0, 0))]
)
def test_libpod_refuses_no_version(text: str, version: tuple[int, ...]) -> None:
    assert LIBPOD.version_of(request(text)) == version


@pytest.mark.parametrize("text", ["", "4.", "1.2.3.4", "4.3.1-dev", "99999"])
def test_what_is_no_version_of_libpod(text: str) -> None:
    with pytest.raises(InvalidArgument):
        LIBPOD.version_of(request(text))


@pytest.mark.parametrize(
    ("version", "upgrade", "multiplexed", "kind"),
    [
        ((4, 6, 9), True, True, "raw"),
        ((4,), True, True, "raw"),
        ((4, 7), False, True, "multiplexed"),
        ((4, 7, 0), True, True, "multiplexed"),
        ((5, 8, 0), False, False, "raw"),
    ],
)
def test_the_head_of_libpod(version: tuple[int, ...], upgrade: bool, multiplexed: bool, kind: str) -> None:
    head = upgrade_head(LIBPOD, version, upgrade=upgrade, multiplexed=multiplexed).decode()
    assert f"\r\nContent-Type: application/vnd.docker.{kind}-stream\r\n" in head
    assert "\r\nLibpod-API-Version: 5.8.0\r\n" in head


@pytest.mark.parametrize(
    ("said", "reworded", "cause"),
    [
        (
            "No such container: a\\1\nb",
            'no container with name or ID "a\\1\nb" found: no such container',
            "no such container",
        ),
        ("No such exec instance: x", "no exec session with ID x found: no such exec session", "no such exec session"),
        (
            "container x is not running",
            "container x is not running: container state improper",
            "container state improper",
        ),
        ("anything else", "anything else", "anything else"),
        ("it says: No such container: x", "it says: No such container: x", "it says: No such container: x"),
    ],
)
def test_the_words_of_libpod(said: str, reworded: str, cause: str) -> None:
    assert LIBPOD.reworded(said) == (reworded, cause)
    assert DOCKER.reworded(said)[0] == said
