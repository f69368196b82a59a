"""One piece of work: what it needs, and how it tells what a crash has cost it from what is a bug.

A client may lose its connection to a worker that is killed, and nothing else, and never without a reason. So whoever
loses something asks `Unrest`. What can be asked again is (`insist`); what cannot ends the errand (`Cut`): it is
counted, not judged. What it has started is removed in either case.
"""

import random
import struct
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from typing import Any, TypeVar

from execgate.wire.stdcopy import STDERR, STDOUT, Demultiplexer
from soak.unrest import Unrest
from support.api import RawApi, Stream
from support.clients import DockerCli
from support.raw import request_bytes
from support.runtimes import RuntimeHost, TestContainer

LOST = (ConnectionError, EOFError)
"""How a client loses its connection. A TimeoutError is none: somebody hangs."""

NEVER_RAN = (126, 127, 128, 255)
"""What a session may end with whose worker was killed in its start: it did not run, or nobody knows, and it says so."""

_PATIENCE = 60.0
UPGRADE = {"Connection": "Upgrade", "Upgrade": "tcp"}
T = TypeVar("T")


class Cut(Exception):
    """A crash took what this errand was about."""


@dataclass(frozen=True, slots=True)
class Field:
    """Where all the work is done."""

    socket: Path
    port: int
    hosts: Sequence[RuntimeHost]
    containers: Sequence[TestContainer]
    docker: DockerCli
    authorization: Mapping[str, str]
    """What a request over TCP has to bring along."""
    unrest: Unrest
    done: Counter[str] = field(default_factory=Counter)
    made: set[str] = field(default_factory=set)
    """All sessions whose ids are known, by what their directories are called."""


class Errand:
    """One piece of work, whose choices `dice` makes. `name` is its own among all."""

    def __init__(self, where: Field, name: str, dice: random.Random) -> None:
        self.field = where
        self.unrest = where.unrest
        self.name = name
        self.dice = dice
        self.container = dice.choice(where.containers)
        self.api = RawApi(where.socket)
        over_tcp = RawApi(("127.0.0.1", where.port), headers=where.authorization)
        self.wire = self.api if dice.random() < 0.5 else over_tcp
        """The same service over the unix socket or over TCP."""
        self.begun = self.unrest.now()
        self.sessions: list[str] = []
        self._uncertain: set[str] = set()

    # -- what a crash has cost ---------------------------------------------------------------------------------------

    @property
    def crashed(self) -> bool:
        """Whether a worker was killed since this errand began."""
        return self.unrest.crashed_since(self.begun)

    def insist(self, ask: Callable[[], T], *, replaced: bool = False) -> T:
        """Ask until somebody answers. What is lost must be lost to a crash, or, with `replaced`, to a reload."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            moment = self.unrest.now()
            try:
                return ask()
            except LOST:
                since = self.unrest.replaced_since if replaced else self.unrest.crashed_since
                if not since(moment) or time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    def check(self, found: object, expected: object, what: str) -> None:
        """Fail unless they are the same."""
        assert found == expected, f"{what}: {_short(found)} and not {_short(expected)}"

    def check_stream(self, found: bytes, expected: bytes, what: str) -> None:
        """Fail unless a stream is whole, or was cut by a crash and is right up to there."""
        if found != expected:
            if self.crashed and expected.startswith(found):
                raise Cut
            position = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), -1)
            raise AssertionError(f"{what}: {len(found)} of {len(expected)} bytes, the first wrong one at {position}")

    # -- sessions ----------------------------------------------------------------------------------------------------

    def create(self, *cmd: str, container: str = "", **fields: Any) -> str:
        """Create a session."""
        session = self.wire.create(container or self.container.id, *cmd, **fields)
        self.sessions.append(session)
        return session

    def open(self, *cmd: str, container: str = "", **fields: Any) -> Stream:
        """Create a session, and start it attached, over the unix socket."""
        stream = self.api.open(container or self.container.id, *cmd, **fields)
        self.sessions.append(stream.id)
        self.check(stream.status, 101, "an attached start")
        return stream

    def start(self, session: str) -> None:
        """Start a session detached. When a crash takes the answer, look, and start it if that was never done."""
        while True:
            moment = self.unrest.now()
            try:
                answer = self.wire.start_detached(session)
            except LOST:
                if not self.unrest.crashed_since(moment):
                    raise
                self._uncertain.add(session)
                state = self.insist(lambda: self.api.inspect(session))
                if state["Running"] or state["ExitCode"] is not None:
                    return
                continue
            assert answer.status == 200 or session in self._uncertain, answer
            return

    def begin(self, *cmd: str, **fields: Any) -> str:
        """Create and start a session, detached; return its id."""
        session = self.create(*cmd, **fields)
        self.start(session)
        return session

    def stopped(self, session: str) -> dict[str, Any]:
        """Return what inspect says once it has ended, whoever serves."""
        return self.insist(lambda: self.api.wait_stopped(session))

    def end(self, session: str, *codes: int, unknown: bool = False) -> None:
        """Wait for its end, and hold it to its exit codes; `unknown` where nobody needs to have seen the end."""
        state = self.stopped(session)
        code, source = state["ExitCode"], state["ExitCodeSource"]
        if code in codes and source != "unknown":
            return
        if source == "unknown" and unknown:
            self.check(code, 255, "an unknown end")
            return
        if session in self._uncertain and code in NEVER_RAN:
            raise Cut
        raise AssertionError(f"session {session[:12]} ended with {code} ({source}, {state['Error']!r}) and not {codes}")

    def end_of_input(self, session: str, *codes: int) -> None:
        """Wait for an end that its client's last input brings; a crash may have taken that, and then it goes on."""
        if self.crashed and self.insist(lambda: self.api.inspect(session))["Running"]:
            raise Cut
        self.end(session, *codes)

    def kill(self, session: str) -> None:
        """Kill what runs; the answer comes after the end."""
        status = self.insist(lambda: self.api.call("POST", f"/exec/{session}/kill")).status
        assert status == 204 or (status == 409 and self.crashed), f"a kill gave {status}"

    def resize(self, session: str, height: int, width: int) -> None:
        """Give its terminal another size."""
        target = f"/exec/{session}/resize?h={height}&w={width}"
        self.check(self.insist(lambda: self.api.call("POST", target)).status, 200, "a resize")

    def remove(self, session: str) -> None:
        """Have it forgotten, whatever it does; nothing may be known of it then."""
        status = self.insist(lambda: self.api.call("DELETE", f"/exec/{session}?force=1"), replaced=True).status
        assert status in (204, 404), f"a removal gave {status}"
        status = self.insist(lambda: self.api.call("GET", f"/exec/{session}/json")).status
        self.check(status, 404, "inspect after a removal")

    def logs(self, session: str) -> bytes:
        """Return what was captured of a session without a terminal."""
        answer = self.insist(lambda: self.wire.call("GET", f"/exec/{session}/logs"))
        self.check(answer.status, 200, "logs")
        return payload(answer.body)

    def labelled(self) -> list[str]:
        """Return the sessions that were created with this errand's name as the label `errand`."""
        target = f'/exec/json?filters={{"label":["errand={self.name}"]}}'
        return [one["ID"] for one in self.insist(lambda: self.api.call("GET", target)).json]

    def close(self) -> None:
        """Remove what it has made; some of what has ended is left to be forgotten by itself."""
        self.field.made.update(session[:32] for session in self.sessions)
        for session in self.sessions:
            if self.crashed or self.dice.random() < 0.7:
                self.remove(session)

    # -- streams -----------------------------------------------------------------------------------------------------

    def attach(self, session: str, query: str) -> Stream:
        """Attach to a session without a terminal, again."""
        connection = self.wire.connect()
        try:
            headers = {**UPGRADE, **self.wire.headers}
            connection.send(request_bytes("POST", f"/exec/{session}/attach{query}", None, headers))
            head = connection.read_head()
            self.check(head.status, 101, "attach")
        except BaseException:
            connection.close()
            raise
        return Stream(self.wire, session, connection, head, multiplexed=True)

    def rest(self, stream: Stream) -> bytes:
        """Read to the end, however it ends; return what came, of both outputs."""
        data = stream.connection.read_until_closed()
        return payload(data) if stream.multiplexed else data

    def shown(self, stream: Stream, marker: bytes) -> None:
        """Read until a terminal has shown this."""
        try:
            stream.output_until(marker)
        except AssertionError as error:
            if self.crashed:
                raise Cut from error
            raise


def payload(data: bytes) -> bytes:
    """Return what frames hold; a last one may be cut short."""
    return b"".join(piece for stream, piece in Demultiplexer().feed(data) if stream in (STDOUT, STDERR))


def reset(stream: Stream) -> None:
    """Vanish from a TCP connection without a word: a RST."""
    stream.connection.socket.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
    stream.close()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 300 else f"{text[:200]}… ({len(text)})"
