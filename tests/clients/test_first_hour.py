"""What a demanding user tries in the first hour, as typed.

`$D` is the docker CLI aimed at the service, `$C` the container, `k` a docker-py container.
"""

import shlex
import subprocess
import time
from collections.abc import Callable

import docker as docker_sdk  # type: ignore[import-untyped]
import pytest

from support.clients import DockerCli
from support.runtimes import TestContainer
from support.tty import Terminal, tell_size

pytestmark = pytest.mark.usefixtures("no_leaks")

TIMEOUT = 300.0

Shell = Callable[[str], "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def shell(docker: DockerCli, container: TestContainer) -> Shell:
    """Run a line of shell with `$D` and `$C` set."""
    return lambda line: run_shell(docker, container, line)


def run_shell(docker: DockerCli, container: TestContainer, line: str) -> "subprocess.CompletedProcess[bytes]":
    """Run a line as a user's shell does. What goes wrong in it is told on its stderr, or by its exit code."""
    return subprocess.run(
        ["/bin/sh", "-c", line],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=docker.env | {"D": str(docker.program), "C": container.id},
        timeout=TIMEOUT,
        check=False,
    )


@pytest.mark.soak
def test_500_hellos_are_all_complete(docker_py: docker_sdk.DockerClient, container: TestContainer) -> None:
    k = docker_py.containers.get(container.id)
    results = [k.exec_run("echo hello") for _ in range(500)]
    assert [result for result in results if result != (0, b"hello\n")] == []


@pytest.mark.soak
def test_200_exit_codes_are_all_right(shell: Shell) -> None:
    done = shell("for i in $(seq 200); do $D exec $C sh -c 'exit 42'; echo $?; done")
    assert done.stdout.split() == [b"42"] * 200, done.stderr


def test_an_unknown_program_is_127(shell: Shell) -> None:
    assert shell("$D exec $C nosuch").returncode == 127


def test_50_megabytes_and_the_last_word_on_stderr(shell: Shell) -> None:
    done = shell("$D exec $C sh -c 'head -c 50000000 /dev/zero; echo END >&2' | wc -c")
    assert int(done.stdout) == 50_000_000
    assert done.stderr == b"END\n"


@pytest.mark.soak
def test_200_empty_inputs_are_all_ended(shell: Shell) -> None:
    done = shell("for i in $(seq 200); do timeout 5 $D exec -i $C cat </dev/null; echo $?; done")
    assert done.stdout.split() == [b"0"] * 200, done.stderr


def test_output_goes_on_behind_the_end_of_input(shell: Shell) -> None:
    done = shell("echo hi | $D exec -i $C sh -c 'cat; sleep 2; echo late'")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"hi\nlate\n", b"")


def test_endless_input_does_not_hold_a_program_that_is_done(shell: Shell) -> None:
    done = shell("yes | timeout 20 $D exec -i $C head -n1")
    assert (done.returncode, done.stdout) == (0, b"y\n"), done.stderr


def test_a_background_child_does_not_hold_the_stream(
    docker: DockerCli, new_container: Callable[[], TestContainer]
) -> None:
    began = time.monotonic()
    done = run_shell(docker, new_container(), "$D exec $C sh -c 'sleep 300 & echo done'")
    took = time.monotonic() - began
    assert (done.returncode, done.stdout, done.stderr) == (0, b"done\n", b"")
    assert took < 3


@pytest.mark.soak
def test_a_thousand_at_fifty_at_a_time(shell: Shell) -> None:
    """The fixture `no_leaks` holds the second half: ten seconds later no conmon, descriptors at the baseline."""
    done = shell("seq 1000 | xargs -P50 -I{} $D exec $C true")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_the_terminal_has_its_size_from_the_first_command_on(docker: DockerCli, runc_container: TestContainer) -> None:
    for _ in range(10):
        with sized_exec(docker, runc_container, "stty size") as terminal:
            assert terminal.wait() == 0
            assert terminal.shown == "40 120\r\n"


def test_the_terminal_has_its_size_under_crun_too(docker: DockerCli, crun_container: TestContainer) -> None:
    """crun sets the size *after* it has let the process go (src/libcrun/container.c, libcrun_container_exec).

    A program that asks within its first millisecond may therefore see 0 0, whoever runs crun; so this one asks until
    the size is there, which is before a person could have typed anything.
    """
    with sized_exec(docker, crun_container, shlex.join(tell_size(crun_container))) as terminal:
        assert terminal.wait() == 0
        assert terminal.shown == "40 120\r\n"


def sized_exec(docker: DockerCli, container: TestContainer, command: str) -> Terminal:
    """The last line of the first hour, in a terminal that has another size to begin with."""
    line = f"stty rows 40 cols 120; {docker.program} exec -it {container.id} {command}"
    return Terminal(["script", "-qc", line, "/dev/null"], docker.env, rows=11, columns=22)
