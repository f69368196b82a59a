"""Everything that is compared, started; and ended again, whatever happens."""

import contextlib
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench.client import ApiError
from bench.contestants import (
    CONMON_ALONE,
    EXECGATE,
    GUARDED,
    RUNTIME_ALONE,
    ConmonAlone,
    Contestant,
    RuntimeAlone,
    Served,
    with_conmon,
)
from bench.engines import ENGINES, EngineProgram
from bench.places import Place, temporary_place
from bench.relay import SPLICE_ALONE, SpliceAlone
from support.access import rule, write_policy
from support.errors import HostError
from support.programs import find_program
from support.runtimes import RuntimeHost, TestContainer, crun_host, runc_host
from support.service import Service

NAMES = (RUNTIME_ALONE, CONMON_ALONE, SPLICE_ALONE, EXECGATE, GUARDED, *ENGINES)
"""Each of an engine's name stands for all that there are of it."""
RUNTIMES: dict[str, Callable[[Path], RuntimeHost]] = {"runc": runc_host, "crun": crun_host}

RULES = 100
_BENCH_RULE = rule("bench", ["uid:0"], host_equivalent=True, max_time="1h", argv=[["sh", "**"], ["true"]])

_FAILURES = (HostError, ApiError, OSError, subprocess.SubprocessError)


@dataclass(slots=True)
class Arena:
    """The contestants that stand on this machine, and why the others do not."""

    contestants: list[Contestant] = field(default_factory=list)
    relays: list[SpliceAlone] = field(default_factory=list)
    guarded: list[Contestant] = field(default_factory=list)
    """execgate, with a policy and an audit log."""
    absent: dict[str, str] = field(default_factory=dict)
    """Label to reason."""

    @property
    def served(self) -> list[Served]:
        """The services."""
        return [one for one in self.contestants if isinstance(one, Served)]


@contextlib.contextmanager
def open_arena(
    names: Collection[str],
    runtimes: Collection[str],
    engines: Sequence[EngineProgram],
    say: Callable[[str], None],
    conmons: Sequence[Path] = (),
) -> Iterator[Arena]:
    """Start what is asked for. What does not start is told in `absent`, and the rest goes on without it.

    `conmons` are monitors beside the one on the PATH: where execgate takes part it does so with each of them.
    """
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(temporary_place())
        arena = Arena()
        for runtime, make_host in RUNTIMES.items():
            if runtime in runtimes:
                chosen = [engine for engine in engines if engine.kind in names]
                _open_runtime(arena, stack, home, make_host, runtime, names, chosen, conmons, say)
        yield arena


def _open_runtime(
    arena: Arena,
    stack: contextlib.ExitStack,
    home: Place,
    make_host: Callable[[Path], RuntimeHost],
    runtime: str,
    names: Collection[str],
    engines: Sequence[EngineProgram],
    conmons: Sequence[Path],
    say: Callable[[str], None],
) -> None:
    try:
        host = make_host(home.disk / runtime)
        stack.callback(host.close)
        container = host.run()
    except _FAILURES as error:
        selves = [name for name in NAMES if name in names and name not in ENGINES]
        arena.absent |= {f"{n} ({runtime})": str(error) for n in [*selves, *(engine.name for engine in engines)]}
        return
    if SPLICE_ALONE in names:
        arena.relays.append(SpliceAlone(container))
    starts: dict[str, Callable[[], Contestant]] = {
        RUNTIME_ALONE: lambda: RuntimeAlone(container),
        CONMON_ALONE: lambda: ConmonAlone(container, find_program("conmon"), home.make(f"conmon-{runtime}")),
        EXECGATE: lambda: _start_execgate(stack, home.make(f"eg-{runtime}"), container),
        GUARDED: lambda: _start_guarded(stack, home.make(f"gd-{runtime}"), container),
    }
    starts = {name: start for name, start in starts.items() if name in names}
    for number, conmon in enumerate(conmons if EXECGATE in names else ()):
        name, env = with_conmon(conmon), {"EXECGATE_CONMON": str(conmon)}
        starts[name] = partial(_start_execgate, stack, home.make(f"eg-{number}-{runtime}"), container, name, env)
    for number, engine in enumerate(engines):
        # The path of a socket is bounded, so a place has a number and not the engine's name.
        place = f"{engine.kind}-{number}-{runtime}"
        starts[engine.name] = partial(_start_engine, stack, engine, home, place, host)
    for name, start in starts.items():
        say(f"starting {name} ({runtime})")
        try:
            contestant = start()
            with contestant.worker() as run:
                run()
        except _FAILURES as error:
            arena.absent[f"{name} ({runtime})"] = str(error)
        else:
            (arena.guarded if name == GUARDED else arena.contestants).append(contestant)


def _start_execgate(
    stack: contextlib.ExitStack,
    place: Place,
    container: TestContainer,
    name: str = EXECGATE,
    env: Mapping[str, str] | None = None,
) -> Served:
    # Its own defaults, but for the number of sessions that it remembers: a long benchmark passes 10,000.
    service = Service.start(place.memory, [container.host], env={"EXECGATE_MAX_SESSIONS": "1000000", **(env or {})})
    stack.callback(service.stop)
    served = Served(name, container.host.name, place, service.socket, container.id)
    served.prove()
    return served


def _start_guarded(stack: contextlib.ExitStack, place: Place, container: TestContainer) -> Served:
    """Start execgate with `RULES` rules, the last of which is the one that allows, and with an audit log on a disk."""
    others = [
        rule(f"team-{number}", ["uid:0"], containers=["*"], users=["1000-1999"], argv=[["ls", "**"]])
        for number in range(RULES - 1)
    ]
    write_policy(place.memory, *others, _BENCH_RULE)
    audit = {"EXECGATE_AUDIT_FILE": str(place.disk / "audit.log"), "EXECGATE_AUDIT_STRICT": "true"}
    return _start_execgate(stack, place, container, GUARDED, audit)


def _start_engine(
    stack: contextlib.ExitStack, engine: EngineProgram, home: Place, place: str, host: RuntimeHost
) -> Served:
    served = stack.enter_context(engine.start(home.make(place), host))
    served.prove()
    return served
