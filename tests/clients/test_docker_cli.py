"""The docker CLI: every flag of `docker exec`, and the commands around it."""

import json
import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.clients import DockerCli
from support.runtimes import TestContainer
from support.tty import Terminal

pytestmark = pytest.mark.usefixtures("no_leaks")


def test_both_streams(docker: DockerCli, container: TestContainer) -> None:
    done = docker("exec", container.id, "sh", "-c", "echo out; echo err >&2")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"out\n", b"err\n")


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
def test_exit_codes(docker: DockerCli, container: TestContainer, argv: list[str], code: int) -> None:
    assert docker("exec", container.id, *argv).returncode == code


def test_what_cannot_be_run_is_named(docker: DockerCli, container: TestContainer) -> None:
    assert b"nosuch" in docker("exec", container.id, "nosuch").stdout
    detached = docker("exec", "-d", container.id, "nosuch")
    assert detached.returncode == 1
    assert b"nosuch" in detached.stderr


def test_what_is_not_there(docker: DockerCli, container: TestContainer) -> None:
    missing = docker("exec", "nosuch", "true")
    assert (missing.returncode, missing.stdout) == (1, b"")
    assert b"No such container: nosuch" in missing.stderr
    stranger = docker("exec", "-u", "nosuch", container.id, "true")
    assert (stranger.returncode, stranger.stdout) == (1, b"")
    assert b"unable to find user nosuch: no matching entries in passwd file" in stranger.stderr


def test_interactive(docker: DockerCli, container: TestContainer) -> None:
    everything = bytes(range(256)) * 400
    done = docker("exec", "-i", container.id, "cat", input=everything)
    assert (done.returncode, done.stdout, done.stderr) == (0, everything, b"")


def test_without_i_there_is_no_input(docker: DockerCli, container: TestContainer) -> None:
    done = docker("exec", container.id, "cat", input=b"unwanted")
    assert (done.returncode, done.stdout) == (0, b"")


def test_tty_without_input(docker: DockerCli, container: TestContainer) -> None:
    done = docker("exec", "-t", container.id, "sh", "-c", "tty; echo err >&2; exit 4")
    assert (done.returncode, done.stdout, done.stderr) == (4, b"/dev/pts/0\r\nerr\r\n", b"")


def test_tty_with_input(docker: DockerCli, container: TestContainer) -> None:
    script = "echo ready; read x; echo [$x]; exit 4"
    with Terminal(docker.argv("exec", "-it", container.id, "sh", "-c", script), docker.env) as user:
        user.expect("ready")
        user.type("typed\r")
        assert user.wait() == 4
        assert user.shown == "ready\r\ntyped\r\n[typed]\r\n"


def test_detached(docker: DockerCli, container: TestContainer) -> None:
    done = docker("exec", "-d", container.id, "sleep", "2147")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    os.kill(container.wait_for_process("sleep", "2147"), signal.SIGKILL)


def test_environment(docker: DockerCli, container: TestContainer, tmp_path: Path) -> None:
    env_file = tmp_path / "env"
    env_file.write_text("C=from file\n")
    done = docker("exec", "-e", "A=1", "--env", "B=two words", "--env-file", str(env_file), container.id, "env")
    assert {b"A=1", b"B=two words", b"C=from file"} <= set(done.stdout.splitlines())


def test_workdir(docker: DockerCli, container: TestContainer) -> None:
    assert docker("exec", "-w", "/var/tmp", container.id, "pwd").stdout == b"/var/tmp\n"
    assert docker("exec", "-w", "/no/such", container.id, "pwd").returncode == 127


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("app", b"uid=1000(app) gid=1000(app) groups=1000(app),2000(extra)\n"),
        ("1000", b"uid=1000(app) gid=1000(app) groups=1000(app),2000(extra)\n"),
        ("app:extra", b"uid=1000(app) gid=2000(extra) groups=2000(extra)\n"),
        ("0:0", b"uid=0(root) gid=0(root) groups=0(root)\n"),
    ],
)
def test_user(docker: DockerCli, container: TestContainer, user: str, expected: bytes) -> None:
    done = docker("exec", "-u", user, container.id, "id")
    assert (done.stdout, done.stderr) == (expected, b"")


def test_privileged(docker: DockerCli, container: TestContainer) -> None:
    def effective(*flags: str) -> int:
        done = docker("exec", *flags, container.id, "grep", "CapEff", "/proc/self/status")
        return int(done.stdout.split()[1], 16)

    assert effective("--privileged") & ~effective() != 0
    assert effective() & ~effective("--privileged") == 0


def test_detach_keys_that_are_none_are_refused(docker: DockerCli, container: TestContainer) -> None:
    done = docker("exec", "-i", "--detach-keys", "ctrl-nonsense", container.id, "true")
    assert done.returncode != 0
    assert b"nonsense" in done.stderr


def test_a_unique_prefix_is_enough(docker: DockerCli, container: TestContainer) -> None:
    assert docker("exec", container.id[:-1], "echo", "hi").stdout == b"hi\n"


def test_the_process_outlives_a_killed_cli(docker: DockerCli, container: TestContainer) -> None:
    """Its input ends, as nobody can write to it any more, and it goes on from there to its own end."""
    with docker.popen("exec", "-i", container.id, "sh", "-c", "echo here; cat; echo to nobody; exit 77") as cli:
        assert cli.stdout is not None
        assert cli.stdout.readline() == b"here\n"
        cli.kill()
    assert next(event for event in events(docker, container) if _exit_code(event) == 77)["Action"] == "exec_die"


def test_interrupting_the_cli_leaves_the_process(docker: DockerCli, container: TestContainer) -> None:
    """Without a TTY the CLI takes the Ctrl-C for itself; the process does not hear of it."""
    script = "echo here; trap 'exit 78' TERM; sleep 2147 & wait $!"
    with docker.popen("exec", container.id, "sh", "-c", script, stdin=subprocess.DEVNULL) as cli:
        assert cli.stdout is not None
        assert cli.stdout.readline() == b"here\n"
        cli.send_signal(signal.SIGINT)
        cli.wait(60)
    os.kill(host_pid(docker, container, f"sh -c {script}"), signal.SIGTERM)
    assert next(event for event in events(docker, container) if _exit_code(event) == 78)["Action"] == "exec_die"
    os.kill(host_pid(docker, container, "sleep 2147"), signal.SIGKILL)


def test_ps(docker: DockerCli, container: TestContainer) -> None:
    done = docker("ps", "--no-trunc", "--format", "{{.ID}} {{.Names}} {{.State}}", "--filter", f"id={container.id}")
    assert done.stdout.decode().split() == [container.id, container.id, "running"]
    table = docker("ps")
    assert table.stdout.startswith(b"CONTAINER ID")


def test_inspect(docker: DockerCli, container: TestContainer) -> None:
    (found,) = json.loads(docker("inspect", container.id).stdout)
    assert (found["Id"], found["Name"]) == (container.id, f"/{container.id}")
    assert (found["State"]["Status"], found["State"]["Pid"]) == ("running", container.init_pid)
    assert docker("inspect", "-f", "{{.State.Running}}", container.id).stdout == b"true\n"
    assert docker("inspect", "nosuch").returncode == 1


def test_top(docker: DockerCli, container: TestContainer) -> None:
    title, *rows = docker("top", container.id).stdout.decode().splitlines()
    pids = [row.split()[title.split().index("PID")] for row in rows]
    assert str(container.init_pid) in pids


def test_version(docker: DockerCli) -> None:
    found = json.loads(docker("version", "--format", "{{json .}}").stdout)
    assert found["Server"]["Os"] == "linux"
    assert found["Server"]["ApiVersion"]
    assert docker("version").returncode == 0


def test_info(docker: DockerCli) -> None:
    done = docker("info", "--format", "{{.OSType}}")
    assert (done.returncode, done.stdout) == (0, b"linux\n"), done.stderr
    assert docker("info").returncode == 0


def test_events(docker: DockerCli, container: TestContainer) -> None:
    """Those of the past, and then those to come. The past may hold whatever earlier tests have run."""
    before, after = (f"exit {secrets.randbelow(100)}; : {secrets.token_hex(8)}" for _ in range(2))
    story = [
        [f"exec_create: sh -c {command}", f"exec_start: sh -c {command}", "exec_die"] for command in (before, after)
    ]
    docker("exec", container.id, "sh", "-c", before)
    seen: dict[str, list[str]] = {}
    for event in events(docker, container):
        told = seen.setdefault(event["Actor"]["Attributes"]["execID"], [])
        told.append(event["Action"])
        if told == story[0]:
            docker("exec", container.id, "sh", "-c", after)
        if told == story[1]:
            break


def events(docker: DockerCli, container: TestContainer) -> Iterator[dict[str, Any]]:
    """Yield what `docker events` tells of a container, from the beginning on, without end."""
    argv = docker.argv("events", "--since", "1", "--filter", f"container={container.id}", "--format", "{{json .}}")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=docker.env) as listener:
        assert listener.stdout is not None
        try:
            yield from map(json.loads, listener.stdout)
        finally:
            listener.terminate()


def _exit_code(event: dict[str, Any]) -> int | None:
    code = event["Actor"]["Attributes"].get("exitCode")
    return None if code is None else int(code)


def host_pid(docker: DockerCli, container: TestContainer, command: str) -> int:
    """Return the pid on the host of the one process of the container with this command line."""
    listed = docker("top", container.id, "-o", "pid,args").stdout.decode().splitlines()
    (pid,) = (pid for pid, shown in (line.split(maxsplit=1) for line in listed) if shown == command)
    return int(pid)
