"""The event bus: what happened, to whoever listens, and the last of it to those who come later.

A subscriber that does not keep up is cut off rather than waited for or buffered without bound: its stream ends, and
it knows that it missed something.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager

from execgate.model.events import Event

HISTORY = 1024
"""Events that are kept for `since`; moby keeps 256."""

_QUEUE = 1024


class Subscription:
    """The events of one listener, in order."""

    def __init__(self) -> None:
        self._queue: deque[Event] = deque()
        self._wake = asyncio.Event()
        self._closed = False

    def put(self, event: Event) -> None:
        """Hand over one event; a queue that is full ends the subscription."""
        if len(self._queue) >= _QUEUE:
            self.close()
        if not self._closed:
            self._queue.append(event)
        self._wake.set()

    def close(self) -> None:
        """End the iteration after what is queued."""
        self._closed = True
        self._wake.set()

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            while self._queue:
                yield self._queue.popleft()
            if self._closed:
                return
            self._wake.clear()
            await self._wake.wait()


class EventBus:
    """Publishes events in the order in which they happen."""

    def __init__(self) -> None:
        self._history: deque[Event] = deque(maxlen=HISTORY)
        self._subscriptions: set[Subscription] = set()

    def publish(self, event: Event) -> None:
        """Tell everybody."""
        self._history.append(event)
        for subscription in tuple(self._subscriptions):
            subscription.put(event)

    def past(self, since_ns: int) -> list[Event]:
        """Return what is remembered from `since_ns` (nanoseconds since the epoch) on."""
        return [event for event in self._history if event.time_ns >= since_ns]

    def restore(self, events: Iterable[Event]) -> None:
        """Remember what happened in an earlier service, oldest first."""
        self._history.extendleft(reversed(list(events)[-HISTORY:]))

    @contextmanager
    def subscribe(self) -> Iterator[Subscription]:
        """Listen from now on, for the length of a `with`."""
        subscription = Subscription()
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    def close(self) -> None:
        """End every subscription: the service stops."""
        for subscription in tuple(self._subscriptions):
            subscription.close()
