"""Row 4 of the fault matrix: the worker is killed at every single step between the end of a process and its record."""

import contextlib
import json
import os
import re
import select
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest

from execgate.model.ids import SessionId
from execgate.runtime.directory import session_directory
from execgate.runtime.readiness import Descriptor
from support.api import RawApi
from support.faults import Step, fifo, killed_at, steps_taken
from support.raw import Connection, request_bytes
from support.runtimes import TestContainer
from support.service import Service

pytestmark = pytest.mark.soak

SOON = 20.0
SETTLED = 0.2
"""Seconds after the last step of an end in which a worker that does nothing more has done nothing more."""

DIED = urlencode({"filters": json.dumps({"event": ["exec_die"]})})
LINE = re.compile(rb"^{.*}$", re.MULTILINE)
SCRIPT = "echo begun; read x < /tmp/$0; echo ended; exit 7"
OUTPUT = b"\1\0\0\0\0\0\0\6begun\n\1\0\0\0\0\0\0\6ended\n"


@pytest.mark.parametrize("adopted", [False, True], ids=["its own", "taken over"])
def test_killed_at_every_step_of_an_end(
    new_service: Callable[..., Service],
    runc_container: TestContainer,
    keep_unharmed: Callable[..., AbstractContextManager[object]],
    adopted: bool,
) -> None:
    """At whichever: the code is right, the output is there once, and whoever listens and asks again has one end."""
    service = new_service()
    not_taken = []
    with keep_unharmed(service, runc_container, dies="worker"), contextlib.ExitStack() as cleanup:

        def begin(name: str) -> Session:
            return cleanup.enter_context(_begun(service, runc_container, name))

        first, waiting = begin("first"), begin("waiting")
        if adopted:
            service.crash()
        steps = _steps(service, first)
        recorded = max(number for number, step in enumerate(steps) if step.call == "pwrite64")
        steps = steps[: recorded + 2] + steps[recorded + 2 :: 3]  # what comes then is clearing up
        for number, step in enumerate(steps):
            if adopted:  # it is the death of the worker that ended the one before, by which this one is taken over
                ending, waiting = waiting, begin(f"{number}")
            else:
                ending = begin(f"{number}")
            if not _killed(service, ending, step):
                not_taken.append(step)
        waiting.end()
        _assert_right(service, waiting)
    assert len(steps) > 8, f"an end takes more than that: {steps}"
    assert len(not_taken) < 4, f"the worker did not come so far: {not_taken}"


@dataclass(frozen=True, slots=True)
class Session:
    """A session that has said that it has begun, and ends when it is told to."""

    id: str
    end: Callable[[], None]

    def directory(self, service: Service) -> Path:
        return session_directory(service.state_dir / "sessions", SessionId(self.id))


@contextlib.contextmanager
def _begun(service: Service, container: TestContainer, name: str) -> Iterator[Session]:
    api = RawApi(service.socket)
    with fifo(container, name) as end:
        session = api.create(container.id, "sh", "-c", SCRIPT, name, CaptureStdout=True)
        assert api.start_detached(session).status == 200
        with api.reattach(session, after=0) as watcher:
            watcher.output_until(b"begun\n")
        yield Session(session, end)


def _steps(service: Service, session: Session) -> list[Step]:
    """End a session, and return the steps that the worker takes for it."""
    worker = Descriptor(os.pidfd_open(service.pid))
    with contextlib.closing(worker), _listening(service), steps_taken(service.pid) as steps:
        session.end()
        assert not _dies(worker.fileno(), session.directory(service))
    _assert_right(service, session)
    return steps


def _killed(service: Service, session: Session, step: Step) -> bool:
    """End a session with the worker killed at one step; return whether it came so far."""
    with _listening(service) as listener, contextlib.closing(Descriptor(os.pidfd_open(service.pid))) as worker:
        with killed_at(service.pid, step):
            session.end()
            died = _dies(worker.fileno(), session.directory(service))
        heard = listener.read_until_closed() if died else b""
    if died:
        service.await_ready()
    _assert_right(service, session)
    if died:
        target = f"/events?since=1&until={time.time():.6f}&{DIED}"
        again = RawApi(service.socket).call("GET", target).body
        # Nothing that is heard live and again makes two: they are the same, to the nanosecond.
        ends = [json.loads(line) for line in LINE.findall(heard) + LINE.findall(again) if session.id.encode() in line]
        assert len({one["timeNano"] for one in ends}) == 1, (step, ends)
        assert {one["Actor"]["Attributes"]["exitCode"] for one in ends} == {"7"}, (step, ends)
        assert len(LINE.findall(again)) == len(set(LINE.findall(again))), "an end is remembered twice"
    return died


def _assert_right(service: Service, session: Session) -> None:
    api = RawApi(service.socket)
    ended = api.wait_stopped(session.id)
    assert ended["ExitCode"] == 7, ended
    assert api.call("GET", f"/exec/{session.id}/logs").body == OUTPUT


@contextlib.contextmanager
def _listening(service: Service) -> Iterator[Connection]:
    with RawApi(service.socket).connect() as listener:
        listener.send(request_bytes("GET", f"/events?{DIED}"))
        assert listener.read_head().status == 200
        yield listener


def _dies(worker: int, directory: Path) -> bool:
    """Return whether a worker dies before it has nothing more to do for a session, whose directory goes last."""
    deadline = time.monotonic() + SOON
    while directory.exists():
        if select.select([worker], [], [], 0.005)[0]:
            return True
        assert time.monotonic() < deadline, "the session does not end, and its worker does not die"
    return bool(select.select([worker], [], [], SETTLED)[0])
