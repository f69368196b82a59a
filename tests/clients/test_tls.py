"""Clients over TLS, unmodified: the docker CLI, docker-py, curl, our own; and who they are to the service."""

import hashlib
import os
import random
import subprocess
from collections.abc import Iterator

import pytest

from support.clients import Cli
from support.leaks import assert_no_leaks, footprint
from support.programs import find_program
from support.runtimes import TestContainer
from support.service import execgate_program
from support.tls import Identity
from support.tls_service import TlsService
from support.tty import Terminal


class TlsDocker(Cli):
    """The docker CLI, with a client's certificate."""

    __slots__ = ()

    @classmethod
    def for_service(cls, tls: TlsService) -> "TlsDocker":
        return cls(tls.docker_host, tls.client.directory, find_program("docker"))

    @property
    def env(self) -> dict[str, str]:
        """See Cli."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")}
        return kept | {"DOCKER_CONFIG": str(self.config / "docker-config")}

    def argv(self, *arguments: str) -> list[str]:
        """See Cli."""
        where = Identity(self.config)
        files = [f"--tlscacert={where.ca}", f"--tlscert={where.certificate}", f"--tlskey={where.key}"]
        return [str(self.program), "--tlsverify", *files, "-H", self.host, *arguments]


@pytest.fixture
def docker(tls: TlsService) -> TlsDocker:
    return TlsDocker.for_service(tls)


@pytest.fixture(autouse=True)
def nothing_leaks(tls: TlsService) -> Iterator[None]:
    before = footprint(tls.service)
    yield
    assert_no_leaks(tls.service, before)


def test_docker_exec(docker: TlsDocker, container: TestContainer) -> None:
    done = docker("exec", container.id, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")


def test_docker_input_ends_and_output_goes_on(docker: TlsDocker, container: TestContainer) -> None:
    """The end of input is a close_notify; all that the process writes comes after it."""
    data = random.Random(1).randbytes(5_000_000)
    done = docker("exec", "-i", container.id, "sha256sum", input=data)
    assert (done.returncode, done.stdout.split()[0].decode()) == (0, hashlib.sha256(data).hexdigest())


def test_docker_both_ways_at_once(docker: TlsDocker, container: TestContainer) -> None:
    data = random.Random(2).randbytes(20_000_000)
    done = docker("exec", "-i", container.id, "sh", "-c", "cat; sleep 0.3; echo end", input=data)
    assert done.returncode == 0
    assert done.stdout == data + b"end\n"


def test_docker_terminal(docker: TlsDocker, container: TestContainer) -> None:
    script = "echo ready; read x; echo [$x]; exit 4"
    with Terminal(docker.argv("exec", "-it", container.id, "sh", "-c", script), docker.env) as user:
        user.expect("ready")
        user.type("typed\r")
        assert user.wait() == 4
        assert user.shown == "ready\r\ntyped\r\n[typed]\r\n"


def execgate(tls: TlsService, *arguments: str, data: bytes = b"", **env: str) -> "subprocess.CompletedProcess[bytes]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DOCKER_", "EXECGATE_"))}
    command, *rest = arguments
    argv = [str(execgate_program()), command, "-H", tls.address, *rest]
    return subprocess.run(argv, input=data, env=kept | env, capture_output=True, timeout=60, check=False)


def test_our_own_client(tls: TlsService, container: TestContainer) -> None:
    data = random.Random(1).randbytes(5_000_000)
    files = {"DOCKER_CERT_PATH": str(tls.client.directory)}
    done = execgate(tls, "exec", "-i", container.id, "sh", "-c", "cat; sleep 0.2; echo end; exit 3", data=data, **files)
    assert (done.returncode, done.stderr) == (3, b"")
    assert done.stdout == data + b"end\n"
