"""Monitors that are spawned before their start is asked for.

A client creates an exec and starts it in its next breath. To load conmon takes longer than that breath, and longer than
all else that a start needs: so it is begun as soon as the exec is created. Nothing rests on it. One whose start does
not come soon, or comes in another shape, is ended; there are few at a time; and what can be wrong with one is found out
by the start, which then spawns another.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from execgate.model.errors import ExecgateError
from execgate.model.ids import SessionId
from execgate.runtime.spawning import ExecRequest

_MOST = 8
"""How many wait at once: whoever creates sessions by the thousand shall not have as many processes."""

_PATIENCE = 1.0
"""Seconds for which one waits."""


_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Begun(Generic[_T]):
    """One that waits for its start, or is still being spawned."""

    request: ExecRequest
    task: "asyncio.Task[_T]"
    timer: asyncio.TimerHandle

    def suits(self, request: ExecRequest) -> bool:
        """Return whether it is what `request` needs; what is to run is said later."""
        return self.request.tty == request.tty and self.request == request


class Ahead(Generic[_T]):
    """What `spawn` makes, made before it is asked for; what nobody wants is undone by `undo`."""

    def __init__(self, spawn: Callable[[ExecRequest], Awaitable[_T]], undo: Callable[[_T], Awaitable[None]]) -> None:
        self._spawn = spawn
        self._undo = undo
        self._begun: dict[SessionId, _Begun[_T]] = {}
        self._ending: dict[SessionId, asyncio.Task[None]] = {}
        self._closed = False

    def begin(self, request: ExecRequest) -> None:
        """Spawn for a start that will probably come, if there is room."""
        session_id = request.session_id
        if self._closed or session_id in self._begun or len(self._begun) >= _MOST:
            return
        task = asyncio.create_task(self._made(request))
        timer = asyncio.get_running_loop().call_later(_PATIENCE, self._drop, session_id)
        self._begun[session_id] = _Begun(request, task, timer)

    async def take(self, request: ExecRequest) -> _T | None:
        """Return what was begun for this start; None when that was nothing, or nothing of use.

        In that case nothing is left of it: the start has to make another one in the same place. If this is cancelled,
        it is ended.
        """
        begun = self._begun.get(request.session_id)
        if begun is not None and not begun.suits(request):
            self._drop(request.session_id)
        if (ending := self._ending.get(request.session_id)) is not None:
            await asyncio.wait([ending])
            return None
        if begun is None:
            return None
        del self._begun[request.session_id]
        begun.timer.cancel()
        try:
            return await asyncio.shield(begun.task)  # a cancel that came just behind its end would lose what was made
        except ExecgateError:  # that was then: it may be possible now
            return None
        except asyncio.CancelledError:
            await asyncio.wait([self._end_soon(request.session_id, begun)])
            raise

    async def close(self) -> None:
        """End all that wait, and begin no more."""
        self._closed = True
        for session_id in list(self._begun):
            self._drop(session_id)
        await asyncio.gather(*self._ending.values())

    async def _made(self, request: ExecRequest) -> _T:
        return await self._spawn(request)

    def _drop(self, session_id: SessionId) -> None:
        begun = self._begun.pop(session_id)
        begun.timer.cancel()
        self._end_soon(session_id, begun)

    def _end_soon(self, session_id: SessionId, begun: _Begun[_T]) -> "asyncio.Task[None]":
        task = self._ending[session_id] = asyncio.create_task(self._end(begun))
        task.add_done_callback(lambda _: self._ending.pop(session_id))
        return task

    async def _end(self, begun: _Begun[_T]) -> None:
        with contextlib.suppress(ExecgateError):  # nothing came of it
            await self._undo(await begun.task)
