"""dockerd and podman as contestants, doing the same work as the others.

The same root file system, no network, no seccomp filter, because the containers of the bare runtimes have none
either and compiling one is part of every exec.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bench.contestants import DOCKERD, PODMAN, Served
from bench.places import Place
from support.engines import Docker, Podman, RunOptions, running
from support.processes import kill_all
from support.programs import find_every_program, version_of
from support.runtimes import RuntimeHost

ENGINES = (DOCKERD, PODMAN)

_UNFILTERED = ("seccomp=unconfined",)


@dataclass(frozen=True, slots=True)
class EngineProgram:
    """One dockerd or podman. `kind` says which; `name` is that of the contestant; the host's own has no `path`."""

    kind: str
    name: str
    path: Path | None = None

    def start(self, place: Place, host: RuntimeHost) -> AbstractContextManager[Served]:
        """Run it, and a container under the runtime of `host`."""
        return _STARTS[self.kind](self, place, host)


def find_engines(kind: str, given: Sequence[Path]) -> list[EngineProgram]:
    """Return the engines of one kind: the host's own, then all others on the PATH, then those that are `given`.

    Each after the first has its version in its name, and its path if that is not enough to tell it from the others.
    """
    engines = [EngineProgram(kind, kind)]
    for path in [*find_every_program(kind)[1:], *(path.absolute() for path in given)]:
        number = re.search(r"\d+\.\d+[^\s,]*", version_of(path))
        names = {engine.name for engine in engines}
        name = f"{kind} {number[0] if number else path}"
        engines.append(EngineProgram(kind, f"{kind} {path}" if name in names else name, path))
    return engines


@contextlib.contextmanager
def _dockerd(program: EngineProgram, place: Place, host: RuntimeHost) -> Iterator[Served]:
    """Run dockerd, with a containerd of its own."""
    # "runc" would be whichever dockerd finds: one that comes with others brings a runc as well.
    runtime = f"host-{host.name}"
    with running(Docker(place.disk, place.memory, {runtime: host.program}, program.path)) as engine:
        container = engine.run(RunOptions(security_opt=_UNFILTERED, runtime=runtime))
        yield Served(program.name, host.name, place, engine.socket, container)


@contextlib.contextmanager
def _podman(program: EngineProgram, place: Place, host: RuntimeHost) -> Iterator[Served]:
    """Run `podman system service`."""
    # crun in its cgroup2 view can set no device filter; without cgroups none is asked of it.
    cgroups = host.view is None
    runtimes = {host.name: host.program}
    engine = Podman(place.disk, place.memory, runtimes, cgroups=cgroups, serve=True, program=program.path)
    options = RunOptions(security_opt=_UNFILTERED)
    with running(engine):
        served = Served(program.name, host.name, place, engine.socket, engine.run(options))

        def replace() -> str:
            # A session's record stays with the container for five minutes, its conmon as well, and every further exec
            # gets slower by them (60 ms became 95 ms with 200). Without this podman would look worse in each round.
            engine.remove(served.container)
            kill_all(place.processes() - {engine.pid})
            return engine.run(options)

        served.replace_container = replace
        yield served


_STARTS: dict[str, Callable[[EngineProgram, Place, RuntimeHost], AbstractContextManager[Served]]] = {
    DOCKERD: _dockerd,
    PODMAN: _podman,
}
