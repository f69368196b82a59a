"""HTTP by hand over a unix socket: requests no library would send, hijacked streams, and the answers byte for byte.

Everything blocks, with a deadline on the socket: what a test waits for comes, or the test fails with TimeoutError.
"""

import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from execgate.wire.stdcopy import STDERR, STDOUT, Demultiplexer

TIMEOUT = 30.0
"""Seconds that a test waits for bytes; generous, because it is only ever spent on a failure."""

_RECEIVE = 65536


@dataclass(frozen=True, slots=True)
class Response:
    """An answer. The names in `headers` are in lower case; `body` is without any transfer coding."""

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
        """The text of an error; fails when the body is anything but Docker's `{"message": …}`."""
        value = self.json
        assert isinstance(value, dict), value
        assert list(value) == ["message"], value
        return str(value["message"])

    @property
    def content_type(self) -> str:
        """The media type without its parameters; empty when there is none."""
        return self.headers.get("content-type", "").partition(";")[0]


def encode_request(
    method: str, target: str, *, headers: Mapping[str, str] | None = None, body: bytes | None = None
) -> bytes:
    """Return the bytes of one request. A body gets its Content-Length; nothing else is added but Host."""
    fields = {"Host": "localhost", **(headers or {})}
    if body is not None:
        fields.setdefault("Content-Length", str(len(body)))
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1") + (body or b"")


class RawConnection:
    """One connection to a service; use it in a `with`."""

    def __init__(self, path: Path, *, timeout: float = TIMEOUT) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(timeout)
        self.socket.connect(os.fspath(path))
        self._buffer = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close both directions."""
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.socket.sendall(data)

    def half_close(self) -> None:
        """End what is sent, and go on reading."""
        self.socket.shutdown(socket.SHUT_WR)

    def request(
        self, method: str, target: str, *, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Response:
        """Send one request and return its whole answer; the connection can be used again, as HTTP allows."""
        self.send(encode_request(method, target, headers=headers, body=body))
        return self.read_response(method)

    def read_response(self, method: str = "GET") -> Response:
        """Read one answer to its end, by its framing; one without framing lasts until the connection ends."""
        head = self.read_head()
        body = b"" if method == "HEAD" or head.status in (101, 204, 304) else self._read_body(head)
        return Response(head.status, head.reason, head.headers, body)

    def read_head(self) -> Response:
        """Read status line and headers and leave the body where it is. A header that comes twice is an error."""
        head = self._take_until(b"\r\n\r\n").decode("latin-1")
        status_line, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
        version, status, reason = status_line.split(" ", 2)
        assert version == "HTTP/1.1", status_line
        fields = [line.split(":", 1) for line in lines]
        headers = {name.lower(): value.strip() for name, value in fields}
        assert len(headers) == len(fields), f"a header is given twice: {lines}"
        return Response(int(status), reason, headers)

    def read_exactly(self, size: int) -> bytes:
        """Read `size` bytes; EOFError when the connection ends before."""
        while len(self._buffer) < size:
            self._receive()
        return self._take(size)

    def read_until(self, end: bytes) -> bytes:
        """Read up to and including `end`: a prompt, a line."""
        return self._take_until(end)

    def read_to_end(self) -> bytes:
        """Read until the service closes its side."""
        while data := self.socket.recv(_RECEIVE):
            self._buffer += data
        return self._take(len(self._buffer))

    def read_chunks(self) -> Iterator[bytes]:
        """Yield the chunks of a chunked body as they arrive, to its end."""
        while size := int(self._take_until(b"\r\n").partition(b";")[0], 16):
            yield self.read_exactly(size)
            assert self.read_exactly(2) == b"\r\n"
        assert self._take_until(b"\r\n") == b"\r\n", "trailers"

    def read_json_lines(self) -> Iterator[Any]:
        """Yield the JSON values of a chunked body that has one a line, as they arrive."""
        rest = b""
        for chunk in self.read_chunks():
            *lines, rest = (rest + chunk).split(b"\n")
            yield from map(json.loads, lines)
        assert not rest, f"the stream ends within a line: {rest!r}"

    def _read_body(self, head: Response) -> bytes:
        if head.headers.get("transfer-encoding") == "chunked":
            return b"".join(self.read_chunks())
        if "content-length" in head.headers:
            return self.read_exactly(int(head.headers["content-length"]))
        return self.read_to_end()

    def _take_until(self, end: bytes) -> bytes:
        while (position := self._buffer.find(end)) < 0:
            self._receive()
        return self._take(position + len(end))

    def _receive(self) -> None:
        data = self.socket.recv(_RECEIVE)
        if not data:
            raise EOFError(f"the connection ended after {bytes(self._buffer[-200:])!r}")
        self._buffer += data

    def _take(self, size: int) -> bytes:
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken


def demultiplex(data: bytes) -> tuple[bytes, bytes]:
    """Return (stdout, stderr) of a whole multiplexed stream; fails when it holds others or ends within a frame."""
    demultiplexer = Demultiplexer()
    output = {STDOUT: b"", STDERR: b""}
    for stream, payload in demultiplexer.feed(data):
        output[stream] += payload
    assert demultiplexer.at_boundary, f"the stream ends within a frame: {data[-64:]!r}"
    return output[STDOUT], output[STDERR]
