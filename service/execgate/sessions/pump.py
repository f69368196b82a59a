"""Moving one session's bytes between its process and its client.

The theory. Each direction is a loop that holds one chunk at a time: it takes no second one before the first is
accepted, so a slow client slows the process and a slow process slows the client, and nothing grows.

- The client's end of input closes the process's stdin. It says nothing about the output.
- The client's *absence* (its connection broke) also closes stdin, because nobody will ever write again; the output
  is then read and thrown away, so that the process goes on as if somebody listened. It is never killed for it.
- The detach keys end the client's part in the same way, but leave stdin as it is.
- The outputs end by themselves when all writers have closed. A background child may keep them open for ever: once
  the process itself has ended they get `drain` more seconds, then what is buffered is delivered and that is all.
"""

import asyncio
from enum import Enum
from typing import Any, Protocol

from execgate.runtime.streams import ExecStreams, Input, InputClosed, Output
from execgate.wire.detach_keys import DetachFilter


class ClientGone(Exception):
    """The client's connection broke. The session does not mind."""


class Client(Protocol):
    """The far side of an attached session. A hijacked connection is one."""

    async def send(self, stream: int, data: bytes) -> None:
        """Accept output (1 stdout, 2 stderr), waiting until there is room; ClientGone."""

    async def receive(self) -> bytes:
        """Return input, b"" for its end; ClientGone."""


class Departure(Enum):
    """Why a client left before the end."""

    DETACHED = "the detach keys were typed"
    GONE = "the connection broke"


class Pump:
    """One session's streams and their client, until all output is delivered."""

    def __init__(self, streams: ExecStreams, client: Client | None, *, detach_keys: bytes, tty: bool) -> None:
        self._streams = streams
        self._client = client
        self._filter = DetachFilter(detach_keys if tty else b"")
        self._feeding: asyncio.Task[None] | None = None
        self.departure: asyncio.Future[Departure] = asyncio.get_running_loop().create_future()
        """Settled when the client leaves early; it is told nothing from then on."""

    async def run(self, exited: asyncio.Future[Any], drain: float) -> None:
        """Pump until the process has ended and every output too, at most `drain` seconds after `exited` is done."""
        self._feeding = asyncio.ensure_future(self._feed())
        tasks = [asyncio.ensure_future(self._forward(output)) for output in self._streams.outputs]
        cut: asyncio.TimerHandle | None = None

        def arm(_exited: asyncio.Future[Any]) -> None:
            nonlocal cut
            cut = asyncio.get_running_loop().call_later(drain, self._cut)

        exited.add_done_callback(arm)
        try:
            await asyncio.gather(*tasks)
            if not exited.done():
                await asyncio.wait([exited])
        finally:
            exited.remove_done_callback(arm)
            if cut is not None:
                cut.cancel()
            for task in (helpers := [*tasks, self._feeding]):
                task.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)

    async def _forward(self, output: Output) -> None:
        while (chunk := await output.read()) is not None:
            if self._client is not None:
                try:
                    await self._client.send(*chunk)
                except ClientGone:
                    self._leave(Departure.GONE)
                    if self._feeding is not None:
                        self._feeding.cancel()

    def _cut(self) -> None:
        for output in self._streams.outputs:
            output.cut()

    async def _feed(self) -> None:
        """Carry the client's input to the process, then the end of it."""
        if self._client is None:
            return
        try:
            await self._carry_input(self._client)
        except _Detached:
            self._leave(Departure.DETACHED)
            return  # stdin stays open: the process does not notice
        except ClientGone:
            self._leave(Departure.GONE)
        except asyncio.CancelledError:
            self._close_stdin()
            raise
        self._close_stdin()

    async def _carry_input(self, client: Client) -> None:
        """Read the client to its end. What no process reads is thrown away: the client must not be blocked."""
        stdin = self._streams.input
        while data := await client.receive():
            data, detach = self._filter.feed(data)
            stdin = await _write(stdin, data)
            if detach:
                raise _Detached
        await _write(stdin, self._filter.flush())

    def _close_stdin(self) -> None:
        if self._streams.input is not None:
            self._streams.input.close()

    def _leave(self, departure: Departure) -> None:
        self._client = None
        if not self.departure.done():
            self.departure.set_result(departure)


class _Detached(Exception):
    """The detach keys were typed."""


async def _write(stdin: Input | None, data: bytes) -> Input | None:
    """Write to stdin while there is one; return None once there is none any more."""
    if stdin is None or not data:
        return stdin
    try:
        await stdin.write(data)
    except InputClosed:
        return None
    return stdin
