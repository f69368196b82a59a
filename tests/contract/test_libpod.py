"""The libpod tree: what differs from Docker's, row by row, and what both trees share."""

import json
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from contract.api import NO_SUCH_ID, Api
from support.api import ATTACHED, OUTPUT
from support.raw import JSON, Answer, request_bytes
from support.runtimes import TestContainer
from support.tty import tell_size

V4 = "/v4.3.1/libpod"
V5 = "/v5.8.0/libpod"


def error(response: Answer) -> tuple[int, str, str]:
    """Return (status, cause, message) of an error, whose body must be libpod's and nothing else."""
    body = response.json
    assert list(body) == ["cause", "message", "response"]
    assert body["response"] == response.status
    return response.status, body["cause"], body["message"]


def post(api: Api, target: str, headers: Mapping[str, str] | None = None, **fields: Any) -> Answer:
    """Send a body as podman does: without saying what it is."""
    return api.call("POST", target, json.dumps(fields).encode(), headers=headers)


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/containers/none-such/exec"),
        ("GET", "/containers/none-such/json"),
        ("GET", "/containers/none-such/exists"),
    ],
)
def test_an_unknown_container(method: str, path: str, api: Api) -> None:
    response = api.call(method, V4 + path, b'{"Cmd": ["true"]}' if method == "POST" else None)
    message = 'no container with name or ID "none-such" found: no such container'
    assert error(response) == (404, "no such container", message)


@pytest.mark.parametrize(
    ("method", "action"), [("POST", "start"), ("POST", "resize?h=1&w=1"), ("GET", "json"), ("POST", "remove")]
)
def test_an_unknown_session(method: str, action: str, api: Api) -> None:
    response = api.call(method, f"{V4}/exec/{NO_SUCH_ID}/{action}")
    message = f"no exec session with ID {NO_SUCH_ID} found: no such exec session"
    assert error(response) == (404, "no such exec session", message)


def test_a_stopped_container(api: Api, stopped_container: TestContainer) -> None:
    response = post(api, f"{V4}/containers/{stopped_container.id}/exec", Cmd=["true"])
    message = f"container {stopped_container.id} is not running: container state improper"
    assert error(response) == (409, "container state improper", message)


def test_a_paused_container(api: Api, paused_container: TestContainer) -> None:
    response = post(api, f"{V4}/containers/{paused_container.id}/exec", Cmd=["true"])
    message = f"cannot exec in container {paused_container.id} as it is paused: container state improper"
    assert error(response) == (409, "container state improper", message)


def test_an_error_without_words_of_podman_s_own(api: Api, container: TestContainer) -> None:
    response = post(api, f"{V4}/containers/{container.id}/exec", Cmd=[])
    assert error(response) == (400, "No exec command specified", "No exec command specified")


def test_docker_s_tree_goes_on_with_docker_s_errors(api: Api) -> None:
    assert api.call("GET", "/containers/none-such/json").message == "No such container: none-such"


@pytest.mark.parametrize("path", ["/pods/json", "/containers/x/stop", "/exec", "/events", "/containers/x/top"])
def test_what_is_not_served(path: str, api: Api) -> None:
    assert error(api.call("GET", V4 + path)) == (404, "page not found", "page not found")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Encoding": "gzip", "Content-Length": "1"}, 415),
        ({"Expect": "miracles"}, 417),
        ({"Content-Length": str(2**20 + 1)}, 413),
        ({"Transfer-Encoding": "gzip, chunked"}, 501),
    ],
)
def test_early_refusals(headers: dict[str, str], status: int, api: Api) -> None:
    """Those that come before any route, as soon as the path is known."""
    for path, form in ((f"{V4}/exec/{NO_SUCH_ID}/start", ["cause", "message", "response"]), ("/info", ["message"])):
        with api.connect() as connection:
            connection.send(request_bytes("POST", path, headers=headers))
            response = connection.read_answer()
        assert response.status == status
        assert list(response.json) == form, response


# -- versions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["4", "4.0", "4.0.0", "1.0.0", "5.8.2", "99.0.0"])
def test_every_version_is_served(version: str, api: Api) -> None:
    """podman refuses none: what clients go by is the header."""
    response = api.call("GET", f"/v{version}/libpod/_ping")
    assert (response.status, response.body) == (200, b"OK")
    assert response.headers["libpod-api-version"] == "5.8.0"


def test_what_is_no_version(api: Api) -> None:
    assert error(api.call("GET", "/v4.0.0.0/libpod/_ping")) == (
        400,
        "invalid API version '4.0.0.0'",
        "invalid API version '4.0.0.0'",
    )


@pytest.mark.parametrize("path", ["/libpod/_ping", "/libpod/containers/json"])
def test_a_version_is_needed(path: str, api: Api) -> None:
    assert error(api.call("GET", path))[0] == 404


def test_only_libpod_s_answers_name_its_version(api: Api, container: TestContainer) -> None:
    session_id = api.create(container.id, "true", version=V4)
    with api.attach(session_id, version=V4) as stream:
        assert stream.head.headers["libpod-api-version"] == "5.8.0"
        stream.read_raw()
    for target in ("/_ping", "/version", "/containers/none-such/json"):
        assert "libpod-api-version" not in api.call("GET", target).headers


def test_a_ping_by_head(api: Api) -> None:
    response = api.call("HEAD", f"{V4}/_ping")
    assert (response.status, response.body) == (200, b"")


def test_the_version_stands_where_podman_looks_for_it(api: Api) -> None:
    (engine,) = api.call("GET", f"{V4}/version").json["Components"]
    assert (engine["Name"], engine["Details"]["APIVersion"]) == ("Podman Engine", "5.8.0")


def test_info(api: Api, container: TestContainer) -> None:
    info = api.call("GET", f"{V4}/info").json
    assert info["store"]["containerStore"]["running"] >= 1
    assert info["version"]["APIVersion"] == "5.8.0"


# -- create ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "text/plain"}, JSON], ids=str)
def test_no_content_type_is_refused(headers: dict[str, str], api: Api, container: TestContainer) -> None:
    created = post(api, f"{V4}/containers/{container.id}/exec", headers, Cmd=["true"])
    assert (created.status, list(created.json)) == (201, ["Id"])
    started = post(api, f"{V4}/exec/{created.json['Id']}/start", headers, Detach=True)
    assert started.status == 200
    if headers != JSON:
        docker = post(api, f"/containers/{container.id}/exec", headers, Cmd=["true"])
        assert docker.status == 400, "Docker's tree is strict"


def test_a_session_is_the_same_in_both_trees(api: Api, container: TestContainer) -> None:
    session_id = api.create(container.id, "sh", "-c", "exit 6", AttachStdout=True)
    with api.attach(session_id, version=V4) as stream:
        stream.read_raw()
    libpod = api.call("GET", f"{V5}/exec/{session_id}/json").json
    assert (libpod["ID"], libpod["ExitCode"], libpod["ContainerID"]) == (session_id, 6, container.id)
    assert libpod | {"DetachKeys": "EBE="} == api.inspect(session_id)


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, "ctrl-p,ctrl-q"),
        ({"DetachKeys": None}, "ctrl-p,ctrl-q"),
        ({"DetachKeys": ""}, "<none>"),
        ({"DetachKeys": "ctrl-a,x,DEL,ctrl-@"}, "ctrl-a,x,DEL,ctrl-@"),
    ],
    ids=str,
)
def test_detach_keys(fields: dict[str, Any], shown: str, api: Api, runc_container: TestContainer) -> None:
    session_id = api.create(runc_container.id, "true", version=V4, **fields)
    assert api.call("GET", f"{V4}/exec/{session_id}/json").json["DetachKeys"] == shown
    if fields == {"DetachKeys": ""}:
        docker = api.create(runc_container.id, "true", **fields)
        assert api.inspect(docker)["DetachKeys"] == "EBE=", "Docker's empty text is the default"


def test_an_empty_text_disables_the_detach_keys(api: Api, container: TestContainer) -> None:
    command = ("sh", "-c", "stty raw -echo; echo up; head -c 2 | od -An -tx1; exit 5")
    session_id = api.create(
        container.id, *command, version=V4, Tty=True, AttachStdin=True, AttachStdout=True, DetachKeys=""
    )
    with api.attach(session_id, version=V4, Tty=True) as stream:
        stream.connection.read_until(b"up")
        stream.send(b"\x10\x11")
        assert b"10 11" in stream.read_raw()
    assert api.inspect(session_id)["ExitCode"] == 5


# -- start -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upgrade", [True, False])
@pytest.mark.parametrize(
    ("version", "tty", "kind"),
    [
        ("4.6.9", False, "raw"),
        ("4.7", False, "multiplexed"),
        ("4.7.0", False, "multiplexed"),
        ("5.8.0", False, "multiplexed"),
        ("5.8.0", True, "raw"),
    ],
)
def test_the_content_type_of_the_stream(
    version: str, tty: bool, kind: str, upgrade: bool, api: Api, container: TestContainer
) -> None:
    prefix = f"/v{version}/libpod"
    session_id = api.create(container.id, "echo", "hi", version=prefix, Tty=tty, AttachStdout=True)
    with api.attach(session_id, version=prefix, upgrade=upgrade) as stream:
        assert stream.head.status == (101 if upgrade else 200)
        assert stream.head.content_type == f"application/vnd.docker.{kind}-stream"
        assert (stream.read_raw() if tty else stream.read_frames()[0]).strip() == b"hi"


@pytest.mark.parametrize("start_tty", [True, False])
def test_the_framing_is_the_creation_s(start_tty: bool, api: Api, container: TestContainer) -> None:
    with_terminal = api.create(container.id, "echo", "hi", version=V4, Tty=True, AttachStdout=True)
    with api.attach(with_terminal, version=V4, Tty=start_tty) as stream:
        assert stream.read_raw() == b"hi\r\n"
    without = api.create(container.id, "echo", "hi", version=V4, AttachStdout=True)
    with api.attach(without, version=V4, Tty=start_tty) as stream:
        assert stream.read_frames() == (b"hi\n", b"")


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"Tty": True, "h": 41, "w": 121}, b"41 121"),
        ({"Tty": False, "h": 41, "w": 121}, b"40 120"),
        ({"Tty": True, "h": 0, "w": 0}, b"40 120"),
        ({"Tty": True, "ConsoleSize": [41, 121]}, b"40 120"),
    ],
    ids=str,
)
def test_the_size_at_start(fields: dict[str, Any], size: bytes, api: Api, container: TestContainer) -> None:
    create = {"Tty": True, "AttachStdout": True, "ConsoleSize": [40, 120]}
    session_id = api.create(container.id, *tell_size(container), version=V4, **create)
    with api.attach(session_id, version=V4, **fields) as stream:
        assert stream.read_raw().strip() == size


@pytest.mark.parametrize("field", ["h", "w"])
def test_a_size_that_no_terminal_has(field: str, api: Api, container: TestContainer) -> None:
    session_id = api.create(container.id, "true", version=V4, Tty=True)
    sizes: dict[str, Any] = {"h": 1, "w": 1, field: 65536}
    response = post(api, f"{V4}/exec/{session_id}/start", Tty=True, **sizes)
    assert error(response)[0] == 400


def test_docker_s_start_ignores_what_is_libpod_s(api: Api, container: TestContainer) -> None:
    session_id = api.create(container.id, *tell_size(container), Tty=True, AttachStdout=True, ConsoleSize=[40, 120])
    with api.attach(session_id, Tty=True, h="?", w=[]) as stream:
        assert stream.read_raw().strip() == b"40 120"


def test_stdin_that_comes_with_the_start(api: Api, container: TestContainer) -> None:
    session_id = api.create_attached(container.id, "cat", version=V4)
    with api.attach(session_id, version=V4, stdin=b"at once") as stream:
        stream.half_close()
        assert stream.read_frames() == (b"at once", b"")


def test_a_detached_start_is_answered_with_a_line_feed(api: Api, container: TestContainer) -> None:
    session_id = api.create(container.id, "sleep", "1000", version=V4)
    response = post(api, f"{V4}/exec/{session_id}/start", Detach=True)
    assert (response.status, response.body, response.content_type) == (200, b"\n", "text/plain")
    os.kill(api.inspect(session_id)["Pid"], signal.SIGKILL)


@pytest.mark.parametrize("tty", [False, True])
def test_a_failed_start_is_told_on_stderr(tty: bool, api: Api, container: TestContainer) -> None:
    session_id = api.create(container.id, "none-such", version=V4, Tty=tty, **OUTPUT)
    with api.attach(session_id, version=V4) as stream:
        stdout, text = (b"", stream.read_raw()) if tty else stream.read_frames()
    assert stdout == b""
    assert text.startswith(b"Error: OCI runtime exec failed: ")
    assert text.endswith(b"\n")
    assert not text.endswith(b"\r\n")
    assert api.call("GET", f"{V4}/exec/{session_id}/json").json["ExitCode"] == 127


def test_a_failed_detached_start(api: Api, container: TestContainer) -> None:
    session_id = api.create(container.id, "none-such", version=V4)
    status, cause, message = error(post(api, f"{V4}/exec/{session_id}/start", Detach=True))
    assert status == 400
    assert cause == message
    assert message.startswith("OCI runtime exec failed: ")


@pytest.mark.parametrize("detach", [True, False])
def test_a_second_start_is_refused_with_a_status(detach: bool, api: Api, container: TestContainer) -> None:
    session_id = api.run(container.id, "true")["ID"]
    for upgrade in ({}, {"Connection": "Upgrade", "Upgrade": "tcp"}):
        response = post(api, f"{V4}/exec/{session_id}/start", upgrade, Detach=detach)
        message = f"exec session {session_id} has already run: exec session state improper"
        assert error(response) == (409, "exec session state improper", message)


# -- resize ----------------------------------------------------------------------------------------------------------


def test_a_resize_is_a_201_and_kept_for_the_start(api: Api, container: TestContainer) -> None:
    session_id = api.create(container.id, *tell_size(container), version=V4, Tty=True, AttachStdout=True)
    response = api.call("POST", f"{V4}/exec/{session_id}/resize?h=40&running=true&w=120")
    assert (response.status, response.body) == (201, b"")
    with api.attach(session_id, version=V4, Tty=True) as stream:
        assert stream.read_raw().strip() == b"40 120"


def test_a_resize_that_comes_late(api: Api, container: TestContainer) -> None:
    session_id = api.run(container.id, "true", Tty=True)["ID"]
    target = f"{V4}/exec/{session_id}/resize?h=40&w=120"
    message = f"exec session {session_id} is not running: exec session state improper"
    for running in ("", "&running=false"):
        assert error(api.call("POST", target + running)) == (409, "exec session state improper", message)
    assert api.call("POST", f"{target}&running=true").status == 201
    docker = api.call("POST", f"/exec/{session_id}/resize?h=40&w=120&running=true")
    assert docker.status == 409, "in Docker's tree the parameter means nothing"


# -- remove ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [None, {}, {"Force": False}, {"Force": True}], ids=str)
def test_removing_what_has_ended(fields: dict[str, Any] | None, api: Api, container: TestContainer) -> None:
    session_id = api.run(container.id, "true")["ID"]
    target = f"{V4}/exec/{session_id}/remove"
    response = api.call("POST", target) if fields is None else post(api, target, **fields)
    assert (response.status, response.body) == (200, b"")
    assert api.call("GET", f"/exec/{session_id}/json").status == 404
    assert api.call("POST", target).status == 404


def test_removing_what_was_never_started(api: Api, container: TestContainer) -> None:
    session_id = api.create(container.id, "true")
    assert api.call("POST", f"{V4}/exec/{session_id}/remove").status == 200
    assert api.call("POST", f"/exec/{session_id}/start").status == 404


def test_removing_what_runs_needs_force(api: Api, container: TestContainer) -> None:
    session_id = api.create(container.id, "sleep", "2147")
    api.start_detached(session_id)
    target = f"{V4}/exec/{session_id}/remove"
    status, cause, _ = error(api.call("POST", target))
    assert (status, cause) == (409, "exec session state improper")
    assert ["sleep", "2147"] in container.processes().values()
    assert post(api, target, Force=True).status == 200
    assert ["sleep", "2147"] not in container.processes().values()
    assert api.call("GET", f"{V4}/exec/{session_id}/json").status == 404


def test_only_libpod_removes_in_this_way(api: Api, container: TestContainer) -> None:
    session_id = api.create(container.id, "true")
    assert api.call("POST", f"/exec/{session_id}/remove").message == "page not found"


# -- containers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["{}", "%2F{}"], ids=["id", "slash and name"])
def test_a_container_that_exists(shape: str, api: Api, container: TestContainer) -> None:
    response = api.call("GET", f"{V4}/containers/{shape.format(container.id)}/exists")
    assert (response.status, response.body) == (204, b"")


def test_the_list(api: Api, container: TestContainer) -> None:
    filters = json.dumps({"id": [container.id]}).replace(" ", "")
    query = f"all=false&external=false&last=0&namespace=false&size=false&sync=false&filters={filters}"
    (listed,) = api.call("GET", f"{V4}/containers/json?{query}").json
    assert (listed["Id"], listed["Names"]) == (container.id, [container.id])
    assert (listed["State"], listed["Pid"], listed["Exited"]) == ("running", container.init_pid, False)


def test_what_stopped_is_listed_on_demand(api: Api, stopped_container: TestContainer) -> None:
    def ids(query: str) -> list[str]:
        return [one["Id"] for one in api.call("GET", f"{V4}/containers/json?{query}").json]

    assert stopped_container.id not in ids("all=false")
    assert stopped_container.id in ids("all=true")


@pytest.mark.parametrize(("version", "entrypoint", "signal_"), [("4.9.5", "", 15), ("5.0.0", [], "SIGTERM")])
def test_types_that_podman_5_changed(
    version: str, entrypoint: object, signal_: object, api: Api, container: TestContainer
) -> None:
    found = api.call("GET", f"/v{version}/libpod/containers/{container.id}/json").json
    assert (found["Config"]["Entrypoint"], found["Config"]["StopSignal"]) == (entrypoint, signal_)
    assert (found["Name"], found["State"]["Pid"], found["OCIRuntime"]) == (
        container.id,
        container.init_pid,
        container.host.name,
    )


def test_a_container_lists_its_sessions(api: Api, new_container: Callable[..., TestContainer]) -> None:
    container = new_container()
    target = f"{V4}/containers/{container.id}/json"
    assert api.call("GET", target).json["ExecIDs"] == []
    session_id = api.create_attached(container.id, "cat")
    with api.attach(session_id, stdin=b"up") as stream:
        assert stream.connection.read_exactly(10)[8:] == b"up"
        assert api.call("GET", target).json["ExecIDs"] == [session_id]
        stream.half_close()
        stream.read_frames()


# -- the way of a newer podman than any test has ---------------------------------------------------------------------


def test_what_podman_from_5_7_on_does(api: Api, container: TestContainer) -> None:
    """It wants a 101, sends Upgrade, and removes the session in the end; a failure there is its exit code."""
    target = f"{V5}/containers/{container.id}/exec"
    created = post(api, target, Cmd=["sh", "-c", "cat; exit 3"], Env=[], Tty=False, Detach=False, **ATTACHED)
    session_id = created.json["Id"]
    assert api.call("GET", f"{V5}/exec/{session_id}/json").json["ProcessConfig"]["tty"] is False
    body = b'{"Detach":false,"Tty":false,"h":0,"w":0}'
    with api.connect() as connection:
        upgrade = {"Connection": "Upgrade", "Upgrade": "tcp"}
        connection.send(request_bytes("POST", f"{V5}/exec/{session_id}/start", body, upgrade))
        head = connection.read_head()
        assert (head.status, head.content_type) == (101, "application/vnd.docker.multiplexed-stream")
        connection.send(b"data")
        connection.half_close()
        assert connection.read_to_end()[8:] == b"data"
    assert api.call("GET", f"{V5}/exec/{session_id}/json").json["ExitCode"] == 3
    assert post(api, f"{V5}/exec/{session_id}/remove", Force=False).status == 200
