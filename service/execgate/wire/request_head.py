"""Where one HTTP/1.x request ends: a delimiter that stands in front of the server's own parser.

The server's parser has to see exactly one request and not a byte more, because what follows an exec's start
request is the process's stdin and never HTTP. So this parser reads only what delimits (head, Content-Length,
chunks), hands on the very bytes it read, and stops when asked to. The theory:

    START_LINE → FIELDS → SIZED ─────────────────────────────────► END → START_LINE
                        └► CHUNK_SIZE → CHUNK_DATA → CHUNK_END ┐    ▲
                            ▲    └► TRAILERS ──────────────────┼────┘
                            └──────────────────────────────────┘

* Bytes go in with `feed` and come out, unchanged and in order, in `Head.raw` and `Body.raw`. The only bytes
  that disappear are the one or two empty lines that may precede a request.
* Nothing is handed on before it was checked: a chunk-size line goes out whole or not at all.
* The events do not depend on how the bytes were cut, except that a body comes in other pieces.
* Every byte is looked at a bounded number of times, and what is held while a line or a head is incomplete is
  bounded by the limits below.
* An error is final. So is `take_rest`, for what was fed before it.

Section numbers without a name are those of RFC 9112.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from execgate.wire.http_grammar import (
    MAX_BODY,
    BadRequest,
    Field,
    RequestLine,
    body_framing,
    check_host,
    field_values,
    parse_chunk_size,
    parse_field,
    parse_plain_head,
    parse_request_line,
    parse_trailer,
)

__all__ = ["BadRequest", "Body", "End", "Event", "Head", "NeedData", "RequestSplitter"]

# Bytes, line ends included.
MAX_REQUEST_LINE: Final = 8 * 1024
MAX_HEAD: Final = 32 * 1024
MAX_CHUNK_LINE: Final = 1024
MAX_TRAILERS: Final = 8 * 1024
MAX_EXTENSIONS: Final = 16 * 1024
"""Chunk extensions of a whole body: data that costs its reader and says nothing (compare CVE-2023-39326)."""
MAX_FIELDS: Final = 100
MAX_EMPTY_LINES: Final = 2
"""Before a request line; 2.2 asks for one to be ignored, for old clients that add a CRLF to a body."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The head of a request.

    `raw` is its exact bytes, the blank line included. `target` is as it was sent. A repr shows neither `raw`
    nor `fields`: it may go to a log, and they hold secrets.
    """

    method: str
    target: str
    http_version: tuple[int, int]
    content_length: int | None
    chunked: bool
    fields: tuple[Field, ...] = field(repr=False)
    raw: bytes = field(repr=False)

    @property
    def path(self) -> str:
        """The path of the target, still percent-encoded and without the query; `*` for `OPTIONS *`."""
        return _path_of(self.target)

    def header(self, name: str) -> str | None:
        """Return the value of the first field of that name, in any case, or None."""
        return next(iter(self.headers(name)), None)

    def headers(self, name: str) -> tuple[str, ...]:
        """Return the values of all fields of that name, in any case."""
        return field_values(self.fields, name.lower())


@dataclass(frozen=True, slots=True)
class Body:
    """Bytes of the body exactly as they came, chunk framing included; never empty."""

    raw: bytes


@dataclass(frozen=True, slots=True)
class End:
    """The request is over. Whatever follows is another request, or no HTTP at all: the caller knows."""


@dataclass(frozen=True, slots=True)
class NeedData:
    """There is no event before more is fed."""


Event = Head | Body | End


class _State(enum.Enum):
    START_LINE = enum.auto()
    FIELDS = enum.auto()
    SIZED = enum.auto()
    CHUNK_SIZE = enum.auto()
    CHUNK_DATA = enum.auto()
    CHUNK_END = enum.auto()
    TRAILERS = enum.auto()
    END = enum.auto()


class RequestSplitter:
    """Cuts the bytes of one connection into requests; pull-like, so that it can stop after any of them.

    The caller feeds, then takes events until `NeedData`; and it stops taking them, or calls `take_rest`, when
    what follows an `End` is not HTTP. It does not feed while it takes no events: that buffer has no bound but
    `buffered`.
    """

    def __init__(self, *, max_body: int = MAX_BODY) -> None:
        """Refuse with 413 what has more than `max_body` bytes (0…`MAX_BODY`), chunk framing not counted."""
        self._max_body = max_body
        self._failure: tuple[int, str] | None = None  # not the exception: its traceback refers to us
        self._buffer = bytearray()
        self._accepted = 0  # the bytes of the buffer that are checked and wait to go out in an event
        self._searched = 0  # the bytes of the buffer that are known to hold no further line end
        self._begin()

    def __repr__(self) -> str:
        return f"<RequestSplitter {self._state.name} buffered={len(self._buffer)} failure={self._failure}>"

    @property
    def buffered(self) -> int:
        """The number of bytes that were fed and are in no event yet."""
        return len(self._buffer)

    @property
    def idle(self) -> bool:
        """Whether no part of a request is here: EOF is no error, and only a keep-alive timeout applies."""
        return self._state is _State.START_LINE and not self._buffer and not self._empty_lines

    @property
    def path(self) -> str | None:
        """The path (see `Head.path`) of the request that is arriving or was refused; None before its first line."""
        return None if self._request is None else _path_of(self._request.target)

    def feed(self, data: bytes) -> None:
        """Add received bytes. After an error they are dropped."""
        if self._failure is None:
            self._buffer += data

    def next_event(self) -> Event | NeedData:
        """Return what comes next. Raises BadRequest, and from then on the same again at each call."""
        if self._failure is not None:
            raise BadRequest(*self._failure)
        try:
            while (event := _STEPS[self._state](self)) is None:
                pass
        except BadRequest as error:
            self._failure = (error.status, error.message)
            self._buffer.clear()
            raise
        return event

    def take_rest(self) -> bytes:
        """Return the bytes that are in no event yet, and forget them.

        After the `End` of a hijacked request they are the beginning of the process's stdin. The splitter then
        stands before a new request.
        """
        self._accepted = len(self._buffer)
        rest = self._take()
        self._begin()
        return rest

    def _begin(self) -> None:
        """Stand before a request line."""
        self._state = _State.START_LINE
        self._empty_lines = 0
        self._request: RequestLine | None = None
        self._fields: list[Field] = []
        self._left = 0  # bytes of the body (SIZED) or of the chunk (CHUNK_DATA) that have not come yet
        self._body_size = 0
        self._extensions = 0
        self._trailers = 0

    # The steps. Each reads the buffer from `_accepted` on and returns an event, NeedData, or None: go on.

    def _start_line(self) -> Head | NeedData | None:
        if not self._buffer:
            return NeedData()
        if not self._searched and (head := self._plain_head()):
            return head
        line = self._line(MAX_REQUEST_LINE, 414, "the request line is too long")
        if line is None:
            return NeedData()
        if line:
            self._request = parse_request_line(line)
            self._state = _State.FIELDS
            return None
        self._take()
        self._empty_lines += 1
        if self._empty_lines > MAX_EMPTY_LINES:
            raise BadRequest(400, "empty lines in place of a request")
        return None

    def _plain_head(self) -> Head | None:
        """Take a head that is here as a whole, and simple, at one go."""
        parsed = parse_plain_head(self._buffer, self._accepted, MAX_HEAD, MAX_REQUEST_LINE)
        if parsed is None or len(parsed[1]) > MAX_FIELDS:
            return None
        self._request, self._fields, self._accepted = parsed
        return self._head()

    def _header_field(self) -> Head | NeedData | None:
        line = self._line(MAX_HEAD - self._accepted, 431, "the request head is too large")
        if line is None:
            return NeedData()
        if not line:
            return self._head()
        if len(self._fields) == MAX_FIELDS:
            raise BadRequest(431, "the request has too many header lines")
        self._fields.append(parse_field(line))
        return None

    def _head(self) -> Head:
        assert self._request is not None
        request, fields = self._request, tuple(self._fields)
        check_host(request.version, fields)
        content_length, chunked = body_framing(request.version, fields)
        self._grow_body(content_length or 0)
        self._left = content_length or 0
        self._state = _State.CHUNK_SIZE if chunked else _State.SIZED
        return Head(
            method=request.method,
            target=request.target,
            http_version=request.version,
            content_length=content_length,
            chunked=chunked,
            fields=fields,
            raw=self._take(),
        )

    def _sized(self) -> Body | NeedData | None:
        if not self._accept_data():
            return self._body()
        self._state = _State.END
        return None

    def _chunk_size(self) -> Body | NeedData | None:
        line = self._line(MAX_CHUNK_LINE, 400, "a chunk-size line is too long")
        if line is None:
            return self._body()
        chunk = parse_chunk_size(line)
        self._extensions += chunk.extension_length
        if self._extensions > MAX_EXTENSIONS:
            raise BadRequest(400, "too many chunk extensions")
        self._grow_body(chunk.size)
        self._left = chunk.size
        self._state = _State.CHUNK_DATA if chunk.size else _State.TRAILERS
        return None

    def _chunk_data(self) -> Body | NeedData | None:
        if not self._accept_data():
            return self._body()
        self._state = _State.CHUNK_END
        return None

    def _chunk_end(self) -> Body | NeedData | None:
        """Take the CRLF behind the data (7.1); anything else means that the size was a lie."""
        end = self._buffer[self._accepted : self._accepted + 2]
        if not b"\r\n".startswith(end):
            raise BadRequest(400, "a chunk is longer than its size")
        if len(end) < 2:
            return self._body()
        self._accepted += 2
        self._state = _State.CHUNK_SIZE
        return None

    def _trailer(self) -> Body | NeedData | None:
        before = self._accepted
        line = self._line(MAX_TRAILERS - self._trailers, 431, "the trailers are too large")
        if line is None:
            return self._body()
        self._trailers += self._accepted - before
        if line:
            parse_trailer(line)
        else:
            self._state = _State.END
        return None

    def _end(self) -> Body | End:
        if self._accepted:
            return Body(self._take())
        self._begin()
        return End()

    # What the steps share.

    def _line(self, limit: int, status: int, too_long: str) -> bytes | None:
        r"""Accept a line and return it without its CRLF, or return None while its end has not come.

        A line of more than `limit` bytes with its end raises BadRequest(status, too_long), however it was
        cut. 2.2 allows a bare LF to end a line; other parsers do not, so it is refused.
        """
        start = self._accepted
        end = self._buffer.find(b"\n", max(start, self._searched), start + limit)
        if end < 0:
            if len(self._buffer) >= start + limit:
                raise BadRequest(status, too_long)
            self._searched = len(self._buffer)
            return None
        line = bytes(self._buffer[start : end + 1])
        if not line.endswith(b"\r\n"):
            raise BadRequest(400, "a line does not end in CRLF")
        self._accepted = end + 1
        return line[:-2]

    def _accept_data(self) -> bool:
        """Accept what is here of the data that is expected; return whether that was all."""
        size = min(self._left, len(self._buffer) - self._accepted)
        self._accepted += size
        self._left -= size
        return not self._left

    def _body(self) -> Body | NeedData:
        """Hand out what is accepted, since nothing more can be for now."""
        return Body(self._take()) if self._accepted else NeedData()

    def _take(self) -> bytes:
        """Cut the accepted bytes off the buffer. A bytearray does that without moving the rest."""
        taken = bytes(self._buffer[: self._accepted])
        del self._buffer[: self._accepted]
        self._searched = max(0, self._searched - self._accepted)
        self._accepted = 0
        return taken

    def _grow_body(self, size: int) -> None:
        self._body_size += size
        if self._body_size > self._max_body:
            raise BadRequest(413, "the body is too large")


def _path_of(target: str) -> str:
    path = target.partition("?")[0]
    if path.startswith(("/", "*")):
        return path
    return "/" + path.partition("://")[2].partition("/")[2]  # absolute-form (3.2.2)


_STEPS: Final[dict[_State, Callable[[RequestSplitter], Event | NeedData | None]]] = {
    _State.START_LINE: RequestSplitter._start_line,
    _State.FIELDS: RequestSplitter._header_field,
    _State.SIZED: RequestSplitter._sized,
    _State.CHUNK_SIZE: RequestSplitter._chunk_size,
    _State.CHUNK_DATA: RequestSplitter._chunk_data,
    _State.CHUNK_END: RequestSplitter._chunk_end,
    _State.TRAILERS: RequestSplitter._trailer,
    _State.END: RequestSplitter._end,
}
