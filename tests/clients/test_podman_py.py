"""podman-py: every way in which it runs an exec, and what it asks around one."""

import gc
import os
import signal
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from podman import PodmanClient
from podman.errors import APIError, NotFound

from support.runtimes import TestContainer

BOTH = ["sh", "-c", "echo out; echo err >&2"]


@pytest.fixture(autouse=True)
def collect_sockets(no_leaks: None) -> Iterator[None]:
    """An error keeps its connection, and a traceback the error, until the garbage collector comes."""
    yield
    gc.collect()


@pytest.fixture
def k(podman_py: PodmanClient, container: TestContainer) -> Any:
    """podman-py's object for the container."""
    return podman_py.containers.get(container.id)


def frame(stream: int, payload: bytes) -> bytes:
    return struct.pack(">BxxxL", stream, len(payload)) + payload


def test_exec_run_returns_code_and_output(k: Any) -> None:
    """Without demux podman-py leaves the frames in, here as with podman's own service."""
    assert k.exec_run("echo hello") == (0, frame(1, b"hello\n"))
    assert k.exec_run(["sh", "-c", "echo no; exit 42"]) == (42, frame(1, b"no\n"))


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


def test_a_stream(k: Any) -> None:
    code, pieces = k.exec_run(["sh", "-c", "for i in 1 2 3; do echo $i; sleep 0.05; done"], stream=True)
    assert code is None
    assert b"".join(pieces) == b"1\n2\n3\n"


def test_a_stream_with_demux(k: Any) -> None:
    _, pieces = k.exec_run(BOTH, stream=True, demux=True)
    assert sorted(pieces, key=str) == sorted([(b"out\n", None), (None, b"err\n")], key=str)


def test_ten_megabytes(k: Any) -> None:
    code, (stdout, stderr) = k.exec_run(["head", "-c", "10000000", "/dev/zero"], demux=True)
    assert (code, stdout, stderr) == (0, bytes(10_000_000), None)


def test_tty(k: Any) -> None:
    code, output = k.exec_run(["sh", "-c", "test -t 1 && echo tty; echo err >&2"], tty=True)
    assert (code, output) == (0, b"tty\r\nerr\r\n")


def test_detached(podman_py: PodmanClient, k: Any, container: TestContainer) -> None:
    assert k.exec_run(["sleep", "2147"], detach=True) == (None, b"\n")
    assert ["sleep", "2147"] in container.processes().values()
    k.reload()
    (session_id,) = k.attrs["ExecIDs"]
    found = podman_py.api.get(f"/exec/{session_id}/json").json()
    assert (found["Running"], found["ContainerID"]) == (True, container.id)
    os.kill(found["Pid"], signal.SIGKILL)


@pytest.mark.parametrize("environment", [["A=1", "B=two words"], {"A": "1", "B": "two words"}])
def test_environment(k: Any, environment: list[str] | dict[str, str]) -> None:
    assert k.exec_run(["sh", "-c", "echo $A/$B"], environment=environment, demux=True)[1] == (b"1/two words\n", None)


def test_workdir(k: Any) -> None:
    assert k.exec_run("pwd", workdir="/var/tmp", demux=True) == (0, (b"/var/tmp\n", None))


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("app", b"uid=1000(app) gid=1000(app) groups=1000(app),2000(extra)\n"),
        ("1000:extra", b"uid=1000(app) gid=2000(extra) groups=2000(extra)\n"),
        ("4321", b"uid=4321 gid=0(root) groups=0(root)\n"),
    ],
)
def test_user(k: Any, user: str, expected: bytes) -> None:
    assert k.exec_run("id", user=user, demux=True) == (0, (expected, None))


def test_privileged(k: Any) -> None:
    plain, privileged = (
        int(k.exec_run(["grep", "CapEff", "/proc/self/status"], privileged=on, demux=True)[1][0].split()[1], 16)
        for on in (False, True)
    )
    assert plain & privileged == plain
    assert privileged > plain


def test_what_cannot_be_run(k: Any) -> None:
    code, (stdout, stderr) = k.exec_run("nosuch", demux=True)
    assert (code, stdout) == (127, None)
    assert stderr.startswith(b"Error: OCI runtime exec failed: ")
    assert b"nosuch" in stderr
    assert k.exec_run("/etc/passwd")[0] == 126
    with pytest.raises(APIError, match="nosuch"):
        k.exec_run("nosuch", detach=True)


def test_what_is_not_there(podman_py: PodmanClient, k: Any) -> None:
    with pytest.raises(NotFound) as missing:
        podman_py.containers.get("nosuch")
    assert missing.value.explanation == 'no container with name or ID "nosuch" found: no such container'
    with pytest.raises(APIError, match="unable to find user nosuch: no matching entries in passwd file"):
        k.exec_run("true", user="nosuch")


def test_around_an_exec(podman_py: Any, container: TestContainer, k: Any) -> None:
    assert podman_py.ping()
    assert podman_py.version()["Os"] == "linux"
    assert podman_py.info()["version"]["APIVersion"] == "5.8.0"
    assert container.id in [one.id for one in podman_py.containers.list()]
    assert (k.name, k.status, k.labels) == (container.id, "running", {})
    assert podman_py.containers.exists(container.id)
    assert not podman_py.containers.exists("nosuch")
