"""`POST /containers/{name}/exec`: which container, in which state, and what may run in it."""

import re
from collections.abc import Callable

import pytest

from contract.api import Api
from support.runtimes import RuntimeHost, TestContainer


def test_the_answer_is_an_id_of_64_hex_digits(api: Api, container: TestContainer) -> None:
    response = api.call("POST", f"/containers/{container.id}/exec", {"Cmd": ["true"]})
    assert response.status == 201
    assert list(response.json) == ["Id"]
    assert re.fullmatch("[0-9a-f]{64}", response.json["Id"])


def test_each_session_has_an_id_of_its_own(api: Api, container: TestContainer) -> None:
    assert len({api.create(container.id, "true") for _ in range(5)}) == 5


@pytest.mark.parametrize("shape", ["{}", "%2F{}"], ids=["id", "slash and name"])
def test_a_container_goes_by_id_and_name(shape: str, api: Api, container: TestContainer) -> None:
    session_id = api.create(shape.format(container.id), "true")
    assert api.inspect(session_id)["ContainerID"] == container.id


def test_a_container_goes_by_a_prefix_that_no_other_id_has(
    api: Api, new_container: Callable[..., TestContainer], runtime_host: RuntimeHost
) -> None:
    container = new_container(f"unique-{runtime_host.name}-container")
    session_id = api.create(f"unique-{runtime_host.name}", "true")
    assert api.inspect(session_id)["ContainerID"] == container.id


def test_an_ambiguous_prefix_is_refused(
    api: Api, new_container: Callable[..., TestContainer], runtime_host: RuntimeHost
) -> None:
    prefix = f"twin-{runtime_host.name}-"
    for suffix in ("a", "b"):
        new_container(prefix + suffix)
    response = api.call("POST", f"/containers/{prefix}/exec", {"Cmd": ["true"]})
    assert response.status == 400
    assert response.message == f"multiple IDs found with provided prefix: {prefix}"


def test_a_full_id_that_begins_another_one_is_not_ambiguous(
    api: Api, new_container: Callable[..., TestContainer], runtime_host: RuntimeHost
) -> None:
    short = new_container(f"nested-{runtime_host.name}")
    new_container(f"{short.id}-more")
    assert api.inspect(api.create(short.id, "true"))["ContainerID"] == short.id


@pytest.mark.parametrize("name", ["none-such", "0" * 64, "..", "-x", "a%20b", "%2e%2e%2fetc", "caf%C3%A9", "x" * 300])
def test_an_unknown_container_is_not_found(name: str, api: Api) -> None:
    response = api.call("POST", f"/containers/{name}/exec", {"Cmd": ["true"]})
    assert response.status == 404
    assert response.message.startswith("No such container: ")


def test_an_unknown_container_is_named(api: Api) -> None:
    response = api.call("POST", "/containers/none-such/exec", {"Cmd": ["true"]})
    assert response.message == "No such container: none-such"


def test_a_stopped_container_is_a_conflict(api: Api, stopped_container: TestContainer) -> None:
    response = api.call("POST", f"/containers/{stopped_container.id}/exec", {"Cmd": ["true"]})
    assert response.status == 409
    assert response.message == f"container {stopped_container.id} is not running"


def test_a_container_that_was_never_started_is_a_conflict(
    api: Api, new_container: Callable[..., TestContainer]
) -> None:
    container = new_container(start=False)
    response = api.call("POST", f"/containers/{container.id}/exec", {"Cmd": ["true"]})
    assert response.status == 409
    assert response.message == f"container {container.id} is not running"


def test_a_paused_container_is_a_conflict(api: Api, paused_container: TestContainer) -> None:
    response = api.call("POST", f"/containers/{paused_container.id}/exec", {"Cmd": ["true"]})
    assert response.status == 409
    assert response.message == f"Container {paused_container.id} is paused, unpause the container before exec"


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ("nobody9", "unable to find user nobody9: no matching entries in passwd file"),
        ("app:nogroup9", "unable to find group nogroup9: no matching entries in group file"),
        (":nogroup9", "unable to find group nogroup9: no matching entries in group file"),
        ("nobody9:nogroup9", "unable to find user nobody9: no matching entries in passwd file"),
        ("2147483648", "uids and gids must be in range 0-2147483647"),
        ("-1", "uids and gids must be in range 0-2147483647"),
        ("0:2147483648", "uids and gids must be in range 0-2147483647"),
    ],
)
def test_a_user_or_group_that_is_none_is_refused(user: str, message: str, api: Api, container: TestContainer) -> None:
    response = api.call("POST", f"/containers/{container.id}/exec", {"Cmd": ["true"], "User": user})
    assert (response.status, response.message) == (400, message)


@pytest.mark.parametrize(
    ("user", "ids"),
    [
        ("", b"0 0 0"),
        ("root", b"0 0 0"),
        ("app", b"1000 1000 1000 2000"),
        ("1000", b"1000 1000 1000 2000"),
        ("app:extra", b"1000 2000 2000"),
        ("1000:5", b"1000 5 5"),
        ("4242", b"4242 0 0"),
        (":extra", b"0 2000 2000"),
    ],
)
def test_a_user_is_resolved_by_the_files_of_the_container(
    user: str, ids: bytes, api: Api, container: TestContainer
) -> None:
    script = "echo $(id -u) $(id -g) $(id -G)"
    with api.attach(api.create(container.id, "sh", "-c", script, User=user, AttachStdout=True)) as stream:
        assert stream.read_frames() == (ids + b"\n", b"")


@pytest.mark.parametrize("keys", ["ctrl-1", "ab", "ctrl-", "ctrl-p,,ctrl-q", "é", "a,", "del"])
def test_detach_keys_that_nobody_has_are_refused(keys: str, api: Api, runc_container: TestContainer) -> None:
    body = {"Cmd": ["true"], "DetachKeys": keys}
    response = api.call("POST", f"/containers/{runc_container.id}/exec", body)
    assert response.status == 400
    assert response.message == f"Invalid escape keys ({keys}) provided"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"Cmd": ["a\0b"]}, "an argument of the command contains a NUL character"),
        ({"Env": ["A=\0"]}, "an environment variable contains a NUL character"),
        ({"Env": ["=x"]}, "invalid environment variable: its name is empty"),
        ({"WorkingDir": "tmp"}, "the working directory 'tmp' is invalid, it needs to be an absolute path"),
        (
            {"WorkingDir": "/proc/self/fd/7"},
            "the working directory '/proc/self/fd/7' is invalid, it leads through a file descriptor",
        ),
        ({"Cmd": ["x" * 131_072]}, "an argument of the command is longer than 131071 bytes"),
        ({"ConsoleSize": [70_000, 1]}, "invalid ConsoleSize [70000, 1]: value out of range"),
    ],
)
def test_what_no_runtime_could_run_is_refused(
    fields: dict[str, object], message: str, api: Api, runc_container: TestContainer
) -> None:
    response = api.call("POST", f"/containers/{runc_container.id}/exec", {"Cmd": ["true"], **fields})
    assert (response.status, response.message) == (400, message)


def test_nothing_is_left_of_a_refused_creation(api: Api, container: TestContainer) -> None:
    with api.events(filters={"container": [container.id]}) as events:
        api.call("POST", f"/containers/{container.id}/exec", {"Cmd": ["refused"], "User": "nobody9"})
        api.create(container.id, "accepted")
        assert next(events)["Action"] == "exec_create: accepted"
