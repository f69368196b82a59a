"""`execgate play`: recordings are shown as they were seen, to a terminal and to a file, to the end or to the tear."""

import base64
import gzip
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from execgate.gate.cast import About, Event, What, encoder
from execgate.gate.members import pack
from support.service import execgate_program
from support.tty import Terminal

ENV = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a recording of `(time, what, bytes)`, each in a member of its own."""

    def write(*events: tuple[float, What, bytes], tty: bool = True) -> Path:
        about = About(
            session_id="ab" * 32, container_id="c", container_name="c", owner="", rule="", args=("sh",), tty=tty,
            begun_at=1.0, since=0.0,
        )  # fmt: skip
        made = encoder(tty=tty, since=0.0)
        members = [pack(made.head(about)), *(pack(made.encode([Event(*event)])) for event in events)]
        path = tmp_path / ("x.cast.gz" if tty else "x.jsonl.gz")
        path.write_bytes(b"".join(members))
        return path

    return write


def play(*arguments: str | Path) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [execgate_program(), "play", *arguments], stdin=subprocess.DEVNULL, capture_output=True, env=ENV, timeout=60,
        check=False,
    )  # fmt: skip


def test_a_terminal_s(make: Make) -> None:
    """Output, and neither input nor sizes; the notes behind it, with nothing in them that a terminal would obey."""
    path = make(
        (0.1, What.STDOUT, b"\x1b[31mred"),
        (0.2, What.STDIN, b"secret"),
        (0.2, What.SIZE, b"120x40"),
        (0.3, What.STDOUT, "ü\r\n".encode()),
        (0.4, What.NOTE, b"exit code 0 \x1b[2J"),
    )
    done = play(path)
    assert done.stdout == "\x1b[31mredü\r\n".encode()
    assert done.stderr == b"execgate: at 0.400 s: exit code 0 ?[2J\n"
    assert done.returncode == 0


def test_without_a_terminal(make: Make) -> None:
    """Each byte to where it went."""
    path = make((0, What.STDOUT, b"\x1b[31m\xff"), (0, What.STDERR, b"\0error"), (0, What.STDOUT, b"x"), tty=False)
    done = play(path)
    assert (done.stdout, done.stderr, done.returncode) == (b"\x1b[31m\xffx", b"\0error", 0)


def test_plain(make: Make) -> None:
    path = make(
        (0, What.STDOUT, "\x1b]0;title\x07 ü\u202e\t\r".encode()), (0, What.STDOUT, b"\nover\rwritten\xc3"), tty=False
    )
    assert play("--plain", path).stdout == "\\x1b]0;title\\x07 ü\\u202e\t\nover\\rwritten".encode()
    path = make((0, What.STDOUT, b"\x1b[31mred\r\n"))
    assert play("--plain", path).stdout == b"\\x1b[31mred\n"


def test_a_terminal_is_not_shown_what_never_had_one(make: Make) -> None:
    path = make((0, What.STDOUT, b"\x1b[31mred\n"), (0, What.STDERR, b"\x1b[32mgreen\n"), tty=False)
    with Terminal([str(execgate_program()), "play", str(path)], ENV) as terminal:
        assert terminal.wait() == 0
    assert terminal.shown == "\\x1b[31mred\r\n\\x1b[32mgreen\r\n"


def test_plain_casts_and_those_of_others(tmp_path: Path) -> None:
    text = b'{"version": 2, "width": 80, "height": 24, "idle_time_limit": 0.01}\n[900, "o", "late"]\n[901, "z", 1]\n'
    for name, data in (("x.cast", text), ("x.cast.gz", gzip.compress(text))):
        (tmp_path / name).write_bytes(data)
        done = play(tmp_path / name)
        assert (done.stdout, done.stderr, done.returncode) == (b"late", b"", 0)


@pytest.mark.parametrize(
    ("flags", "at_least", "at_most"),
    [((), 5.0, 60), (("--speed", "2"), 2.5, 60), (("--speed", "1000"), 0, 4), (("--no-timing",), 0, 4),
     (("--idle-limit", "0.01"), 0, 4)],
)  # fmt: skip
def test_its_pace(make: Make, flags: tuple[str, ...], at_least: float, at_most: float) -> None:
    """From the first thing that is shown to the last; a program's start is not counted."""
    path = make((0, What.STDOUT, b"begun"), *((0.5 * n, What.STDOUT, b".") for n in range(1, 11)))
    argv = [str(execgate_program()), "play", *flags, str(path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=ENV) as process:
        assert process.stdout is not None
        assert process.stdout.read(5) == b"begun"
        begun = time.monotonic()
        assert process.stdout.read() == b"." * 10
        assert at_least - 0.3 <= time.monotonic() - begun <= at_most


@pytest.mark.parametrize("tty", [True, False])
def test_torn_anywhere(make: Make, *, tty: bool) -> None:
    """What is there is shown, and that it is not all."""
    path = make((0, What.STDOUT, b"first"), (0, What.STDOUT, b"second"), (0, What.NOTE, b"exit"), tty=tty)
    whole = path.read_bytes()
    ends = [at for at in range(1, len(whole) + 1) if at == len(whole) or whole[at : at + 4] == b"\x1f\x8b\x08\x04"]
    assert len(ends) == 4
    for length in (ends[1] - 1, ends[1] + 5, ends[2] - 1, ends[2] + 1, len(whole) - 1):
        path.write_bytes(whole[:length])
        done = play(path)
        assert done.returncode == 1
        assert done.stderr.endswith(b"execgate: the recording is torn: there is no more of it than this\n")
        expected = b"firstsecond"[: 0 if length < ends[1] - 1 else 5 if length < ends[2] - 1 else 11]
        assert done.stdout.startswith(expected)
    path.write_bytes(whole[: ends[1]])
    assert play(path).returncode == 0


@pytest.mark.parametrize("data", [None, b"", b"hello\n", b'{"version": 3}\n', b"\x1f\x8bxxx"])
def test_what_is_no_recording(tmp_path: Path, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / "x").write_bytes(data)
    done = play(tmp_path / "x")
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.startswith(b"execgate: ")
    assert done.stderr.count(b"\n") == 1


def test_what_the_keyboard_gets_is_nobody_s(make: Make) -> None:
    """A terminal that is asked something answers, and the answer must not be typed at the shell."""
    path = make((0.1, What.STDOUT, b"\x1b[?1049h\x1b[6nasked"), (1.0, What.STDOUT, b"over"))
    script = f'{execgate_program()} play {path}; echo ready; IFS= read line; echo "got[$line]"'
    with Terminal(["sh", "-c", script], ENV) as terminal:
        terminal.expect("asked")
        terminal.type("\x1b[5;5R; rm -rf /\n")
        terminal.expect("over")
        terminal.expect("\x1b\\[\\?1049l")
        terminal.expect("ready")
        terminal.type("fine\n")
        terminal.expect(r"got\[fine\]")
        assert terminal.wait() == 0
    assert "rm -rf" not in terminal.shown


@pytest.mark.parametrize("way", ["Ctrl-C", "SIGTERM"])
def test_it_can_be_ended(make: Make, way: str) -> None:
    """And what it has changed in the terminal is put back."""
    path = make((0.1, What.STDOUT, b"\x1b[?25lbegun"), (900, What.STDOUT, b"late"))
    script = f'trap : INT TERM; {execgate_program()} play {path}; echo "code=$?"; IFS= read line; echo "got[$line]"'
    with Terminal(["sh", "-c", script], ENV) as terminal:
        terminal.expect("begun")
        if way == "Ctrl-C":
            terminal.type("\x03")
        else:
            (child,) = Path(f"/proc/{terminal.process.pid}/task/{terminal.process.pid}/children").read_text().split()
            os.kill(int(child), signal.SIGTERM)
        terminal.expect("\x1b\\[!p")
        terminal.expect("code=130" if way == "Ctrl-C" else "code=143")
        terminal.type("echoed\n")
        terminal.expect("echoed")
        terminal.expect(r"got\[echoed\]")


def test_a_reader_that_has_enough(make: Make) -> None:
    path = make(*((0, What.STDOUT, b"x" * 100_000) for _ in range(20)))
    script = f"{execgate_program()} play {path} | head -c 10"
    done = subprocess.run(["sh", "-c", script], capture_output=True, env=ENV, timeout=60, check=False)
    assert (done.stdout, done.stderr) == (b"x" * 10, b"")


@pytest.mark.parametrize("flags", [["--speed", "0"], ["--speed", "x"], ["--idle-limit", "-1"], ["--speed", "nan"], []])
def test_mistakes(flags: list[str], make: Make) -> None:
    done = play(*flags, *([make()] if flags else []))
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr


def test_bytes_that_are_no_text_survive(make: Make) -> None:
    data = bytes(range(256)) * 300
    path = make((0, What.STDOUT, data), tty=False)
    assert base64.b64encode(data[:30]) in gzip.decompress(path.read_bytes())
    assert play(path).stdout == data
