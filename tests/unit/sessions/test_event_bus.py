"""The event bus: order, memory, and listeners who do not listen."""

import asyncio

from execgate.model.events import Event
from execgate.model.ids import ContainerId
from execgate.sessions import events as bus_module
from execgate.sessions.events import HISTORY, EventBus, Subscription


def event(number: int) -> Event:
    return Event(action=f"exec_start: {number}", container_id=ContainerId("c"), time_ns=number)


async def collect(subscription: Subscription) -> list[int]:
    return [one.time_ns async for one in subscription]


async def test_everybody_hears_everything_in_order() -> None:
    bus = EventBus()
    with bus.subscribe() as first, bus.subscribe() as second:
        listeners = [asyncio.create_task(collect(one)) for one in (first, second)]
        for number in range(100):
            bus.publish(event(number))
            if number % 7 == 0:
                await asyncio.sleep(0)
        bus.close()
        assert await asyncio.gather(*listeners) == [list(range(100))] * 2


async def test_a_listener_hears_from_its_subscription_on() -> None:
    bus = EventBus()
    bus.publish(event(1))
    with bus.subscribe() as subscription:
        bus.publish(event(2))
        bus.close()
        assert await collect(subscription) == [2]
    assert [one.time_ns for one in bus.past(0)] == [1, 2]


async def test_after_the_with_nothing_is_kept() -> None:
    bus = EventBus()
    with bus.subscribe() as subscription:
        pass
    bus.publish(event(1))
    subscription.close()
    assert await collect(subscription) == []


async def test_a_listener_that_does_not_keep_up_is_cut_off() -> None:
    """It gets a beginning without a gap, and then the end: it must not think that it has seen all."""
    bus = EventBus()
    with bus.subscribe() as slow, bus.subscribe() as fast:
        heard: list[int] = []

        async def listen() -> None:
            heard.extend(await collect(fast))

        task = asyncio.create_task(listen())
        many = bus_module._QUEUE + 500
        for number in range(many):
            bus.publish(event(number))
            if number % 100 == 0:
                await asyncio.sleep(0)
        got = await collect(slow)
        bus.close()
        await task
    assert got == list(range(bus_module._QUEUE))
    assert heard == list(range(many))


def test_the_past_is_bounded_and_inclusive() -> None:
    bus = EventBus()
    for number in range(HISTORY + 10):
        bus.publish(event(number))
    assert [one.time_ns for one in bus.past(0)] == list(range(10, HISTORY + 10))
    assert [one.time_ns for one in bus.past(HISTORY + 8)] == [HISTORY + 8, HISTORY + 9]
    assert bus.past(HISTORY + 10) == []


async def test_a_listener_that_waits_is_woken_by_the_end() -> None:
    bus = EventBus()
    with bus.subscribe() as subscription:
        task = asyncio.create_task(collect(subscription))
        await asyncio.sleep(0)
        bus.close()
        assert await asyncio.wait_for(task, 1) == []


async def test_a_listener_that_leaves_while_it_waits() -> None:
    bus = EventBus()
    with bus.subscribe() as subscription:
        task = asyncio.create_task(collect(subscription))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    bus.publish(event(1))


def test_the_verb_of_an_event() -> None:
    assert event(1).verb == "exec_start"
    assert Event(action="exec_die", container_id=ContainerId("c"), time_ns=0).verb == "exec_die"


async def test_a_listener_goes_on_in_the_next_service() -> None:
    """Neither what it had, nor what was published between, is told twice or left out."""
    old, new = EventBus(), EventBus()
    for number in range(5):
        old.publish(event(number))
    with old.subscribe(2) as subscription:
        assert subscription.position == 2
        assert [one.time_ns for one in subscription.waiting()] == [2, 3, 4]
    new.publish(event(5))  # before it knows of the others
    new.restore(old.past(0), old.next)
    assert new.next == 6
    with new.subscribe(3) as subscription:
        new.publish(event(6))
        assert [one.time_ns for one in subscription.waiting()] == [3, 4, 5, 6]
    with new.subscribe() as subscription:
        assert (subscription.position, list(subscription.waiting())) == (7, [])


async def test_a_listener_that_has_missed_something_knows() -> None:
    bus = EventBus()
    for number in range(HISTORY + 1):
        bus.publish(event(number))
    with bus.subscribe(1) as subscription:
        bus.publish(event(HISTORY + 1))
        assert len(list(subscription.waiting())) == HISTORY + 1
    with bus.subscribe(1) as subscription:  # that one is forgotten by now
        assert [one async for one in subscription] == []


def test_the_newest_are_remembered_across_services() -> None:
    old, new = EventBus(), EventBus()
    for number in range(HISTORY):
        old.publish(event(number))
    new.publish(event(HISTORY))
    new.restore(old.past(0), old.next)
    assert [one.time_ns for one in new.past(0)] == list(range(1, HISTORY + 1))
