"""The ledger: kept before it is told, told before anybody who waits goes on, and never lost."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from execgate.model.errors import Unavailable
from execgate.model.process import ProcessIdentity
from execgate.model.session import ByteCounts, ExecSession, ExitSource, ExitStatus, SessionState
from execgate.sessions.events import EventBus
from execgate.sessions.ledger import Ledger
from execgate.sessions.store import SessionStore, StateChanged, read_sessions
from support.records import new_session

SOON = 5.0
PROCESS, MONITOR = ProcessIdentity(4_000_001, 1), ProcessIdentity(4_000_002, 2)
SEVEN = ExitStatus(7, ExitSource.SYNC_PIPE)


class MoodyStore(SessionStore):
    """Can be full."""

    full = False

    def move(self, before: ExecSession, after: ExecSession) -> ExecSession:
        if self.full:
            raise Unavailable("the session store is not available", hint="disk full")
        return super().move(before, after)


class Books:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = MoodyStore(path, boot_id="boot")
        self.events = EventBus()
        self.ledger = Ledger(self.store, self.events)

    def created(self) -> ExecSession:
        session = new_session()
        self.ledger.created(session)
        return session

    def actions(self) -> list[str]:
        return [event.action for event in self.events.past(0)]


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    made = Books(tmp_path / "sessions.db")
    yield made
    made.store.close()


async def test_the_whole_way(books: Books) -> None:
    session = books.created()
    waiting = asyncio.create_task(books.ledger.end_of(session))
    starting = books.ledger.starting(session)
    assert starting.started_at is not None
    running = books.ledger.running(starting, PROCESS, MONITOR)
    assert (running.process, running.monitor) == (PROCESS, MONITOR)
    await asyncio.sleep(0)
    assert not waiting.done()
    ended = books.ledger.stopped(running, SEVEN, timed_out=True, transferred=ByteCounts(1, 2, 3))
    assert await asyncio.wait_for(waiting, SOON) == ended == books.ledger.get(session.id)
    assert (ended.exit, ended.timed_out, ended.transferred) == (SEVEN, True, ByteCounts(1, 2, 3))
    assert await books.ledger.end_of(session) == ended
    assert books.actions() == ["exec_create: true", "exec_die"]
    assert read_sessions(books.path) == [ended]


async def test_what_is_told_is_on_record(books: Books) -> None:
    """Whoever hears of an end and looks at once sees it."""
    seen: list[SessionState | None] = []
    publish = books.events.publish

    def look(event: object) -> None:
        stored = books.store.get(session.id)
        seen.append(stored.state if stored else None)

    session = new_session()
    books.events.publish = look  # type: ignore[method-assign]
    books.ledger.created(session)
    books.ledger.stopped(books.ledger.starting(session), SEVEN)
    books.events.publish = publish  # type: ignore[method-assign]
    assert seen == [SessionState.CREATED, SessionState.STOPPED]


async def test_a_second_start_loses(books: Books) -> None:
    session = books.created()
    books.ledger.starting(session)
    with pytest.raises(StateChanged):
        books.ledger.starting(session)


async def test_many_wait_and_some_give_up(books: Books) -> None:
    session = books.created()
    waiting = [asyncio.create_task(books.ledger.end_of(session)) for _ in range(5)]
    await asyncio.sleep(0)
    waiting[2].cancel()
    await asyncio.gather(waiting[2], return_exceptions=True)
    ended = books.ledger.stopped(books.ledger.starting(session), SEVEN)
    others = [task for task in waiting if task is not waiting[2]]
    assert await asyncio.wait_for(asyncio.gather(*others), SOON) == [ended] * 4


async def test_one_that_is_forgotten_never_ends(books: Books) -> None:
    session = books.created()
    waiting = asyncio.create_task(books.ledger.end_of(session))
    await asyncio.sleep(0)
    assert books.ledger.forget(lambda one: one.id == session.id) == [session.id]
    assert await asyncio.wait_for(waiting, SOON) is None
    assert await books.ledger.end_of(session) is None


@pytest.mark.parametrize("full_from", ["running", "stopped"])
async def test_a_store_that_is_full_loses_nothing(books: Books, full_from: str) -> None:
    """What has happened is seen by all, and stored as soon as it can be."""
    session = books.ledger.starting(books.created())
    books.store.full = full_from == "running"
    session = books.ledger.running(session, PROCESS, MONITOR)
    for found in (
        books.ledger.get(session.id),
        *books.ledger.all(),
        *books.ledger.of_container(session.container.container_id),
    ):
        assert found is not None
        assert (found.state, found.process) == (SessionState.RUNNING, PROCESS)
    waiting = asyncio.create_task(books.ledger.end_of(session))
    await asyncio.sleep(0)
    books.store.full = True
    ended = books.ledger.stopped(session, SEVEN)
    assert await asyncio.wait_for(waiting, SOON) == ended == books.ledger.get(session.id)
    assert books.ledger.all() == [ended]
    with pytest.raises(Unavailable):
        books.ledger.forget(lambda _: False)
    assert books.ledger.get(session.id) == ended
    books.store.full = False
    assert books.ledger.forget(lambda _: False) == []
    assert read_sessions(books.path) == [ended]


async def test_a_store_that_has_room_again_between_the_two(books: Books) -> None:
    session = books.ledger.starting(books.created())
    books.store.full = True
    session = books.ledger.running(session, PROCESS, MONITOR)
    books.store.full = False
    ended = books.ledger.stopped(session, SEVEN)
    assert read_sessions(books.path) == [ended]
    assert books.ledger.forget(lambda one: one.id == session.id) == [session.id]
    assert books.ledger.get(session.id) is None


async def test_the_ends_that_the_next_service_knows_of(books: Books) -> None:
    """They are the very events that were told, in the order in which they happened."""
    first, second, _ = books.created(), books.created(), books.created()
    books.ledger.stopped(books.ledger.starting(second), SEVEN)
    books.ledger.stopped(books.ledger.starting(first), SEVEN)
    told = [event for event in books.events.past(0) if event.action == "exec_die"]
    other = SessionStore(books.path, boot_id="boot")
    assert Ledger(other, EventBus()).ends() == told
    assert [event.attributes["execID"] for event in told] == [second.id, first.id]
    other.close()
