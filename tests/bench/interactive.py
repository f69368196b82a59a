"""What a user at a terminal feels while another session streams at full speed: the echo of a key, a small request."""

import argparse
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.client import ApiError, DockerClient
from bench.contestants import Served
from support.errors import HostError

_TIMEOUT = 20.0
_ENDLESS = ("sh", "-c", "dd if=/dev/zero bs=1048576 & read end; kill $!")
"""It ends with its client's input: a service may let a process go on whose client is gone."""

_ECHO = ("sh", "-c", "stty raw -echo; echo; cat")
_PAUSE = 0.002  # seconds between two keys, as if somebody typed, but fast


@dataclass(frozen=True, slots=True)
class Felt:
    """Seconds of each try, while another session streams. `echo` goes through the service, and `monitor` past it,
    straight to the monitor's socket, in the same session and in turns with the other; it is empty where there is none.
    `pings` are requests on a connection that is kept."""

    echo: tuple[float, ...]
    monitor: tuple[float, ...]
    pings: tuple[float, ...]


def felt(contestant: Served, tries: int) -> Felt:
    """Measure one service."""
    contestant.renew()
    with (
        contextlib.closing(contestant.client()) as client,
        _streaming(contestant),
        client.terminal(contestant.container, _ECHO) as (session, terminal),
        contextlib.ExitStack() as stack,
    ):
        terminal.settimeout(_TIMEOUT)
        _until_newline(terminal)
        monitor = _monitor(contestant, session)
        if monitor is not None:
            stack.enter_context(monitor)
            monitor.settimeout(_TIMEOUT)
        echo, past, pings = [], [], []
        for _ in range(tries):
            echo.append(_time(lambda: _echo(terminal)))
            if monitor is not None:
                monitor.recv(64)  # it is told what everybody is told
                past.append(_time(lambda: _echo_past(monitor)))
                terminal.recv(64)
            pings.append(_time(lambda: client.request("GET", "/_ping", expect=[200])))
            time.sleep(_PAUSE)
        return Felt(tuple(echo), tuple(past), tuple(pings))


def _time(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def _echo(terminal: socket.socket) -> None:
    terminal.sendall(b"k")
    if terminal.recv(64) != b"k":
        raise ApiError("a terminal echoed something else")


def _echo_past(monitor: socket.socket) -> None:
    monitor.send(b"k")
    if monitor.recv(64)[1:] != b"k":
        raise ApiError("a monitor echoed something else")


def _until_newline(terminal: socket.socket) -> None:
    while not (data := terminal.recv(64)).endswith(b"\n"):
        if not data:
            raise ApiError("a terminal ended before it began")


def _monitor(contestant: Served, session: str) -> socket.socket | None:
    """Connect to the socket of a session's monitor, where the service keeps it in a place that we know."""
    path = contestant.place.memory / "state" / "sessions" / session[:32] / "attach"
    if not path.exists():
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(str(path))
    return connection


@contextlib.contextmanager
def _streaming(contestant: Served) -> Iterator[None]:
    """Have another session stream to a client in another process, as fast as all of them can."""
    argv = [sys.executable, "-m", "bench.interactive", str(contestant.socket), contestant.container]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        if not reader.stdout.readline():
            raise HostError("the other session does not stream")
        try:
            yield
        finally:
            reader.terminate()


def _read_endlessly() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("socket", type=Path)
    parser.add_argument("container")
    options = parser.parse_args()
    with contextlib.closing(DockerClient(options.socket)) as client:
        stream = client.start(client.create(options.container, _ENDLESS, stdin=True))
        stream.receive()
        print("streams", flush=True)
        while stream.receive():
            pass


if __name__ == "__main__":
    _read_endlessly()
