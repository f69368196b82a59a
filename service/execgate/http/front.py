"""The front of a connection: what stands between the socket and aiohttp's own HTTP protocol.

Why it exists. A request to start an exec turns its connection into a raw byte stream, and clients send the first
bytes of that stream right behind the request, without waiting. aiohttp's parser would swallow them, parse them as
HTTP, or answer 400; and a client that half-closes early would be hung up on (`docs/architecture.md`, "The hijack").

What it does. It delimits requests with `wire.request_head` and hands aiohttp exactly the bytes of each. Behind a
request that may be hijacked it stops and *holds* what comes (bounded, then the socket is not read any more). The
handler then either takes the connection over, held bytes included, or answers as usual: in that case held bytes are
never HTTP, so the connection is closed after the answer.

It also says no early, in JSON: to what is not HTTP, to heads that are too large or too slow, to bodies that are
too large, too slow or compressed.
"""

import asyncio
import logging
import os
import re
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import cast
from urllib.parse import unquote

from aiohttp import web

from execgate.http.dialects import DOCKER, Dialect, dialect_of
from execgate.http.errors import error_json
from execgate.http.progress import Progress
from execgate.model.errors import Internal
from execgate.model.principal import Principal
from execgate.wire.request_head import BadRequest, Body, Head, NeedData, RequestSplitter

log = logging.getLogger(__name__)

HEAD_TIMEOUT = 10.0
"""Seconds for a head to be complete, from the connection or its own first byte on."""

BODY_TIMEOUT = 30.0
"""Seconds for a body (at most `max_body`) to be complete, from its head on."""

HELD_LIMIT = 64 * 1024
"""Bytes held behind a start request before the socket is no longer read."""

_LINGER = 2.0
"""Seconds that a refused client gets to read why, while what it still sends is thrown away."""

_HIJACKABLE = re.compile(r"(/v[0-9.]+)?(/libpod)?/exec/[^/]*/(start|attach)", re.ASCII)

_REPEATABLE = {
    "POST": re.compile(
        r"(/v[0-9.]+)?(/libpod)?/(exec/[^/]*/(start|wait|stop)|containers/.+/exec/run)", re.ASCII | re.DOTALL
    ),
    "GET": re.compile(r"(/v[0-9.]+)?(/libpod)?/(exec/[^/]*/(logs|result)|events)", re.ASCII),
}
"""Requests that may wait, and can be asked of the next service once more: those that have had no effect yet (a start
whose turn has not come), and those that tell by their `Progress` what was done of them."""


class FrontProtocol(asyncio.Protocol):
    """One connection. `inner` is aiohttp's protocol for it."""

    def __init__(
        self,
        inner: web.RequestHandler,
        *,
        max_body: int,
        told: Callable[["FrontProtocol"], None] = lambda _: None,
        read: bytes = b"",
        resumed: Progress | None = None,
        idle: float | None = None,
        peer: Principal | None = None,
        identify: Callable[[asyncio.BaseTransport], Principal | None] = lambda _: None,
        cut_off: Callable[[], object] | None = None,
    ) -> None:
        """`told` is called when a request has its answer or is patient, when all is written, and at the end of it all.

        `read` is what another front has read of the connection and handed over, and `resumed` what was done of the
        first request in it. `idle` is how many seconds the first byte to come may take; None: HEAD_TIMEOUT.

        `peer` is who is known to be at the other end; when nobody is, `identify` is asked, of the transport.
        `cut_off` is there where more than a socket of ours carries the connection: it cuts that, so that the end does
        not look like one. Such a connection cannot be handed over.
        """
        self._inner = inner
        self._told = told
        self._read = read
        self._idle = idle
        self._identify = identify
        self.cut_off = cut_off
        """Cuts what carries the connection; None for one that can be handed over."""
        self._splitter = RequestSplitter(max_body=max_body)
        self._transport: asyncio.Transport | None = None
        self._held: bytearray | None = None  # bytes behind a start request, while one is open
        self._eof = False
        self._refused = False
        self._arriving = False  # a request has begun, and its body is not complete
        self._hijackable = False  # that request, or the last one that arrived
        self._outstanding = 0
        self._timer: asyncio.TimerHandle | None = None
        self._left: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._request = bytearray()  # the last one that arrived, if it could be asked again, until it has its answer
        self._repeatable = False
        self._frozen = False
        self._asked = False  # there was a request
        self._last = False  # the answer that is owed is the last
        self._patient = False
        self.peer = peer
        """Who is at the other end, as far as the connection itself proves that."""
        self.resumed = resumed
        """What an earlier service has done of the request that is being answered; None: it is a client's."""
        self.progress: Callable[[], Progress | None] = lambda: self.resumed
        """Tells what has been done of it."""

    # -- what a handler asks ----------------------------------------------------------------------------------------

    def take_over(self, successor: Callable[[asyncio.Transport, bytes, bool], asyncio.Protocol]) -> None:
        """Hand the connection to `successor(transport, held bytes, whether the client's end has come)`.

        ConnectionError when the client is gone already; Internal when the request was not seen as one that may be
        hijacked, because then some of its bytes may be lost.
        """
        transport = self.transport
        if self._held is None:
            raise Internal("this request cannot be hijacked", hint="the path of a start request was not recognised")
        protocol = successor(transport, bytes(self._held), self._eof)
        self._held = None
        self._request.clear()
        self._arm(None)
        transport.set_protocol(protocol)
        self._release()

    def request_done(self, *, failed: bool) -> bool:
        """Note that the oldest request has its answer; return whether the connection must end with it.

        What stands behind a start request is its stdin and never HTTP. When the start failed, more of it may be
        on its way, so that connection ends too; after a detached start it goes on.
        """
        self._outstanding -= 1
        asyncio.get_running_loop().call_soon(self._told, self)
        self._forget_progress()
        if self._outstanding:  # a start request is always the last: this was one before it
            return False
        self._request.clear()
        if self._arriving and self._hijackable:  # refused before its body was here
            return True
        held, self._held = self._held, None
        if held is not None and (held or failed):
            return True
        return self._eof or self._last

    @property
    def patient(self) -> bool:
        """Whether the request that is being answered waits for something that may never happen."""
        return self._patient

    @patient.setter
    def patient(self, patient: bool) -> None:
        self._patient = patient
        self._told(self)  # nobody need wait for its answer any more

    @property
    def answering(self) -> bool:
        """Whether the head of the answer to the oldest request is on the wire, and perhaps more of it."""
        progress = self.progress()
        return progress is not None and progress.position is not None

    @property
    def transport(self) -> asyncio.Transport:
        """The connection. ConnectionError when the client is gone."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the client is gone")
        return self._transport

    async def written(self) -> None:
        """Return once everything that was answered is on the wire. ConnectionError when the client is gone."""
        while self.transport.get_write_buffer_size():
            self._room = self._room or asyncio.get_running_loop().create_future()
            self.transport.set_write_buffer_limits(high=0)
            await asyncio.wait([self._room])

    def cut(self) -> None:
        """End the connection at once, in the midst of an answer: it must not look complete."""
        if self.cut_off is not None:
            self.cut_off()
        if self._transport is not None:
            self._transport.abort()

    async def client_left(self) -> None:
        """Return once the client has closed its side: for answers that have no end of their own."""
        if self._left is None:
            self._left = asyncio.get_running_loop().create_future()
            self._tell_left()
        await asyncio.shield(self._left)

    # -- handing over -----------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Read no further request, let no answer in pieces go on, and tell when all that was written is on the wire.

        A connection that cannot be handed over has one more answer, if one is owed or it is `fresh`, or else it ends.
        """
        if self.cut_off is not None:
            self._last = True
            if not self.fresh:
                self.dismiss()
            return
        self._frozen = True
        if self._ours:
            transport = cast("asyncio.Transport", self._transport)
            transport.pause_reading()
            transport.set_write_buffer_limits(high=0)

    def dismiss(self) -> None:
        """End a connection that cannot be handed over, in order, unless an answer is owed."""
        if self.cut_off is not None and self._ours and not self._outstanding:
            cast("asyncio.Transport", self._transport).close()

    async def proceed(self) -> None:
        """Return as long as an answer may be begun or gone on with; after `freeze`, never: the next service does it."""
        if self._frozen:
            await asyncio.get_running_loop().create_future()

    @property
    def open(self) -> bool:
        """Whether the connection is there, be it ours or its successor's."""
        return self._transport is not None

    @property
    def busy(self) -> bool:
        """Whether an answer is owed that will come soon."""
        return self._ours and self._outstanding > 0 and not self._patient

    @property
    def fresh(self) -> bool:
        """Whether it was made just now, for a request that has not come, and cannot be handed over without it."""
        return self._ours and self.cut_off is not None and not self._asked

    @property
    def owing(self) -> bool:
        """Whether an answer is owed that has not begun and that the next service cannot give."""
        return self._ours and self._outstanding > 0 and self.cut_off is not None and not self.answering

    @property
    def unsent(self) -> bool:
        """Whether some of what was answered is not on the wire."""
        return self._ours and cast("asyncio.Transport", self._transport).get_write_buffer_size() > 0

    def hand_over(self) -> tuple[int, bytes, Progress | None] | None:
        """Return a descriptor of the connection (the caller's), what was read of requests to come, and the progress.

        A request that is being answered is the first of them if asking again does no harm: nothing has happened yet,
        or its progress tells what. None when the connection cannot be handed over: it is at its end, or in the midst
        of an answer, or there is no descriptor left.
        """
        transport = self._transport
        if transport is None or not self._ours or self._refused or (self._eof and not self._outstanding):
            return None
        if self.cut_off is not None:
            return None
        if self.unsent or (self._outstanding and not self._asked_again):
            return None
        rest = bytes(self._held) if self._held is not None else self._splitter.take_rest()
        progress = self.progress() if self._outstanding else None
        try:
            fd = os.dup(transport.get_extra_info("socket").fileno())
        except OSError as error:
            log.warning("a client's connection is lost: %s", error)
            return None
        return fd, bytes(self._request) + rest, progress

    @property
    def _ours(self) -> bool:
        """Whether the connection is open, and nobody has taken it over."""
        transport = self._transport
        return transport is not None and not transport.is_closing() and transport.get_protocol() is self

    @property
    def _asked_again(self) -> bool:
        return self._outstanding == 1 and self._repeatable and not self._arriving

    # -- what the event loop says -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no instances of it
        self.peer = self.peer or self._identify(transport)
        self._arm(HEAD_TIMEOUT if self._idle is None else self._idle)
        self._inner.connection_made(transport)
        if self._frozen or self._last:
            self.freeze()
        if self._read:  # before anything that the loop may tell of the rest
            read, self._read = self._read, b""
            self.data_received(read)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol. A successor passes its own loss on to here."""
        self._transport, self._eof = None, True
        self._arm(None)
        self._tell_room()
        self._tell_left()
        self._told(self)
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._inner.resume_writing()
        self._tell_room()
        self._told(self)

    def eof_received(self) -> bool:
        """Keep the connection while an answer is owed: a half-close is no farewell."""
        self._eof = True
        self._tell_left()
        return not self._refused and self._outstanding > 0 and (self._held is not None or self._splitter.idle)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._refused:
            return
        if self._held is not None:
            self._hold(data)
            return
        if self._splitter.idle and data:
            self._arm(None)  # what it was set for has begun
        self._splitter.feed(data)
        try:
            self._forward()
        except BadRequest as error:
            self._refuse(error.status, error.message)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _forward(self) -> None:
        """Give aiohttp what is complete; stop behind a request that may be hijacked."""
        while not isinstance(event := self._splitter.next_event(), NeedData):
            if isinstance(event, Head):
                self._begin(event)
                self._pass_on(event.raw)
            elif isinstance(event, Body):
                self._pass_on(event.raw)
            else:
                self._arriving = False
                self._arm(None)
                if self._hijackable:
                    self._held = bytearray()
                    self._hold(self._splitter.take_rest())
                    return
        if self._timer is None and not self._splitter.idle:  # most requests are here at once, and need none
            self._arm(BODY_TIMEOUT if self._arriving else HEAD_TIMEOUT)

    def _pass_on(self, raw: bytes) -> None:
        if self._repeatable:
            self._request += raw
        try:
            self._inner.data_received(raw)
        except Exception as error:  # aiohttp's parser lets some of its own errors escape (3.14: `http://[%]@/`)
            log.debug("aiohttp could not parse a request: %r", error)
            self._outstanding -= 1
            self._arriving = False
            raise BadRequest(400, "malformed request") from error

    def _begin(self, head: Head) -> None:
        if any(coding.lower() != "identity" for coding in head.headers("content-encoding")):
            raise BadRequest(415, "compressed request bodies are not accepted")
        if any(expectation.lower() != "100-continue" for expectation in head.headers("expect")):
            raise BadRequest(417, "the only expectation met here is 100-continue")
        self._outstanding += 1
        self._asked = self._arriving = True
        path = unquote(head.path)
        self._hijackable = head.method == "POST" and _HIJACKABLE.fullmatch(path) is not None
        repeatable = _REPEATABLE.get(head.method)
        self._repeatable = repeatable is not None and repeatable.fullmatch(path) is not None
        self._request.clear()
        self._arm(None)

    def _hold(self, data: bytes) -> None:
        assert self._held is not None
        self._held += data
        if len(self._held) > HELD_LIMIT and self._transport is not None:
            self._transport.pause_reading()

    def _refuse(self, status: int, message: str) -> None:
        """Answer what is no request that anybody should see, and end the connection."""
        self._refused = True
        transport = self._transport
        if transport is None:
            return
        if self._arriving:  # a handler may be waiting for a body that will never be whole
            if self._outstanding == 1:
                transport.write(self._error_response(status, message))
            transport.close()
            return
        if self._outstanding:  # an answer is being written: this one would land in the middle of it
            self._inner.close()
            self._arm(None)
            return
        log.debug("refused a request: %d %s", status, message)
        transport.write(self._error_response(status, message))
        if self._eof or not transport.can_write_eof():
            transport.close()
            return
        transport.write_eof()
        self._arm(_LINGER)

    def _error_response(self, status: int, message: str) -> bytes:
        """Word a refusal as the API that was asked would; Docker's when it was not said yet which one is."""
        path = self._splitter.path
        return error_response(DOCKER if path is None else dialect_of(unquote(path)), status, message)

    def _expired(self) -> None:
        """Too slow."""
        if self._transport is None:
            return
        if self._refused or self._splitter.idle:
            self._transport.close()
        else:
            self._refuse(408, "the request did not arrive in time")
            if self._outstanding:
                self._transport.close()

    def _arm(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, self._expired)

    def _release(self) -> None:
        """Have aiohttp forget a connection that is not HTTP any more, with all that it keeps for one (some 10 KB).

        The handler goes on, and what it returns is not written by anybody.
        """
        self._inner.transport = None  # or it would be closed
        self._inner.connection_lost(None)
        self._inner = _NOBODY

    def _forget_progress(self) -> None:
        self._patient = False
        self.resumed = None
        self.progress = lambda: self.resumed

    def _tell_room(self) -> None:
        room, self._room = self._room, None
        if room is not None:
            room.set_result(None)

    def _tell_left(self) -> None:
        if self._eof and self._left is not None and not self._left.done():
            self._left.set_result(None)


_NOBODY = cast("web.RequestHandler", asyncio.Protocol())
"""Gets told, in aiohttp's place, what becomes of a connection that is not HTTP any more: its loss."""


def front_of(request: web.Request) -> FrontProtocol:
    """Return the front of the connection that a request came by."""
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client is gone")
    front = transport.get_protocol()
    if not isinstance(front, FrontProtocol):
        raise Internal("this connection has no front", hint="the listener was not made by http.server")
    return front


@web.middleware
async def front_middleware(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Keep the front informed of which requests have their answers."""
    try:
        front = front_of(request)
    except ConnectionError:  # the client left before its turn came; nobody will read this
        return web.Response()
    response = await handler(request)
    if front.answering and not response.prepared:  # a failure within an answer: it cannot be told in its place
        front.cut()
    if front.request_done(failed=response.status >= 400):
        response.force_close()
    return response


def error_response(dialect: Dialect, status: int, message: str) -> bytes:
    """Return a whole answer, with which its connection ends."""
    body = error_json(dialect, status, message) + b"\n"
    try:
        reason = HTTPStatus(status).phrase
    except ValueError:
        reason = "Error"
    head = (
        f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
