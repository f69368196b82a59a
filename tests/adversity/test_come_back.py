"""Our own clients come back by themselves when the service has crashed, and neither lose nor repeat anything."""

import asyncio
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from execgate import client as client_module
from execgate.client import Client
from execgate.model.errors import Conflict, NotFound, Unavailable
from support.api import RawApi
from support.runtimes import TestContainer
from support.service import Service, execgate_program

NewService = Callable[..., Service]

LINES = 30_000
STREAM = (
    "echo begun; while [ ! -e /tmp/go ]; do sleep 0.05; done; "
    f"i=0; while [ $i -lt {LINES} ]; do echo line $i of the output; [ $((i % 2000)) = 0 ] && sleep 0.2; "
    "i=$((i+1)); done; exit 7"
)
EXPECTED = b"begun\n" + b"".join(b"line %d of the output\n" % number for number in range(LINES))


def execgate(service: Service, *arguments: str) -> "subprocess.Popen[bytes]":
    env = {name: value for name, value in os.environ.items() if not name.startswith("EXECGATE_")}
    return subprocess.Popen(
        [str(execgate_program()), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env | {"EXECGATE_HOST": service.host},
    )


def crash_until_over(service: Service, api: RawApi, session: str) -> int:
    """Crash a service again and again while a session runs; return how often."""
    count = 0
    while api.inspect(session)["Running"]:
        service.crash()
        count += 1
        time.sleep(1.5)  # so that everybody is back, and in the midst again
    return count


def test_wait_and_logs(new_service: NewService, container: TestContainer) -> None:
    service = new_service()
    api = RawApi(service.socket)
    session = api.create(container.id, "sh", "-c", STREAM, CaptureStdout=True, CaptureStderr=True)
    assert api.start_detached(session).status == 200
    waiting = execgate(service, "wait", session)
    following = execgate(service, "logs", "-f", session)
    looking = execgate(service, "attach", "--no-stdin", "--after", "0", session)
    for process in (following, looking):
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
    (container.rootfs / "tmp/go").touch()
    crashes = crash_until_over(service, api, session)
    (container.rootfs / "tmp/go").unlink()
    ends = [process.communicate(timeout=60) for process in (following, looking, waiting)]
    assert [errors for _, errors in ends] == [b"", b"", b""]
    assert [process.returncode for process in (following, looking, waiting)] == [0, 7, 0]
    assert b"begun\n" + ends[0][0] == EXPECTED
    assert b"begun\n" + ends[1][0] == EXPECTED
    assert ends[2][0] == b"7\n"
    assert crashes >= 2


def test_exec_without_input(new_service: NewService, runc_container: TestContainer) -> None:
    """It is attached again: nothing is missing of what is captured, else it says so; the exit code is the command's."""
    service = new_service()
    api = RawApi(service.socket)
    script = "echo begun; while [ ! -e /tmp/go ]; do sleep 0.05; done; echo over; exit 9"
    captured = execgate(service, "exec", "--capture", runc_container.id, "sh", "-c", script)
    plain = execgate(service, "exec", runc_container.id, "sh", "-c", script)
    for process in (captured, plain):
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
    service.crash()
    assert plain.stderr is not None
    assert b"some output may be missing" in plain.stderr.readline()
    (runc_container.rootfs / "tmp/go").touch()
    assert captured.communicate(timeout=60) == (b"over\n", b"")
    assert plain.communicate(timeout=60) == (b"over\n", b"")
    (runc_container.rootfs / "tmp/go").unlink()
    assert (captured.returncode, plain.returncode) == (9, 9)
    assert len(api.call("GET", "/exec/json").json) == 2, "something was started twice"


def test_exec_with_input(new_service: NewService, runc_container: TestContainer) -> None:
    """Nobody knows how much of its input has arrived: it says that the connection broke, and is no success."""
    service = new_service()
    env = os.environ | {"EXECGATE_HOST": service.host}
    argv = [str(execgate_program()), "exec", "-i", "--on-disconnect", "keep", runc_container.id, "cat"]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"hello\n"
        service.crash()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 125
    assert b"broke; the session goes on\n  `execgate attach" in errors
    api = RawApi(service.socket)
    (session,) = api.call("GET", "/exec/json").json
    assert session["Running"]
    assert api.call("POST", f"/exec/{session['ID']}/kill").status == 204


async def test_results(new_service: NewService, runc_container: TestContainer) -> None:
    """A result can be asked for by anybody, before the end and after it, through a crash too."""
    service = await asyncio.to_thread(new_service)
    async with Client(service.host) as client:
        script = "sleep 1; echo out; echo error >&2; exit 3"
        session = await client.create(runc_container.id, ["sh", "-c", script], capture_stdout=True, capture_stderr=True)
        with pytest.raises(Conflict):
            await client.result(await client.create(runc_container.id, ["true"]))
        await client.start_detached(session)
        asking = asyncio.ensure_future(client.result(session))
        await asyncio.to_thread(service.crash)
        answer = await asking
        assert (answer.id, answer.exit_code, answer.stdout, answer.stderr) == (session, 3, b"out\n", b"error\n")
        assert not answer.truncated
        assert await client.result(session) == answer
        short = await client.result(session, limit=5)
        assert (short.stdout + short.stderr, short.truncated) in ((b"out\ne", True), (b"erroro"[:5], True))
        with pytest.raises(NotFound):
            await client.result("0" * 64)


async def test_what_is_never_sent_again(new_service: NewService, runc_container: TestContainer) -> None:
    """A run, a create or a start whose connection breaks fails: it may have been done."""
    service = await asyncio.to_thread(new_service)
    async with Client(service.host) as client:
        running = asyncio.ensure_future(client.run(runc_container.id, ["sleep", "600"]))
        while not (sessions := await client.sessions()):
            await asyncio.sleep(0.01)
        while not (await client.inspect(sessions[0].id)).running:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(service.crash)
        with pytest.raises(Unavailable):
            await running
        assert len(await client.sessions()) == 1
        await client.kill(sessions[0].id)


async def test_the_patience_has_an_end(host_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that hangs up on every request, and then is gone: asked again for a while, then given up."""
    monkeypatch.setattr(client_module, "PATIENCE", 0.5)
    asked = 0

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    path = host_dir / "hangs-up.sock"
    loop = asyncio.get_running_loop()
    async with await asyncio.start_unix_server(hang_up, path), Client(f"unix://{path}") as client:
        for ask in (client.wait("0" * 64), client.logs("0" * 64), client.inspect("0" * 64)):
            begun, asked = loop.time(), 0
            with pytest.raises(Unavailable):
                await ask
            assert asked > 2
            assert 0.5 <= loop.time() - begun < 5
        for order in (client.kill("0" * 64), client.create("c", ["true"]), client.run("c", ["true"])):
            asked = 0
            with pytest.raises(Unavailable):
                await order
            assert asked == 1


async def test_logs_that_break_anywhere(host_dir: Path) -> None:
    """Every byte once, wherever the connection breaks: within a chunk, a frame, its header, or behind the last one."""
    frames = [(1, b"first"), (2, b"second"), (3, b"execgate: output from 11 to 20 was dropped\n"), (1, b"third")]
    whole = b"".join(bytes([stream, 0, 0, 0]) + len(data).to_bytes(4, "big") + data for stream, data in frames)
    cut_after = 0
    asked: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1]
        after = int(line.partition(b"after=")[2].partition(b"&")[0])
        asked.append(after)
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.docker.multiplexed-stream\r\n"
        head += b"Transfer-Encoding: chunked\r\nExecgate-Offset: %d\r\n\r\n" % after
        if len(asked) == 1:
            writer.write(
                head + b"%x\r\n%b\r\n" % (len(whole), whole[: len(whole)])
                if cut_after == len(whole)
                else head + b"%x\r\n%b" % (len(whole), whole[:cut_after])
            )
        else:
            rest = _from(after)
            writer.write(head + (b"%x\r\n%b\r\n" % (len(rest), rest) if rest else b"") + b"0\r\n\r\n")
        writer.close()

    def _from(after: int) -> bytes:
        offset, found = 0, b""
        for stream, data in frames:
            if stream == 3:
                if after < 20:
                    found += bytes([3, 0, 0, 0]) + len(data).to_bytes(4, "big") + data
                offset = 20
                continue
            part = data[max(0, after - offset) :]
            offset += len(data)
            if part:
                found += bytes([stream, 0, 0, 0]) + len(part).to_bytes(4, "big") + part
        return found

    path = host_dir / "breaks.sock"
    async with await asyncio.start_unix_server(serve, path), Client(f"unix://{path}") as client:
        for cut_after in range(len(whole) + 1):
            asked.clear()
            found = {1: b"", 2: b"", 3: b""}
            async for stream, data in await client.logs("0" * 64, follow=True):
                found[stream] += data
            assert len(asked) == 2
            assert (found[1], found[2]) == (b"firstthird", b"second"), (cut_after, asked)
