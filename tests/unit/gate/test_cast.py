"""The text of recordings: what is written can be read, every byte of it, wherever pieces begin and end."""

import base64
import gzip
import io
import json
import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from execgate.gate.cast import About, Event, Played, Torn, What, encoder, read_about
from execgate.gate.members import HEAD_MAX, Head, Kind, pack, parse_head
from execgate.model.config import ConsoleSize
from execgate.model.errors import InvalidArgument

PIECES = st.lists(st.tuples(st.sampled_from([What.STDOUT, What.STDERR, What.STDIN]), st.binary(max_size=40)))
TEXTS = st.lists(st.text(st.sampled_from("aé€🙂\n\x1b\0\u2028"), max_size=12).map(str.encode))


def about(*, tty: bool = True, **changes: Any) -> About:
    fields: dict[str, Any] = {
        "session_id": "ab" * 32, "container_id": "c1", "container_name": "web", "owner": "unix:0", "rule": "r1",
        "args": ("sh", "-c", "echo 'x'"), "tty": tty, "begun_at": 1_700_000_000.25, "since": 100.0,
    }  # fmt: skip
    return About(**fields | changes)


def written(events: Iterable[Event], *, tty: bool) -> bytes:
    made = encoder(tty=tty, since=100.0)
    return made.head(about(tty=tty)) + made.encode(events)


def read(data: bytes) -> list[Event]:
    return list(Played(io.BytesIO(data)))


def text_of(data: bytes, what: What) -> bytes:
    return b"".join(event.data for event in read(data) if event.what is what)


# -- asciicast


def test_a_cast() -> None:
    """Line by line as the format demands it (asciicast v2)."""
    events = [
        Event(100.5, What.STDOUT, b"\x1b[1mhi\r\n"),
        Event(101.0, What.STDIN, b"x"),
        Event(101.25, What.SIZE, b"120x40"),
        Event(102.0000001, What.NOTE, b"exit code 0", {"exit": {"code": 0}}),
    ]
    made = encoder(tty=True, since=100.0)
    head, *lines = [
        json.loads(line)
        for line in (
            made.head(about(size=ConsoleSize(height=30, width=100), environment={"TERM": "xterm"}))
            + made.encode(events)
        ).splitlines()
    ]
    assert (head["version"], head["width"], head["height"], head["timestamp"]) == (2, 100, 30, 1_700_000_000)
    assert head["env"] == {"TERM": "xterm"}
    assert head["command"] == "sh -c echo 'x'"
    assert lines == [
        [0.5, "o", "\x1b[1mhi\r\n"],
        [1.0, "i", "x"],
        [1.25, "r", "120x40"],
        [2.0, "m", "exit code 0"],
    ]


@given(TEXTS, st.randoms())
def test_characters_that_are_cut(texts: list[bytes], chance: random.Random) -> None:
    """Whatever the pieces are, the text is the same; output and input do not mix."""
    events = []
    for what in (What.STDOUT, What.STDIN):
        rest = b"".join(texts)
        while rest:
            size = chance.randint(1, 5)
            events.append(Event(100.0, what, rest[:size]))
            rest = rest[size:]
    chance.shuffle(places := [event.what for event in events])
    queues = {what: iter([event for event in events if event.what is what]) for what in set(places)}
    data = written([next(queues[what]) for what in places], tty=True)
    assert text_of(data, What.STDOUT) == text_of(data, What.STDIN) == b"".join(texts)


@given(st.lists(st.binary(max_size=8)))
def test_what_is_no_text(pieces: list[bytes]) -> None:
    """It is shown as a terminal would show it, and every line is JSON that any reader takes."""
    events = [Event(100.0, What.STDOUT, piece) for piece in pieces] + [Event(100.0, What.NOTE, b"over")]
    data = written(events, tty=True)
    assert text_of(data, What.STDOUT).decode() == b"".join(pieces).decode(errors="replace")


@pytest.mark.parametrize("cut", range(1, 4))
def test_a_character_that_two_services_have_seen(cut: int) -> None:
    first = encoder(tty=True, since=100.0)
    data = first.encode([Event(101.0, What.STDOUT, b"a" + "🙂".encode()[:cut]), Event(101.0, What.STDIN, b"\xc3")])
    assert first.rest() == ("🙂".encode()[:cut], b"\xc3")
    second = encoder(tty=True, since=100.0, rest=first.rest())
    data += second.encode([Event(102.0, What.STDOUT, "🙂".encode()[cut:]), Event(102.0, What.STDIN, b"\xa4")])
    data = first.head(about()) + data
    assert text_of(data, What.STDOUT) == "a🙂".encode()
    assert text_of(data, What.STDIN) == "ä".encode()
    assert second.rest() == (b"", b"")


# -- lines


@given(PIECES)
def test_lines_keep_every_byte(pieces: list[tuple[What, bytes]]) -> None:
    data = written([Event(100.0, what, piece) for what, piece in pieces], tty=False)
    for what in (What.STDOUT, What.STDERR, What.STDIN):
        assert text_of(data, what) == b"".join(piece for one, piece in pieces if one is what)


@given(TEXTS.filter(any), st.data())
def test_text_is_text_in_lines(texts: list[bytes], data: st.DataObject) -> None:
    """Also in pieces that begin and end within a character: only the rests of those are none."""
    whole = b"".join(texts)
    begin = data.draw(st.integers(0, len(whole) - 1))
    piece = whole[begin : data.draw(st.integers(begin + 1, len(whole)))]
    lines = [json.loads(line) for line in written([Event(100.0, What.STDOUT, piece)], tty=False).splitlines()[1:]]
    none = b"".join(base64.b64decode(line["base64"]) for line in lines if "base64" in line)
    assert len(none) <= 6
    if "base64" not in json.dumps(lines):
        assert "".join(line["data"] for line in lines) == piece.decode()


@pytest.mark.parametrize("tty", [True, False])
def test_no_event_is_told_as_earlier_than_one_before_it(*, tty: bool) -> None:
    """A note is told first that was made last, while a file was opened; and nothing is before the beginning."""
    made = encoder(tty=tty, since=100.0)
    times = (99.0, 103.0, 101.0, 104.5, 104.25)
    lines = made.encode([Event(time, What.STDOUT, b"x") for time in times]).splitlines()
    told = [one[0] if tty else one["time"] for one in map(json.loads, lines)]
    assert told == [0.0, 3.0, 3.0, 4.5, 4.5]


def test_lines() -> None:
    events = [
        Event(100.5, What.STDERR, b"a\xff"),
        Event(101.0, What.NOTE, b"exit code 7 (pidfd)", {"exit": {"code": 7, "source": "pidfd"}}),
    ]
    head, *lines = [json.loads(line) for line in written(events, tty=False).splitlines()]
    assert head == {
        "execgate": {
            "session": "ab" * 32, "container": "c1", "name": "web", "owner": "unix:0", "rule": "r1",
            "args": ["sh", "-c", "echo 'x'"], "begun": 1_700_000_000.25, "since": 100.0,
        }
    }  # fmt: skip
    assert lines == [
        {"time": 0.5, "stream": "stderr", "base64": "Yf8="},
        {"time": 1.0, "note": "exit code 7 (pidfd)", "exit": {"code": 7, "source": "pidfd"}},
    ]


# -- reading


@pytest.mark.parametrize("tty", [True, False])
def test_the_head_tells_who_it_is(*, tty: bool) -> None:
    told = read_about(io.BytesIO(written([], tty=tty)))
    assert told is not None
    assert (told.session_id, told.tty, told.since, told.rule) == ("ab" * 32, tty, 100.0, "r1")
    assert read_about(io.BytesIO(b'{"version":2,"width":80,"height":24}\n')) is None


def test_an_argument_that_is_no_unicode() -> None:
    data = encoder(tty=True, since=0).head(about(args=("sh", "\ud800")))
    assert json.loads(data)["command"] == "sh ?"


def test_a_cast_of_somebody_else() -> None:
    data = b'{"version": 2, "width": 80, "height": 24}\n[1.5, "o", "x"]\n[2, "z", {"new": 1}]\n[3.0, "m", ""]\n'
    assert read(data) == [Event(1.5, What.STDOUT, b"x"), Event(3.0, What.NOTE, b"")]
    assert read(gzip.compress(data)) == read(data)


@pytest.mark.parametrize(
    "data",
    [b"", b"\n", b"x", b"[]\n", b"1\n", b"{}\n", b'{"version": 3}\n', b"[" * 100_000, b"\x1f\x8b", b"\x1f\x8bx" * 9,
     gzip.compress(b""), b'{"version": 2}', b"\xff\xfe\n"],
)  # fmt: skip
def test_what_is_no_recording(data: bytes) -> None:
    with pytest.raises(InvalidArgument):
        Played(io.BytesIO(data))


@pytest.mark.parametrize("line", [b"[1]\n", b"{}\n", b"[1, 2, 3, 4]\n", b'["x", "o", ""]\n', b"[1.0,", b'[1,"o","x"]'])
def test_a_line_that_is_damaged(line: bytes) -> None:
    """What is before it can be seen."""
    played = iter(Played(io.BytesIO(written([Event(101.0, What.STDOUT, b"seen")], tty=True) + line)))
    assert next(played).data == b"seen"
    with pytest.raises(Torn):
        next(played)


def test_what_becomes_much_is_read_in_pieces() -> None:
    """A member may hold a thousand times what it takes; it is not held at once."""
    events = [Event(100.0, What.STDOUT, b"x" * 1000)] * 50_000
    data = pack(encoder(tty=True, since=100.0).head(about())) + pack(written(events, tty=True).partition(b"\n")[2])
    assert len(data) < 1_000_000
    assert sum(len(event.data) for event in Played(io.BytesIO(data))) == 50_000_000


# -- members


@given(st.binary(max_size=200), st.sampled_from(Kind), st.tuples(st.binary(max_size=3), st.binary(max_size=3)))
def test_members(data: bytes, kind: Kind, rest: tuple[bytes, bytes]) -> None:
    """gzip reads them, one or more; each tells its length, and no beginning of one is taken for one."""
    member = pack(data, kind, rest)
    assert parse_head(member) == parse_head((member + b"more")[:HEAD_MAX]) == Head(len(member), kind, rest)
    assert gzip.decompress(member + member) == data + data
    for length in range(min(len(member), HEAD_MAX)):
        found = parse_head(member[:length])
        assert found in (None, Head(len(member), kind, rest))


@pytest.mark.parametrize("data", [b"", b"\0" * 64, gzip.compress(b"x" * 100), b"\x1f\x8b\x08\x04" + b"\xff" * 60])
def test_what_is_no_member_of_ours(data: bytes) -> None:
    assert parse_head(data) is None
