"""Moving one session's bytes between its process and those who are attached to it.

The theory. Each direction is a loop that holds one chunk at a time: it takes no second one before the first is
accepted, so a slow client slows the process and a slow process slows the client, and nothing grows.

- There is one client whom the process waits for: the one that started it. Those who attach later, and there may be
  many, read from the backlog at their own pace, and only they suffer if they are slow.
- A client's end of input closes the process's stdin. It says nothing about the output.
- A client's *absence* (its connection broke) is another thing: what follows from it is the session's policy. The
  output is then read and, unless captured, thrown away, so that the process goes on as if somebody listened.
- The detach keys end the client's part, and leave stdin as it is.
- Where nobody but the one client looks at the bytes, and there are many of them, the kernel moves them from the pipe
  to the client's socket and back (splice(2)); else they are copied. It is decided anew for each piece.
- The outputs end by themselves when all writers have closed. A background child may keep them open for ever: once
  the process itself has ended they get `drain` more seconds, then what is buffered is delivered and that is all.
- A session that is recorded (`sessions.recording`) has all its bytes copied, and given to the recording first.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from enum import Enum
from typing import Any, Protocol, cast, runtime_checkable

from execgate.model.session import ByteCounts
from execgate.runtime.streams import (
    SPLICE_MIN,
    ExecStreams,
    Inflow,
    Input,
    InputClosed,
    Output,
    OutputGone,
    Recorders,
    Waiting,
)
from execgate.sessions.backlog import Backlog
from execgate.sessions.recording import Recording, Unrecorded
from execgate.wire import stdcopy
from execgate.wire.detach_keys import DetachFilter

_LAST_INPUT = 1.0
"""Seconds that a process has to take what a client has sent that is gone, before its absence has consequences."""


class ClientGone(Exception):
    """The client's connection broke. The session does not mind."""


class Client(Protocol):
    """The far side of an attached session. A hijacked connection is one."""

    async def send(self, stream: int, data: bytes) -> None:
        """Accept output (1 stdout, 2 stderr) at once, then wait until there is room for more; ClientGone."""

    async def receive(self) -> bytes:
        """Return input, b"" for its end; ClientGone."""


@runtime_checkable
class Conduit(Inflow, Protocol):
    """A client whose bytes the kernel itself can move. It may refuse now and then: they are copied then."""

    async def send_waiting(self, waiting: Waiting) -> None:
        """As `Client.send`; but all is left in the pipe, and `waiting` still knows it, when it raises ClientGone."""


def _conduit(client: Client) -> Conduit | None:
    """Return a client as a conduit, if it is one. Asked of its class: that answer is kept, of an object it is not."""
    return cast("Conduit", client) if issubclass(type(client), Conduit) else None


class Departure(Enum):
    """Why a client left before the end."""

    DETACHED = "the detach keys were typed"
    GONE = "the connection broke"


class Lagging(Exception):
    """A reader of the backlog was so slow that what it would have read next was dropped."""


class Interrupted(asyncio.CancelledError):
    """A write was cancelled; `rest` is what was not written."""

    def __init__(self, rest: bytes) -> None:
        super().__init__()
        self.rest = rest


class Stdin:
    """The process's stdin, for all who may write to it. What nobody reads is thrown away and blocks no writer."""

    def __init__(self, target: Input | None, recording: Recording | None = None) -> None:
        self._target = target
        self._recording = recording or Unrecorded()
        self._counter = target  # it goes on counting when it is over
        self._turn = asyncio.Lock()
        self._ended = target is None
        self._frozen = False

    @property
    def open(self) -> bool:
        """Whether anything can still be written."""
        return not self._ended

    @property
    def written(self) -> int:
        """How many bytes it has got so far."""
        return self._counter.written if self._counter is not None else 0

    async def write(self, data: bytes) -> None:
        """Write all of `data`, waiting for room and for one's turn. Interrupted, when it is cancelled in the middle."""
        if not data:
            return
        with contextlib.suppress(InputClosed):
            async with self._using() as target:
                before = target.written
                try:
                    if self._recording.input:
                        await self._recording.room()
                    await target.write(data)
                except asyncio.CancelledError as error:
                    raise Interrupted(data[target.written - before :]) from error
                finally:
                    if self._recording.input:
                        self._recording.given(data[: target.written - before])

    async def splice(self, inflow: Inflow) -> bool:
        """Take much input that waits, as `Input.splice` does. When it is cancelled, nothing is between the two."""
        if self._recording.input:
            return False
        with contextlib.suppress(InputClosed):
            async with self._using() as target:
                return await target.splice(inflow)
        return False

    @contextlib.asynccontextmanager
    async def _using(self) -> AsyncIterator[Input]:
        """Have the target for oneself. InputClosed, when there is none any more."""
        async with self._turn:
            target = self._target
            if self._ended or target is None:
                raise InputClosed
            try:
                yield target
            except InputClosed:
                self._target, self._ended = None, True
                raise
            finally:
                if self._ended:
                    self._end()

    def freeze(self) -> None:
        """Let the next service decide when it ends."""
        self._frozen = True

    def close(self) -> None:
        """End it, for everybody, behind what is being written now."""
        self._ended = True
        if not self._turn.locked():
            self._end()

    def _end(self) -> None:
        if self._frozen:
            return
        target, self._target = self._target, None
        if target is not None:
            target.close()


class Pump:
    """One session's streams, until all output is delivered.

    `captured` says which output the backlog gets, `transferred` what an earlier service has moved.
    """

    def __init__(
        self,
        streams: ExecStreams,
        stdin: Stdin,
        backlog: Backlog,
        *,
        captured: frozenset[int],
        transferred: ByteCounts | None = None,
        recording: Recording | None = None,
    ) -> None:
        self._outputs = streams.outputs
        self._stdin = stdin
        self._recording = recording or Unrecorded()
        self._backlog = backlog
        self._captured = captured
        self._recorders: Recorders = dict.fromkeys(captured, backlog.recorder) if backlog.recorder is not None else {}
        self._client: Client | None = None
        self._conduit: Conduit | None = None  # the same one, if the kernel can serve it
        self._wanted: frozenset[int] = frozenset()
        self._left: Callable[[Departure], None] = lambda _: None
        self._feeding: asyncio.Task[None] | None = None
        transferred = transferred or ByteCounts()
        self._before = transferred.stdin
        self._count = {stdcopy.STDOUT: transferred.stdout, stdcopy.STDERR: transferred.stderr}
        self._promised: set[Waiting] = set()  # counted, and some of it may still be in its pipe

    @property
    def transferred(self) -> ByteCounts:
        """What has passed so far."""
        return ByteCounts(self._before + self._stdin.written, self._count[stdcopy.STDOUT], self._count[stdcopy.STDERR])

    @property
    def moved(self) -> int:
        """A number that grows with every byte that moves, in either direction and by whatever way."""
        moved = self.transferred
        return moved.stdin + moved.stdout + moved.stderr - sum(waiting.left for waiting in self._promised)

    def join(
        self, client: Client, feeder: "Feeder", *, wanted: frozenset[int], left: Callable[[Departure], None]
    ) -> None:
        """Take the client that the process waits for, and what carries its input; before `run`."""
        self._client, self._wanted, self._left = client, wanted, left
        self._conduit = _conduit(client)
        self._feeding = asyncio.create_task(self._feed(feeder))

    async def run(self, exited: asyncio.Future[Any], drain: float) -> None:
        """Pump until the process has ended and every output too, at most `drain` seconds after `exited` is done."""
        tasks = [asyncio.create_task(self._forward(output)) for output in self._outputs]
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
            self._left = lambda _: None  # what ends now is over, or the next service's
            await end_all(*tasks, *([self._feeding] if self._feeding is not None else []))
            self._backlog.close()

    def hush(self) -> None:
        """From now on have nobody get what the process writes; it is read and thrown away."""
        self._wanted = self._captured = frozenset()
        self._recorders = {}

    def lose(self) -> None:
        """Take note that the first client is gone. What it has sent before is still input; then it has left."""
        if self._client is None:
            return
        self._client = self._conduit = None
        feeding = self._feeding
        if feeding is None or feeding.done():
            self._left(Departure.GONE)
            return
        patience = asyncio.get_running_loop().call_later(_LAST_INPUT, feeding.cancel)

        def fed(_feeding: asyncio.Task[None]) -> None:
            patience.cancel()
            self._left(Departure.GONE)

        feeding.add_done_callback(fed)

    async def _forward(self, output: Output) -> None:
        while True:
            await self._recording.room()
            waiting = await output.bulk() if self._alone else None
            if waiting is not None and self._alone:  # still: others may have come while it waited
                await self._move(waiting)
            elif (chunk := await output.read(self._recorders)) is not None:
                await self._copy(*chunk)
            else:
                return

    async def _copy(self, stream: int, data: bytes) -> None:
        self._count[stream] += len(data)
        self._recording.wrote(stream, data)
        if stream in self._captured and stream not in self._recorders:
            self._backlog.append(stream, data)
        if self._client is not None and stream in self._wanted:
            try:
                await self._client.send(stream, data)
            except ClientGone:
                self.lose()

    async def _move(self, waiting: Waiting) -> None:
        """Have the kernel move what waits. Those who begin to watch in the meantime see what comes after it."""
        self._count[waiting.stream] += waiting.left
        self._backlog.skip(waiting.left)
        self._promised.add(waiting)
        try:
            if self._conduit is not None and waiting.stream in self._wanted:
                await self._conduit.send_waiting(waiting)
        except ClientGone:
            self.lose()
        finally:
            self._promised.discard(waiting)
        with contextlib.suppress(OutputGone):
            waiting.read()  # what has become nobody's

    @property
    def _alone(self) -> bool:
        """Whether the first client is the only one who gets the output, and the kernel can move it there."""
        looked_at = self._recorders or self._recording.output or self._backlog.watched
        return self._conduit is not None and not looked_at

    async def _feed(self, feeder: "Feeder") -> None:
        if (departure := await feeder.run()) is not None:
            self._leave(departure)

    def _cut(self) -> None:
        for output in self._outputs:
            output.cut()

    def _leave(self, departure: Departure) -> None:
        if self._client is not None:
            self._client = self._conduit = None
            self._left(departure)


class Feeder:
    """Carries a client's input to the process until it ends, and then the end.

    `rest` is what was received and not written yet: with what the detach keys withhold it is all that is between the
    two when a feeder is cancelled, and a new one goes on with it.
    """

    def __init__(
        self, client: Client, stdin: Stdin, detach_keys: bytes, *, rest: bytes = b"", withheld: bytes = b""
    ) -> None:
        self.rest = rest
        self._client = client
        self._stdin = stdin
        self._keys = DetachFilter(detach_keys, withheld)
        self._conduit = _conduit(client) if not detach_keys else None

    @property
    def withheld(self) -> bytes:
        """The beginning of a detach sequence that the client may be typing."""
        return self._keys.withheld

    async def run(self) -> Departure | None:
        """Return when the input has ended, or else why the client left."""
        try:
            await self._write(self.rest)
            while data := await self._client.receive():
                data, detach = self._keys.feed(data)
                await self._write(data)
                if detach:
                    return Departure.DETACHED
                if len(data) >= SPLICE_MIN:
                    await self._splice()
            await self._write(self._keys.flush())
        except ClientGone:
            return Departure.GONE
        self._stdin.close()
        return None

    async def _splice(self) -> None:
        """Have the kernel move input as long as there is much of it. What it moves is never here."""
        if self._conduit is None:
            return
        while await self._stdin.splice(self._conduit):  # noqa: ASYNC110  (nobody says when it is one's turn)
            await asyncio.sleep(0)  # one who sends without a pause must not starve the others

    async def _write(self, data: bytes) -> None:
        self.rest = data
        try:
            await self._stdin.write(data)
        except Interrupted as error:
            self.rest = error.rest
            raise
        self.rest = b""


class Follower:
    """Sends a client what the backlog holds from `offset` on, and then what comes, to the end.

    When it is cancelled `offset` is where a new one goes on: behind what the client has accepted.
    """

    def __init__(self, backlog: Backlog, client: Client, offset: int, wanted: frozenset[int]) -> None:
        self.offset = offset
        self.wanted = wanted
        self._backlog = backlog
        self._client = client

    async def run(self) -> None:
        """Return at the end of the output. ClientGone, Lagging."""
        while chunks := await self._backlog.read(self.offset):
            for chunk in chunks:
                if chunk.offset > self.offset:
                    raise Lagging
                self.offset = chunk.end  # before it is sent: it is accepted at once, and cannot be sent twice
                if chunk.stream in self.wanted:
                    await self._client.send(chunk.stream, chunk.data)


async def end_all(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel what is not done, and have nothing of it left."""
    left = [task for task in tasks if not task.done() or task.cancelled() or task.exception()]  # most have succeeded
    for task in left:
        task.cancel()
    if left:
        await asyncio.gather(*left, return_exceptions=True)
