"""docker-py: every way in which it runs an exec, and what it asks around one."""

import gc
import io
import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import docker as docker_sdk  # type: ignore[import-untyped]
import pytest
from docker.errors import APIError, NotFound  # type: ignore[import-untyped]
from docker.utils.socket import frames_iter  # type: ignore[import-untyped]

from support.runtimes import TestContainer
from support.tty import tell_size

pytestmark = [
    pytest.mark.usefixtures("no_leaks"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    # From Python 3.13 on the response that docker-py has forgotten minds that its socket was closed.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <http.client.HTTPResponse:pytest.PytestUnraisableExceptionWarning"
    ),
]

BOTH = ["sh", "-c", "echo out; echo err >&2"]


@pytest.fixture(autouse=True)
def collect_sockets() -> Iterator[None]:
    """docker-py leaves sockets to the garbage collector, which would complain in whatever test comes next."""
    yield
    gc.collect()


@pytest.fixture
def k(docker_py: docker_sdk.DockerClient, container: TestContainer) -> Any:
    """docker-py's object for the container."""
    return docker_py.containers.get(container.id)


def own_socket(stream: io.RawIOBase) -> socket.socket:
    """What docker-py's users reach for to send input: the socket inside the object that it returns."""
    connection = stream._sock  # type: ignore[attr-defined]
    assert isinstance(connection, socket.socket)
    return connection


def run_over_socket(docker_py: docker_sdk.DockerClient, exec_id: str, stdin: bytes, *, tty: bool = False) -> Any:
    """Start an exec on its socket, send input and its end, and return docker-py's frames."""
    stream = docker_py.api.exec_start(exec_id, socket=True, tty=tty)
    with closing(stream), own_socket(stream) as connection:
        connection.settimeout(60)
        connection.sendall(stdin)
        connection.shutdown(socket.SHUT_WR)
        return list(frames_iter(stream, tty=tty))


def test_exec_run_returns_code_and_output(k: Any) -> None:
    assert k.exec_run("echo hello") == (0, b"hello\n")
    assert k.exec_run(["sh", "-c", "echo no; exit 42"]) == (42, b"no\n")


def test_demux_tells_the_streams_apart(k: Any) -> None:
    assert k.exec_run(BOTH, demux=True) == (0, (b"out\n", b"err\n"))
    assert k.exec_run("true", demux=True) == (0, (None, None))


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"stdout": False}, (None, b"err\n")),
        ({"stderr": False}, (b"out\n", None)),
        ({"stdout": False, "stderr": False}, (None, None)),
    ],
)
def test_a_stream_nobody_wants_does_not_come(k: Any, wanted: dict[str, bool], expected: object) -> None:
    assert k.exec_run(BOTH, demux=True, **wanted) == (0, expected)


def test_stream_yields_output_while_the_process_runs(k: Any) -> None:
    """The process writes its second line only once the first was read here and a file was made for it."""
    go = f"/tmp/go-{k.id}"
    code, chunks = k.exec_run(["sh", "-c", f"rm -f {go}; mkfifo {go}; echo 1; read x <{go}; echo $x"], stream=True)
    with closing(chunks):
        assert code is None
        assert next(chunks) == b"1\n"
        assert k.exec_run(["sh", "-c", f"echo 2 >{go}"]).exit_code == 0
        assert b"".join(chunks) == b"2\n"


def test_stream_and_demux(k: Any) -> None:
    _, chunks = k.exec_run(BOTH, stream=True, demux=True)
    with closing(chunks):
        assert set(chunks) == {(None, b"err\n"), (b"out\n", None)}


def test_a_tty_is_one_raw_stream(k: Any) -> None:
    code, output = k.exec_run(["sh", "-c", "tty; echo err >&2; echo $TERM"], tty=True)
    assert code == 0
    assert output.splitlines() == [b"/dev/pts/0", b"err", b"xterm"]
    assert b"\r\n" in output


def test_created_with_a_tty_and_started_without(docker_py: docker_sdk.DockerClient, container: TestContainer) -> None:
    """docker-py's own tests do this, and expect what the PTY shows in frames."""
    exec_id = docker_py.api.exec_create(container.id, ["sh", "-c", "tty; echo err >&2"], tty=True)["Id"]
    frames = run_over_socket(docker_py, exec_id, b"", tty=False)
    assert {stream for stream, _ in frames} == {1}
    assert b"".join(data for _, data in frames) == b"/dev/pts/0\r\nerr\r\n"
    assert docker_py.api.exec_inspect(exec_id)["ExitCode"] == 0


def test_created_without_a_tty_and_started_with(docker_py: docker_sdk.DockerClient, container: TestContainer) -> None:
    exec_id = docker_py.api.exec_create(container.id, ["sh", "-c", "tty; echo err >&2"])["Id"]
    output = docker_py.api.exec_start(exec_id, tty=True)
    assert sorted(output.splitlines()) == [b"err", b"not a tty"]


def test_stdin_over_the_socket(docker_py: docker_sdk.DockerClient, container: TestContainer) -> None:
    exec_id = docker_py.api.exec_create(container.id, ["sh", "-c", "cat; echo end >&2; exit 3"], stdin=True)["Id"]
    frames = run_over_socket(docker_py, exec_id, b"a\0b\n" * 1000)
    assert b"".join(data for stream, data in frames if stream == 1) == b"a\0b\n" * 1000
    assert b"".join(data for stream, data in frames if stream == 2) == b"end\n"
    assert docker_py.api.exec_inspect(exec_id)["ExitCode"] == 3


def test_stdin_to_a_tty_over_the_socket(docker_py: docker_sdk.DockerClient, container: TestContainer) -> None:
    exec_id = docker_py.api.exec_create(container.id, "sh", stdin=True, tty=True)["Id"]
    frames = run_over_socket(docker_py, exec_id, b"echo $((6 * 7)); exit 9\n", tty=True)
    assert b"\r\n42\r\n" in b"".join(data for _, data in frames)
    assert docker_py.api.exec_inspect(exec_id)["ExitCode"] == 9


def test_detached(docker_py: docker_sdk.DockerClient, container: TestContainer) -> None:
    exec_id = docker_py.api.exec_create(container.id, ["sh", "-c", "echo unseen; exit 7"])["Id"]
    with closing(docker_py.events(decode=True, filters={"event": "exec_die", "container": container.id})) as ends:
        assert docker_py.api.exec_start(exec_id, detach=True) == ""
        end = next(event for event in ends if event["Actor"]["Attributes"]["execID"] == exec_id)
    assert end["Actor"]["Attributes"]["exitCode"] == "7"
    found = docker_py.api.exec_inspect(exec_id)
    assert (found["Running"], found["ExitCode"]) == (False, 7)


def test_exec_run_detached_returns_while_the_process_runs(
    docker_py: docker_sdk.DockerClient, k: Any, container: TestContainer
) -> None:
    assert k.exec_run(["sleep", "2147"], detach=True) == (None, "")
    pid = container.wait_for_process("sleep", "2147")
    k.reload()
    (exec_id,) = k.attrs["ExecIDs"]
    assert docker_py.api.exec_inspect(exec_id)["Pid"] == pid
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("environment", [["A=1", "B=two words"], {"A": "1", "B": "two words"}])
def test_environment(k: Any, environment: list[str] | dict[str, str]) -> None:
    assert k.exec_run(["sh", "-c", "echo $A/$B"], environment=environment) == (0, b"1/two words\n")


def test_workdir(k: Any) -> None:
    assert k.exec_run("pwd", workdir="/var/tmp") == (0, b"/var/tmp\n")


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("app", b"uid=1000(app) gid=1000(app) groups=1000(app),2000(extra)\n"),
        ("1000:extra", b"uid=1000(app) gid=2000(extra) groups=2000(extra)\n"),
        ("4321", b"uid=4321 gid=0(root) groups=0(root)\n"),
    ],
)
def test_user(k: Any, user: str, expected: bytes) -> None:
    assert k.exec_run("id", user=user) == (0, expected)


def test_privileged(k: Any) -> None:
    plain, privileged = (
        int(k.exec_run(["sh", "-c", "grep CapEff /proc/self/status"], privileged=on).output.split()[1], 16)
        for on in (False, True)
    )
    assert plain & privileged == plain
    assert privileged > plain


def test_inspect_of_one_that_runs(docker_py: docker_sdk.DockerClient, container: TestContainer) -> None:
    api = docker_py.api
    exec_id = api.exec_create(container.id, ["cat", "-"], stdin=True, user="app", environment=["SECRET=x"])["Id"]
    before = api.exec_inspect(exec_id)
    assert (before["Running"], before["ExitCode"], before["Pid"]) == (False, None, 0)
    stream = api.exec_start(exec_id, socket=True)
    with closing(stream), own_socket(stream) as connection:
        connection.sendall(b"here\n")
        assert next(frames_iter(stream, tty=False)) == (1, b"here\n")
        running = api.exec_inspect(exec_id)
        assert (running["Running"], running["ExitCode"]) == (True, None)
        assert ["cat", "-"] in container.processes().values()
        assert Path(f"/proc/{running['Pid']}/cmdline").read_text() == "cat\0-\0"
        assert exec_id in docker_py.containers.get(container.id).attrs["ExecIDs"]
        connection.shutdown(socket.SHUT_WR)
        assert list(frames_iter(stream, tty=False)) == []
    after = api.exec_inspect(exec_id)
    assert (after["Running"], after["ExitCode"], after["CanRemove"], after["Pid"]) == (False, 0, True, 0)
    assert after["ProcessConfig"] == {
        "tty": False,
        "entrypoint": "cat",
        "arguments": ["-"],
        "privileged": False,
        "user": "app",
    }
    assert (after["ContainerID"], after["OpenStdin"], after["OpenStdout"]) == (container.id, True, True)
    assert "SECRET" not in json.dumps(after)


def test_a_size_given_before_the_start_is_kept(docker_py: docker_sdk.DockerClient, container: TestContainer) -> None:
    exec_id = docker_py.api.exec_create(container.id, list(tell_size(container)), tty=True)["Id"]
    docker_py.api.exec_resize(exec_id, height=33, width=101)
    assert docker_py.api.exec_start(exec_id, tty=True) == b"33 101\r\n"


def test_what_cannot_be_run(k: Any) -> None:
    code, output = k.exec_run("nosuch")
    assert code == 127
    assert b"nosuch" in output
    assert k.exec_run("/etc/passwd").exit_code == 126
    with pytest.raises(APIError, match="nosuch") as caught:
        k.exec_run("nosuch", detach=True)
    assert caught.value.status_code == 400


def test_what_is_not_there(docker_py: docker_sdk.DockerClient, k: Any) -> None:
    with pytest.raises(NotFound, match="No such container: nosuch"):
        docker_py.containers.get("nosuch")
    with pytest.raises(NotFound, match="No such exec instance: nosuch"):
        docker_py.api.exec_inspect("nosuch")
    with pytest.raises(APIError, match="unable to find user nosuch: no matching entries in passwd file"):
        k.exec_run("true", user="nosuch")


def test_a_second_start_is_told_in_the_stream(docker_py: docker_sdk.DockerClient, container: TestContainer) -> None:
    exec_id = docker_py.api.exec_create(container.id, "true")["Id"]
    assert docker_py.api.exec_start(exec_id) == b""
    assert docker_py.api.exec_start(exec_id) == f"exec command {exec_id} has already run\r\n".encode()
    with pytest.raises(APIError, match="has already run") as caught:
        docker_py.api.exec_start(exec_id, detach=True)
    assert caught.value.status_code == 409


def test_around_an_exec(docker_py: docker_sdk.DockerClient, container: TestContainer, k: Any) -> None:
    assert docker_py.ping()
    assert docker_py.version()["Os"] == "linux"
    assert docker_py.info()["OSType"] == "linux"
    assert container.id in [one.id for one in docker_py.containers.list()]
    assert (k.name, k.status) == (container.id, "running")
    column = k.top()["Titles"].index("PID")
    assert str(container.init_pid) in [row[column] for row in k.top()["Processes"]]


def test_events_of_one_exec(docker_py: docker_sdk.DockerClient, container: TestContainer, k: Any) -> None:
    actions = []
    with closing(docker_py.events(decode=True, filters={"container": container.id})) as events:
        assert k.exec_run("true").exit_code == 0
        for event in events:
            assert event["Actor"]["ID"] == container.id
            assert event["Actor"]["Attributes"]["name"] == container.id
            actions.append(event["Action"])
            if event["Action"] == "exec_die":
                break
    assert actions == ["exec_create: true", "exec_start: true", "exec_die"]
