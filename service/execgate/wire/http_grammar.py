"""HTTP/1.x, one line at a time: what a request line, a header field, a chunk-size line may look like.

Strict, because another parser reads the same bytes after this one: whatever two parsers could read in two
ways is refused. Section numbers without a name are those of RFC 9112. Lines come here without their CRLF.
"""

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from execgate.model.errors import InvalidArgument

MAX_BODY: Final = 2**63 - 1
"""The longest body that can be spoken of at all, in bytes."""

Field = tuple[str, str]
"""A header field: its name in lower case, its value without the white space around it (Latin-1)."""

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 5.6.2: methods and names
_FIELD_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")  # RFC 9110 5.5: no NUL, CR, LF, nor any other control
_TARGET = re.compile(rb"[!\"$-~]+")  # visible ASCII but "#": a fragment is no part of a target
_ABSOLUTE = re.compile(rb"http://[^/?]+(?:[/?].*)?", re.IGNORECASE)
_VERSION = re.compile(rb"HTTP/([0-9])\.([0-9])")
_PLAIN_HEAD = re.compile(
    rb"(%(token)s) (/[!\"$-~]*) HTTP/1\.([01])\r\n((?:%(token)s:%(value)s\r\n)*)\r\n"
    % {b"token": _TOKEN.pattern, b"value": _FIELD_VALUE.pattern}
)
_DIGITS = re.compile(r"[0-9]+")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]+)(;[\t\x20-\x7e\x80-\xff]*)?")
# They decide where a message ends and who gets it, and that is past deciding (RFC 9110 6.5.1).
_NO_TRAILERS = frozenset({"content-length", "transfer-encoding", "host"})


class BadRequest(InvalidArgument):
    """The bytes are not an acceptable request: answer `status` (4xx or 5xx) with the message, and close.

    Nothing that follows on the connection can be trusted to begin a request.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class RequestLine(NamedTuple):
    """The parts of a request line; `target` is as it was sent."""

    method: str
    target: str
    version: tuple[int, int]


PlainHead = tuple[RequestLine, list[Field], int]
"""A request line, the fields, and where the head ends."""


class ChunkSize(NamedTuple):
    """A chunk-size line: bytes of data that follow, and bytes spent on extensions, which we ignore."""

    size: int
    extension_length: int


def parse_request_line(line: bytes) -> RequestLine:
    """Return the parts of `METHOD SP target SP HTTP/1.x` (3). Raises BadRequest 400 or 505."""
    parts = line.split(b" ")
    version = _VERSION.fullmatch(parts[-1])
    if len(parts) != 3 or version is None or not _TOKEN.fullmatch(parts[0]):
        raise BadRequest(400, "malformed request line")
    number = (int(version[1]), int(version[2]))
    if number not in ((1, 0), (1, 1)):
        raise BadRequest(505, "only HTTP/1.0 and HTTP/1.1 are served here")
    _check_target(parts[0], parts[1])
    return RequestLine(parts[0].decode(), parts[1].decode(), number)


def parse_plain_head(data: bytearray, start: int, end: int, max_line: int) -> PlainHead | None:
    """Read a whole head, its blank line included, in one pass.

    This is the common case and nothing but a short cut: origin-form, HTTP/1.x, no oddity. None means "read it line
    by line", which also has the words for what is wrong with it.
    """
    match = _PLAIN_HEAD.match(data, start, end)
    if match is None or match.start(4) - start > max_line or match[1] == b"CONNECT":
        return None
    lines = data[match.start(4) : match.end(4)].decode("latin-1").split("\r\n")[:-1]
    fields = [(name.lower(), value.strip(" \t")) for name, _, value in (line.partition(":") for line in lines)]
    return RequestLine(match[1].decode(), match[2].decode(), (1, int(match[3]))), fields, match.end()


def _check_target(method: bytes, target: bytes) -> None:
    """Accept origin-form (3.2.1), absolute-form of http (3.2.2) and `OPTIONS *` (3.2.4), and none for CONNECT.

    That takes only an authority (3.2.3). With another form, parsers disagree about what follows the head.
    """
    known_form = target.startswith(b"/") or _ABSOLUTE.fullmatch(target) or (method, target) == (b"OPTIONS", b"*")
    if not known_form or method == b"CONNECT" or not _TARGET.fullmatch(target):
        raise BadRequest(400, "malformed request target")


def parse_field(line: bytes) -> Field:
    """Return the name and value of a header or trailer line. Raises BadRequest 400."""
    if line.startswith((b" ", b"\t")):
        raise BadRequest(400, "folded header lines are not accepted")  # 5.2
    name, colon, value = line.partition(b":")
    if not colon or not _TOKEN.fullmatch(name):  # 5.1: white space before the colon is a 400 as well
        raise BadRequest(400, "malformed header name")
    value = value.strip(b" \t")
    if not _FIELD_VALUE.fullmatch(value):
        raise BadRequest(400, f"malformed value of header {name[:64].decode()}")
    return name.decode().lower(), value.decode("latin-1")


def parse_trailer(line: bytes) -> Field:
    """Return a trailer as `parse_field` does, and refuse those that would change the message's framing."""
    name, value = parse_field(line)
    if name in _NO_TRAILERS:
        raise BadRequest(400, f"{name} is not accepted as a trailer")
    return name, value


def check_host(version: tuple[int, int], fields: Sequence[Field]) -> None:
    """Require one Host field of an HTTP/1.1 request, and at most one of an HTTP/1.0 request (3.2).

    Its value is free: over a unix socket clients have sent `docker`, `localhost`, the socket's path, and
    nothing.
    """
    hosts = len(field_values(fields, "host"))
    if hosts > 1 or (hosts == 0 and version == (1, 1)):
        raise BadRequest(400, "a request must have exactly one Host header")


def body_framing(version: tuple[int, int], fields: Sequence[Field]) -> tuple[int | None, bool]:
    """Return `(content_length, chunked)`, how the body is delimited (6.3); `(None, False)`: there is none.

    Raises BadRequest: 400 for contradictions, 501 for transfer codings other than chunked, 413 for a length
    beyond `MAX_BODY`.
    """
    lengths = field_values(fields, "content-length")
    codings = field_values(fields, "transfer-encoding")
    if not codings:
        return (_content_length(lengths) if lengths else None), False
    if lengths:  # 6.1: allowed to refuse, and the classic of request smuggling
        raise BadRequest(400, "Content-Length and Transfer-Encoding exclude each other")
    if version == (1, 0):  # 6.1: the framing is faulty
        raise BadRequest(400, "HTTP/1.0 has no Transfer-Encoding")
    if [coding.lower() for coding in codings] != ["chunked"]:
        raise BadRequest(501, "the only Transfer-Encoding served here is chunked")
    return None, True


def _content_length(values: Sequence[str]) -> int:
    """Read the one value: digits and nothing else (RFC 9110 8.6). Equal copies are refused too."""
    if len(values) != 1 or not _DIGITS.fullmatch(values[0]):
        raise BadRequest(400, "malformed Content-Length")
    return _bounded_int(values[0], 10)


def parse_chunk_size(line: bytes) -> ChunkSize:
    """Return size and extension length of `1*HEXDIG [;extensions]` (7.1). Raises BadRequest 400 or 413.

    White space before the semicolon (BWS, which a recipient has to accept by 7.1.1) is refused: most parsers do, since
    others have read such sizes in another way.
    """
    match = _CHUNK_SIZE.fullmatch(line)
    if match is None:
        raise BadRequest(400, "malformed chunk size")
    return ChunkSize(_bounded_int(match[1].decode(), 16), len(match[2] or b""))


def _bounded_int(digits: str, base: int) -> int:
    """Read a number of any length without ever building one of any length."""
    significant = digits.lstrip("0") or "0"
    number = int(significant, base) if len(significant) <= len(str(MAX_BODY)) else MAX_BODY + 1
    if number > MAX_BODY:
        raise BadRequest(413, "the body is too large")
    return number


def field_values(fields: Sequence[Field], name: str) -> tuple[str, ...]:
    """Return the values of every field of that name (in lower case), in the order they came."""
    return tuple(value for field, value in fields if field == name)
