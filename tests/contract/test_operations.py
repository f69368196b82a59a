"""Each operation, each status that its documentation names, from a real service with real containers.

The table says how to provoke what. Its counterpart in the document is compared with it, so that no status can be
documented without being seen, and none is seen without being documented.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from contract.api import NO_SUCH_ID, Api
from contract.document import ROUTE_HEADERS, Document, Operation
from execgate.http.front import HEAD_TIMEOUT
from execgate.http.server import MAX_BODY
from support.access import bearer, rule, write_policy
from support.api import RawApi
from support.raw import Answer, request_bytes
from support.runtimes import RuntimeHost, TestContainer
from support.service import Service

OPERATIONS = {str(operation): operation for operation in Document.load().operations}

REFUSALS: dict[int, dict[str, str]] = {
    413: {"Content-Length": str(MAX_BODY + 1)},
    415: {"Content-Encoding": "gzip"},
    417: {"Expect": "200-maybe"},
    431: {"X-Large": "x" * 40_000},
    501: {"Transfer-Encoding": "gzip"},
    414: {},
    505: {},
}
"""What the connection's front refuses, and the header that provokes it."""

NOT_PROVOKED = {503: "the host would have to run out of something"}
NO_500 = frozenset(OPERATIONS) - {
    f"{method} {prefix}{path}"
    for prefix in ("", "/libpod")
    for method, path in [
        ("POST", "/exec/{id}/start"),
        ("GET", "/containers/{name}/json"),
        ("POST", "/containers/{name}/exec"),
        ("POST", "/containers/{name}/exec/run"),
    ]
}
"""Operations in which only a bug of ours gives a 500."""

LIBPOD = "/v4.3.1/libpod"
_NOT_KNOWN_TO_BE_LIBPOD = (414, 505)  # the request line itself is refused, and its path with it


@dataclass(frozen=True, slots=True)
class Scene:
    """What a provocation can use."""

    api: Api
    running: TestContainer
    stopped: TestContainer
    new_container: Callable[..., TestContainer]

    def create(self, *args: str) -> str:
        return self.api.create(self.running.id, *(args or ("true",)), AttachStdout=True)

    def start(self, session_id: str, *, upgrade: bool = True, version: str = "", **fields: Any) -> Answer:
        with self.api.attach(session_id, version=version, upgrade=upgrade, **fields) as stream:
            stream.read_raw()
        return stream.head

    def corrupt(self) -> "contextlib.AbstractContextManager[TestContainer]":
        return corrupt_spec(self.new_container())


Provocation = Callable[[Scene], Answer]


def _get(target: str) -> Provocation:
    return lambda scene: scene.api.call("GET", target.format(scene=scene, none=NO_SUCH_ID))


def _post(target: str, body: object = None) -> Provocation:
    return lambda scene: scene.api.call("POST", target.format(scene=scene, none=NO_SUCH_ID), body)


def _with_session(method: str, target: str, body: object = None, *, ended: bool = False) -> Provocation:
    """Do this to a session that was only created, or has ended."""

    def provoke(scene: Scene) -> Answer:
        session_id = scene.create()
        if ended:
            scene.start(session_id)
        return scene.api.call(method, target.format(session_id), body)

    return provoke


def _remove_running(scene: Scene) -> Answer:
    session_id = scene.create("sleep", "1000")
    scene.api.start_detached(session_id)
    response = scene.api.call("POST", f"{LIBPOD}/exec/{session_id}/remove", {"Force": False})
    assert scene.api.call("POST", f"{LIBPOD}/exec/{session_id}/remove", {"Force": True}).status == 200
    return response


@dataclass(frozen=True, slots=True)
class _Captured:
    """Ask for the output of a session that has ended and was captured."""

    method: str
    target: str
    upgrade: bool = False

    def __call__(self, scene: Scene) -> Answer:
        session_id = scene.api.create(scene.running.id, "echo", "kept", CaptureStdout=True)
        scene.start(session_id)
        headers = {"Connection": "Upgrade", "Upgrade": "tcp"} if self.upgrade else {}
        target = self.target.format(session_id)
        with scene.api.connect() as connection:
            connection.send(request_bytes(self.method, target, headers=headers))
            head = connection.read_head()
        return scene.api.checked(self.method, target, head)


def _captured_result(target: str) -> Provocation:
    def provoke(scene: Scene) -> Answer:
        session_id = scene.api.create(scene.running.id, "echo", "kept", CaptureStdout=True)
        scene.start(session_id)
        return scene.api.call("GET", target.format(session_id))

    return provoke


def _with_running(method: str, target: str, body: object = None) -> Provocation:
    """Do this to a session that runs and has stdin."""

    def provoke(scene: Scene) -> Answer:
        session_id = scene.api.create(
            scene.running.id, "sleep", "1000", AttachStdin=True, AttachStdout=True, OnDisconnect="keep"
        )
        scene.api.start_detached(session_id)
        response = scene.api.call(method, target.format(session_id), body)
        scene.api.call("DELETE", f"/exec/{session_id}?force=1")
        return response

    return provoke


def _inspect_corrupt(scene: Scene, prefix: str = "") -> Answer:
    with scene.corrupt() as container:
        return scene.api.call("GET", f"{prefix}/containers/{container.id}/json")


def _create_in_corrupt(scene: Scene, prefix: str = "") -> Answer:
    with scene.corrupt() as container:
        return scene.api.call("POST", f"{prefix}/containers/{container.id}/exec", {"Cmd": ["true"]})


def _run_in_corrupt(scene: Scene, prefix: str = "") -> Answer:
    with scene.corrupt() as container:
        return scene.api.call("POST", f"{prefix}/containers/{container.id}/exec/run", {"Cmd": ["true"]})


def _start_a_loop(scene: Scene, prefix: str = "") -> Answer:
    loop = scene.running.rootfs / "loop"
    if not loop.is_symlink():
        loop.symlink_to("loop")
    return scene.api.call("POST", f"{prefix}/exec/{scene.create('/loop')}/start", {"Detach": True})


def _verbs(prefix: str) -> dict[tuple[str, int], Provocation]:
    """The verbs beyond Docker's, which both trees have."""
    run, unknown = {"Cmd": ["true"]}, prefix + "/exec/{none}"
    provocations: dict[tuple[str, int], Provocation] = {
        ("GET /exec/json", 200): _get(f"{prefix}/exec/json"),
        ("GET /exec/json", 404): _get(prefix + "/exec/json?filters=%7B%22container%22:%5B%22none-such%22%5D%7D"),
        ("GET /containers/{name}/exec/json", 200): _get(prefix + "/containers/{scene.running.id}/exec/json"),
        ("GET /containers/{name}/exec/json", 404): _get(f"{prefix}/containers/none-such/exec/json"),
        ("POST /containers/{name}/exec/run", 200): _post(prefix + "/containers/{scene.running.id}/exec/run", run),
        ("POST /containers/{name}/exec/run", 404): _post(f"{prefix}/containers/none-such/exec/run", run),
        ("POST /containers/{name}/exec/run", 409): _post(prefix + "/containers/{scene.stopped.id}/exec/run", run),
        ("POST /containers/{name}/exec/run", 500): lambda scene: _run_in_corrupt(scene, prefix),
        ("POST /exec/{id}/kill", 204): _with_running("POST", prefix + "/exec/{}/kill"),
        ("POST /exec/{id}/kill", 404): _post(f"{unknown}/kill"),
        ("POST /exec/{id}/kill", 409): _with_session("POST", prefix + "/exec/{}/kill", ended=True),
        ("POST /exec/{id}/stop", 204): _with_running("POST", prefix + "/exec/{}/stop"),
        ("POST /exec/{id}/stop", 404): _post(f"{unknown}/stop"),
        ("POST /exec/{id}/stop", 409): _with_session("POST", prefix + "/exec/{}/stop"),
        ("POST /exec/{id}/wait", 200): _with_session("POST", prefix + "/exec/{}/wait", ended=True),
        ("POST /exec/{id}/wait", 404): _post(f"{unknown}/wait"),
        ("DELETE /exec/{id}", 204): _with_session("DELETE", prefix + "/exec/{}"),
        ("DELETE /exec/{id}", 404): lambda scene: scene.api.call("DELETE", f"{prefix}/exec/{NO_SUCH_ID}"),
        ("DELETE /exec/{id}", 409): _with_running("DELETE", prefix + "/exec/{}"),
        ("GET /exec/{id}/logs", 200): _Captured("GET", prefix + "/exec/{}/logs"),
        ("GET /exec/{id}/logs", 404): _get(f"{unknown}/logs"),
        ("GET /exec/{id}/logs", 409): _with_session("GET", prefix + "/exec/{}/logs", ended=True),
        ("GET /exec/{id}/result", 200): _captured_result(prefix + "/exec/{}/result?encoding=base64&limit=3"),
        ("GET /exec/{id}/result", 404): _get(f"{unknown}/result"),
        ("GET /exec/{id}/result", 409): _with_session("GET", prefix + "/exec/{}/result", ended=True),
        ("POST /exec/{id}/attach", 101): _Captured("POST", prefix + "/exec/{}/attach?after=0", upgrade=True),
        ("POST /exec/{id}/attach", 200): _Captured("POST", prefix + "/exec/{}/attach?after=0"),
        ("POST /exec/{id}/attach", 404): _post(f"{unknown}/attach"),
        ("POST /exec/{id}/attach", 409): _with_session("POST", prefix + "/exec/{}/attach", ended=True),
        ("POST /exec/{id}/stdin", 204): _with_running("POST", prefix + "/exec/{}/stdin?eof=1", b"input"),
        ("POST /exec/{id}/stdin", 404): _post(f"{unknown}/stdin"),
        ("POST /exec/{id}/stdin", 409): _with_session("POST", prefix + "/exec/{}/stdin", ended=True),
    }
    tree = "/libpod" if prefix else ""
    return {(name.replace(" ", f" {tree}", 1), status): how for (name, status), how in provocations.items()}


PROVOCATIONS: dict[tuple[str, int], Provocation] = {
    ("GET /_ping", 200): _get("/_ping"),
    ("HEAD /_ping", 200): lambda scene: scene.api.call("HEAD", "/_ping"),
    ("GET /version", 200): _get("/version"),
    ("GET /info", 200): _get("/info"),
    ("GET /events", 200): _get("/events?until=1"),
    ("GET /containers/json", 200): _get("/containers/json?all=1"),
    ("GET /containers/{name}/json", 200): _get("/containers/{scene.running.id}/json"),
    ("GET /containers/{name}/json", 404): _get("/containers/none-such/json"),
    ("GET /containers/{name}/json", 500): _inspect_corrupt,
    ("GET /containers/{name}/top", 200): _get("/containers/{scene.running.id}/top"),
    ("GET /containers/{name}/top", 404): _get("/containers/none-such/top"),
    ("GET /containers/{name}/top", 409): _get("/containers/{scene.stopped.id}/top"),
    ("POST /containers/{name}/exec", 201): _post("/containers/{scene.running.id}/exec", {"Cmd": ["true"]}),
    ("POST /containers/{name}/exec", 404): _post("/containers/none-such/exec", {"Cmd": ["true"]}),
    ("POST /containers/{name}/exec", 409): _post("/containers/{scene.stopped.id}/exec", {"Cmd": ["true"]}),
    ("POST /containers/{name}/exec", 500): _create_in_corrupt,
    ("POST /exec/{id}/start", 101): lambda scene: scene.start(scene.create()),
    ("POST /exec/{id}/start", 200): lambda scene: scene.start(scene.create(), upgrade=False),
    ("POST /exec/{id}/start", 404): _post("/exec/{none}/start", {}),
    ("POST /exec/{id}/start", 409): _with_session("POST", "/exec/{}/start", {"Detach": True}, ended=True),
    ("POST /exec/{id}/start", 500): _start_a_loop,
    ("POST /exec/{id}/resize", 200): _with_session("POST", "/exec/{}/resize?h=40&w=120"),
    ("POST /exec/{id}/resize", 404): _post("/exec/{none}/resize?h=1&w=1"),
    ("POST /exec/{id}/resize", 409): _with_session("POST", "/exec/{}/resize?h=1&w=1", ended=True),
    ("GET /exec/{id}/json", 200): _with_session("GET", "/exec/{}/json"),
    ("GET /exec/{id}/json", 404): _get("/exec/{none}/json"),
    ("GET /libpod/_ping", 200): _get(f"{LIBPOD}/_ping"),
    ("HEAD /libpod/_ping", 200): lambda scene: scene.api.call("HEAD", f"{LIBPOD}/_ping"),
    ("GET /libpod/version", 200): _get(f"{LIBPOD}/version"),
    ("GET /libpod/info", 200): _get(f"{LIBPOD}/info"),
    ("GET /libpod/containers/json", 200): _get(f"{LIBPOD}/containers/json?all=1"),
    ("GET /libpod/containers/{name}/json", 200): _get(LIBPOD + "/containers/{scene.running.id}/json"),
    ("GET /libpod/containers/{name}/json", 404): _get(f"{LIBPOD}/containers/none-such/json"),
    ("GET /libpod/containers/{name}/json", 500): lambda scene: _inspect_corrupt(scene, LIBPOD),
    ("GET /libpod/containers/{name}/exists", 204): _get(LIBPOD + "/containers/{scene.stopped.id}/exists"),
    ("GET /libpod/containers/{name}/exists", 404): _get(f"{LIBPOD}/containers/none-such/exists"),
    ("POST /libpod/containers/{name}/exec", 201): _post(
        LIBPOD + "/containers/{scene.running.id}/exec", {"Cmd": ["true"]}
    ),
    ("POST /libpod/containers/{name}/exec", 404): _post(f"{LIBPOD}/containers/none-such/exec", {"Cmd": ["true"]}),
    ("POST /libpod/containers/{name}/exec", 409): _post(
        LIBPOD + "/containers/{scene.stopped.id}/exec", {"Cmd": ["true"]}
    ),
    ("POST /libpod/containers/{name}/exec", 500): lambda scene: _create_in_corrupt(scene, LIBPOD),
    ("POST /libpod/exec/{id}/start", 101): lambda scene: scene.start(scene.create(), version=LIBPOD),
    ("POST /libpod/exec/{id}/start", 200): lambda scene: scene.start(scene.create(), version=LIBPOD, upgrade=False),
    ("POST /libpod/exec/{id}/start", 404): _post(LIBPOD + "/exec/{none}/start", {}),
    ("POST /libpod/exec/{id}/start", 409): _with_session("POST", LIBPOD + "/exec/{}/start", {}, ended=True),
    ("POST /libpod/exec/{id}/start", 500): lambda scene: _start_a_loop(scene, LIBPOD),
    ("POST /libpod/exec/{id}/resize", 201): _with_session("POST", LIBPOD + "/exec/{}/resize?h=40&w=120"),
    ("POST /libpod/exec/{id}/resize", 404): _post(LIBPOD + "/exec/{none}/resize?h=1&w=1"),
    ("POST /libpod/exec/{id}/resize", 409): _with_session("POST", LIBPOD + "/exec/{}/resize?h=1&w=1", ended=True),
    ("GET /libpod/exec/{id}/json", 200): _with_session("GET", LIBPOD + "/exec/{}/json"),
    ("GET /libpod/exec/{id}/json", 404): _get(LIBPOD + "/exec/{none}/json"),
    ("POST /libpod/exec/{id}/remove", 200): _with_session("POST", LIBPOD + "/exec/{}/remove"),
    ("POST /libpod/exec/{id}/remove", 404): _post(LIBPOD + "/exec/{none}/remove"),
    ("POST /libpod/exec/{id}/remove", 409): _remove_running,
    **_verbs(""),
    **_verbs(LIBPOD),
}


@pytest.fixture
def scene(
    api: Api,
    runtime_host: RuntimeHost,
    stopped_container: TestContainer,
    new_container: Callable[..., TestContainer],
    request: pytest.FixtureRequest,
) -> Scene:
    running = request.getfixturevalue(f"{runtime_host.name}_container")
    return Scene(api, running, stopped_container, new_container)


@pytest.mark.parametrize(("operation", "status"), PROVOCATIONS)
def test_an_answer_is_as_documented(operation: str, status: int, scene: Scene) -> None:
    assert PROVOCATIONS[operation, status](scene).status == status


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_version_outside_the_range_is_as_documented(operation: str, api: Api) -> None:
    method = operation.partition(" ")[0]
    version, said = "1.1", "client version 1.1 is too old."
    if _is_libpod(OPERATIONS[operation]):  # there every version is served
        version, said = "1.1.1.1", "invalid API version '1.1.1.1'"
    response = api.call(method, f"/v{version}" + _path(OPERATIONS[operation]))
    assert response.status == 400
    if method != "HEAD":
        assert response.json["message"].startswith(said)


@pytest.mark.parametrize("status", REFUSALS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_refusal_is_as_documented(operation: str, status: int, api: Api) -> None:
    with api.connect() as connection:
        connection.send(_refused(OPERATIONS[operation], status))
        response = connection.read_answer()
        assert connection.read_to_end() == b"", "a refused connection is closed"
    _check_refusal(OPERATIONS[operation], response, api)
    assert response.status == status


def test_slow_requests_are_refused_as_documented(api: Api) -> None:
    """Each operation at once, because each waits for the head's whole time."""
    assert HEAD_TIMEOUT <= 10
    with contextlib.ExitStack() as stack:
        waiting = [(operation, stack.enter_context(api.connect())) for operation in OPERATIONS.values()]
        for operation, connection in waiting:
            request = request_bytes(operation.method.upper(), _target(operation))
            connection.send(request.removesuffix(b"\r\n"))
        for operation, connection in waiting:
            response = connection.read_answer()
            assert response.status == 408, operation
            _check_refusal(operation, response, api)


def test_the_cap_on_sessions_is_as_documented(
    new_service: Callable[..., Service], runc_container: TestContainer, document: Document
) -> None:
    api = Api(new_service(env={"EXECGATE_MAX_SESSIONS": "1"}).socket, document)
    api.create(runc_container.id, "true")
    for path in ("/exec", "/exec/run", f"{LIBPOD}/exec", f"{LIBPOD}/exec/run"):
        prefix, verb = path.split("/exec", 1)
        response = api.call("POST", f"{prefix}/containers/{runc_container.id}/exec{verb}", {"Cmd": ["true"]})
        assert response.status == 429
        assert response.json["message"] == "1 exec sessions are known already; try again later"
        assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_void_token_is_refused_as_documented(operation: str, api: Api) -> None:
    one = OPERATIONS[operation]
    headers = {"Authorization": "Bearer void"}
    answer = api.call(one.method.upper(), _target(one), {} if one.method == "post" else None, headers=headers)
    assert answer.status == 401
    assert answer.headers["www-authenticate"]


def test_what_may_be_seen_and_not_done_is_refused_as_documented(
    new_service: Callable[..., Service], host_dir: Path, runc_container: TestContainer, document: Document
) -> None:
    directory = host_dir / "forbidden"
    watches = rule("watches", ["uid:0"], verbs=["inspect"], others=["inspect"])
    write_policy(directory, rule("works", ["token:t"]), watches)
    works = RawApi(directory / "execgate.sock", headers=bearer(directory, "t"))
    api = Api(new_service(directory).socket, document)
    session = works.create(runc_container.id, "true")
    names = {"{name}": runc_container.id, "{id}": session}
    for one in OPERATIONS.values():
        if 403 in one.statuses:
            path = re.sub(r"{name}|{id}", lambda found: names[found[0]], one.path)
            target = path.replace("/libpod", LIBPOD, 1) if path.startswith("/libpod") else path
            body = {"Cmd": ["true"], "Detach": True} if one.method == "post" else None
            if target.endswith("/resize"):
                target, body = f"{target}?h=1&w=1", None
            answer = api.call(one.method.upper(), target, body)
            assert answer.status == 403, (one, answer)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_documented_status_is_provoked(operation: str) -> None:
    provoked = {status for name, status in PROVOCATIONS if name == operation} | {400, 401, 408} | REFUSALS.keys()
    if 403 in OPERATIONS[operation].statuses:
        provoked.add(403)  # by test_what_may_be_seen_and_not_done_is_refused_as_documented
    excused = NOT_PROVOKED.keys() | ({500} if operation in NO_500 else set())
    if operation.endswith(("/containers/{name}/exec", "/containers/{name}/exec/run", "/exec/{id}/start")):
        provoked.add(429)  # above, and in test_limits.py
    assert OPERATIONS[operation].statuses - excused == provoked


REQUESTS = [
    (operation.path, name, example["value"])
    for operation in OPERATIONS.values()
    for media in operation.definition.get("requestBody", {}).get("content", {}).values()
    if media
    for name, example in media.get("examples", {"": {"value": media.get("example")}}).items()
]


@pytest.mark.parametrize(("path", "name", "body"), REQUESTS, ids=[f"{path} {name}" for path, name, _ in REQUESTS])
def test_an_example_of_a_request_is_accepted(
    path: str, name: str, body: dict[str, Any], api: Api, container: TestContainer
) -> None:
    """What people copy from the document works."""
    prefix = LIBPOD if path.startswith("/libpod/") else ""
    if path.endswith("/exec"):
        assert api.call("POST", f"{prefix}/containers/{container.id}/exec", body).status == 201
        return
    if path.endswith("/run"):
        response = api.call("POST", f"{prefix}/containers/{container.id}/exec/run", body)
        assert (response.status, response.json["ExitCode"]) == (200, 0), response
        return
    session_id = api.create(container.id, "true", Tty=body.get("Tty", False), AttachStdout=True)
    if path.endswith("/remove") or body.get("Detach"):
        verb = path.rpartition("/")[2]
        assert api.call("POST", f"{prefix}/exec/{session_id}/{verb}", body).status == 200
        return
    with api.attach(session_id, version=prefix, **body) as stream:
        assert stream.head.status == 101
        stream.read_raw()


@contextlib.contextmanager
def corrupt_spec(container: TestContainer) -> Iterator[TestContainer]:
    """Make a container's configuration unreadable for a while: crun's own copy, for it is read first."""
    copy = container.host.root / container.id / "config.json"
    path = copy if copy.exists() else container.bundle / "config.json"
    good = path.read_text()
    assert json.loads(good)
    path.write_text("{")
    try:
        yield container
    finally:
        path.write_text(good)


def _is_libpod(operation: Operation) -> bool:
    return operation.path.startswith("/libpod/")


def _path(operation: Operation) -> str:
    return operation.path.format(name="none-such", id=NO_SUCH_ID)


def _target(operation: Operation) -> str:
    return ("/v4.3.1" if _is_libpod(operation) else "") + _path(operation)


def _refused(operation: Operation, status: int) -> bytes:
    target = _target(operation) + ("?" + "x" * 9000 if status == 414 else "")
    request = request_bytes(operation.method.upper(), target, headers=REFUSALS[status])
    return request.replace(b" HTTP/1.1\r\n", b" HTTP/2.0\r\n", 1) if status == 505 else request


def _check_refusal(operation: Operation, response: Answer, api: Api) -> None:
    """The answer to a HEAD has a body here: a client that cannot be understood asked for it."""
    assert not response.headers.keys() & set(ROUTE_HEADERS), response
    assert response.headers["content-type"] == "application/json"
    assert response.headers["connection"] == "close"
    in_libpod_s_form = _is_libpod(operation) and response.status not in _NOT_KNOWN_TO_BE_LIBPOD
    assert list(response.json) == (["cause", "message", "response"] if in_libpod_s_form else ["message"])
    if operation.method != "head":
        api.document.check(operation, response)
