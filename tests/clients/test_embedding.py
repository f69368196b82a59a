"""The engine within an asyncio program: the documented example, and what it does not show."""

import asyncio
import contextlib
import importlib.util
import itertools
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from execgate import (
    Config,
    Conflict,
    ConsoleSize,
    Engine,
    InvalidArgument,
    LocalStream,
    NotFound,
    OnDisconnect,
    SessionState,
    StartFailed,
    Unavailable,
    open_engine,
)
from execgate.sessions.local import QUEUE_LIMIT
from support.runtimes import RuntimeHost, TestContainer

EXAMPLE = Path(__file__).parents[2] / "docs/examples/embed.py"
_SERIAL = itertools.count(1)


@pytest.fixture
def config(host_dir: Path, hosts: list[RuntimeHost]) -> Iterator[Config]:
    directory = host_dir / f"engine-{next(_SERIAL)}"
    yield Config(
        state_dir=directory,
        runtime_roots=[f"{host.name}={host.root}" for host in hosts],
        runtimes={host.name: host.program for host in hosts},
    )
    # Whatever ran has ended, and is cleared away.
    assert not list((directory / "sessions").iterdir())
    shutil.rmtree(directory)


@pytest.fixture
async def engine(config: Config) -> AsyncIterator[Engine]:
    async with open_engine(config) as engine:
        yield engine
        for session in engine.sessions.list():
            await engine.remove(session.id, force=True)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def collected(stream: LocalStream) -> tuple[bytes, bytes]:
    found = {1: b"", 2: b""}
    async with asyncio.timeout(60):
        async for number, data in stream:
            found[number] += data
    return found[1], found[2]


async def until(stream: LocalStream, text: bytes) -> bytes:
    seen = b""
    async with asyncio.timeout(60):
        async for _, data in stream:
            seen += data
            if text in seen:
                return seen
    raise AssertionError(f"no {text!r} in {seen!r}")


@pytest.fixture
def example() -> Any:
    """The example as a module."""
    found = importlib.util.spec_from_file_location("embed", EXAMPLE)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


async def test_the_example(
    example: Any, config: Config, container: TestContainer, capsys: pytest.CaptureFixture[str]
) -> None:
    async with open_engine(config) as engine:
        for part in ("run_with_a_timeout", "drive_a_terminal", "leave_and_come_back", "hand_over_a_descriptor"):
            await getattr(example, part)(engine, container.id)
        await example.follow_a_window(engine, container.id)
        await example.fail(engine, container.id)
        assert not engine.sessions.live
    assert capsys.readouterr().out.splitlines() == [
        "run: exit code 3, stdout b'SHOUT\\n'",
        "run: timed out: True, exit code 143, stdout b'begun\\n'",
        "terminal: it knows its size: True",
        "terminal: exit code 7",
        "captured: b'line 1\\nline 2\\nline 3\\nanswer 42\\n'",
        "descriptor: b'through a pipe of yours\\n'",
        "window: [b'40', b'120']",
        "failure: 127",
    ]


async def test_the_example_as_a_program(example: Any, config: Config, runc_container: TestContainer) -> None:
    """Its own `main`, with its own configuration."""
    await example.main(runc_container.id, str(config.state_dir), f"runc={runc_container.host.root}")


async def test_a_conversation(engine: Engine, container: TestContainer) -> None:
    script = 'while read line; do echo "<$line>"; echo err >&2; done; exit 4'
    session = await engine.create(container.id, ["sh", "-c", script], attach_stdin=True)
    async with await engine.start(session.id) as stream:
        await stream.write(b"one\n")
        await until(stream, b"<one>\n")
        await stream.write_eof()
        await stream.write(b"to nobody")
        assert (await collected(stream))[0] == b""
        assert (await stream.wait()).exit is not None
    ended = await engine.wait(session.id)
    assert ended.exit is not None
    assert (ended.exit.code, ended.transferred.stdin, ended.transferred.stderr) == (4, 4, 4)


async def test_much_in_both_directions_and_a_reader_that_pauses(engine: Engine, container: TestContainer) -> None:
    data = os.urandom(5_000_000)
    session = await engine.create(container.id, ["cat"], attach_stdin=True)
    async with await engine.start(session.id) as stream:
        writing = asyncio.create_task(stream.write(data))
        number, first = await anext(stream)
        assert number == 1
        # The process cannot go on without its reader: what was written so far is far from all of it.
        assert engine.sessions.transferred(engine.inspect(session.id)).stdout < len(data)
        assert stream._output.size <= 2 * QUEUE_LIMIT
        ending = asyncio.create_task(_eof_after(writing, stream))
        rest, _ = await collected(stream)
        await ending
    assert first + rest == data


async def _eof_after(writing: "asyncio.Task[None]", stream: LocalStream) -> None:
    await writing
    await stream.write_eof()


async def test_starts_that_fail(engine: Engine, container: TestContainer) -> None:
    session = await engine.create(container.id, ["nosuch"])
    with pytest.raises(StartFailed, match="nosuch") as failure:
        await engine.start(session.id)
    assert failure.value.exit_code == 127
    with pytest.raises(Conflict, match="has already run"):
        await engine.start(session.id)
    with pytest.raises(NotFound):
        await engine.start("0" * 64)
    with pytest.raises(InvalidArgument):
        await engine.create(container.id, "a string")


async def test_leaving(engine: Engine, container: TestContainer) -> None:
    for policy, code in ((OnDisconnect.KILL, 137), (OnDisconnect.HUP, 129)):
        session = await engine.create(container.id, ["sh", "-c", "echo here; exec sleep 2147"], on_disconnect=policy)
        async with await engine.start(session.id) as stream:
            await until(stream, b"here")
        ended = await engine.wait(session.id)
        assert ended.exit is not None
        assert ended.exit.code == code


async def test_several_watchers(engine: Engine, container: TestContainer) -> None:
    script = "echo ready; read line; seq 1 20000"
    session = await engine.create(
        container.id, ["sh", "-c", script], attach_stdin=True, capture_stdout=True, on_disconnect=OnDisconnect.KEEP
    )
    async with await engine.start(session.id) as first:
        await until(first, b"ready\n")
        watchers = [await engine.attach(session.id, after=0, stdin=False) for _ in range(3)]
        late = await engine.attach(session.id)
        assert [one.offset for one in (*watchers, late)] == [0, 0, 0, 6]
        await late.write(b"go\n")
        texts = await asyncio.gather(*(collected(one) for one in (first, *watchers, late)))
    expected = b"".join(b"%d\n" % number for number in range(1, 20_001))
    assert [stdout.removeprefix(b"ready\n") for stdout, _ in texts] == [expected] * 5


async def test_a_watcher_that_is_too_slow_is_told(engine: Engine, container: TestContainer) -> None:
    """Without capture only so much is remembered; the first client sees everything."""
    session = await engine.create(container.id, ["sh", "-c", "echo ready; read line; seq 1 1000000"], attach_stdin=True)
    async with await engine.start(session.id) as first:
        await until(first, b"ready\n")
        slow = await engine.attach(session.id, stdin=False)
        await first.write(b"go\n")
        stdout, _ = await collected(first)
        assert stdout == b"".join(b"%d\n" % number for number in range(1, 1_000_001))
        with pytest.raises(Unavailable, match="too slowly"):
            await collected(slow)


async def test_sizes_while_it_runs(engine: Engine, container: TestContainer) -> None:
    asked: asyncio.Queue[ConsoleSize] = asyncio.Queue()

    async def sizes() -> AsyncIterator[ConsoleSize]:
        while True:
            yield await asked.get()

    session = await engine.create(container.id, ["sh"], tty=True, attach_stdin=True, env=["PS1=> "])
    async with await engine.start(session.id, sizes=sizes()) as stream:
        await until(stream, b"> ")
        for size in (ConsoleSize(20, 40), ConsoleSize(30, 60)):
            await asked.put(size)
            wanted = f"{size.height} {size.width}"
            await stream.write(
                f'until [ "$(stty size)" = "{wanted}" ]; do sleep 0.05; done; echo now $(stty size)\n'.encode()
            )
            await until(stream, f"now {wanted}\r\n".encode())
        await stream.write(b"exit\n")
        await collected(stream)


async def test_a_run_that_is_cancelled_leaves_nothing(engine: Engine, container: TestContainer) -> None:
    running = asyncio.create_task(engine.run(container.id, ["sleep", "2150"]))
    async with asyncio.timeout(60):
        while not any(one.state is SessionState.RUNNING for one in engine.sessions.list(container.id)):
            await asyncio.sleep(0.02)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert engine.sessions.list(container.id) == []
    assert ["sleep", "2150"] not in container.processes().values()


async def test_a_start_that_is_cancelled_is_a_client_that_left(engine: Engine, container: TestContainer) -> None:
    session = await engine.create(container.id, ["sleep", "2151"], on_disconnect=OnDisconnect.KILL)
    starting = asyncio.create_task(engine.start(session.id))
    while engine.inspect(session.id).state is SessionState.CREATED:
        await asyncio.sleep(0)
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await (await starting).close()
    async with asyncio.timeout(60):
        ended = await engine.wait(session.id)
    assert ended.exit is not None
    assert ended.exit.code in (128, 137)  # before it ran, or after


async def test_processes_outlive_the_engine(config: Config, container: TestContainer) -> None:
    async with open_engine(config) as engine:
        session = await engine.create(
            container.id,
            ["sh", "-c", "echo one; exec sleep 2147"],
            capture_stdout=True,
            on_disconnect=OnDisconnect.KEEP,
        )
        stream = await engine.start(session.id)
        await until(stream, b"one\n")
    with pytest.raises(Unavailable, match="lives on"):
        await anext(stream)
    async with open_engine(config) as engine:
        assert engine.inspect(session.id).state is SessionState.RUNNING
        async with await engine.attach(session.id, after=0) as stream:
            assert await until(stream, b"one\n") == b"one\n"
            await engine.kill(session.id)
            await collected(stream)
        await engine.remove(session.id)


async def test_a_state_directory_has_one_engine(config: Config, engine: Engine) -> None:
    with pytest.raises(Conflict, match="belongs to another running execgate"):
        async with open_engine(config):
            pass


def test_the_names_of_the_package() -> None:
    import execgate

    assert execgate.__all__ == sorted(execgate.__all__)
    assert set(execgate.__all__) <= set(dir(execgate))
    for name in execgate.__all__:
        assert getattr(execgate, name).__name__ == name
    with pytest.raises(AttributeError, match="nosuch"):
        _ = execgate.nosuch  # type: ignore[attr-defined]
