"""The gate of starts: so many at once, the rest in order, and a clear no."""

import asyncio

import pytest

from execgate.model.errors import Exhausted
from execgate.model.ids import ContainerId
from execgate.sessions.gate import StartGate

SOON = 5.0


class Starts:
    """Starts that hold their turn until they are let go."""

    def __init__(self, gate: StartGate) -> None:
        self.gate = gate
        self.order: list[int] = []
        self.let_go: dict[int, asyncio.Event] = {}

    async def start(self, number: int, container: str = "") -> None:
        self.let_go[number] = asyncio.Event()
        async with self.gate.turn(ContainerId(container) if container else None):
            self.order.append(number)
            await self.let_go[number].wait()

    def begin(self, *numbers: int, container: str = "") -> "list[asyncio.Task[None]]":
        return [asyncio.create_task(self.start(number, container)) for number in numbers]


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_so_many_at_once_and_the_rest_in_order() -> None:
    starts = Starts(StartGate(2, 10))
    tasks = starts.begin(0, 1, 2, 3, 4)
    await settle()
    assert starts.order == [0, 1]
    starts.let_go[1].set()
    await settle()
    assert starts.order == [0, 1, 2]
    for event in starts.let_go.values():
        event.set()
    await asyncio.wait_for(asyncio.gather(*tasks), SOON)
    assert starts.order == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("queued", [0, 2])
async def test_too_many(queued: int) -> None:
    starts = Starts(StartGate(1, queued))
    tasks = starts.begin(*range(queued + 1))
    await settle()
    with pytest.raises(Exhausted) as failure:
        await starts.start(99)
    assert failure.value.retry_after >= 1
    for event in starts.let_go.values():
        event.set()
    await asyncio.wait_for(asyncio.gather(*tasks), SOON)
    (after,) = starts.begin(100)
    await settle()
    assert starts.order[-1] == 100, "a refusal must not last"
    starts.let_go[100].set()
    await after


async def test_those_who_leave_the_queue_leave_no_trace() -> None:
    starts = Starts(StartGate(1, 2))
    first, *waiting = starts.begin(0, 1, 2)
    await settle()
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    others = starts.begin(3, 4)
    await settle()
    for event in starts.let_go.values():
        event.set()
    await asyncio.wait_for(asyncio.gather(first, *others), SOON)
    assert starts.order == [0, 3, 4]


async def test_a_start_that_fails_gives_its_turn_back() -> None:
    gate = StartGate(1, 0)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            async with gate.turn():
                raise RuntimeError
    async with gate.turn():
        pass


@pytest.mark.parametrize("settled_first", [False, True])
async def test_a_turn_can_last_longer_than_its_with(settled_first: bool) -> None:
    gate, settled = StartGate(1, 0), asyncio.get_running_loop().create_future()
    if settled_first:
        settled.set_result(None)
    async with gate.turn() as turn:
        turn.until = settled
    if not settled_first:
        with pytest.raises(Exhausted):
            async with gate.turn():
                pass
        settled.set_result(None)
    await settle()
    async with gate.turn():
        pass


async def test_a_container_has_a_part_of_the_turns() -> None:
    """Those whose starts do not come to an end hold nobody else up, and have the rest in order."""
    starts = Starts(StartGate(8, 10))
    tasks = starts.begin(0, 1, 2, 3, container="hangs")
    await settle()
    tasks += starts.begin(10, 11, container="other")
    await settle()
    assert starts.order == [0, 1, 10, 11]
    starts.let_go[1].set()
    await settle()
    assert starts.order[4:] == [2]
    for event in starts.let_go.values():
        event.set()
    await asyncio.wait_for(asyncio.gather(*tasks), SOON)
    assert sorted(starts.order) == [0, 1, 2, 3, 10, 11]


async def test_a_container_that_waits_for_its_part_is_refused_like_everybody() -> None:
    starts = Starts(StartGate(8, 1))
    tasks = starts.begin(0, 1, 2, container="hangs")
    await settle()
    with pytest.raises(Exhausted):
        await starts.start(99, "hangs")
    tasks += starts.begin(10, container="other")
    await settle()
    assert starts.order == [0, 1, 10]
    for event in starts.let_go.values():
        event.set()
    await asyncio.wait_for(asyncio.gather(*tasks), SOON)


async def test_whoever_leaves_gives_a_container_its_part_back() -> None:
    starts = Starts(StartGate(4, 10))
    everybody = starts.begin(0, 1, 2, 3)
    await settle()
    inside = starts.begin(10, 11, 12, container="c")  # the first waits among all, the others in the container
    await settle()
    for task in inside:
        task.cancel()
    await asyncio.gather(*inside, return_exceptions=True)
    for event in starts.let_go.values():
        event.set()
    await asyncio.wait_for(asyncio.gather(*everybody), SOON)
    for number in (20, 21):
        (task,) = starts.begin(number, container="c")
        await settle()
        starts.let_go[number].set()
        await asyncio.wait_for(task, SOON)
    assert starts.order == [0, 1, 2, 3, 20, 21]
