"""A client that holds the service to the document: no answer passes it unjudged."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from contract.document import ROUTE_HEADERS, Document
from support.raw_http import RawConnection, Response, demultiplex, encode_request
from support.runtimes import TestContainer

Json = dict[str, Any]

NO_SUCH_ID = "0" * 64


def tell_size(container: TestContainer) -> tuple[str, ...]:
    """Return a command that prints the size of its terminal, `rows columns`, which must have one.

    Under runc the first command already finds it. crun releases the process and sets the size behind it
    (libcrun_container_exec_with_options), and what reads it at once may be faster.
    """
    if container.host.name == "crun":
        return ("sh", "-c", 'until size=$(stty size 2>/dev/null); [ "$size" ]; do :; done; echo $size')
    return ("stty", "size")


@dataclass(frozen=True, slots=True)
class Stream:
    """A hijacked connection, from behind the head of its answer on."""

    head: Response
    connection: RawConnection

    def read_raw(self) -> bytes:
        """Read to the end, and return the bytes as they are."""
        return self.connection.read_to_end()

    def read_frames(self) -> tuple[bytes, bytes]:
        """Read to the end, and return (stdout, stderr)."""
        return demultiplex(self.connection.read_to_end())

    def send(self, data: bytes) -> None:
        """Send stdin."""
        self.connection.send(data)

    def half_close(self) -> None:
        """End stdin."""
        self.connection.half_close()


@dataclass(frozen=True, slots=True)
class Api:
    """One service. Every answer, heads of streams included, is checked against the document."""

    socket: Path
    document: Document

    def call(
        self, method: str, target: str, body: object = None, *, headers: Mapping[str, str] | None = None
    ) -> Response:
        """Send one request on a connection of its own. `body` is sent as JSON, or as it is when it is bytes."""
        fields, data = _encode_body(body, headers)
        with RawConnection(self.socket) as connection:
            response = connection.request(method, target, headers=fields, body=data)
        return self.checked(method, target, response)

    def checked(self, method: str, target: str, response: Response) -> Response:
        """Return `response` if it is what the document says."""
        if response.status != 404 or response.body not in ((b"",) if method == "HEAD" else _PAGE_NOT_FOUND):
            self.document.check(self.document.operation(method, target), response)
        missing = [name for name in ROUTE_HEADERS if name not in response.headers]
        assert not missing, f"no {missing} in {response}"
        if response.status >= 400:
            # aiodocker compares the whole header, parameters included.
            assert response.headers["content-type"] == "application/json", response
        return response

    def create(self, container_id: str, *args: str, version: str = "", **fields: Any) -> str:
        """Create a session and return its id."""
        response = self.call("POST", f"{version}/containers/{container_id}/exec", {"Cmd": args, **fields})
        assert response.status == 201, response
        return str(response.json["Id"])

    def create_attached(self, container_id: str, *args: str, **fields: Any) -> str:
        """Create a session with all three streams, and return its id."""
        attached = dict.fromkeys(("AttachStdin", "AttachStdout", "AttachStderr"), True)
        return self.create(container_id, *args, **attached | fields)

    @contextlib.contextmanager
    def attach(
        self, session_id: str, *, version: str = "", upgrade: bool = True, behind: bytes = b"", **fields: Any
    ) -> Iterator[Stream]:
        """Start a session and yield its stream. `behind` is sent in one piece with the request."""
        target = f"{version}/exec/{session_id}/start"
        upgraded = {"Connection": "Upgrade", "Upgrade": "tcp"} if upgrade else {}
        headers, data = _encode_body(fields, upgraded)
        with RawConnection(self.socket) as connection:
            connection.send(encode_request("POST", target, headers=headers, body=data) + behind)
            head = connection.read_head()
            yield Stream(self.checked("POST", target, head), connection)

    def run(self, container_id: str, *args: str, **fields: Any) -> Json:
        """Run a command to its end, and return what inspect says of its session."""
        session_id = self.create(container_id, *args, **{"AttachStdout": True, **fields})
        with self.attach(session_id) as stream:
            stream.read_raw()
        return self.inspect(session_id)

    def start_detached(self, session_id: str) -> Response:
        """Start a session without a stream."""
        return self.call("POST", f"/exec/{session_id}/start", {"Detach": True})

    def inspect(self, session_id: str) -> Json:
        """Return a session."""
        response = self.call("GET", f"/exec/{session_id}/json")
        assert response.status == 200, response
        inspection: Json = response.json
        return inspection

    @contextlib.contextmanager
    def events(self, **parameters: Any) -> Iterator[Iterator[Json]]:
        """Yield the event stream; it is followed from the moment the `with` begins. Filters go in as `filters`."""
        if "filters" in parameters:
            parameters["filters"] = json.dumps(parameters["filters"])
        target = f"/events?{urlencode(parameters)}"
        with RawConnection(self.socket) as connection:
            connection.send(encode_request("GET", target))
            head = connection.read_head()
            assert head.status == 200, head
            self.checked("GET", target, head)
            yield self._judged(connection)

    def _judged(self, connection: RawConnection) -> Iterator[Json]:
        schema = {"$ref": "#/components/schemas/Event"}
        for event in connection.read_json_lines():
            assert self.document.errors(schema, event) == [], event
            yield event


_PAGE_NOT_FOUND = (
    b'{"message": "page not found"}',
    b'{"cause": "page not found", "message": "page not found", "response": 404}',
)


def _encode_body(body: object, headers: Mapping[str, str] | None) -> tuple[dict[str, str], bytes | None]:
    fields = dict(headers or {})
    if body is None:
        return fields, None
    if isinstance(body, bytes):
        return fields, body
    return {"Content-Type": "application/json", **fields}, json.dumps(body).encode()
