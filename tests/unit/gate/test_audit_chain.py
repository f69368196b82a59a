"""The chain: tampering of every kind is seen, what a crash leaves is not taken for it, and no byte is obeyed."""

import json
from collections.abc import Callable, Sequence

import hypothesis
import pytest
from hypothesis import strategies

from execgate.gate.audit_chain import (
    BEGINNING,
    LOST,
    MAX_FINDINGS,
    RECOVERED,
    Link,
    Verifier,
    digest_of,
    encode,
    parse,
)

Lines = list[bytes]


def chain(count: int, link: Link = BEGINNING) -> Lines:
    """Return `count` entries, the first of which follows `link`."""
    lines = []
    for number in range(count):
        lines.append(encode(link, 1_000_000_000_000_000_000 + number * 1000, "start", {"session": f"{number}"}))
        link = link.after(lines[-1])
    return lines


def link_of(lines: Sequence[bytes]) -> Link:
    link = BEGINNING
    for line in lines:
        link = link.after(line)
    return link


def verify(lines: Sequence[bytes], **expected: object) -> Verifier:
    verifier = Verifier(**expected)  # type: ignore[arg-type]
    for number, line in enumerate(lines, 1):
        verifier.feed(line, f"{number}")
    verifier.finish()
    return verifier


def breaks(lines: Sequence[bytes]) -> list[tuple[str, str]]:
    return [(found.place, found.text) for found in verify(lines).breaks]


def test_an_entry() -> None:
    line = encode(Link(6, "ab" * 32), 1_769_860_800_000_123_999, "exit", {"code": 7})
    assert line == (
        b'{"seq":7,"time":"2026-01-31T12:00:00.000123Z","event":"exit","code":7,"prev":"' + b"ab" * 32 + b'"}'
    )
    entry = parse(line)
    assert entry is not None
    assert (entry.seq, entry.event, entry.prev) == (7, "exit", "ab" * 32)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"null",
        b"[1]",
        b"{}",
        b'{"seq":1,"event":"x"}',
        b'{"seq":"1","event":"x","prev":"' + b"0" * 64 + b'"}',
        b'{"seq":true,"event":"x","prev":"' + b"0" * 64 + b'"}',
        b'{"seq":0,"event":"x","prev":"' + b"0" * 64 + b'"}',
        b'{"seq":1,"event":1,"prev":"' + b"0" * 64 + b'"}',
        b'{"seq":1,"event":"x","prev":"' + b"z" * 64 + b'"}',
        b"\xff\xfe",
        b"[" * 100_000,
        b"\0" * 4096,
    ],
)
def test_what_is_no_entry(line: bytes) -> None:
    assert parse(line) is None


@hypothesis.given(strategies.text(), strategies.lists(strategies.text()))
def test_no_byte_of_an_entry_is_obeyed(text: str, texts: list[str]) -> None:
    """Printable ASCII and nothing else, whatever was asked for; and it can be read back."""
    line = encode(BEGINNING, 0, "start", {"argv": texts, "user": text})
    assert all(0x20 <= byte < 0x7F for byte in line)
    entry = parse(line)
    assert entry is not None
    assert (entry.fields["argv"], entry.fields["user"]) == (texts, text)


@pytest.mark.parametrize("text", ["\x1b[2J", "\x7f", "\x9b31m", "\n{}", "\u202e", "\ud800", "\0"])
def test_sequences_that_terminals_obey(text: str) -> None:
    line = encode(BEGINNING, 0, "start", {"argv": [text]})
    assert all(0x20 <= byte < 0x7F for byte in line)
    assert json.loads(line)["argv"] == [text]


def test_a_whole_chain() -> None:
    lines = chain(50)
    verifier = verify(lines)
    assert verifier.whole
    assert not verifier.notes
    assert (verifier.entries, verifier.first, verifier.last) == (50, 1, link_of(lines))
    assert verify([]).whole


def test_a_chain_whose_beginning_is_elsewhere() -> None:
    verifier = verify(chain(50)[20:])
    assert verifier.whole
    assert verifier.first == 21


def edited(lines: Lines) -> Lines:
    return [*lines[:9], lines[9].replace(b'"session":"9"', b'"session":"8"'), *lines[10:]]


def with_other_number(lines: Lines) -> Lines:
    return [*lines[:9], lines[9].replace(b'"seq":10', b'"seq":11'), *lines[10:]]


def with_a_space(lines: Lines) -> Lines:
    return [*lines[:9], lines[9] + b" ", *lines[10:]]


def made_garbage(lines: Lines) -> Lines:
    return [*lines[:9], b"x" * len(lines[9]), *lines[10:]]


def deleted(lines: Lines) -> Lines:
    return lines[:9] + lines[12:]


def inserted(lines: Lines) -> Lines:
    return [*lines[:9], encode(link_of(lines[:8]), 0, "start", {}), *lines[9:]]


def repeated(lines: Lines) -> Lines:
    return [*lines[:10], lines[9], *lines[10:]]


def swapped(lines: Lines) -> Lines:
    return [*lines[:9], lines[10], lines[9], *lines[11:]]


def blank(lines: Lines) -> Lines:
    return [*lines[:9], b"", *lines[9:]]


def replaced_from_another_chain(lines: Lines) -> Lines:
    return lines[:9] + chain(11, Link(9, "ab" * 32))


def begun_anew(lines: Lines) -> Lines:
    return lines[:9] + chain(11)


def recovery_without_a_torn_line(lines: Lines) -> Lines:
    link = link_of(lines[:9])
    recovered = encode(link, 0, RECOVERED, {"torn_bytes": 3, "torn_sha256": digest_of(b"abc")})
    return [*lines[:9], recovered, *chain(3, link.after(recovered))]


def recovery_of_another_line(lines: Lines) -> Lines:
    """An entry was made garbage, and passed off as torn."""
    link = link_of(lines[:9])
    recovered = encode(link, 0, RECOVERED, {"torn_bytes": 3, "torn_sha256": digest_of(b"abc")})
    return [*lines[:9], lines[9][:-1], recovered, *chain(3, link.after(recovered))]


@pytest.mark.parametrize(
    ("tamper", "places", "reason"),
    [
        (edited, ["11"], "seq 11 does not follow seq 10 as that is here"),
        (with_a_space, ["11"], "seq 11 does not follow seq 10 as that is here"),
        (with_other_number, ["10", "11"], "seq 10 is missing"),
        (made_garbage, ["10", "11"], "is no entry"),
        (deleted, ["10"], "seq 10 is missing, and the 2 behind it"),
        (inserted, ["10"], "seq 9 stands behind seq 9"),
        (repeated, ["11"], "seq 10 stands behind seq 10"),
        (swapped, ["10", "12"], "seq 10 is missing"),
        (blank, ["10"], "is no entry"),
        (replaced_from_another_chain, ["10"], "seq 10 does not follow seq 9 as that is here"),
        (begun_anew, ["10"], "a new chain begins behind seq 9"),
        (recovery_without_a_torn_line, ["10"], "the torn line that it tells of is missing"),
        (recovery_of_another_line, ["10", "11"], "is no entry"),
    ],
)
def test_tampering(tamper: Callable[[Lines], Lines], places: list[str], reason: str) -> None:
    """It is told at its place, and what stands behind it is checked all the same."""
    found = breaks(tamper(chain(20)))
    assert [place for place, _ in found] == places
    assert reason in found[0][1]


@hypothesis.given(strategies.integers(0, 19), strategies.integers(0, 1000), strategies.integers(1, 255))
def test_no_byte_can_be_changed(number: int, offset: int, difference: int) -> None:
    """But in the last line, which nothing follows yet."""
    lines = chain(20)
    line = bytearray(lines[number])
    line[offset % len(line)] ^= difference
    changed = [*lines[:number], bytes(line), *lines[number + 1 :]]
    known = link_of(lines)
    assert not verify(changed, expected_seq=known.seq, expected_hash=known.digest).whole
    if number < 19:
        assert breaks(changed)


def test_the_end_can_be_cut_off_unless_somebody_knows_it() -> None:
    lines = chain(20)
    known = link_of(lines)
    cut = lines[:15]
    assert verify(cut).whole
    assert not verify(cut, expected_seq=known.seq).whole
    assert not verify(cut, expected_hash=known.digest).whole
    assert verify(lines, expected_seq=known.seq, expected_hash=known.digest).whole
    grown = lines + chain(5, known)
    assert verify(grown, expected_seq=known.seq, expected_hash=known.digest).whole, "the log has grown since"
    assert not verify(grown, expected_seq=known.seq + 1, expected_hash=known.digest).whole
    anew = chain(25, Link(1, "ab" * 32))
    assert not verify(anew, expected_seq=known.seq, expected_hash=known.digest).whole


@pytest.mark.parametrize("size", [1, 40, 10_000])
def test_a_torn_line(size: int) -> None:
    """However much of it there is, all of it but the newline too."""
    lines = chain(9)
    link = link_of(lines)
    torn = encode(link, 0, "start", {})[:size]
    recovered = encode(link, 0, RECOVERED, {"torn_bytes": len(torn), "torn_sha256": digest_of(torn)})
    verifier = verify([*lines, torn, recovered, *chain(3, link.after(recovered))])
    assert verifier.whole, verifier.breaks
    assert [found.place for found in verifier.notes] == ["10"]
    assert verifier.entries == 13
    assert verifier.last is not None
    assert verifier.last.seq == 13


def test_the_last_line_is_torn() -> None:
    """A service died, or writes just now."""
    verifier = Verifier()
    for number, line in enumerate(chain(3)):
        verifier.feed(line, f"{number}")
    verifier.feed(b'{"seq":4,', "4", whole=False)
    verifier.finish()
    assert verifier.whole
    assert [found.place for found in verifier.notes] == ["4"]


def test_lost_entries_are_told() -> None:
    lines = chain(3)
    lines.append(encode(link_of(lines), 0, LOST, {"lines": 12}))
    verifier = verify(lines)
    assert verifier.whole
    assert [found.text for found in verifier.notes] == ["12 entries before it could not be written"]


def test_findings_are_bounded() -> None:
    verifier = verify([b"x"] * 1000)
    assert len(verifier.breaks) == MAX_FINDINGS
    assert verifier.findings == 1000
