"""What is begun ahead of a start is used by it or ended, and never in its way."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from execgate.model.container import Container, ContainerStatus, OciRuntime
from execgate.model.errors import Unavailable
from execgate.model.ids import ContainerId, new_session_id
from execgate.runtime import ahead
from execgate.runtime.ahead import Ahead
from execgate.runtime.spawning import ExecRequest

CONTAINER = Container(
    id=ContainerId("c1"),
    name="name",
    runtime=OciRuntime("runc", Path("/bin/runc"), Path("/run/runc")),
    bundle=Path("/b"),
    status=ContainerStatus.RUNNING,
    created=0.0,
)


class Workshop:
    """Makes numbers, and says what became of them."""

    def __init__(self) -> None:
        self.ahead = Ahead(self.spawn, self.undo)
        self.free = asyncio.Event()
        self.free.set()
        self.made: list[ExecRequest] = []
        self.undone: list[int] = []
        self.undoing, self.may_undo = asyncio.Event(), asyncio.Event()
        self.may_undo.set()
        self.error: Exception | None = None

    async def spawn(self, request: ExecRequest) -> int:
        await self.free.wait()
        if self.error is not None:
            raise self.error
        self.made.append(request)
        return len(self.made)

    async def undo(self, made: int) -> None:
        self.undoing.set()
        await self.may_undo.wait()
        self.undone.append(made)


def new_request(*, tty: bool = False) -> ExecRequest:
    return ExecRequest(session_id=new_session_id(), container=CONTAINER, process={"terminal": tty}, stdout=True)


async def test_the_start_gets_what_was_begun() -> None:
    """Also while it is still being made."""
    shop = Workshop()
    for ready in (True, False):
        request = new_request()
        shop.free.clear()
        shop.ahead.begin(request)
        shop.ahead.begin(request)
        if ready:
            shop.free.set()
            await asyncio.sleep(0.01)
        taking = asyncio.create_task(shop.ahead.take(replace(request, process={"terminal": False, "args": ["ls"]})))
        await asyncio.sleep(0)
        shop.free.set()
        assert await taking == len(shop.made)
        assert await shop.ahead.take(request) is None
    assert (len(shop.made), shop.undone) == (2, [])


@pytest.mark.parametrize(
    "other",
    [
        {"stdout": False},
        {"timeout": 5.0},
        {"preserved": (7,)},
        {"process": {"terminal": True}},
        {"container": replace(CONTAINER, name="renamed")},
    ],
    ids=lambda other: next(iter(other)),
)
async def test_one_that_does_not_suit_is_ended_first(other: dict[str, object]) -> None:
    """There can be but one directory of a session."""
    shop = Workshop()
    request = new_request()
    shop.ahead.begin(request)
    assert await shop.ahead.take(replace(request, **other)) is None  # type: ignore[arg-type]
    assert shop.undone == [1]


async def test_one_that_could_not_be_made_is_none() -> None:
    shop = Workshop()
    shop.error = Unavailable("the host cannot start another process now")
    request = new_request()
    shop.ahead.begin(request)
    assert await shop.ahead.take(request) is None
    shop.ahead.begin(request)
    await shop.ahead.close()
    assert shop.undone == []


async def test_one_that_is_not_wanted_soon_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_PATIENCE", 0.02)
    shop = Workshop()
    request = new_request()
    shop.ahead.begin(request)
    async with asyncio.timeout(5):
        while not shop.undone:
            await asyncio.sleep(0.005)
    assert await shop.ahead.take(request) is None
    assert shop.undone == [1]


async def test_a_start_that_comes_while_one_is_ended_waits_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_PATIENCE", 0.02)
    shop = Workshop()
    shop.may_undo.clear()
    request = new_request()
    shop.ahead.begin(request)
    await asyncio.wait_for(shop.undoing.wait(), 5)
    taking = asyncio.create_task(shop.ahead.take(request))
    await asyncio.sleep(0.02)
    assert not taking.done()
    shop.may_undo.set()
    assert await taking is None
    assert shop.undone == [1]


async def test_there_are_few_and_none_after_the_end() -> None:
    shop = Workshop()
    requests = [new_request() for _ in range(50)]
    for request in requests:
        shop.ahead.begin(request)
    await asyncio.sleep(0.01)
    assert len(shop.made) == ahead._MOST
    assert await shop.ahead.take(requests[0]) == 1
    await shop.ahead.close()
    assert shop.undone == list(range(2, ahead._MOST + 1))
    shop.ahead.begin(requests[-1])
    assert await shop.ahead.take(requests[-1]) is None


@pytest.mark.parametrize("made", [False, True], ids=["before it is made", "in the moment when it is"])
@pytest.mark.parametrize("suits", [True, False])
async def test_a_start_that_is_cancelled_ends_what_is_made(made: bool, suits: bool) -> None:
    shop = Workshop()
    shop.free.clear()
    request = new_request()
    shop.ahead.begin(request)
    taking = asyncio.create_task(shop.ahead.take(request if suits else replace(request, stdout=False)))
    await asyncio.sleep(0)
    if made:
        shop.free.set()
        while not shop.made:
            await asyncio.sleep(0)
    taking.cancel()
    await asyncio.sleep(0)
    shop.free.set()
    await asyncio.gather(taking, return_exceptions=True)
    assert taking.cancelled()
    await shop.ahead.close()
    assert (len(shop.made), shop.undone) == (1, [1])
