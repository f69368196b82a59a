"""Many sessions of all kinds at once, and a worker that is killed, or replaced, again and again: rows 1 and 5 in bulk.

Each session knows what must come of it. What it writes can be told from how much of it there is: numbered lines, none
of which may be missing or come twice.
"""

import hashlib
import os
import random
import select
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from execgate.wire.stdcopy import Demultiplexer
from support.api import RawApi
from support.clients import DockerCli
from support.runtimes import RuntimeHost, TestContainer
from support.service import Service
from support.tty import Terminal

pytestmark = pytest.mark.soak

NewService = Callable[..., Service]

SEED = 20261127
KILLS, OF_A_KIND = 50, 20
RELOADS, TALKERS, WATCHERS = 20, 25, 25

RAW = "application/vnd.docker.raw-stream"
"""The type of a terminal's output, which has no frames."""

LOST = (ConnectionError, EOFError, TimeoutError)
"""What a client may see of a worker that is killed, and nobody else."""


@pytest.fixture
def containers(hosts: list[RuntimeHost], request: pytest.FixtureRequest) -> list[TestContainer]:
    """The shared container of each runtime."""
    return [request.getfixturevalue(f"{host.name}_container") for host in hosts]


@pytest.fixture
def over(containers: Sequence[TestContainer]) -> Iterator[Callable[[], None]]:
    """What tells every `COUNTING` that it is time to end."""
    marks = [container.rootfs / "tmp/over" for container in containers]
    for mark in marks:
        mark.unlink(missing_ok=True)

    def tell() -> None:
        for mark in marks:
            mark.touch()

    yield tell
    tell()  # and the marks stay, for whoever has not looked yet


BURST = 500
COUNTING = f"""
i=0
until [ -e /tmp/over ]; do seq $i $((i + {BURST - 1})); i=$((i + {BURST})); sleep 0.4; done
echo end $i
exit $0
"""


def assert_counted(output: bytes) -> None:
    """Fail unless this is what `COUNTING` writes, for as long as it went on."""
    output = output.replace(b"\r\n", b"\n")
    last = int(output[output.rindex(b"end ") + 4 :])
    assert last > 0
    expected = b"".join(b"%d\n" % number for number in range(last)) + b"end %d\n" % last
    if output != expected:
        at = next(at for at, (ours, theirs) in enumerate(zip(output, expected, strict=False)) if ours != theirs)
        pytest.fail(f"{len(output)} bytes of {len(expected)}, wrong from {at}: {output[at - 50 : at + 50]!r}")


# -- kills


@dataclass(slots=True)
class Talker:
    """A client that writes lines and waits for each, attaches again when it is cut off, and so sees all output."""

    api: RawApi
    session: str
    tty: bool
    seen: bytearray = field(default_factory=bytearray)
    sent: int = 0
    cut_off: int = 0

    def talk(self, enough: threading.Event) -> None:
        """Go on until there is enough."""
        while not enough.is_set():
            try:
                with self.api.reattach(self.session, after=len(self.seen), tty=self.tty) as stream:
                    pieces = stream.pieces()
                    while not enough.is_set():
                        line = b"line %d" % self.sent
                        self.sent += 1
                        begin = len(self.seen)
                        stream.send(line + b"\n")
                        while line not in self.seen[begin:]:
                            _, piece = next(pieces, (0, b""))
                            if not piece:
                                raise EOFError
                            self.seen += piece
                        time.sleep(0.1)
            except (*LOST, AssertionError) as error:
                if isinstance(error, AssertionError) and "within a frame" not in str(error):
                    raise
                self.cut_off += 1

    def end(self) -> None:
        """End the input."""
        with self.api.reattach(self.session, after=len(self.seen), tty=self.tty) as stream:
            if self.tty:
                stream.send(b"\x04")
            else:
                stream.half_close()
            for _, piece in stream.pieces():
                self.seen += piece

    def assert_right(self) -> None:
        """What was seen is what was captured, and it is lines that were sent, each there and in order."""
        assert bytes(self.seen) == captured(self.api, self.session)
        numbers = [int(line.removeprefix(b"line ")) for line in self.seen.split()[1::2]]
        assert numbers == sorted(numbers)
        assert set(numbers) <= set(range(self.sent))
        assert self.sent - len(set(numbers)) <= self.cut_off, "a line is lost that no kill has cut off"


def captured(api: RawApi, session: str) -> bytes:
    """Return all that is kept of the output of a session that is over."""
    answer = api.call("GET", f"/exec/{session}/logs")
    if answer.content_type == RAW:
        return answer.body
    return b"".join(piece for _, piece in Demultiplexer().feed(answer.body))


def test_fifty_kills(
    watched_service: NewService, containers: Sequence[TestContainer], over: Callable[[], None]
) -> None:
    """A hundred sessions, and a worker that is killed fifty times: every exit code, every byte, once."""
    dice = random.Random(SEED)
    service = watched_service(dies="worker")
    api = RawApi(service.socket)
    codes: dict[str, int] = {}

    def start(number: int, script: str, code: int, **fields: Any) -> str:
        container = containers[number % len(containers)]
        session = api.create(container.id, "sh", "-c", script, f"{code}", **fields)
        body = {"Detach": True, "Tty": bool(fields.get("Tty"))}
        assert api.call("POST", f"/exec/{session}/start", body).status == 200
        codes[session] = code
        return session

    kinds = range(OF_A_KIND)
    streams = [start(number, COUNTING, 10 + number, CaptureStdout=True) for number in kinds]
    terminals = [start(number, COUNTING, 30 + number, CaptureStdout=True, Tty=True) for number in kinds]
    for number in kinds:
        start(number, f"sleep {dice.uniform(1, 40):.2f}; exit $0", 50 + number)
    echo = "while read line; do echo $line; done; exit $0"
    readers = [
        start(number, echo, 70 + number, AttachStdin=True, CaptureStdout=True, OnDisconnect="keep") for number in kinds
    ]
    talkers = []
    for number in kinds:
        tty = number % 2 == 1
        fields = {"AttachStdin": True, "AttachStdout": True, "CaptureStdout": True, "OnDisconnect": "keep", "Tty": tty}
        talkers.append(Talker(api, start(number, "cat; exit $0", 90 + number, **fields), tty))
    enough, read = threading.Event(), b""
    with ThreadPoolExecutor(len(talkers)) as pool:
        talking = [pool.submit(talker.talk, enough) for talker in talkers]
        try:
            answers = []
            for number in range(KILLS):
                line = b"%d\n" % number
                for reader in readers:
                    assert api.call("POST", f"/exec/{reader}/stdin", line).status == 204
                read += line
                time.sleep(dice.uniform(0.05, 1.6))  # the moment is the input here: nothing is waited for
                answers.append(_kill(service))
        finally:
            enough.set()
        for talk in talking:
            talk.result()
    for talker in talkers:
        talker.end()
    over()
    for reader in readers:
        assert api.call("POST", f"/exec/{reader}/stdin?eof=1").status == 204
    found = {session: api.wait_stopped(session)["ExitCode"] for session in codes}
    assert found == codes
    for session in streams + terminals:
        assert_counted(captured(api, session))
    for reader in readers:
        assert captured(api, reader) == read
    for talker in talkers:
        talker.assert_right()
    cut_off = sum(talker.cut_off for talker in talkers)
    median, most = statistics.median(answers), max(answers)
    print(f"{KILLS} kills: an answer after {median:.3f} s (median), {most:.3f} s at most; {cut_off} clients came back")
    assert cut_off > KILLS
    assert median < 2.0
    assert most < 6.0


def _kill(service: Service) -> float:
    """Kill the worker, and return the seconds until somebody answers again."""
    pid = service.pid
    worker = os.pidfd_open(pid)
    begun = time.monotonic()
    os.kill(pid, 9)
    select.select([worker], [], [])
    os.close(worker)
    assert RawApi(service.socket).call("GET", "/_ping").status == 200
    took = time.monotonic() - begun
    service.await_ready()
    return took


# -- reloads


@dataclass(slots=True)
class Filter:
    """`docker exec -i`, both streams busy: what it is given comes back."""

    docker: DockerCli
    container: str
    enough: threading.Event
    begun: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Send until there is enough; fail unless everything came back."""
        process = self.docker.popen("exec", "-i", self.container, "sh", "-c", "cat; exit 5")
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            sent, received = hashlib.sha256(), hashlib.sha256()
            sender = threading.Thread(target=self._send, args=(process, sent))
            sender.start()
            while piece := os.read(process.stdout.fileno(), 65536):
                self.begun.set()
                received.update(piece)
            sender.join()
            assert (process.wait(), process.stderr.read()) == (5, b"")
        assert received.digest() == sent.digest()

    def _send(self, process: "subprocess.Popen[bytes]", sent: "hashlib._Hash") -> None:
        assert process.stdin is not None
        dice = random.Random(self.container)
        while not self.enough.is_set():
            data = dice.randbytes(20_000)
            sent.update(data)
            process.stdin.write(data)
            process.stdin.flush()
            time.sleep(0.1)  # so much a second, as long as the reloads take
        process.stdin.close()


@dataclass(slots=True)
class Typist:
    """`docker exec -it`: a person who types lines and looks at what appears."""

    docker: DockerCli
    container: str
    enough: threading.Event
    begun: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Type until there is enough; fail unless each line has appeared twice, and nothing else has."""
        argv = self.docker.argv("exec", "-it", self.container, "sh", "-c", "echo up; cat; exit 6")
        expected, number = "up\r\n", 0
        with Terminal(argv, self.docker.env) as person:
            person.expect(expected)  # until then it is the terminal of this side that echoes
            while not self.enough.is_set():
                person.type(f"line {number}\r")
                twice = f"line {number}\r\n" * 2  # the terminal's echo, and cat's
                person.expect(twice)
                expected += twice
                number += 1
                self.begun.set()
                time.sleep(0.05)
            person.type("\x04")
            assert person.wait() == 6
            assert person.shown == expected


@dataclass(slots=True)
class Watcher:
    """`docker exec` of what only writes."""

    docker: DockerCli
    container: str
    begun: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Read to the end."""
        argv = ("exec", self.container, "sh", "-c", COUNTING, "7")
        with self.docker.popen(*argv, stdin=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            output = b""
            while piece := os.read(process.stdout.fileno(), 65536):
                self.begun.set()
                output += piece
            assert (process.wait(), process.stderr.read()) == (7, b"")
        assert_counted(output)


def test_twenty_reloads(
    watched_service: NewService, containers: Sequence[TestContainer], over: Callable[[], None]
) -> None:
    """Row 5: a hundred live sessions, half of them with the docker CLI as their client, and none notices anything."""
    dice = random.Random(SEED)
    service = watched_service()
    api, docker = RawApi(service.socket), DockerCli.for_service(service)
    enough = threading.Event()
    ids = [containers[number % len(containers)].id for number in range(100)]
    detached = [api.create(one, "sh", "-c", COUNTING, "8", CaptureStdout=True) for one in ids[:50]]
    for one in detached:
        assert api.start_detached(one).status == 200
    clients: list[Filter | Typist | Watcher] = [
        *(Filter(docker, one, enough) for one in ids[: TALKERS // 2 + 1]),
        *(Typist(docker, one, enough) for one in ids[: TALKERS // 2]),
        *(Watcher(docker, one) for one in ids[:WATCHERS]),
    ]
    times = []
    with ThreadPoolExecutor(len(clients)) as pool:
        running = [pool.submit(one.run) for one in clients]
        try:
            _await_all(running, [client.begun for client in clients])
            assert sum(one["Running"] for one in api.call("GET", "/exec/json").json) >= 100
            for _ in range(RELOADS):
                time.sleep(dice.uniform(0, 0.3))  # the moment is the input here: nothing is waited for
                begun = time.monotonic()
                service.reload()
                times.append(time.monotonic() - begun)
        finally:
            enough.set()
            over()
        for client in running:
            client.result()
    assert [api.wait_stopped(one)["ExitCode"] for one in detached] == [8] * len(detached)
    for session in detached:
        assert_counted(captured(api, session))
    print(f"{RELOADS} reloads: {statistics.median(times):.3f} s (median), {max(times):.3f} s at most")


def _await_all(running: "Sequence[Future[None]]", begun: Sequence[threading.Event]) -> None:
    """Return once all clients have seen output; raise what one of them has failed with."""
    for future, event in zip(running, begun, strict=True):
        while not event.wait(0.1):
            if future.done():
                future.result()
                raise AssertionError("a client ended before it began")
