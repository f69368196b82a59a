"""`podman --remote`: every flag of `podman exec`, and the commands around it."""

import hashlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support.api import RawApi
from support.clients import PodmanRemote
from support.runtimes import TestContainer
from support.tty import Terminal, tell_size_in_shell

pytestmark = pytest.mark.usefixtures("no_leaks")

NOISE = os.urandom(10_000_000)

PROMPT = "/ # "


@pytest.fixture
def end_session(podman: PodmanRemote, raw: RawApi, container: TestContainer) -> Callable[..., str]:
    """Kill the one process that runs in a session of the container, which must be `argv`; return the session's id."""

    def end(*argv: str) -> str:
        (found,) = json.loads(podman("inspect", container.id).stdout)
        (session_id,) = found["ExecIDs"]
        pid = raw.call("GET", f"/v4.3.1/libpod/exec/{session_id}/json").json["Pid"]
        assert Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1] == list(argv)
        os.kill(pid, signal.SIGKILL)
        return str(session_id)

    return end


def test_both_streams(podman: PodmanRemote, container: TestContainer) -> None:
    done = podman("exec", container.id, "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n", b"err\n")


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 42"], 42),
        (["sh", "-c", "exit 255"], 255),
        (["sh", "-c", "kill -9 $$"], 137),
        (["/etc/passwd"], 126),
        (["/etc"], 126),
        (["nosuch"], 127),
        (["/no/such"], 127),
    ],
)
def test_exit_codes(podman: PodmanRemote, container: TestContainer, argv: list[str], code: int) -> None:
    assert podman("exec", container.id, *argv).returncode == code


def test_what_cannot_be_run_is_named_on_stderr(podman: PodmanRemote, container: TestContainer) -> None:
    done = podman("exec", container.id, "nosuch")
    assert done.stdout == b""
    assert re.match(rb"Error: OCI runtime exec failed: .*nosuch.*\n\Z", done.stderr)
    detached = podman("exec", "-d", container.id, "nosuch")
    assert (detached.returncode, detached.stdout) == (125, b"")
    assert b"nosuch" in detached.stderr


def test_what_is_not_there(podman: PodmanRemote, container: TestContainer) -> None:
    missing = podman("exec", "nosuch", "true")
    assert (missing.returncode, missing.stdout) == (125, b"")
    assert missing.stderr == b'Error: no container with name or ID "nosuch" found: no such container\n'
    stranger = podman("exec", "-u", "nosuch", container.id, "true")
    assert (stranger.returncode, stranger.stdout) == (125, b"")
    assert stranger.stderr == b"Error: unable to find user nosuch: no matching entries in passwd file\n"


@pytest.mark.parametrize("where", ["stdout", "stderr"])
def test_ten_megabytes_in_and_out(podman: PodmanRemote, container: TestContainer, where: str) -> None:
    redirect = {"stdout": "cat", "stderr": "cat >&2"}[where]
    done = podman("exec", "-i", container.id, "sh", "-c", redirect, input=NOISE)
    got = {"stdout": done.stdout, "stderr": done.stderr}
    assert done.returncode == 0
    assert hashlib.md5(got.pop(where)).digest() == hashlib.md5(NOISE).digest()
    assert set(got.values()) == {b""}


def test_ten_megabytes_are_all_read(podman: PodmanRemote, container: TestContainer) -> None:
    done = podman("exec", "-i", container.id, "md5sum", input=NOISE)
    assert done.stdout.split()[0].decode() == hashlib.md5(NOISE).hexdigest()


def test_without_i_there_is_no_input(podman: PodmanRemote, container: TestContainer) -> None:
    done = podman("exec", container.id, "cat", input=b"unwanted")
    assert (done.returncode, done.stdout) == (0, b"")


def test_detached(podman: PodmanRemote, container: TestContainer, end_session: Callable[..., str]) -> None:
    done = podman("exec", "-d", container.id, "sleep", "2147")
    assert (done.returncode, done.stderr) == (0, b"")
    assert re.fullmatch(rb"[0-9a-f]{64}\n", done.stdout)
    assert end_session("sleep", "2147") == done.stdout.decode().strip()


def test_environment(podman: PodmanRemote, container: TestContainer, tmp_path: Path) -> None:
    env_file = tmp_path / "env"
    env_file.write_text("C=from file\n")
    done = podman("exec", "-e", "A=1", "--env", "B=two words", "--env-file", str(env_file), container.id, "env")
    assert {b"A=1", b"B=two words", b"C=from file"} <= set(done.stdout.splitlines())


def test_workdir(podman: PodmanRemote, container: TestContainer) -> None:
    assert podman("exec", "-w", "/var/tmp", container.id, "pwd").stdout == b"/var/tmp\n"
    assert podman("exec", "-w", "/no/such", container.id, "pwd").returncode == 127


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("app", b"uid=1000(app) gid=1000(app) groups=1000(app),2000(extra)\n"),
        ("1000", b"uid=1000(app) gid=1000(app) groups=1000(app),2000(extra)\n"),
        ("app:extra", b"uid=1000(app) gid=2000(extra) groups=2000(extra)\n"),
        ("0:0", b"uid=0(root) gid=0(root) groups=0(root)\n"),
    ],
)
def test_user(podman: PodmanRemote, container: TestContainer, user: str, expected: bytes) -> None:
    done = podman("exec", "-u", user, container.id, "id")
    assert (done.stdout, done.stderr) == (expected, b"")


def test_privileged(podman: PodmanRemote, container: TestContainer) -> None:
    def effective(*flags: str) -> int:
        done = podman("exec", *flags, container.id, "grep", "CapEff", "/proc/self/status")
        return int(done.stdout.split()[1], 16)

    assert effective("--privileged") & ~effective() != 0
    assert effective() & ~effective("--privileged") == 0


def test_the_process_outlives_a_killed_client(
    podman: PodmanRemote, container: TestContainer, end_session: Callable[..., str]
) -> None:
    with podman.popen("exec", container.id, "sh", "-c", "echo here; exec sleep 2147", stdin=subprocess.DEVNULL) as cli:
        assert cli.stdout is not None
        assert cli.stdout.readline() == b"here\n"
        cli.kill()
    end_session("sleep", "2147")


# -- terminals -------------------------------------------------------------------------------------------------------


def test_tty_without_a_terminal_of_ones_own(podman: PodmanRemote, container: TestContainer) -> None:
    """The client says at the start that it has none; the framing follows what was created."""
    done = podman("exec", "-t", container.id, "sh", "-c", "tty; echo err >&2; exit 4")
    assert re.fullmatch(rb"/dev/pts/\d+\r\nerr\r\n", done.stdout)
    assert (done.returncode, done.stderr) == (4, b"")


def test_a_shell_in_a_terminal(podman: PodmanRemote, container: TestContainer) -> None:
    with Terminal(podman.argv("exec", "-it", container.id, "sh"), podman.env, rows=33, columns=77) as person:
        person.expect(PROMPT)
        person.type(f"{tell_size_in_shell(container)}; echo $TERM\r")
        person.expect("\r\n33 77\r\nxterm\r\n" + PROMPT)
        person.type("exit 7\r")
        assert person.wait() == 7


def test_a_new_size_reaches_the_program_inside(podman: PodmanRemote, container: TestContainer) -> None:
    script = 'trap "stty size" WINCH; echo ready; while :; do sleep 2147 & wait $!; kill $!; done'
    argv = podman.argv("exec", "-it", container.id, "sh", "-c", script)
    with Terminal(argv, podman.env, rows=30, columns=100) as person:
        person.expect("ready")
        person.resize(50, 132)
        person.expect("50 132\r\n")
        person.type("\x03")
        assert person.wait() == 130


@pytest.mark.parametrize(
    ("flags", "keys"),
    [
        pytest.param((), "\x10\x11", id="default"),
        pytest.param(("--detach-keys", "ctrl-a,x"), "\x01x", id="custom"),
    ],
)
def test_detach_keys_leave_the_process_running(
    podman: PodmanRemote,
    container: TestContainer,
    end_session: Callable[..., str],
    flags: tuple[str, ...],
    keys: str,
) -> None:
    """podman watches for no keys of its own accord: the service does."""
    argv = podman.argv("exec", "-it", *flags, container.id, "sh", "-c", "echo ready; exec sleep 2147")
    with Terminal(argv, podman.env) as person:
        person.expect("ready\r\n")
        person.type(keys)
        assert person.wait() == 0
    end_session("sleep", "2147")


def test_no_detach_keys_at_all(podman: PodmanRemote, container: TestContainer) -> None:
    argv = ("sh", "-c", "stty raw; echo ready; head -c 2 | od -c; exit 5")
    with Terminal(podman.argv("exec", "-it", "--detach-keys", "", container.id, *argv), podman.env) as person:
        person.expect("ready")
        person.type("\x10\x11")
        person.expect(r"020 021")
        assert person.wait() == 5


def test_detach_keys_that_are_none_are_refused(podman: PodmanRemote, container: TestContainer) -> None:
    done = podman("exec", "--detach-keys", "ctrl-nonsense", container.id, "true")
    assert (done.returncode, done.stderr) == (125, b"Error: Invalid escape keys (ctrl-nonsense) provided\n")


def test_what_cannot_be_run_in_a_terminal(podman: PodmanRemote, container: TestContainer) -> None:
    with Terminal(podman.argv("exec", "-it", container.id, "nosuch"), podman.env) as person:
        assert person.wait() == 127
        assert re.match(r"Error: OCI runtime exec failed: .*nosuch", person.shown)


# -- around an exec --------------------------------------------------------------------------------------------------


def test_a_unique_prefix_is_enough(podman: PodmanRemote, container: TestContainer) -> None:
    assert podman("exec", container.id[:-1], "echo", "hi").stdout == b"hi\n"


def test_ps(podman: PodmanRemote, container: TestContainer) -> None:
    done = podman("ps", "--no-trunc", "--format", "{{.ID}} {{.Names}} {{.Status}}", "--filter", f"id={container.id}")
    assert re.fullmatch(rf"{container.id} {container.id} Up .* ago\n", done.stdout.decode())
    table = podman("ps")
    assert table.stdout.startswith(b"CONTAINER ID")
    assert container.id[:12].encode() in table.stdout
    (listed,) = json.loads(podman("ps", "--format", "json", "--filter", f"id={container.id}").stdout)
    assert (listed["Pid"], listed["State"], listed["Names"]) == (container.init_pid, "running", [container.id])


def test_exists(podman: PodmanRemote, container: TestContainer) -> None:
    assert podman("container", "exists", container.id).returncode == 0
    assert podman("container", "exists", "nosuch").returncode == 1


def test_inspect(podman: PodmanRemote, container: TestContainer) -> None:
    (found,) = json.loads(podman("inspect", container.id).stdout)
    assert (found["Id"], found["Name"]) == (container.id, container.id)
    assert (found["State"]["Status"], found["State"]["Pid"]) == ("running", container.init_pid)
    assert found["OCIRuntime"] == container.host.name
    done = podman("container", "inspect", "-f", "{{.State.Running}} {{.Config.Entrypoint}}", container.id)
    assert done.stdout == b"true \n"
    missing = podman("inspect", "nosuch")
    assert missing.returncode == 125
    assert b'no such object: "nosuch"' in missing.stderr


def test_version(podman: PodmanRemote) -> None:
    found = json.loads(podman("version", "--format", "json").stdout)
    assert (found["Server"]["Os"], found["Server"]["APIVersion"]) == ("linux", "5.8.0")


def test_info(podman: PodmanRemote, container: TestContainer) -> None:
    found = json.loads(podman("info", "--format", "json").stdout)
    assert found["host"]["os"] == "linux"
    assert found["store"]["containerStore"]["running"] >= 1


def test_what_is_not_served_is_an_error_and_no_crash(podman: PodmanRemote, container: TestContainer) -> None:
    done = podman("stop", container.id)
    assert (done.returncode, done.stderr) == (125, b"Error: page not found\n")
    assert container.init_pid
