"""Where sessions are kept: one SQLite file, and the only writer of a session's state.

The lifecycle is enforced here, by compare-and-set: `UPDATE … WHERE id = ? AND state = ?`. Whoever finds the state
changed underneath has lost the race and is told so. The calls are synchronous on purpose: the file is on a tmpfs,
a statement takes some 20 µs, and a hop to a thread would cost more than it saves.

A reboot forgets every session: the file remembers the boot it was written in and starts anew in another one.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from execgate.model.errors import Conflict, Internal, Unavailable
from execgate.model.ids import ContainerId, SessionId
from execgate.model.session import TRANSITIONS, ExecSession, SessionState

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE boot (id TEXT NOT NULL);
CREATE TABLE session (
    id           TEXT PRIMARY KEY,
    container_id TEXT NOT NULL,
    state        TEXT NOT NULL,
    created_at   REAL NOT NULL,
    finished_at  REAL,
    record       TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX session_by_container ON session (container_id, state);
CREATE INDEX session_by_end ON session (state, finished_at, created_at);
"""
_BUSY_TIMEOUT = 2.0
_RECORD = TypeAdapter(ExecSession)


class StateChanged(Conflict):
    """The session was no longer in the state that a transition started from."""


class SessionStore:
    """The records of all sessions that are known. Safe against other processes, not against other threads."""

    def __init__(self, path: Path, *, boot_id: str) -> None:
        self._path = path
        with _translated(path):
            self._db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT, isolation_level=None)
            path.chmod(0o600)
            self._prepare(boot_id)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def add(self, session: ExecSession) -> None:
        """Keep a new session. Conflict when its id is taken."""
        with _translated(self._path):
            try:
                self._db.execute(
                    "INSERT INTO session VALUES (?, ?, ?, ?, ?, ?)",
                    (
                        session.id,
                        session.container.container_id,
                        session.state,
                        session.created_at,
                        None,
                        _dump(session),
                    ),
                )
            except sqlite3.IntegrityError as error:
                raise Conflict(f"exec session {session.id} exists already") from error

    def get(self, session_id: SessionId) -> ExecSession | None:
        """Return the session, or None."""
        with _translated(self._path):
            row = self._db.execute("SELECT record FROM session WHERE id = ?", (session_id,)).fetchone()
        return None if row is None else _load(self._path, row[0])

    def move(self, before: ExecSession, after: ExecSession) -> ExecSession:
        """Take the session from `before.state` to `after.state` and keep `after`.

        StateChanged when another was faster; a step that is not in the table of transitions is a bug (ValueError).
        Once a session is no longer created its environment is not needed again, and it holds secrets: it goes.
        """
        if (before.state, after.state) not in TRANSITIONS:
            raise ValueError(f"a session cannot go from {before.state} to {after.state}")
        if after.config.env:
            after = replace(after, config=replace(after.config, env=()))
        with _translated(self._path):
            changed = self._db.execute(
                "UPDATE session SET state = ?, finished_at = ?, record = ? WHERE id = ? AND state = ?",
                (after.state, after.finished_at, _dump(after), before.id, before.state),
            ).rowcount
        if not changed:
            raise StateChanged(f"exec session {before.id} is no longer {before.state}")
        return after

    def count(self) -> int:
        """Return how many sessions are known."""
        with _translated(self._path):
            return int(self._db.execute("SELECT count(*) FROM session").fetchone()[0])

    def all(self) -> Iterator[ExecSession]:
        """Yield every session, oldest first."""
        with _translated(self._path):
            rows = self._db.execute("SELECT record FROM session ORDER BY created_at").fetchall()
        for (record,) in rows:
            yield _load(self._path, record)

    def running_in(self, container_id: ContainerId) -> list[SessionId]:
        """Return the ids of the sessions that run in a container."""
        with _translated(self._path):
            rows = self._db.execute(
                "SELECT id FROM session WHERE container_id = ? AND state IN (?, ?) ORDER BY created_at",
                (container_id, SessionState.STARTING, SessionState.RUNNING),
            ).fetchall()
        return [SessionId(row[0]) for row in rows]

    def remove(self, session_id: SessionId) -> None:
        """Drop one session, if it is there."""
        with _translated(self._path):
            self._db.execute("DELETE FROM session WHERE id = ?", (session_id,))

    def forget(self, *, stopped_before: float, created_before: float) -> int:
        """Drop what ended, or was created and never started, before these times (seconds since the epoch)."""
        with _translated(self._path):
            return self._db.execute(
                "DELETE FROM session WHERE (state = ? AND finished_at < ?) OR (state = ? AND created_at < ?)",
                (SessionState.STOPPED, stopped_before, SessionState.CREATED, created_before),
            ).rowcount

    def _prepare(self, boot_id: str) -> None:
        # WAL lets `execgate sessions` read beside the service; nothing here has to survive a power cut.
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = OFF")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == _SCHEMA_VERSION and self._db.execute("SELECT id FROM boot").fetchone() == (boot_id,):
            return
        for table in ("boot", "session"):
            self._db.execute(f"DROP TABLE IF EXISTS {table}")
        self._db.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {_SCHEMA_VERSION};COMMIT;")
        self._db.execute("INSERT INTO boot VALUES (?)", (boot_id,))


def read_sessions(path: Path) -> list[ExecSession]:
    """Return the sessions in a store without touching it, whether or not a service runs."""
    if not path.exists():
        return []
    with _translated(path):
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY_TIMEOUT)
        try:
            rows = connection.execute("SELECT record FROM session ORDER BY created_at").fetchall()
        finally:
            connection.close()
    return [_load(path, record) for (record,) in rows]


def _load(path: Path, record: str) -> ExecSession:
    try:
        return _RECORD.validate_json(record)
    except ValidationError as error:
        raise Internal("the session's record cannot be read", hint=f"{path}: {error}") from error


def _dump(session: ExecSession) -> str:
    return _RECORD.dump_json(session).decode()


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn what sqlite3 raises into the project's own categories."""
    try:
        yield
    except sqlite3.Error as error:
        raise Unavailable("the session store is not available", hint=f"{path}: {error}") from error
