"""HTTP by hand: requests that no library would send, and their answers byte for byte, over a unix or a TCP socket.

A request is bytes, made here or by the test, sent whole, in pieces, or with more behind it. Everything blocks, with a
deadline on the socket: what a test waits for comes, or the test fails with TimeoutError.

`Connection` knows HTTP and nothing else; the exec API on top of it is `support.api`.
"""

import contextlib
import json
import select
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from support.tls import TlsTarget

TIMEOUT = 30.0
"""Seconds that a read or a write waits before it counts as a hang; only ever spent on a failure."""

Target = Path | tuple[str, int] | TlsTarget
"""Where a service listens: a unix socket, a host and a port, or a port with TLS."""

JSON = {"Content-Type": "application/json"}

_RECEIVE = 256 * 1024
_END_OF_HEAD = b"\r\n\r\n"


def request_bytes(method: str, target: str, body: object = None, headers: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of one request.

    A `body` of bytes is sent as it is, anything else but None as JSON, with its Content-Type; both get a
    Content-Length. `headers` come on top, and before what would be added. Nothing else is added but Host.
    """
    fields = {"Host": "localhost"}
    data = b""
    if isinstance(body, bytes):
        data = body
    elif body is not None:
        data = json.dumps(body).encode()
        fields |= JSON
    if body is not None:
        fields["Content-Length"] = str(len(data))
    fields |= headers or {}
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1") + data


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer. The names in `headers` are in lower case; `body` is without any transfer coding."""

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """The text of an error; AssertionError when this is no error as Docker's clients know it."""
        assert self.status >= 400, self
        assert self.content_type == "application/json", self
        value = self.json
        assert isinstance(value, dict), self
        assert list(value) == ["message"], self
        message = value["message"]
        assert isinstance(message, str), self
        assert message, self
        return message

    @property
    def content_type(self) -> str:
        """The media type without its parameters; empty when there is none."""
        return self.headers.get("content-type", "").partition(";")[0]


class Connection:
    """One connection to a service; use it in a `with`.

    What has come and was not asked for yet waits in a buffer: every `read_…` looks there first. They raise EOFError
    when the connection ends before what they look for, and ConnectionError when it breaks.
    """

    def __init__(self, target: Target, *, timeout: float = TIMEOUT) -> None:
        self.socket: Any  # a socket, or what has its methods
        if isinstance(target, TlsTarget):
            self.socket = target.connect(timeout)
            self._buffer = bytearray()
            return
        if isinstance(target, Path):
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            address: Any = str(target)
        else:
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            address = target
        try:
            self.socket.connect(address)  # before the timeout: without one it waits while the backlog is full
        except BaseException:
            self.socket.close()
            raise
        self.socket.settimeout(timeout)
        self._buffer = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- sending

    def send(self, data: bytes) -> None:
        """Send all of it."""
        self.socket.sendall(data)

    def try_send(self, data: bytes) -> bool:
        """Send all of it; False when the other side has hung up."""
        try:
            self.socket.sendall(data)
        except ConnectionError:
            return False
        return True

    def send_until_blocked(self, data: bytes, *, patience: float) -> int:
        """Send until nothing more is taken for `patience` seconds, and return how many bytes were."""
        view, sent = memoryview(data), 0
        while sent < len(data) and select.select([], [self.socket], [], patience)[1]:
            sent += self.socket.send(view[sent : sent + 65536], socket.MSG_DONTWAIT)
        return sent

    def half_close(self) -> None:
        """Say that nothing more will be sent, and go on reading."""
        self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Hang up. With input unread the kernel makes that a reset."""
        self.socket.close()

    # -- requests and answers

    def request(
        self, method: str, target: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Send one request and return its whole answer; the connection can be used again, as HTTP allows."""
        self.send(request_bytes(method, target, body, headers))
        return self.read_answer(method)

    def read_answer(self, method: str = "GET") -> Answer:
        """Read one answer to its end, by its framing; one without framing lasts until the connection ends."""
        head = self.read_head()
        bodiless = method == "HEAD" or head.status in (101, 204, 304)
        return Answer(head.status, head.reason, head.headers, b"" if bodiless else self._read_body(head.headers))

    def read_head(self) -> Answer:
        """Read status line and headers and leave the body where it is. A header that comes twice is an error."""
        lines = self.read_until(_END_OF_HEAD).removesuffix(_END_OF_HEAD).decode("latin-1").split("\r\n")
        version, status, reason = lines[0].split(" ", 2)
        assert version == "HTTP/1.1", lines
        fields = [line.split(":", 1) for line in lines[1:]]
        headers = {name.lower(): value.strip() for name, value in fields}
        assert len(headers) == len(fields), f"a header is given twice: {lines}"
        return Answer(int(status), reason, headers)

    def read_chunks(self) -> Iterator[bytes]:
        """Yield the chunks of a chunked body as they arrive, to its end."""
        while size := int(self.read_until(b"\r\n").partition(b";")[0], 16):
            yield self.read_exactly(size)
            assert self.read_exactly(2) == b"\r\n"
        assert self.read_until(b"\r\n") == b"\r\n", "trailers"

    def read_json_lines(self) -> Iterator[Any]:
        """Yield the JSON values of a chunked body that has one a line, as they arrive."""
        rest = b""
        for chunk in self.read_chunks():
            *lines, rest = (rest + chunk).split(b"\n")
            yield from map(json.loads, lines)
        assert not rest, f"the stream ends within a line: {rest!r}"

    def _read_body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding") == "chunked":
            return b"".join(self.read_chunks())
        if "content-length" in headers:
            return self.read_exactly(int(headers["content-length"]))
        return self.read_to_end()

    # -- bytes

    def read(self, size: int = _RECEIVE) -> bytes:
        """Return at most `size` bytes as they come; b"" at the end."""
        return self._take(size) if self._buffer else self.socket.recv(size)

    def unread(self, data: bytes) -> None:
        """Put back what was read: it comes again, before what follows it."""
        self._buffer[:0] = data

    def read_exactly(self, size: int) -> bytes:
        """Read `size` bytes."""
        while len(self._buffer) < size:
            self._receive()
        return self._take(size)

    def read_until(self, end: bytes) -> bytes:
        """Read up to and including `end`: a prompt, a line."""
        while (position := self._buffer.find(end)) < 0:
            self._receive()
        return self._take(position + len(end))

    def read_to_end(self) -> bytes:
        """Read until the service closes its side."""
        while data := self.socket.recv(_RECEIVE):
            self._buffer += data
        return self._take(len(self._buffer))

    def read_until_closed(self) -> bytes:
        """Read until the other side ends the connection, in whatever way."""
        with contextlib.suppress(ConnectionError):
            while data := self.socket.recv(_RECEIVE):
                self._buffer += data
        return self._take(len(self._buffer))

    def closes_within(self, seconds: float) -> bool:
        """Whether the other side ends the connection in that time; what it sends before is dropped."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.socket], [], [], left)[0]:
                try:
                    if not self.socket.recv(_RECEIVE):
                        return True
                except ConnectionError:
                    return True
        return False

    def _receive(self) -> None:
        data = self.socket.recv(_RECEIVE)
        if not data:
            raise EOFError(f"the connection ended after {bytes(self._buffer[-200:])!r}")
        self._buffer += data

    def _take(self, size: int) -> bytes:
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken
