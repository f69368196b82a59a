"""Every engine with every kind of container, and a service that looks at the same containers."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from support.api import RawApi
from support.engines import (
    Containerd,
    Docker,
    Engine,
    Podman,
    RunOptions,
    containerd_engine,
    docker_engine,
    podman_engine,
)
from support.errors import HostError
from support.runtimes import crun_host
from support.service import Service

VARIANTS: Mapping[str, RunOptions] = {
    "plain": RunOptions(hostname="plain.example"),
    "user": RunOptions(
        # The same limit twice: between two, runc before 1.1.13 has a race (opencontainers/runc#4195).
        user="app",
        env={"FOO": "bar", "HOME": "/srv"},
        workdir="/tmp",
        ulimits=["nofile=200:200", "nproc=500:600"],
    ),
    "number": RunOptions(user="1234:2000", group_add=["4000"], security_opt=["seccomp=unconfined"]),
    "capabilities": RunOptions(
        cap_drop=["ALL"], cap_add=["KILL", "NET_BIND_SERVICE"], group_add=["extra", "4000"], env={"TERM": "dumb"}
    ),
    "locked": RunOptions(
        user="app", cap_drop=["ALL"], cap_add=["KILL"], security_opt=["no-new-privileges"], read_only=True
    ),
    "terminal": RunOptions(tty=True),
    "privileged": RunOptions(privileged=True),
}
"""Containers that differ in what an exec inherits."""


@dataclass(slots=True)
class Side:
    """One engine, a service beside it, and the containers that both know."""

    name: str
    engine: Engine
    service: Service
    _containers: dict[str, str] = field(default_factory=dict)

    @property
    def api(self) -> RawApi:
        """The service."""
        return RawApi(self.service.socket)

    def container(self, variant: str) -> str:
        """Return the id of the container of a variant; skips, in the engine's words, where it cannot run here."""
        if variant not in self._containers:
            try:
                self._containers[variant] = self.engine.run(_possible(self.engine, VARIANTS[variant]))
            except HostError as error:
                pytest.skip(str(error))
        return self._containers[variant]


def _possible(engine: Engine, options: RunOptions) -> RunOptions:
    """Leave out what the engine's program has no option for."""
    if isinstance(engine, Containerd):
        return replace(options, hostname="", ulimits=(), group_add=())
    return options


@contextlib.contextmanager
def _podman_with_crun(directory: Path) -> Iterator[Podman]:
    try:
        host = crun_host(directory.with_name(f"{directory.name}-host"))
    except HostError as error:
        pytest.skip(f"crun cannot run here: {error}")
    try:
        with podman_engine(directory, runtimes={"crun": host.program}, cgroups=host.view is None) as engine:
            yield engine
    finally:
        host.close()


_ENGINES: Mapping[str, tuple[type[Engine], Callable[[Path], AbstractContextManager[Engine]]]] = {
    "docker": (Docker, docker_engine),
    "podman": (Podman, podman_engine),
    "podman-crun": (Podman, _podman_with_crun),
    "containerd": (Containerd, containerd_engine),
}

ENGINES: Mapping[str, type[Engine]] = {name: kind for name, (kind, _) in _ENGINES.items()}


@pytest.fixture(scope="session")
def sides(host_dir: Path, event_loop_name: str) -> Iterator[Callable[[str], Side]]:
    """Each engine by name, with its service; one at a time, so the last one ends when another is asked for."""
    serial = itertools.count(1)
    with contextlib.ExitStack() as stack:
        current: list[Side] = []

        def get(name: str) -> Side:
            if not current or current[0].name != name:
                current.clear()
                stack.close()
                directory = host_dir / f"{name}-{next(serial)}"
                current.append(stack.enter_context(_side(name, directory, event_loop_name)))
            return current[0]

        yield get


@contextlib.contextmanager
def _side(name: str, directory: Path, event_loop: str) -> Iterator[Side]:
    with _ENGINES[name][1](directory) as engine:
        service = _service_for(engine, directory.with_name(f"{directory.name}-service"), event_loop)
        try:
            yield Side(name, engine, service)
        finally:
            service.stop()


def _service_for(engine: Engine, directory: Path, event_loop: str) -> Service:
    # The configuration file is the tests' own, and the environment comes before it.
    settings = {"engines": engine.name} | _places(engine)
    env = {f"EXECGATE_{name.upper()}": str(value) for name, value in settings.items()}
    return Service.start(directory, [], env=env, event_loop=event_loop)


def _places(engine: Engine) -> dict[str, object]:
    """Return what tells the service where an engine keeps its files."""
    if isinstance(engine, Docker):
        return {"docker_data_root": engine.data_root, "docker_exec_root": engine.exec_root}
    if isinstance(engine, Containerd):
        return {
            "containerd_root": engine.root,
            "containerd_state": engine.state,
            "containerd_runc_root": engine.runc_root,
        }
    assert isinstance(engine, Podman)
    return {
        "storage_graph_root": engine.graph_root,
        "storage_run_root": engine.run_root,
        "runtimes": ",".join(f"{name}={program}" for name, program in engine.runtimes.items()),
    }
