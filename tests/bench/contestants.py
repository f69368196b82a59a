"""What is compared: everything that can run a process in a container of runc or crun on this machine."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bench.client import ApiError, DockerClient, Stream
from bench.places import Place
from support.errors import HostError
from support.runtimes import TestContainer

COMMAND = ("true",)
"""What is executed where only the way to it is measured."""

EXECGATE = "execgate"
GUARDED = "execgate, 100 rules and audit"
RUNTIME_ALONE = "runtime alone"
CONMON_ALONE = "conmon alone"
DOCKERD = "dockerd"
PODMAN = "podman"

WITH_CONMON = f"{EXECGATE}, with "
"""How the names of contestants begin that are execgate with another conmon."""

Exec = Callable[[], None]
"""One exec, from its beginning until its exit code is known and right; an ApiError or HostError otherwise."""


def with_conmon(conmon: Path) -> str:
    """Return the name of execgate with this conmon, which its file's name tells from others."""
    return f"{WITH_CONMON}{conmon.name}"


class Named(Protocol):
    """Whoever has a label."""

    @property
    def name(self) -> str:
        """The same under every runtime."""

    @property
    def runtime(self) -> str:
        """runc or crun."""


class Contestant(Named, Protocol):
    """One way to run a process in a container."""

    def worker(self) -> AbstractContextManager[Exec]:
        """Give one thread its own means to run `COMMAND`."""

    def renew(self) -> None:
        """Get rid of what earlier turns left behind; called between turns, and not timed."""


def label(contestant: Named) -> str:
    """Return what a contestant is called in tables and results."""
    return f"{contestant.name} ({contestant.runtime})"


@dataclass(slots=True)
class Served:
    """A service with the Docker API: execgate, dockerd, podman.

    `replace_container` is for a service that slows down with each exec in one container: it returns another one
    to go on with.
    """

    name: str
    runtime: str
    place: Place
    socket: Path
    container: str
    replace_container: Callable[[], str] | None = None

    @contextlib.contextmanager
    def worker(self) -> Iterator[Exec]:
        with contextlib.closing(DockerClient(self.socket)) as client:

            def run() -> None:
                code, _ = client.run(self.container, COMMAND)
                if code != 0:
                    raise ApiError(f"exit code {code}")

            yield run

    def renew(self) -> None:
        if self.replace_container is not None:
            self.container = self.replace_container()
            self.prove()

    def client(self) -> DockerClient:
        """Return a new client, to be closed by the caller."""
        return DockerClient(self.socket)

    @contextlib.contextmanager
    def attached(self, argv: Sequence[str]) -> Iterator[Stream]:
        """Start an exec with stdin; at the end its input is closed and its own end awaited."""
        with contextlib.closing(self.client()) as client, client.attached(self.container, argv) as stream:
            yield stream

    def processes(self) -> frozenset[int]:
        """Return the pids of the service, its helpers and its monitors."""
        return self.place.processes()

    def prove(self) -> None:
        """Raise ApiError unless output and exit code of an exec are right."""
        with contextlib.closing(self.client()) as client:
            result = client.run(self.container, ("sh", "-c", "echo proof; exit 7"))
        if result != (7, b"proof\n"):
            raise ApiError(f"'echo proof; exit 7' gave exit code {result[0]} and output {result[1]!r}")


@dataclass(frozen=True, slots=True)
class RuntimeAlone:
    """`runc exec CONTAINER true`: what no service that uses the runtime can go below."""

    container: TestContainer
    name: str = RUNTIME_ALONE

    @property
    def runtime(self) -> str:
        return self.container.host.name

    @contextlib.contextmanager
    def worker(self) -> Iterator[Exec]:
        host = self.container.host
        argv = [str(host.program), "--root", str(host.root), "exec", self.container.id, *COMMAND]

        def run() -> None:
            pid = os.posix_spawn(argv[0], argv, _ENVIRONMENT, file_actions=_NO_STREAMS)
            if code := _exit_code(pid):
                raise HostError(f"{' '.join(argv)}: exit code {code}")

        yield run

    def renew(self) -> None:
        """Nothing is left behind."""


@dataclass(frozen=True, slots=True)
class ConmonAlone:
    """The runtime as conmon drives it, without a service: what execgate and podman have in common."""

    container: TestContainer
    conmon: Path
    place: Place
    name: str = CONMON_ALONE

    @property
    def runtime(self) -> str:
        return self.container.host.name

    @contextlib.contextmanager
    def worker(self) -> Iterator[Exec]:
        with tempfile.TemporaryDirectory(prefix="conmon-", dir=self.place.memory) as name:
            home = Path(name)
            specification = home / "process.json"
            specification.write_text(json.dumps(self._process()))

            def run() -> None:
                session = home / "session"
                (session / "exit").mkdir(parents=True)
                self._run(session, specification)
                shutil.rmtree(session)

            yield run

    def renew(self) -> None:
        """Nothing is left behind."""

    def _process(self) -> dict[str, Any]:
        config = json.loads((self.container.bundle / "config.json").read_text())
        return {**config["process"], "args": list(COMMAND)}

    def _run(self, session: Path, specification: Path) -> None:
        host = self.container.host
        argv = [str(self.conmon), "--api-version", "1", "--sync", "--full-attach", "-l", "passthrough"]
        argv += ["-c", self.container.id, "-u", "bench", "-n", self.container.id, "-r", str(host.program)]
        argv += ["-b", str(session), "-p", str(session / "pid"), "--exit-dir", str(session / "exit")]
        argv += ["--runtime-arg", f"--root={host.root}", "--log-level", "error"]
        argv += ["-e", "--exec-process-spec", str(specification)]
        sync_read, sync_write = os.pipe()
        with open(sync_read, "rb") as sync:
            try:
                # Moved onto itself, a descriptor loses its close-on-exec flag, in the child alone.
                actions = [*_NO_STREAMS, (os.POSIX_SPAWN_DUP2, sync_write, sync_write)]
                environment = _ENVIRONMENT | {"_OCI_SYNCPIPE": str(sync_write)}
                pid = os.posix_spawn(argv[0], argv, environment, file_actions=actions)
            finally:
                os.close(sync_write)
            messages = [json.loads(line)["data"] for line in sync]  # the pid, then the exit code
        _exit_code(pid)
        if len(messages) != 2 or messages[1] != 0:
            raise HostError(f"conmon said {messages} instead of a pid and exit code 0")


_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
_NO_STREAMS: list[Any] = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)]


def _exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
