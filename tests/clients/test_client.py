"""The package's own client, against the real service: every method, over a unix socket."""

import asyncio
import contextlib
import hashlib
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from execgate import (
    Client,
    Conflict,
    ConsoleSize,
    ExecgateError,
    ExitSource,
    InvalidArgument,
    NotFound,
    OnDisconnect,
    Output,
    SessionState,
    StartFailed,
    Unauthenticated,
    Unavailable,
)
from support.access import allow
from support.runtimes import TestContainer
from support.service import Service
from support.tty import tell_size, tell_size_in_shell

pytestmark = pytest.mark.usefixtures("no_leaks")

ECHO_LINES = ("sh", "-c", 'while read line; do echo "<$line>"; done; echo over')


@pytest.fixture
async def client(service: Service) -> AsyncIterator[Client]:
    async with Client(service.host) as client:
        yield client


async def collected(output: Output) -> tuple[bytes, bytes]:
    """Everything up to the end, stdout and stderr."""
    found = {1: b"", 2: b""}
    async with asyncio.timeout(60):
        async for stream, data in output:
            found[stream] += data
    return found[1], found[2]


async def until(output: Output, text: bytes) -> bytes:
    """Everything up to a piece after which `text` has been seen."""
    seen = b""
    async with asyncio.timeout(60):
        async for _, data in output:
            seen += data
            if text in seen:
                return seen
    raise AssertionError(f"no {text!r} in {seen!r}")


async def test_containers(client: Client, container: TestContainer) -> None:
    (one,) = [one for one in await client.containers() if one.id == container.id]
    assert (one.name, one.state, one.pid) == (container.id, "running", container.init_pid)
    assert one.args[0] == "/bin/sh"


async def test_run(client: Client, container: TestContainer) -> None:
    stdin = bytes(range(256)) * 100
    answer = await client.run(container.id, ["sh", "-c", "cat; echo err >&2; exit 3"], stdin=stdin)
    assert (answer.exit_code, answer.stdout, answer.stderr) == (3, stdin, b"err\n")
    assert (answer.timed_out, answer.truncated, answer.error) == (False, False, "")
    assert answer.started_at <= answer.finished_at
    session = await client.inspect(answer.id)
    assert session.exit is not None
    assert (session.exit.code, session.state, session.running) == (3, SessionState.STOPPED, False)
    assert (session.transferred.stdin, session.transferred.stdout, session.transferred.stderr) == (len(stdin),) * 2 + (
        4,
    )


async def test_run_with_everything(client: Client, container: TestContainer) -> None:
    script = 'echo "$A $B"; pwd; id -u; tty >/dev/null && echo terminal'
    answer = await client.run(
        container.id, ["sh", "-c", script], env=["A=1", "B=two"], working_dir="/tmp", user="1000", tty=True
    )
    assert answer.stdout.split(b"\r\n") == [b"1 two", b"/tmp", b"1000", b"terminal", b""]


async def test_run_out_of_time(client: Client, container: TestContainer) -> None:
    answer = await client.run(container.id, ["sh", "-c", "echo begun; exec sleep 2147"], timeout=0.5)
    assert (answer.exit_code, answer.timed_out, answer.stdout) == (143, True, b"begun\n")


async def test_run_more_than_was_asked_for(client: Client, container: TestContainer) -> None:
    answer = await client.run(container.id, ["seq", "100000"], limit=10)
    assert (answer.stdout, answer.truncated, answer.exit_code) == (b"1\n2\n3\n4\n5\n", True, 0)


@pytest.mark.parametrize(("argv", "code"), [(["nosuch"], 127), (["/etc/passwd"], 126)])
async def test_run_what_cannot_be_run(client: Client, container: TestContainer, argv: list[str], code: int) -> None:
    answer = await client.run(container.id, argv)
    assert answer.exit_code == code
    assert "OCI runtime exec failed" in answer.error


async def test_a_cancelled_run_leaves_nothing(client: Client, container: TestContainer) -> None:
    running = asyncio.create_task(client.run(container.id, ["sleep", "2148"], labels={"test": "cancelled"}))
    (session,) = await appeared(client, "cancelled")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    with contextlib.suppress(NotFound):  # it is killed and forgotten
        assert (await client.wait(session)).exit_code == 137
    assert ["sleep", "2148"] not in container.processes().values()


async def appeared(client: Client, test: str) -> Sequence[str]:
    """The running sessions with the label `test`, once there are any: another request makes them."""
    async with asyncio.timeout(60):
        while True:
            found = await client.sessions(states=[SessionState.RUNNING], labels={"test": test})
            if running := [one.id for one in found if one.pid]:
                return running
            await asyncio.sleep(0.02)


async def test_a_conversation(client: Client, container: TestContainer) -> None:
    session_id = await client.create(container.id, ECHO_LINES, attach_stdin=True)
    async with await client.start(session_id) as stream:
        for word in (b"one", b"two"):
            await stream.write(word + b"\n")
            assert await until(stream, b">\n") == b"<%s>\n" % word
        await stream.write_eof()
        assert await collected(stream) == (b"over\n", b"")
        await stream.write(b"to nobody")
        await stream.write_eof()
    assert (await client.wait(session_id)).exit_code == 0


async def test_much_in_both_directions(client: Client, container: TestContainer) -> None:
    data = hashlib.sha256(b"seed").digest() * 100_000
    session_id = await client.create(container.id, ["cat"], attach_stdin=True)
    async with await client.start(session_id) as stream:

        async def feed() -> None:
            await stream.write(data)
            await stream.write_eof()

        feeding = asyncio.create_task(feed())
        stdout, _ = await collected(stream)
        await feeding
    assert stdout == data


async def test_both_streams(client: Client, container: TestContainer) -> None:
    session_id = await client.create(container.id, ["sh", "-c", "echo out; echo err >&2; exit 9"])
    assert await collected(await client.start(session_id)) == (b"out\n", b"err\n")
    end = await client.wait(session_id)
    assert (end.exit_code, end.timed_out, end.error) == (9, False, "")


async def test_one_stream_of_two(client: Client, container: TestContainer) -> None:
    session_id = await client.create(container.id, ["sh", "-c", "echo out; echo err >&2"], attach_stdout=False)
    assert await collected(await client.start(session_id)) == (b"", b"err\n")


async def test_a_terminal(client: Client, container: TestContainer) -> None:
    script = f"{tell_size_in_shell(container)}; read x; stty size; echo [$x]; exit 5"
    session_id = await client.create(container.id, ["sh", "-c", script], tty=True, attach_stdin=True)
    async with await client.start(session_id, size=ConsoleSize(30, 100)) as stream:
        await until(stream, b"30 100\r\n")
        await stream.resize(40, 120)
        await stream.write(b"typed\r")
        assert b"40 120\r\n[typed]\r\n" in await until(stream, b"]\r\n")
        assert await collected(stream) == (b"", b"")
        with pytest.raises(Conflict):
            await stream.resize(1, 1)
    assert (await client.wait(session_id)).exit_code == 5


async def test_a_size_before_the_start(client: Client, container: TestContainer) -> None:
    session_id = await client.create(container.id, tell_size(container), tty=True, attach_stdin=True)
    await client.resize(session_id, 11, 22)
    assert await collected(await client.start(session_id)) == (b"11 22\r\n", b"")


async def test_detach_keys(client: Client, container: TestContainer) -> None:
    session_id = await client.create(
        container.id, ["cat"], tty=True, attach_stdin=True, detach_keys=b"\x18x", on_disconnect=OnDisconnect.KEEP
    )
    async with await client.start(session_id) as stream:
        await stream.write(b"\x18x")
        await collected(stream)
    assert (await client.inspect(session_id)).running
    async with await client.attach(session_id) as stream:
        await stream.write(b"again\r")
        assert b"again" in await until(stream, b"again")
    await client.remove(session_id, force=True)


async def test_no_detach_keys(client: Client, container: TestContainer) -> None:
    script = "stty raw -echo; echo ready; head -c 2 | od -An -tx1"
    session_id = await client.create(container.id, ["sh", "-c", script], tty=True, attach_stdin=True, detach_keys=b"")
    async with await client.start(session_id) as stream:
        await until(stream, b"ready")
        await stream.write(b"\x10\x11")
        assert b"10 11" in (await collected(stream))[0]


async def test_detached(client: Client, container: TestContainer) -> None:
    session_id = await client.create(container.id, ["sleep", "2149"])
    assert (await client.inspect(session_id)).state is SessionState.CREATED
    await client.start_detached(session_id)
    session = await client.inspect(session_id)
    assert session.state is SessionState.RUNNING
    assert session.pid > 0
    assert session.container_pid > 0
    assert session.started_at is not None
    assert session.finished_at is None
    with pytest.raises(Conflict):
        await client.start_detached(session_id)
    with pytest.raises(Conflict):
        await client.start(session_id)
    with pytest.raises(Conflict):
        await client.remove(session_id)
    await client.kill(session_id)
    session = await client.inspect(session_id)
    assert session.exit is not None
    assert session.exit.code == 137
    assert session.finished_at is not None
    with pytest.raises(Conflict):
        await client.kill(session_id)
    await client.remove(session_id)
    with pytest.raises(NotFound):
        await client.inspect(session_id)


@pytest.mark.parametrize(("argv", "code"), [(["nosuch"], 127), (["/etc/passwd"], 126)])
async def test_a_detached_start_that_fails(
    client: Client, container: TestContainer, argv: list[str], code: int
) -> None:
    session_id = await client.create(container.id, argv)
    with pytest.raises(StartFailed, match="OCI runtime exec failed") as failure:
        await client.start_detached(session_id)
    assert failure.value.exit_code == code


async def test_an_attached_start_that_fails(client: Client, container: TestContainer) -> None:
    session_id = await client.create(container.id, ["nosuch"])
    _, stderr = await collected(await client.start(session_id))
    assert b"nosuch" in stderr
    end = await client.wait(session_id)
    assert end.exit_code == 127
    assert "nosuch" in end.error
    session = await client.inspect(session_id)
    assert session.exit is not None
    assert session.exit.source is ExitSource.START_FAILURE


async def test_signals_and_stop(client: Client, container: TestContainer) -> None:
    script = "trap 'echo usr' USR1; trap 'exit 7' TERM; echo ready; while :; do sleep 2147 & wait $!; kill $!; done"
    session_id = await client.create(container.id, ["sh", "-c", script])
    async with await client.start(session_id) as stream:
        await until(stream, b"ready")
        await client.kill(session_id, "USR1")
        await until(stream, b"usr")
        await client.stop(session_id, 30)
        await collected(stream)
    assert (await client.wait(session_id)).exit_code == 7
    with pytest.raises(InvalidArgument, match="NOSUCH"):
        await client.kill(session_id, "NOSUCH")


async def test_sessions(client: Client, container: TestContainer) -> None:
    first = await client.create(container.id, ["true"], labels={"list": "a", "x": "y"}, timeout=77.5, user="app")
    second = await client.create(container.id, ["true"], labels={"list": "b"}, capture_stderr=True)
    every = await client.sessions(containers=[container.id], labels={"list": None})
    assert [one.id for one in every] == [first, second]
    (one,) = await client.sessions(labels={"list": "a", "x": "y"}, states=[SessionState.CREATED])
    assert (one.id, one.container_id, one.timeout, one.user) == (first, container.id, 77.5, "app")
    assert one.labels == {"list": "a", "x": "y"}
    assert not any((one.capture_stdout, one.tty, one.privileged, one.attach_stdin))
    assert every[1].capture_stderr
    assert await client.sessions(labels={"list": "a"}, states=[SessionState.STOPPED]) == []
    for session_id in (first, second):
        await client.remove(session_id)


async def test_what_is_captured_is_there_for_all(client: Client, container: TestContainer) -> None:
    script = "echo one; echo two >&2; read x; echo three"
    session_id = await client.create(
        container.id,
        ["sh", "-c", script],
        attach_stdin=True,
        capture_stdout=True,
        capture_stderr=True,
        on_disconnect=OnDisconnect.KEEP,
    )
    async with await client.start(session_id) as stream:
        await until(stream, b"two\n")
    async with await client.logs(session_id, follow=True) as following:
        assert sorted((await until(following, b"two\n")).split()) == [b"one", b"two"]
        async with await client.attach(session_id, after=2) as late:
            assert late.offset == 2
            await client.write_stdin(session_id, b"go on\n", eof=True)
            stdout, stderr = await collected(late)
        assert len(stdout + stderr) == len("one\ntwo\nthree\n") - 2
        assert await collected(following) == (b"three\n", b"")
    assert await collected(await client.logs(session_id)) == (b"one\nthree\n", b"two\n")
    async with await client.logs(session_id, after=8) as rest:
        assert rest.offset == 8
        assert await collected(rest) == (b"three\n", b"")
    assert await collected(await client.attach(session_id, after=8)) == (b"three\n", b"")
    with pytest.raises(InvalidArgument, match="14 bytes"):
        await client.logs(session_id, after=15)
    with pytest.raises(Conflict):
        await client.write_stdin(session_id, b"too late")
    await client.remove(session_id)


async def test_leaving_a_replay_of_the_past(client: Client, container: TestContainer) -> None:
    """The session is over, so nothing follows from the client's absence."""
    session_id = await client.create(container.id, ["seq", "400000"], capture_stdout=True)
    await client.start_detached(session_id)
    await client.wait(session_id)
    async with await client.attach(session_id, after=0) as stream:
        await until(stream, b"1\n")
    async with await client.attach(session_id, after=0) as stream:
        stdout, _ = await collected(stream)
    assert stdout == b"".join(b"%d\n" % number for number in range(1, 400_001))
    await client.remove(session_id)


async def test_leaving_kills_where_that_was_wanted(client: Client, container: TestContainer) -> None:
    session_id = await client.create(
        container.id, ["sh", "-c", "echo here; sleep 2147"], on_disconnect=OnDisconnect.KILL
    )
    async with await client.start(session_id) as stream:
        await until(stream, b"here")
    assert (await client.wait(session_id)).exit_code == 137


async def test_a_piece_is_not_lost_between_two_loops(client: Client, container: TestContainer) -> None:
    script = "for i in 1 2 3 4 5 6 7 8 9; do echo out; echo err >&2; done"
    session_id = await client.create(container.id, ["sh", "-c", script])
    seen: dict[int, bytes] = {1: b"", 2: b""}
    async with await client.start(session_id) as stream:
        while len(seen[1]) + len(seen[2]) < 18 * 4:
            async for number, data in stream:
                seen[number] += data
                break
    assert seen == {1: b"out\n" * 9, 2: b"err\n" * 9}


@pytest.mark.parametrize(
    ("container_ref", "error"), [("nosuch", NotFound), ("no/such?x=y", NotFound), ("", ExecgateError)]
)
async def test_no_such_container(client: Client, container_ref: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        await client.create(container_ref, ["true"])


async def test_no_such_session(client: Client) -> None:
    calls = (client.inspect, client.start, client.attach, client.logs, client.kill, client.stop, client.wait)
    for call in (*calls, client.remove, client.start_detached):
        for session_id in ("0" * 64, "nosuch", "../../version"):
            with pytest.raises(NotFound):
                await call(session_id)


async def test_mistakes(client: Client, container: TestContainer) -> None:
    with pytest.raises(InvalidArgument, match="is a string"):
        await client.create(container.id, "ls -l")
    with pytest.raises(InvalidArgument, match="No exec command"):
        await client.create(container.id, [])
    with pytest.raises(InvalidArgument):
        await client.create(container.id, ["\udcff"])
    with pytest.raises(TypeError):
        await client.create(container.id, ["true"], nosuch=1)  # type: ignore[call-arg]
    with pytest.raises(Conflict, match="not captured"):
        await client.logs((await client.run(container.id, ["true"])).id)


async def test_over_tcp(new_service: Callable[..., Service], host_dir: Path, runc_container: TestContainer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    directory = host_dir / "client-tcp"
    token = allow(directory, "t", ["token:t"])["Authorization"].removeprefix("Bearer ")
    service = new_service(directory, flags=[f"--listen=tcp://127.0.0.1:{port}"])
    try:
        async with Client(f"tcp://127.0.0.1:{port}") as nobody:
            with pytest.raises(Unauthenticated, match="bearer token is needed"):
                await nobody.run(runc_container.id, ["true"])
        async with Client(f"tcp://127.0.0.1:{port}", token=token) as client:
            assert (await client.run(runc_container.id, ["echo", "hi"])).stdout == b"hi\n"
            session_id = await client.create(runc_container.id, ["cat"], attach_stdin=True)
            async with await client.start(session_id) as stream:
                await stream.write(b"through")
                await stream.write_eof()
                assert await collected(stream) == (b"through", b"")
    finally:
        service.stop()


@pytest.mark.parametrize("host", ["", "/run/execgate.sock", "unix://", "tcp://nowhere", "tcp://a:b", "http://a:1"])
def test_hosts_that_are_none(host: str) -> None:
    with pytest.raises(InvalidArgument):
        Client(host)


async def test_nobody_there(tmp_path: Path) -> None:
    async with Client(f"unix://{tmp_path}/nosuch.sock") as client:
        with pytest.raises(Unavailable, match=r"nosuch\.sock: No such file"):
            await client.containers()
        with pytest.raises(Unavailable, match=r"nosuch\.sock: No such file"):
            await client.start("0" * 64)


async def test_somebody_else_there(host_dir: Path) -> None:
    async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 smtp.example.org ready\r\n\r\n")
        writer.close()

    path = host_dir / "smtp.sock"
    async with await asyncio.start_unix_server(hang_up, path), Client(f"unix://{path}") as client:
        with pytest.raises(ExecgateError):
            await client.containers()
        with pytest.raises(ExecgateError):
            await client.start("0" * 64)


async def test_a_connection_that_breaks_within_a_frame(host_dir: Path) -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.multiplexed-stream\r\n\r\n")
        writer.write(b"\1\0\0\0\0\0\0\5abc")
        writer.close()

    path = host_dir / "cut.sock"
    async with await asyncio.start_unix_server(cut, path), Client(f"unix://{path}") as client:
        stream = await client.start("0" * 64)
        assert await anext(stream) == (1, b"abc")
        with pytest.raises(Unavailable, match="broke"):
            await anext(stream)
