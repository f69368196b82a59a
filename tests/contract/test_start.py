"""`POST /exec/{id}/start`: the hijack, the frames, and every way in which a start can fail."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from contract.api import NO_SUCH_ID, Api
from contract.conftest import stop
from support.raw import JSON, request_bytes
from support.runtimes import TestContainer
from support.tty import tell_size

RAW = "application/vnd.docker.raw-stream"
MULTIPLEXED = "application/vnd.docker.multiplexed-stream"


# -- the head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "tty", "content_type"),
    [
        ("", False, MULTIPLEXED),
        ("", True, RAW),
        ("/v1.42", False, MULTIPLEXED),
        ("/v1.42", True, RAW),
        ("/v1.41", False, RAW),
        ("/v1.41", True, RAW),
        ("/v1.24", False, RAW),
    ],
)
def test_the_head_of_an_upgrade(
    version: str, tty: bool, content_type: str, api: Api, runc_container: TestContainer
) -> None:
    session_id = api.create(runc_container.id, "true")
    headers = {"Connection": "Upgrade", "Upgrade": "tcp", "Content-Type": "application/json"}
    body = b'{"Tty": true}' if tty else b"{}"
    with api.connect() as connection:
        connection.send(request_bytes("POST", f"{version}/exec/{session_id}/start", body, headers))
        lines = connection.read_until(b"\r\n\r\n").decode().split("\r\n")
    assert lines[:4] == [
        "HTTP/1.1 101 UPGRADED",
        f"Content-Type: {content_type}",
        "Connection: Upgrade",
        "Upgrade: tcp",
    ]
    assert {line.partition(":")[0] for line in lines[4:-2]} == {"Api-Version", "Server", "Ostype"}
    assert lines[-2:] == ["", ""]


@pytest.mark.parametrize("tty", [False, True])
@pytest.mark.parametrize("version", ["", "/v1.41"])
def test_the_head_without_an_upgrade(version: str, tty: bool, api: Api, runc_container: TestContainer) -> None:
    with api.attach(api.create(runc_container.id, "true"), version=version, upgrade=False, Tty=tty) as stream:
        assert (stream.head.status, stream.head.reason) == (200, "OK")
        assert stream.head.headers["content-type"] == RAW
        assert not stream.head.headers.keys() & {"connection", "upgrade", "transfer-encoding", "content-length"}
        assert stream.read_raw() == b""


@pytest.mark.parametrize("headers", [{"Upgrade": "websocket"}, {"Upgrade": ""}, {"upgrade": "h2c"}])
def test_only_the_presence_of_upgrade_counts(headers: dict[str, str], api: Api, runc_container: TestContainer) -> None:
    session_id = api.create(runc_container.id, "true")
    with api.connect() as connection:
        connection.send(request_bytes("POST", f"/exec/{session_id}/start", headers=headers))
        assert connection.read_head().status == 101
        assert connection.read_to_end() == b""


# -- the stream ------------------------------------------------------------------------------------------------------


def test_frames_tell_stdout_from_stderr(api: Api, container: TestContainer) -> None:
    session_id = api.create_attached(container.id, "sh", "-c", "echo out; echo err >&2")
    with api.attach(session_id) as stream:
        assert stream.read_frames() == (b"out\n", b"err\n")


@pytest.mark.parametrize(
    ("attached", "expected"),
    [
        ({"AttachStdout": True}, (b"out\n", b"")),
        ({"AttachStderr": True}, (b"", b"err\n")),
        ({}, (b"", b"")),
        ({"AttachStdin": True}, (b"", b"")),
    ],
)
def test_only_what_was_attached_at_create_is_delivered(
    attached: dict[str, Any], expected: tuple[bytes, bytes], api: Api, container: TestContainer
) -> None:
    session_id = api.create(container.id, "sh", "-c", "echo out; echo err >&2; exit 3", **attached)
    with api.attach(session_id) as stream:
        stream.half_close()
        assert stream.read_frames() == expected
    assert api.inspect(session_id)["ExitCode"] == 3


def test_a_terminal_is_raw(api: Api, container: TestContainer) -> None:
    session_id = api.create_attached(container.id, "sh", "-c", "echo $TERM; tty", Tty=True)
    with api.attach(session_id, Tty=True) as stream:
        assert stream.read_raw().split() == [b"xterm", b"/dev/pts/0"]


def test_framing_follows_start_and_the_terminal_follows_create(api: Api, container: TestContainer) -> None:
    """docker-py's own tests create with a TTY, start without, and expect the terminal's bytes in frames."""
    session_id = api.create_attached(container.id, "sh", "-c", "echo a; test -t 1 && echo terminal", Tty=True)
    with api.attach(session_id, Tty=False) as stream:
        assert stream.head.headers["content-type"] == MULTIPLEXED
        assert stream.read_frames() == (b"a\r\nterminal\r\n", b"")


def test_without_a_terminal_start_can_still_ask_for_raw_bytes(api: Api, container: TestContainer) -> None:
    session_id = api.create_attached(container.id, "sh", "-c", "echo a; test -t 1 || echo none")
    with api.attach(session_id, Tty=True) as stream:
        assert stream.head.headers["content-type"] == RAW
        assert stream.read_raw() == b"a\nnone\n"


@pytest.mark.parametrize("upgrade", [True, False])
def test_bytes_behind_the_request_are_stdin(upgrade: bool, api: Api, container: TestContainer) -> None:
    session_id = api.create_attached(container.id, "cat")
    with api.attach(session_id, upgrade=upgrade, stdin=b"POST / HTTP/1.1\r\n\r\n") as stream:
        stream.send(b"and more")
        stream.half_close()
        assert stream.read_frames() == (b"POST / HTTP/1.1\r\n\r\nand more", b"")


def test_a_half_close_ends_stdin_and_not_the_output(api: Api, container: TestContainer) -> None:
    session_id = api.create_attached(container.id, "sh", "-c", "cat; echo after")
    with api.attach(session_id) as stream:
        stream.half_close()
        assert stream.read_frames() == (b"after\n", b"")


def test_without_attached_stdin_it_is_empty(api: Api, container: TestContainer) -> None:
    session_id = api.create(container.id, "sh", "-c", "cat; echo end", AttachStdout=True)
    with api.attach(session_id, stdin=b"not for you") as stream:
        assert stream.read_frames() == (b"end\n", b"")


def test_the_exit_code_can_be_read_when_the_stream_ends(api: Api, container: TestContainer) -> None:
    """The docker CLI asks straight after the end, and takes null for 0."""
    for code in range(1, 21):
        session_id = api.create(container.id, "sh", "-c", f"exit {code}", AttachStdout=True)
        with api.attach(session_id) as stream:
            assert stream.read_raw() == b""
            assert api.inspect(session_id)["ExitCode"] == code


def test_a_client_that_leaves_ends_nothing(api: Api, container: TestContainer) -> None:
    session_id = api.create(container.id, "sh", "-c", "echo up; exec sleep 1000", AttachStdout=True)
    with api.events(filters={"event": ["exec_die"]}) as events:
        with api.attach(session_id) as stream:
            assert stream.connection.read_exactly(11)[8:] == b"up\n"
        inspection = api.inspect(session_id)
        assert inspection["Running"]
        os.kill(inspection["Pid"], signal.SIGTERM)
        assert next(events)["Actor"]["Attributes"]["exitCode"] == "143"
    assert api.inspect(session_id)["ExitCode"] == 143


# -- detach keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "typed"),
    [
        ("", b"\x10\x11"),
        ("ctrl-p,ctrl-q", b"\x10\x11"),
        ("ctrl-a", b"\x01"),
        ("a,b", b"ab"),
        ("DEL", b"\x7f"),
        ("ctrl-@,ctrl-[,ctrl-\\,ctrl-],ctrl-^,ctrl-_", b"\x00\x1b\x1c\x1d\x1e\x1f"),
    ],
)
def test_the_detach_keys_end_the_stream_and_leave_the_process(
    keys: str, typed: bytes, api: Api, container: TestContainer
) -> None:
    session_id = api.create_attached(container.id, "sh", "-c", "echo up; exec sleep 1000", Tty=True, DetachKeys=keys)
    with api.events(filters={"event": ["exec_detach", "exec_die"]}) as events:
        with api.attach(session_id, Tty=True) as stream:
            stream.connection.read_until(b"up\r\n")
            stream.send(typed)
            stream.read_raw()
        detached = next(events)
        assert (detached["Action"], detached["Actor"]["Attributes"]["execID"]) == ("exec_detach", session_id)
        inspection = api.inspect(session_id)
        assert (inspection["Running"], inspection["ExitCode"]) == (True, None)
        os.kill(inspection["Pid"], signal.SIGKILL)
        assert next(events)["Action"] == "exec_die"


def test_without_a_terminal_no_keys_detach(api: Api, container: TestContainer) -> None:
    session_id = api.create_attached(container.id, "cat")
    with api.attach(session_id, stdin=b"\x10\x11") as stream:
        stream.half_close()
        assert stream.read_frames() == (b"\x10\x11", b"")


# -- ConsoleSize -----------------------------------------------------------------------------------------------------

UNKNOWN = b"stty: standard input"
"""What busybox says where the kernel's size is 0 by 0."""

SIZES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], bytes]] = {
    "create's": ("", {"ConsoleSize": [40, 120]}, "", {}, b"40 120"),
    "start's": ("", {}, "", {"ConsoleSize": [41, 121]}, b"41 121"),
    "start's over create's": ("", {"ConsoleSize": [40, 120]}, "", {"ConsoleSize": [41, 121]}, b"41 121"),
    "start's null leaves create's": ("", {"ConsoleSize": [40, 120]}, "", {"ConsoleSize": None}, b"40 120"),
    "create's below 1.42": ("/v1.41", {"ConsoleSize": [40, 120]}, "", {}, UNKNOWN),
    "start's below 1.42": ("", {"ConsoleSize": [40, 120]}, "/v1.41", {"ConsoleSize": [41, 121]}, b"40 120"),
    "both below 1.42": ("/v1.41", {"ConsoleSize": [40, 120]}, "/v1.41", {"ConsoleSize": [41, 121]}, UNKNOWN),
    "at 1.42": ("/v1.42", {"ConsoleSize": [40, 120]}, "/v1.42", {"ConsoleSize": [41, 121]}, b"41 121"),
    "[0, 0] is none": ("", {"ConsoleSize": [0, 0]}, "", {}, UNKNOWN),
    "none at all": ("", {}, "", {}, UNKNOWN),
}


@pytest.mark.parametrize("case", SIZES)
def test_the_terminal_has_its_size_from_the_first_command_on(case: str, api: Api, container: TestContainer) -> None:
    create_version, create, start_version, start, size = SIZES[case]
    command = ("stty", "size") if size == UNKNOWN else tell_size(container)
    session_id = api.create(container.id, *command, version=create_version, Tty=True, AttachStdout=True, **create)
    with api.attach(session_id, version=start_version, Tty=True, **start) as stream:
        assert stream.read_raw().strip() == size


def test_a_size_at_start_is_dropped_without_start_s_tty(api: Api, container: TestContainer) -> None:
    session_id = api.create(container.id, *tell_size(container), Tty=True, AttachStdout=True, ConsoleSize=[40, 120])
    with api.attach(session_id, Tty=False, ConsoleSize=[41, 121]) as stream:
        assert stream.read_frames() == (b"40 120\r\n", b"")


def test_a_size_without_a_terminal_means_nothing(api: Api, container: TestContainer) -> None:
    assert api.run(container.id, "sh", "-c", "! test -t 1", ConsoleSize=[40, 120])["ExitCode"] == 0


def test_a_size_out_of_range_is_refused_at_start(api: Api, container: TestContainer) -> None:
    session_id = api.create(container.id, "true", Tty=True)
    response = api.call("POST", f"/exec/{session_id}/start", {"Tty": True, "ConsoleSize": [1, 65536]})
    assert (response.status, response.message) == (400, "invalid ConsoleSize [1, 65536]: value out of range")
    assert not api.inspect(session_id)["CanRemove"], "it can still be started"
    with api.attach(session_id, Tty=True, ConsoleSize=[1, 65535]) as stream:
        stream.read_raw()
    assert api.inspect(session_id)["ExitCode"] == 0


# -- detached --------------------------------------------------------------------------------------------------------


def test_a_detached_start_is_answered_with_nothing_once_the_process_runs(api: Api, container: TestContainer) -> None:
    """docker-py compares the body of a detached start with the empty text."""
    session_id = api.create(container.id, "sleep", "1000")
    response = api.start_detached(session_id)
    assert (response.status, response.body, response.headers["content-length"]) == (200, b"", "0")
    inspection = api.inspect(session_id)
    assert inspection["Running"]
    assert inspection["Pid"] > 0
    with api.events(filters={"event": ["exec_die"]}) as events:
        os.kill(inspection["Pid"], signal.SIGKILL)
        assert next(events)["Actor"]["Attributes"]["execID"] == session_id
    assert api.inspect(session_id)["ExitCode"] == 137


def test_a_connection_goes_on_after_a_detached_start(api: Api, runc_container: TestContainer) -> None:
    target = f"/exec/{api.create(runc_container.id, 'true')}/start"
    with api.connect() as connection:
        assert connection.request("POST", target, b'{"Detach": true}', JSON).status == 200
        assert connection.request("GET", "/_ping").body == b"OK"


# -- no such session, and sessions that were started -----------------------------------------------------------------


@pytest.mark.parametrize("session_id", [NO_SUCH_ID, "abc", "..%2f..%2fx", "A" * 64, "0" * 63, "0" * 65])
@pytest.mark.parametrize("action", ["start", "resize?h=1&w=1", "json"])
def test_an_unknown_session_is_not_found(action: str, session_id: str, api: Api) -> None:
    method = "GET" if action == "json" else "POST"
    response = api.call(method, f"/exec/{session_id}/{action}")
    assert response.status == 404
    assert response.message.startswith("No such exec instance: ")


@pytest.mark.parametrize("action", ["start", "resize?h=1&w=1", "json"])
def test_an_unknown_session_is_named(action: str, api: Api) -> None:
    method = "GET" if action == "json" else "POST"
    assert api.call(method, f"/exec/{NO_SUCH_ID}/{action}").message == f"No such exec instance: {NO_SUCH_ID}"


def test_a_prefix_of_a_session_s_id_is_not_enough(api: Api, runc_container: TestContainer) -> None:
    session_id = api.create(runc_container.id, "true")
    assert api.call("GET", f"/exec/{session_id[:63]}/json").status == 404


def test_a_detached_start_of_what_has_run_is_a_conflict(api: Api, container: TestContainer) -> None:
    session_id = api.run(container.id, "true")["ID"]
    response = api.start_detached(session_id)
    assert (response.status, response.message) == (409, f"exec command {session_id} has already run")


def test_a_detached_start_of_what_runs_is_a_conflict(api: Api, container: TestContainer) -> None:
    session_id = api.create_attached(container.id, "cat")
    with api.attach(session_id) as stream:
        response = api.start_detached(session_id)
        assert (response.status, response.message) == (409, f"exec command {session_id} is already running")
        stream.send(b"unharmed")
        stream.half_close()
        assert stream.read_frames() == (b"unharmed", b"")


@pytest.mark.parametrize("upgrade", [True, False])
def test_an_attached_start_of_what_has_run_says_so_in_the_stream(
    upgrade: bool, api: Api, container: TestContainer
) -> None:
    session_id = api.run(container.id, "true")["ID"]
    with api.attach(session_id, upgrade=upgrade) as stream:
        assert stream.head.status == (101 if upgrade else 200)
        assert stream.read_frames() == (f"exec command {session_id} has already run\r\n".encode(), b"")
    with api.attach(session_id, upgrade=upgrade, Tty=True) as stream:
        assert stream.read_raw() == f"exec command {session_id} has already run\r\n".encode()


def test_an_attached_start_of_what_runs_says_so_in_the_stream(api: Api, container: TestContainer) -> None:
    session_id = api.create_attached(container.id, "cat")
    with api.attach(session_id) as stream:
        with api.attach(session_id) as second:
            assert second.head.status == 101
            assert second.read_frames() == (f"exec command {session_id} is already running\r\n".encode(), b"")
        stream.half_close()
        assert stream.read_frames() == (b"", b"")


# -- the container's state -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detach", [True, False])
def test_a_start_in_a_stopped_container_is_a_conflict(
    detach: bool, api: Api, new_container: Callable[..., TestContainer]
) -> None:
    container = new_container()
    session_id = api.create(container.id, "true")
    stop(container)
    response = api.call("POST", f"/exec/{session_id}/start", {"Detach": detach}, headers={"Upgrade": "tcp"})
    assert (response.status, response.message) == (409, f"container {container.id} is not running")


@pytest.mark.parametrize("detach", [True, False])
def test_a_start_in_a_paused_container_is_a_conflict(
    detach: bool, api: Api, new_container: Callable[..., TestContainer]
) -> None:
    container = new_container()
    session_id = api.create(container.id, "true", AttachStdout=True)
    container.pause()
    try:
        response = api.call("POST", f"/exec/{session_id}/start", {"Detach": detach}, headers={"Upgrade": "tcp"})
    finally:
        container.resume()
    assert response.status == 409
    assert response.message == f"Container {container.id} is paused, unpause the container before exec"
    with api.attach(session_id) as stream:
        stream.read_raw()
    assert api.inspect(session_id)["ExitCode"] == 0, "after unpausing it can be started"


@pytest.mark.parametrize("action", ["start", "resize?h=1&w=1"])
def test_a_session_whose_container_is_gone_is_not_found(
    action: str, api: Api, new_container: Callable[..., TestContainer]
) -> None:
    container = new_container()
    session_id = api.create(container.id, "true", Tty=True)
    container.delete()
    response = api.call("POST", f"/exec/{session_id}/{action}")
    assert (response.status, response.message) == (404, f"No such container: {container.id}")


@pytest.mark.parametrize("action", ["start", "resize?h=1&w=1"])
def test_a_session_belongs_to_one_incarnation_of_its_container(
    action: str,
    api: Api,
    new_container: Callable[..., TestContainer],
    recreate: Callable[[TestContainer], TestContainer],
) -> None:
    container = new_container()
    session_id = api.create(container.id, "true", Tty=True)
    recreate(container)
    response = api.call("POST", f"/exec/{session_id}/{action}")
    assert (response.status, response.message) == (409, f"container {container.id} is not running")
    assert api.run(container.id, "true")["ExitCode"] == 0, "a new session runs"


def test_a_container_s_end_is_the_end_of_its_sessions(api: Api, new_container: Callable[..., TestContainer]) -> None:
    container = new_container()
    session_id = api.create(container.id, "sh", "-c", "echo up; exec sleep 1000", AttachStdout=True)
    with api.attach(session_id) as stream:
        assert stream.connection.read_exactly(11)[8:] == b"up\n"
        stop(container)
        assert stream.read_raw() == b""
        assert api.inspect(session_id)["ExitCode"] == 137


# -- starts that fail ------------------------------------------------------------------------------------------------

# What, its exit code, the status of a detached start, and what the message says in lower case, by runtime.
FAILURES: dict[str, tuple[dict[str, object], int, int, dict[str, str]]] = {
    "no execute permission": (
        {"Cmd": ["/etc/passwd"]},
        126,
        400,
        {"runc": "permission denied", "crun": "permission denied"},
    ),
    "a directory": ({"Cmd": ["/etc"]}, 126, 400, {"runc": "permission denied", "crun": "permission denied"}),
    "not on the PATH": (
        {"Cmd": ["none-such"]},
        127,
        400,
        {"runc": "executable file not found", "crun": "no such file or directory"},
    ),
    "no such file": (
        {"Cmd": ["/none-such"]},
        127,
        400,
        {"runc": "no such file or directory", "crun": "no such file or directory"},
    ),
    "a file as a directory": (
        {"Cmd": ["/etc/passwd/x"]},
        127,
        400,
        {"runc": "not a directory", "crun": "not a directory"},
    ),
    "no such working directory": (
        {"Cmd": ["true"], "WorkingDir": "/none-such"},
        127,
        400,
        {"runc": "no such file or directory", "crun": "no such file or directory"},
    ),
    "anything else": (
        {"Cmd": ["/loops"]},
        128,
        500,
        {"runc": "too many levels of symbolic links", "crun": "too many levels of symbolic links"},
    ),
}


@pytest.fixture
def failing(container: TestContainer) -> TestContainer:
    """The shared container, with a symbolic link that leads to itself."""
    link = container.rootfs / "loops"
    if not link.is_symlink():
        link.symlink_to("loops")
    return container


@pytest.mark.parametrize("tty", [False, True])
@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_attached_start_says_why_in_the_stream(case: str, tty: bool, api: Api, failing: TestContainer) -> None:
    fields, code, _, words = FAILURES[case]
    body = {"AttachStdout": True, "AttachStderr": True, "Tty": tty, **fields}
    session_id = api.call("POST", f"/containers/{failing.id}/exec", body).json["Id"]
    with api.attach(session_id, Tty=tty) as stream:
        assert stream.head.status == 101
        text, stderr = (stream.read_raw(), b"") if tty else stream.read_frames()
    assert text.startswith(b"OCI runtime exec failed: ")
    assert text.endswith(b"\r\n")
    assert text.count(b"\n") == 1
    assert stderr == b""
    assert words[failing.host.name] in text.decode().lower()
    inspection = api.inspect(session_id)
    assert (inspection["ExitCode"], inspection["ExitCodeSource"]) == (code, "start-failure")
    assert not inspection["Running"]


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_detached_start_is_an_answer(case: str, api: Api, failing: TestContainer) -> None:
    fields, code, status, words = FAILURES[case]
    session_id = api.call("POST", f"/containers/{failing.id}/exec", fields).json["Id"]
    response = api.start_detached(session_id)
    assert response.status == status
    assert response.message.startswith("OCI runtime exec failed: ")
    assert words[failing.host.name] in response.message.lower()
    assert api.inspect(session_id)["ExitCode"] == code
    again = api.start_detached(session_id)
    assert (again.status, again.message) == (409, f"exec command {session_id} has already run")
