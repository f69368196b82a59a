"""One session between its start and its end: its own task, its clients, its timeout.

A client's request waits for that task but is not it: when the client goes, the session goes on, unless its creator
wanted otherwise (`OnDisconnect`).
"""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from execgate.model.config import ConsoleSize, OnDisconnect
from execgate.model.errors import Conflict, ExecgateError, Internal, StartFailed, Unavailable
from execgate.model.process import ProcessIdentity
from execgate.model.session import ByteCounts, ExecSession, ExitSource, ExitStatus
from execgate.runtime.streams import ExecStreams
from execgate.runtime.tree import ProcessTree
from execgate.sessions.backlog import Backlog
from execgate.sessions.ledger import Ledger
from execgate.sessions.pump import Client, ClientGone, Departure, Feeder, Follower, Lagging, Pump, Stdin, end_all
from execgate.sessions.recording import Recording, Unrecorded
from execgate.wire import stdcopy

log = logging.getLogger(__name__)

BOTH = frozenset({stdcopy.STDOUT, stdcopy.STDERR})

_REATTACH_GRACE = 60.0
"""Seconds in which clients that were lost with the service before this one can come back. Then they are absent."""

_LOOKS = 10
"""How often within an idle timeout it is looked whether bytes have moved: an end comes up to this part of it late."""

_LOOK_EVERY = 5.0
"""Seconds between two looks at most."""

_GO_WITH_CLIENTS = frozenset({OnDisconnect.HUP, OnDisconnect.KILL})


class Execution(Protocol):
    """One process, prepared (`runtime.conmon.ConmonExec`) or taken back."""

    @property
    def streams(self) -> ExecStreams:
        """What of it is attached."""

    @property
    def monitor(self) -> ProcessIdentity | None:
        """Its monitor."""

    @property
    def tree(self) -> ProcessTree | None:
        """All its processes; None before it runs, or when nobody knows them."""

    async def start(self) -> ProcessIdentity:
        """Run it; StartFailed."""

    async def wait(self) -> ExitStatus:
        """Return how it ended."""

    def resize(self, size: ConsoleSize) -> None:
        """Set its terminal's size."""

    async def dispose(self) -> None:
        """Leave nothing of it behind."""

    async def abort(self) -> None:
        """Undo a start that has not happened."""

    def leave(self) -> None:
        """Let go of it without ending it."""


class Adopted(Execution, Protocol):
    """A process that an earlier service started."""

    @property
    def process(self) -> ProcessIdentity | None:
        """Who it is; None when it was never started, or when that is not known yet."""

    @property
    def starting(self) -> bool:
        """Whether its start is still under way."""


class AttachedClient(Client, Protocol):
    """A client that a session can also part from."""

    async def finish(self, message: str = "") -> None:
        """Deliver what was sent, then `message` if any, and close."""

    def abandon(self) -> None:
        """Close at once: the service stops."""

    async def wait_closed(self) -> None:
        """Return once the client's stream is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """A client between two services.

    `first`: it is the one that the process waits for; else it reads the backlog from `offset` on. `rest` is input that
    is not written yet, `withheld` the beginning of a detach sequence; `stdin`: its input may still come.
    """

    client: AttachedClient
    first: bool
    stdin: bool
    rest: bytes = b""
    withheld: bytes = b""
    offset: int = 0
    wanted: frozenset[int] = BOTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Handed:
    """A live session between two services: what is neither on record nor in a descriptor."""

    attachments: Sequence[Attachment] = ()
    transferred: ByteCounts = field(default_factory=ByteCounts)
    timed_out: bool = False
    stdin_ended: bool = False


@dataclass(slots=True)
class _Attached:
    """A client that reads the backlog, and the tasks that serve it."""

    client: AttachedClient
    follower: Follower
    feeder: Feeder
    stdin: bool
    forwarding: "asyncio.Future[None]"
    feeding: "asyncio.Future[Departure | None]"


class LiveSession:
    """A session that is being started or runs.

    `drain` and `grace` are seconds: how long a background child may hold the output open, and how long a process may
    take to end by itself once its time is over. `over` is called once, when the session is no longer live.
    """

    def __init__(
        self,
        session: ExecSession,
        ledger: Ledger,
        backlog: Backlog,
        *,
        drain: float,
        grace: float,
        over: Callable[["LiveSession"], None],
        recording: Recording | None = None,
    ) -> None:
        self.session = session
        self.backlog = backlog
        self.execution: Execution | None = None
        self.task: asyncio.Task[None] | None = None
        self.settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once the start has succeeded or failed."""
        self.started = False
        self.stdin = Stdin(None)
        self._ledger = ledger
        self._drain = drain
        self._grace = grace
        self._over = over
        self._recording = recording or Unrecorded()
        self._size: ConsoleSize | None = None  # asked for during the start
        self._pump: Pump | None = None
        self._clients = 0
        self._timer: asyncio.Handle | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._timed_out = False
        self._last_words = ""  # what its first client is told at the end
        self._exited: asyncio.Future[ExitStatus] | None = None
        self._first: tuple[AttachedClient, Feeder | None] | None = None
        self._attached: list[_Attached] = []
        self._handed = Handed()  # by an earlier service
        self._leaving = False
        self._parted = False  # the process lives on, and what becomes of it is not ours to say
        self._adopted = False
        self._chores: set[asyncio.Task[Any]] = set()
        self._following: set[asyncio.Task[Any]] = set()  # those of them that serve clients of an earlier service
        self._kills: set[asyncio.Task[Any]] = set()  # those of them that end the process

    def __repr__(self) -> str:
        return f"<LiveSession {self.session.id[:12]} started={self.started} clients={self._clients}>"

    # -- its course --------------------------------------------------------------------------------------------------

    def run(self, client: AttachedClient | None, begun: "asyncio.Future[ExecSession] | None" = None) -> None:
        """Start the prepared execution in a task of its own; `begun` is told the outcome of the start.

        One that was handed over before is the next service's to start.
        """
        if self._leaving:
            return
        self.task = asyncio.create_task(self._run(client, begun), name=f"exec {self.session.id[:12]}")

    def adopt(self, execution: Adopted, handed: Handed | None) -> None:
        """Go on with a process that an earlier service started, or was about to start; None when that one crashed."""
        self.execution = execution
        self._handed, self._adopted = handed or Handed(), True
        self._timed_out = self._handed.timed_out or self.session.timed_out
        first = next((one.client for one in self._handed.attachments if one.first), None)
        if execution.starting:
            self.run(first)
        else:
            self.started = True
            self._settle()
            self.task = asyncio.create_task(self._attend(first), name=f"adopted exec {self.session.id[:12]}")
        self.follow_again(self._handed.attachments)
        stays_open = self.session.config.on_disconnect is OnDisconnect.DOCKER
        if not self._handed.attachments and (stays_open or self.session.attended):
            self._timers.append(asyncio.get_running_loop().call_later(_REATTACH_GRACE, self._nobody_came))

    async def hand_over(self) -> Handed:
        """Stop without an end, and return where everything stands. Nothing is closed: it is the next service's."""
        self._leaving = True
        self.stdin.freeze()
        tasks = [task for task in (self.task, *(self._chores - self._following)) if task is not None]
        for task in tasks:
            task.cancel()
        watchers, *_ = await asyncio.gather(self.hand_over_watchers(), *tasks, return_exceptions=True)
        assert isinstance(watchers, list)
        for timer in self._timers:
            timer.cancel()
        return Handed(
            attachments=[*self._first_attachment(), *watchers],
            transferred=self.transferred,
            timed_out=self._timed_out,
            stdin_ended=self.started and not self.stdin.open,
        )

    async def hand_over_watchers(self) -> list[Attachment]:
        """Stop serving those who attached later, and return where they stand; the session itself may be over."""
        self._leaving = True
        served: list[asyncio.Future[Any]] = [task for one in self._attached for task in (one.forwarding, one.feeding)]
        await end_all(*served)
        return [*map(_attachment, self._attached)]

    def follow_again(self, watchers: Sequence[Attachment]) -> None:
        """Go on with watchers of an earlier service."""
        for one in watchers:
            if not one.first:
                self._do(self._follow_again(one), self._following)

    def _first_attachment(self) -> list[Attachment]:
        if self._first is None:
            return []
        client, feeder = self._first
        rest, withheld = (feeder.rest, feeder.withheld) if feeder is not None else (b"", b"")
        return [Attachment(client=client, first=True, stdin=True, rest=rest, withheld=withheld)]

    async def undo(self, reason: str = "the client left before the start") -> None:
        """End it before anything ran: the client left, or could not be taken over."""
        try:
            await self._execution().abort()
        finally:
            await self.fail(StartFailed(reason, 128))

    async def fail(self, error: StartFailed) -> None:
        """End the session as one that never ran."""
        status = ExitStatus(error.exit_code, ExitSource.START_FAILURE)
        self._recording.finish(status, error.message)
        try:
            await self._recording.closed()  # as in `_attend`
        finally:
            self._end(status, error=error.message)
            self.backlog.finish()
            self._settle()

    async def close(self) -> None:
        """Part from it; the process lives on."""
        tasks = [task for task in (self.task, *self._chores) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- what is asked of it -----------------------------------------------------------------------------------------

    @property
    def watched(self) -> bool:
        """Whether anybody who attached later is still served."""
        return bool(self._attached)

    @property
    def transferred(self) -> ByteCounts:
        """The bytes that have passed so far."""
        return self._pump.transferred if self._pump is not None else ByteCounts()

    def resize(self, size: ConsoleSize) -> None:
        """Set the terminal's size; during the start it is kept for its end. Conflict when it is over."""
        if not self.started:
            self._size = size
            return
        try:
            self._execution().resize(size)
        except Internal:
            if (tree := self._execution().tree) is not None and tree.alive:
                raise
            raise self._not_running() from None
        self._recording.resized(size)

    async def signal(self, number: int) -> None:
        """Send a signal to the process; SIGKILL to its whole tree. Conflict when it does not run."""
        tree = self._tree()
        if number == signal.SIGKILL:
            await tree.kill(self._monitor())
        elif not tree.signal(number):
            raise self._not_running()

    async def stop(self, grace: float) -> None:
        """Ask the process to end, and after `grace` seconds, or its end, kill what is left of its tree.

        Returns early when the session is parted from meanwhile.
        """
        tree = self._tree()
        if grace > 0 and tree.signal(signal.SIGTERM) and self._exited is not None:
            await asyncio.wait([self._exited], timeout=grace)
        if self._leaving:  # it has not exited: it is only nobody's any more, and the next service stops it
            await asyncio.get_running_loop().create_future()
        await tree.kill(self._monitor())

    async def attach(
        self,
        client: AttachedClient,
        offset: int,
        *,
        stdin: bool,
        wanted: frozenset[int],
        rest: bytes = b"",
        withheld: bytes = b"",
    ) -> None:
        """Serve one more client, from `offset` of the backlog on; return when its stream is over.

        `rest` and `withheld` are input that an earlier service has left.
        """
        self._clients += 1
        self._note(attended=True)
        keys = self.session.config.detach_keys if self.session.config.tty else b""
        follower = Follower(self.backlog, client, offset, wanted)
        feeder = Feeder(client, self.stdin if stdin else Stdin(None), keys, rest=rest, withheld=withheld)
        one = _Attached(
            client, follower, feeder, stdin, asyncio.ensure_future(follower.run()), asyncio.ensure_future(feeder.run())
        )
        self._attached.append(one)
        try:
            message, departure = await self._serve(one)
        except asyncio.CancelledError:
            if self._leaving:  # nothing more happens here: the next service goes on
                await asyncio.get_running_loop().create_future()
            self._attached.remove(one)
            self._left(None)
            client.abandon()
            raise
        self._attached.remove(one)
        self._left(departure)
        await client.finish(message)

    async def _serve(self, one: _Attached) -> tuple[str, Departure | None]:
        """Return what is to be told a client at its end, and why it left, if it did."""
        closed: asyncio.Future[Any] = asyncio.ensure_future(one.client.wait_closed())
        departure = None
        try:
            waited: list[asyncio.Future[Any]] = [one.forwarding, one.feeding, closed]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if one.feeding.done():
                departure = one.feeding.result()
            if departure is None:  # its input may be over, which says nothing of the output
                await asyncio.wait([one.forwarding, closed], return_when=asyncio.FIRST_COMPLETED)
                if not one.forwarding.done():
                    return "", Departure.GONE
                one.forwarding.result()
        except ClientGone:
            return "", Departure.GONE
        except Lagging:
            return "output was dropped: this client reads too slowly", None
        finally:
            await end_all(one.forwarding, one.feeding, closed)
        return "", departure

    async def _follow_again(self, one: Attachment) -> None:
        """Serve a client that an earlier service has served."""
        with self.backlog.reader():
            await self.attach(
                one.client, one.offset, stdin=one.stdin, wanted=one.wanted, rest=one.rest, withheld=one.withheld
            )

    # -- inside ------------------------------------------------------------------------------------------------------

    async def _run(self, client: AttachedClient | None, begun: "asyncio.Future[ExecSession] | None") -> None:
        self._first = None if client is None else (client, None)
        self._ledger.tell(f"exec_start: {' '.join(self.session.config.args)}", self.session)
        try:
            await self._begin()
        except asyncio.CancelledError:
            if not self._leaving:
                _tell(begun, Unavailable("the service stops"))
                self._let_go(client)
            raise
        except Exception as error:
            known = error if isinstance(error, ExecgateError) else self._unforeseen(error)
            _tell(begun, known)
            if not isinstance(error, StartFailed):  # after which nothing is left
                self._let_go(None)
            self._settle()
            if client is not None:
                await client.finish(known.message)
            return
        _tell(begun, self.session)
        await self._attend(client)

    async def _begin(self) -> None:
        execution = self._execution()
        try:
            process = await execution.start()
        except StartFailed as error:
            name = self.session.container.name
            log.info("exec %s in %s did not start: %s", self.session.id[:12], name, error.message)
            await self.fail(error)
            raise
        self.session = self._ledger.running(self.session, process, execution.monitor)
        self.started = True
        self._settle()
        if self._size is not None:
            with contextlib.suppress(ExecgateError):  # the process may be over already
                self.resize(self._size)

    async def _attend(self, client: AttachedClient | None) -> None:
        """See the running process to its end. Whatever happens, its client is not left waiting."""
        message = ""
        try:
            status = await self._deliver(client)
            self._recording.finish(status, self.session.error)
            await self._recording.closed()  # whoever learns of the end finds all of it
            self._end(status)
            message = self._last_words
        except asyncio.CancelledError:  # the service stops; the process does not
            if not self._leaving:
                self._let_go(client)
            raise
        except Exception as error:
            message = self._unforeseen(error).message
            self._recording.leave()
            self._over(self)
        self.backlog.finish()
        try:
            if client is not None:
                await client.finish(message)
            await self._execution().dispose()
        except Exception as error:  # the session's end is on record, and nobody waits for this task
            self._unforeseen(error)
            self._execution().leave()

    async def _deliver(self, client: AttachedClient | None) -> ExitStatus:
        """Deliver all output, and return the exit code."""
        execution, config = self._execution(), self.session.config
        self.stdin = Stdin(execution.streams.input, self._recording)
        self._pump = Pump(
            execution.streams,
            self.stdin,
            self.backlog,
            captured=self._captured_outputs() or self._attached_outputs(),
            transferred=self._handed.transferred,
            recording=self._recording,
        )
        if client is not None:
            self._join(client, self._pump)
        elif self._handed.stdin_ended or (not self._adopted and config.on_disconnect is not OnDisconnect.KEEP):
            self.stdin.close()
        self._exited = asyncio.create_task(execution.wait())
        self._exited.add_done_callback(self._sweep_up)
        self._arm_timeouts(self._pump)
        self._recording.when_lost(self._unrecorded)
        watching = asyncio.create_task(self._watch(client, self._pump)) if client is not None else None
        try:
            await self._pump.run(self._exited, self._drain)
            if self._kills:  # what is over is over as a whole
                await asyncio.wait(self._kills)
            return self._exited.result()
        finally:
            for timer in (self._timer, self._idle_timer):
                if timer is not None:
                    timer.cancel()
            await end_all(self._exited, *([watching] if watching is not None else []))

    def _join(self, client: AttachedClient, pump: Pump) -> None:
        """Let the process wait for its first client, and get its input."""
        self._clients += 1
        self._note(attended=True)
        config = self.session.config
        rest, withheld = next(((one.rest, one.withheld) for one in self._handed.attachments if one.first), (b"", b""))
        keys = config.detach_keys if config.tty else b""
        feeder = Feeder(client, self.stdin, keys, rest=rest, withheld=withheld)
        self._first = (client, feeder)
        pump.join(
            client,
            feeder,
            wanted=self._attached_outputs(),
            left=lambda departure: self._first_client_left(client, departure),
        )

    def _nobody_came(self) -> None:
        """Draw the consequences for a process whose client was lost with an earlier service and has not come back."""
        if not self._clients:
            self._abandoned(self.session.config.on_disconnect)

    async def _watch(self, client: AttachedClient, pump: Pump) -> None:
        """Notice that the first client is gone although nothing is sent to it, and its input was over before."""
        await client.wait_closed()
        pump.lose()

    def _attached_outputs(self) -> frozenset[int]:
        return self._outputs(self.session.config.attach_stdout, self.session.config.attach_stderr)

    def _captured_outputs(self) -> frozenset[int]:
        return self._outputs(self.session.config.capture_stdout, self.session.config.capture_stderr)

    def _outputs(self, stdout: bool, stderr: bool) -> frozenset[int]:
        """Return the streams that are wanted; of a terminal all or nothing."""
        if self.session.config.tty:
            return BOTH if stdout or stderr else frozenset()
        wanted = {stdcopy.STDOUT: stdout, stdcopy.STDERR: stderr}
        return frozenset(stream for stream, is_wanted in wanted.items() if is_wanted)

    def _first_client_left(self, client: AttachedClient, departure: Departure) -> None:
        self._first = None
        self._left(departure)
        self._do(client.finish())

    def _left(self, departure: Departure | None) -> None:
        """One client fewer. What follows from the absence of the last one is the creator's choice."""
        self._clients -= 1
        if departure is None or self._parted:
            return
        log.debug("exec %s lost a client: %s", self.session.id[:12], departure.value)
        if departure is Departure.DETACHED:
            self._ledger.tell("exec_detach", self.session)
            if not self._clients:
                self._note(attended=False)
        elif not self._clients:
            self._abandoned(self.session.config.on_disconnect)

    def _note(self, *, attended: bool) -> None:
        """Have it on record, where it matters to a service that comes after a crash."""
        session = self.session
        matters = self.started and session.running and session.config.on_disconnect in _GO_WITH_CLIENTS
        if matters and session.attended is not attended:
            self.session = self._ledger.attended(session, attended=attended)

    def _abandoned(self, policy: OnDisconnect) -> None:
        if policy is OnDisconnect.KEEP:
            return
        self.stdin.close()
        tree = self.execution.tree if self.execution is not None else None
        if tree is None:  # it is over, and only its captured output was read
            return
        if policy is OnDisconnect.HUP:
            tree.signal(signal.SIGHUP)
        elif policy is OnDisconnect.KILL:
            self._do(tree.kill(self._monitor()), self._kills)

    def _arm_timeouts(self, pump: Pump) -> None:
        config, loop = self.session.config, asyncio.get_running_loop()
        if self._timed_out:  # an earlier service has begun to end it
            self._timer = loop.call_soon(self._expire, self.session.error)
            return
        if config.timeout is not None:
            left = self.session.since + config.timeout - time.monotonic()  # not all, if an earlier service started it
            self._timer = loop.call_later(max(0.0, left), self._expire)
        if config.idle_timeout is not None:
            self._look_for_idleness(pump, config.idle_timeout, pump.moved, loop.time())

    def _look_for_idleness(self, pump: Pump, timeout: float, moved: int, since: float) -> None:
        """End it when no byte has moved for `timeout` seconds: it had moved `moved` of them at `since`.

        Looking now and then costs a session that moves bytes nothing. What moved between two looks counts as if it
        had moved just before the second one. A service that takes it over begins to count anew.
        """
        loop = asyncio.get_running_loop()
        if pump.moved != moved:
            moved, since = pump.moved, loop.time()
        left = since + timeout - loop.time()
        if left <= 0:
            self._expire(f"idle for {timeout:g} seconds")
            return
        pause = min(left, timeout / _LOOKS, _LOOK_EVERY)
        self._idle_timer = loop.call_later(pause, self._look_for_idleness, pump, timeout, moved, since)

    def _expire(self, error: str = "") -> None:
        tree = self._execution().tree
        if tree is None or not tree.alive:
            return  # the process was in time; its end is not noticed yet, or a background child holds the output
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._timed_out = True
        self.session = self._ledger.expired(self.session, error)
        self._do(self.stop(self._grace), self._kills)

    def _unrecorded(self, reason: str) -> None:
        """Its recording is lost. If it must not go on without, it is killed, and nobody gets what was not recorded."""
        if not self.session.record_or_end or self._leaving or self._parted:
            return
        self._last_words = f"the session is ended: {reason}"
        self.session = self._ledger.condemned(self.session, reason)
        assert self._pump is not None
        self._pump.hush()
        self.stdin.close()
        if (tree := self._execution().tree) is not None:
            self._do(tree.kill(self._monitor()), self._kills)

    def _sweep_up(self, exited: "asyncio.Future[ExitStatus]") -> None:
        """Kill what the monitor, whose own timeout ends the process alone, has left of the tree."""
        if exited.cancelled() or exited.exception() is not None:
            return
        tree = self._execution().tree
        if exited.result().source is ExitSource.TIMEOUT and tree is not None:
            self._do(tree.kill(self._monitor()), self._kills)

    def _end(self, status: ExitStatus, error: str = "") -> None:
        timed_out = self._timed_out or status.source is ExitSource.TIMEOUT
        self.session = self._ledger.stopped(
            self.session, status, error=error, timed_out=timed_out, transferred=self.transferred
        )
        self._over(self)

    def _let_go(self, client: AttachedClient | None) -> None:
        """Part from a process that may live on."""
        self._parted = True
        self._recording.leave()
        self._over(self)
        self._settle()
        self._execution().leave()
        if client is not None:
            client.abandon()

    def _settle(self) -> None:
        if not self.settled.done():
            self.settled.set_result(None)

    def _execution(self) -> Execution:
        assert self.execution is not None
        return self.execution

    def _monitor(self) -> ProcessIdentity | None:
        return self._execution().monitor

    def _tree(self) -> ProcessTree:
        tree = self.execution.tree if self.execution is not None and self.started else None
        if tree is None:
            raise self._not_running()
        return tree

    def _not_running(self) -> Conflict:
        return Conflict(f"exec command {self.session.id} is not running")

    def _do(self, chore: Coroutine[Any, Any, Any], *kinds: set[asyncio.Task[Any]]) -> None:
        """Do something beside the session's own task."""
        task = asyncio.create_task(chore)
        for kind in (self._chores, *kinds):
            kind.add(task)
            task.add_done_callback(kind.discard)

    def _unforeseen(self, error: Exception) -> Internal:
        """Log what nobody planned for, and return what the client may know of it."""
        log.error("exec %s in %s failed", self.session.id[:12], self.session.container.name, exc_info=error)
        return Internal("internal error; the service's log has the details")


def _attachment(one: _Attached) -> Attachment:
    return Attachment(
        client=one.client,
        first=False,
        stdin=one.stdin,
        rest=one.feeder.rest,
        withheld=one.feeder.withheld,
        offset=one.follower.offset,
        wanted=one.follower.wanted,
    )


def _tell(begun: "asyncio.Future[ExecSession] | None", outcome: ExecSession | ExecgateError) -> None:
    """Tell whoever waits for the start of a detached session."""
    if begun is None or begun.done():
        return
    if isinstance(outcome, ExecgateError):
        begun.set_exception(outcome)
    else:
        begun.set_result(outcome)
