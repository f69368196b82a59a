"""The ledger: every step of every session, kept and told in one place, in the right order.

What always holds: a step is in the store before its event is published and before anybody who waits for it goes on.
Only the end of a session has to succeed whatever the store says: it is kept here until the store takes it.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from execgate.model.errors import Unavailable
from execgate.model.events import Event
from execgate.model.ids import ContainerId, SessionId
from execgate.model.process import ProcessIdentity
from execgate.model.session import ByteCounts, ExecSession, ExitStatus, SessionState
from execgate.sessions.events import EventBus
from execgate.sessions.store import SessionStore

log = logging.getLogger(__name__)


class Ledger:
    """The records of all sessions, their events, and those who wait for an end."""

    def __init__(self, store: SessionStore, events: EventBus) -> None:
        self._store = store
        self._events = events
        self._unsaved: dict[SessionId, tuple[ExecSession, ExecSession]] = {}
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
        """Keep a new session."""
        self._store.add(session)
        self.tell(f"exec_create: {' '.join(session.config.args)}", session)

    def starting(self, session: ExecSession) -> ExecSession:
        """Keep the intent to start it. StateChanged when another was faster."""
        return self._store.move(session, replace(session, state=SessionState.STARTING, started_at=time.time()))

    def running(self, session: ExecSession, process: ProcessIdentity, monitor: ProcessIdentity | None) -> ExecSession:
        """Keep who it is."""
        return self._store.move(session, replace(session, state=SessionState.RUNNING, process=process, monitor=monitor))

    def stopped(
        self,
        session: ExecSession,
        status: ExitStatus,
        *,
        error: str = "",
        timed_out: bool = False,
        transferred: ByteCounts | None = None,
    ) -> ExecSession:
        """Keep the end, then tell it. A store that cannot take it now gets it later; until then it is kept here."""
        after = replace(
            session,
            state=SessionState.STOPPED,
            finished_at=time.time(),
            exit=status,
            error=error,
            timed_out=timed_out,
            transferred=transferred or ByteCounts(),
        )
        try:
            after = self._store.move(session, after)
        except Unavailable as failure:
            log.error("the end of exec %s is not stored yet: %s (%s)", session.id[:12], failure, failure.hint)
            self._unsaved[session.id] = (session, after)
        self.tell("exec_die", session, exitCode=str(status.code))
        if (waiter := self._waiters.pop(session.id, None)) is not None and not waiter.done():
            waiter.set_result(after)
        return after

    def forget(self, old: Callable[[ExecSession], bool]) -> list[SessionId]:
        """Drop the sessions that do not run and that `old` is true of; first keep what could not be kept before."""
        for session_id, (before, after) in list(self._unsaved.items()):
            self._store.move(before, after)
            del self._unsaved[session_id]
        gone = self._store.forget(old)
        for session_id in gone:
            if (waiter := self._waiters.pop(session_id, None)) is not None:
                waiter.cancel()
        return gone

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
        labels = session.container_labels
        self._events.publish(
            Event(
                action=action,
                container_id=session.container.container_id,
                time_ns=time.time_ns(),
                attributes={
                    **labels,
                    "image": labels.get("org.opencontainers.image.ref.name", ""),
                    "name": session.container.name,
                    "execID": session.id,
                    **attributes,
                },
            )
        )
