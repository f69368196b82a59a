"""conmon's lines, as conmon prints them, as a dying one leaves them, and as nobody should send them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from execgate.wire.sync_pipe import MAX_LINE, SyncLines, SyncMessage


def read(*chunks: bytes) -> list[SyncMessage]:
    """Return the messages of the chunks and of EOF behind them."""
    lines = SyncLines()
    return [message for chunk in chunks for message in lines.feed(chunk)] + lines.finish()


def conmon_line(data: int, message: bytes) -> bytes:
    """Print a line as conmon 2.1.6 does: escapes by hand, 0x1f and bytes from 0x80 on left as they are."""
    escapes = {0x0A: b"\\n", 0x09: b"\\t", 0x22: b'\\"', 0x5C: b"\\\\"}
    body = b"".join(
        escapes.get(byte, b"\\u00%02x" % byte if 0 < byte < 0x1F or byte == 0x7F else bytes([byte])) for byte in message
    )
    return b'{"data": %d, "message": "%s"}\n' % (data, body)


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (b'{"data": 0}\n', [SyncMessage(0)]),
        (b'{"data": 4711}\n{"data": 137}\n', [SyncMessage(4711), SyncMessage(137)]),
        (b'{"data": -1, "message": "command timed out"}\n', [SyncMessage(-1, "command timed out")]),
        (b'{"data": -1, "message": "a\\nb \\"c\\" \\u001b[0m"}\n', [SyncMessage(-1, 'a\nb "c" \x1b[0m')]),
        (b'\n \n{"data":5}\r\n\n', [SyncMessage(5)]),
        (b'{"data": 2, "message": null, "new": [1]}\n', [SyncMessage(2)]),
        (b"", []),
    ],
)
def test_lines_are_messages(text: bytes, messages: list[SyncMessage]) -> None:
    assert read(text) == messages


@given(
    data=st.integers(-(2**31), 2**31 - 1),
    message=st.binary(max_size=60).filter(lambda text: b"\0" not in text),
)
def test_whatever_conmon_prints_is_read_at_every_boundary(data: int, message: bytes) -> None:
    line = conmon_line(data, message)
    expected = [SyncMessage(data, message.decode(errors="replace"))]
    assert read(*(bytes([byte]) for byte in line)) == expected
    for cut in range(len(line)):
        assert read(line[:cut], line[cut:]) == expected


@given(st.lists(st.integers(-1, 255)), st.data())
def test_several_lines_come_out_in_order_however_they_are_cut(codes: list[int], data: st.DataObject) -> None:
    text = b"".join(b'{"data": %d}\n' % code for code in codes)
    cut = data.draw(st.integers(0, len(text)))
    assert read(text[:cut], text[cut:]) == [SyncMessage(code) for code in codes]


def test_a_line_is_told_as_soon_as_it_is_there() -> None:
    lines = SyncLines()
    assert lines.feed(b'{"data": 7}\n{"data"') == [SyncMessage(7)]
    assert lines.feed(b": 8}\n") == [SyncMessage(8)]
    assert lines.finish() == []


def test_a_number_is_believed_only_when_it_is_whole() -> None:
    """A monitor that is killed while it writes 137 must not look like exit code 1 or 13."""
    line = b'{"data": 137, "message": "x"}'
    number_ends = line.index(b",")
    for end in range(1, len(line) + 1):
        (message,) = read(line[:end])
        assert message.data == (137 if end > number_ends else None)


@pytest.mark.parametrize(
    ("tail", "text"),
    [
        (b"the reason", "the reason"),
        (b"cut in an escape \\u00", "cut in an escape "),
        (b"cut in an escape \\", "cut in an escape "),
        (b"an escape of another language \\x1b", "an escape of another language "),
        (b"cut in UTF-8 \xc3", "cut in UTF-8 \N{REPLACEMENT CHARACTER}"),
    ],
)
def test_a_broken_line_keeps_its_number_and_the_readable_part(tail: bytes, text: str) -> None:
    assert read(b'{"data": -1, "message": "' + tail) == [SyncMessage(-1, text)]


def test_a_line_beyond_the_bound_is_cut_and_the_next_one_is_read() -> None:
    """3 KiB of escape characters, as a colourful runtime may print, become 18 KiB in conmon's notation."""
    lines = SyncLines()
    (long, short) = lines.feed(conmon_line(-1, b"\x1b" * 3072) + b'{"data": 3}\n')
    assert long.data == -1
    assert 2700 < len(long.message) < 3072
    assert set(long.message) == {"\x1b"}
    assert short == SyncMessage(3)


def test_a_line_without_end_is_held_up_to_the_bound() -> None:
    lines = SyncLines()
    for _ in range(100):
        assert lines.feed(b"x" * 1000) == []
    assert lines.finish() == [SyncMessage(None, "x" * MAX_LINE)]


@pytest.mark.parametrize(
    "line",
    [
        b"panic: runtime error",
        b"[" * MAX_LINE,
        b'{"a":' * (MAX_LINE // 5),
        b"null",
        b"[1]",
        b"{}",
        b'{"data": true}',
        b'{"data": 1.5}',
        b'{"data": "1"}',
        b'{"data": NaN}',
        b'{"data": 2147483648}',
        b'{"data": 9999999999, "message": "',
        b'{"data": ' + b"9" * 10_000 + b"}",
        b'{"pid": 1}',
        b"\xff\xfe\x00",
    ],
)
def test_a_line_that_is_not_conmons_has_no_number(line: bytes) -> None:
    assert read(line + b"\n") == [SyncMessage(None, line.decode(errors="replace"))]


def test_lone_surrogates_do_not_get_into_the_text() -> None:
    for line in (b'{"data": -1, "message": "a\\ud800b"}\n', b'{"data": -1, "message": "a\\ud800b'):
        assert read(line) == [SyncMessage(-1, "a?b")]


starts = st.sampled_from([b"", b'{"data": ', b'{"data": 1, "message": "', b"{", b"["])


@given(st.lists(st.tuples(starts, st.binary(max_size=40)).map(b"".join), max_size=6))
def test_no_bytes_break_it(chunks: list[bytes]) -> None:
    for message in read(*chunks):
        json.dumps(message.message).encode()
        message.message.encode()
