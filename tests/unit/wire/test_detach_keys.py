"""Detach keys: Docker's grammar, and a filter whose oracle is `bytes.partition`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from execgate.model.errors import InvalidArgument
from execgate.wire.detach_keys import MAX_KEYS, DetachFilter, format_detach_keys, parse_detach_keys

DEFAULT = b"\x10\x11"


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("ctrl-p,ctrl-q", DEFAULT),
        ("ctrl-@", b"\x00"),
        ("ctrl-a", b"\x01"),
        ("ctrl-z", b"\x1a"),
        ("ctrl-[", b"\x1b"),
        ("ctrl-\\", b"\x1c"),
        ("ctrl-]", b"\x1d"),
        ("ctrl-^", b"\x1e"),
        ("ctrl-_", b"\x1f"),
        ("DEL", b"\x7f"),
        ("a", b"a"),
        ("A,~, ,1", b"A~ 1"),
        ("\x10", b"\x10"),
        ("ctrl-a,a,DEL,ctrl-a", b"\x01a\x7f\x01"),
    ],
)
def test_a_list_of_keys_is_its_bytes(text: str, keys: bytes) -> None:
    assert parse_detach_keys(text) == keys


@given(st.lists(st.integers(0, 127).filter(lambda code: code != ord(",")), min_size=1, max_size=MAX_KEYS).map(bytes))
def test_keys_written_out_are_read_back(keys: bytes) -> None:
    text = format_detach_keys(keys)
    assert parse_detach_keys(text) == keys
    assert text.isprintable()


def test_no_keys_are_written_as_nothing() -> None:
    assert format_detach_keys(b"") == ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "a,",
        ",a",
        "a,,b",
        "ab",
        "ctrl-",
        "ctrl-A",
        "ctrl-1",
        "ctrl--",
        "CTRL-a",
        "ctrl-ab",
        "ctrl-ctrl-a",
        "del",
        "a b",
        "é",
        "a,é",
        "ctrl-é",
        "ctrl-p, ctrl-q",
        "\ud800",
        "a," * MAX_KEYS + "a",
    ],
)
def test_everything_else_is_refused_in_dockers_words(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_detach_keys(text)
    assert caught.value.message == f"Invalid escape keys ({text}) provided"


def test_the_longest_sequence_is_accepted() -> None:
    assert parse_detach_keys(",".join("a" * MAX_KEYS)) == b"a" * MAX_KEYS


@given(st.text(max_size=30) | st.text(alphabet="ctrl-,@aDELz[]\\^_", max_size=30))
def test_any_text_is_keys_or_an_invalid_argument(text: str) -> None:
    try:
        keys = parse_detach_keys(text)
    except InvalidArgument:
        return
    assert len(keys) == text.count(",") + 1


def feed_all(watcher: DetachFilter, chunks: list[bytes]) -> tuple[bytes, bool]:
    """Feed the chunks, then EOF; return everything that was passed on, and whether it detached."""
    passed, detached = b"", False
    for chunk in chunks:
        part, detached = watcher.feed(chunk)
        passed += part
    return passed + watcher.flush(), detached


# Two letters, so that sequences overlap themselves and the input again and again.
letters = st.lists(st.sampled_from([b"a", b"b"]), max_size=24).map(b"".join)


@given(keys=letters.filter(bool).map(lambda keys: keys[:6]), chunks=st.lists(letters, max_size=6))
def test_it_detaches_exactly_at_the_first_occurrence_however_input_is_cut(keys: bytes, chunks: list[bytes]) -> None:
    before, found, _ = b"".join(chunks).partition(keys)
    assert feed_all(DetachFilter(keys), chunks) == (before, bool(found))


@given(keys=st.binary(min_size=1, max_size=4), chunks=st.lists(st.binary(max_size=8), max_size=6))
def test_it_is_transparent_to_any_bytes(keys: bytes, chunks: list[bytes]) -> None:
    before, found, _ = b"".join(chunks).partition(keys)
    assert feed_all(DetachFilter(keys), chunks) == (before, bool(found))


@given(keys=letters.filter(bool), chunks=st.lists(letters))
def test_no_more_is_withheld_than_the_next_byte_may_decide(keys: bytes, chunks: list[bytes]) -> None:
    watcher = DetachFilter(keys)
    for chunk in chunks:
        passed, detached = watcher.feed(chunk)
        if detached:
            return
        withheld = watcher.flush()
        assert passed + withheld == chunk
        assert keys.startswith(withheld)
        assert len(withheld) < len(keys)


def test_a_beginning_is_withheld_until_it_is_decided() -> None:
    watcher = DetachFilter(DEFAULT)
    assert watcher.feed(b"ls\x10") == (b"ls", False)
    assert watcher.feed(b"x") == (b"\x10x", False)
    assert watcher.feed(b"\x10") == (b"", False)
    assert watcher.feed(b"\x11") == (b"", True)


def test_the_byte_that_breaks_a_match_may_begin_the_next() -> None:
    assert feed_all(DetachFilter(DEFAULT), [b"\x10", b"\x10", b"\x11"]) == (b"\x10", True)
    assert feed_all(DetachFilter(b"aab"), [b"aa", b"ab"]) == (b"a", True)


def test_a_match_that_breaks_in_a_later_read_is_passed_on_once() -> None:
    assert feed_all(DetachFilter(b"abc"), [b"a", b"bx"]) == (b"abx", False)


def test_eof_gives_back_what_was_withheld() -> None:
    watcher = DetachFilter(DEFAULT)
    watcher.feed(b"x\x10")
    assert watcher.flush() == b"\x10"
    assert watcher.flush() == b""


def test_input_behind_the_sequence_is_dropped() -> None:
    watcher = DetachFilter(DEFAULT)
    assert watcher.feed(b"a\x10\x11rm") == (b"a", True)
    assert watcher.feed(b" -rf") == (b"", True)
    assert watcher.flush() == b""


def test_no_keys_detach_never() -> None:
    assert feed_all(DetachFilter(b""), [b"\x10\x11", b"", b"x"]) == (b"\x10\x11x", False)
