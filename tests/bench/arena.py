"""Everything that is compared, started; and ended again, whatever happens."""

import contextlib
import subprocess
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from bench.client import ApiError
from bench.contestants import (
    CONMON_ALONE,
    DOCKERD,
    EXECGATE,
    PODMAN,
    RUNTIME_ALONE,
    ConmonAlone,
    Contestant,
    RuntimeAlone,
    Served,
)
from bench.engines import start_dockerd, start_podman
from bench.places import Place, temporary_place
from bench.relay import SPLICE_ALONE, SpliceAlone
from support.errors import HostError
from support.programs import find_program
from support.runtimes import RuntimeHost, TestContainer, crun_host, runc_host
from support.service import Service

NAMES = (RUNTIME_ALONE, CONMON_ALONE, SPLICE_ALONE, EXECGATE, DOCKERD, PODMAN)
RUNTIMES: dict[str, Callable[[Path], RuntimeHost]] = {"runc": runc_host, "crun": crun_host}

_FAILURES = (HostError, ApiError, OSError, subprocess.SubprocessError)


@dataclass(slots=True)
class Arena:
    """The contestants that stand on this machine, and why the others do not."""

    contestants: list[Contestant] = field(default_factory=list)
    relays: list[SpliceAlone] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    """Label to reason."""

    @property
    def served(self) -> list[Served]:
        """The services."""
        return [one for one in self.contestants if isinstance(one, Served)]


@contextlib.contextmanager
def open_arena(names: Collection[str], runtimes: Collection[str], say: Callable[[str], None]) -> Iterator[Arena]:
    """Start what is asked for. What does not start is told in `absent`, and the rest goes on without it."""
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(temporary_place())
        arena = Arena()
        for runtime, make_host in RUNTIMES.items():
            if runtime in runtimes:
                _open_runtime(arena, stack, home, make_host, runtime, names, say)
        yield arena


def _open_runtime(
    arena: Arena,
    stack: contextlib.ExitStack,
    home: Place,
    make_host: Callable[[Path], RuntimeHost],
    runtime: str,
    names: Collection[str],
    say: Callable[[str], None],
) -> None:
    try:
        host = make_host(home.disk / runtime)
        stack.callback(host.close)
        container = host.run()
    except _FAILURES as error:
        arena.absent |= {f"{name} ({runtime})": str(error) for name in NAMES if name in names}
        return
    if SPLICE_ALONE in names:
        arena.relays.append(SpliceAlone(container))
    starts: dict[str, Callable[[], Contestant]] = {
        RUNTIME_ALONE: lambda: RuntimeAlone(container),
        CONMON_ALONE: lambda: ConmonAlone(container, find_program("conmon"), home.make(f"conmon-{runtime}")),
        EXECGATE: lambda: _start_execgate(stack, home.make(f"eg-{runtime}"), container),
        DOCKERD: lambda: _start_engine(stack, start_dockerd, home.make(f"dockerd-{runtime}"), host),
        PODMAN: lambda: _start_engine(stack, start_podman, home.make(f"podman-{runtime}"), host),
    }
    for name, start in starts.items():
        if name not in names:
            continue
        say(f"starting {name} ({runtime})")
        try:
            contestant = start()
            with contestant.worker() as run:
                run()
        except _FAILURES as error:
            arena.absent[f"{name} ({runtime})"] = str(error)
        else:
            arena.contestants.append(contestant)


def _start_execgate(stack: contextlib.ExitStack, place: Place, container: TestContainer) -> Served:
    # Its own defaults, but for the number of sessions that it remembers: a long benchmark passes 10,000.
    service = Service.start(place.memory, [container.host], env={"EXECGATE_MAX_SESSIONS": "1000000"})
    stack.callback(service.stop)
    served = Served(EXECGATE, container.host.name, place, service.socket, container.id)
    served.prove()
    return served


def _start_engine(
    stack: contextlib.ExitStack,
    start: Callable[[Place, RuntimeHost], AbstractContextManager[Served]],
    place: Place,
    host: RuntimeHost,
) -> Served:
    served = stack.enter_context(start(place, host))
    served.prove()
    return served
