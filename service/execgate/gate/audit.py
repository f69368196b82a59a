"""The audit log: who did what in which container, by which rule, and what came of it.

An entry is written before what it tells of is done, and before the step is on record: `start` before there is anything
that could run. So a crash in between tells of a step that was not taken, or tells of it twice, and never of less. What
an entry has of strangers is bounded and ASCII: the command (an excess is told by its length and hash), names, reasons.
The *values* of the environment, what is read and what is written are in no entry.

`gate.audit_log` says where entries go, `gate.audit_chain` how they hold together, docs/audit.md what they mean.
"""

import contextlib
import hashlib
import itertools
import os
import re
import signal as signals
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from execgate.gate.audit_chain import escape
from execgate.gate.audit_log import AuditLog, AuditSettings
from execgate.gate.rules import Refusal
from execgate.model.access import Asked, Grant, Verb
from execgate.model.config import ExecConfig, ResolvedUser
from execgate.model.container import Container
from execgate.model.principal import Principal
from execgate.model.session import ExecSession, SessionState

Fields = dict[str, Any]

_ARGV, _ENV, _NAME, _TEXT = 4096, 2048, 256, 512
"""Bytes that an entry has for a command, for the names of an environment, for any other name, for a sentence or a path.

They are those of the entry, where JSON takes up to twelve for a character.
"""

_MOST = 12
_AROUND = len('"",')
_PLAIN = re.compile(r"[ !#-\[\]-~]*")
"""What JSON takes as it is."""

_NAMES, _GIDS = 8, 64
"""Names that a list of names has, and supplementary groups."""


class Audit:
    """What there is to tell: the `Witness` of a ledger, and the `Journal` of a gate.

    With `audit_strict` those that say so raise Unavailable when the entry cannot be written: then it must not be done.
    """

    def __init__(self, log: AuditLog) -> None:
        self._log = log

    def step(self, session: ExecSession) -> None:
        """See `Witness`: Unavailable for `created` and `starting` only."""
        about = _about(session)
        match session.state:
            case SessionState.CREATED:
                details = _origin(session) | _request(session.config, session.user)
                self._log.write("created", about | details, refusable=True)
            case SessionState.STARTING:
                self._log.write("start", about | _command(session.config, session.user), refusable=True)
            case SessionState.RUNNING:
                self._log.write("running", about | _process(session))
            case SessionState.STOPPED:
                self._log.write("exit", about | _end(session))

    async def flushed(self) -> None:
        """See `Witness`. Unavailable."""
        await self._log.flushed()

    def decided(self, principal: Principal, container: Container, asked: Asked, outcome: Grant | Refusal) -> None:
        """See `Journal`: Unavailable, if it is permitted.

        Of what is permitted the entry tells what runs: the request with the bounds of the rule in it.
        """
        granted = isinstance(outcome, Grant)
        fields = {
            **_identity(principal),
            "verb": Verb.EXEC,
            "container_id": _cut(container.id),
            "container_name": _cut(container.name),
            "engine": asked.target.engine,
            "image": _cut(asked.target.image),
            **_outcome(outcome),
            **_request(outcome.config if isinstance(outcome, Grant) else asked.config, asked.user),
            **({"host_equivalent": _list(asked.host_equivalent)} if asked.host_equivalent else {}),
        }
        self._log.write("allowed" if granted else "denied", fields, refusable=granted)

    def refused(self, principal: Principal, session: ExecSession, verb: Verb) -> None:
        """See `Journal`: never Unavailable, for nothing is done."""
        about = {"session": session.id, **_container(session), "owner": _cut(session.owner)}
        self._log.write("denied", {**_identity(principal), "verb": verb, **about})

    def attached(self, principal: Principal, session: ExecSession, *, stdin: bool) -> None:
        """See `Journal`: Unavailable."""
        self._asked_of("attach", principal, session, {"stdin": stdin})

    def used(self, principal: Principal, session: ExecSession, verb: Verb) -> None:
        """See `Journal`: Unavailable."""
        self._asked_of("use", principal, session, {"verb": verb})

    def signalled(self, principal: Principal, session: ExecSession, signal: str) -> None:
        """See `Journal`: a number, or `stop`. Unavailable."""
        if signal == "stop":
            self._asked_of("stop", principal, session, {})
        else:
            self._asked_of("signal", principal, session, {"signal": _signal_name(signal)})

    def removed(self, principal: Principal, session: ExecSession) -> None:
        """See `Journal`: Unavailable. One that runs is killed for it."""
        self._asked_of("remove", principal, session, {"running": True} if session.running else {})

    def close(self) -> None:
        """The service ends, here or in favour of the next; harmless when it was said."""
        self._log.close()

    def _asked_of(self, event: str, principal: Principal, session: ExecSession, fields: Fields) -> None:
        about = {**_identity(principal), "session": session.id, **_container(session), **fields}
        self._log.write(event, about, refusable=True)


class NoAudit(Audit):
    """Nothing is told to anybody."""

    def __init__(self) -> None:
        pass

    def step(self, session: ExecSession) -> None:
        """See `Audit`."""

    async def flushed(self) -> None:
        """See `Audit`."""

    def decided(self, principal: Principal, container: Container, asked: Asked, outcome: Grant | Refusal) -> None:
        """See `Audit`."""

    def refused(self, principal: Principal, session: ExecSession, verb: Verb) -> None:
        """See `Audit`."""

    def close(self) -> None:
        """See `Audit`."""

    def _asked_of(self, event: str, principal: Principal, session: ExecSession, fields: Fields) -> None:
        pass


@contextlib.contextmanager
def open_audit(settings: AuditSettings, *, version: str) -> Iterator[Audit]:
    """Open the audit log for a service of this `version`. Conflict when another service writes it.

    One that cannot be written now is none of the service's business until something is to be done.
    """
    if not settings.enabled:
        yield NoAudit()
        return
    log = AuditLog(settings)
    audit = Audit(log)
    try:
        manner = {"strict": settings.strict, "sync": settings.sync}
        log.begin({"version": version, "pid": os.getpid(), "host": _cut(os.uname().nodename), **manner})
        yield audit
    finally:
        audit.close()


# -- what is told ------------------------------------------------------------------------------------------------------


def _about(session: ExecSession) -> Fields:
    return {"session": session.id, "who": _cut(session.owner), **_container(session)}


def _container(session: ExecSession) -> Fields:
    return {
        "container_id": _cut(session.container.container_id),
        "container_name": _cut(session.container.name),
    }


def _origin(session: ExecSession) -> Fields:
    fields: Fields = {"rule": _cut(session.rule), "engine": session.engine, "image": _cut(session.image)}
    return fields | ({"record": session.record} if session.record else {})


def _outcome(outcome: Grant | Refusal) -> Fields:
    if isinstance(outcome, Grant):
        return {"rule": _cut(outcome.rule)}
    return {"reason": _cut(outcome.message, _TEXT), "hint": _cut(outcome.hint, _TEXT)}


def _identity(principal: Principal) -> Fields:
    """Who asks, with what the kernel or a certificate says besides."""
    fields: Fields = {"who": _cut(principal.id)}
    if others := sorted(principal.names - {principal.name}):
        fields["names"] = _list(others)
    if principal.uid is not None:
        fields["peer_uid"] = principal.uid
    if principal.pid:
        fields["peer_pid"] = principal.pid
    return fields


def _request(config: ExecConfig, user: ResolvedUser) -> Fields:
    """An exec in all that matters; what is as usual is left out."""
    fields = _command(config, user) | {"user": _cut(config.user), "gids": list(user.additional_gids[:_GIDS])}
    if config.working_dir:
        fields["cwd"] = _cut(config.working_dir, _TEXT)
    if config.env:
        names = [one.partition("=")[0] for one in config.env]
        fields["env"], rest = _within(names, _ENV)
        if rest:
            fields["env_count"] = len(names)
    if config.timeout is not None:
        fields["timeout"] = config.timeout
    return fields


def _command(config: ExecConfig, user: ResolvedUser) -> Fields:
    """What runs, as whom, and with which powers.

    `argv_bytes` and `argv_sha256` are those of the whole command as /proc/PID/cmdline has it: a NUL behind each
    argument.
    """
    argv, rest = _within(config.args, _ARGV)
    fields: Fields = {"argv": argv}
    if rest:
        whole = b"".join(_bytes(one) + b"\0" for one in config.args)
        fields |= {"argv_bytes": len(whole), "argv_sha256": hashlib.sha256(whole).hexdigest()}
    fields |= {"uid": user.uid, "gid": user.gid}
    fields |= {name: True for name, is_so in (("tty", config.tty), ("privileged", config.privileged)) if is_so}
    return fields


def _process(session: ExecSession) -> Fields:
    process = session.process
    return {} if process is None else {"pid": process.pid, "start_time": process.start_time}


def _end(session: ExecSession) -> Fields:
    moved = session.transferred
    fields: Fields = {"timed_out": session.timed_out}
    if session.exit is not None:
        fields |= {"code": session.exit.code, "source": session.exit.source}
    if session.error:
        fields["error"] = _cut(session.error, _TEXT)
    if session.started_at is not None and session.finished_at is not None:
        fields["seconds"] = round(session.finished_at - session.started_at, 6)
    return fields | {"stdin_bytes": moved.stdin, "stdout_bytes": moved.stdout, "stderr_bytes": moved.stderr}


def _within(items: Sequence[str], room: int) -> tuple[list[str], bool]:
    """Return the items for which `room` bytes of an entry suffice, the last one cut, and whether any is not whole."""
    if sum(map(len, items)) * _MOST + len(items) * _AROUND <= room:
        return list(items), False
    found: list[str] = []
    for item in items:
        room -= _AROUND
        if room < 0:
            return found, True
        found.append(_cut(item, room))
        if len(found[-1]) < len(item):
            return found, True
        room -= _size(item)
    return found, False


def _cut(text: str, room: int = _NAME) -> str:
    """Return as much of a text as `room` bytes of an entry have room for."""
    if len(text) * _MOST <= room or (len(text) <= room and _size(text) <= room):
        return text
    kept = list(text[:room])
    left = room - sum(map(_size, kept))
    while left < 0:
        left += _size(kept.pop())
    return "".join(kept)


def _size(text: str) -> int:
    """Return how many bytes of an entry a text takes, without its quotes."""
    return len(text) if _PLAIN.fullmatch(text) else len(escape(text)) - 2


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # JSON can have halves of characters


def _list(names: Iterable[str]) -> list[str]:
    return [_cut(name) for name in itertools.islice(names, _NAMES)]


def _signal_name(number: str) -> str:
    try:
        return signals.Signals(int(number)).name
    except ValueError:  # a real-time signal
        return _cut(number)
