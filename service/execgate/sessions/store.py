"""Where sessions are kept: one SQLite file, and the only writer of a session's state.

The lifecycle is enforced here, by compare-and-set: `UPDATE … WHERE id = ? AND state = ?`. Whoever finds the state
changed underneath has lost the race and is told so. The calls are synchronous on purpose: the file is on a tmpfs,
a statement takes some 20 µs, and a hop to a thread would cost more than it saves.

Reading costs nothing: every record is also kept in memory, written through. The file is for the next service, and
for those who look from outside. Should another process have changed it all the same, the compare-and-set notices,
and the record is read anew.

A reboot forgets every session: the file remembers the boot it was written in and starts anew in another one.

A service that is updated finds the records of the older one: what a record lacks has its default, and one that cannot
be understood is dropped, with a line in the log. The file of a *newer* service is not understood at all.
"""

import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from execgate.model.errors import Conflict, Internal, Unavailable
from execgate.model.ids import ContainerId, SessionId, parse_session_id
from execgate.model.session import TRANSITIONS, ExecSession, SessionState

log = logging.getLogger(__name__)

_SCHEMA_VERSION = 2
_COLUMNS = "id, state, created_at, record"
"""What every version of the table has had; version 1 had more, and indexes."""
# Rows with numbers. In a table WITHOUT ROWID a row of more than a quarter of a page goes to pages of its own (SQLite's
# file format, 1.6), and a container's labels make it that long: every step would cost twice as much.
_SCHEMA = f"""
CREATE TABLE boot (id TEXT NOT NULL);
CREATE TABLE session (
    id         TEXT PRIMARY KEY,
    state      TEXT NOT NULL,
    created_at REAL NOT NULL,
    record     TEXT NOT NULL
);
PRAGMA user_version = {_SCHEMA_VERSION};
"""
_BUSY_TIMEOUT = 2.0
_BROKEN = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
"""What SQLite says of a file that is no database, or none any more."""
_RECORD = TypeAdapter(ExecSession)


class StateChanged(Conflict):
    """The session was no longer in the state that a transition started from."""


class SessionStore:
    """The records of all sessions that are known. Safe against other processes, not against other threads."""

    def __init__(self, path: Path, *, boot_id: str, lost: Callable[[], Iterable[str]] = tuple) -> None:
        """Open the file, or begin one; one that is broken is set aside.

        `lost` are the records of sessions that may still run, from elsewhere: those that the file lacks are added.
        """
        self._path = path
        self._known: dict[SessionId, ExecSession] = {}
        self._by_container: dict[ContainerId, dict[SessionId, ExecSession]] = {}
        self._unfinished: dict[ContainerId, set[SessionId]] = {}
        self._unfinished_of: Counter[tuple[str, str]] = Counter()  # by owner and rule
        self._created: set[SessionId] = set()
        self._last_text: tuple[SessionId, str] | None = None  # what was written last
        self._translated = _Translated(path)
        with self._translated:
            try:
                rows = self._open(boot_id)
            except sqlite3.DatabaseError as error:
                if error.sqlite_errorcode not in _BROKEN:
                    raise
                rows = self._begin_anew(boot_id, str(error))
        for session_id, record in rows:
            try:
                self._remember(_load_as(path, session_id, record))
            except Internal as error:  # one that nobody can read is nobody's: it must not keep the service down
                log.error("a session's record is dropped: %s (%s)", session_id[:12], error.hint)
                self._delete([SessionId(session_id)])
        self._add_lost(boot_id, lost())

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def add(self, session: ExecSession) -> None:
        """Keep a new session. Conflict when its id is taken."""
        with self._translated:
            try:
                self._db.execute(
                    "INSERT INTO session VALUES (?, ?, ?, ?)",
                    (session.id, session.state, session.created_at, _dump(session)),
                )
            except sqlite3.IntegrityError as error:
                raise Conflict(f"exec session {session.id} exists already") from error
        self._remember(session)

    def get(self, session_id: SessionId) -> ExecSession | None:
        """Return the session, or None."""
        return self._known.get(session_id)

    def text_of(self, session_id: SessionId) -> str:
        """Return the record of a session as it is stored; `lost` of a later store takes it."""
        if self._last_text is not None and self._last_text[0] == session_id:  # which is asked for in a start
            return self._last_text[1]
        with self._translated:
            row = self._db.execute("SELECT record FROM session WHERE id = ?", (session_id,)).fetchone()
        return str(row[0]) if row else ""

    def move(self, before: ExecSession, after: ExecSession) -> ExecSession:
        """Take the session from `before.state` to `after.state` and keep `after`.

        StateChanged when another was faster; a step that is not in the table of transitions is a bug (ValueError).
        Once a session is no longer created its environment is not needed again, and it holds secrets: it goes.
        """
        if (before.state, after.state) not in TRANSITIONS:
            raise ValueError(f"a session cannot go from {before.state} to {after.state}")
        if after.config.env:
            after = replace(after, config=replace(after.config, env=()))
        text = _dump(after)
        with self._translated:
            changed = self._db.execute(
                "UPDATE session SET state = ?, record = ? WHERE id = ? AND state = ?",
                (after.state, text, before.id, before.state),
            ).rowcount
        self._last_text = (after.id, text) if changed else None
        if not changed:
            self._reread(before.id)
            raise StateChanged(f"exec session {before.id} is no longer {before.state}")
        self._remember(after)
        return after

    def count(self) -> int:
        """Return how many sessions are known."""
        return len(self._known)

    def all(self) -> Sequence[ExecSession]:
        """Return every session, oldest first."""
        return list(self._known.values())

    def of_container(self, container_id: ContainerId) -> Sequence[ExecSession]:
        """Return the sessions of a container, oldest first."""
        return list(self._by_container.get(container_id, {}).values())

    def running_in(self, container_id: ContainerId) -> list[SessionId]:
        """Return the ids of the sessions that run in a container, oldest first."""
        running = [self._known[one] for one in self._unfinished.get(container_id, ()) if self._known[one].running]
        return [session.id for session in sorted(running, key=lambda session: session.created_at)]

    def unfinished_in(self, container_id: ContainerId) -> int:
        """Return how many sessions of a container are created or running."""
        return len(self._unfinished.get(container_id, ()))

    def unfinished_of(self, owner: str, rule: str) -> int:
        """Return how many sessions of an owner, permitted by a rule, are created or running."""
        return self._unfinished_of[owner, rule]

    @property
    def created(self) -> int:
        """How many sessions wait for their start."""
        return len(self._created)

    def forget(self, old: Callable[[ExecSession], bool], among: Iterable[SessionId] | None = None) -> list[SessionId]:
        """Drop the sessions that are created or stopped and that `old` is true of; return which those were.

        `among` are the only ones that are looked at, if it is given.
        """
        looked_at = self._known.values() if among is None else filter(None, map(self._known.get, among))
        ids = [session.id for session in looked_at if not session.running and old(session)]
        self._delete(ids)
        return ids

    # -- inside ---------------------------------------------------------------------------------------------------

    def _remember(self, session: ExecSession) -> None:
        container_id = session.container.container_id
        self._known[session.id] = session
        self._by_container.setdefault(container_id, {})[session.id] = session
        self._unindex(session)
        if session.state is not SessionState.STOPPED:
            self._unfinished.setdefault(container_id, set()).add(session.id)
            self._unfinished_of[session.owner, session.rule] += 1
        if session.state is SessionState.CREATED:
            self._created.add(session.id)

    def _unindex(self, session: ExecSession) -> None:
        self._created.discard(session.id)
        unfinished = self._unfinished.get(session.container.container_id, set())
        if session.id in unfinished:
            unfinished.discard(session.id)
            self._unfinished_of[session.owner, session.rule] -= 1
            if not self._unfinished_of[session.owner, session.rule]:
                del self._unfinished_of[session.owner, session.rule]
            if not unfinished:
                del self._unfinished[session.container.container_id]

    def _delete(self, ids: Sequence[SessionId]) -> None:
        if not ids:
            return
        with self._translated, self._db:  # which commits, or rolls back
            self._db.execute("BEGIN")
            self._db.executemany("DELETE FROM session WHERE id = ?", [(one,) for one in ids])
        for session_id in ids:
            if (session := self._known.pop(session_id, None)) is not None:
                self._unindex(session)
                siblings = self._by_container[session.container.container_id]
                del siblings[session_id]
                if not siblings:
                    del self._by_container[session.container.container_id]

    def _reread(self, session_id: SessionId) -> None:
        with self._translated:
            row = self._db.execute("SELECT record FROM session WHERE id = ?", (session_id,)).fetchone()
        if row is not None:
            self._remember(_load_as(self._path, session_id, row[0]))

    def _open(self, boot_id: str) -> list[tuple[str, str]]:
        self._db = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT, isolation_level=None)
        try:
            self._path.chmod(0o600)
            self._prepare(boot_id)
            return self._db.execute("SELECT id, record FROM session ORDER BY created_at").fetchall()
        except BaseException:
            self._db.close()
            raise

    def _add_lost(self, boot_id: str, records: Iterable[str]) -> None:
        """Add the sessions that run and that the file does not know, because it is new, or was damaged or deleted."""
        found = [session for session in map(_load_or_none, records) if session and session.container.boot_id == boot_id]
        missing = [session for session in found if session.id not in self._known]
        for session in missing:
            self.add(session)
        if missing:
            log.warning("%d sessions are taken over from their directories: the store did not know them", len(missing))

    def _begin_anew(self, boot_id: str, reason: str) -> list[tuple[str, str]]:
        """Set a broken file aside, and begin another one."""
        aside = self._path.with_suffix(".broken")
        self._path.replace(aside)
        for rest in ("-wal", "-shm"):
            self._path.with_name(self._path.name + rest).unlink(missing_ok=True)
        self._open(boot_id)
        log.error("the session store was broken (%s) and is now %s", reason, aside)
        return []

    def _prepare(self, boot_id: str) -> None:
        # WAL lets `execgate sessions` read beside the service; nothing here has to survive a power cut.
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = OFF")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        rows: list[tuple[object, ...]] = []
        if 0 < version <= _SCHEMA_VERSION and self._db.execute("SELECT id FROM boot").fetchone() == (boot_id,):
            if version == _SCHEMA_VERSION:
                return
            rows = self._db.execute(f"SELECT {_COLUMNS} FROM session").fetchall()  # noqa: S608  (a constant)
            log.info("%d sessions of an older version are taken over", len(rows))
        with self._db:  # which commits, or rolls back: one version or the other
            self._db.execute("BEGIN")
            for table in ("boot", "session"):
                self._db.execute(f"DROP TABLE IF EXISTS {table}")
            for statement in filter(str.strip, _SCHEMA.split(";")):
                self._db.execute(statement)
            self._db.execute("INSERT INTO boot VALUES (?)", (boot_id,))
            self._db.executemany("INSERT INTO session VALUES (?, ?, ?, ?)", rows)


def read_sessions(path: Path) -> list[ExecSession]:
    """Return the sessions in a store without touching it, whether or not a service runs."""
    if not path.exists():
        return []
    with _Translated(path):
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY_TIMEOUT)
        try:
            rows = connection.execute("SELECT record FROM session ORDER BY created_at").fetchall()
        finally:
            connection.close()
    return [_load(path, record) for (record,) in rows]


def _load(path: Path, record: str) -> ExecSession:
    try:
        return _parsed(record)
    except ValidationError as error:
        raise Internal("the session's record cannot be read", hint=f"{path}: {error}") from error


def _load_or_none(record: str) -> ExecSession | None:
    """Load a record that may be none."""
    try:
        session = _parsed(record)
    except ValidationError:
        return None
    return session if parse_session_id(session.id) else None


def _parsed(record: str) -> ExecSession:
    session = _RECORD.validate_json(record)
    # One of a service that did not keep this: nothing of it may be over because of that.
    return session if session.since else replace(session, since=time.monotonic())


def _load_as(path: Path, session_id: str, record: str) -> ExecSession:
    """Load the record of the session `session_id`, and of no other: paths are built from ids."""
    session = _load(path, record)
    if session.id != session_id or parse_session_id(session_id) is None:
        raise Internal("the session's record cannot be read", hint=f"{path}: it is that of {session.id[:64]!r}")
    return session


def _dump(session: ExecSession) -> str:
    return _RECORD.dump_json(session, exclude_defaults=True).decode()  # what a record lacks has its default


class _Translated:
    """Turns what sqlite3 raises into the project's own categories, in a `with`, as often as one likes."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, sqlite3.Error):
            raise Unavailable("the session store is not available", hint=f"{self._path}: {error}") from error
