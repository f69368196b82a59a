"""The exec API over `support.raw`: every call can be taken apart, and nothing stands between it and the wire."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from execgate.wire.stdcopy import STDERR, STDOUT, Demultiplexer
from support.raw import TIMEOUT, Answer, Connection, Target, request_bytes

OUTPUT: dict[str, Any] = {"AttachStdout": True, "AttachStderr": True}
ATTACHED: dict[str, Any] = {"AttachStdin": True, **OUTPUT}

_UPGRADE = {"Connection": "Upgrade", "Upgrade": "tcp"}


def start_bytes(
    session_id: str,
    *,
    version: str = "",
    upgrade: bool = True,
    headers: Mapping[str, str] | None = None,
    **fields: Any,
) -> bytes:
    """Return a request that starts a session with Docker's `fields`; `upgrade` asks for 101, unless they detach."""
    asked = _UPGRADE if upgrade and not fields.get("Detach") else {}
    return request_bytes("POST", f"{version}/exec/{session_id}/start", fields, {**asked, **(headers or {})})


def demultiplex(data: bytes) -> tuple[bytes, bytes]:
    """Return (stdout, stderr) of a whole multiplexed stream; fails when it holds others or ends within a frame."""
    demultiplexer = Demultiplexer()
    output = {STDOUT: bytearray(), STDERR: bytearray()}
    for stream, payload in demultiplexer.feed(data):
        output[stream] += payload
    assert demultiplexer.at_boundary, f"the stream ends within a frame: {data[-64:]!r}"
    return bytes(output[STDOUT]), bytes(output[STDERR])


@contextlib.contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[None]:
    """Do `work` in a thread beside what the `with` holds; its failure is the test's."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        yield
        done.result()


@dataclass(frozen=True, slots=True)
class Finished:
    """An exec that is over: what it wrote, and its exit code by inspect."""

    stdout: bytes
    stderr: bytes
    exit_code: int | None


@dataclass(frozen=True, slots=True)
class Stream:
    """A hijacked connection, from behind the head of its answer on; use it in a `with`.

    `multiplexed` says how the output is framed: it follows the `Tty` of the start, as in Docker's tree. In libpod's
    the creation decides: there read with `read_raw` or `read_frames`.
    """

    api: "RawApi"
    id: str
    connection: Connection
    head: Answer
    multiplexed: bool

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def status(self) -> int:
        """101 or 200 for a stream, else the status of the refusal."""
        return self.head.status

    def send(self, data: bytes) -> None:
        """Send stdin, all of it."""
        self.connection.send(data)

    def half_close(self) -> None:
        """End stdin."""
        self.connection.half_close()

    def close(self) -> None:
        """Hang up."""
        self.connection.close()

    def echo(self, line: bytes) -> bytes:
        """Send stdin and return as many bytes of stdout, for a session without a terminal that runs `cat`."""
        self.send(line)
        return self.connection.read_exactly(8 + len(line))[8:]

    def read_raw(self) -> bytes:
        """Read to the end, and return the bytes as they are."""
        return self.connection.read_to_end()

    def read_frames(self) -> tuple[bytes, bytes]:
        """Read to the end, and return (stdout, stderr)."""
        return demultiplex(self.connection.read_to_end())

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """Yield (1 stdout or 2 stderr, bytes) as they come, up to the end; a raw stream is all stdout.

        An end in the middle of a frame is an AssertionError: bytes are missing.
        """
        demultiplexer = Demultiplexer()
        while data := self.connection.read():
            if self.multiplexed:
                yield from demultiplexer.feed(data)
            else:
                yield STDOUT, data
        assert demultiplexer.at_boundary, f"the stream ends within a frame: {demultiplexer}"

    def output(self) -> tuple[bytes, bytes]:
        """Read to the end, and return (stdout, stderr); a raw stream has only the first."""
        return self._split(self.connection.read_to_end())

    def output_until(self, marker: bytes) -> bytes:
        """Return the output, stdout and stderr together, up to the first piece that completes `marker`.

        Only for output that is small enough to be read whole; what the piece holds behind the marker is included.
        """
        seen = b""
        for _, data in self.pieces():
            seen += data
            if marker in seen:
                return seen
        raise AssertionError(f"the stream ended without {marker!r}: {seen[-200:]!r}")

    def finish(self) -> tuple[bytes, bytes]:
        """Return `output`, even when the connection ends in a reset: all that was sent comes before that."""
        return self._split(self.connection.read_until_closed())

    def exit_code(self) -> int:
        """Return the exit code that inspect has *now*: at the end of the stream it must be there."""
        inspected = self.api.inspect(self.id)
        assert not inspected["Running"], inspected
        return int(inspected["ExitCode"])

    def _split(self, data: bytes) -> tuple[bytes, bytes]:
        return demultiplex(data) if self.multiplexed else (data, b"")


class RawApi:
    """One service, one connection a request; `headers` are sent with each."""

    def __init__(self, target: Target, *, headers: Mapping[str, str] | None = None) -> None:
        self.target = target
        self.headers = dict(headers or {})

    def checked(self, method: str, target: str, answer: Answer) -> Answer:
        """Return what the service answered: for those who have more to say about it."""
        return answer

    def connect(self, *, timeout: float = TIMEOUT) -> Connection:
        """Open a connection."""
        return Connection(self.target, timeout=timeout)

    def call(
        self, method: str, target: str, body: object = None, *, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Send one request, as `request_bytes` makes it, and return its answer."""
        headers = {**self.headers, **(headers or {})}
        with self.connect() as connection:
            return self.checked(method, target, connection.request(method, target, body, headers))

    def create(self, container_id: str, *cmd: str, version: str = "", **fields: Any) -> str:
        """Create a session with Docker's `fields`, and return its id. Nothing is attached unless they say so."""
        answer = self.call("POST", f"{version}/containers/{container_id}/exec", {"Cmd": cmd, **fields})
        assert answer.status == 201, answer
        return str(answer.json["Id"])

    def create_attached(self, container_id: str, *cmd: str, **fields: Any) -> str:
        """Create a session with all three streams, unless `fields` say otherwise, and return its id."""
        return self.create(container_id, *cmd, **ATTACHED | fields)

    def attach(
        self,
        session_id: str,
        *,
        version: str = "",
        upgrade: bool = True,
        stdin: bytes = b"",
        end: bool = False,
        **fields: Any,
    ) -> Stream:
        """Start a session and return its stream once the head of the answer is here.

        `stdin` goes out in one piece with the request; with `end` the half-close follows at once.
        """
        connection = self.connect()
        try:
            request = start_bytes(session_id, version=version, upgrade=upgrade, headers=self.headers, **fields)
            connection.send(request + stdin)
            if end:
                connection.half_close()
            head = self.checked("POST", f"{version}/exec/{session_id}/start", connection.read_head())
        except BaseException:
            connection.close()
            raise
        return Stream(self, session_id, connection, head, multiplexed=not fields.get("Tty"))

    def reattach(self, session_id: str, *, after: int | None = None, tty: bool = False) -> Stream:
        """Attach to a session that runs, or has written something: from the offset `after` on, or from now on."""
        query = "" if after is None else f"?after={after}"
        headers = {**_UPGRADE, **self.headers}
        connection = self.connect()
        try:
            connection.send(request_bytes("POST", f"/exec/{session_id}/attach{query}", None, headers))
            head = connection.read_head()
            assert head.status == 101, head
        except BaseException:
            connection.close()
            raise
        return Stream(self, session_id, connection, head, multiplexed=not tty)

    def open(self, container_id: str, *cmd: str, stdin: bool = False, tty: bool = False, **fields: Any) -> Stream:
        """Create a session with its output attached, and stdin if it is to be, and start it."""
        session_id = self.create(container_id, *cmd, Tty=tty, AttachStdin=stdin, **OUTPUT, **fields)
        return self.attach(session_id, Detach=False, Tty=tty)

    def pipe(self, container_id: str, *cmd: str, stdin: bytes = b"", **fields: Any) -> Finished:
        """Run a command to its end as a filter: create, start, send, read, inspect."""
        session_id = self.create_attached(container_id, *cmd, **fields)
        with self.attach(session_id, stdin=stdin, end=True, Detach=False, Tty=False) as stream:
            stdout, stderr = stream.output()
        return Finished(stdout, stderr, self.inspect(session_id)["ExitCode"])

    def start_detached(self, session_id: str) -> Answer:
        """Start a session without a stream."""
        return self.call("POST", f"/exec/{session_id}/start", {"Detach": True})

    def inspect(self, session_id: str) -> dict[str, Any]:
        """Return what inspect says of a session."""
        answer = self.call("GET", f"/exec/{session_id}/json")
        assert answer.status == 200, answer
        inspected: dict[str, Any] = answer.json
        return inspected

    def wait_stopped(self, session_id: str, *, timeout: float = TIMEOUT) -> dict[str, Any]:
        """Return what inspect says once a session has ended.

        This polls: it is for services that may have been started after the event. `ended` does not.
        """
        deadline = time.monotonic() + timeout
        while (inspected := self.inspect(session_id))["Running"]:
            assert time.monotonic() < deadline, f"still running after {timeout:g} s: {inspected}"
            time.sleep(0.01)
        return inspected

    def ended(self, session_id: str) -> int:
        """Wait for the event of a session's end, past or to come, and return its exit code."""
        with self.events(since="1", filters={"event": ["exec_die"]}) as events:
            for event in events:
                attributes = event["Actor"]["Attributes"]
                if attributes["execID"] == session_id:
                    return int(attributes["exitCode"])
        raise AssertionError(f"the event stream ended without the end of {session_id}")

    @contextlib.contextmanager
    def events(self, **parameters: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """Yield the event stream; it is followed from the moment the `with` begins. `filters` is sent as JSON."""
        if "filters" in parameters:
            parameters["filters"] = json.dumps(parameters["filters"])
        target = f"/events?{urlencode(parameters)}"
        with self.connect() as connection:
            connection.send(request_bytes("GET", target, None, self.headers))
            head = connection.read_head()
            assert head.status == 200, head
            self.checked("GET", target, head)
            yield connection.read_json_lines()
