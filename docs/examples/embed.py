"""An asyncio program with an engine of its own: no service, no socket, no HTTP. Run it as root::

    python embed.py CONTAINER [STATE_DIR [RUNTIME_ROOT ...]]

STATE_DIR (default /run/execgate-example) belongs to one program at a time; RUNTIME_ROOT is where the runtime keeps its
container states, `[RUNTIME=]DIR`, by default the usual places.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from execgate import Config, ConsoleSize, Engine, LocalStream, OnDisconnect, StartFailed, open_engine


async def run_with_a_timeout(engine: Engine, container: str) -> None:
    """One call, from start to end: what it wrote is kept even if its time is over."""
    result = await engine.run(container, ["sh", "-c", "tr a-z A-Z; exit 3"], stdin=b"shout\n", timeout=10)
    print(f"run: exit code {result.exit_code}, stdout {result.stdout!r}")

    result = await engine.run(container, ["sh", "-c", "echo begun; sleep 3600"], timeout=0.5)
    print(f"run: timed out: {result.timed_out}, exit code {result.exit_code}, stdout {result.stdout!r}")


async def drive_a_terminal(engine: Engine, container: str) -> None:
    """A shell in a terminal, with code in the place of the person."""
    session = await engine.create(container, ["sh"], tty=True, attach_stdin=True, env=["PS1=> "])
    async with await engine.start(session.id, size=ConsoleSize(24, 80)) as shell:
        await read_until(shell, b"> ")
        await shell.resize(50, 132)
        await shell.write(b"stty -echo; stty size\n")
        seen = await read_until(shell, b"50 132\r\n")
        print(f"terminal: it knows its size: {b'50 132' in seen}")
        await shell.write(b"exit 7\n")
        async for _ in shell:  # what is still to come, to the end
            pass
    ended = await engine.wait(session.id)
    print(f"terminal: exit code {ended.exit and ended.exit.code}")


async def leave_and_come_back(engine: Engine, container: str) -> None:
    """What is captured can be read from any offset, by anybody, at any time; the process does not mind."""
    script = "for i in 1 2 3; do echo line $i; done; read answer; echo answer $answer"
    session = await engine.create(
        container,
        ["sh", "-c", script],
        attach_stdin=True,
        capture_stdout=True,
        on_disconnect=OnDisconnect.KEEP,  # its stdin stays open while nobody is attached
    )
    async with await engine.start(session.id) as stream:
        seen = await read_until(stream, b"line 1\n")
    async with await engine.attach(session.id, after=len(seen)) as stream:
        await stream.write(b"42\n")
        async for _, data in stream:
            seen += data
    print(f"captured: {seen!r}")


async def hand_over_a_descriptor(engine: Engine, container: str) -> None:
    """The process gets it as number 3: a channel beside its standard streams."""
    read_end, write_end = os.pipe()
    session = await engine.create(container, ["sh", "-c", "echo through a pipe of yours >&3"])
    async with await engine.start(session.id, preserved=[write_end]):
        os.close(write_end)
        with os.fdopen(read_end, "rb") as pipe:
            print(f"descriptor: {await asyncio.to_thread(pipe.read)!r}")
        await engine.wait(session.id)


async def follow_a_window(engine: Engine, container: str) -> None:
    """Sizes of a terminal as an asynchronous iterator: from a window, from a browser, from another session."""

    async def sizes() -> AsyncIterator[ConsoleSize]:
        yield ConsoleSize(height=40, width=120)

    script = 'until [ "$(stty size)" = "40 120" ]; do sleep 0.05; done; stty size'
    result = await engine.run(container, ["sh", "-c", script], tty=True, sizes=sizes(), timeout=30)
    print(f"window: {result.stdout.split()[-2:]}")


async def fail(engine: Engine, container: str) -> None:
    """Failures have categories; a command that cannot be started is one, with its exit code."""
    session = await engine.create(container, ["no-such-command"])
    try:
        await engine.start_detached(session.id)
    except StartFailed as error:
        print(f"failure: {error.exit_code}")


async def read_until(stream: LocalStream, text: bytes) -> bytes:
    """Return what was written, up to the piece that completes `text`."""
    seen = b""
    async for _, data in stream:
        seen += data
        if text in seen:
            break
    return seen


async def main(container: str, state_dir: str = "/run/execgate-example", *runtime_roots: str) -> None:
    """Show everything once."""
    config = Config(state_dir=Path(state_dir), runtime_roots=list(runtime_roots))
    async with open_engine(config) as engine:
        await run_with_a_timeout(engine, container)
        await drive_a_terminal(engine, container)
        await leave_and_come_back(engine, container)
        await hand_over_a_descriptor(engine, container)
        await follow_a_window(engine, container)
        await fail(engine, container)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
