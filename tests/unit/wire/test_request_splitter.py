"""The delimiter in front of the HTTP server: every cut, every limit, every lie about where a request ends."""

import asyncio
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser
from hypothesis import given
from hypothesis import strategies as st

from execgate.wire.request_head import (
    MAX_CHUNK_LINE,
    MAX_EMPTY_LINES,
    MAX_EXTENSIONS,
    MAX_FIELDS,
    MAX_HEAD,
    MAX_REQUEST_LINE,
    MAX_TRAILERS,
    BadRequest,
    Body,
    End,
    Event,
    Head,
    NeedData,
    RequestSplitter,
)

GET = b"GET /_ping HTTP/1.1\r\nHost: docker\r\n\r\n"
CHUNKED = b"POST /x HTTP/1.1\r\nHost: docker\r\nTransfer-Encoding: chunked\r\n\r\n"
START = (
    b"POST /v1.44/exec/" + b"a" * 64 + b"/start HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n"
    b'Content-Type: application/json\r\nContent-Length: 29\r\n\r\n{"Detach":false,"Tty": false}'
)


def drain(splitter: RequestSplitter) -> Iterator[Event]:
    while not isinstance(event := splitter.next_event(), NeedData):
        yield event


def join_bodies(events: Iterable[Event]) -> list[Event]:
    """Join neighbouring pieces of a body: only how it is cut depends on how it came."""
    joined: list[Event] = []
    for event in events:
        if isinstance(event, Body) and joined and isinstance(last := joined[-1], Body):
            joined[-1] = Body(last.raw + event.raw)
        else:
            joined.append(event)
    return joined


def split(chunks: Iterable[bytes], splitter: RequestSplitter | None = None) -> list[Event]:
    splitter = splitter or RequestSplitter()
    events: list[Event] = []
    for chunk in chunks:
        splitter.feed(chunk)
        events += drain(splitter)
    return join_bodies(events)


def one_byte_at_a_time(data: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in data]


def refusal(chunks: Iterable[bytes], splitter: RequestSplitter | None = None) -> int:
    """Return the status with which the chunks are refused."""
    with pytest.raises(BadRequest) as caught:
        split(chunks, splitter)
    return caught.value.status


def cut(data: bytes, positions: Sequence[int]) -> list[bytes]:
    return [data[start:end] for start, end in zip([0, *positions], [*positions, len(data)], strict=True)]


# Requests as bytes together with the events that they are.


@dataclass(frozen=True)
class Sample:
    raw: bytes
    events: list[Event]


names = st.from_regex(r"[A-Za-z][A-Za-z0-9-]{0,8}", fullmatch=True).map(lambda name: f"X-{name}")
values = st.text(st.characters(min_codepoint=0x21, max_codepoint=0xFF, exclude_categories=["Cc"]), max_size=12)
extra_fields = st.lists(st.tuples(names, values.filter(lambda value: value.strip(" \t") == value)), max_size=4)
targets = st.sampled_from(["/", "/_ping", "/exec/a%2F/start?h=1&w=2", "/events?filters={}", "http://h:1/a?b"])


@st.composite
def chunked_bodies(draw: st.DrawFn) -> bytes:
    raw = b""
    for data in draw(st.lists(st.binary(min_size=1, max_size=20), max_size=4)):
        extension = draw(st.sampled_from([b"", b";a", b';a="b; c"']))
        raw += b"%x%b\r\n%b\r\n" % (len(data), extension, data)
    trailers = draw(st.sampled_from([b"", b"X-Sum: 1\r\n", b"X-A: 1\r\nX-B:\r\n"]))
    return raw + draw(st.sampled_from([b"0", b"000", b"0;last"])) + b"\r\n" + trailers + b"\r\n"


@st.composite
def requests(draw: st.DrawFn) -> Sample:
    kind = draw(st.sampled_from(["none", "sized", "chunked"]))
    version = (1, draw(st.integers(0, 1))) if kind != "chunked" else (1, 1)
    body = {
        "none": st.just(b""),
        # bodies that look like HTTP, or like the end of a chunk
        "sized": st.binary(max_size=60) | st.sampled_from([GET, START, b"\r\n\r\n", b"0\r\n\r\n"]),
        "chunked": chunked_bodies(),
    }[kind]
    content = draw(body)
    fields = [("Host", draw(st.sampled_from(["docker", "", "h:1"]))), *draw(extra_fields)]
    if kind == "sized":
        fields.append(("Content-Length", "0" * draw(st.integers(0, 2)) + str(len(content))))
    if kind == "chunked":
        fields.append(("Transfer-Encoding", draw(st.sampled_from(["chunked", "CHUNKED"]))))
    fields = draw(st.permutations(fields))
    method, target = draw(st.sampled_from(["GET", "POST", "HEAD"])), draw(targets)
    head = f"{method} {target} HTTP/{version[0]}.{version[1]}\r\n".encode()
    head += b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in fields) + b"\r\n"
    event = Head(
        method=method,
        target=target,
        http_version=version,
        content_length=len(content) if kind == "sized" else None,
        chunked=kind == "chunked",
        fields=tuple((name.lower(), value) for name, value in fields),
        raw=head,
    )
    return Sample(head + content, [event, *([Body(content)] if content else []), End()])


pipelines = st.lists(requests(), min_size=1, max_size=3)


@given(pipelines, st.data())
def test_any_cutting_of_pipelined_requests_gives_the_same_events(samples: list[Sample], data: st.DataObject) -> None:
    raw = b"".join(sample.raw for sample in samples)
    events = [event for sample in samples for event in sample.events]
    assert split([raw]) == events
    assert split(one_byte_at_a_time(raw)) == events
    assert split(cut(raw, sorted(data.draw(st.lists(st.integers(0, len(raw))))))) == events


@pytest.mark.parametrize("raw", [GET, START, CHUNKED + b"5;x=y\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n", b"\r\n\r\n" + GET])
def test_every_boundary_gives_the_same_events(raw: bytes) -> None:
    pipelined = raw + GET
    events = split([pipelined])
    assert sum(isinstance(event, End) for event in events) == 2
    for position in range(len(pipelined)):
        assert split([pipelined[:position], pipelined[position:]]) == events


@given(pipelines, st.binary(max_size=40), st.data())
def test_what_follows_the_last_request_is_handed_out_untouched(
    samples: list[Sample], rest: bytes, data: st.DataObject
) -> None:
    """Bytes behind a start request are stdin, however early they come, and whatever they look like."""
    raw = b"".join(sample.raw for sample in samples) + rest
    splitter, ends, stdin = RequestSplitter(), 0, b""
    for chunk in cut(raw, sorted(data.draw(st.lists(st.integers(0, len(raw)))))):
        splitter.feed(chunk)
        while ends < len(samples) and not isinstance(event := splitter.next_event(), NeedData):
            ends += isinstance(event, End)
        if ends == len(samples):
            stdin += splitter.take_rest()
    assert stdin == rest


@st.composite
def damaged_pipelines(draw: st.DrawFn) -> bytes:
    raw = bytearray(b"".join(sample.raw for sample in draw(pipelines)))
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, len(raw)))
        length = draw(st.integers(0, 3))
        damage = st.sampled_from([b"", b"\r", b"\n", b"\0", b" ", b"\r\n", b":", b"\x80", b"0", b";"])
        raw[position : position + length] = draw(damage | st.binary(max_size=3))
    return bytes(raw)


@given(damaged_pipelines())
def test_a_refusal_does_not_depend_on_the_cutting(raw: bytes) -> None:
    outcomes: list[list[Event] | tuple[int, str]] = []
    for chunks in ([raw], one_byte_at_a_time(raw), [raw[:9], raw[9:]]):
        try:
            outcomes.append(split(chunks))
        except BadRequest as error:
            outcomes.append((error.status, error.message))
    assert outcomes[0] == outcomes[1] == outcomes[2]


fragments = st.sampled_from(
    [
        b"GET / HTTP/1.1\r\n",
        b"Host: a\r\n",
        b"\r\n",
        b"\n",
        b"Content-Length: 5\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"5\r\nhello\r\n",
        b"0\r\n\r\n",
        b" HTTP/1.1",
        b"http://",
        b"9" * 20,
        b"ffffffffffffffff\r\n",
        b"\0",
    ]
)


@given(st.lists(st.binary(max_size=50) | fragments, max_size=20))
def test_random_bytes_raise_nothing_but_a_refusal(chunks: list[bytes]) -> None:
    status = None
    try:
        split(chunks)
    except BadRequest as error:
        status = error.status
    assert status in (None, 400, 413, 414, 431, 501, 505)


@given(st.lists(st.binary(max_size=30) | fragments, max_size=12))
def test_no_byte_is_lost_or_invented(chunks: list[bytes]) -> None:
    """Events and rest together are the input, but for the empty lines before a request."""
    splitter = RequestSplitter()
    try:
        events = split(chunks, splitter)
    except BadRequest:
        return
    handed_on = b"".join(event.raw for event in events if not isinstance(event, End))
    received = b"".join(chunks)
    if not received.startswith(b"\r\n"):
        dropped = len(received) - len(handed_on) - splitter.buffered
        ends = sum(isinstance(event, End) for event in events)
        assert 0 <= dropped <= 2 * MAX_EMPTY_LINES * ends
        assert received.endswith(splitter.take_rest())


# What a head says.


def test_a_head_answers_in_any_case_and_keeps_what_it_was() -> None:
    raw = b"POST http://h/a%20b?c=/d HTTP/1.0\r\nX-A: 1\r\nx-a:  2 \r\nUPGRADE: tcp\r\n\r\n"
    (head, end) = split([raw])
    assert isinstance(head, Head)
    assert isinstance(end, End)
    assert head.raw == raw
    assert (head.method, head.http_version) == ("POST", (1, 0))
    assert (head.content_length, head.chunked) == (None, False)
    assert head.header("Upgrade") == "tcp"
    assert head.header("X-a") == "1"
    assert head.headers("X-A") == ("1", "2")
    assert head.header("Host") is None
    assert head.headers("Host") == ()


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/", "/"),
        ("/a/b%2Fc?d=/e?f", "/a/b%2Fc"),
        ("//a/b", "//a/b"),
        ("/http://x/y", "/http://x/y"),
        ("http://h", "/"),
        ("http://h?q=/a", "/"),
        ("HTTP://h:80/a/b?c", "/a/b"),
    ],
)
def test_the_path_is_that_of_the_target(target: str, path: str) -> None:
    head = split([b"GET %b HTTP/1.1\r\nHost: h\r\n\r\n" % target.encode()])[0]
    assert isinstance(head, Head)
    assert (head.target, head.path) == (target, path)


def test_the_path_is_known_from_the_first_line_to_the_end_and_after_a_refusal() -> None:
    splitter = RequestSplitter()
    seen = []
    for chunk in (b"GET /_ping?x HTTP/1.1", b"\r\n", b"Host: docker\r\n", b"\r\n"):
        splitter.feed(chunk)
        list(drain(splitter))
        seen.append(splitter.path)
    assert seen == [None, "/_ping", "/_ping", None]
    assert refusal([b"GET http://x/info HTTP/1.1\r\nno field\r\n"], splitter) == 400
    assert splitter.path == "/info"


def test_a_repr_tells_no_secret() -> None:
    head = split([b"GET / HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer hunter2\r\n\r\n"])[0]
    assert "hunter2" not in repr(head)
    assert "GET" in repr(head)


# Stopping.


def test_it_stops_at_the_end_of_a_request_until_it_is_asked() -> None:
    splitter = RequestSplitter()
    splitter.feed(START + GET)
    head, body, end = splitter.next_event(), splitter.next_event(), splitter.next_event()
    assert isinstance(head, Head)
    assert isinstance(body, Body)
    assert end == End()
    assert head.raw + body.raw == START
    assert splitter.buffered == len(GET)
    assert splitter.take_rest() == GET
    assert splitter.take_rest() == b""
    assert splitter.next_event() == NeedData()
    assert splitter.idle


def test_empty_lines_behind_a_request_are_stdin_when_nobody_asks_for_another_request() -> None:
    splitter = RequestSplitter()
    splitter.feed(START + b"\r\n\r\n\r\nexit\n")
    while splitter.next_event() != End():
        pass
    assert splitter.take_rest() == b"\r\n\r\n\r\nexit\n"


def test_idle_is_only_the_place_between_requests() -> None:
    splitter = RequestSplitter()
    whole = b"\r\n" + CHUNKED + b"1\r\nx\r\n0\r\n\r\n"
    assert splitter.idle
    for position, chunk in enumerate(one_byte_at_a_time(whole), start=1):
        splitter.feed(chunk)
        list(drain(splitter))
        assert splitter.idle is (position == len(whole))


def test_a_refusal_is_final() -> None:
    splitter = RequestSplitter()
    assert refusal([b"GET / HTTP/2.0\r\n"], splitter) == 505
    splitter.feed(GET)
    for _ in range(2):
        with pytest.raises(BadRequest, match=r"only HTTP/1.0 and HTTP/1.1") as caught:
            splitter.next_event()
        assert caught.value.status == 505
    assert splitter.buffered == 0
    assert splitter.take_rest() == b""


def test_a_body_is_handed_on_as_it_comes() -> None:
    splitter = RequestSplitter()
    splitter.feed(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9223372036854775807\r\n\r\n")
    assert isinstance(splitter.next_event(), Head)
    for _ in range(3):
        splitter.feed(b"x" * 100_000)
        assert splitter.next_event() == Body(b"x" * 100_000)
        assert splitter.next_event() == NeedData()
        assert splitter.buffered == 0


def test_a_huge_chunk_is_handed_on_as_it_comes() -> None:
    splitter = RequestSplitter()
    splitter.feed(CHUNKED + b"7fffffffffffffff\r\nabc")
    assert isinstance(splitter.next_event(), Head)
    assert splitter.next_event() == Body(b"7fffffffffffffff\r\nabc")
    splitter.feed(b"def")
    assert splitter.next_event() == Body(b"def")
    assert splitter.buffered == 0


# Limits: the last byte that fits, and the first that does not; at once and byte by byte.


def assert_fits(raw: bytes) -> None:
    for chunks in ([raw], one_byte_at_a_time(raw)):
        assert split(chunks)[-1] == End()


def assert_refused(raw: bytes, status: int, *, max_body: int | None = None) -> None:
    for chunks in ([raw], one_byte_at_a_time(raw)):
        splitter = RequestSplitter() if max_body is None else RequestSplitter(max_body=max_body)
        assert refusal(chunks, splitter) == status


def test_the_request_line_is_bounded() -> None:
    def request(line_size: int) -> bytes:
        return b"GET /" + b"x" * (line_size - len("GET / HTTP/1.1\r\n")) + b" HTTP/1.1\r\nHost: h\r\n\r\n"

    assert_fits(request(MAX_REQUEST_LINE))
    assert_refused(request(MAX_REQUEST_LINE + 1), 414)
    assert_refused(b"x" * MAX_REQUEST_LINE, 414)  # no need to wait for its end


def test_the_head_is_bounded() -> None:
    def request(head_size: int) -> bytes:
        start, end = b"GET / HTTP/1.1\r\nHost: h\r\nX: ", b"\r\n\r\n"
        return start + b"x" * (head_size - len(start) - len(end)) + end

    assert_fits(request(MAX_HEAD))
    assert_refused(request(MAX_HEAD + 1), 431)
    assert_refused(request(MAX_HEAD + 2), 431)
    assert_refused(b"GET / HTTP/1.1\r\n" + b"x" * MAX_HEAD, 431)


def test_the_number_of_fields_is_bounded() -> None:
    def request(fields: int) -> bytes:
        return b"GET / HTTP/1.1\r\nHost: h\r\n" + b"x:\r\n" * (fields - 1) + b"\r\n"

    assert_fits(request(MAX_FIELDS))
    assert_refused(request(MAX_FIELDS + 1), 431)


def test_chunk_size_lines_are_bounded() -> None:
    def request(line_size: int) -> bytes:
        return CHUNKED + b"1;" + b"x" * (line_size - 4) + b"\r\nA\r\n0\r\n\r\n"

    assert_fits(request(MAX_CHUNK_LINE))
    assert_refused(request(MAX_CHUNK_LINE + 1), 400)
    assert_refused(CHUNKED + b"0" * MAX_CHUNK_LINE, 400)


def test_chunk_extensions_of_a_body_are_bounded_together() -> None:
    def chunk(extension_size: int) -> bytes:
        return b"1;" + b"x" * (extension_size - 1) + b"\r\nA\r\n"

    full = CHUNKED + chunk(1000) * (MAX_EXTENSIONS // 1000) + chunk(MAX_EXTENSIONS % 1000)
    assert_fits((full + b"0\r\n\r\n") * 2)
    assert_refused(full + b"0;\r\n\r\n", 400)


def test_trailers_are_bounded_together() -> None:
    def request(trailers_size: int) -> bytes:
        line = b"x: " + b"y" * 95 + b"\r\n"
        lines = line * ((trailers_size - 110) // len(line))
        last = b"z:" + b"z" * (trailers_size - len(lines) - len(b"z:\r\n\r\n")) + b"\r\n\r\n"
        return CHUNKED + b"0\r\n" + lines + last

    assert len(request(MAX_TRAILERS)) == len(CHUNKED) + 3 + MAX_TRAILERS
    assert_fits(request(MAX_TRAILERS))
    assert_refused(request(MAX_TRAILERS + 1), 431)


def test_empty_lines_before_a_request_are_bounded() -> None:
    assert_fits(b"\r\n" * MAX_EMPTY_LINES + GET)
    assert_fits((b"\r\n" * MAX_EMPTY_LINES + GET) * 2)
    assert_refused(b"\r\n" * (MAX_EMPTY_LINES + 1), 400)


def test_a_body_is_bounded_when_the_caller_says_so() -> None:
    sized = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n"
    assert split([sized % 10 + b"x" * 10], RequestSplitter(max_body=10))[-1] == End()
    assert_refused(sized % 11, 413, max_body=10)
    fitting = CHUNKED + b"6;x\r\nabcdef\r\n4\r\nghij\r\n0\r\n\r\n"
    assert split([fitting * 2], RequestSplitter(max_body=10))[-1] == End()
    assert_refused(CHUNKED + b"6\r\nabcdef\r\n5\r\n", 413, max_body=10)


def test_chunks_do_not_add_up_beyond_any_number() -> None:
    splitter = RequestSplitter()
    splitter.feed(CHUNKED + b"1\r\nx\r\n7fffffffffffffff\r\n")
    assert isinstance(splitter.next_event(), Head)
    with pytest.raises(BadRequest) as caught:
        splitter.next_event()
    assert caught.value.status == 413


class CountingBuffer(bytearray):
    """Counts the bytes that are searched for line ends and those that are cut off."""

    searched = 0
    cut_off = 0

    def find(self, sub: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None, /) -> int:
        found = super().find(sub, start, end)
        first = int(start or 0)
        last = found + 1 if found >= 0 else min(len(self), int(len(self) if end is None else end))
        self.searched += max(0, last - first)
        return found

    def __delitem__(self, key: Any) -> None:
        before = len(self)
        super().__delitem__(key)
        self.cut_off += before - len(self)


@pytest.mark.parametrize("size", [1, 2, 7, 100_000])
def test_every_byte_is_searched_once(size: int) -> None:
    head = b"GET /" + b"x" * 8000 + b" HTTP/1.1\r\nHost: h\r\n" + b"Y: " + b"y" * 20_000 + b"\r\n\r\n"
    body = CHUNKED + (b"1;" + b"e" * 900 + b"\r\nx\r\n") * 10 + b"0\r\nT: " + b"t" * 8000 + b"\r\n\r\n"
    raw = (head + body) * 2
    splitter, buffer = RequestSplitter(), CountingBuffer()
    splitter._buffer = buffer
    events = split([raw[start : start + size] for start in range(0, len(raw), size)], splitter)
    assert sum(isinstance(event, End) for event in events) == 4
    assert buffer.cut_off == len(raw)
    looked_at = len(raw) if size < len(head) else 2 * len(body)  # a whole head is matched, not searched
    assert looked_at * 0.9 < buffer.searched <= looked_at


# Lies about where a request ends (RFC 9112 11.2, request smuggling), and bytes that have no place in one.

HOST = b"Host: h\r\n"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET / HTTP/1.1\n" + HOST + b"\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"\n", 400),
        (b"\nGET / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET / HTTP/1.1\r\r\n" + HOST + b"\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\rX: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n Host: h\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b" folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: \0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length : 1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n", 501),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (CHUNKED + b"5\nhello\r\n0\r\n\r\n", 400),
        (CHUNKED + b"5\r\nhello\n0\r\n\r\n", 400),
        (CHUNKED + b"5\r\nhello\r0\r\n\r\n", 400),
        (CHUNKED + b"5\r\nhelloX\r\n0\r\n\r\n", 400),
        (CHUNKED + b"5\r\nhello0\r\n\r\n", 400),
        (CHUNKED + b"5;a\nb\r\nhello\r\n0\r\n\r\n", 400),
        (CHUNKED + b"\r\n", 400),
        (CHUNKED + b"-1\r\n", 400),
        (CHUNKED + b"0\r\nX: y\n\r\n", 400),
        (CHUNKED + b"0\r\n folded\r\n\r\n", 400),
        (CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n", 400),
        (CHUNKED + b"0\r\nGET / HTTP/1.1\r\n\r\n", 400),
        (CHUNKED + b"5 ;a\r\nhello\r\n0\r\n\r\n", 400),
        (b"CONNECT / HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\n\r\nhi", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"\x16\x03\x01\x00\x05hello\r\n", 400),
    ],
)
def test_ambiguous_bytes_are_refused(raw: bytes, status: int) -> None:
    assert_refused(raw, status)


# The parser behind us must see what we saw: one request, with its whole body, and nothing left over.


def read_with_aiohttp(raw: bytes) -> list[tuple[str, str, bytes]]:
    """Return the `(method, path, body)` that aiohttp's parser finds in `raw`. Raises HttpProcessingError."""
    loop = asyncio.new_event_loop()
    try:
        parser = HttpRequestParser(BaseProtocol(loop), loop, 2**16, max_line_size=MAX_REQUEST_LINE)
        messages, upgraded, tail = parser.feed_data(raw)
        assert not upgraded
        assert not tail
        found = []
        for message, payload in messages:
            if error := payload.exception():
                raise error
            assert payload.is_eof()
            found.append((message.method, message.path, payload.read_nowait()))
        return found
    finally:
        loop.close()


def decode_chunks(raw: bytes) -> bytes:
    content = b""
    while size := int((line := raw[: raw.index(b"\r\n")]).partition(b";")[0], 16):
        start = len(line) + 2
        content += raw[start : start + size]
        raw = raw[start + size + 2 :]
    return content


def by_request(events: Iterable[Event]) -> Iterator[tuple[bytes, tuple[str, str, bytes]]]:
    """Yield the bytes of each whole request, and what aiohttp should make of them."""
    events = iter(events)
    for head in events:
        assert isinstance(head, Head)
        body = b""
        for event in events:
            if isinstance(event, End):
                content = decode_chunks(body) if head.chunked else body
                yield head.raw + body, (head.method, head.target, content)
                break
            assert isinstance(event, Body)
            body += event.raw


@given(pipelines)
def test_aiohttp_sees_the_same_requests(samples: list[Sample]) -> None:
    seen = list(by_request(split([b"".join(sample.raw for sample in samples)])))
    assert len(seen) == len(samples)
    for raw, request in seen:
        assert read_with_aiohttp(raw) == [request]


@given(damaged_pipelines())
def test_aiohttp_sees_the_same_request_or_none_in_what_we_let_through(raw: bytes) -> None:
    """The smuggling test: there is nothing that both accept and delimit in two ways."""
    splitter = RequestSplitter()
    events: list[Event] = []
    splitter.feed(raw)
    with contextlib.suppress(BadRequest):
        events.extend(drain(splitter))
    for request_raw, request in by_request(join_bodies(events)):
        with contextlib.suppress(HttpProcessingError):
            assert read_with_aiohttp(request_raw) == [request]
