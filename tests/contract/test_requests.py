"""Routes, versions, and the rules that every request body obeys."""

import json
from typing import Any

import pytest

from contract.api import NO_SUCH_ID, Api
from execgate.http.dialects import DOCKER, dotted
from support.raw import JSON
from support.runtimes import TestContainer


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/"),
        ("GET", "/images/json"),
        ("POST", "/containers/create"),
        ("GET", "/v1.41/networks"),
        ("GET", "/v1.41"),
        ("GET", "/vvv/_ping"),
        ("GET", "/_ping/"),
        ("GET", "//_ping"),
        ("POST", "/_ping"),
        ("DELETE", "/_ping"),
        ("OPTIONS", "/_ping"),
        ("HEAD", "/version"),
        ("GET", f"/exec/{NO_SUCH_ID}/start"),
        ("PUT", f"/exec/{NO_SUCH_ID}/start"),
        ("GET", "/containers/c/exec"),
        ("DELETE", "/containers/c"),
        ("POST", "/containers/c/json"),
        ("POST", "/events"),
    ],
)
def test_an_unknown_path_or_method_is_page_not_found(method: str, target: str, api: Api) -> None:
    response = api.call(method, target)
    assert response.status == 404
    assert method == "HEAD" or response.message == "page not found"


@pytest.mark.parametrize("version", ["1.24", "1.40", "1.41", "1.42", "1.51"])
def test_a_version_in_the_range_is_served(version: str, api: Api) -> None:
    response = api.call("GET", f"/v{version}/_ping")
    assert response.status == 200
    assert response.headers["api-version"] == "1.51"


@pytest.mark.parametrize("version", ["1.23", "1.0", "0.99", "0.0"])
def test_a_version_below_the_range_is_too_old(version: str, api: Api) -> None:
    response = api.call("GET", f"/v{version}/_ping")
    assert response.status == 400
    assert response.message == (
        f"client version {version} is too old. Minimum supported API version is 1.24, "
        "please upgrade your client to a newer version"
    )


@pytest.mark.parametrize("version", ["1.52", "1.999", "2.0", "9999.0"])
def test_a_version_above_the_range_is_too_new(version: str, api: Api) -> None:
    response = api.call("GET", f"/v{version}/_ping")
    assert response.status == 400
    assert response.message == f"client version {version} is too new. Maximum supported API version is 1.51"


@pytest.mark.parametrize("version", ["1", "1.", ".41", "1.41.1", "...", "1" * 300 + ".1"])
def test_what_is_no_version_is_refused(version: str, api: Api) -> None:
    response = api.call("GET", f"/v{version}/_ping")
    assert response.status == 400
    assert response.message == f"invalid API version {version[:32]!r}"


def test_a_page_that_does_not_exist_is_not_found_in_any_version(api: Api) -> None:
    assert api.call("GET", "/v9.9/images/json").message == "page not found"


def test_the_range_serves_the_clients_in_use() -> None:
    """docker CLI 28 and later refuse daemons below 1.40."""
    assert DOCKER.minimum <= (1, 24)
    assert DOCKER.maximum >= (1, 41)
    assert dotted(DOCKER.maximum) == "1.51"


CONTENT_TYPES = [
    "text/plain",
    "application/x-www-form-urlencoded",
    "dockerapplication/json",
    "application/json-patch+json",
    "application",
]


@pytest.mark.parametrize("content_type", CONTENT_TYPES)
def test_another_content_type_is_refused_at_create(content_type: str, api: Api) -> None:
    response = api.call("POST", "/containers/c/exec", b'{"Cmd": ["a"]}', headers={"Content-Type": content_type})
    assert response.status == 400
    assert response.message == f"unsupported Content-Type header ({content_type}): must be 'application/json'"


@pytest.mark.parametrize("content_type", CONTENT_TYPES)
def test_another_content_type_is_refused_at_start(content_type: str, api: Api) -> None:
    response = api.call("POST", f"/exec/{NO_SUCH_ID}/start", b"{}", headers={"Content-Type": content_type})
    assert response.status == 400
    assert response.message == f"unsupported Content-Type header ({content_type}): must be 'application/json'"


@pytest.mark.parametrize("path", ["/containers/c/exec", f"/exec/{NO_SUCH_ID}/start"])
def test_a_body_without_content_type_is_refused(path: str, api: Api) -> None:
    response = api.call("POST", path, b"{}")
    assert response.status == 400
    assert response.message == "unsupported Content-Type header (): must be 'application/json'"


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/json ;x=y"]
)
def test_json_is_json_with_parameters_and_in_any_case(
    content_type: str, api: Api, runc_container: TestContainer
) -> None:
    body = b'{"Cmd": ["true"]}'
    target = f"/containers/{runc_container.id}/exec"
    assert api.call("POST", target, body, headers={"Content-Type": content_type}).status == 201


@pytest.mark.parametrize("body", [None, b""], ids=["no length", "length 0"])
@pytest.mark.parametrize("headers", [{}, JSON], ids=["no content type", "json"])
def test_an_empty_start_body_means_the_defaults(
    body: bytes | None, headers: dict[str, str], api: Api, container: TestContainer
) -> None:
    session_id = api.create(container.id, "echo", "here", AttachStdout=True)
    response = api.call("POST", f"/exec/{session_id}/start", body, headers=headers)
    assert response.status == 200
    assert response.body == b"\1\0\0\0\0\0\0\5here\n"


@pytest.mark.parametrize("body", [None, b"", b"{}", b"null", b'{"Cmd": null}', b'{"Cmd": []}'])
def test_a_creation_without_command_is_refused(body: bytes | None, api: Api, container: TestContainer) -> None:
    response = api.call("POST", f"/containers/{container.id}/exec", body, headers=JSON)
    assert response.status == 400
    assert response.message == "No exec command specified"


def test_the_command_is_looked_at_before_the_container(api: Api) -> None:
    response = api.call("POST", "/containers/none-such/exec", {"User": "nobody9"})
    assert (response.status, response.message) == (400, "No exec command specified")


@pytest.mark.parametrize(
    "body",
    [
        b"Cmd=true",
        b'{"Cmd": ["true"]',
        b'{"Cmd": ["true"]} {}',
        b"{'Cmd': ['true']}",
        b'{"Cmd": ["true"], "Privileged": NaN}',
        b'["true"]',
        b'"true"',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
@pytest.mark.parametrize("path", ["/containers/c/exec", f"/exec/{NO_SUCH_ID}/start"])
def test_what_is_no_json_object_is_refused(path: str, body: bytes, api: Api) -> None:
    response = api.call("POST", path, body, headers=JSON)
    assert response.status == 400
    assert response.message.startswith("invalid JSON: ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("Cmd", "true"),
        ("Cmd", ["true", 1]),
        ("Cmd", [None]),
        ("Env", "A=b"),
        ("Env", {"A": "b"}),
        ("User", 1000),
        ("WorkingDir", ["/"]),
        ("Tty", "true"),
        ("Privileged", 1),
        ("AttachStdin", "yes"),
        ("DetachKeys", []),
        ("ConsoleSize", 24),
        ("ConsoleSize", [24]),
        ("ConsoleSize", [24, 80, 1]),
        ("ConsoleSize", ["24", "80"]),
        ("ConsoleSize", [-1, 80]),
        ("ConsoleSize", [2**32, 80]),
    ],
)
def test_a_field_of_another_type_is_named(field: str, value: Any, api: Api, runc_container: TestContainer) -> None:
    body = {"Cmd": ["true"], field: value}
    response = api.call("POST", f"/containers/{runc_container.id}/exec", body)
    assert response.status == 400
    assert response.message.startswith(f"invalid JSON: {field}")


def test_keys_match_in_any_case(api: Api, container: TestContainer) -> None:
    body = {
        "cmd": ["sh"],
        "TTY": True,
        "attachStdin": True,
        "ATTACHSTDOUT": True,
        "detachkeys": "ctrl-a",
        "uSeR": "app",
    }
    response = api.call("POST", f"/containers/{container.id}/exec", body)
    inspection = api.inspect(response.json["Id"])
    assert inspection["ProcessConfig"] == {
        "tty": True,
        "entrypoint": "sh",
        "arguments": [],
        "privileged": False,
        "user": "app",
    }
    assert (inspection["OpenStdin"], inspection["OpenStdout"], inspection["OpenStderr"]) == (True, True, False)
    assert inspection["DetachKeys"] == "AQ=="


def test_start_keys_match_in_any_case(api: Api, container: TestContainer) -> None:
    session_id = api.create(container.id, "true", AttachStdout=True)
    response = api.call("POST", f"/exec/{session_id}/start", {"dETACH": True})
    assert (response.status, response.body) == (200, b"")
    assert response.headers["content-length"] == "0"


def test_null_is_the_default(api: Api, container: TestContainer) -> None:
    """The docker CLI sends `Env: null`."""
    names = [
        "User",
        "Privileged",
        "Tty",
        "ConsoleSize",
        "AttachStdin",
        "AttachStderr",
        "DetachKeys",
        "Env",
        "WorkingDir",
    ]
    body = dict.fromkeys(names) | {"Cmd": ["sh", "-c", "pwd; id -u"], "AttachStdout": True}
    session_id = api.call("POST", f"/containers/{container.id}/exec", body).json["Id"]
    with api.attach(session_id, Detach=None, Tty=None, ConsoleSize=None) as stream:
        assert stream.read_frames() == (b"/\n0\n", b"")


def test_unknown_keys_are_ignored(api: Api, container: TestContainer) -> None:
    """podman's and older clients' bodies have some (`Container`, `Detach`)."""
    assert api.run(container.id, "true", Container=container.id, Detach=False, Foo={"a": [1]})["ExitCode"] == 0


@pytest.mark.parametrize("body", ['{"Cmd": ["true"], "Cmd": ["id"]}', '{"Cmd": ["true"], "cmd": ["id"]}'])
def test_a_key_that_comes_twice_is_refused(body: str, api: Api, runc_container: TestContainer) -> None:
    assert json.loads(body)
    response = api.call("POST", f"/containers/{runc_container.id}/exec", body.encode(), headers=JSON)
    assert response.status == 400
    assert response.message == "invalid JSON: a key is given twice"


def test_a_body_up_to_the_bound_is_read(api: Api, container: TestContainer) -> None:
    body = json.dumps({"Cmd": ["true"], "Ignored": ""}).encode()
    padded = body.replace(b'""', b'"' + b"x" * (1024 * 1024 - len(body)) + b'"')
    assert len(padded) == 1024 * 1024
    assert api.call("POST", f"/containers/{container.id}/exec", padded, headers=JSON).status == 201
