"""The floor of throughput: a process of a container, and loops of two system calls that move its bytes.

`python -m bench.relay SOCKET STDIN STDOUT` is what a service would be if it did nothing else: descriptors by number, a
frame's header and a splice(2) for what waits in the pipe, and a splice for what waits in the socket.
"""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fcntl import F_SETPIPE_SZ, fcntl, ioctl
from select import POLLIN, POLLOUT, poll

from bench.client import Stream
from support.runtimes import TestContainer

SPLICE_ALONE = "splice alone"

_PIPE_SIZE = 1 << 20
_SEND_BUFFER = 1 << 18


@dataclass(slots=True)
class SpliceAlone:
    """The runtime's own exec, its pipes relayed by two processes that know nothing but splice."""

    container: TestContainer
    name: str = SPLICE_ALONE
    _relays: set[int] = field(default_factory=set)

    @property
    def runtime(self) -> str:
        """runc or crun."""
        return self.container.host.name

    def renew(self) -> None:
        """Nothing is left behind."""

    def processes(self) -> frozenset[int]:
        """Return the pids of the relays."""
        return frozenset(self._relays)

    @contextlib.contextmanager
    def attached(self, argv: Sequence[str]) -> Iterator[Stream]:
        """Run `argv`, and give its streams as a service does."""
        host = self.container.host
        command = [str(host.program), "--root", str(host.root), "exec", self.container.id, *argv]
        ours, theirs = socket.socketpair()
        with ours, contextlib.ExitStack() as stack:
            with theirs:
                theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
                child = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
                assert child.stdin is not None
                assert child.stdout is not None
                with child.stdin, child.stdout:
                    pipes = (child.stdin.fileno(), child.stdout.fileno())
                    for pipe in pipes:
                        fcntl(pipe, F_SETPIPE_SZ, _PIPE_SIZE)
                    relays = [stack.enter_context(_relay(way, theirs, pipe)) for way, pipe in enumerate(pipes)]
            self._relays = {relay.pid for relay in relays}
            yield Stream(ours, b"")
            self._relays = set()
            ours.shutdown(socket.SHUT_RDWR)


def _relay(way: int, connection: socket.socket, pipe: int) -> "subprocess.Popen[bytes]":
    argv = [sys.executable, "-m", "bench.relay", str(way), str(connection.fileno()), str(pipe)]
    return subprocess.Popen(argv, pass_fds=(connection.fileno(), pipe))


def _out(connection: int, pipe: int) -> None:
    readable = poll()
    readable.register(pipe, POLLIN)
    while True:
        readable.poll()
        left = struct.unpack("=i", ioctl(pipe, termios.FIONREAD, b"\0\0\0\0"))[0]
        if not left:
            return
        os.write(connection, struct.pack(">BxxxL", 1, left))
        while left:
            left -= os.splice(pipe, connection, left)


def _in(connection: int, pipe: int) -> None:
    """The kernel keeps the pipe to itself while it waits for the socket (splice(2) in blocking mode): so we wait."""
    readable, writable = poll(), poll()
    readable.register(connection, POLLIN)
    writable.register(pipe, POLLOUT)
    while True:
        readable.poll()
        try:
            if not os.splice(connection, pipe, _PIPE_SIZE, flags=os.SPLICE_F_NONBLOCK):
                return
        except BlockingIOError:
            writable.poll()


if __name__ == "__main__":
    _way, _connection, _pipe = map(int, sys.argv[1:])
    with contextlib.suppress(OSError):
        (_out if _way else _in)(_connection, _pipe)
