"""`python -m bench.many_sessions`: what one request costs when ten sessions are known, and when there are ten thousand.

Two services side by side, on one container, are asked in turns. The medians at the client and the worker's own
processor time are printed, each with its ratio. Processor time is the steadier of the two on a machine that has other
work.
"""

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import machine
from bench.client import API, DockerClient
from bench.processes import run_seconds
from support.runtimes import RuntimeHost, TestContainer, runc_host
from support.service import Service

COUNTS = (10, 10_000)
_ROUNDS = 400
_BLOCK = 4
"""Requests that are asked of one service before it is the other's turn."""

# The bounds are not what is measured here.
_LIMITS = {f"EXECGATE_{name}": "1000000" for name in ("MAX_SESSIONS", "MAX_CREATED", "MAX_SESSIONS_PER_CONTAINER")}


class Asked:
    """A service with so many sessions, and the means to ask it."""

    def __init__(self, service: Service, container: TestContainer, count: int) -> None:
        self.client = DockerClient(service.socket)
        self.container = container.id
        self.worker = service.pid
        self.sessions = [self.create() for _ in range(count)]

    def create(self) -> str:
        """Create one more."""
        return self.client.create(self.container, ["true"])

    def inspect(self) -> None:
        """Inspect one, each time another."""
        self.sessions.append(self.sessions.pop(0))
        self.client.request("GET", f"{API}/exec/{self.sessions[-1]}/json", expect=[200])

    def create_and_remove(self) -> None:
        """Create one, and have it forgotten."""
        self.client.request("DELETE", f"/exec/{self.create()}", expect=[204])

    def exec(self) -> None:
        """Run `true` from create to exit code."""
        self.client.run(self.container, ["true"])


_REQUESTS: tuple[tuple[str, int, Callable[[Asked], object]], ...] = (
    ("inspect", _ROUNDS, Asked.inspect),
    ("create", _ROUNDS, Asked.create),
    ("create and remove", _ROUNDS, Asked.create_and_remove),
    ("whole exec", 100, Asked.exec),
)


def main() -> int:
    """Measure and print; return the exit code."""
    if os.geteuid() != 0:
        print("bench: containers of runc need root: run as root", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="eg-many-", dir="/dev/shm") as name, contextlib.ExitStack() as cleanup:
        host = runc_host(Path(name) / "r")
        cleanup.callback(host.close)
        container = host.run()
        asked = [cleanup.enter_context(_asked(Path(name) / str(count), host, container, count)) for count in COUNTS]
        print(f"load {machine.load()}; {' and '.join(map(str, COUNTS))} sessions: ms at the client, ms of the worker")
        for what, rounds, request in _REQUESTS:
            _compare(what, rounds, request, asked)
    return 0


def _compare(what: str, rounds: int, request: Callable[[Asked], object], asked: list[Asked]) -> None:
    times: list[list[float]] = [[] for _ in asked]
    used = [0.0 for _ in asked]
    for turn in range(rounds // _BLOCK):
        for index, one in list(enumerate(asked))[:: 1 if turn % 2 else -1]:
            before = run_seconds(one.worker)
            for _ in range(_BLOCK):
                begin = time.perf_counter()
                request(one)
                times[index].append(time.perf_counter() - begin)
            used[index] += run_seconds(one.worker) - before
    few, many = (statistics.median(one) * 1000 for one in times)
    few_used, many_used = (one / rounds * 1000 for one in used)
    print(
        f"{what:<20} {few:7.2f} {many:7.2f}  x {many / few:.2f}   {few_used:7.3f} {many_used:7.3f}"
        f"  x {many_used / few_used:.2f}",
        flush=True,
    )


@contextlib.contextmanager
def _asked(directory: Path, host: RuntimeHost, container: TestContainer, count: int) -> Iterator[Asked]:
    service = Service.start(directory, [host], env=_LIMITS)
    try:
        asked = Asked(service, container, count)
        try:
            yield asked
        finally:
            asked.client.close()
    finally:
        service.stop()


if __name__ == "__main__":
    sys.exit(main())
