"""What a client sends: requests, the bodies in them, their paths and parameters."""

import asyncio
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import h11
from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_parser import HttpRequestParser, HttpRequestParserPy
from pydantic_core import from_json
from yarl import URL

from execgate.http import bodies as request_bodies
from execgate.http.bodies import (
    CreateBody,
    DockerStartBody,
    LibpodStartBody,
    RemoveBody,
    RunBody,
    StartBody,
    read_body,
)
from execgate.http.dialects import DOCKER, LIBPOD, dialect_of
from execgate.http.filters import matches_label, parse_filters
from execgate.http.query import flag
from execgate.http.routes import containers, events, execs, sessions
from execgate.model.config import ExecConfig, ResolvedUser
from execgate.model.container import ContainerBinding
from execgate.model.errors import InvalidArgument
from execgate.model.events import Event as BusEvent
from execgate.model.ids import ContainerId, SessionId
from execgate.model.process import ProcessIdentity
from execgate.model.session import ExecSession, SessionState
from execgate.oci.process import build_process, validate_config
from execgate.sessions.store import _dump, _load_or_none
from execgate.wire.http_grammar import parse_request_line
from execgate.wire.request_head import (
    MAX_HEAD,
    MAX_REQUEST_LINE,
    BadRequest,
    Body,
    End,
    Event,
    Head,
    NeedData,
    RequestSplitter,
)
from fuzz.target import Target, cuttings

_MAX_BODY = 1024 * 1024


class _Reading(NamedTuple):
    """What a splitter makes of a connection: its events, neighbouring pieces of a body joined; how it ended."""

    events: list[Event]
    status: int
    rest: bytes


def _read(chunks: Sequence[bytes]) -> _Reading:
    """Read what arrives in `chunks`. `status` is that of a refusal, 0 without one; `rest` is in no event."""
    splitter = RequestSplitter(max_body=_MAX_BODY)
    events: list[Event] = []
    try:
        for chunk in chunks:
            splitter.feed(chunk)
            while not isinstance(event := splitter.next_event(), NeedData):
                if isinstance(event, Body) and events and isinstance(last := events[-1], Body):
                    events[-1] = Body(last.raw + event.raw)
                else:
                    events.append(event)
    except BadRequest as refused:
        assert 400 <= refused.status < 600
        assert len(refused.message) < 200
        # How much of a body was handed on before the refusal depends on how it came.
        return _Reading(events[:-1] if events and isinstance(events[-1], Body) else events, refused.status, b"")
    rest = splitter.take_rest()
    assert splitter.idle
    return _Reading(events, 0, rest)


class _Request(NamedTuple):
    """A request as any reader has it: method, target, fields in order with names in lower case, content."""

    method: bytes
    target: bytes
    fields: list[tuple[bytes, bytes]]
    content: bytes


def request_head(data: bytes) -> None:
    """The delimiter before the server: the cuts do not matter, no byte is lost, and all readers see one request."""
    whole = _read([data])
    for chunks in cuttings(data):
        assert _read(chunks) == whole
    assert len(whole.rest) <= MAX_HEAD
    _check_order(data, whole)
    for raw, request in _requests(whole.events):
        seen = {reader.__name__: reader(raw) for reader in (_aiohttp, _aiohttp_in_python, _h11)}
        for name, one in seen.items():
            assert one in (None, request), f"{name}: {one} of {raw!r}"
        # h11 knows no list of methods, reads no URLs, and is as strict as the RFC.
        assert seen["_h11"] is not None, f"h11 refuses {raw!r}"


def _check_order(data: bytes, reading: _Reading) -> None:
    """Hold that what comes out is what went in, in order, but for empty lines before a request."""
    position, at_start = 0, True
    for event in reading.events:
        if isinstance(event, End):
            at_start = True
            continue
        while at_start and data.startswith(b"\r\n", position):
            position += 2
        assert event.raw
        assert data.startswith(event.raw, position)
        if isinstance(event, Head):
            assert event.path.startswith("/") or event.path == "*"
            assert all(event.header(name.upper()) is not None for name, _ in event.fields)
        position += len(event.raw)
        at_start = False
    if not reading.status:
        assert data.endswith(reading.rest)
        dropped = data[position : len(data) - len(reading.rest)]
        assert dropped == b"" or (at_start and dropped in (b"\r\n", b"\r\n\r\n"))


def _requests(events: Sequence[Event]) -> Iterator[tuple[bytes, _Request]]:
    """Yield the bytes of each whole request, and what every reader should make of them."""
    head, body = None, b""
    for event in events:
        if isinstance(event, Head):
            head, body = event, b""
        elif isinstance(event, Body):
            body += event.raw
        elif head is not None:
            fields = _fields((name.encode(), value.encode("latin-1")) for name, value in head.fields)
            content = _decode_chunks(body) if head.chunked else body
            assert head.chunked or len(body) == (head.content_length or 0)
            yield head.raw + body, _Request(head.method.encode(), head.target.encode(), fields, content)


def _fields(pairs: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return fields with names in lower case; and the one value whose case means nothing, which h11 changes."""
    found = ((name.lower(), value) for name, value in pairs)
    return [(name, value.lower() if name == b"transfer-encoding" else value) for name, value in found]


def _decode_chunks(raw: bytes) -> bytes:
    """Return the content of a chunked body that is known to be well-formed."""
    content = b""
    while size := int((line := raw[: raw.index(b"\r\n")]).partition(b";")[0], 16):
        start = len(line) + 2
        content += raw[start : start + size]
        assert raw[start + size : start + size + 2] == b"\r\n"
        raw = raw[start + size + 2 :]
    assert raw.endswith(b"\r\n")
    return content


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def _aiohttp(raw: bytes, make: Callable[..., Any] = HttpRequestParser) -> _Request | None:
    """Return what the server's own parser sees in the bytes of one request, None when it refuses them."""
    parser = make(
        BaseProtocol(_loop()), _loop(), 2**16, max_line_size=2 * MAX_REQUEST_LINE, max_field_size=2 * MAX_HEAD
    )
    try:
        messages, _, tail = parser.feed_data(raw)
    except Exception:  # the front takes whatever the parser raises for a refusal
        return None
    assert len(messages) == 1, f"{len(messages)} messages"
    message, payload = messages[0]
    if payload.exception():
        return None
    assert payload.is_eof(), "waits for more"
    assert not tail, f"leaves {tail!r}"
    return _Request(message.method.encode(), message.path.encode(), _fields(message.raw_headers), payload.read_nowait())


def _aiohttp_in_python(raw: bytes) -> _Request | None:
    """The same of the parser that aiohttp has where it could not be compiled; that one makes methods upper case."""
    seen = _aiohttp(raw, HttpRequestParserPy)
    method = raw.lstrip(b"\r\n").partition(b" ")[0]
    return seen._replace(method=method) if seen is not None and seen.method == method.upper() else seen


def _h11(raw: bytes) -> _Request | None:
    """The same of h11, which has nothing in common with either."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=2 * MAX_HEAD)
    request, content = None, b""
    try:
        connection.receive_data(raw)
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            assert event not in (h11.NEED_DATA, h11.PAUSED), "waits for more"
            if isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                content += bytes(event.data)
    except h11.RemoteProtocolError:
        return None
    assert request is not None
    assert connection.trailing_data[0] == b"", "leaves bytes"
    return _Request(request.method, request.target, _fields(request.headers), content)


# -- bodies

_MODELS: tuple[type[request_bodies.Body], ...] = (CreateBody, RunBody, DockerStartBody, LibpodStartBody, RemoveBody)
_USER = ResolvedUser(uid=1000, gid=1000, additional_gids=(1000,), home="/home/app")
_PROCESS = {
    "args": ["sleep"],
    "cwd": "/",
    "env": ["PATH=/bin", "TERM=vt100"],
    "user": {"uid": 0, "gid": 0, "umask": 18},
    "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"]},
}


def bodies(data: bytes) -> None:
    """Bodies: an object that a second reader has in the same way, or 400; and what is executed is what was asked."""
    for model in _MODELS:
        try:
            body = _body_of(data, model)
        except InvalidArgument as error:
            _check_message(error, data)
            continue
        _check_second_reader(data, body)
        named = body.model_dump(by_alias=True)
        shouted = {name.upper(): value for name, value in named.items()}
        assert _body_of(json.dumps(shouted).encode(), model) == body
        if isinstance(body, StartBody):
            _attempt(data, body.size)
        if isinstance(body, CreateBody):
            _check_config(data, body)


_SESSION = ExecSession(
    id=SessionId("a" * 64),
    container=ContainerBinding(ContainerId("c" * 64), "db", ProcessIdentity(1, 2), "boot"),
    config=ExecConfig(args=("true",)),
    user=_USER,
    state=SessionState.CREATED,
    created_at=1.0,
    since=1.0,
)


class _Sent:
    """As much of a request as bodies and parameters are read from. (A mock remembers all calls, which is a leak.)"""

    def __init__(self, *, body: bytes = b"", url: URL = URL("/")) -> None:  # noqa: B008  (immutable)
        self._body = body
        self.headers = {"Content-Type": "application/json"}
        self.match_info: dict[str, str] = {}
        self.path = url.path
        self.query = url.query

    async def read(self) -> bytes:
        """Return the body."""
        return self._body


def _body_of(data: bytes, model: type[request_bodies.Body]) -> Any:
    """Return what `read_body` makes of a request with this body."""
    return _outcome(read_body(cast("web.Request", _Sent(body=data)), model))


def _outcome(coroutine: Any) -> Any:
    """Return the outcome of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")


def _check_second_reader(data: bytes, body: request_bodies.Body) -> None:
    """Hold that another JSON reader, which takes the last of equal keys and no lone surrogates, sees the same."""
    try:
        value = from_json(data, allow_inf_nan=False) if data else None
    except ValueError as error:
        assert "hex escape" in str(error) or "surrogate" in str(error), error
        return
    assert value is None or isinstance(value, dict)
    names = [re.sub("[\u017f\u212a]", lambda found: {"\u017f": "s"}.get(found[0], "k"), name) for name in value or {}]
    folded = {name.lower(): item for name, item in zip(names, (value or {}).values(), strict=True)}
    assert len(folded) == len(names)
    given = {name: item for name, item in folded.items() if item is not None}
    for name, field in type(body).model_fields.items():
        expected = given.get(str(field.alias), field.get_default(call_default_factory=True))
        assert getattr(body, name) == expected, name


def _check_config(data: bytes, body: CreateBody) -> None:
    """Hold that what a create asks for arrives in process.json, and in the kernel's own terms."""
    for dialect in (DOCKER, LIBPOD):
        config = _attempt(data, execs.exec_config, body, dialect, cast("web.Request", _Sent()))
        if not isinstance(config, ExecConfig) or isinstance(_attempt(data, validate_config, config), InvalidArgument):
            continue
        session = replace(_SESSION, config=config)
        assert _load_or_none(_dump(session)) == session
        process = build_process(_PROCESS, config, _USER, console_size=config.console_size, all_capabilities=["CAP_A"])
        text = json.dumps(process, ensure_ascii=False).encode()
        assert b"\0" not in text
        assert process["args"] == body.cmd
        assert process["cwd"].startswith("/")
        assert process["user"]["uid"] == _USER.uid
        names = [entry.partition("=")[0] for entry in process["env"]]
        assert len(names) == len(set(names))
        assert all(names)
    if isinstance(body, RunBody):
        _attempt(data, sessions._decoded, body)


def _attempt(data: bytes, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns, or the InvalidArgument that it raises."""
    try:
        return function(*arguments)
    except InvalidArgument as error:
        _check_message(error, data)
        return error


def _check_message(error: InvalidArgument, data: bytes) -> None:
    """Hold that a refusal tells no more than it was given, and can be sent."""
    assert error.message
    assert len(error.message) <= 2 * len(data) + 400
    json.dumps({"message": error.message}).encode()


# -- targets and parameters


def queries(data: bytes) -> None:
    """The target of a request: which API it belongs to, its version, every parameter that any route reads."""
    try:
        line = parse_request_line(b"GET " + data + b" HTTP/1.1")
        request = cast("web.Request", _Sent(url=URL(line.target, encoded=True)))
    except (BadRequest, ValueError):  # yarl's, which aiohttp answers with 400
        return
    dialect = dialect_of(request.path)
    version = request.path.removeprefix("/v").partition("/")[0]
    if not isinstance(parsed := _attempt(data, dialect.parse_version, version), InvalidArgument):
        assert dialect.parse_version(".".join(map(str, parsed))) == parsed
    for name in ("since", "until"):
        moment = _attempt(data, events._timestamp, request, name)
        assert moment is None or isinstance(moment, InvalidArgument) or abs(moment) <= 10**20
    readers: list[tuple[Callable[[web.Request], Any], int]] = [
        (sessions._after, 10**18),
        (sessions._limit, request_bodies.MAX_OUTPUT),
        (containers._limit, 10**10),
        (functools.partial(execs._dimension, key="h", name="height"), 2**16 - 1),
    ]
    for reader, most in readers:
        number = _attempt(data, reader, request)
        assert number is None or isinstance(number, InvalidArgument) or 0 <= number <= most
    _attempt(data, sessions._encoding, request)
    _attempt(data, sessions._wanted, request)
    number = _attempt(data, sessions.parse_signal, request.query.get("signal", ""))
    assert isinstance(number, InvalidArgument) or 1 <= number <= 64
    flag(request, "force")
    _check_filters(data, request.query.get("filters", ""))


def _check_filters(data: bytes, text: str) -> None:
    filters = _attempt(data, parse_filters, text, events._FILTERS | sessions._FILTERS | containers._FILTERS)
    if isinstance(filters, InvalidArgument):
        return
    assert all(isinstance(value, str) for values in filters.values() for value in values)
    assert _attempt(data, parse_filters, json.dumps(filters), filters) == filters
    event = BusEvent(
        action="exec_start: sh", container_id=ContainerId("c" * 64), attributes={"name": "db", "image": "a"}, time_ns=1
    )
    assert events.matches(event, {}) is True
    events.matches(event, filters)
    for label in filters.get("label", []):
        key, _, value = label.partition("=")
        assert matches_label({key: value}, label)


TARGETS = (
    Target(
        check=request_head,
        max_length=8192,
        tokens=(
            *(b"GET / HTTP/1.1\r\n", b"POST /exec/0/start HTTP/1.1\r\n", b" HTTP/1.0\r\n", b"HTTP/1.1", b"OPTIONS * "),
            *(b"Host: h\r\n", b"\r\n", b"\r\n\r\n", b"\n", b"\r", b":", b" ", b"\t", b"0\r\n\r\n", b"Host:"),
            *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding:", b"chunked", b"identity", b"gzip, chunked"),
            *(b"Content-Length: 5\r\n", b"Content-Length:", b"+5", b"0x5", b"5, 5", b"hello", b"5\r\nhello\r\n"),
            *(b"5;a=b\r\n", b"000000000000000000", b"ffffffffffffffff", b"7fffffffffffffff", b"-1", b";", b'"'),
            *(b"Connection: Upgrade\r\n", b"Upgrade: tcp\r\n", b"Expect: 100-continue\r\n", b"CONNECT ", b"HEAD "),
            *(b"http://h/", b"http://h", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"X-A: b\r\n", b" folded\r\n", b"\x85"),
            *(b"Connection: close\r\n", b"Connection: keep-alive\r\n", b"Trailer: X\r\n", b"TE: trailers\r\n", b"\xff"),
            *(b"Sec-WebSocket-Key1: 1\r\n", b"Upgrade: websocket\r\n", b"Proxy-Connection: x\r\n", b"\x0b", b"\x00"),
        ),
    ),
    Target(
        check=bodies,
        is_json=True,
        tokens=(
            *(b'"Cmd"', b'"cmd"', b'["true"]', b'"AttachStdin"', b'"AttachStdout"', b'"AttachStderr"', b'"DetachKeys"'),
            *(
                b'"Env"',
                b'["A=b"]',
                b'"Tty"',
                b'"Privileged"',
                b'"User"',
                b'"WorkingDir"',
                b'"ConsoleSize"',
                b"[24,80]",
            ),
            *(b'"Detach"', b'"h"', b'"w"', b'"Force"', b'"Stdin"', b'"Encoding"', b'"base64"', b'"utf-8"', b"[0,0]"),
            *(
                b'"OutputLimit"',
                b'"Timeout"',
                b'"Labels"',
                b'{"a":"b"}',
                b'"CaptureStdout"',
                b'"OnDisconnect"',
                b"1e999",
            ),
            *(
                b'"PreserveFds"',
                b'"PreserveFd"',
                b'"keep"',
                b'"ctrl-p,ctrl-q"',
                b'"ctrl-@"',
                b"null",
                b"true",
                b"false",
            ),
            *(b"65536", b"4294967295", b"4294967296", b"-1", b"1.5", b"NaN", b"Infinity", b'"\\ud800"', b'"\\u0000"'),
            *(b'"/proc/self/fd/7"', b'"\\u212A"', b'"\xc5\xbf"', b"[[[[", b'{"":', b"\xef\xbb\xbf", b'"Cmd":["a"],'),
        ),
    ),
    Target(
        check=queries,
        tokens=(
            *(
                b"/v1.44/",
                b"/v4.0.0/libpod/",
                b"/libpod/",
                b"/containers/c/json?",
                b"/exec/0/kill?signal=",
                b"&",
                b"=",
                b"%",
            ),
            *(b"since=", b"until=", b"filters=", b"after=", b"limit=", b"h=", b"w=", b"encoding=base64", b"stdout=1"),
            *(
                b"stderr=0",
                b"force=",
                b"t=",
                b"signal=RTMIN%2B3",
                b"SIGKILL",
                b"RTMAX-1",
                b"1700000000.000000001",
                b"1e9",
            ),
            *(
                b"%7B%22label%22%3A%5B%22a%3Db%22%5D%7D",
                b"%7B%22status%22%3A%7B%22running%22%3Atrue%7D%7D",
                b"%22",
                b"%5B",
            ),
            *(b"%00", b"%ff", b"%ed%a0%80", b"+", b"NaN", b"Infinity", b"1e9999999999", b"-1", b"99999999999999999999"),
            *(
                b"http://h/",
                b"http://[::1]/",
                b"http://h:99999999/",
                b"?",
                b"//",
                b"..",
                b"%2e%2e",
                b"%2F",
                b"{}",
                b'{"a":[]}',
            ),
        ),
    ),
)
