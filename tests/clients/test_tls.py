"""Clients over TLS, unmodified: the docker CLI, docker-py, curl, our own; and who they are to the service."""

import asyncio
import gc
import hashlib
import json
import os
import random
import select
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import docker as docker_sdk  # type: ignore[import-untyped]
import pytest

from execgate import Client, OnDisconnect, TlsFiles, Unavailable
from support.clients import Cli
from support.leaks import assert_no_leaks, footprint
from support.programs import find_program
from support.runtimes import TestContainer
from support.service import execgate_program
from support.tls import Authority, Identity
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


def test_docker_without_a_certificate(docker: TlsDocker, tls: TlsService, container: TestContainer) -> None:
    trusted = f"--tlscacert={tls.client.ca}"
    argv = [str(docker.program), "--tlsverify", trusted, "-H", tls.docker_host, "exec", container.id, "true"]
    done = subprocess.run(argv, env=docker.env, capture_output=True, timeout=60, check=False)
    assert done.returncode == 1
    assert b"certificate required" in done.stderr


def test_docker_without_tls(docker: TlsDocker, tls: TlsService, container: TestContainer) -> None:
    argv = [str(docker.program), "-H", tls.docker_host, "exec", container.id, "true"]
    done = subprocess.run(argv, env=docker.env, capture_output=True, timeout=60, check=False)
    assert done.returncode == 1
    assert b"Client sent an HTTP request to an HTTPS server" in done.stderr


def test_docker_killed(docker: TlsDocker, tls: TlsService, container: TestContainer) -> None:
    """Its end is noticed at once, although it comes over TCP: nothing is sent, and nothing is taken for an end."""
    docker_exec = docker.popen("exec", "-i", container.id, "sh", "-c", "echo up; exec cat")
    assert docker_exec.stdout is not None
    assert docker_exec.stdout.readline() == b"up\n"
    process = os.pidfd_open(container.wait_for_process("cat"))
    docker_exec.kill()
    docker_exec.communicate()
    assert select.select([process], [], [], 10)[0], "its process still waits for input"
    os.close(process)


@pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")
def test_docker_py(tls: TlsService, container: TestContainer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # to requests it comes before what it is told
        monkeypatch.delenv(name, raising=False)
    files = (str(tls.client.certificate), str(tls.client.key))
    config = docker_sdk.tls.TLSConfig(client_cert=files, ca_cert=str(tls.client.ca), verify=True)
    client = docker_sdk.DockerClient(base_url=tls.docker_host, tls=config, timeout=60)
    try:
        done = client.containers.get(container.id).exec_run(
            ["sh", "-c", "echo out; echo err >&2; seq 100000; exit 3"], demux=True
        )
        assert done.exit_code == 3
        assert done.output == (b"out\n" + b"".join(b"%d\n" % number for number in range(1, 100001)), b"err\n")
        done = client.containers.get(container.id).exec_run(["sh", "-c", "tty; exit 4"], tty=True)
        assert (done.exit_code, done.output) == (4, b"/dev/pts/0\r\n")
        stream = client.containers.get(container.id).exec_run(["seq", "100000"], stream=True).output
        assert b"".join(stream) == b"".join(b"%d\n" % number for number in range(1, 100001))
    finally:
        client.close()
        gc.collect()  # it leaves sockets to the garbage collector


def curl(tls: TlsService, path: str, *options: str) -> "subprocess.CompletedProcess[bytes]":
    argv = [str(find_program("curl")), "--silent", "--show-error", "--cacert", str(tls.client.ca), *options]
    url = f"https://localhost:{tls.port}{path}"
    return subprocess.run([*argv, url], capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False)


def test_curl(tls: TlsService, container: TestContainer) -> None:
    who = ["--cert", str(tls.client.certificate), "--key", str(tls.client.key)]
    assert curl(tls, "/_ping", *who).stdout == b"OK"
    body = json.dumps({"Cmd": ["sh", "-c", "cat; exit 5"], "Stdin": "in"})
    done = curl(tls, f"/containers/{container.id}/exec/run", *who, "-H", "Content-Type: application/json", "-d", body)
    found = json.loads(done.stdout)
    assert (found["ExitCode"], found["Stdout"]) == (5, "in")
    without = curl(tls, "/_ping")
    assert without.returncode != 0
    assert b"certificate required" in without.stderr
    # With TLS 1.2 it is not even begun.
    assert curl(tls, "/_ping", *who, "--tls-max", "1.2").returncode == 35


def test_a_stream_without_an_upgrade_ends_in_order(tls: TlsService, container: TestContainer) -> None:
    """An answer that lasts as long as its connection: curl minds an end that is not said."""
    who = ["--cert", str(tls.client.certificate), "--key", str(tls.client.key), "-H", "Content-Type: application/json"]
    body = json.dumps({"AttachStdout": True, "Tty": True, "Cmd": ["seq", "3"]})
    session = json.loads(curl(tls, f"/containers/{container.id}/exec", *who, "-d", body).stdout)["Id"]
    done = curl(tls, f"/exec/{session}/start", *who, "-d", '{"Tty": true}')
    assert (done.returncode, done.stderr, done.stdout) == (0, b"", b"1\r\n2\r\n3\r\n")


# -- our own


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


def test_our_own_terminal(tls: TlsService, container: TestContainer) -> None:
    script = "echo ready; read x; echo [$x]; exit 4"
    argv = [str(execgate_program()), "exec", "-H", tls.address, "-it", container.id, "sh", "-c", script]
    with Terminal(argv, {**os.environ, "DOCKER_CERT_PATH": str(tls.client.directory)}) as user:
        user.expect("ready")
        user.type("typed\r")
        assert user.wait() == 4


def test_files_by_flags(tls: TlsService, container: TestContainer) -> None:
    client = tls.client
    files = [f"--tlscacert={client.ca}", f"--tlscert={client.certificate}", f"--tlskey={client.key}"]
    done = execgate(tls, "exec", *files, container.id, "echo", "out")
    assert (done.returncode, done.stdout) == (0, b"out\n")
    session = execgate(tls, "exec", *files, "-d", "--capture", container.id, "echo", "later").stdout.decode().strip()
    assert execgate(tls, "wait", *files, session).stdout == b"0\n"
    assert execgate(tls, "logs", *files, session[:12]).stdout == b"later\n"


def test_why_it_cannot_be_reached(tls: TlsService, tmp_path: Path) -> None:
    """In words, and at once: there is no patience with a refusal."""
    trusted = [f"--tlscacert={tls.client.ca}"]
    done = execgate(tls, "wait", *trusted, "0" * 64)
    assert done.returncode == 1
    assert b"certificate required" in done.stderr
    assert b"certificate verify failed" in execgate(tls, "exec", "c", "true").stderr
    other = Authority.make(tmp_path / "pki").client("alice", "alice@example.org")
    done = execgate(tls, "exec", *trusted, f"--tlscert={other.certificate}", f"--tlskey={other.key}", "c", "true")
    assert (done.returncode, done.stdout) == (125, b"")
    assert b"unknown ca" in done.stderr
    assert b"need each other" in execgate(tls, "exec", f"--tlscert={other.certificate}", "c", "true").stderr
    assert b"nowhere" in execgate(tls, "exec", "--tlscacert=/nowhere", "c", "true").stderr


def test_a_token(new_tls: Callable[..., TlsService], container: TestContainer, tmp_path: Path) -> None:
    """In the place of a certificate, where that is optional; and to nobody in the clear."""
    tls = new_tls(tls_client_certificates="optional")
    secret = tls.token()["Authorization"].removeprefix("Bearer ")
    trusted = f"--tlscacert={tls.client.ca}"
    file = tmp_path / "token"
    file.write_text(f"{secret}\n")
    done = execgate(tls, "exec", trusted, f"--token-file={file}", "-i", container.id, "cat", data=b"in")
    assert (done.returncode, done.stdout) == (0, b"in")
    assert execgate(tls, "exec", trusted, container.id, "echo", "out", EXECGATE_TOKEN=secret).stdout == b"out\n"
    done = execgate(tls, "exec", trusted, container.id, "echo", "out")
    assert done.returncode == 125
    assert b"token" in done.stderr
    argv = [str(execgate_program()), "exec", "-H", "tcp://192.0.2.1:1", f"--token-file={file}", "c", "true"]
    done = subprocess.run(argv, capture_output=True, timeout=60, check=False)
    assert b"not sent over a network without TLS" in done.stderr
    file.write_text("two words")
    assert b"the token is none" in execgate(tls, "exec", trusted, f"--token-file={file}", "c", "true").stderr


@pytest.fixture
async def client(tls: TlsService) -> AsyncIterator[Client]:
    files = TlsFiles.in_directory(tls.client.directory)
    async with Client(tls.address, tls=files) as client:
        yield client


async def test_the_library(client: Client, container: TestContainer) -> None:
    answer = await client.run(container.id, ["sh", "-c", "cat; exit 6"], stdin=b"in")
    assert (answer.exit_code, answer.stdout) == (6, b"in")
    session = await client.create(container.id, ["sh", "-c", "cat; echo over"], attach_stdin=True)
    async with await client.start(session) as stream:
        await stream.write(b"in\n")
        await stream.write_eof()
        assert b"".join([data async for _, data in stream]) == b"in\nover\n"
    assert (await client.wait(session)).exit_code == 0


async def test_a_client_that_leaves_is_lost(client: Client, container: TestContainer) -> None:
    """It hangs up, it does not end its input: the creator's choice for that holds."""
    command = ["sh", "-c", "cat; sleep 1000"]
    session = await client.create(container.id, command, attach_stdin=True, on_disconnect=OnDisconnect.KILL)
    async with await client.start(session) as stream:
        await stream.write(b"in\n")
        async for _, data in stream:
            assert data == b"in\n"
            break
    assert (await asyncio.wait_for(client.wait(session), 10)).exit_code == 137


async def test_a_cut_is_not_taken_for_the_end(new_tls: Callable[..., TlsService], container: TestContainer) -> None:
    tls = new_tls()
    async with Client(tls.address, tls=TlsFiles.in_directory(tls.client.directory)) as client:
        session = await client.create(container.id, ["cat"], attach_stdin=True, on_disconnect=OnDisconnect.KEEP)
        async with await client.start(session) as stream:
            await stream.write(b"in\n")
            assert (await anext(stream))[1] == b"in\n"
            await asyncio.to_thread(tls.service.reload)
            with pytest.raises(Unavailable, match="broke"):
                await asyncio.wait_for(anext(stream), 10)
        async with await client.attach(session) as again:
            await again.write(b"more\n")
            assert (await anext(again))[1] == b"more\n"
            await again.write_eof()
            assert [data async for _, data in again] == []
        assert (await client.wait(session)).exit_code == 0
