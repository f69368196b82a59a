"""What clients ask around an exec: ping, version, info, and the containers."""

import json
import os
import platform
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest

from contract.api import Api, Json
from contract.test_operations import corrupt_spec
from execgate import __version__
from support.runtimes import RuntimeHost, TestContainer

# -- system ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/v1.41"])
@pytest.mark.parametrize(("method", "body"), [("GET", b"OK"), ("HEAD", b"")])
def test_ping(prefix: str, method: str, body: bytes, api: Api) -> None:
    response = api.call(method, f"{prefix}/_ping")
    assert (response.status, response.body, response.content_type) == (200, body, "text/plain")
    assert response.headers["api-version"] == "1.51"
    assert response.headers["ostype"] == "linux"
    assert response.headers["server"] == f"execgate/{__version__} (linux)"


def test_version(api: Api) -> None:
    version = api.call("GET", "/version").json
    assert (version["ApiVersion"], version["MinAPIVersion"]) == ("1.51", "1.24")
    assert version["Version"] == __version__
    assert version["KernelVersion"] == platform.release()
    details = version["Components"][0]["Details"]
    assert details.items() <= version.items()


def test_info_counts_the_containers(
    api: Api, runc_container: TestContainer, stopped_container: TestContainer, paused_container: TestContainer
) -> None:
    info = api.call("GET", "/info").json
    containers = _list(api, all="1")
    states = [container["State"] for container in containers]
    assert info["Containers"] == len(containers)
    assert info["ContainersRunning"] == states.count("running") >= 1
    assert info["ContainersPaused"] == states.count("paused") >= 1
    assert info["ContainersStopped"] == states.count("exited") + states.count("created") >= 1
    assert (info["OSType"], info["NCPU"], info["Name"]) == ("linux", os.cpu_count(), platform.node())


# -- list ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trio(
    runtime_host: RuntimeHost, new_container: Callable[..., TestContainer]
) -> tuple[TestContainer, TestContainer, TestContainer]:
    """A running, a paused and a created container, oldest first; their labels tell them from all others."""
    name = f"trio-{runtime_host.name}"
    one, two, three = (
        new_container(f"{name}-{place}", start=place != "three", annotations={"trio": name, "place": place})
        for place in ("one", "two", "three")
    )
    two.pause()
    return one, two, three


def _list(api: Api, **parameters: Any) -> list[Json]:
    if "filters" in parameters:
        parameters["filters"] = json.dumps(parameters["filters"])
    query = "&".join(f"{name}={quote(value)}" for name, value in parameters.items())
    response = api.call("GET", f"/containers/json?{query}")
    assert response.status == 200, response
    containers: list[Json] = response.json
    return containers


def _places(containers: list[Json]) -> list[str]:
    return [container["Labels"]["place"] for container in containers if "trio" in container["Labels"]]


def test_a_list(api: Api, trio: tuple[TestContainer, ...]) -> None:
    """Every query on one set of containers: making them is what costs."""
    name = trio[0].id.removesuffix("-one")
    label = [f"trio={name}"]

    def places(*, more: Json | None = None, **parameters: str) -> list[str]:
        return _places(_list(api, filters={"label": label, **(more or {})}, **parameters))

    # All have an init process, and so are listed without `all`; the newest comes first.
    assert places() == ["three", "two", "one"]
    assert places(limit="2") == ["three", "two"]
    assert places(limit="0") == places(limit="-1") == ["three", "two", "one"]
    assert places(more={"status": ["running"]}) == ["one"]
    assert places(more={"status": ["paused", "created"]}) == ["three", "two"]
    assert places(more={"status": ["exited"]}) == []
    assert places(more={"name": ["one"]}) == ["one"]
    assert places(more={"name": [f"{name}-t"]}) == ["three", "two"]
    assert places(more={"name": [f"^/{name}-one$"]}) == ["one"]
    assert places(more={"name": ["^rio"]}) == []
    assert places(more={"name": ["-two$"]}) == ["two"]
    assert places(more={"name": [".*"]}) == [], "no regular expressions from outside"
    assert places(more={"id": [f"{name}-o"]}) == ["one"]
    assert places(more={"id": ["rio"]}) == []
    assert places(more={"label": [*label, "place=two"]}) == ["two"]
    assert places(more={"label": [*label, "place"]}) == ["three", "two", "one"]
    assert places(more={"label": [*label, "place=tw"]}) == []
    assert places(more={"name": ["one", "two"], "status": ["paused"]}) == ["two"]
    assert places(more={"name": {"one": True, "two": False}}) == ["one"], "the older form"
    states = {one["Labels"]["place"]: one["State"] for one in _list(api, filters={"label": label})}
    assert states == {"one": "running", "two": "paused", "three": "created"}


def test_a_container_that_has_ended_is_listed_only_when_asked_for(api: Api, stopped_container: TestContainer) -> None:
    def listed(**parameters: Any) -> bool:
        return stopped_container.id in [container["Id"] for container in _list(api, **parameters)]

    assert not listed()
    for no in ("", "0", "no", "false", "False", "none"):
        assert not listed(all=no), no
    for yes in ("1", "true", "True", "yes", "anything"):
        assert listed(all=yes), yes
    assert listed(filters={"status": ["exited"]})
    assert listed(limit="1000")
    assert not listed(filters={"status": ["running"]}, all="1")


def test_one_line_of_a_list(api: Api, labelled_runc: TestContainer) -> None:
    (line,) = _list(api, filters={"id": [labelled_runc.id]})
    assert line["Id"] == labelled_runc.id
    assert line["Names"] == [f"/{labelled_runc.id}"]
    assert line["Image"] == "busybox:1.36"
    assert line["Labels"]["team"] == "shop"
    assert line["Command"].startswith("/bin/sh -c trap")
    assert line["Status"].startswith("Up ")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("filters=name", "invalid filter: not a JSON object"),
        ("filters=null", "invalid filter: not a JSON object"),
        ('filters={"network":["x"]}', "invalid filter 'network'"),
        ('filters={"name":"x"}', "invalid filter 'name': its values must be strings"),
        ('filters={"status":["sleeping"]}', "invalid filter 'status=sleeping'"),
        ("limit=ten", "invalid limit 'ten'"),
    ],
)
def test_a_list_refuses_what_makes_no_sense(query: str, message: str, api: Api, runc_container: TestContainer) -> None:
    response = api.call("GET", f"/containers/json?{query}")
    assert (response.status, response.message) == (400, message)


def test_one_broken_container_breaks_no_list(
    api: Api, runc_container: TestContainer, new_container: Callable[..., TestContainer]
) -> None:
    """The rest of the host must stay visible when one bundle cannot be read."""
    with corrupt_spec(new_container()) as broken:
        containers = {container["Id"]: container for container in _list(api)}
    assert containers[runc_container.id]["Command"].startswith("/bin/sh")
    assert containers[broken.id]["State"] == "running"


# -- inspect ---------------------------------------------------------------------------------------------------------


def test_a_running_container(api: Api, labelled: TestContainer) -> None:
    inspection = api.call("GET", f"/containers/{labelled.id}/json").json
    assert (inspection["Id"], inspection["Name"]) == (labelled.id, f"/{labelled.id}")
    state = inspection["State"]
    assert (state["Status"], state["Running"], state["Paused"]) == ("running", True, False)
    assert state["Pid"] == labelled.init_pid
    assert inspection["HostConfig"]["Runtime"] == labelled.host.name
    config = inspection["Config"]
    assert config["Hostname"] == labelled.id
    assert config["Labels"] == {"team": "shop"}
    assert config["Env"][-1] == "GREETING=hello"
    assert [inspection["Path"], *inspection["Args"]] == config["Cmd"]


@pytest.fixture
def labelled(new_container: Callable[..., TestContainer]) -> TestContainer:
    """A container of each runtime that has a label and a variable."""
    return new_container(annotations={"team": "shop"}, env=["GREETING=hello"])


def test_a_paused_container(api: Api, paused_container: TestContainer) -> None:
    state = api.call("GET", f"/containers/{paused_container.id}/json").json["State"]
    assert (state["Status"], state["Running"], state["Paused"]) == ("paused", True, True)


def test_a_stopped_container(api: Api, stopped_container: TestContainer) -> None:
    state = api.call("GET", f"/containers/{stopped_container.id}/json").json["State"]
    assert (state["Status"], state["Running"], state["Pid"]) == ("exited", False, 0)


def test_a_created_container(api: Api, new_container: Callable[..., TestContainer]) -> None:
    container = new_container(start=False)
    state = api.call("GET", f"/containers/{container.id}/json").json["State"]
    assert (state["Status"], state["Running"]) == ("created", False)


def test_a_container_that_does_not_exist(api: Api) -> None:
    response = api.call("GET", "/containers/none-such/json")
    assert (response.status, response.message) == (404, "No such container: none-such")


# -- top -------------------------------------------------------------------------------------------------------------


def test_top_shows_the_container_and_its_sessions(
    api: Api, container: TestContainer, runc_container: TestContainer, crun_container: TestContainer
) -> None:
    session_id = api.create_attached(container.id, "cat")
    with api.attach(session_id, stdin=b"up") as stream:
        assert stream.connection.read_exactly(10)[8:] == b"up"
        table = api.call("GET", f"/containers/{container.id}/top").json
        pid = api.inspect(session_id)["Pid"]
        stream.half_close()
        stream.read_frames()
    assert table["Titles"] == ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]
    commands = {row[1]: row[7] for row in table["Processes"]}
    assert commands[str(container.init_pid)].startswith("/bin/sh -c trap")
    assert commands[str(pid)] == "cat"
    other = crun_container if container is runc_container else runc_container
    assert str(other.init_pid) not in commands
    assert str(os.getpid()) not in commands


def test_top_takes_arguments_for_ps(api: Api, container: TestContainer) -> None:
    table = api.call("GET", f"/containers/{container.id}/top?ps_args=-eo%20pid,comm").json
    assert table["Titles"] == ["PID", "COMMAND"]
    assert [str(container.init_pid), "sh"] in table["Processes"]


@pytest.mark.parametrize(
    ("ps_args", "message"),
    [
        ("-eo comm", "Couldn't find PID field in ps output"),
        ("-eo comm=PID", 'specifying "comm=PID" is not allowed'),
        ("-eo pid,comm -o user=PIDS", 'specifying "user=PIDS" is not allowed'),
        ("x" * 300, "invalid ps_args"),
    ],
)
def test_top_refuses_arguments_that_hide_the_pid(
    ps_args: str, message: str, api: Api, runc_container: TestContainer
) -> None:
    response = api.call("GET", f"/containers/{runc_container.id}/top?ps_args={quote(ps_args)}")
    assert (response.status, response.message) == (400, message)


def test_top_passes_on_what_ps_says(api: Api, runc_container: TestContainer) -> None:
    response = api.call("GET", f"/containers/{runc_container.id}/top?ps_args=--none-such")
    assert response.status == 400
    assert response.message.startswith("ps: error: unknown gnu long option")


def test_top_of_a_stopped_container_is_a_conflict(api: Api, stopped_container: TestContainer) -> None:
    response = api.call("GET", f"/containers/{stopped_container.id}/top")
    assert (response.status, response.message) == (409, f"container {stopped_container.id} is not running")
