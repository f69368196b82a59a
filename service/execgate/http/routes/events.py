"""`GET /events`: the event stream, one JSON object a line."""

import asyncio
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from aiohttp import web

from execgate.http.filters import matches_label, parse_filters
from execgate.http.front import FrontProtocol, front_of
from execgate.http.identity import access_of
from execgate.http.streamed import Streamed
from execgate.http.tree import Route
from execgate.model.errors import InvalidArgument
from execgate.model.events import Event
from execgate.sessions.events import Subscription

_FILTERS = frozenset({"container", "event", "label", "type", "image", "scope", "daemon"})
_NANO = 1_000_000_000
_TIMESTAMP = re.compile(r"-?[0-9]{1,11}(\.[0-9]{0,9})?", re.ASCII)


class EventRoutes:
    """Docker's event stream."""

    def routes(self) -> Sequence[Route]:
        """See tree.RouteGroup."""
        return [("GET", "/events", self.stream)]

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """GET /events?since=&until=&filters=."""
        since, until = _timestamp(request, "since"), _timestamp(request, "until")
        if since is not None and until is not None and until < since:
            raise InvalidArgument("`since` time cannot be after `until` time")
        filters = parse_filters(request.query.get("filters", ""), _FILTERS)
        front, access = front_of(request), access_of(request)
        bus = access.events

        def asked(event: Event) -> bool:
            return (until is None or event.time_ns <= until) and matches(event, filters) and access.sees_event(event)

        if front.resumed is not None:
            begin = front.resumed.position
        else:
            begin = None if since is None else bus.next - len(bus.past(since))
        with bus.subscribe(begin) as subscription:
            response = Streamed(front, {"Content-Type": "application/json"}, subscription.position)
            async with response.begun(request):
                for event in subscription.waiting():
                    await _tell(response, event, asked)
                await self._follow(front, response, subscription, asked, until)
        return response

    async def _follow(
        self,
        front: FrontProtocol,
        response: Streamed,
        subscription: Subscription,
        asked: Callable[[Event], bool],
        until: int | None,
    ) -> None:
        """Write what happens until `until`, the client's leaving, or the end of the service."""
        left = asyncio.ensure_future(front.client_left())
        left.add_done_callback(lambda _: subscription.close())
        try:
            async with asyncio.timeout(None if until is None else max(0.0, (until - time.time_ns()) / _NANO)):
                async for event in subscription:
                    await _tell(response, event, asked)
        except TimeoutError:
            await front.proceed()  # there may be an event that the next service has to tell
        finally:
            left.cancel()


async def _tell(response: Streamed, event: Event, asked: Callable[[Event], bool]) -> None:
    """Write the next event, if it is asked for and may be seen."""
    line = json.dumps(message(event), ensure_ascii=True).encode() + b"\n" if asked(event) else b""
    await response.piece(line, response.position + 1)


def message(event: Event) -> dict[str, Any]:
    """Return an event as Docker shows it, the fields of old clients (status, id, from) included."""
    return {
        "status": event.action,
        "id": event.container_id,
        "from": event.attributes.get("image", ""),
        "Type": "container",
        "Action": event.action,
        "Actor": {"ID": event.container_id, "Attributes": dict(event.attributes)},
        "scope": "local",
        "time": event.time_ns // _NANO,
        "timeNano": event.time_ns,
    }


def matches(event: Event, filters: Mapping[str, list[str]]) -> bool:
    """Return whether an event passes: any value of a filter, all filters (labels: all values)."""
    name = event.attributes.get("name", "")
    answers = {
        "container": lambda value: (
            value.removeprefix("/") == name or (value != "" and event.container_id.startswith(value))
        ),
        "event": lambda value: value in (event.action, event.verb),
        "type": lambda value: value == "container",
        "image": lambda value: value == event.attributes.get("image", ""),
        "scope": lambda value: value == "local",
    }
    if not all(matches_label(event.attributes, label) for label in filters.get("label", [])):
        return False
    return all(any(map(answers[key], values)) for key, values in filters.items() if key in answers and values)


def _timestamp(request: web.Request, key: str) -> int | None:
    """Parse seconds since the epoch, with up to nine decimals, into nanoseconds (docker CLIs send this form)."""
    text = request.query.get(key, "")
    if not text or text == "0":
        return None
    if not _TIMESTAMP.fullmatch(text):
        raise InvalidArgument(f"invalid value for '{key}': {text[:40]!r} is no Unix timestamp")
    return int(Decimal(text) * _NANO)
