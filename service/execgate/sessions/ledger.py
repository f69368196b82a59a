"""The ledger: every step of every session, kept and told in one place, in the right order.

What always holds: a step is in the store before its event is published and before anybody who waits for it goes on.
What has happened has to be kept whatever the store says, because nothing undoes it: that a process runs, and its end.
If the store cannot take it now, it is kept here until the store does.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

from execgate.model.errors import Unavailable
from execgate.model.events import Event
from execgate.model.ids import ContainerId, SessionId
from execgate.model.process import ProcessIdentity
from execgate.model.session import ByteCounts, ExecSession, ExitStatus, SessionState
from execgate.sessions.events import EventBus
from execgate.sessions.store import SessionStore

log = logging.getLogger(__name__)


class Witness(Protocol):
    """Somebody who is told of every step before it is kept: an audit log."""

    def step(self, session: ExecSession) -> None:
        """Take note of a session in the state that it is about to get.

        Unavailable refuses a step that nothing has happened for yet, `created` and `starting`; for the others it must
        not be raised. A service that dies right behind this tells of the same step again.
        """

    async def flushed(self) -> None:
        """Return once what was noted outlives the host, if that is wanted. Unavailable: nothing may be done now."""


class NoWitness:
    """Nobody."""

    def step(self, session: ExecSession) -> None:
        """See `Witness`."""

    async def flushed(self) -> None:
        """See `Witness`."""


class Ledger:
    """The records of all sessions, their events, and those who wait for an end."""

    def __init__(self, store: SessionStore, events: EventBus, witness: Witness | None = None) -> None:
        self._store = store
        self._events = events
        self._witness = witness or NoWitness()
        self._unsaved: dict[SessionId, tuple[ExecSession, ExecSession]] = {}  # what the store has, and what is true
        self._waiters: dict[SessionId, asyncio.Future[ExecSession]] = {}

    # -- what there is ----------------------------------------------------------------------------------------------

    def get(self, session_id: SessionId) -> ExecSession | None:
        """Return a session, or None."""
        if session_id in self._unsaved:
            return self._unsaved[session_id][1]
        return self._store.get(session_id)

    def all(self) -> list[ExecSession]:
        """Return every session, oldest first."""
        return [self._unsaved[one.id][1] if one.id in self._unsaved else one for one in self._store.all()]

    def of_container(self, container_id: ContainerId) -> list[ExecSession]:
        """Return the sessions of a container, oldest first."""
        found = self._store.of_container(container_id)
        return [self._unsaved[one.id][1] if one.id in self._unsaved else one for one in found]

    def count(self) -> int:
        """Return how many sessions are known."""
        return self._store.count()

    # -- the steps --------------------------------------------------------------------------------------------------

    def created(self, session: ExecSession) -> None:
        """Keep a new session. Unavailable."""
        self._witness.step(session)
        self._store.add(session)
        self.tell(f"exec_create: {' '.join(session.config.args)}", session)

    def starting(self, session: ExecSession) -> ExecSession:
        """Keep the intent to start it. StateChanged when another was faster; Unavailable."""
        now, since = _time_of_step(session)
        after = replace(session, state=SessionState.STARTING, started_at=now, since=since)
        self._witness.step(after)
        return self._store.move(session, after)

    async def witnessed(self) -> None:
        """Return once what was kept may be acted upon: see `Witness.flushed`. Unavailable."""
        await self._witness.flushed()

    def running(self, session: ExecSession, process: ProcessIdentity, monitor: ProcessIdentity | None) -> ExecSession:
        """Keep who it is. Its time begins now."""
        now, since = _time_of_step(session)
        after = replace(
            session, state=SessionState.RUNNING, started_at=now, since=since, process=process, monitor=monitor
        )
        self._witness.step(after)
        return self._keep(session, after)

    def expired(self, session: ExecSession, error: str = "") -> ExecSession:
        """Keep that its time is over, before it is ended for it: whoever learns of its end cannot tell any more."""
        return self._keep(session, replace(session, timed_out=True, error=error))

    def condemned(self, session: ExecSession, error: str) -> ExecSession:
        """Keep why it is about to be ended by us, or would have been, were it not over."""
        return self._keep(session, replace(session, error=error))

    def attended(self, session: ExecSession, *, attended: bool) -> ExecSession:
        """Keep whether somebody is attached."""
        return self._keep(session, replace(session, attended=attended))

    def stopped(
        self,
        session: ExecSession,
        status: ExitStatus,
        *,
        error: str = "",
        timed_out: bool = False,
        transferred: ByteCounts | None = None,
    ) -> ExecSession:
        """Keep the end, then tell it. Without an `error` it has the one that is known already."""
        now, since = _time_of_step(session)
        after = replace(
            session,
            state=SessionState.STOPPED,
            finished_at=now,
            since=since,
            exit=status,
            error=error or session.error,
            timed_out=timed_out,
            transferred=transferred or ByteCounts(),
        )
        self._witness.step(after)
        after = self._keep(session, after)
        self._events.publish(_end_of(after))
        if (waiter := self._waiters.pop(session.id, None)) is not None and not waiter.done():
            waiter.set_result(after)
        return after

    def forget(self, old: Callable[[ExecSession], bool], among: Iterable[SessionId] | None = None) -> list[SessionId]:
        """Drop the sessions that do not run and that `old` is true of; first keep what could not be kept before.

        `among` are the only ones that are looked at, if it is given.
        """
        for session_id, (before, after) in list(self._unsaved.items()):
            self._store.move(before, after)
            del self._unsaved[session_id]
        gone = self._store.forget(old, among)
        for session_id in gone:
            if (waiter := self._waiters.pop(session_id, None)) is not None:
                waiter.cancel()
        return gone

    def _keep(self, before: ExecSession, after: ExecSession) -> ExecSession:
        """Store what has happened, or keep it here until the store can take it."""
        stored, _ = self._unsaved.get(before.id, (before, before))
        try:
            after = self._store.move(stored, after)
        except Unavailable as failure:
            log.error("exec %s %s, not stored yet: %s (%s)", after.id[:12], after.state, failure, failure.hint)
            self._unsaved[after.id] = (stored, after)
        else:
            self._unsaved.pop(after.id, None)
        return after

    # -- telling ----------------------------------------------------------------------------------------------------

    async def end_of(self, session: ExecSession) -> ExecSession | None:
        """Wait for the end of a session; None when it was forgotten before it was ever started."""
        known = self.get(session.id)
        if known is None or known.state is SessionState.STOPPED:
            return known
        waiter = self._waiters.setdefault(session.id, asyncio.get_running_loop().create_future())
        await asyncio.wait([waiter])
        return None if waiter.cancelled() else waiter.result()

    def tell(self, action: str, session: ExecSession, **attributes: str) -> None:
        """Publish an event of a session."""
        self._events.publish(_event(action, session, time.time_ns(), **attributes))

    def ends(self) -> list[Event]:
        """Return the events of all ends on record, oldest first.

        A service that is killed has no time to tell the last of them, and its successor knows of no other events.
        """
        return sorted(map(_end_of, filter(_is_over, self.all())), key=lambda event: event.time_ns)


def _is_over(session: ExecSession) -> bool:
    return session.state is SessionState.STOPPED


def _end_of(session: ExecSession) -> Event:
    """Return the event of an end that is on record: the same one whoever tells it."""
    assert session.exit is not None
    assert session.finished_at is not None
    return _event("exec_die", session, int(session.finished_at * 1_000_000_000), exitCode=str(session.exit.code))


def _event(action: str, session: ExecSession, time_ns: int, **attributes: str) -> Event:
    labels = session.container_labels
    return Event(
        action=action,
        container_id=session.container.container_id,
        time_ns=time_ns,
        attributes={
            **labels,
            "image": labels.get("org.opencontainers.image.ref.name", ""),
            "name": session.container.name,
            "execID": session.id,
            **attributes,
        },
        owner=session.owner,
    )


def _time_of_step(session: ExecSession) -> tuple[float, float]:
    """Return when a session takes its next step, which is now: for those who look, and as `since`.

    A clock that was set back would show an end before its start. So it is at least as late as the last step was, and
    what has passed since then.
    """
    since = time.monotonic()
    return max(time.time(), (session.started_at or session.created_at) + since - session.since), since
