"""The lifecycle under everything at once: random sequences of every verb, from several clients, on a real service.

Whatever is asked in whatever order: no session is ever seen going backwards, no exit code is lost or changes, every
answer is one that the API documents, and at the end nothing is left: no process, directory, cgroup or record.
"""

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from execgate.engine import DATABASE
from execgate.model.session import TRANSITIONS, SessionState
from execgate.runtime.tree import SessionCgroups
from execgate.sessions.store import read_sessions
from support.async_raw import RawClient, RawStream, answer_on, request_bytes, start_request
from support.leaks import assert_no_leaks, footprint
from support.runtimes import TestContainer
from support.service import Service

CLIENTS = 4
SOON = 30.0

# What is run, and the code that it ends with if nobody interferes.
PROGRAMS: list[tuple[list[str], int]] = [
    (["true"], 0),
    (["sh", "-c", "sleep 0.1; exit 7"], 7),
    (["nosuch"], 127),
    (["cat"], 0),
    (["seq", "1", "30000"], 0),
    (["sh", "-c", "trap '' TERM HUP; setsid sleep 9998 & sleep 9998"], 0),
    (["sleep", "9998"], 0),
]
FIELDS: list[dict[str, Any]] = [
    {},
    {"Tty": True},
    {"CaptureStdout": True, "CaptureStderr": True},
    {"OnDisconnect": "keep", "CaptureStdout": True},
    {"OnDisconnect": "kill"},
    {"OnDisconnect": "hup"},
    {"Timeout": 0.3},
]
SIGNALS = {"": 9, "TERM": 15, "HUP": 1, "USR1": 10, "9": 9, "CONT": 18}

# What each verb may be answered with: done, not in this state, not known (any more).
ANSWERS = {
    "start": {200, 409, 404, 400},  # 400 is the runtime's no
    "kill": {204, 409, 404},
    "stop": {204, 409, 404},
    "resize": {200, 409, 404},
    "stdin": {204, 409, 404},
    "logs": {200, 409, 404},
    "wait": {200, 404},
    "remove": {204, 409, 404},
    "force": {204, 404},
}

verbs = st.one_of(
    st.tuples(
        st.sampled_from(["create", "launch", "launch attached"]),
        st.integers(0, len(PROGRAMS) - 1),
        st.integers(0, len(FIELDS) - 1),
    ),
    st.tuples(
        st.sampled_from(["start", "start", "start attached", "start attached", "start cut", "attach", "attach cut"]),
        st.integers(0, 9),
        st.integers(0, 5000),
    ),
    st.tuples(st.just("kill"), st.integers(0, 9), st.integers(0, len(SIGNALS) - 1)),
    st.tuples(
        st.sampled_from(["stop", "wait", "resize", "stdin", "logs", "remove", "force", "pause"]),
        st.integers(0, 9),
        st.integers(0, 200),
    ),
)
stories = st.lists(st.tuples(st.integers(0, CLIENTS - 1), verbs), min_size=12, max_size=45)


@dataclass(slots=True)
class Seen:
    """What was seen of one session, and what was done that its end may come from."""

    code: int
    codes: set[int] = field(default_factory=set)
    states: list[SessionState] = field(default_factory=lambda: [SessionState.CREATED])
    removal_asked: bool = False
    gone: bool = False

    def note(self, inspected: dict[str, Any]) -> None:
        """Check one answer of inspect against all that were before."""
        assert not self.gone, "a session that was gone is there again"
        code, before = inspected["ExitCode"], self.states[-1]
        if inspected["Running"]:
            assert code is None
            state = SessionState.RUNNING
        else:
            state = SessionState.CREATED if code is None else SessionState.STOPPED
        assert state is before or (before, state) in _SEEN_STEPS, (self.states, inspected)
        if state is not before:
            self.states.append(state)
        if code is not None:
            self.codes.add(code)
            assert len(self.codes) == 1, "an exit code changed"


def _closure() -> set[tuple[SessionState, SessionState]]:
    """The steps that can be seen by looking now and then; `starting` looks like running."""
    outward = {SessionState.STARTING: SessionState.RUNNING}
    steps = {(outward.get(before, before), outward.get(after, after)) for before, after in TRANSITIONS}
    return {*steps, *((a, d) for a, b in steps for c, d in steps if b is c)}


_SEEN_STEPS = _closure()


class Story:
    """One sequence of verbs, told by several clients at once."""

    def __init__(self, service: Service, container: TestContainer) -> None:
        self.raw = RawClient(service.socket)
        self.container = container
        self.sessions: dict[str, Seen] = {}
        self.beside: list[asyncio.Task[None]] = []

    async def tell(self, story: list[tuple[int, tuple[str, int, int]]]) -> None:
        for program in (3, 5):
            await self.do("create", program, program - 3)
        watching = asyncio.create_task(self.watch())
        try:
            async with asyncio.timeout(SOON), asyncio.TaskGroup() as clients:
                for number in range(CLIENTS):
                    clients.create_task(self.client([verb for who, verb in story if who == number]))
            await self.end()
        finally:
            watching.cancel()
            for task in self.beside:
                task.cancel()
            outcomes = await asyncio.gather(watching, *self.beside, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    async def client(self, story: list[tuple[str, int, int]]) -> None:
        for verb, which, parameter in story:
            await self.do(verb, which, parameter)

    async def do(self, verb: str, which: int, parameter: int) -> None:
        if verb in ("create", "launch", "launch attached"):
            argv, code = PROGRAMS[which]
            session_id = await self.raw.create(self.container.id, *argv, **FIELDS[parameter])
            self.sessions[session_id] = Seen(code)
            if verb == "launch":
                await self.ask("start", "POST", f"/exec/{session_id}/start", {"Detach": True})
            elif verb == "launch attached":
                await self.stream(start_request(session_id, tty=bool(FIELDS[parameter].get("Tty"))), None)
            return
        session_id = list(self.sessions)[which % len(self.sessions)]
        path = f"/exec/{session_id}"
        match verb:
            case "start":
                await self.ask("start", "POST", f"{path}/start", {"Detach": True})
            case "start attached" | "start cut":
                await self.stream(start_request(session_id), parameter if verb == "start cut" else None)
            case "attach" | "attach cut":
                request = request_bytes("POST", f"{path}/attach?after=0", None, "Connection: Upgrade", "Upgrade: tcp")
                await self.stream(request, parameter if verb == "attach cut" else None)
            case "kill":
                name, number = list(SIGNALS.items())[parameter]
                status = await self.ask("kill", "POST", f"{path}/kill?signal={name}")
                if status == 204 and number == 9:
                    await self.must_be_over(session_id)
            case "stop":
                if await self.ask("stop", "POST", f"{path}/stop?t={parameter / 1000}") == 204:
                    await self.must_be_over(session_id)
            case "resize":
                await self.ask("resize", "POST", f"{path}/resize?h={parameter + 1}&w=80")
            case "stdin":
                # A terminal whose program does not read takes so much and no more: not waited for.
                self.start_beside(self.answered("stdin", "POST", f"{path}/stdin?eof=1", b"x" * parameter))
            case "logs":
                await self.ask("logs", "GET", f"{path}/logs")
            case "wait":
                self.start_beside(self.answered("wait", "POST", f"{path}/wait"))
            case "remove" | "force":
                self.sessions[session_id].removal_asked = True
                status = await self.ask(verb, "DELETE", path + ("?force=1" if verb == "force" else ""))
                if status in (204, 404):
                    assert (await self.raw.call("GET", f"{path}/json")).status == 404
                    self.sessions[session_id].gone = True
            case _:
                await asyncio.sleep(parameter / 1000)

    async def ask(self, verb: str, method: str, path: str, body: object = None) -> int:
        answer = await self.raw.call(method, path, body)
        assert answer.status in ANSWERS[verb], (verb, answer)
        return answer.status

    async def answered(self, verb: str, method: str, path: str, body: object = None) -> None:
        await self.ask(verb, method, path, body.decode() if isinstance(body, bytes) else body)

    def start_beside(self, work: Coroutine[Any, Any, None]) -> None:
        self.beside.append(asyncio.create_task(work))

    async def stream(self, request: bytes, cut_after: int | None) -> None:
        """Begin a stream, and read it beside everything else: to its end, or so many bytes and then hang up."""
        connection = await self.raw.connect()
        await asyncio.get_running_loop().sock_sendall(connection, request)

        async def read() -> None:
            with contextlib.closing(connection):
                head = await answer_on(connection, multiplexed=False)
                assert head.status in (101, 200, 400, 404, 409), head.head
                await drained(head, cut_after)

        self.start_beside(read())

    async def must_be_over(self, session_id: str) -> None:
        answer = await self.raw.call("GET", f"/exec/{session_id}/json")
        if answer.status == 404:
            assert self.sessions[session_id].removal_asked
        else:
            inspected = answer.json()
            assert not inspected["Running"], inspected
            assert inspected["ExitCode"] is not None, "the exit code is lost"

    async def watch(self) -> None:
        """Look at every session again and again."""
        while True:
            for session_id, seen in list(self.sessions.items()):
                gone, asked = seen.gone, seen.removal_asked
                answer = await self.raw.call("GET", f"/exec/{session_id}/json")
                if answer.status == 404:
                    assert seen.removal_asked, "a session was forgotten that nobody wanted removed"
                    seen.gone = True
                elif not gone and not asked:
                    seen.note(answer.json())
            await asyncio.sleep(0.01)

    async def end(self) -> None:
        """End what runs, hold every end against what can be, and remove it all."""
        for session_id, seen in list(self.sessions.items()):
            answer = await self.raw.call("GET", f"/exec/{session_id}/json")
            if answer.status == 404:
                assert seen.removal_asked
                continue
            if answer.json()["Running"]:
                await self.ask("kill", "POST", f"/exec/{session_id}/kill")
                await self.must_be_over(session_id)
            inspected = await self.raw.inspect(session_id)
            code = inspected["ExitCode"]
            # Its own end, one by a signal, or a start that its client left; never an unknown one.
            possible = {None, seen.code, 128, *(128 + number for number in SIGNALS.values()), 141}
            assert code in possible, inspected
            assert (code is None) == (inspected["StartedAt"].startswith("0001")), "the exit code is lost"
            seen.removal_asked = True
            await self.ask("force", "DELETE", f"/exec/{session_id}?force=1")
        async with asyncio.timeout(SOON):  # with the sessions every stream ends, and every wait
            await asyncio.gather(*self.beside)


async def drained(stream: RawStream, cut_after: int | None) -> None:
    size = 0
    with contextlib.suppress(ConnectionError):
        while data := await stream.read(4096):
            size += len(data)
            if cut_after is not None and size >= cut_after:
                return


def assert_nothing_is_left(service: Service, container: TestContainer, ids: set[str], cgroups: SessionCgroups) -> None:
    """Look in every place where a session could leave something. The kernel takes its time with the cgroups."""
    names = {session_id[:32] for session_id in ids}
    deadline = time.monotonic() + SOON
    while True:
        left = {
            "processes": [
                argv for argv in container.processes().values() if argv[-1] == "9998" or argv[0] in ("cat", "seq")
            ],
            "directories": [path for where in ("sessions", "captures") for path in (service.state_dir / where).glob("*")
                            if path.name in names],
            "cgroups": names & set(cgroups._names()),
            "records": [one.id for one in read_sessions(service.state_dir / DATABASE) if one.id in ids],
        }  # fmt: skip
        if not any(left.values()):
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


@settings(
    max_examples=40, derandomize=True, database=None, deadline=None, print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(story=stories)
async def test_any_sequence_of_verbs(
    service: Service, runc_container: TestContainer, story: list[tuple[int, tuple[str, int, int]]]
) -> None:
    (service.state_dir / "captures").mkdir(mode=0o700, exist_ok=True)  # which the first capture would make
    before, logged = footprint(service), len(service.log())
    told = Story(service, runc_container)
    cgroups = SessionCgroups.open()
    try:
        await told.tell(story)
        assert_nothing_is_left(service, runc_container, set(told.sessions), cgroups)
    finally:
        cgroups.close()
    assert_no_leaks(service, before)
    log = service.log()[logged:]
    assert not any(sign in log for sign in ("Traceback", "was never", "was destroyed")), log
