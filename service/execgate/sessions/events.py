"""The event bus: what happened, to whoever listens, and the last of it to those who come later.

A subscriber that does not keep up is cut off rather than waited for or buffered without bound: its stream ends, and
it knows that it missed something.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from itertools import dropwhile, islice

from execgate.model.events import Event

HISTORY = 1024
"""Events that are kept for `since`; moby keeps 256."""

_QUEUE = 1024


class Subscription:
    """The events of one listener, in order, `past` before those that come; `position` is the number of the first."""

    def __init__(self, position: int, past: Sequence[Event] = ()) -> None:
        self.position = position
        self._queue = deque(past)
        self._most = len(past) + _QUEUE
        self._wake = asyncio.Event()
        self._closed = False

    def put(self, event: Event) -> None:
        """Hand over one event; a queue that is full ends the subscription."""
        if len(self._queue) >= self._most:
            self.close()
        if not self._closed:
            self._queue.append(event)
        self._wake.set()

    def close(self) -> None:
        """End the iteration after what is queued."""
        self._closed = True
        self._wake.set()

    def waiting(self) -> Iterator[Event]:
        """Yield what is there."""
        while self._queue:
            yield self._queue.popleft()

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            for event in self.waiting():
                yield event
            if self._closed:
                return
            self._wake.clear()
            await self._wake.wait()


class EventBus:
    """Publishes events in the order in which they happen, and numbers them in it."""

    def __init__(self) -> None:
        self._history: deque[Event] = deque(maxlen=HISTORY)
        self._next = 0
        self._subscriptions: set[Subscription] = set()

    @property
    def next(self) -> int:
        """The number of the event that comes next."""
        return self._next

    def publish(self, event: Event) -> None:
        """Tell everybody."""
        self._history.append(event)
        self._next += 1
        for subscription in tuple(self._subscriptions):
            subscription.put(event)

    def past(self, since_ns: int) -> list[Event]:
        """Return what is remembered from `since_ns` (nanoseconds since the epoch) on."""
        return list(dropwhile(lambda event: event.time_ns < since_ns, self._history))

    def restore(self, events: Sequence[Event], next_number: int) -> None:
        """Remember what happened in an earlier service, oldest first, whose next event would have had that number.

        Nobody listens yet; what was published since has its number from now on.
        """
        self._history = deque([*events, *self._history], maxlen=HISTORY)
        self._next += next_number

    @contextmanager
    def subscribe(self, begin: int | None = None) -> Iterator[Subscription]:
        """Listen from now on, or from the event with the number `begin` on, for the length of a `with`.

        One that is not remembered any more was missed: the subscription is over.
        """
        begin = self._next if begin is None else begin
        first = self._next - len(self._history)
        subscription = Subscription(begin, list(islice(self._history, max(0, begin - first), None)))
        if begin < first:
            subscription = Subscription(begin)
            subscription.close()
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    def close(self) -> None:
        """End every subscription: the service stops."""
        for subscription in tuple(self._subscriptions):
            subscription.close()
