"""A client in this process: what a program holds of a session that it has started or attached to.

It stands where a hijacked connection stands for the service, and keeps the same bounds: output waits in a queue of
`QUEUE_LIMIT` bytes, and then the process waits; input waits in another, and then `write` does.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterable, Callable, Coroutine
from types import TracebackType
from typing import Any, Self

from execgate.model.config import ConsoleSize
from execgate.model.errors import Conflict, Unavailable
from execgate.model.ids import SessionId
from execgate.model.session import ExecSession
from execgate.sessions.manager import SessionManager
from execgate.sessions.pump import ClientGone

QUEUE_LIMIT = 256 * 1024
"""Bytes that wait in either direction before whoever sends more waits too."""


class LocalStream:
    """A session's output, piece by piece, and its input: `async for number, data in stream`.

    1 is stdout (and all output of a terminal), 2 is stderr. `offset` is where in the whole output this one begins.
    Whoever closes it before the end has left, which is what `OnDisconnect` speaks of. One task reads, one writes.
    """

    def __init__(self, manager: SessionManager, session_id: SessionId) -> None:
        self.session_id = session_id
        self.offset = 0
        self.served = asyncio.Event()
        """Set when the session has begun to serve this stream, or never will."""
        self._manager = manager
        self._output = _Queue()
        self._input = _Queue()
        self._over = asyncio.Event()
        self._left = False
        self._failure = ""
        self._serving: asyncio.Task[None] | None = None
        self._resizing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<LocalStream {self.session_id[:12]} output={self._output.size} input={self._input.size}>"

    # -- for the program ---------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, bytes]:
        piece = None if self._left else await self._output.get()
        if piece is None:
            await self.close()
            if self._failure:
                raise Unavailable(self._failure)
            raise StopAsyncIteration
        return piece

    async def write(self, data: bytes) -> None:
        """Send input, waiting for room. What the process will not read any more is dropped."""
        if data:
            with contextlib.suppress(ClientGone):
                await self._input.put(0, bytes(data))

    async def write_eof(self) -> None:
        """End the input. A terminal has no such end: there it is a key, Ctrl-D."""
        self._input.end()

    async def resize(self, height: int, width: int) -> None:
        """Set the terminal's size. Conflict once the session is over."""
        await self._manager.resize(self.session_id, ConsoleSize(height, width))

    async def wait(self) -> ExecSession:
        """Return the session once it is over. Output that nobody reads keeps the process from ending."""
        return await self._manager.wait(self.session_id)

    async def close(self) -> None:
        """Leave; after the end of the output there is nothing to leave. May be called again."""
        self._left = True
        self._shut()
        tasks = [task for task in (self._serving, self._resizing) if task is not None]
        self._serving = self._resizing = None
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    # -- for the engine ----------------------------------------------------------------------------------------------

    async def serve(self, serving: Coroutine[Any, Any, None], sizes: AsyncIterable[ConsoleSize] | None = None) -> None:
        """Let the session serve this stream, in a task of its own; return when it does. Raises what keeps it from it.

        The terminal takes on each of `sizes` as it comes.
        """
        self._serving = asyncio.create_task(serving, name=f"stream of exec {self.session_id[:12]}")
        self._serving.add_done_callback(lambda _: self._ended())
        if sizes is not None:
            self._resizing = asyncio.create_task(follow_sizes(self._manager, self.session_id, sizes))
        try:
            await self.served.wait()
            if self._serving.done():
                self._serving.result()
        except BaseException:
            self._serving.cancel()
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await self.close()
            raise

    async def take_over(self) -> "LocalStream":
        """Return the client of a start."""
        return self

    async def take_over_at(self, offset: int) -> "LocalStream":
        """Return the client of an attach."""
        self.offset = offset
        return self

    # -- sessions.live.AttachedClient --------------------------------------------------------------------------------

    async def send(self, stream: int, data: bytes) -> None:
        """See `pump.Client`."""
        await self._output.put(stream, data)

    async def receive(self) -> bytes:
        """See `pump.Client`."""
        self.served.set()
        piece = await self._input.get()
        if self._left or self._over.is_set():
            raise ClientGone
        return piece[1] if piece is not None else b""

    async def finish(self, message: str = "") -> None:
        """See `live.AttachedClient`. Whoever reads gets to know `message` behind the last piece."""
        self._failure = message
        self._output.end()
        self._shut(keep_output=True)

    def abandon(self) -> None:
        """See `live.AttachedClient`."""
        self._failure = "the engine was closed; the process lives on"
        self._output.end()
        self._shut(keep_output=True)

    async def wait_closed(self) -> None:
        """See `live.AttachedClient`."""
        await self._over.wait()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _shut(self, *, keep_output: bool = False) -> None:
        self._over.set()
        self._input.close()
        if not keep_output:
            self._output.close()
        if self._resizing is not None:
            self._resizing.cancel()

    def _ended(self) -> None:
        self._output.end()
        self._shut(keep_output=True)
        self.served.set()


async def follow_sizes(manager: SessionManager, session_id: SessionId, sizes: AsyncIterable[ConsoleSize]) -> None:
    """Give the session's terminal each of `sizes` as it comes, while there is one."""
    async for size in sizes:
        try:
            await manager.resize(session_id, size)
        except Conflict:  # it is over
            return


class _Queue:
    """Pieces on their way, bounded by their bytes: whoever puts one waits until the queue is below its bound."""

    def __init__(self) -> None:
        self.size = 0
        self._pieces: deque[tuple[int, bytes]] = deque()
        self._ended = False
        self._closed = False
        self._changed = asyncio.Event()

    async def put(self, stream: int, data: bytes) -> None:
        """Add a piece. ClientGone when nobody will take it."""
        await self._until(lambda: self._closed or self._ended or self.size < QUEUE_LIMIT)
        if self._closed or self._ended:
            raise ClientGone
        self._pieces.append((stream, data))
        self.size += len(data)
        self._changed.set()

    async def get(self) -> tuple[int, bytes] | None:
        """Return the next piece; None behind the last one."""
        await self._until(lambda: bool(self._pieces) or self._ended or self._closed)
        if not self._pieces:
            return None
        piece = self._pieces.popleft()
        self.size -= len(piece[1])
        self._changed.set()
        return piece

    def end(self) -> None:
        """Say that no more will be put; what is there can be taken."""
        self._ended = True
        self._changed.set()

    def close(self) -> None:
        """Say that no more will be taken, and forget what is there."""
        self._closed = True
        self._pieces.clear()
        self.size = 0
        self._changed.set()

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._changed.clear()
            await self._changed.wait()
