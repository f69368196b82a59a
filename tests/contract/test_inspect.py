"""`GET /exec/{id}/json` over a session's whole life, and what a container says of its sessions."""

import time
from collections.abc import Callable

import pytest

from contract.api import Api
from contract.document import Document
from execgate.config import Config
from execgate.engine import _SWEEP_INTERVAL
from support.raw import TIMEOUT
from support.runtimes import TestContainer
from support.service import Service

NEVER = "0001-01-01T00:00:00Z"

BEYOND_DOCKER = {
    "ContainerPid": 0,
    "StartedAt": NEVER,
    "FinishedAt": NEVER,
    "TimedOut": False,
    "Timeout": 0,
    "IdleTimeout": 0,
    "Labels": {},
    "CaptureStdout": False,
    "CaptureStderr": False,
    "OnDisconnect": "",
    "Owner": "unix:0",
    "Rule": "owner",
    "Error": "",
    "StdinBytes": 0,
    "StdoutBytes": 0,
    "StderrBytes": 0,
}
"""What Docker's answer does not have, of a session that asked for none of it and has not run; with `CreatedAt`."""


def test_a_session_that_was_created(api: Api, container: TestContainer) -> None:
    session_id = api.create(container.id, "sh", "-c", "exit 3", AttachStdout=True)
    inspection = api.inspect(session_id)
    assert inspection.pop("CreatedAt") > NEVER
    assert inspection == {
        "ID": session_id,
        "Running": False,
        "ExitCode": None,
        "ExitCodeSource": None,
        "ProcessConfig": {"tty": False, "entrypoint": "sh", "arguments": ["-c", "exit 3"], "privileged": False},
        "OpenStdin": False,
        "OpenStderr": False,
        "OpenStdout": True,
        "CanRemove": False,
        "ContainerID": container.id,
        "DetachKeys": "EBE=",
        "Pid": 0,
        **BEYOND_DOCKER,
    }


def test_a_session_that_runs(api: Api, container: TestContainer) -> None:
    session_id = api.create_attached(container.id, "cat", User="app", Privileged=True)
    with api.attach(session_id, stdin=b"up") as stream:
        assert stream.connection.read_exactly(10)[8:] == b"up"
        inspection = api.inspect(session_id)
        assert min(inspection["Pid"], inspection["ContainerPid"]) > 0
        assert NEVER < inspection.pop("CreatedAt") <= inspection["StartedAt"]
        assert inspection | {"Pid": 1, "ContainerPid": 1, "StartedAt": NEVER} == {
            "ID": session_id,
            "Running": True,
            "ExitCode": None,
            "ExitCodeSource": None,
            "ProcessConfig": {
                "tty": False,
                "entrypoint": "cat",
                "arguments": [],
                "privileged": True,
                "user": "app",
            },
            "OpenStdin": True,
            "OpenStderr": True,
            "OpenStdout": True,
            "CanRemove": False,
            "ContainerID": container.id,
            "DetachKeys": "EBE=",
            "Pid": 1,
            **BEYOND_DOCKER,
            "ContainerPid": 1,
            "StdinBytes": 2,
            "StdoutBytes": 2,
        }
        stream.half_close()
        stream.read_frames()


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 42", 42), ("exit 255", 255), ("kill -TERM $$", 143), ("kill -KILL $$", 137)],
)
@pytest.mark.parametrize("tty", [False, True])
def test_a_session_that_has_ended(script: str, code: int, tty: bool, api: Api, container: TestContainer) -> None:
    inspection = api.run(container.id, "sh", "-c", script, Tty=tty)
    assert (inspection["Running"], inspection["ExitCode"]) == (False, code)
    assert (inspection["ExitCodeSource"], inspection["Pid"], inspection["CanRemove"]) == ("sync-pipe", 0, True)


def test_what_ran_before_stays_readable(api: Api, container: TestContainer) -> None:
    sessions = [api.run(container.id, "sh", "-c", f"exit {code}") for code in range(5)]
    assert [api.inspect(session["ID"]) for session in sessions] == sessions


def test_a_session_outlives_its_container(api: Api, new_container: Callable[..., TestContainer]) -> None:
    container = new_container()
    session = api.run(container.id, "sh", "-c", "exit 9")
    container.delete()
    assert api.inspect(session["ID"]) == session


def test_a_finished_session_is_kept_for_five_to_ten_minutes() -> None:
    """Docker's collector comes every 5 minutes, and takes what it saw the last time."""
    assert 300 <= Config().retention_seconds <= 600


def test_sessions_are_forgotten_when_their_time_is_over(
    new_service: Callable[..., Service], runc_container: TestContainer, document: Document
) -> None:
    """The service sweeps from time to time, and there is no event for it: this polls."""
    env = {"EXECGATE_RETENTION_SECONDS": "0.1", "EXECGATE_CREATED_LIFETIME_SECONDS": "0.1"}
    api = Api(new_service(env=env).socket, document)
    running = api.create_attached(runc_container.id, "cat")
    with api.attach(running, stdin=b"up") as stream:
        assert stream.connection.read_exactly(10)[8:] == b"up"
        ended = api.run(runc_container.id, "true")["ID"]
        created = api.create(runc_container.id, "true")
        deadline = time.monotonic() + _SWEEP_INTERVAL + TIMEOUT
        while {api.call("GET", f"/exec/{one}/json").status for one in (ended, created)} != {404}:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert api.call("GET", f"/exec/{ended}/json").message == f"No such exec instance: {ended}"
        assert api.inspect(running)["Running"], "what runs is never forgotten"


def test_a_container_lists_the_sessions_that_run_in_it(api: Api, new_container: Callable[..., TestContainer]) -> None:
    container = new_container()
    target = f"/containers/{container.id}/json"
    assert api.call("GET", target).json["ExecIDs"] is None
    first, second = (api.create_attached(container.id, "cat") for _ in range(2))
    assert api.call("GET", target).json["ExecIDs"] is None, "what was only created does not count"
    with api.attach(first, stdin=b"up") as one, api.attach(second, stdin=b"up") as two:
        for stream in (one, two):
            assert stream.connection.read_exactly(10)[8:] == b"up"
        assert set(api.call("GET", target).json["ExecIDs"]) == {first, second}
        one.half_close()
        one.read_frames()
        assert api.call("GET", target).json["ExecIDs"] == [second]
        two.half_close()
        two.read_frames()
    assert api.call("GET", target).json["ExecIDs"] is None
