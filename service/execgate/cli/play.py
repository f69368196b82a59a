"""`execgate play`: show a recording as it was seen, at the speed at which it was made. It needs no service.

What a terminal was sent is sent to this one. Some of it makes a terminal answer, as if somebody typed, and what nobody
reads would be typed at the shell afterwards: so the keyboard is read, silently, and thrown away. `--plain` shows what
would be obeyed instead, and so does output that never had a terminal, where it meets one.
"""

import argparse
import codecs
import contextlib
import os
import select
import signal
import sys
import termios
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from execgate.cli.tables import shown
from execgate.gate.cast import Event, Played, Torn, What
from execgate.model.errors import InvalidArgument

_EXIT_TORN = 1
_STDOUT, _STDERR = 1, 2
_MAX_NOTE = 400
_AS_BEFORE = b"\x1b[!p\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l"
"""Ends what programs change in a terminal and a recording that is cut short leaves: colours, a hidden cursor, margins
(DECSTR), reports of the mouse, marks around pasted text."""
_ALTERNATE, _NOT_ALTERNATE = b"\x1b[?1049h", b"\x1b[?1049l"
_LAST_ANSWER = 0.1
"""Seconds in which a terminal has answered whatever it was asked."""


def add_commands(commands: Any) -> None:
    """Add the command of this module to a parser's."""
    text = "show a recording: one of this service, or any asciicast v2"
    parser: argparse.ArgumentParser = commands.add_parser("play", help=text, description=text.capitalize() + ".")
    parser.set_defaults(command=_play)
    parser.add_argument("--speed", type=_positive, default=1.0, metavar="X", help="X times as fast (default 1)")
    parser.add_argument("--idle-limit", type=_positive, metavar="SECONDS", help="let no pause last longer than this")
    parser.add_argument("--no-timing", action="store_true", help="all at once")
    parser.add_argument("--plain", action="store_true", help="escape what a terminal would obey")
    parser.add_argument("file", type=Path, metavar="FILE")


def _play(arguments: argparse.Namespace) -> int:
    code = 0
    with _opened(arguments.file) as file:
        played = Played(file)
        show = _Show(plain=arguments.plain, tty=played.tty)
        events: Iterable[Event] = played
        if not arguments.no_timing:
            limit = arguments.idle_limit or _number(played.head.get("idle_time_limit"))
            events = _in_time(played, arguments.speed, limit)
        try:
            with _terminal(show) if played.tty and not arguments.plain else contextlib.nullcontext():
                show.run(events)
        except Torn:
            code = _EXIT_TORN
    if show.within_line and os.isatty(_STDERR):
        print(file=sys.stderr)
    for note in show.notes:
        words = shown(note.data.decode(errors="replace"), _MAX_NOTE)
        print(f"execgate: at {note.time:.3f} s: {words}", file=sys.stderr)
    if code:
        print("execgate: the recording is torn: there is no more of it than this", file=sys.stderr)
    return code


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InvalidArgument(f"{path}: {error.strerror}") from error


def _in_time(events: Iterable[Event], speed: float, limit: float | None) -> Iterator[Event]:
    """Yield each event when its time has come; what is late is not waited for. Torn."""
    due, before = time.monotonic(), 0.0
    for event in events:
        pause = max(0.0, event.time - before)
        before = max(before, event.time)
        due += (pause if limit is None else min(pause, limit)) / speed
        if (left := due - time.monotonic()) > 0:
            time.sleep(left)
        yield event


class _Show:
    """Writes output to where it belongs, and collects the notes.

    `alternate` says that a terminal was left on its other screen, `within_line` that the last line has no end.
    """

    def __init__(self, *, plain: bool, tty: bool) -> None:
        self.notes: list[Event] = []
        self.alternate = False
        self.within_line = False
        self._escaping = {fd: _Escaping() for fd in (_STDOUT, _STDERR) if plain or (not tty and os.isatty(fd))}

    def run(self, events: Iterable[Event]) -> None:
        """Show all of them. Torn."""
        for event in events:
            if event.what is What.NOTE:
                self.notes.append(event)
            elif event.what in (What.STDOUT, What.STDERR):
                self._show(_STDERR if event.what is What.STDERR else _STDOUT, event.data)

    def _show(self, fd: int, data: bytes) -> None:
        _write(fd, self._escaping[fd].escape(data) if fd in self._escaping else data)
        self.within_line = not data.endswith(b"\n")
        there, back = data.rfind(_ALTERNATE), data.rfind(_NOT_ALTERNATE)
        if there != back:
            self.alternate = there > back


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:  # somebody who shares it made it so
            select.select([], [fd], [])


class _Escaping:
    """Makes one stream harmless: line ends and tabs stay, what else is not printable becomes an escape sequence."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._rest = ""

    def escape(self, data: bytes) -> bytes:
        """Return what shows `data`. A carriage return before a line end is its terminal's, and left out."""
        text = self._rest + self._decoder.decode(data)
        self._rest = "\r" if text.endswith("\r") else ""
        lines = text.removesuffix("\r").replace("\r\n", "\n")
        return "".join(map(_visible, lines)).encode()


def _visible(character: str) -> str:
    if character.isprintable() or character in "\n\t":
        return character
    return character.encode("unicode_escape").decode("ascii")


@contextlib.contextmanager
def _terminal(show: _Show) -> Iterator[None]:
    """Leave the terminal, if this is one, as it was before; no key typed meanwhile is anybody's."""
    keyboard = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
    before = termios.tcgetattr(keyboard) if keyboard is not None else []
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    try:
        if keyboard is not None:
            silent = termios.tcgetattr(keyboard)
            silent[3] &= ~(termios.ECHO | termios.ICANON)
            termios.tcsetattr(keyboard, termios.TCSANOW, silent)
        yield
    finally:
        try:
            if os.isatty(_STDOUT):
                # Back only from there: elsewhere it would move the cursor.
                _write(_STDOUT, _AS_BEFORE + (_NOT_ALTERNATE if show.alternate else b""))
                time.sleep(_LAST_ANSWER)
        finally:
            if keyboard is not None:
                termios.tcsetattr(keyboard, termios.TCSAFLUSH, before)


def _end(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value
