"""`support.api` for many clients in one event loop: the exec API over asyncio and a bare unix socket.

It sends exactly the bytes it is told to, together or apart, ends or breaks its side whenever the test says so, and
is as fast as Python goes, so that what a test measures is the service.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp

from execgate.wire import stdcopy

READ_SIZE = 256 * 1024

_HEAD_LIMIT = 64 * 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer, read to its end."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Finished:
    """An exec that is over: what it wrote, and its exit code by inspect."""

    stdout: bytes
    stderr: bytes
    exit_code: int | None


class RawStream:
    """A hijacked connection, from behind the head of its answer on.

    `head` is that head, with the blank line. `multiplexed` says how the output is framed.
    """

    def __init__(self, connection: socket.socket, head: bytes, rest: bytes, *, multiplexed: bool) -> None:
        self.connection = connection
        self.head = head
        self.multiplexed = multiplexed
        self._rest = rest

    @property
    def status(self) -> int:
        """101 or 200 for a stream, else the status of the refusal."""
        return int(self.head.split(b" ", 2)[1])

    async def read(self, size: int = READ_SIZE) -> bytes:
        """Return at most `size` bytes as they come, frames and all; b"" at the end."""
        if self._rest:
            data, self._rest = self._rest[:size], self._rest[size:]
            return data
        return await asyncio.get_running_loop().sock_recv(self.connection, size)

    def unread(self, data: bytes) -> None:
        """Put back what `read` returned: it comes again, before what follows it."""
        self._rest = data + self._rest

    async def pieces(self) -> AsyncIterator[tuple[int, bytes]]:
        """Yield (1 stdout or 2 stderr, bytes) up to the end; a raw stream is all stdout.

        An end in the middle of a frame is an AssertionError: bytes are missing.
        """
        demultiplexer = stdcopy.Demultiplexer()
        while data := await self.read():
            if self.multiplexed:
                for piece in demultiplexer.feed(data):
                    yield piece
            else:
                yield stdcopy.STDOUT, data
        assert demultiplexer.at_boundary, f"the stream ends in the middle of a frame: {demultiplexer}"

    async def output(self) -> tuple[bytes, bytes]:
        """Return all of (stdout, stderr), up to the end of the stream."""
        parts: dict[int, bytearray] = {stdcopy.STDOUT: bytearray(), stdcopy.STDERR: bytearray()}
        async for stream, data in self.pieces():
            parts[stream] += data
        return bytes(parts[stdcopy.STDOUT]), bytes(parts[stdcopy.STDERR])

    async def output_until(self, marker: bytes) -> bytes:
        """Return the output, stdout and stderr together, up to the first piece that completes `marker`.

        Only for output that is small enough to be read whole; what the piece holds behind the marker is included.
        """
        seen = b""
        async for _, data in self.pieces():
            seen += data
            if marker in seen:
                return seen
        raise AssertionError(f"the stream ended without {marker!r}: {seen[-200:]!r}")

    async def write(self, data: bytes) -> None:
        """Send input, all of it."""
        await asyncio.get_running_loop().sock_sendall(self.connection, data)

    def end_input(self) -> None:
        """Half-close: there will be no more input."""
        self.connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Hang up. With output unread the kernel makes that a reset."""
        self.connection.close()


@dataclass(frozen=True, slots=True)
class RawClient:
    """The exec API of the service that listens on `path`, one connection a request."""

    path: Path

    async def call(self, method: str, path: str, body: object = None) -> Answer:
        """Make one request, with `body` as JSON unless it is None, and return its answer."""
        stream = await self._send(request_bytes(method, path, body, "Connection: close"))
        try:
            content = bytearray()
            while data := await stream.read():
                content += data
        finally:
            stream.close()
        lines = stream.head.decode("latin-1").split("\r\n")[1:]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if value}
        return Answer(stream.status, headers, bytes(content))

    async def create(self, container_id: str, *argv: str, **fields: Any) -> str:
        """Create an exec and return its id. Everything is attached unless `fields`, Docker's own, say otherwise."""
        body = {"AttachStdin": True, "AttachStdout": True, "AttachStderr": True, "Cmd": list(argv)} | fields
        answer = await self.call("POST", f"/containers/{container_id}/exec", body)
        assert answer.status == 201, answer
        return str(answer.json()["Id"])

    async def start(
        self, session_id: str, *, stdin: bytes = b"", end: bool = False, tty: bool = False, upgrade: bool = True
    ) -> RawStream:
        """Start an exec and return its stream once the head of the answer is here.

        `stdin` goes out in the same write as the request; with `end` the half-close follows at once.
        """
        request = start_request(session_id, tty=tty, upgrade=upgrade)
        return await self._send(request + stdin, end=end, multiplexed=not tty)

    async def run(self, container_id: str, *argv: str, stdin: bytes = b"", **fields: Any) -> Finished:
        """Create, start, read to the end, inspect: what a client does for one exec without a TTY."""
        session_id = await self.create(container_id, *argv, **fields)
        stream = await self.start(session_id, stdin=stdin, end=True)
        try:
            stdout, stderr = await stream.output()
        finally:
            stream.close()
        return Finished(stdout, stderr, (await self.inspect(session_id))["ExitCode"])

    async def inspect(self, session_id: str) -> dict[str, Any]:
        """What `GET /exec/{id}/json` says."""
        answer = await self.call("GET", f"/exec/{session_id}/json")
        assert answer.status == 200, answer
        found: dict[str, Any] = answer.json()
        return found

    async def ended(self, session_id: str) -> int:
        """Wait for the event of the exec's end, past or to come, and return its exit code."""
        query = urlencode({"since": "1", "filters": json.dumps({"event": ["exec_die"]})})
        async with self.events(query) as lines:
            async for line in lines:
                attributes = json.loads(line)["Actor"]["Attributes"]
                if attributes["execID"] == session_id:
                    return int(attributes["exitCode"])
        raise AssertionError(f"the event stream ended without the end of {session_id}")

    @asynccontextmanager
    async def events(self, query: str) -> AsyncIterator[aiohttp.StreamReader]:
        """The event stream for an URL's `query`: to be read line by line, each a JSON object."""
        connector = aiohttp.UnixConnector(path=str(self.path))
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.get(f"http://localhost/events?{query}", timeout=aiohttp.ClientTimeout()) as answer,
        ):
            yield answer.content

    async def connect(self) -> socket.socket:
        """Return a connection on which nothing has been sent."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, str(self.path))
        except BaseException:
            connection.close()
            raise
        return connection

    async def _send(self, request: bytes, *, end: bool = False, multiplexed: bool = False) -> RawStream:
        connection = await self.connect()
        try:
            await asyncio.get_running_loop().sock_sendall(connection, request)
            if end:
                connection.shutdown(socket.SHUT_WR)
            return await answer_on(connection, multiplexed=multiplexed)
        except BaseException:
            connection.close()
            raise


def request_bytes(method: str, path: str, body: object = None, *headers: str) -> bytes:
    """Return a request as it goes over the wire; `body` is sent as JSON unless it is None."""
    content = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers, f"Content-Length: {len(content)}"]
    if body is not None:
        lines.append("Content-Type: application/json")
    return "\r\n".join([*lines, "", ""]).encode() + content


def start_request(session_id: str, *, tty: bool = False, upgrade: bool = True) -> bytes:
    """Return the request that starts an exec with its streams attached."""
    headers = ("Connection: Upgrade", "Upgrade: tcp") if upgrade else ()
    return request_bytes("POST", f"/exec/{session_id}/start", {"Detach": False, "Tty": tty}, *headers)


async def answer_on(connection: socket.socket, *, multiplexed: bool) -> RawStream:
    """Read the head of the answer to a request that was sent on `connection`, and return the rest as a stream."""
    received = b""
    while b"\r\n\r\n" not in received:
        data = await asyncio.get_running_loop().sock_recv(connection, _HEAD_LIMIT)
        assert data, f"the connection ended before the head of the answer did: {received!r}"
        received += data
    head, blank, rest = received.partition(b"\r\n\r\n")
    return RawStream(connection, head + blank, rest, multiplexed=multiplexed)
