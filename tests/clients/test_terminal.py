"""A TTY session as a person has it: the docker CLI in a real terminal, keys typed, the screen looked at."""

import hashlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.api import RawApi
from support.clients import DockerCli
from support.programs import find_program, run_program
from support.runtimes import TestContainer
from support.service import Service
from support.tty import Terminal, tell_size_in_shell

pytestmark = pytest.mark.usefixtures("no_leaks")

UP = "\x1b[A"
CTRL_C = "\x03"
CTRL_D = "\x04"
PROMPT = "/ # "

Open = Callable[..., Terminal]


@pytest.fixture
def enter(docker: DockerCli, container: TestContainer) -> Open:
    """Open a terminal on `docker exec -it`, with more flags if given, on `argv` (a shell)."""

    def enter(*flags: str, argv: tuple[str, ...] = ("sh",), **size: int) -> Terminal:
        return Terminal(docker.argv("exec", "-it", *flags, container.id, *argv), docker.env, **size)

    return enter


def test_a_shell(enter: Open) -> None:
    with enter() as person:
        person.expect(PROMPT)
        person.type("echo a$((40 + 2))\r")
        person.expect("\r\na42\r\n" + PROMPT)
        person.type("exit 7\r")
        assert person.wait() == 7


def test_ctrl_d_leaves_with_the_code_of_the_last_command(enter: Open) -> None:
    with enter() as person:
        person.expect(PROMPT)
        person.type("false\r")
        person.expect("false\r\n" + PROMPT)
        person.type(CTRL_D)
        assert person.wait() == 1


def test_arrow_keys_bring_back_and_edit_what_was_typed(enter: Open) -> None:
    with enter() as person:
        person.expect(PROMPT)
        person.type("echo first-$((1 + 1))\r")
        person.expect("\r\nfirst-2\r\n" + PROMPT)
        person.type(UP)
        person.expect("echo first-")
        person.type("3\r")  # appended to the line that is back
        person.expect("\r\nfirst-23\r\n" + PROMPT)
        person.type(UP + UP + "\r")
        person.expect("\r\nfirst-2\r\n" + PROMPT)
        person.type("exit\r")
        assert person.wait() == 0


def test_ctrl_c_interrupts_what_runs_and_not_the_shell(enter: Open) -> None:
    with enter() as person:
        person.expect(PROMPT)
        person.type("sh -c 'echo it\"\"runs; exec sleep 2147'\r")
        person.expect("\r\nitruns\r\n")
        person.type(CTRL_C)
        person.expect(r"\^C\r\n" + PROMPT)
        person.type("echo code-$?\r")
        person.expect("\r\ncode-130\r\n")
        person.type("exit 0\r")
        assert person.wait() == 0


def test_a_new_size_reaches_the_program_inside(enter: Open) -> None:
    script = 'trap "stty size" WINCH; echo ready; while :; do sleep 2147 & wait $!; kill $!; done'
    with enter(argv=("sh", "-c", script), rows=30, columns=100) as person:
        person.expect("ready")
        person.resize(50, 132)
        person.expect("50 132\r\n")
        for rows in range(20, 40):
            person.resize(rows, 60)
        person.expect("39 60\r\n")
        person.type(CTRL_C)
        assert person.wait() == 130


def test_the_size_is_right_from_the_first_prompt_on(enter: Open, container: TestContainer) -> None:
    with enter(rows=33, columns=77) as person:
        person.expect(PROMPT)
        person.type(f"{tell_size_in_shell(container)}; echo $TERM\r")
        person.expect("\r\n33 77\r\nxterm\r\n")
        person.type("exit\r")
        assert person.wait() == 0


def test_much_output_arrives_in_order(enter: Open) -> None:
    with enter(argv=("seq", "100000")) as person:
        assert person.wait() == 0
        assert person.shown.split() == [str(number) for number in range(1, 100_001)]


def test_a_pasted_page_arrives_whole(enter: Open) -> None:
    """Line by line, because that is what a terminal's own line discipline takes."""
    with enter(argv=("sh", "-c", "stty -echo; echo ready; head -n 2000 | md5sum")) as person:
        person.expect("ready\r\n")
        for number in range(2000):
            person.type(f"line {number} of what was pasted\r")
        page = "".join(f"line {number} of what was pasted\n" for number in range(2000))
        person.expect(hashlib.md5(page.encode()).hexdigest())
        assert person.wait() == 0


@pytest.mark.parametrize(
    ("flags", "keys"),
    [
        pytest.param((), "\x10\x11", id="default"),
        pytest.param(("--detach-keys", "ctrl-a,x"), "\x01x", id="custom"),
    ],
)
def test_detach_keys_leave_the_process_running(
    enter: Open, container: TestContainer, raw: RawApi, flags: tuple[str, ...], keys: str
) -> None:
    """The CLI watches for them itself and hangs up; `test_aiodocker.py` leaves that to the service."""
    with enter(*flags, argv=("sh", "-c", "echo ready; read line; exit 9")) as person:
        person.expect("ready\r\n")
        person.type(keys)
        person.wait()
    assert_runs_on(raw, container)


def test_other_keys_do_not_detach(enter: Open) -> None:
    """Half of the sequence, the default one where another was chosen, and the sequence with something in between."""
    with enter("--detach-keys", "ctrl-a,x", argv=("sh", "-c", "stty raw; echo ready; head -c 7 | od -c")) as person:
        person.expect("ready")
        person.type("\x10\x11\x01yx\x01q")
        person.expect(r"020 021 001   y   x 001   q")
        assert person.wait() == 0


def test_a_closed_window_leaves_the_process_running(enter: Open, container: TestContainer, raw: RawApi) -> None:
    with enter(argv=("sh", "-c", "echo ready; read line; exit 9")) as person:
        person.expect("ready\r\n")
    assert_runs_on(raw, container)


def assert_runs_on(raw: RawApi, container: TestContainer) -> None:
    """The one exec of the container is running, though nobody is attached; end it."""
    (session_id,) = raw.call("GET", f"/containers/{container.id}/json").json["ExecIDs"]
    session = raw.inspect(session_id)
    assert (session["Running"], session["ExitCode"]) == (True, None)
    assert Path(f"/proc/{session['Pid']}/cmdline").read_text() == "sh\0-c\0echo ready; read line; exit 9\0"
    os.kill(session["Pid"], signal.SIGKILL)
    assert raw.ended(session_id) == 137


class Tmux:
    """A tmux server of the test's own, with one window: what it shows is what a person would see."""

    def __init__(self, socket: str, argv: list[str], env: dict[str, str]) -> None:
        self._base = [str(find_program("tmux")), "-S", socket, "-f", "/dev/null"]
        launch = [*self._base, "new-session", "-d", "-x", "80", "-y", "24", shlex.join(argv)]
        subprocess.run(launch, env=env, check=True, timeout=30)

    def __call__(self, *command: str) -> str:
        return run_program([*self._base, *command])

    def screen(self) -> list[str]:
        """The lines on the screen, without those behind the last that has anything."""
        return self("capture-pane", "-p").rstrip("\n").split("\n")

    def wait_for(self, line: str) -> None:
        """Wait until a line of the screen is this one; a screen has no event, so this looks again and again."""
        deadline = time.monotonic() + 30
        while line not in (shown := [shown.rstrip() for shown in self.screen()]):
            assert time.monotonic() < deadline, f"no {line!r} on the screen: {shown}"
            time.sleep(0.05)


@pytest.fixture
def tmux(docker: DockerCli, container: TestContainer, service: Service) -> Iterator[Tmux]:
    """tmux with a shell in the container in its only window."""
    window = Tmux(str(service.directory / "tmux"), docker.argv("exec", "-it", container.id, "sh"), docker.env)
    yield window
    subprocess.run([*window._base, "kill-server"], capture_output=True, timeout=30, check=False)


def test_in_tmux(tmux: Tmux, container: TestContainer) -> None:
    """Lines wrap where the window ends, before and after a resize, and history and Ctrl-C do what they do."""
    tmux.wait_for("/ #")
    tmux("send-keys", tell_size_in_shell(container), "Enter")
    tmux.wait_for("24 80")
    tmux("resize-window", "-x", "50", "-y", "20")
    until = "for look in $(seq 2000); do [ \"$(stty size)\" = '20 50' ] && break; done"
    tmux("send-keys", f"clear; {until}; echo now $(stty size)", "Enter")
    tmux.wait_for("now 20 50")
    tmux("send-keys", f"clear; echo {'x' * 30} {'y' * 30}", "Enter")
    tmux.wait_for(f"{'x' * 30} {'y' * 19}")
    tmux.wait_for("y" * 11)
    tmux("send-keys", "Up")
    tmux("send-keys", "C-c")
    tmux("send-keys", "clear; echo still $((1 + 1))", "Enter")
    tmux.wait_for("still 2")
    tmux("send-keys", "exit 0", "Enter")
