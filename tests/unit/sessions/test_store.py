"""The store: one line of life, one winner, one boot."""

import contextlib
import itertools
import json
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from execgate.model.errors import Conflict, Internal, Unavailable
from execgate.model.ids import ContainerId, SessionId, new_session_id
from execgate.model.process import ProcessIdentity
from execgate.model.session import TRANSITIONS, ExecSession, ExitSource, ExitStatus, SessionState
from execgate.sessions import store as store_module
from execgate.sessions.store import SessionStore, StateChanged, read_sessions
from support.records import new_session

Open = Callable[..., SessionStore]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sessions.db"


@pytest.fixture
def open_store(path: Path) -> Iterator[Open]:
    """Open stores on one file; all are closed at the end."""
    opened: list[SessionStore] = []

    def open_one(boot_id: str = "boot") -> SessionStore:
        opened.append(SessionStore(path, boot_id=boot_id))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def at(session: ExecSession, state: SessionState) -> ExecSession:
    """The same session in another state, as a record of that state looks."""
    exit_status = ExitStatus(0, ExitSource.SYNC_PIPE) if state is SessionState.STOPPED else None
    return replace(session, state=state, exit=exit_status, finished_at=5.0 if exit_status else None)


# A way from `created` to each state.
WAYS = {
    SessionState.CREATED: [],
    SessionState.STARTING: [SessionState.STARTING],
    SessionState.RUNNING: [SessionState.STARTING, SessionState.RUNNING],
    SessionState.STOPPED: [SessionState.STOPPED],
}


def bring_to(store: SessionStore, state: SessionState) -> ExecSession:
    session = new_session()
    store.add(session)
    for step in WAYS[state]:
        session = store.move(session, at(session, step))
    return session


@pytest.mark.parametrize(("before", "after"), [*itertools.product(SessionState, SessionState)], ids="-".join)
def test_every_step(open_store: Open, before: SessionState, after: SessionState) -> None:
    store = open_store()
    session = bring_to(store, before)
    if (before, after) in TRANSITIONS:
        moved = store.move(session, at(session, after))
        assert store.get(session.id) == moved
        assert moved.state is after
    else:
        with pytest.raises(ValueError, match="cannot go from"):
            store.move(session, at(session, after))
        assert store.get(session.id) == session


@pytest.mark.parametrize(("claimed", "real"), [*itertools.permutations(SessionState, 2)], ids="-".join)
def test_a_step_from_a_state_that_is_past(open_store: Open, claimed: SessionState, real: SessionState) -> None:
    store = open_store()
    session = bring_to(store, real)
    for before, after in TRANSITIONS:
        if before is claimed:
            with pytest.raises(StateChanged):
                store.move(at(session, claimed), at(session, after))
    assert store.get(session.id) == session


def test_nothing_leads_out_of_stopped() -> None:
    assert not [before for before, _ in TRANSITIONS if before is SessionState.STOPPED]


def test_a_record_comes_back_whole(open_store: Open, path: Path) -> None:
    session = new_session(
        args=("sh", "-c", "\x00ÿ\u2028\U0001f600"), tty=True, attach_stdin=True, detach_keys=b"\x00\x10\x7f", user="a:b"
    )
    session = replace(session, monitor=ProcessIdentity(1, 2), process=ProcessIdentity(3, 2**63), error="\x1b'\"")
    store = open_store()
    store.add(session)
    assert store.get(session.id) == session
    assert store.all() == [session]
    store.close()
    assert read_sessions(path) == [session]


def test_a_record_of_a_service_that_kept_no_monotonic_time(open_store: Open, path: Path) -> None:
    """Its time begins when it is read: nothing is over or forgotten because of that."""
    session = replace(new_session(), since=0.0)
    store = open_store()
    store.add(session)
    begun = time.monotonic()
    loaded = open_store().get(session.id)
    assert loaded is not None
    assert begun <= loaded.since <= time.monotonic()
    assert replace(loaded, since=0.0) == session


def test_an_environment_is_kept_until_the_start_only(open_store: Open, path: Path) -> None:
    store = open_store()
    session = new_session(env=("SECRET=hunter2",))
    store.add(session)
    kept = store.get(session.id)
    assert kept is not None
    assert kept.config.env == ("SECRET=hunter2",)
    moved = store.move(session, at(session, SessionState.STARTING))
    assert moved.config.env == ()
    assert store.get(session.id) == moved


def test_an_id_is_given_once(open_store: Open) -> None:
    store = open_store()
    session = new_session()
    store.add(session)
    with pytest.raises(Conflict):
        store.add(session)
    assert store.count() == 1


def test_unknown_ids(open_store: Open) -> None:
    store = open_store()
    assert store.get(new_session_id()) is None
    session = new_session()
    with pytest.raises(StateChanged):
        store.move(session, at(session, SessionState.STARTING))


def test_two_stores_on_one_file_and_one_winner(open_store: Open, path: Path) -> None:
    """Two processes, played by threads with a connection each: of all who start a session exactly one does."""
    main = open_store()
    sessions = [new_session() for _ in range(50)]
    for session in sessions:
        main.add(session)
    barrier = threading.Barrier(4)
    winners: list[str] = []
    losers: list[str] = []

    def race() -> None:
        store = SessionStore(path, boot_id="boot")
        barrier.wait()
        for session in sessions:
            try:
                store.move(session, at(session, SessionState.STARTING))
                winners.append(session.id)
            except StateChanged:
                losers.append(session.id)
        store.close()

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(winners) == sorted(session.id for session in sessions)
    assert len(losers) == 150


def test_another_boot_forgets(open_store: Open) -> None:
    first = open_store("boot one")
    first.add(new_session())
    first.close()
    same = open_store("boot one")
    assert same.count() == 1
    same.close()
    other = open_store("boot two")
    assert other.count() == 0
    other.add(new_session())
    other.close()
    assert open_store("boot two").count() == 1


def test_another_schema_forgets(open_store: Open, path: Path) -> None:
    store = open_store()
    store.add(new_session())
    store.close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 999")
    connection.close()
    assert open_store().count() == 0


def test_running_in(open_store: Open) -> None:
    store = open_store()
    expected = []
    for state in SessionState:
        session = bring_to(store, state)
        if session.running:
            expected.append(session.id)
    store.add(new_session(container="other"))
    assert store.running_in(ContainerId("c1")) == expected
    assert store.running_in(ContainerId("nobody")) == []


def test_forget(open_store: Open) -> None:
    store = open_store()
    old = new_session(created_at=1.0)
    young = new_session(created_at=100.0)
    for session in (old, young):
        store.add(session)
    live = [bring_to(store, state) for state in (SessionState.STARTING, SessionState.RUNNING)]
    stopped = bring_to(store, SessionState.STOPPED)  # at 5.0
    assert store.forget(lambda session: session.id == "nobody's") == []
    assert sorted(store.forget(lambda session: session.id in (old.id, stopped.id))) == sorted([old.id, stopped.id])
    assert store.get(old.id) is None
    assert store.get(stopped.id) is None
    store.close()
    store = open_store()
    assert {session.id for session in store.all()} == {young.id, *(session.id for session in live)}
    assert store.forget(lambda session: True) == [young.id]
    assert {session.id for session in store.all()} == {session.id for session in live}, "a live session was forgotten"


def test_the_file_is_private(open_store: Open, path: Path) -> None:
    before = os.umask(0)
    try:
        open_store().add(new_session(env=("SECRET=1",)))
        modes = {one.name: stat.S_IMODE(one.stat().st_mode) for one in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert modes
    assert set(modes.values()) == {0o600}, modes


def test_no_database(path: Path) -> None:
    """It is set aside, and what else is known of the sessions is taken over: of this boot, and what can be read."""
    path.write_bytes(b"this is not it" * 1000)
    with pytest.raises(Unavailable) as failure:
        read_sessions(path)
    assert str(path) in failure.value.hint
    assert str(path) not in failure.value.message
    known, foreign = new_session(), new_session()
    texts = [store_module._dump(known), store_module._dump(foreign).replace('"boot"', '"another"'), "{", "[]", ""]
    store = SessionStore(path, boot_id="boot", lost=lambda: texts)
    try:
        assert store.all() == [known]
        assert store.text_of(known.id) == store_module._dump(known)
    finally:
        store.close()
    assert path.with_suffix(".broken").read_bytes() == b"this is not it" * 1000
    assert read_sessions(path) == [known]


def test_a_database_that_was_deleted(open_store: Open, path: Path) -> None:
    """What it does not know is added; what it knows is as it says, and not as it was once elsewhere."""
    known, deleted = new_session(), new_session()
    store = open_store()
    store.add(known)
    after = store.move(known, replace(known, state=SessionState.STARTING))
    store.close()
    texts = [store_module._dump(known), store_module._dump(deleted)]
    again = SessionStore(path, boot_id="boot", lost=lambda: texts)
    try:
        assert again.all() == [after, deleted]
    finally:
        again.close()


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        SessionStore(tmp_path / "none/sessions.db", boot_id="boot")


def test_a_record_that_cannot_be_read(open_store: Open, path: Path) -> None:
    store = open_store()
    session = new_session()
    store.add(session)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE session SET record = '{}'")
    connection.close()
    with pytest.raises(Internal):
        read_sessions(path)
    store.close()
    readable = new_session()
    store = open_store()
    assert store.all() == [], "what nobody can read must not keep the service down"
    store.add(readable)
    store.close()
    assert open_store().all() == [readable]


def test_a_locked_file_is_said_so(open_store: Open, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("execgate.sessions.store._BUSY_TIMEOUT", 0.01)
    store = open_store()
    session = new_session()
    store.add(session)
    other = sqlite3.connect(path, isolation_level=None)
    try:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Unavailable):
            store.move(session, at(session, SessionState.STARTING))
        other.execute("ROLLBACK")
    finally:
        other.close()
    assert store.move(session, at(session, SessionState.STARTING)).running


# -- what older versions wrote

_VERSION_1 = """
CREATE TABLE boot (id TEXT NOT NULL);
CREATE TABLE session (id TEXT PRIMARY KEY, container_id TEXT NOT NULL, state TEXT NOT NULL, created_at REAL NOT NULL,
    finished_at REAL, record TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX session_by_container ON session (container_id, state);
CREATE INDEX session_by_end ON session (state, finished_at, created_at);
PRAGMA user_version = 1;
INSERT INTO boot VALUES ('boot');
"""
_SINCE = {"timed_out", "transferred", "container_labels"}
_CONFIG_SINCE = {"timeout", "labels", "capture_stdout", "capture_stderr", "on_disconnect"}


def as_version_1(session: ExecSession) -> str:
    """Return the record as it was before there were labels, timeouts and captures."""
    record = json.loads(store_module._dump(session))
    record = {key: value for key, value in record.items() if key not in _SINCE}
    record["config"] = {key: value for key, value in record["config"].items() if key not in _CONFIG_SINCE}
    return json.dumps(record | {"a field that is gone": 1})


def write_version_1(path: Path, records: dict[str, str]) -> None:
    with sqlite3.connect(path) as connection:
        connection.executescript(_VERSION_1)
        for session_id, record in records.items():
            connection.execute("INSERT INTO session VALUES (?, 'c1', 'created', 1.0, NULL, ?)", (session_id, record))
    connection.close()


def test_the_records_of_version_1(open_store: Open, path: Path) -> None:
    """What they lack has its default; what cannot be understood is dropped; the store works as a new one."""
    session = new_session(args=("sleep", "1"), env=("A=b",), detach_keys=b"\x01")
    broken, other = new_session().id, new_session()
    records = {session.id: as_version_1(session), broken: "{}", new_session().id: as_version_1(other)}
    write_version_1(path, records | {"../../etc": as_version_1(replace(other, id=SessionId("../../etc")))})
    store = open_store()
    assert store.all() == [session]
    assert store.move(session, at(session, SessionState.STARTING)).running
    store.close()
    again = open_store()
    assert [one.id for one in again.all()] == [session.id]
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (store_module._SCHEMA_VERSION,)


def test_records_of_this_version_that_lack_a_field(open_store: Open, path: Path) -> None:
    session = new_session()
    store = open_store()
    store.add(session)
    store.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE session SET record = ?", (as_version_1(session),))
    connection.close()
    assert open_store().all() == [session]


def test_another_boot_forgets_an_older_version_too(open_store: Open, path: Path) -> None:
    session = new_session()
    write_version_1(path, {session.id: as_version_1(session)})
    assert open_store("another").all() == []


def test_a_migration_is_whole_or_not_at_all(open_store: Open, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = new_session()
    write_version_1(path, {session.id: as_version_1(session)})
    with monkeypatch.context() as patched:
        patched.setattr(store_module, "_SCHEMA", store_module._SCHEMA + "NONSENSE;")
        with pytest.raises(Unavailable):
            open_store()
    assert open_store().all() == [session]


def test_forgetting_looks_only_where_it_is_told(open_store: Open) -> None:
    store = open_store()
    first, second, third = (new_session() for _ in range(3))
    for session in (first, second, third):
        store.add(session)
    assert store.forget(lambda one: one.id != first.id, [first.id, second.id, new_session().id]) == [second.id]
    assert [one.id for one in store.all()] == [first.id, third.id]
