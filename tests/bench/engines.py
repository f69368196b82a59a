"""dockerd and podman as contestants, doing the same work as the others.

The same root file system, no network, no seccomp filter, because the containers of the bare runtimes have none
either and compiling one is part of every exec.
"""

import contextlib
from collections.abc import Iterator

from bench.contestants import DOCKERD, PODMAN, Served
from bench.places import Place
from support.engines import Docker, Podman, RunOptions, running
from support.processes import kill_all
from support.runtimes import RuntimeHost

_UNFILTERED = ("seccomp=unconfined",)


@contextlib.contextmanager
def start_dockerd(place: Place, host: RuntimeHost) -> Iterator[Served]:
    """Run dockerd, with a containerd of its own, and a container under the runtime of `host`."""
    with running(Docker(place.disk, place.memory, {host.name: host.program})) as engine:
        container = engine.run(RunOptions(security_opt=_UNFILTERED, runtime=host.name))
        yield Served(DOCKERD, host.name, place, engine.socket, container)


@contextlib.contextmanager
def start_podman(place: Place, host: RuntimeHost) -> Iterator[Served]:
    """Run `podman system service` and a container under the runtime of `host`."""
    # crun in its cgroup2 view can set no device filter; without cgroups none is asked of it.
    cgroups = host.view is None
    engine = Podman(place.disk, place.memory, {host.name: host.program}, cgroups=cgroups, serve=True)
    options = RunOptions(security_opt=_UNFILTERED)
    with running(engine):
        served = Served(PODMAN, host.name, place, engine.socket, engine.run(options))

        def replace() -> str:
            # A session's record stays with the container for five minutes, its conmon as well, and every further exec
            # gets slower by them (60 ms became 95 ms with 200). Without this podman would look worse in each round.
            engine.remove(served.container)
            kill_all(place.processes() - {engine.pid})
            return engine.run(options)

        served.replace_container = replace
        yield served
