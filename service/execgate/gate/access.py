"""What one principal sees and may do: the only way from a request to containers and sessions.

What always holds:

- A container that no rule shows does not exist: not by id, name or prefix, in no list, no event, no error.
- A session belongs to the principal that created it. For everybody else it does not exist either, unless a rule gives
  them a verb on others' sessions.
- Who may see a session and not do what they ask is told so (Forbidden); who may not see it gets NotFound, in the words
  for a session that was never there.
- An exec is decided on as it would run: the container that was found, the user as numbers, the configuration that is
  then stored. What is stored is what runs, and it is decided on once more when it starts: rules may have changed.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from execgate.containers.catalog import Catalog
from execgate.gate.rules import Policy, Refusal
from execgate.model.access import Asked, Grant, Record, Target, Verb, target_of
from execgate.model.config import ConsoleSize, ExecConfig, ResolvedUser
from execgate.model.container import Container
from execgate.model.errors import Forbidden, NotFound
from execgate.model.events import Event
from execgate.model.ids import ContainerId, SessionId
from execgate.model.principal import Principal
from execgate.model.session import ByteCounts, ExecSession, SessionState
from execgate.sessions import oneshot
from execgate.sessions.backlog import Backlog
from execgate.sessions.events import EventBus
from execgate.sessions.live import BOTH, AttachedClient
from execgate.sessions.manager import SessionManager, Spec


class Journal(Protocol):
    """Who keeps what was asked and decided (`gate.audit.Audit`). Each raises Unavailable if it must and cannot."""

    def decided(self, principal: Principal, container: Container, asked: Asked, outcome: Grant | Refusal) -> None:
        """An exec was permitted or refused."""

    def refused(self, principal: Principal, session: ExecSession, verb: Verb) -> None:
        """Somebody who sees a session may not do this to it."""

    def attached(self, principal: Principal, session: ExecSession, *, stdin: bool) -> None:
        """Somebody attaches to a running session."""

    def used(self, principal: Principal, session: ExecSession, verb: Verb) -> None:
        """Somebody starts or resizes a session that is another's, reads its captured output, or writes to its stdin."""

    def signalled(self, principal: Principal, session: ExecSession, signal: str) -> None:
        """Somebody sends a signal, its number, or `stop`."""

    def removed(self, principal: Principal, session: ExecSession) -> None:
        """Somebody removes a session."""


class Gate:
    """Makes an `Access` for whoever asks."""

    def __init__(
        self,
        *,
        policy: Policy,
        journal: Journal,
        catalog: Catalog,
        sessions: SessionManager,
        events: EventBus,
        host_equivalent: Callable[[Container, Mapping[str, Any]], tuple[str, ...]],
    ) -> None:
        """`host_equivalent` tells why root in a container, with its config.json, is root on the host."""
        self.policy = policy
        self.journal = journal
        self.catalog = catalog
        self.sessions = sessions
        self.events = events
        self.host_equivalent = host_equivalent

    def access(self, principal: Principal) -> "Access":
        """Return what this one may do."""
        return Access(self, principal)


class Access:
    """The containers and sessions of one principal.

    Errors are those of `Catalog` and `SessionManager`; Forbidden; Unavailable when the journal must be kept and cannot.
    """

    def __init__(self, gate: Gate, principal: Principal) -> None:
        self.principal = principal
        self._gate = gate
        self._policy = gate.policy
        self._sessions = gate.sessions

    # -- containers --------------------------------------------------------------------------------------------------

    def containers(self) -> list[Container]:
        """Return those that exist for the principal, as `Catalog.list` does. Blocks."""
        return [container for container in self._gate.catalog.list() if self._shows(container)]

    def find(self, ref: str) -> Container:
        """Look one up, as `Catalog.find` does."""
        return self._gate.catalog.find(ref, self._shows)

    def spec(self, container: Container) -> Mapping[str, Any]:
        """Return the config.json of a container, without its environment if the principal may not exec there."""
        spec = self._gate.catalog.spec(container)
        if self._policy.permits(self.principal, target_of(container), Verb.EXEC, own=True):
            return spec
        return {**spec, "process": {**spec.get("process", {}), "env": []}}

    def for_top(self, ref: str) -> Container:
        """Look up a container whose processes the principal may see."""
        container = self.find(ref)
        if not self._policy.permits(self.principal, target_of(container), Verb.TOP, own=True):
            raise Forbidden(f"you may not see the processes of container {container.id}")
        return container

    def running_in(self, container_id: ContainerId) -> Sequence[SessionId]:
        """Return the ids of the sessions that run in a container."""
        running = self._sessions.running_in(container_id)
        return [session_id for session_id in running if self._sees(self._sessions.inspect(session_id))]

    # -- sessions ----------------------------------------------------------------------------------------------------

    async def create(self, container_ref: str, config: ExecConfig) -> ExecSession:
        """See `SessionManager.create`."""
        return await self._sessions.create(container_ref, config, self)

    def grant(self, container: Container, spec: Spec, config: ExecConfig, user: ResolvedUser) -> Grant:
        """See `sessions.manager.Caller`."""
        asked = self._asked(container, spec, config, user)
        outcome = self._policy.decide(self.principal, asked)
        self._gate.journal.decided(self.principal, container, asked, outcome)
        return _granted(outcome, container)

    def confirm(self, container: Container, spec: Spec, session: ExecSession) -> None:
        """See `sessions.manager.Caller`: what was stored is decided on by the rules, and in the container, of today."""
        if session.owner != self.principal.id:
            # Its owner's rule has said what may run, and another one that we may start it.
            if not self._policy.has(session.rule):
                raise Forbidden(
                    f"permission denied: what permitted exec {session.id} does not hold any more",
                    hint=f"rule {session.rule} is gone; {self.principal.id} would start it for {session.owner}",
                )
            return
        asked = self._asked(container, spec, session.config, session.user)
        outcome = self._policy.decide(self.principal, asked)
        if isinstance(outcome, Grant) and not _is_bound_by(session, outcome):
            outcome = _outdated(session, outcome)
        if isinstance(outcome, Refusal):
            self._gate.journal.decided(self.principal, container, asked, outcome)
        _granted(outcome, container)

    async def start_detached(
        self, session_id: str, size: ConsoleSize | None = None, *, intended: Callable[[], None] = lambda: None
    ) -> ExecSession:
        """See `SessionManager.start_detached`."""
        session = self._used(session_id, Verb.EXEC)
        return await self._sessions.start_detached(session.id, size, intended=intended, caller=self)

    async def started(self, session_id: str) -> ExecSession:
        """See `SessionManager.started`."""
        return await self._sessions.started(self._may(session_id, Verb.EXEC).id)

    async def start_attached(
        self, session_id: str, size: ConsoleSize | None, take_over: Callable[[], Awaitable[AttachedClient]]
    ) -> None:
        """See `SessionManager.start_attached`."""
        session = self._used(session_id, Verb.EXEC)
        await self._sessions.start_attached(session.id, size, take_over, caller=self)

    def to_start(self, session_id: str) -> ExecSession:
        """Return a session that the principal may start, were it not started yet."""
        return self._may(session_id, Verb.EXEC)

    async def resize(self, session_id: str, size: ConsoleSize) -> None:
        """See `SessionManager.resize`."""
        await self._sessions.resize(self._used(session_id, Verb.EXEC).id, size)

    def inspect(self, session_id: str) -> ExecSession:
        """See `SessionManager.inspect`."""
        return self._may(session_id, Verb.INSPECT)

    def transferred(self, session: ExecSession) -> ByteCounts:
        """See `SessionManager.transferred`."""
        return self._sessions.transferred(session)

    def list(
        self,
        container_ref: str | None = None,
        *,
        states: Collection[SessionState] = (),
        labels: Mapping[str, str | None] | None = None,
    ) -> Sequence[ExecSession]:
        """See `SessionManager.list`. A container that is gone exists for those who see a session in it."""
        if container_ref is not None:
            try:
                container_ref = self.find(container_ref).id
            except NotFound:
                if not any(map(self._sees, self._sessions.of_id(ContainerId(container_ref)))):
                    raise
        found = self._sessions.list(container_ref, states=states, labels=labels)
        return [session for session in found if self._sees(session)]

    async def wait(self, session_id: str) -> ExecSession:
        """See `SessionManager.wait`."""
        return await self._sessions.wait(self._may(session_id, Verb.INSPECT).id)

    def to_attach(self, session_id: str) -> ExecSession:
        """Return a session that the principal may attach to."""
        return self._may(session_id, Verb.ATTACH)

    def for_logs(self, session_id: str) -> ExecSession:
        """Return a session whose output the principal may read."""
        return self._may(session_id, Verb.LOGS)

    async def attach(
        self,
        session_id: str,
        take_over: Callable[[int], Awaitable[AttachedClient]],
        *,
        after: int | None = None,
        stdin: bool = True,
        wanted: frozenset[int] = BOTH,
    ) -> None:
        """See `SessionManager.attach`."""
        session = self._may(session_id, Verb.ATTACH)
        self._gate.journal.attached(self.principal, session, stdin=stdin)
        await self._sessions.attach(session.id, take_over, after=after, stdin=stdin, wanted=wanted)

    async def write_stdin(self, session_id: str, data: bytes, *, eof: bool = False) -> None:
        """See `SessionManager.write_stdin`."""
        await self._sessions.write_stdin(self._used(session_id, Verb.ATTACH).id, data, eof=eof)

    async def output(self, session_id: str) -> Backlog:
        """See `SessionManager.output`."""
        return await self._sessions.output(self._used(session_id, Verb.LOGS).id)

    async def kill(self, session_id: str, signal: int) -> None:
        """See `SessionManager.kill`."""
        session = self._may(session_id, Verb.KILL)
        self._gate.journal.signalled(self.principal, session, str(signal))
        await self._sessions.kill(session.id, signal)

    async def stop(self, session_id: str, grace: float | None = None) -> ExecSession:
        """See `SessionManager.stop`."""
        session = self._may(session_id, Verb.KILL)
        self._gate.journal.signalled(self.principal, session, "stop")
        return await self._sessions.stop(session.id, grace)

    async def remove(self, session_id: str, *, force: bool = False) -> None:
        """See `SessionManager.remove`; `force` on one that runs kills."""
        session = self._may(session_id, Verb.REMOVE)
        if force and session.running:
            self._may(session_id, Verb.KILL)
        self._gate.journal.removed(self.principal, session)
        await self._sessions.remove(session.id, force=force)

    async def run(
        self,
        container_ref: str,
        config: ExecConfig,
        *,
        stdin: bytes,
        limit: int,
        begun: Callable[[SessionId, oneshot.Collector], None],
    ) -> oneshot.RunResult:
        """See `oneshot.run`. All that it does to its own session belongs to the one permission."""
        return await oneshot.run(
            self._sessions, container_ref, config, stdin=stdin, limit=limit, begun=begun, caller=self
        )

    async def resume(self, session_id: str, collector: oneshot.Collector) -> oneshot.RunResult:
        """See `oneshot.resume`: the session is this principal's, and is decided on again if it has yet to start."""
        session = self._sessions.inspect(session_id)
        if session.owner != self.principal.id:
            raise _unknown(session_id)
        return await oneshot.resume(self._sessions, session.id, collector, caller=self)

    async def result(self, session_id: str, *, limit: int) -> oneshot.RunResult:
        """See `oneshot.result`."""
        return await oneshot.result(self._sessions, self._used(session_id, Verb.LOGS).id, limit=limit)

    # -- events ------------------------------------------------------------------------------------------------------

    @property
    def events(self) -> EventBus:
        """All events; `sees_event` tells which of them are the principal's to see."""
        return self._gate.events

    def sees_event(self, event: Event) -> bool:
        """Return whether an event exists for the principal. Of a session that is forgotten only its owner's do."""
        try:
            return self._sees(self._sessions.inspect(event.attributes.get("execID", "")))
        except NotFound:
            return event.owner == self.principal.id

    # -- inside ------------------------------------------------------------------------------------------------------

    def _asked(self, container: Container, spec: Spec, config: ExecConfig, user: ResolvedUser) -> Asked:
        """Return an exec as it would run."""
        host_equivalent = self._gate.host_equivalent(container, spec)
        return Asked(target=target_of(container), config=config, user=user, host_equivalent=host_equivalent)

    def _shows(self, container: Container) -> bool:
        return self._policy.shows(self.principal, target_of(container))

    def _sees(self, session: ExecSession) -> bool:
        return self._permits(session, Verb.INSPECT)

    def _permits(self, session: ExecSession, verb: Verb) -> bool:
        own = session.owner == self.principal.id
        return self._policy.permits(self.principal, _target_of(session), verb, own=own) is not None

    def _may(self, session_id: str, verb: Verb) -> ExecSession:
        """Return a session if the principal may do this to it. NotFound, Forbidden."""
        session = self._sessions.inspect(session_id)
        if self._permits(session, verb):
            return session
        if not self._sees(session):
            raise _unknown(session_id)
        self._gate.journal.refused(self.principal, session, verb)
        raise Forbidden(f"you may see exec {session.id}, and not {verb} it", hint=f"{self.principal.id}")

    def _used(self, session_id: str, verb: Verb) -> ExecSession:
        """Return a session if the principal may do this to it, and have it journalled if it is another's."""
        session = self._may(session_id, verb)
        if session.owner != self.principal.id:
            self._gate.journal.used(self.principal, session, verb)
        return session


def _granted(outcome: Grant | Refusal, container: Container) -> Grant:
    """Return a permission. Forbidden; NotFound when the container does not exist for whoever asked."""
    if isinstance(outcome, Grant):
        return outcome
    if not outcome.visible:  # since it was looked up
        raise NotFound(f"No such container: {container.id}", hint=outcome.hint)
    raise Forbidden(outcome.message, hint=outcome.hint)


def _is_bound_by(session: ExecSession, grant: Grant) -> bool:
    """Return whether a session, as it is stored, has the bounds of a permission, and is recorded as it demands."""
    recorded = session.record is Record.ALL or grant.record in (Record.NOTHING, session.record)
    return grant.config == session.config and recorded and session.record_or_end >= grant.record_or_end


def _outdated(session: ExecSession, grant: Grant) -> Refusal:
    """Return the answer to a start that a rule would allow with other bounds: what is stored is what would run."""
    return Refusal(
        message=f"permission denied: the rules have changed since exec {session.id} was created; create it anew",
        hint=f"rule {grant.rule} has bounds, or a recording, that rule {session.rule} had not",
        visible=True,
    )


def _target_of(session: ExecSession) -> Target:
    """Return the container of a session as it was, for it may be gone."""
    return Target(
        engine=session.engine,
        names=(session.container.name, *session.aliases),
        image=session.image,
        labels=session.container_labels,
    )


def _unknown(session_id: str) -> NotFound:
    """Return what `SessionManager.inspect` raises for a session that was never there."""
    return NotFound(f"No such exec instance: {session_id[:64]}")
