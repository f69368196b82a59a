"""A client without manners: it sends the bytes it is told to, and reads what comes, over a unix or TCP socket."""

import contextlib
import json
import select
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from execgate.wire.stdcopy import Demultiplexer

TIMEOUT = 15.0
"""Seconds that a read waits before it counts as a hang; each is an upper bound, never slept."""

Target = Path | tuple[str, int]


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """What Docker's clients show of an error; AssertionError when this is no error as they know it."""
        assert self.status >= 400, self
        assert self.headers.get("content-type", "").startswith("application/json"), self
        message = self.json()["message"]
        assert isinstance(message, str), self
        assert message, self
        return message


class RawConnection:
    """One connection. What was read beyond an answer waits in `rest`."""

    def __init__(self, target: Target, *, timeout: float = TIMEOUT) -> None:
        if isinstance(target, Path):
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            address: Any = str(target)
        else:
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            address = target
        self.socket.connect(address)  # before the timeout: without one it waits while the backlog is full
        self.socket.settimeout(timeout)
        self.rest = b""

    def __enter__(self) -> "RawConnection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it."""
        self.socket.close()

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

    def half_close(self) -> None:
        """Say that nothing more will be sent."""
        self.socket.shutdown(socket.SHUT_WR)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Send one ordinary request and return its answer."""
        self.send(request_bytes(method, path, body, **headers))
        return self.answer(head_only=method == "HEAD")

    def answer(self, *, head_only: bool = False) -> Answer:
        """Read one answer, skipping `100 Continue`; ConnectionError when the connection ends before its end."""
        while True:
            status, headers = self.head()
            if status != 100:
                break
        if head_only:
            return Answer(status, headers, b"")
        if headers.get("transfer-encoding") == "chunked":
            return Answer(status, headers, self._chunks())
        return Answer(status, headers, self._exactly(int(headers.get("content-length", "0"))))

    def head(self) -> tuple[int, dict[str, str]]:
        """Read the head of an answer."""
        while b"\r\n\r\n" not in self.rest:
            self._more()
        head, _, self.rest = self.rest.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines)
        return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in fields}

    def read(self, size: int) -> bytes:
        """Return exactly `size` bytes."""
        return self._exactly(size)

    def until_closed(self) -> bytes:
        """Return all that comes until the other side ends the connection, in whatever way."""
        data, self.rest = self.rest, b""
        with contextlib.suppress(ConnectionError):
            while chunk := self.socket.recv(1 << 20):
                data += chunk
        return data

    def closes_within(self, seconds: float) -> bool:
        """Whether the other side ends the connection in that time; what it sends before is dropped."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.socket], [], [], left)[0]:
                try:
                    if not self.socket.recv(1 << 16):
                        return True
                except ConnectionError:
                    return True
        return False

    def is_silent(self, seconds: float) -> bool:
        """Whether nothing comes in that time, not even an end."""
        return not self.rest and not select.select([self.socket], [], [], seconds)[0]

    def _exactly(self, size: int) -> bytes:
        while len(self.rest) < size:
            self._more()
        data, self.rest = self.rest[:size], self.rest[size:]
        return data

    def _chunks(self) -> bytes:
        body = b""
        while True:
            while b"\r\n" not in self.rest:
                self._more()
            size, _, self.rest = self.rest.partition(b"\r\n")
            chunk = self._exactly(int(size, 16) + 2)[:-2]
            if not chunk:
                return body
            body += chunk

    def _more(self) -> None:
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionResetError(f"the connection ended behind {self.rest[-200:]!r}")
        self.rest += data


class RawApi:
    """The API as seen from `RawConnection`: one connection a request."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def connect(self, *, timeout: float = TIMEOUT) -> RawConnection:
        """Open a connection."""
        return RawConnection(self.target, timeout=timeout)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Send one request on a connection of its own."""
        with self.connect() as connection:
            return connection.request(method, path, body, **headers)

    def create(self, container: str, *cmd: str, attach: bool = True, **fields: Any) -> str:
        """Create an exec and return its id."""
        body = {"Cmd": list(cmd), "AttachStdout": attach, "AttachStderr": attach} | fields
        answer = self.request("POST", f"/containers/{container}/exec", body)
        assert answer.status == 201, answer
        return str(answer.json()["Id"])

    def start_detached(self, exec_id: str) -> Answer:
        """Start an exec with nothing attached."""
        return self.request("POST", f"/exec/{exec_id}/start", {"Detach": True})

    def inspect(self, exec_id: str) -> dict[str, Any]:
        """Return what inspect says."""
        answer = self.request("GET", f"/exec/{exec_id}/json")
        assert answer.status == 200, answer
        inspected: dict[str, Any] = answer.json()
        return inspected

    @contextlib.contextmanager
    def attached(
        self, container: str, *cmd: str, stdin: bool = False, tty: bool = False, **fields: Any
    ) -> Iterator["Attached"]:
        """Create and start an exec, attached; the connection is closed at the end."""
        exec_id = self.create(container, *cmd, AttachStdin=stdin, Tty=tty, **fields)
        with self.connect() as connection:
            yield Attached.start(self, connection, exec_id, tty=tty)

    def wait_stopped(self, exec_id: str, *, timeout: float = TIMEOUT) -> dict[str, Any]:
        """Return what inspect says once the exec has ended. Polls: a client has no other way without a stream."""
        deadline = time.monotonic() + timeout
        while (inspected := self.inspect(exec_id))["Running"]:
            assert time.monotonic() < deadline, f"still running after {timeout:g} s: {inspected}"
            time.sleep(0.01)
        return inspected


@dataclass(slots=True)
class Attached:
    """A started exec and its stream."""

    api: RawApi
    connection: RawConnection
    exec_id: str
    tty: bool
    status: int

    @classmethod
    def start(cls, api: RawApi, connection: RawConnection, exec_id: str, *, tty: bool = False) -> "Attached":
        """Start an exec on a connection."""
        connection.send(start_bytes(exec_id, tty=tty))
        status, _ = connection.head()
        return cls(api, connection, exec_id, tty, status)

    def send(self, data: bytes) -> None:
        """Write to its stdin."""
        self.connection.send(data)

    def echo(self, line: bytes) -> bytes:
        """Write to its stdin and return as many bytes of its stdout, for a session that runs `cat`."""
        self.send(line)
        frame = self.connection.read(8 + len(line))
        return frame[8:]

    def finish(self) -> tuple[bytes, bytes]:
        """Read to the end of the stream; return stdout and stderr. A TTY has only the first."""
        data = self.connection.until_closed()
        if self.tty:
            return data, b""
        demultiplexer = Demultiplexer()
        pieces = demultiplexer.feed(data)
        assert demultiplexer.at_boundary, f"the stream was cut within a frame: {data[-64:]!r}"
        return (
            b"".join(piece for stream, piece in pieces if stream == 1),
            b"".join(piece for stream, piece in pieces if stream == 2),
        )

    def exit_code(self) -> int:
        """Return the exit code that inspect has *now*: at the end of the stream it must be there."""
        inspected = self.api.inspect(self.exec_id)
        assert not inspected["Running"], inspected
        return int(inspected["ExitCode"])


def request_bytes(method: str, path: str, body: Any = None, **headers: str) -> bytes:
    """Return an HTTP/1.1 request; `body` is bytes as they are, or something to be JSON. `_` in names means `-`."""
    fields = {"Host": "docker"} | {name.replace("_", "-"): value for name, value in headers.items()}
    data = b""
    if body is not None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {"Content-Type": "application/json", "Content-Length": str(len(data))} | fields
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + data


def start_bytes(exec_id: str, *, detach: bool = False, tty: bool = False) -> bytes:
    """Return a start request as the docker CLI sends it."""
    upgrade = {} if detach else {"Connection": "Upgrade", "Upgrade": "tcp"}
    return request_bytes("POST", f"/exec/{exec_id}/start", {"Detach": detach, "Tty": tty}, **upgrade)
