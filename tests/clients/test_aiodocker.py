"""aiodocker: its exec streams, and what it asks around them."""

import asyncio
import os
import signal
import time
from typing import Any

import aiodocker
import pytest
from aiodocker.containers import DockerContainer
from aiodocker.exceptions import DockerError
from aiodocker.execs import Exec
from aiodocker.stream import Stream

from support.api import RawApi
from support.runtimes import TestContainer
from support.tty import tell_size_in_shell

pytestmark = pytest.mark.usefixtures("no_leaks")

TIMEOUT = 60


@pytest.fixture
async def k(aio_docker: aiodocker.Docker, container: TestContainer) -> DockerContainer:
    """aiodocker's object for the container."""
    return await aio_docker.containers.get(container.id)


async def read_all(stream: Stream) -> tuple[bytes, bytes]:
    """Read (stdout, stderr) to the end."""
    output = {1: b"", 2: b""}
    async with asyncio.timeout(TIMEOUT):
        while (message := await stream.read_out()) is not None:
            output[message.stream] += message.data
    return output[1], output[2]


async def run(k: DockerContainer, *argv: str, **options: Any) -> tuple[int, bytes, bytes]:
    """Run an exec to its end and return (exit code, stdout, stderr)."""
    execution = await k.exec(argv, **options)
    async with execution.start(detach=False) as stream:
        stdout, stderr = await read_all(stream)
    return (await execution.inspect())["ExitCode"], stdout, stderr


def end_input(stream: Stream) -> None:
    """Half-close: aiodocker has no call for it."""
    assert stream._resp is not None
    assert stream._resp.connection is not None
    assert stream._resp.connection.transport is not None
    stream._resp.connection.transport.write_eof()


async def test_both_streams_and_the_exit_code(k: DockerContainer) -> None:
    assert await run(k, "sh", "-c", "echo out; echo err >&2; exit 42") == (42, b"out\n", b"err\n")


async def test_fifty_at_once(k: DockerContainer) -> None:
    results = await asyncio.gather(*(run(k, "sh", "-c", f"echo {n}; exit {n}") for n in range(50)))
    assert results == [(n, f"{n}\n".encode(), b"") for n in range(50)]


async def test_a_megabyte(k: DockerContainer) -> None:
    assert await run(k, "sh", "-c", "yes 0123456 | head -c 1000000") == (0, b"0123456\n" * 125_000, b"")


async def test_a_dialogue(k: DockerContainer) -> None:
    execution = await k.exec(["cat"], stdin=True)
    async with asyncio.timeout(TIMEOUT), execution.start(detach=False) as stream:
        for word in (b"one\n", b"two\n", b"\0\xff\n"):
            await stream.write_in(word)
            assert await stream.read_out() == (1, word)
        end_input(stream)
        assert await stream.read_out() is None
    assert (await execution.inspect())["ExitCode"] == 0


async def test_leaving_ends_the_input(k: DockerContainer, raw: RawApi) -> None:
    """aiodocker's `close` hangs up; the process gets its end of file and lives to its own end."""
    execution = await k.exec(["sh", "-c", "cat; exit 6"], stdin=True)
    async with execution.start(detach=False) as stream:
        await stream.write_in(b"x\n")
        assert await stream.read_out() == (1, b"x\n")
    assert await asyncio.to_thread(raw.ended, execution.id) == 6


async def test_a_tty(k: DockerContainer, container: TestContainer) -> None:
    script = f"read line; {tell_size_in_shell(container)}; echo $line; exit 5"
    execution = await k.exec(["sh", "-c", script], stdin=True, tty=True)
    await execution.resize(h=30, w=90)
    async with asyncio.timeout(TIMEOUT), execution.start(detach=False) as stream:
        await stream.write_in(b"typed\r")
        stdout, stderr = await read_all(stream)
    assert (stdout, stderr) == (b"typed\r\n30 90\r\ntyped\r\n", b"")
    assert (await execution.inspect())["ExitCode"] == 5


async def test_a_tty_is_resized_while_it_runs(k: DockerContainer) -> None:
    script = 'trap "stty size; exit" WINCH; echo ready; while :; do sleep 60 & wait $!; done'
    execution = await k.exec(["sh", "-c", script], stdin=True, tty=True)
    async with asyncio.timeout(TIMEOUT), execution.start(detach=False) as stream:
        assert await stream.read_out() == (1, b"ready\r\n")
        await execution.resize(h=31, w=91)
        stdout, _ = await read_all(stream)
    assert stdout == b"31 91\r\n"


@pytest.mark.parametrize(("keys", "typed"), [(None, b"\x10\x11"), ("ctrl-a,x", b"\x01x")])
async def test_detach_keys(k: DockerContainer, raw: RawApi, keys: str | None, typed: bytes) -> None:
    execution = await k.exec(["sh", "-c", "read line; exit 8"], stdin=True, tty=True, detach_keys=keys)
    async with asyncio.timeout(TIMEOUT), execution.start(detach=False) as stream:
        await stream.write_in(typed)
        assert await stream.read_out() is None
    found = await execution.inspect()
    assert (found["Running"], found["ExitCode"]) == (True, None)
    os.kill(found["Pid"], signal.SIGKILL)
    assert await asyncio.to_thread(raw.ended, execution.id) == 137
    actions = [event["Action"] for event in past_events(raw) if exec_id(event) == execution.id]
    command = "sh -c read line; exit 8"
    assert actions == [f"exec_create: {command}", f"exec_start: {command}", "exec_detach", "exec_die"]


def past_events(raw: RawApi) -> list[dict[str, Any]]:
    """Return what has happened so far."""
    with raw.events(since="1", until=f"{time.time():.9f}") as events:
        return list(events)


def exec_id(event: dict[str, Any]) -> str:
    """Return which exec an event is about."""
    return str(event["Actor"]["Attributes"]["execID"])


async def test_detached(k: DockerContainer, raw: RawApi) -> None:
    execution = await k.exec(["sh", "-c", "exit 7"])
    assert await execution.start(detach=True) == b""
    assert await asyncio.to_thread(raw.ended, execution.id) == 7
    assert not (await execution.inspect())["Running"]


@pytest.mark.parametrize("environment", [["A=1", "B=2 3"], {"A": "1", "B": "2 3"}])
async def test_environment_user_and_workdir(k: DockerContainer, environment: list[str] | dict[str, str]) -> None:
    script = "echo $A/$B; pwd; id -un; echo $HOME"
    expected = b"1/2 3\n/var/tmp\napp\n/home/app\n"
    found = await run(k, "sh", "-c", script, environment=environment, user="app", workdir="/var/tmp")
    assert found == (0, expected, b"")


async def test_an_exec_known_by_its_id_alone(aio_docker: aiodocker.Docker, k: DockerContainer) -> None:
    """Without a `tty` of its own aiodocker asks inspect for it."""
    created = await k.exec(["echo", "hello"])
    execution = Exec(aio_docker, created.id)
    async with execution.start(detach=False) as stream:
        assert await read_all(stream) == (b"hello\n", b"")


async def test_errors_carry_their_message(aio_docker: aiodocker.Docker, k: DockerContainer) -> None:
    with pytest.raises(DockerError, match="No such container: nosuch") as missing:
        await aio_docker.containers.get("nosuch")
    assert missing.value.status == 404
    with pytest.raises(DockerError, match="unable to find user nosuch: no matching entries in passwd file") as user:
        await k.exec(["true"], user="nosuch")
    assert user.value.status == 400
    code, stdout, _ = await run(k, "nosuch")
    assert code == 127
    assert b"nosuch" in stdout


async def test_around_an_exec(aio_docker: aiodocker.Docker, container: TestContainer, k: DockerContainer) -> None:
    assert (await aio_docker.version())["ApiVersion"]
    assert (await aio_docker.system.info())["OSType"] == "linux"
    assert container.id in [one.id for one in await aio_docker.containers.list()]
    assert (await k.show())["State"]["Status"] == "running"
