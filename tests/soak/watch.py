"""What must hold throughout, and what there is of a service, to be compared before and after."""

import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import closing, suppress
from dataclasses import dataclass, fields
from pathlib import Path

from soak.unrest import ANSWERS_WITHIN, Unrest, pause
from support.api import RawApi
from support.leaks import descriptors, monitors
from support.processes import children, processes_of
from support.runtimes import TestContainer
from support.service import Service

MIB = 2**20
EVERY = 2.0
"""Seconds between two looks."""

DESCRIPTORS_MAX = 1000
DIRECTORIES_MAX = 300
KEEPER_MAX, WORKER_MAX = 64 * MIB, 256 * MIB
"""What keeper and worker may have at any time: some hundred sessions are known at once, and some thirty run."""

_SIGNS_OF_A_BUG = ("Traceback (most recent call last)", "was never retrieved", "was never awaited", "was destroyed")


@dataclass(frozen=True, slots=True)
class Inventory:
    """What there is when nothing is done. Everything is told by kind: pids and numbers mean nothing.

    `processes` are all that have the service's directory on their command line; `cgroups` those of sessions.
    """

    keeper_descriptors: Counter[str]
    worker_descriptors: Counter[str]
    keeper_children: int
    worker_children: int
    monitors: int
    processes: int
    files: frozenset[str]
    records: int
    rows: int
    cgroups: int
    in_containers: Counter[str]

    @classmethod
    def of(cls, service: Service, containers: Sequence[TestContainer], sessions: Set[str]) -> "Inventory":
        """Look at everything. Of the cgroups, which are the host's, at those of these sessions."""
        worker = service.pid
        return cls(
            keeper_descriptors=_kinds(service.keeper),
            worker_descriptors=_kinds(worker),
            keeper_children=len(children(service.keeper)),
            worker_children=len(children(worker)),
            monitors=len(monitors(service.state_dir)),
            processes=len(processes_of(f"{service.directory}/")),
            files=frozenset(str(path.relative_to(service.directory)) for path in service.directory.rglob("*")),
            records=len(RawApi(service.socket).call("GET", "/exec/json").json),
            rows=_rows(service.state_dir / "sessions.db"),
            cgroups=len(session_cgroups(worker) & sessions),
            in_containers=Counter(
                f"{container.id}: {' '.join(argv)}"
                for container in containers
                for argv in container.processes().values()
            ),
        )

    def differences(self, before: "Inventory") -> list[str]:
        """Say in what this is not the same."""
        found = []
        for one in fields(self):
            now, then = getattr(self, one.name), getattr(before, one.name)
            if now != then:
                both = [f"{then} before, {now} now"] if isinstance(now, int) else [*_more(now, then)]
                found.append(f"{one.name}: {'; '.join(both)}")
        return found

    def __str__(self) -> str:
        return (
            f"{self.keeper_descriptors.total()} descriptors of the keeper, {self.worker_descriptors.total()} of the"
            f" worker, {self.processes} processes, {self.monitors} conmons, {len(self.files)} files and directories,"
            f" {self.records} records, {self.rows} rows, {self.cgroups} cgroups,"
            f" {self.in_containers.total()} processes in the containers"
        )


def _more(now: Counter[str] | frozenset[str], then: Counter[str] | frozenset[str]) -> Iterator[str]:
    if isinstance(now, Counter) and isinstance(then, Counter):
        yield f"more {dict(now - then)}, less {dict(then - now)}"
    else:
        yield f"more {sorted(set(now) - set(then))}, less {sorted(set(then) - set(now))}"


def _kinds(pid: int) -> Counter[str]:
    return Counter(descriptors(pid))


def _rows(database: Path) -> int:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=10)) as connection:
        (count,) = connection.execute("SELECT count(*) FROM session").fetchone()
        return int(count)


def session_cgroups(worker: int) -> frozenset[str]:
    """Return the sessions' cgroups, of this service and of others on this host.

    The hierarchy is at no path: the worker's own descriptor leads there.
    """
    for entry in Path(f"/proc/{worker}/fd").iterdir():
        with suppress(OSError):
            if {"cgroup.procs", "release_agent"} <= set(os.listdir(entry)):
                return frozenset(name.name for name in os.scandir(entry) if name.is_dir())
    return frozenset()


def resident(pid: int) -> int:
    """Return the bytes that a process has in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watch:
    """Looks at the service every few seconds: it answers, is bounded in everything, and has no bug on its mind."""

    def __init__(self, current: Callable[[], Service], unrest: Unrest, until: Callable[[], bool]) -> None:
        self._current = current
        self._unrest = unrest
        self._until = until
        self._read = 0
        self.slowest = 0.0
        self.most: Counter[str] = Counter()

    def run(self) -> None:
        """Look, until the end."""
        while not self._until():
            self.look()
            pause(EVERY, self._until)

    def look(self) -> None:
        """Look once. AssertionError."""
        service = self._current()
        begun = time.monotonic()
        while not self._answers(service):
            time.sleep(0.02)
        took = time.monotonic() - begun
        self.slowest = max(self.slowest, took)
        assert took < ANSWERS_WITHIN, f"/_ping took {took:.1f} s"
        self._check_log(service)
        self._bound("session directories", len(os.listdir(service.state_dir / "sessions")), DIRECTORIES_MAX)
        for role, pid, most in (("keeper", service.keeper, KEEPER_MAX), ("worker", service.pid, WORKER_MAX)):
            with suppress(OSError):  # it was replaced meanwhile
                self._bound(f"{role}'s descriptors", len(descriptors(pid)), DESCRIPTORS_MAX)
                self._bound(f"{role}'s bytes", resident(pid), most)

    def _answers(self, service: Service) -> bool:
        """Ping; False when the answer was lost to a crash, and is to be asked for again. The time goes on."""
        moment = self._unrest.now()
        try:
            assert RawApi(service.socket).call("GET", "/_ping").status == 200
        except (ConnectionError, EOFError):
            if not self._unrest.crashed_since(moment):
                raise
            return False
        return True

    def _bound(self, what: str, found: int, most: int) -> None:
        self.most[what] = max(self.most[what], found)
        assert found < most, f"{what}: {found}"

    def _check_log(self, service: Service) -> None:
        with (service.directory / "service.log").open("rb") as log:
            log.seek(self._read)
            text = log.read().decode(errors="replace")
            whole, newline, _ = text.rpartition("\n")
            self._read += len((whole + newline).encode(errors="replace"))
        for sign in _SIGNS_OF_A_BUG:
            assert sign not in whole, f"the service logged {sign!r}"
