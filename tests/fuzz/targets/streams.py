"""What comes in pieces: from a process, its monitor, its runtime, and from a client's terminal."""

import re
from collections.abc import Sequence

from execgate.model.errors import Internal, InvalidArgument
from execgate.runtime.failures import MESSAGE_LIMIT, last_error, printable, start_failure
from execgate.sessions.segment import frames
from execgate.wire import stdcopy
from execgate.wire.attach import INPUT_MAX, PACKET_READ_SIZE, input_packets, parse_packet
from execgate.wire.detach_keys import MAX_KEYS, DetachFilter, format_detach_keys, parse_detach_keys
from execgate.wire.stdcopy import Demultiplexer
from execgate.wire.sync_pipe import MAX_LINE, SyncLines, SyncMessage
from fuzz.target import Target, cuttings

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def stdcopy_frames(data: bytes) -> None:
    """The multiplexed stream: cuts do not matter, every byte is a header's or somebody's, and it can be written again.

    A segment of captured output is the same frames with a mark in a byte that is unused, and may end anywhere.
    """
    whole = _demultiplexed([data])
    for chunks in cuttings(data):
        assert _demultiplexed(chunks) == whole
    pieces, at_boundary, failed = whole
    assert failed is not _begins_with_headers(data)
    assert sum(len(payload) for _, payload in pieces) <= len(data)
    again = b"".join(stdcopy.frame_header(stream, len(payload)) + payload for stream, payload in pieces)
    assert _demultiplexed([again]) == (pieces, True, False)
    _check_segment(data, pieces if at_boundary and not failed else None)


def _demultiplexed(chunks: Sequence[bytes]) -> tuple[list[tuple[int, bytes]], bool, bool]:
    """Return the pieces of one stream joined, whether it may end here, and whether it was refused.

    With a refusal the pieces are those before it in earlier chunks only, so none are told.
    """
    reader, joined = Demultiplexer(), list[tuple[int, bytes]]()
    for chunk in chunks:
        try:
            pieces = reader.feed(chunk)
        except InvalidArgument:
            return [], False, True
        for stream, payload in pieces:
            assert payload
            assert stream <= stdcopy.SYSTEMERR
            if joined and joined[-1][0] == stream:
                joined[-1] = (stream, joined[-1][1] + payload)
            else:
                joined.append((stream, payload))
    return joined, reader.at_boundary, False


def _begins_with_headers(data: bytes) -> bool:
    """Return whether where a header must be, there is one."""
    while len(data) >= stdcopy.HEADER_SIZE:
        if data[0] > 3 or data[1:4] != bytes(3):
            return False
        data = data[stdcopy.HEADER_SIZE + int.from_bytes(data[4:8]) :]
    return True


def _check_segment(data: bytes, pieces: list[tuple[int, bytes]] | None) -> None:
    """Hold that the frames of a file follow each other, fit into it, and are those of a stream that is whole."""
    position = 0
    for frame in frames(data):
        assert frame.position == position
        position += stdcopy.HEADER_SIZE + len(frame.data)
        assert data[position - len(frame.data) : position] == frame.data
    rest = data[position:]
    assert position <= len(data)
    assert len(rest) < stdcopy.HEADER_SIZE or stdcopy.parse_header(rest)[1] > len(rest) - stdcopy.HEADER_SIZE
    if pieces is not None:
        assert not rest
        assert b"".join(frame.data for frame in frames(data)) == b"".join(payload for _, payload in pieces)


def attach_packets(data: bytes) -> None:
    """A packet of conmon is a stream and the bytes behind its prefix, or Internal; input is cut into whole packets."""
    packet = data[:PACKET_READ_SIZE]
    try:
        stream, payload = parse_packet(packet)
    except Internal as error:
        assert not packet or packet[0] not in (2, 3)
        assert len(error.hint) < 100
        assert not _UNPRINTABLE.search(error.hint)
    else:
        assert stream == {2: stdcopy.STDOUT, 3: stdcopy.STDERR}[packet[0]]
        assert packet == packet[:1] + payload
    packets = list(input_packets(data))
    assert b"".join(packets) == data
    assert all(0 < len(one) <= INPUT_MAX for one in packets)


def detach_keys(data: bytes) -> None:
    """Keys on the first line, input behind it: it detaches exactly when the input contains the keys."""
    text, _, typed = data.partition(b"\n")
    written = text.decode(errors="surrogateescape")
    try:
        keys = parse_detach_keys(written)
    except InvalidArgument as error:
        assert len(error.message) <= len(written) + 50
        assert not _reads_as_keys(written)
        keys = text[:MAX_KEYS]  # the filter takes any bytes
    else:
        assert _reads_as_keys(written)
        assert len(keys) == written.count(",") + 1 <= MAX_KEYS
        if b"," not in keys:
            assert parse_detach_keys(format_detach_keys(keys)) == keys
    before, found, _ = typed.partition(keys) if keys else (typed, b"", b"")
    for chunks in ([typed], *cuttings(typed)):
        assert _filtered(keys, chunks) == (before, bool(found))


def _reads_as_keys(text: str) -> bool:
    """Return whether a list of keys is one by the grammar of Docker's documentation, with its bound."""
    key = r"(?:[\x00-\x2b\x2d-\x7f]|ctrl-[@a-z\[\\\]^_]|DEL)"
    return re.fullmatch(rf"{key}(?:,{key}){{0,{MAX_KEYS - 1}}}", text, re.DOTALL) is not None


def _filtered(keys: bytes, chunks: Sequence[bytes]) -> tuple[bytes, bool]:
    """Return what passes, and whether it detaches, with a filter that is replaced behind each piece."""
    passed, detached, withheld = b"", False, b""
    for chunk in chunks:
        keeper = DetachFilter(keys, withheld)
        one, detached = keeper.feed(chunk)
        passed += one
        withheld = keeper.withheld
        assert len(withheld) < max(len(keys), 1)
        if detached:
            assert keeper.feed(chunk) == (b"", True)
            return passed, True
    return passed + DetachFilter(keys, withheld).flush(), detached


def sync_lines(data: bytes) -> None:
    """conmon's lines: cuts do not matter, what is kept is bounded, and a number that is whole is read right."""
    whole = _messages([data])
    for chunks in cuttings(data):
        assert _messages(chunks) == whole
    lines = [line for line in data.split(b"\n") if line[:MAX_LINE].strip()]
    assert len(whole) == len(lines)
    for line, message in zip(lines, whole, strict=True):
        assert len(message.message.encode()) <= 3 * MAX_LINE
        assert message.data is None or -(2**31) <= message.data < 2**31
        plain = re.fullmatch(rb'\{"data": (-?(?:0|[1-9][0-9]{0,8}))(?:, "message": "([ -!#-\[\]-~]*)")?\}', line)
        if plain is not None and len(line) <= MAX_LINE:
            assert message == SyncMessage(int(plain[1]), (plain[2] or b"").decode())


def _messages(chunks: Sequence[bytes]) -> list[SyncMessage]:
    reader = SyncLines()
    return [message for chunk in chunks for message in reader.feed(chunk)] + reader.finish()


def runtime_log(data: bytes) -> None:
    """A runtime's log: the message of its last error, which no terminal obeys, and an exit code that shells know."""
    message = last_error(data)
    assert len(message) <= len(data)
    for text in (message, data.decode(errors="replace")):
        shown = printable(text)
        assert len(shown) <= MESSAGE_LIMIT
        assert not _UNPRINTABLE.search(shown)
        failure = start_failure(text)
        assert failure.exit_code in (126, 127, 128)
        failure.message.encode()
        assert not _UNPRINTABLE.search(failure.message)


TARGETS = (
    Target(
        check=stdcopy_frames,
        tokens=(
            *(
                b"\x01\0\0\0\0\0\0\x05hello",
                b"\x02\0\0\0\0\0\0\x01x",
                b"\x00\0\0\0\0\0\0\x01x",
                b"\x03\0\0\0\0\0\0\x01x",
            ),
            *(
                b"\x01\0\0\0\0\0\0\0",
                b"\x01\x01\0\0\0\0\0\x01x",
                b"\x01\0\0\0\xff\xff\xff\xff",
                b"\x01\0\0\0\0\0\x01\0",
            ),
        ),
    ),
    Target(check=attach_packets, max_length=2 * INPUT_MAX, tokens=(b"\x02out", b"\x03err", b"\x01", b"\0", b"\xff")),
    Target(
        check=detach_keys,
        tokens=(
            *(
                b"ctrl-p,ctrl-q\n",
                b"ctrl-p",
                b"ctrl-@",
                b"ctrl-[",
                b"ctrl-_",
                b"ctrl-\\",
                b"DEL",
                b",",
                b"a,a,b\n",
                b"\n",
            ),
            *(
                b"\x10\x11",
                b"\x10",
                b"\x11",
                b"\0",
                b"aab",
                b"aa",
                b"ctrl-",
                b"a,b,a,c\n",
                b"abab",
                b"abac",
                b"\xc3\xa9",
            ),
        ),
    ),
    Target(
        check=sync_lines,
        max_length=2 * MAX_LINE,
        tokens=(
            *(
                b'{"data": 1}\n',
                b'{"data": -1, "message": "no"}\n',
                b'{"data"',
                b": 7",
                b', "message": "',
                b'"}',
                b"\n",
            ),
            *(
                b"2147483647",
                b"-2147483648",
                b"2147483648",
                b"1.0",
                b"true",
                b"null",
                b"\\u0000",
                b"\\ud800",
                b'\\"',
                b"\x1f",
            ),
            *(
                b"\xff",
                b"[[[[[[[[",
                b'{"":',
                b"\xed\xa0\x80",
                b"\\u00",
                b"  ",
                b"1e5",
                b"NaN",
                b"1" * 40,
                b"{",
                b"}",
                b"\r",
            ),
        ),
    ),
    Target(
        check=runtime_log,
        is_json=True,
        tokens=(
            *(b'{"level":"error","msg":"', b'"}\n', b'"level"', b'"msg"', b'"fatal"', b'"error"', b"permission denied"),
            *(
                b"no such file or directory",
                b"executable file not found",
                b"is a directory",
                b"\\u001b[31m",
                b"\\ud800",
                b"\n",
            ),
            *(
                b"open executable: operation not permitted",
                b"\x1b]0;",
                b"\xc2\x9b",
                b"[[[[",
                b"\xff",
                b"\xe2\x80\xa8",
                b"\r",
            ),
        ),
    ),
)
