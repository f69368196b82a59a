"""One small client of the Docker API for every contestant that serves it: blocking sockets, nothing between.

It does what the docker CLI does for an exec, with as little of its own as Python allows: create and inspect over
a connection that is kept, start over one of its own that is taken over.
"""

import contextlib
import json
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

API = "/v1.41"  # the newest that Debian 12's dockerd and podman both speak

_READ_SIZE = 1 << 20
_TIMEOUT = 120.0  # seconds without a byte; a benchmark must end
_HEADER = struct.Struct(">BxxxL")  # a frame: stream, three zero bytes, length


class ApiError(Exception):
    """A contestant answered wrongly; the message says what and to which request."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP response."""

    status: int
    body: bytes

    def json(self) -> Any:
        """Return the body, parsed."""
        return json.loads(self.body)


class Frames:
    """Counts the payload of a multiplexed stream, whatever its chunks are. It keeps no payload but the first bytes."""

    __slots__ = ("_header", "_left", "_stream", "payload", "start")

    KEPT = 4096

    def __init__(self) -> None:
        self.payload = 0
        """Bytes of stdout and stderr so far."""
        self.start = b""
        """The first bytes of stdout."""
        self._header = b""
        self._stream = 0
        self._left = 0

    def feed(self, data: memoryview) -> None:
        """Take the next bytes of the connection."""
        at = 0
        while at < len(data):
            if not self._left:
                at += self._take_header(data[at : at + _HEADER.size - len(self._header)])
                continue
            taken = min(self._left, len(data) - at)
            if self._stream == 1 and len(self.start) < self.KEPT:
                self.start += bytes(data[at : at + min(taken, self.KEPT)])
            self.payload += taken
            self._left -= taken
            at += taken

    def _take_header(self, part: memoryview) -> int:
        self._header += part
        if len(self._header) == _HEADER.size:
            self._stream, self._left = _HEADER.unpack(self._header)
            if self._stream not in (1, 2):
                raise ApiError(f"a frame for stream {self._stream}")
            self._header = b""
        return len(part)


class Stream:
    """A hijacked connection: the streams of one exec'd process."""

    def __init__(self, connection: socket.socket, early: bytes) -> None:
        self._connection = connection
        self._buffer = memoryview(bytearray(_READ_SIZE))
        self.frames = Frames()
        self.frames.feed(memoryview(early))

    def receive(self) -> bool:
        """Take what there is, waiting for it; return False at the end of the stream."""
        size = self._connection.recv_into(self._buffer)
        self.frames.feed(self._buffer[:size])
        return size > 0

    def receive_until(self, payload: int) -> None:
        """Take bytes until so many of payload have come. ApiError when the stream ends before."""
        while self.frames.payload < payload:
            if not self.receive():
                raise ApiError(f"the stream ended after {self.frames.payload} of {payload} bytes")

    def receive_all(self) -> None:
        """Take everything to the end of the stream."""
        while self.receive():
            pass

    def send(self, data: bytes | memoryview) -> None:
        """Send all of `data` as stdin."""
        self._connection.sendall(data)

    def end_input(self) -> None:
        """Half-close: the end of stdin."""
        self._connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Let go."""
        self._connection.close()


class DockerClient:
    """One user of one service; not for two threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: socket.socket | None = None

    def close(self) -> None:
        """Close the connection that is kept."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def request(
        self, method: str, path: str, body: Any = None, *, raw: bytes | None = None, expect: Sequence[int] = ()
    ) -> Answer:
        """Ask, with `body` as JSON or `raw` as it is. ApiError for any other status than those expected."""
        if self._connection is None:
            self._connection = self._connect()
        self._connection.sendall(_request_bytes(method, path, body, raw))
        try:
            answer, keep = _read_answer(self._connection)
        except BaseException:
            self.close()
            raise
        if not keep:
            self.close()
        if expect and answer.status not in expect:
            raise ApiError(f"{method} {path}: {answer.status} {answer.body[:500].decode(errors='replace').strip()}")
        return answer

    def create(self, container: str, argv: Sequence[str], *, stdin: bool = False, tty: bool = False) -> str:
        """Create an exec with stdout and stderr attached and return its id."""
        body = {"Cmd": list(argv), "AttachStdin": stdin, "AttachStdout": True, "AttachStderr": True, "Tty": tty}
        answer = self.request("POST", f"{API}/containers/{container}/exec", body, expect=[201])
        return str(answer.json()["Id"])

    def start(self, exec_id: str) -> Stream:
        """Start an exec and take the connection over."""
        return Stream(*self._take_over(exec_id, tty=False))

    @contextlib.contextmanager
    def terminal(self, container: str, argv: Sequence[str]) -> Iterator[tuple[str, socket.socket]]:
        """Start an exec with a terminal; give its id, and the connection, which has nothing but its bytes."""
        exec_id = self.create(container, argv, stdin=True, tty=True)
        connection, _ = self._take_over(exec_id, tty=True)
        with connection:
            yield exec_id, connection

    def _take_over(self, exec_id: str, *, tty: bool) -> tuple[socket.socket, bytes]:
        """Start an exec; return the connection, and what came with the head."""
        connection = self._connect()
        try:
            path = f"{API}/exec/{exec_id}/start"
            upgrade = "Connection: Upgrade\r\nUpgrade: tcp\r\n"
            connection.sendall(_request_bytes("POST", path, {"Detach": False, "Tty": tty}, None, upgrade))
            status, _, early = _read_head(connection)
            if status != 101:
                raise ApiError(f"POST {path}: {status} {early[:500].decode(errors='replace')}")
        except BaseException:
            connection.close()
            raise
        return connection, early

    def exit_code(self, exec_id: str) -> int:
        """Return how an exec ended, asking again for as long as the service says that it runs."""
        while True:
            answer = self.request("GET", f"{API}/exec/{exec_id}/json", expect=[200]).json()
            if not answer["Running"]:
                return int(answer["ExitCode"])

    def run(self, container: str, argv: Sequence[str]) -> tuple[int, bytes]:
        """Do one full exec: create, start, output to its end, inspect; return the exit code and the first output."""
        exec_id = self.create(container, argv)
        with contextlib.closing(self.start(exec_id)) as stream:
            stream.receive_all()
            return self.exit_code(exec_id), stream.frames.start

    @contextlib.contextmanager
    def attached(self, container: str, argv: Sequence[str]) -> Iterator[Stream]:
        """Start an exec with stdin; at the end its input is closed and its own end awaited."""
        exec_id = self.create(container, argv, stdin=True)
        with contextlib.closing(self.start(exec_id)) as stream:
            yield stream
            stream.end_input()
            stream.receive_all()
        self.exit_code(exec_id)

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.settimeout(_TIMEOUT)
            connection.connect(os.fspath(self._path))
        except BaseException:
            connection.close()
            raise
        return connection


def _request_bytes(method: str, path: str, body: Any, raw: bytes | None, headers: str = "") -> bytes:
    content = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
    kind = "application/x-tar" if raw is not None else "application/json"
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{headers}"
    if content:
        head += f"Content-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def _read_head(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Return status, header fields by lower-case name, and what came after the head."""
    data = b""
    while (end := data.find(b"\r\n\r\n")) < 0:
        data += _some(connection)
    status_line, *lines = data[:end].decode("latin-1").split("\r\n")
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(status_line.split()[1]), fields, data[end + 4 :]


def _read_answer(connection: socket.socket) -> tuple[Answer, bool]:
    """Return the answer, and whether the connection can be used again."""
    status, fields, data = _read_head(connection)
    keep = fields.get("connection", "").lower() != "close"
    if "chunked" in fields.get("transfer-encoding", ""):
        return Answer(status, _read_chunked(connection, data)), keep
    length = 0 if status in (204, 304) else int(fields.get("content-length", 0))
    while len(data) < length:
        data += _some(connection)
    return Answer(status, data[:length]), keep


def _read_chunked(connection: socket.socket, data: bytes) -> bytes:
    body = b""
    while True:
        while b"\r\n" not in data:
            data += _some(connection)
        size_line, _, data = data.partition(b"\r\n")
        size = int(size_line.split(b";")[0], 16)
        while len(data) < size + 2:
            data += _some(connection)
        body, data = body + data[:size], data[size + 2 :]
        if size == 0:
            return body


def _some(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    if not data:
        raise ApiError("the connection was closed in the middle of an answer")
    return data
