"""curl over the unix socket: HTTP as it stands in the README, without an upgrade."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from execgate.wire import stdcopy
from support.clients import Curl
from support.runtimes import TestContainer

pytestmark = pytest.mark.usefixtures("no_leaks")

JSON = ("-H", "Content-Type: application/json")


def create(curl: Curl, container: TestContainer, *argv: str, **fields: Any) -> str:
    """Create an exec, with stdout and stderr attached unless `fields` say otherwise, and return its id."""
    body = {"AttachStdout": True, "AttachStderr": True, "Cmd": argv} | fields
    done = curl(f"/containers/{container.id}/exec", *JSON, "--fail-with-body", "-d", json.dumps(body))
    assert done.returncode == 0, done
    return str(json.loads(done.stdout)["Id"])


def start(curl: Curl, session_id: str, *options: str, tty: bool = False) -> bytes:
    """Start an exec and return everything that curl prints."""
    body = json.dumps({"Detach": False, "Tty": tty})
    done = curl(f"/exec/{session_id}/start", *JSON, "--fail-with-body", "-d", body, *options)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


def exit_code(curl: Curl, session_id: str) -> int | None:
    code: int | None = json.loads(curl(f"/exec/{session_id}/json").stdout)["ExitCode"]
    return code


def demultiplexed(data: bytes) -> dict[int, bytes]:
    output: dict[int, bytes] = {}
    demultiplexer = stdcopy.Demultiplexer()
    for stream, piece in demultiplexer.feed(data):
        output[stream] = output.get(stream, b"") + piece
    assert demultiplexer.at_boundary
    return output


def test_ping(curl: Curl) -> None:
    assert curl("/_ping").stdout == b"OK"
    assert b"Api-Version: " in curl("/_ping", "--head").stdout


def test_the_output_is_a_200_in_frames(curl: Curl, container: TestContainer) -> None:
    session_id = create(curl, container, "sh", "-c", "echo out; echo err >&2; exit 42")
    head, _, body = start(curl, session_id, "--include").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Content-Type: application/vnd.docker.raw-stream" in head.split(b"\r\n")
    assert b"upgrade" not in head.lower()
    assert demultiplexed(body) == {1: b"out\n", 2: b"err\n"}
    assert exit_code(curl, session_id) == 42


def test_a_tty_is_readable_as_it_is(curl: Curl, container: TestContainer) -> None:
    session_id = create(curl, container, "sh", "-c", "echo out; tty", Tty=True)
    assert start(curl, session_id, tty=True) == b"out\r\n/dev/pts/0\r\n"
    assert exit_code(curl, session_id) == 0


def test_with_an_upgrade_header_it_is_a_101(curl: Curl, container: TestContainer) -> None:
    session_id = create(curl, container, "echo", "hello")
    shown = start(curl, session_id, "--include", "-H", "Connection: Upgrade", "-H", "Upgrade: tcp")
    head, _, body = shown.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 UPGRADED\r\n")
    assert demultiplexed(body) == {1: b"hello\n"}


def test_output_comes_while_the_process_runs(curl: Curl, container: TestContainer) -> None:
    """The process writes its last word only once the first was read here."""
    gate = container.rootfs / "tmp/curl-gate"
    session_id = create(curl, container, "sh", "-c", "mkfifo /tmp/curl-gate; echo first; cat /tmp/curl-gate")
    argv = curl.argv(f"/exec/{session_id}/start", *JSON, "-d", "{}")
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.read(8 + 6) == stdcopy.frame_header(1, 6) + b"first\n"
        gate.write_bytes(b"last\n")
        gate.unlink()
        assert running.stdout.read() == stdcopy.frame_header(1, 5) + b"last\n"
    assert exit_code(curl, session_id) == 0


def test_the_body_from_a_file(curl: Curl, container: TestContainer, tmp_path: Path) -> None:
    """`-T FILE` sends it as it is, `-T -` in chunks."""
    body = tmp_path / "body.json"
    body.write_text('{"Detach": false, "Tty": false}')
    upload = ("-X", "POST", *JSON)
    first = create(curl, container, "echo", "from a file")
    done = curl(f"/exec/{first}/start", *upload, "-T", str(body))
    assert demultiplexed(done.stdout) == {1: b"from a file\n"}
    second = create(curl, container, "echo", "in chunks")
    argv = curl.argv(f"/exec/{second}/start", *upload, "-T", "-")
    chunked = subprocess.run(argv, input=body.read_bytes(), capture_output=True, timeout=60, check=False)
    assert demultiplexed(chunked.stdout) == {1: b"in chunks\n"}


def test_an_empty_body_means_the_defaults(curl: Curl, container: TestContainer) -> None:
    session_id = create(curl, container, "echo", "hello")
    done = curl(f"/exec/{session_id}/start", "-X", "POST")
    assert demultiplexed(done.stdout) == {1: b"hello\n"}


def test_input_is_not_waited_for(curl: Curl, container: TestContainer) -> None:
    """curl keeps its side open; without AttachStdin the process has an empty input all the same."""
    session_id = create(curl, container, "sh", "-c", "cat; echo done")
    assert demultiplexed(start(curl, session_id)) == {1: b"done\n"}


def test_detached(curl: Curl, container: TestContainer) -> None:
    session_id = create(curl, container, "sh", "-c", "exit 7")
    listening = subprocess.Popen(curl.argv("/events?since=1"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    with listening:
        done = curl(f"/exec/{session_id}/start", *JSON, "-d", '{"Detach": true}', "-w", "%{http_code}")
        assert done.stdout == b"200"
        assert listening.stdout is not None
        ends = (json.loads(line) for line in listening.stdout if b"exec_die" in line)
        end = next(event for event in ends if event["Actor"]["Attributes"]["execID"] == session_id)
        listening.terminate()
    assert end["Actor"]["Attributes"]["exitCode"] == "7"
    assert exit_code(curl, session_id) == 7


@pytest.mark.parametrize(
    ("path", "options", "status", "message"),
    [
        ("/containers/nosuch/exec", (*JSON, "-d", '{"Cmd": ["true"]}'), 404, "No such container: nosuch"),
        ("/exec/nosuch/start", (*JSON, "-d", "{}"), 404, "No such exec instance: nosuch"),
        ("/exec/nosuch/json", (), 404, "No such exec instance: nosuch"),
        ("/nosuch", (), 404, "page not found"),
    ],
)
def test_errors(curl: Curl, path: str, options: tuple[str, ...], status: int, message: str) -> None:
    done = curl(path, *options, "-w", "\n%{http_code} %{content_type}")
    body, _, trailer = done.stdout.rpartition(b"\n")
    assert trailer == f"{status} application/json".encode()
    assert json.loads(body) == {"message": message}
