"""The gate of starts: so many at once, so many waiting for their turn, and a clear no to the rest."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from execgate.model.errors import Exhausted


class Turn:
    """One start's turn. It ends with the `async with`, or with what it was given to wait for."""

    def __init__(self) -> None:
        self.until: asyncio.Future[Any] | None = None


class StartGate:
    """Lets `parallel` starts go on at once and `queued` wait."""

    def __init__(self, parallel: int, queued: int) -> None:
        self._free = asyncio.Semaphore(parallel)
        self.active = 0
        """How many starts go on."""
        self._queued = queued
        self._waiting = 0
        self._closed = False

    def close(self) -> None:
        """Give out no more turns: whoever waits for one, waits."""
        self._closed = True

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Turn]:
        """Wait for a turn. Exhausted when too many wait already."""
        if self._free.locked() and self._waiting >= self._queued:
            raise Exhausted(f"{self._waiting} starts are waiting already; try again later", hint="raise queued_starts")
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        if self._closed:
            await asyncio.get_running_loop().create_future()
        turn = Turn()
        self.active += 1
        try:
            yield turn
        finally:
            if turn.until is None:
                self._end()
            else:
                turn.until.add_done_callback(lambda _: self._end())

    def _end(self) -> None:
        self.active -= 1
        self._free.release()
