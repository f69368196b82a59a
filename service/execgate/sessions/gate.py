"""The gate of starts: so many at once, so many waiting for their turn, and a clear no to the rest.

A container can make its starts last until they are given up: the runtimes open its passwd file, and that may be a FIFO.
So no container has more than a part of the turns, and the others go on.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from execgate.model.errors import Exhausted
from execgate.model.ids import ContainerId

_PART = 4
"""One container has at most one turn of so many, and at least one."""


class Turn:
    """One start's turn. It ends with the `async with`, or with what it was given to wait for."""

    def __init__(self) -> None:
        self.until: asyncio.Future[Any] | None = None


class _Share:
    """What one container has of the turns, while any start of it goes on or waits."""

    def __init__(self, size: int) -> None:
        self.free = asyncio.Semaphore(size)
        self.starts = 0


class StartGate:
    """Lets `parallel` starts go on at once, a quarter of them in one container, and `queued` wait."""

    def __init__(self, parallel: int, queued: int) -> None:
        self._free = asyncio.Semaphore(parallel)
        self._share = max(1, parallel // _PART)
        self._shares: dict[ContainerId, _Share] = {}
        self.active = 0
        """How many starts go on."""
        self._queued = queued
        self._waiting = 0
        self._closed = False

    def close(self) -> None:
        """Give out no more turns: whoever waits for one, waits."""
        self._closed = True

    @asynccontextmanager
    async def turn(self, container: ContainerId | None = None) -> AsyncIterator[Turn]:
        """Wait for a turn; None: for no container in particular. Exhausted when too many wait already."""
        share = self._shares.get(container) if container is not None else None
        full = self._free.locked() or (share is not None and share.free.locked())
        if full and self._waiting >= self._queued:
            raise Exhausted(f"{self._waiting} starts are waiting already; try again later", hint="raise queued_starts")
        self._waiting += 1
        try:
            await self._begin(container)
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
                self._end(container)
            else:
                turn.until.add_done_callback(lambda _: self._end(container))

    async def _begin(self, container: ContainerId | None) -> None:
        """Wait for a turn: first within the container, then among all."""
        if container is None:
            await self._free.acquire()
            return
        share = self._shares.setdefault(container, _Share(self._share))
        share.starts += 1
        try:
            await share.free.acquire()
            try:
                await self._free.acquire()
            except BaseException:
                share.free.release()
                raise
        except BaseException:
            self._forget(container)
            raise

    def _end(self, container: ContainerId | None) -> None:
        self.active -= 1
        self._free.release()
        if container is not None:
            self._shares[container].free.release()
            self._forget(container)

    def _forget(self, container: ContainerId) -> None:
        """Take note that a start of a container is over."""
        self._shares[container].starts -= 1
        if not self._shares[container].starts:
            del self._shares[container]
