"""HTTP/1.x line by line: what is accepted, and which status refuses the rest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from execgate.wire.http_grammar import (
    MAX_BODY,
    BadRequest,
    body_framing,
    check_host,
    parse_chunk_size,
    parse_field,
    parse_request_line,
    parse_trailer,
)

HTTP10, HTTP11 = (1, 0), (1, 1)
CONTROLS = [bytes([byte]) for byte in [*range(0x20), 0x7F] if byte != 0x09]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (b"GET / HTTP/1.1", ("GET", "/", HTTP11)),
        (
            b"POST /v1.44/exec/ab%2F/start?x=y%20z HTTP/1.0",
            ("POST", "/v1.44/exec/ab%2F/start?x=y%20z", HTTP10),
        ),
        (b"OPTIONS * HTTP/1.1", ("OPTIONS", "*", HTTP11)),
        (b"GET http://host:80/_ping HTTP/1.1", ("GET", "http://host:80/_ping", HTTP11)),
        (b"GET HTTP://h HTTP/1.1", ("GET", "HTTP://h", HTTP11)),
        (b"GET http://h?q HTTP/1.1", ("GET", "http://h?q", HTTP11)),
        # curl sends what its user types
        (
            b'GET /events?filters={"type":["a|b^`\\"]} HTTP/1.1',
            ("GET", '/events?filters={"type":["a|b^`\\"]}', HTTP11),
        ),
        (b"!#$%&'*+-.^_`|~09azAZ / HTTP/1.1", ("!#$%&'*+-.^_`|~09azAZ", "/", HTTP11)),
    ],
)
def test_a_request_line_has_three_parts(line: bytes, parts: tuple[str, str, tuple[int, int]]) -> None:
    assert parse_request_line(line) == parts


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET /", 400),
        (b"GET", 400),
        (b"", 400),
        (b" GET / HTTP/1.1", 400),
        (b"GET  / HTTP/1.1", 400),
        (b"GET /  HTTP/1.1", 400),
        (b"GET / HTTP/1.1 ", 400),
        (b"GET\t/\tHTTP/1.1", 400),
        (b"GET /a b HTTP/1.1", 400),
        (b"GET /\tHTTP/1.1", 400),
        (b"G@T / HTTP/1.1", 400),
        (b"GE\xc3\x89 / HTTP/1.1", 400),
        (b"GET / http/1.1", 400),
        (b"GET / HTTP/1.10", 400),
        (b"GET / HTTP/1", 400),
        (b"GET / HTTP/1.1x", 400),
        (b"GET / xHTTP/1.1", 400),
        (b"GET / HTTP/\xd9\xa1.1", 400),
        (b"GET / HTTP/1.2", 505),
        (b"GET / HTTP/0.9", 505),
        (b"PRI * HTTP/2.0", 505),
        (b"GET * HTTP/1.1", 400),
        (b"OPTIONS ** HTTP/1.1", 400),
        (b"GET _ping HTTP/1.1", 400),
        (b"GET ?q HTTP/1.1", 400),
        (b"CONNECT host:80 HTTP/1.1", 400),
        (b"CONNECT /a HTTP/1.1", 400),
        (b"CONNECT http://h/ HTTP/1.1", 400),
        (b"GET https://host/ HTTP/1.1", 400),
        (b"GET http:/// HTTP/1.1", 400),
        (b"GET http://?q HTTP/1.1", 400),
        (b"GET http:/x HTTP/1.1", 400),
        (b"GET /#fragment HTTP/1.1", 400),
        (b"GET /\xc3\xbc HTTP/1.1", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS on a plain port
    ],
)
def test_other_request_lines_are_refused(line: bytes, status: int) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_request_line(line)
    assert caught.value.status == status


@pytest.mark.parametrize("control", [*CONTROLS, b"\t"])
@pytest.mark.parametrize(
    "template", [b"G%bT / HTTP/1.1", b"GET /%bx HTTP/1.1", b"GET / HTTP/1.1%b", b"GET http://h/%b HTTP/1.1"]
)
def test_no_control_gets_through_a_request_line(template: bytes, control: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_request_line(template % control)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("line", "field"),
    [
        (b"Host: docker", ("host", "docker")),
        (b"Host:", ("host", "")),
        (b"X-A:\t b c \t", ("x-a", "b c")),
        (b"X:a\tb:c", ("x", "a\tb:c")),
        (b"X: \xfc\xff\x80", ("x", "\xfc\xff\x80")),
        (b"!#$%&'*+-.^_`|~09aZ: 1", ("!#$%&'*+-.^_`|~09az", "1")),
    ],
)
def test_a_field_has_a_name_in_lower_case_and_a_bare_value(line: bytes, field: tuple[str, str]) -> None:
    assert parse_field(line) == field


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b":",
        b": x",
        b"Host",
        b"Host : x",
        b"Ho st: x",
        b" Host: x",
        b"\tHost: x",
        b"H\xc3\xb6st: x",
        b"(a): x",
    ]
    + [b"X: a" + control + b"b" for control in CONTROLS]
    + [b"X" + control + b": b" for control in CONTROLS],
)
def test_other_fields_are_refused(line: bytes) -> None:
    for parse in (parse_field, parse_trailer):
        with pytest.raises(BadRequest) as caught:
            parse(line)
        assert caught.value.status == 400


@pytest.mark.parametrize("name", ["Content-Length", "Transfer-Encoding", "HOST"])
def test_trailers_do_not_touch_the_framing(name: str) -> None:
    with pytest.raises(BadRequest, match=f"^{name.lower()} is not accepted as a trailer$"):
        parse_trailer(name.encode() + b": 1")
    assert parse_trailer(b"X-Checksum: 1") == ("x-checksum", "1")


def test_the_message_of_an_error_is_short() -> None:
    with pytest.raises(BadRequest) as caught:
        parse_field(b"x" * 30_000 + b": \0")
    assert len(caught.value.message) < 120


@pytest.mark.parametrize(
    ("version", "hosts", "accepted"),
    [
        (HTTP11, 0, False),
        (HTTP11, 1, True),
        (HTTP11, 2, False),
        (HTTP10, 0, True),
        (HTTP10, 1, True),
        (HTTP10, 2, False),
    ],
)
def test_http_1_1_has_one_host(version: tuple[int, int], hosts: int, accepted: bool) -> None:
    fields = [("accept", "*/*"), *[("host", "same")] * hosts]
    if accepted:
        check_host(version, fields)
    else:
        with pytest.raises(BadRequest) as caught:
            check_host(version, fields)
        assert caught.value.status == 400


LENGTH, CODING = "content-length", "transfer-encoding"


@pytest.mark.parametrize(
    ("fields", "framing"),
    [
        ([], (None, False)),
        ([(LENGTH, "0")], (0, False)),
        ([(LENGTH, "007")], (7, False)),
        ([(LENGTH, "0" * 5000 + "7")], (7, False)),
        ([(LENGTH, "9223372036854775807")], (2**63 - 1, False)),
        ([(CODING, "chunked")], (None, True)),
        ([(CODING, "Chunked")], (None, True)),
    ],
)
def test_the_body_is_delimited_by_one_length_or_by_chunks(
    fields: list[tuple[str, str]], framing: tuple[int | None, bool]
) -> None:
    assert body_framing(HTTP11, fields) == framing


@pytest.mark.parametrize(
    ("version", "fields", "status"),
    [
        *[
            (HTTP11, [(LENGTH, value)], 400)
            for value in [
                "",
                "+1",
                "-1",
                "1 ",
                " 1",
                "1 1",
                "1,1",
                "1, 1",
                "0x1",
                "1.0",
                "1e3",
                "1_0",
                "\xb2",
                "a",
            ]
        ],
        (HTTP11, [(LENGTH, "5"), (LENGTH, "5")], 400),
        (HTTP11, [(LENGTH, "5"), (LENGTH, "6")], 400),
        (HTTP11, [(LENGTH, "9223372036854775808")], 413),
        (HTTP11, [(LENGTH, "18446744073709551616")], 413),
        (HTTP11, [(LENGTH, "9" * 30_000)], 413),
        (HTTP11, [(LENGTH, "5"), (CODING, "chunked")], 400),
        (HTTP11, [(CODING, "chunked"), (LENGTH, "5")], 400),
        (HTTP11, [(CODING, "gzip"), (LENGTH, "5")], 400),
        (HTTP10, [(CODING, "chunked")], 400),
        (HTTP10, [(CODING, "identity")], 400),
        *[
            (HTTP11, [(CODING, value)], 501)
            for value in [
                "",
                "gzip",
                "gzip, chunked",
                "chunked, chunked",
                "chunked;q=1",
                "identity",
                "xchunked",
                ",chunked",
            ]
        ],
        (HTTP11, [(CODING, "chunked"), (CODING, "chunked")], 501),
        (HTTP11, [(CODING, "chunked"), (CODING, "")], 501),
        (HTTP11, [(CODING, "\xa0chunked")], 501),
    ],
)
def test_doubtful_framing_is_refused(version: tuple[int, int], fields: list[tuple[str, str]], status: int) -> None:
    with pytest.raises(BadRequest) as caught:
        body_framing(version, fields)
    assert caught.value.status == status


@given(st.integers(0, MAX_BODY), st.integers(0, 30))
def test_every_length_up_to_u63_is_read_in_both_notations(number: int, zeros: int) -> None:
    assert body_framing(HTTP11, [(LENGTH, "0" * zeros + str(number))]) == (number, False)
    for notation in ("x", "X"):
        assert parse_chunk_size(b"0" * zeros + format(number, notation).encode()) == (number, 0)


@pytest.mark.parametrize(
    ("line", "size", "extension"),
    [
        (b"0", 0, 0),
        (b"fF", 255, 0),
        (b"0000000000000000000000000a", 10, 0),
        (b"7fffffffffffffff", 2**63 - 1, 0),
        (b"5;", 5, 1),
        (b"5;name=value", 5, 11),
        (b'5; a = "b c"; d', 5, 14),
        (b"5;\xff", 5, 2),
    ],
)
def test_a_chunk_size_is_hexadecimal_and_may_have_extensions(line: bytes, size: int, extension: int) -> None:
    assert parse_chunk_size(line) == (size, extension)


@pytest.mark.parametrize(
    ("line", "status"),
    [
        *[(line, 400) for line in [b"", b";a", b" 5", b"5 ", b"5 a", b"+5", b"-5", b"0x5", b"5_0", b"g", b"5\t"]],
        *[(line, 400) for line in [b"5 ;a", b"5\t;a"]],
        *[(b"5;a" + control, 400) for control in CONTROLS],
        (b"8000000000000000", 413),
        (b"ffffffffffffffff", 413),
        (b"10000000000000005", 413),  # 5, for whoever keeps 64 bits
        (b"f" * 1000, 413),
    ],
)
def test_other_chunk_sizes_are_refused(line: bytes, status: int) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_chunk_size(line)
    assert caught.value.status == status


@given(st.binary(max_size=60))
def test_a_line_of_any_bytes_is_read_or_refused(line: bytes) -> None:
    for parse in (parse_request_line, parse_field, parse_trailer, parse_chunk_size):
        status = None
        try:
            parse(line)
        except BadRequest as error:
            status = error.status
        assert status in (None, 400, 413, 505)
