"""A program in a terminal of its own, and somebody who types and looks; what a terminal inside a container says."""

import fcntl
import os
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from support.programs import find_program
from support.runtimes import TestContainer

TIMEOUT = 30.0
"""Seconds that anybody waits for anything to appear."""


def tell_size(container: TestContainer) -> tuple[str, ...]:
    """Return a command that prints the size of its terminal, `rows columns`, when it was started with one.

    Under runc the size must be there from the first command on. crun releases the process and sets the size behind
    it (libcrun_container_exec_with_options), and what reads it at once may be faster: there the size must arrive.
    """
    return ("sh", "-c", tell_size_in_shell(container)) if container.host.name == "crun" else ("stty", "size")


def tell_size_in_shell(container: TestContainer) -> str:
    """Return what `tell_size` does as a line of shell."""
    return f"{_UNTIL_THERE}; stty size" if container.host.name == "crun" else "stty size"


# Where there is no size, busybox says so on stderr, with exit code 0: only the output tells. Two thousand looks take
# seconds; then the line goes on, and shows what there is.
_UNTIL_THERE = 'for look in $(seq 2000); do [ "$(stty size 2>/dev/null)" ] && break; done'


class Terminal:
    """A pseudo-terminal with a program on it. What the program shows is text, escape sequences included.

    `expect` consumes what it has found: the next one looks behind it.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], *, rows: int = 24, columns: int = 80) -> None:
        self._master, slave = os.openpty()
        self._shown = b""
        self._consumed = 0
        try:
            self.resize(rows, columns)
            # setsid makes the terminal the controlling one: without that, Ctrl-C and SIGWINCH reach nobody.
            self.process = subprocess.Popen(
                [str(find_program("setsid")), "--ctty", *argv],
                stdin=slave,
                stdout=slave,
                stderr=slave,
                env={**env, "TERM": "xterm"},
            )
        except BaseException:
            os.close(self._master)
            raise
        finally:
            os.close(slave)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    @property
    def shown(self) -> str:
        """Everything that has appeared so far."""
        return self._shown.decode(errors="replace")

    def resize(self, rows: int, columns: int) -> None:
        """Give the window another size; its programs get SIGWINCH."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: str) -> None:
        """Press these keys."""
        os.write(self._master, keys.encode())

    def expect(self, pattern: str, *, timeout: float = TIMEOUT) -> "re.Match[bytes]":
        """Wait until `pattern` appears; AssertionError with what did appear when it does not, or the program ends."""
        deadline = time.monotonic() + timeout
        while (found := re.compile(pattern.encode()).search(self._shown, self._consumed)) is None:
            if not self._read(deadline):
                raise AssertionError(f"no {pattern!r}; shown since the last match: {self._shown[self._consumed :]!r}")
        self._consumed = found.end()
        return found

    def wait(self, *, timeout: float = TIMEOUT) -> int:
        """Look on until the program ends, and return its exit code."""
        deadline = time.monotonic() + timeout
        while self._read(deadline):
            pass
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def _read(self, deadline: float) -> bool:
        """Take in what appears next; False at the deadline, or when the last program has left the terminal."""
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: nobody has the other side open any more
            return False
        self._shown += data
        return bool(data)
