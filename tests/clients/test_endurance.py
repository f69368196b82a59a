"""Thousands of execs: none fails, and nothing is left of them."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from support.api import Finished, RawApi
from support.leaks import assert_no_leaks, footprint, resident_bytes
from support.programs import run_program
from support.runtimes import RuntimeHost, TestContainer
from support.service import Service, execgate_program

pytestmark = pytest.mark.soak

IN_A_ROW = 2000
IN_ALL_PARALLEL = 1000
AT_ONCE = 50

RETENTION = 2.0
SWEEP = 15.0
"""Seconds between two looks of the service at what is past its time."""

SLACK = 15.0
MEMORY_MAX = 64 << 20


@pytest.fixture
def containers(hosts: list[RuntimeHost]) -> Iterator[list[TestContainer]]:
    """One container of each runtime, of this test's own."""
    made = [host.run() for host in hosts]
    yield made
    for container in made:
        container.delete()


@pytest.fixture
def forgetful(new_service: Callable[..., Service]) -> Service:
    """A service that forgets a session soon after its end."""
    return new_service(env={"EXECGATE_RETENTION_SECONDS": f"{RETENTION:g}"})


def test_thousands_of_execs(forgetful: Service, containers: list[TestContainer]) -> None:
    """In a row and then fifty at a time, runc and crun in turn."""
    raw = RawApi(forgetful.socket)
    run_numbered(raw, containers, range(100))  # threads, caches, arenas: what is there once stays
    before, memory = footprint(forgetful), resident_bytes(forgetful)
    inside = [container.processes() for container in containers]

    run_numbered(raw, containers, range(IN_A_ROW))
    assert_no_leaks(forgetful, before)
    assert_nothing_is_overdue(forgetful)

    run_numbered(raw, containers, range(IN_ALL_PARALLEL), at_once=AT_ONCE)
    assert_no_leaks(forgetful, before)
    assert resident_bytes(forgetful) - memory <= MEMORY_MAX
    assert [container.processes() for container in containers] == inside

    wait_until_forgotten(forgetful)
    forgetful.assert_clean_log()


def run_numbered(raw: RawApi, containers: Sequence[TestContainer], numbers: range, *, at_once: int = 1) -> None:
    """Run one exec for each number, `at_once` at a time, with input, both outputs and an exit code of its own."""

    def run_one(number: int) -> None:
        script = f"cat; echo {number} >&2; exit {number % 256}"
        done = raw.pipe(containers[number % len(containers)].id, "sh", "-c", script, stdin=b"%d\n" % number)
        assert done == Finished(b"%d\n" % number, b"%d\n" % number, number % 256)

    with ThreadPoolExecutor(at_once) as workers:
        for _ in workers.map(run_one, numbers):
            pass


def records(service: Service) -> list[dict[str, Any]]:
    """What the service still knows of sessions."""
    shown = run_program([str(execgate_program()), "sessions", "--json", "--state-dir", str(service.state_dir)])
    found: list[dict[str, Any]] = json.loads(shown)
    return found


def assert_nothing_is_overdue(service: Service) -> None:
    """No session is known for longer after its end than the retention and one sweep."""
    oldest = datetime.now(UTC) - timedelta(seconds=RETENTION + SWEEP + SLACK)
    overdue = [record for record in records(service) if datetime.fromisoformat(record["FinishedAt"]) < oldest]
    assert overdue == []


def wait_until_forgotten(service: Service) -> None:
    """Return once no record is left; a file has no event, so this looks every second."""
    deadline = time.monotonic() + RETENTION + SWEEP + SLACK
    while left := records(service):
        assert time.monotonic() < deadline, f"{len(left)} sessions are still known"
        time.sleep(1)
