"""One exec, one answer: create, start, feed, collect, wait, in one call."""

import asyncio
import contextlib
from collections.abc import AsyncIterable, Callable, Sequence
from dataclasses import dataclass, replace

from execgate.model.config import ConsoleSize, ExecConfig
from execgate.model.errors import Conflict, NotFound
from execgate.model.ids import SessionId
from execgate.model.session import ExecSession, SessionState
from execgate.sessions.local import follow_sizes
from execgate.sessions.manager import Caller, SessionManager
from execgate.sessions.pump import ClientGone
from execgate.wire import stdcopy

_PIECE = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How a one-shot exec went. `truncated`: there was more output than was to be kept."""

    session: ExecSession
    stdout: bytes
    stderr: bytes
    truncated: bool

    @property
    def exit_code(self) -> int | None:
        """The exit code; None when the session was removed by somebody else meanwhile."""
        return self.session.exit.code if self.session.exit else None

    @property
    def timed_out(self) -> bool:
        """Whether its time was over before it was."""
        return self.session.timed_out


async def run(
    manager: SessionManager,
    container_ref: str,
    config: ExecConfig,
    *,
    stdin: bytes = b"",
    limit: int = 1024 * 1024,
    preserved: Sequence[int] = (),
    sizes: AsyncIterable[ConsoleSize] | None = None,
    begun: "Callable[[SessionId, Collector], None]" = lambda *_: None,
    caller: Caller | None = None,
) -> RunResult:
    """Run a command to its end and return what it wrote, `limit` bytes of stdout and stderr together.

    stdin is attached exactly when there is some. `preserved` are descriptors of this program that the process gets as
    3, 4, …; its terminal takes on each of `sizes` as it comes. A command that cannot be started is a result too: 126,
    127 or 128, and `session.error`. Whoever cancels this kills the process, its tree included: nobody will ever see
    its output. `begun` is told of the session as soon as there is one, and who is its client. `caller` is on whose
    behalf it is created and started (`SessionManager.create`).
    """
    config = replace(config, attach_stdin=bool(stdin), attach_stdout=True, attach_stderr=True)
    session = await manager.create(container_ref, config, caller)
    collector = Collector(stdin, limit)
    begun(session.id, collector)
    resizing = None if sizes is None else asyncio.ensure_future(follow_sizes(manager, session.id, sizes))
    try:
        return await _outcome(manager, session.id, collector, preserved, caller)
    finally:
        if resizing is not None:
            resizing.cancel()
            await asyncio.gather(resizing, return_exceptions=True)


async def resume(
    manager: SessionManager, session_id: SessionId, collector: "Collector", *, caller: Caller | None = None
) -> RunResult:
    """Go on with what `run` has begun in an earlier service, which has handed over `collector`."""
    return await _outcome(manager, session_id, collector, (), caller)


async def result(manager: SessionManager, session_id: str, *, limit: int) -> RunResult:
    """Return what `run` would have, of a session whose output is captured, once it is over. Conflict, NotFound.

    It is `truncated` too if the beginning of the output is not kept any more.
    """
    session = manager.inspect(session_id)
    if not session.config.captured:
        raise Conflict(f"the output of exec {session.id} is not captured")
    session = await manager.wait(session.id)
    backlog = await manager.output(session.id)
    collector = Collector(b"", limit)
    collector.truncated = backlog.start > 0
    offset = backlog.start
    with backlog.reader():
        while not collector.full and (chunks := await backlog.read_now(offset)):
            for chunk in chunks:
                collector.truncated = collector.truncated or chunk.offset > offset
                await collector.send(chunk.stream, chunk.data)
                offset = chunk.end
    return _result(session, collector)


async def _outcome(
    manager: SessionManager,
    session_id: SessionId,
    collector: "Collector",
    preserved: Sequence[int],
    caller: Caller | None,
) -> RunResult:
    """Start a session if it is not started, and return how it ended. Whoever cancels this kills and removes it."""

    async def take_over() -> Collector:
        return collector

    try:
        if manager.inspect(session_id).state is SessionState.CREATED:
            await manager.start_attached(session_id, None, take_over, preserved=preserved, caller=caller)
        session = await manager.wait(session_id)
    except BaseException:  # cancelled, or refused: nobody knows its id
        with contextlib.suppress(NotFound):
            await asyncio.shield(manager.remove(session_id, force=True))
        raise
    return _result(session, collector)


def _result(session: ExecSession, collector: "Collector") -> RunResult:
    return RunResult(
        session=session,
        stdout=bytes(collector.output[stdcopy.STDOUT]),
        stderr=bytes(collector.output[stdcopy.STDERR]),
        truncated=collector.truncated,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """A `Collector` between two services. `left`: how many bytes of output it would still keep."""

    stdin: bytes
    stdout: bytes
    stderr: bytes
    left: int
    truncated: bool


class Collector:
    """A client in this process: gives `stdin`, keeps up to `limit` bytes of output, and reads on without keeping."""

    def __init__(self, stdin: bytes, limit: int) -> None:
        self.output = {stdcopy.STDOUT: bytearray(), stdcopy.STDERR: bytearray()}
        self.truncated = False
        self._left = limit
        self._stdin = memoryview(stdin)
        self._closed = asyncio.Event()

    @classmethod
    def restore(cls, before: Collected) -> "Collector":
        """Go on where another one stopped."""
        collector = cls(before.stdin, before.left)
        collector.output = {stdcopy.STDOUT: bytearray(before.stdout), stdcopy.STDERR: bytearray(before.stderr)}
        collector.truncated = before.truncated
        return collector

    def collected(self) -> Collected:
        """Return where it stands."""
        return Collected(
            stdin=bytes(self._stdin),
            stdout=bytes(self.output[stdcopy.STDOUT]),
            stderr=bytes(self.output[stdcopy.STDERR]),
            left=self._left,
            truncated=self.truncated,
        )

    @property
    def full(self) -> bool:
        """Whether there was more output than it keeps."""
        return self.truncated and not self._left

    async def send(self, stream: int, data: bytes) -> None:
        """See `pump.Client`."""
        self.output[stream] += data[: self._left]
        self.truncated = self.truncated or len(data) > self._left
        self._left = max(0, self._left - len(data))

    async def receive(self) -> bytes:
        """See `pump.Client`."""
        if self._closed.is_set():
            raise ClientGone
        piece, self._stdin = self._stdin[:_PIECE], self._stdin[_PIECE:]
        return bytes(piece)

    async def finish(self, message: str = "") -> None:  # noqa: ARG002  (the record has it)
        """See `live.AttachedClient`."""
        self._closed.set()

    def abandon(self) -> None:
        """See `live.AttachedClient`."""
        self._closed.set()

    async def wait_closed(self) -> None:
        """See `live.AttachedClient`."""
        await self._closed.wait()
