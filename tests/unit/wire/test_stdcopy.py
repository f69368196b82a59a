"""Docker's frames: written as the daemon writes them, read at every chunk boundary."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from execgate.model.errors import InvalidArgument
from execgate.wire.stdcopy import (
    HEADER_SIZE,
    MAX_PAYLOAD,
    STDERR,
    STDIN,
    STDOUT,
    SYSTEMERR,
    Demultiplexer,
    frame_header,
)

Frames = list[tuple[int, bytes]]

frames = st.lists(st.tuples(st.sampled_from([STDIN, STDOUT, STDERR, SYSTEMERR]), st.binary(max_size=20)), max_size=8)


def encode(pieces: Frames) -> bytes:
    return b"".join(frame_header(stream, len(payload)) + payload for stream, payload in pieces)


def streams(pieces: Frames) -> Frames:
    """Join neighbours of one stream: where a frame was cut is no part of the meaning."""
    joined: Frames = []
    for stream, payload in pieces:
        if joined and joined[-1][0] == stream:
            joined[-1] = (stream, joined[-1][1] + payload)
        elif payload:
            joined.append((stream, payload))
    return joined


@pytest.mark.parametrize(
    ("stream", "length", "header"),
    [
        (STDOUT, 0, b"\x01\0\0\0\0\0\0\0"),
        (STDOUT, 6, b"\x01\0\0\0\0\0\0\x06"),
        (STDERR, 0x01020304, b"\x02\0\0\0\x01\x02\x03\x04"),
        (SYSTEMERR, MAX_PAYLOAD, b"\x03\0\0\0\xff\xff\xff\xff"),
    ],
)
def test_header_is_the_stream_three_zeros_and_the_length_big_endian(stream: int, length: int, header: bytes) -> None:
    assert frame_header(stream, length) == header
    assert len(header) == HEADER_SIZE


@given(frames, st.data())
def test_any_cutting_gives_the_same_streams(pieces: Frames, data: st.DataObject) -> None:
    encoded = encode(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(encoded)))))
    demultiplexer = Demultiplexer()
    received: Frames = []
    for start, end in zip([0, *cuts], [*cuts, len(encoded)], strict=True):
        received += demultiplexer.feed(encoded[start:end])
    assert streams(received) == streams(pieces)
    assert all(payload for _, payload in received)
    assert demultiplexer.at_boundary


@given(frames, st.data())
def test_an_end_inside_a_frame_is_told_from_one_between_frames(pieces: Frames, data: st.DataObject) -> None:
    encoded = encode(pieces)
    end = data.draw(st.integers(0, len(encoded)))
    whole = {len(encode(pieces[:count])) for count in range(len(pieces) + 1)}
    demultiplexer = Demultiplexer()
    demultiplexer.feed(encoded[:end])
    assert demultiplexer.at_boundary is (end in whole)


def test_payload_comes_out_as_it_arrives_whatever_length_is_claimed() -> None:
    demultiplexer = Demultiplexer()
    assert demultiplexer.feed(frame_header(STDOUT, MAX_PAYLOAD)) == []
    for _ in range(3):
        assert demultiplexer.feed(b"x" * 1000) == [(STDOUT, b"x" * 1000)]
    assert not demultiplexer.at_boundary


@pytest.mark.parametrize(
    "data",
    [
        b"\x04\0\0\0\0\0\0\x01",
        b"\x01\0\x01\0\0\0\0\x01",
        b"/ # ls\r\n",  # a TTY's bytes, which nobody framed
    ],
)
def test_what_is_no_header_is_an_error_however_it_is_cut(data: bytes) -> None:
    for cut in range(len(data)):
        demultiplexer = Demultiplexer()
        demultiplexer.feed(data[:cut])
        with pytest.raises(InvalidArgument, match="not a frame"):
            demultiplexer.feed(data[cut:])
