"""`execgate exec` and the commands around it, as people use them: against the real service, some in a terminal."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.clients import Cli
from support.runtimes import TestContainer
from support.service import Service, execgate_program
from support.tty import Terminal, tell_size_in_shell

pytestmark = pytest.mark.usefixtures("no_leaks")

PROMPT = "/ # "
CTRL_C = "\x03"
DETACH = "\x10\x11"


@dataclass(frozen=True, slots=True)
class ExecgateCli(Cli):
    """The project's own commands; `config` is the service's configuration."""

    @property
    def env(self) -> dict[str, str]:
        """See Cli."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("EXECGATE_")}
        return kept | {"EXECGATE_HOST": self.host}

    def argv(self, *arguments: str) -> list[str]:
        """See Cli."""
        return [str(self.program), *arguments]


@pytest.fixture(scope="module")
def execgate(service: Service) -> ExecgateCli:
    return ExecgateCli(service.host, service.directory / "execgate.toml", execgate_program())


@pytest.fixture
def detached(execgate: ExecgateCli, container: TestContainer) -> Iterator[str]:
    """A session that runs, captures, and reads its input; it is removed afterwards."""
    script = "echo begun; while read line; do echo got $line; done; echo over; exit 6"
    flags = ("-d", "-i", "--capture", "--on-disconnect", "keep", "--label", "test=detached")
    done = execgate("exec", *flags, container.id, "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    session_id = done.stdout.decode().strip()
    assert len(session_id) == 64
    yield session_id
    execgate("rm", "-f", session_id)


def test_both_streams(execgate: ExecgateCli, container: TestContainer) -> None:
    done = execgate("exec", container.id, "sh", "-c", "echo out; echo err >&2")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"out\n", b"err\n")


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 42"], 42),
        (["sh", "-c", "kill -9 $$"], 137),
        (["/etc"], 126),
        (["nosuch"], 127),
    ],
)
def test_exit_codes(execgate: ExecgateCli, container: TestContainer, argv: list[str], code: int) -> None:
    assert execgate("exec", container.id, *argv).returncode == code
    if code in (126, 127):
        detached = execgate("exec", "-d", container.id, *argv)
        assert (detached.returncode, detached.stdout) == (code, b"")
        assert b"OCI runtime exec failed" in detached.stderr


def test_what_cannot_be_run_is_named_on_stderr(execgate: ExecgateCli, container: TestContainer) -> None:
    done = execgate("exec", container.id, "nosuch")
    assert done.stdout == b""
    assert b"nosuch" in done.stderr


def test_what_is_not_there(execgate: ExecgateCli, container: TestContainer, tmp_path: Path) -> None:
    for arguments, words in (
        (("exec", "nosuch", "true"), b'no container with name or ID "nosuch" found'),
        (("exec", "-u", "nosuch", container.id, "true"), b"unable to find user nosuch"),
        (("exec", "--host", f"unix://{tmp_path}/none", container.id, "true"), b"cannot reach the service at unix://"),
        (("exec", "--host", "nonsense", container.id, "true"), b"expected unix:///PATH"),
        (("exec", container.id), b"needs a container and a command"),
        (("exec", "--env-file", "/nosuch", container.id, "true"), b"/nosuch: No such file"),
    ):
        done = execgate(*arguments)
        assert (done.returncode, done.stdout) == (125, b"")
        assert words in done.stderr
        assert done.stderr.startswith(b"execgate: ")
        assert b"Traceback" not in done.stderr


def test_wrongly_typed(execgate: ExecgateCli) -> None:
    done = execgate("exec", "--nonsense", "c", "true")
    assert done.returncode == 125
    assert b"usage: execgate exec" in done.stderr
    assert execgate("kill").returncode == 2
    assert execgate("exec", "--timeout", "soon", "c", "true").returncode == 125


def test_the_host_from_the_configuration(execgate: ExecgateCli, container: TestContainer) -> None:
    env = {name: value for name, value in execgate.env.items() if name != "EXECGATE_HOST"}
    argv = execgate.argv("exec", "--config", str(execgate.config), container.id, "echo", "hi")
    done = subprocess.run(argv, capture_output=True, env=env, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"hi\n", b"")


def test_interactive(execgate: ExecgateCli, container: TestContainer) -> None:
    everything = bytes(range(256)) * 4000
    done = execgate("exec", "-i", container.id, "cat", input=everything)
    assert (done.returncode, done.stdout, done.stderr) == (0, everything, b"")


def test_input_from_a_file_and_output_to_one(execgate: ExecgateCli, container: TestContainer, tmp_path: Path) -> None:
    """No event loop can watch a regular file."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(range(256)) * 4000)
    with source.open("rb") as stdin, target.open("wb") as stdout:
        argv = execgate.argv("exec", "-i", container.id, "cat")
        subprocess.run(argv, stdin=stdin, stdout=stdout, env=execgate.env, timeout=60, check=True)
    assert target.read_bytes() == source.read_bytes()


def test_without_i_there_is_no_input(execgate: ExecgateCli, container: TestContainer) -> None:
    done = execgate("exec", container.id, "cat", input=b"unwanted")
    assert (done.returncode, done.stdout) == (0, b"")


def test_a_reader_that_has_seen_enough(execgate: ExecgateCli, container: TestContainer) -> None:
    with execgate.popen("exec", "--on-disconnect", "kill", container.id, "yes", stdin=subprocess.DEVNULL) as cli:
        assert cli.stdout is not None
        assert cli.stdout.read(4) == b"y\ny\n"
        cli.stdout.close()
        assert cli.stderr is not None
        assert cli.stderr.read() == b""
        assert cli.wait(60) != 0


def test_environment_user_and_directory(execgate: ExecgateCli, container: TestContainer, tmp_path: Path) -> None:
    env_file = tmp_path / "env"
    env_file.write_text("# a comment\n\nC=from file\n")
    flags = ("-e", "A=1", "--env", "B=two words", "--env-file", str(env_file), "-e", "HERE", "-e", "NOT_HERE")
    argv = execgate.argv("exec", *flags, "-w", "/var/tmp", "-u", "app", container.id, "sh", "-c", "env; pwd; id -u")
    done = subprocess.run(argv, capture_output=True, env=execgate.env | {"HERE": "5"}, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert {b"A=1", b"B=two words", b"C=from file", b"HERE=5"} <= set(lines)
    assert lines[-2:] == [b"/var/tmp", b"1000"]
    assert not any(line.startswith(b"NOT_HERE") for line in lines)


def test_privileged(execgate: ExecgateCli, container: TestContainer) -> None:
    def effective(*flags: str) -> int:
        done = execgate("exec", *flags, container.id, "grep", "CapEff", "/proc/self/status")
        return int(done.stdout.split()[1], 16)

    assert effective("--privileged") & ~effective() != 0


def test_options_of_the_command_are_the_commands(execgate: ExecgateCli, container: TestContainer) -> None:
    assert execgate("exec", container.id, "echo", "-t", "--help", "-d").stdout == b"-t --help -d\n"


def test_timeout(execgate: ExecgateCli, container: TestContainer) -> None:
    done = execgate("exec", "--timeout", "0.5", container.id, "sh", "-c", "echo begun; exec sleep 2147")
    assert (done.returncode, done.stdout) == (143, b"begun\n")


def test_interrupting_leaves_the_process(execgate: ExecgateCli, container: TestContainer) -> None:
    """Without a TTY the Ctrl-C is for the command here; what becomes of the process is said by --on-disconnect."""
    arguments = ("exec", "--label", "test=interrupted", container.id, "sh", "-c", "echo here; exec sleep 2147")
    with execgate.popen(*arguments, stdin=subprocess.DEVNULL) as cli:
        assert cli.stdout is not None
        assert cli.stderr is not None
        assert cli.stdout.readline() == b"here\n"
        cli.send_signal(signal.SIGINT)
        assert cli.wait(60) == 130
        assert cli.stderr.read() == b""
    (session,) = sessions(execgate, "--label", "test=interrupted", "--state", "running", "--container", container.id)
    assert execgate("kill", str(session["Id"])).returncode == 0


def test_a_signal_ends_it_and_its_process_if_wanted(execgate: ExecgateCli, container: TestContainer) -> None:
    flags = ("--on-disconnect", "kill", "--label", "test=signalled")
    with execgate.popen("exec", "-i", *flags, container.id, "sh", "-c", "echo here; exec sleep 2147") as cli:
        assert cli.stdout is not None
        assert cli.stdout.readline() == b"here\n"
        cli.terminate()
        assert cli.wait(60) == 143
    (session,) = sessions(execgate, "--label", "test=signalled", "--container", container.id)
    assert execgate("wait", str(session["Id"])).stdout == b"137\n"


def sessions(execgate: ExecgateCli, *filters: str) -> list[dict[str, object]]:
    """What `execgate sessions --json` shows."""
    done = execgate("sessions", "--config", str(execgate.config), "--json", *filters)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, object]] = json.loads(done.stdout)
    return found


def test_a_session_from_outside(execgate: ExecgateCli, container: TestContainer, detached: str) -> None:
    (found,) = sessions(execgate, "--state", "running", "--label", "test", "--container", container.id)
    assert (found["Id"], found["Labels"]) == (detached, {"test": "detached"})
    prefix = detached[:20]
    with execgate.popen("logs", "-f", prefix, stdin=subprocess.DEVNULL) as following:
        assert following.stdout is not None
        assert following.stdout.readline() == b"begun\n"
        done = execgate("attach", "--after", "2", prefix, input=b"one\ntwo\n")
        assert (done.returncode, done.stdout, done.stderr) == (6, b"gun\ngot one\ngot two\nover\n", b"")
        assert following.stdout.read() == b"got one\ngot two\nover\n"
        assert following.wait(60) == 0
    assert execgate("logs", prefix).stdout == b"begun\ngot one\ngot two\nover\n"
    assert execgate("logs", "--after", "6", prefix).stdout == b"got one\ngot two\nover\n"
    assert execgate("wait", prefix).stdout == b"6\n"
    assert execgate("attach", "--after", "0", prefix).returncode == 6
    removed = execgate("rm", prefix)
    assert (removed.returncode, removed.stdout) == (0, prefix.encode() + b"\n")
    gone = execgate("logs", prefix)
    assert (gone.returncode, gone.stdout) == (1, b"")
    assert b"no exec session's id begins with" in gone.stderr


def test_looking_on(execgate: ExecgateCli, detached: str) -> None:
    """What looks on gives no input, and its leaving ends none."""
    with execgate.popen("attach", "--after", "0", "--no-stdin", detached, stdin=subprocess.DEVNULL) as looker:
        assert looker.stdout is not None
        assert looker.stdout.readline() == b"begun\n"
        looker.send_signal(signal.SIGINT)
        assert looker.wait(60) == 130
    done = execgate("attach", detached, input=b"still open\n")
    assert (done.returncode, done.stdout) == (6, b"got still open\nover\n")


def test_stop_and_kill(execgate: ExecgateCli, container: TestContainer, detached: str) -> None:
    script = "trap 'exit 8' TERM; while :; do sleep 2147 & wait $!; kill $!; done"
    other = execgate("exec", "-d", container.id, "sh", "-c", script).stdout.decode().strip()
    refused = execgate("rm", other)
    assert refused.returncode == 1
    assert b"it is running" in refused.stderr
    assert execgate("kill", "-s", "USR2", detached).returncode == 0  # which ends a shell that does not trap it
    assert execgate("wait", detached).stdout == b"140\n"
    assert execgate("kill", "-s", "nosuch", other).returncode == 2
    assert execgate("stop", "-t", "30", other).returncode == 0
    assert execgate("wait", other, detached).stdout in (b"8\n140\n", b"143\n140\n")  # TERM before or after the trap
    assert execgate("kill", other).returncode == 1


def test_no_prefix_at_all(execgate: ExecgateCli, detached: str) -> None:
    """Not even when there is only one session that it could mean."""
    done = execgate("kill", "")
    assert (done.returncode, done.stdout) == (1, b"")
    assert execgate("attach", "--after", "0", detached, input=b"alive\n").stdout == b"begun\ngot alive\nover\n"


def test_a_terminal(execgate: ExecgateCli, container: TestContainer) -> None:
    with enter(execgate, container, "sh", rows=33, columns=77) as person:
        person.expect(PROMPT)
        person.type(f"{tell_size_in_shell(container)}; tty >/dev/null && echo ter''minal\r")
        person.expect("33 77\r\nterminal\r\n")
        person.type("exec sh -c 'echo it\"\"runs; exec sleep 2147'\r")
        person.expect("\r\nitruns\r\n")
        person.type(CTRL_C)
        assert person.wait() == 130


def enter(execgate: ExecgateCli, container: TestContainer, *argv: str, **size: int) -> Terminal:
    return Terminal(execgate.argv("exec", "-it", container.id, *argv), execgate.env, **size)


def test_a_new_size_reaches_the_program_inside(execgate: ExecgateCli, container: TestContainer) -> None:
    script = 'trap "stty size" WINCH; echo ready; while :; do sleep 2147 & wait $!; kill $!; done'
    with enter(execgate, container, "sh", "-c", script, rows=30, columns=100) as person:
        person.expect("ready")
        person.resize(50, 132)
        person.expect("50 132\r\n")
        for rows in range(20, 40):
            person.resize(rows, 60)
        person.expect("39 60\r\n")
        person.type(CTRL_C)
        assert person.wait() == 130


def test_detach_and_come_back(execgate: ExecgateCli, container: TestContainer) -> None:
    with enter(execgate, container, "sh") as person:
        person.expect(PROMPT)
        person.type("NAME=kept\r")
        person.expect(PROMPT)
        person.type(DETACH)
        found = person.expect("detached; `execgate attach ([0-9a-f]{12})` comes back")
        assert person.wait() == 0
    session_id = found[1].decode()
    with Terminal(execgate.argv("attach", session_id), execgate.env) as person:
        person.type("echo $NAME-$((1 + 1))\r")
        person.expect("kept-2\r\n")
        person.type("exit 9\r")
        assert person.wait() == 9


def test_a_signal_leaves_the_terminal_as_it_was(execgate: ExecgateCli, container: TestContainer) -> None:
    script = (
        f"{execgate.program} exec -it --on-disconnect kill {container.id} sh -c 'echo in; exec sleep 2147'; stty -a"
    )
    with Terminal(["sh", "-c", f"stty -a; {script}"], execgate.env) as person:
        before = person.expect(r"speed (.|\n)*?echoke[^\n]*\n")[0]
        person.expect("in\r")
        (cli,) = [pid for pid in descendants(person.process.pid) if is_execgate(pid)]
        os.kill(cli, signal.SIGTERM)
        assert person.expect(r"speed (.|\n)*?echoke[^\n]*\n")[0] == before
        assert person.wait() == 0


def descendants(pid: int) -> list[int]:
    children = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [pid, *(one for child in children for one in descendants(child))]


def is_execgate(pid: int) -> bool:
    return (
        b"exec\0-it" in Path(f"/proc/{pid}/cmdline").read_bytes()
        and Path(f"/proc/{pid}/exe").resolve() == Path(sys.executable).resolve()
    )


def test_a_terminal_needs_one(execgate: ExecgateCli, container: TestContainer) -> None:
    done = execgate("exec", "-it", container.id, "true")
    assert done.returncode == 125
    assert b"the input device is not a TTY" in done.stderr
    assert execgate("exec", "-t", container.id, "tty").stdout.startswith(b"/dev/pts/")


def test_the_service_dies(
    execgate: ExecgateCli, new_service: Callable[..., Service], runc_container: TestContainer
) -> None:
    service = new_service()
    cli = ExecgateCli(service.host, execgate.config, execgate.program)
    with cli.popen(
        "exec", runc_container.id, "sh", "-c", "echo here; exec sleep 5", stdin=subprocess.DEVNULL
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.readline() == b"here\n"
        service.kill()
        assert running.wait(60) == 125
        assert running.stderr.read().startswith(b"execgate: cannot reach the service at unix://")
