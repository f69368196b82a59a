"""What the tests of the verbs beyond Docker's share: ways to start, to read, and to look into a container."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

from contract.api import Api
from execgate.wire.stdcopy import STDERR, STDOUT, Demultiplexer
from support.api import Stream
from support.raw import Answer, Connection, request_bytes
from support.runtimes import TestContainer

LIBPOD = "/v4.3.1/libpod"
UPGRADE = {"Connection": "Upgrade", "Upgrade": "tcp"}
KEPT = {"CaptureStdout": True, "CaptureStderr": True}


def begin(api: Api, container: TestContainer, *args: str, **fields: Any) -> str:
    """Create a session, start it detached, and return its id."""
    session_id = api.create(container.id, *args, **fields)
    response = api.start_detached(session_id)
    assert response.status == 200, response
    return session_id


def script(api: Api, container: TestContainer, text: str, **fields: Any) -> str:
    """As `begin`, for a shell script."""
    return begin(api, container, "sh", "-c", text, **fields)


def post(api: Api, tree: str, session_id: str, verb: str, body: object = None) -> Answer:
    """Send one of the verbs of a session; `verb` may have a query."""
    return api.call("POST", f"{tree}/exec/{session_id}/{verb}", body)


def wait(api: Api, session_id: str) -> Any:
    """Wait for the end of a session, and return what the answer says."""
    response = post(api, "", session_id, "wait")
    assert response.status == 200, response
    return response.json


def message(response: Answer) -> str:
    """The text of an error in the form of either tree."""
    return str(response.json["message"])


def listing(api: Api, path: str, **filters: list[str]) -> list[Any]:
    """List sessions, as `path` does."""
    response = api.call("GET", f"{path}?{urlencode({'filters': json.dumps(filters)})}")
    assert response.status == 200, response
    found: list[Any] = response.json
    return found


def logs(api: Api, session_id: str, *, tree: str = "", **query: Any) -> Answer:
    """Ask for captured output; the answer is read to its end."""
    return api.call("GET", f"{tree}/exec/{session_id}/logs?{urlencode(query)}")


def force_remove(api: Api, session_id: str) -> None:
    """Leave nothing of a session."""
    assert api.call("DELETE", f"/exec/{session_id}?force=1").status == 204


@contextlib.contextmanager
def opened(api: Api, method: str, target: str, *, upgrade: bool = True) -> Iterator[Stream]:
    """Send a request without a body, and yield the stream that stands behind the head of its answer."""
    with api.connect() as connection:
        connection.send(request_bytes(method, target, headers=UPGRADE if upgrade else None))
        head = api.checked(method, target, connection.read_head())
        yield Stream(api, target.split("/exec/")[1].partition("/")[0], connection, head, multiplexed=True)


@contextlib.contextmanager
def attached(api: Api, session_id: str, *, tree: str = "", upgrade: bool = True, **query: Any) -> Iterator[Stream]:
    """Attach to a session, and yield its stream."""
    target = f"{tree}/exec/{session_id}/attach?{urlencode(query)}"
    with opened(api, "POST", target, upgrade=upgrade) as stream:
        assert stream.head.status == (101 if upgrade else 200), stream.head
        yield stream


@contextlib.contextmanager
def sent(api: Api, method: str, target: str, body: object = None) -> Iterator[Connection]:
    """Send a request and yield its connection, on which the answer is still to come."""
    headers = {"Content-Type": "application/json"} if body is not None else None
    data = None if body is None else json.dumps(body).encode()
    with api.connect() as connection:
        connection.send(request_bytes(method, target, headers=headers, body=data))
        yield connection


def frames(data: bytes) -> list[tuple[int, bytes]]:
    """Return every frame of a multiplexed stream, those of stream 3 included."""
    demultiplexer = Demultiplexer()
    found = list(demultiplexer.feed(data))
    assert demultiplexer.at_boundary, data[-64:]
    return found


def output(data: bytes) -> bytes:
    """Return stdout and stderr of a multiplexed stream in the order in which they came."""
    return b"".join(payload for stream, payload in frames(data) if stream in (STDOUT, STDERR))


def commands(container: TestContainer) -> list[str]:
    """The command lines of all processes of a container."""
    return [" ".join(argv) for argv in container.processes().values()]
