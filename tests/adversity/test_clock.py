"""Row 21 of the fault matrix: the time of day jumps by a day, forward or back, under a running service."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from support.api import RawApi, meanwhile
from support.clock import ShiftedClock
from support.faults import fifo
from support.runtimes import TestContainer
from support.service import Service

DAY = 86_400.0
SLACK = 3.0
"""Seconds by which something may be late on a busy machine; less than TIMEOUT, which a jump could double."""

RETENTION = 2.0
TIMEOUT = 5.0


@pytest.fixture
def clock(host_dir: Path) -> Iterator[ShiftedClock]:
    shifted = ShiftedClock(host_dir / "clock")
    yield shifted
    shifted.close()


@pytest.fixture
def service(
    new_service: Callable[..., Service],
    runc_container: TestContainer,
    keep_unharmed: Callable[..., AbstractContextManager[object]],
    clock: ShiftedClock,
) -> Iterator[Service]:
    """A service that lives by that clock, and forgets soon what has ended."""
    running = new_service(env={**clock.env, "EXECGATE_RETENTION_SECONDS": f"{RETENTION:g}"})
    with keep_unharmed(running, runc_container, dies="worker"):
        yield running


@pytest.fixture
def end(runc_container: TestContainer) -> Iterator[Callable[[], None]]:
    """What a script that reads `/tmp/end` waits for."""
    with fifo(runc_container, "end") as write:
        yield write


@pytest.mark.parametrize("jump", [DAY, -DAY], ids=["forward", "back"])
def test_the_clock_jumps_a_day(
    service: Service, runc_container: TestContainer, clock: ShiftedClock, end: Callable[[], None], jump: float
) -> None:
    """Nothing ends or is forgotten for it, nothing stays for it, and no duration is negative."""
    api = RawApi(service.socket)
    waiting = api.create(runc_container.id, "true")
    early, late = (api.create(runc_container.id, "sleep", "1000", Timeout=TIMEOUT) for _ in range(2))
    asked = api.create(runc_container.id, "sh", "-c", "read x < /tmp/end; exit 3")
    ended = api.create(runc_container.id, "sh", "-c", "exit 7")
    begun = {early: time.monotonic()}
    for one in (early, asked, ended):
        assert api.start_detached(one).status == 200
    assert api.wait_stopped(ended)["ExitCode"] == 7
    over = time.monotonic()

    def wait() -> None:
        assert api.call("POST", f"/exec/{asked}/wait").json["StatusCode"] == 3

    with meanwhile(wait):
        clock.jump(jump)
        here = time.time()
        created = _moment(api.inspect(api.create(runc_container.id, "true")), "CreatedAt")
        assert abs(created - here - jump) < SLACK, "the service's clock was not shifted"
        end()
    _assert_in_order(api.inspect(asked))
    begun[late] = time.monotonic()
    assert api.start_detached(late).status == 200
    while api.call("GET", f"/exec/{ended}/json").status == 200:  # until a sweep has come by
        assert time.monotonic() - over < 2 * RETENTION + SLACK, "it is never forgotten"
        time.sleep(0.02)
    assert time.monotonic() - over > RETENTION - 0.5, "it was forgotten too early"
    service.crash()
    back = time.monotonic()
    for one, since in begun.items():
        stopped = api.wait_stopped(one)
        took, latest = time.monotonic() - since, max(since + TIMEOUT, back) - since
        assert TIMEOUT - 0.5 < took < latest + SLACK, f"ended after {took:.1f} s"
        assert (stopped["TimedOut"], stopped["ExitCode"]) == (True, 143), stopped
        _assert_in_order(stopped)
        assert _moment(stopped, "FinishedAt") - _moment(stopped, "StartedAt") > TIMEOUT - 0.5
    assert api.start_detached(waiting).status == 200, "one that waits for its start was forgotten"
    assert api.call("POST", f"/exec/{waiting}/wait").json["StatusCode"] == 0
    answer = api.call("POST", f"/containers/{runc_container.id}/exec/run", {"Cmd": ["true"], "Timeout": 10})
    assert answer.json["ExitCode"] == 0
    assert _moment(answer.json, "StartedAt") <= _moment(answer.json, "FinishedAt")
    (listed,) = [one for one in api.call("GET", "/containers/json").json if one["Id"] == runc_container.id]
    assert "-" not in listed["Status"], listed


def _assert_in_order(session: Mapping[str, Any]) -> None:
    assert _moment(session, "CreatedAt") <= _moment(session, "StartedAt") <= _moment(session, "FinishedAt"), session


def _moment(shown: Mapping[str, Any], field: str) -> float:
    return datetime.fromisoformat(shown[field]).timestamp()
