"""The programs people use: the docker CLI, podman and curl, aimed at one service."""

import os
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from support.programs import find_program
from support.service import Service


@dataclass(frozen=True, slots=True)
class Cli(ABC):
    """A client with its own configuration, so that nothing of the user's matters.

    Call it like the command: `docker("exec", "c", "true")`.
    """

    host: str
    config: Path
    program: Path

    @property
    @abstractmethod
    def env(self) -> dict[str, str]:
        """The environment that aims the client at the service."""

    @abstractmethod
    def argv(self, *arguments: str) -> list[str]:
        """The command line, for a test that starts it in a terminal of its own."""

    def __call__(
        self,
        *arguments: str,
        input: bytes | None = b"",  # noqa: A002
        timeout: float = 60,
    ) -> "subprocess.CompletedProcess[bytes]":
        """Run one command to its end and return it: `returncode`, `stdout`, `stderr`. No exit code raises."""
        return subprocess.run(
            self.argv(*arguments),
            input=input,
            capture_output=True,
            env=self.env,
            timeout=timeout,
            check=False,
        )

    def popen(
        self, *arguments: str, stdin: int = subprocess.PIPE, stdout: int = subprocess.PIPE
    ) -> "subprocess.Popen[bytes]":
        """Start one command, with pipes on all three streams unless the caller has better ones."""
        return subprocess.Popen(self.argv(*arguments), stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, env=self.env)


class DockerCli(Cli):
    """The docker CLI."""

    __slots__ = ()

    @classmethod
    def for_service(cls, service: Service) -> "DockerCli":
        """Return the CLI for a service; its configuration lies in the service's directory."""
        return cls(service.host, service.directory / "docker-config", find_program("docker"))

    @property
    def env(self) -> dict[str, str]:
        """See Cli."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")}
        return kept | {"DOCKER_HOST": self.host, "DOCKER_CONFIG": str(self.config)}

    def argv(self, *arguments: str) -> list[str]:
        """See Cli."""
        return [str(self.program), *arguments]


class PodmanRemote(Cli):
    """`podman --remote`: the same program that is an engine without the flag."""

    __slots__ = ()

    @classmethod
    def for_service(cls, service: Service) -> "PodmanRemote":
        """Return the client for a service; what it takes for its user's home lies in the service's directory."""
        return cls(service.host, service.directory / "podman-home", find_program("podman"))

    @property
    def env(self) -> dict[str, str]:
        """See Cli."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("CONTAINER", "XDG_"))}
        return kept | {"HOME": str(self.config), "CONTAINERS_CONF": os.devnull}

    def argv(self, *arguments: str) -> list[str]:
        """See Cli."""
        return [str(self.program), "--remote", "--url", self.host, *arguments]


@dataclass(frozen=True, slots=True)
class Curl:
    """curl over the service's unix socket: `curl("/_ping")`, `curl("/exec/…/start", "-X", "POST")`."""

    socket: Path
    program: Path

    @classmethod
    def for_service(cls, service: Service) -> "Curl":
        """Return curl for a service."""
        return cls(service.socket, find_program("curl"))

    def __call__(self, path: str, *options: str, timeout: float = 60) -> "subprocess.CompletedProcess[bytes]":
        """Run one request to its end and return it; `stdout` is the body. No exit code raises."""
        return subprocess.run(
            self.argv(path, *options),
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            check=False,
        )

    def argv(self, path: str, *options: str) -> Sequence[str]:
        """The command line of one request, for `Popen` or for show."""
        where = ["--unix-socket", str(self.socket), f"http://localhost{path}"]
        return [str(self.program), "--silent", "--show-error", "--no-buffer", *options, *where]
