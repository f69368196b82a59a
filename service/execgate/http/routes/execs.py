"""The four exec routes: create, start, resize, inspect."""

import re
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from execgate.http.bodies import CreateBody, StartBody, console_size, read_body
from execgate.http.dialects import DEFAULT_DETACH_KEYS, ApiVersion, Dialect, TtyOf, upgrade_head
from execgate.http.front import front_of
from execgate.http.hijack import HijackedStream
from execgate.http.query import flag
from execgate.http.tree import Route
from execgate.model.config import ConsoleSize, ExecConfig
from execgate.model.errors import Conflict, InvalidArgument
from execgate.sessions.manager import AlreadyStarted, SessionManager
from execgate.wire.detach_keys import parse_detach_keys

_NUMBER = re.compile(r"-?[0-9]+", re.ASCII)
_WINSIZE_MAX = 2**16 - 1


class ExecRoutes:
    """The exec API over a `SessionManager`, in the manner of one dialect."""

    def __init__(self, manager: SessionManager, dialect: Dialect) -> None:
        self._manager = manager
        self._dialect = dialect

    def routes(self) -> Sequence[Route]:
        """See tree.RouteGroup."""
        return [
            ("POST", "/containers/{name}/exec", self.create),
            ("POST", "/exec/{id}/start", self.start),
            ("POST", "/exec/{id}/resize", self.resize),
            ("GET", "/exec/{id}/json", self.inspect),
        ]

    async def create(self, request: web.Request) -> web.Response:
        """POST /containers/{name}/exec."""
        body = await read_body(request, CreateBody, typed=self._dialect.checks_content_type)
        if not body.cmd:
            raise InvalidArgument("No exec command specified")
        session = await self._manager.create(request.match_info["name"], self._config(body, request))
        return web.json_response({"Id": session.id}, status=201)

    async def start(self, request: web.Request) -> web.StreamResponse:
        """POST /exec/{id}/start: detached, or the connection becomes the session's stream."""
        body = await read_body(request, self._dialect.start_body, typed=self._dialect.checks_content_type)
        session_id = request.match_info["id"]
        size = self._start_size(body, request)
        if body.detach:
            await self._manager.start_detached(session_id, size)
            return self._detached()
        raw = self._is_raw(body, session_id)

        async def take_over() -> HijackedStream:
            return _hijack(request, self._dialect, multiplexed=not raw)

        try:
            await self._manager.start_attached(session_id, size, take_over)
        except AlreadyStarted as error:
            if not self._dialect.tells_second_start_in_stream:
                raise
            # What dockerd finds out after the hijack it says in the stream, and clients look there.
            stream = await take_over()
            await stream.finish(error.message)
            await stream.wait_closed()
        return _AlreadyAnswered()

    async def resize(self, request: web.Request) -> web.Response:
        """POST /exec/{id}/resize?h=&w=."""
        size = ConsoleSize(height=_dimension(request, "h", "height"), width=_dimension(request, "w", "width"))
        late = self._dialect.resize_may_come_late
        try:
            await self._manager.resize(request.match_info["id"], size)
        except Conflict:
            if not late or not flag(request, late):
                raise
        return web.Response(status=self._dialect.resized_status)

    async def inspect(self, request: web.Request) -> web.Response:
        """GET /exec/{id}/json."""
        session = self._manager.inspect(request.match_info["id"])
        return web.json_response(self._dialect.answers.session(session))

    def _config(self, body: CreateBody, request: web.Request) -> ExecConfig:
        sized = self._dialect.version_of(request) >= self._dialect.console_size_since
        return ExecConfig(
            args=tuple(body.cmd),
            tty=body.tty,
            console_size=console_size(body.console_size) if sized else None,
            attach_stdin=body.attach_stdin,
            attach_stdout=body.attach_stdout,
            attach_stderr=body.attach_stderr,
            detach_keys=self._detach_keys(body.detach_keys),
            env=tuple(body.env),
            privileged=body.privileged,
            user=body.user,
            working_dir=body.working_dir,
        )

    def _detach_keys(self, text: str | None) -> bytes:
        if text == "" and self._dialect.empty_disables_detach_keys:
            return b""
        return parse_detach_keys(text or DEFAULT_DETACH_KEYS)

    def _start_size(self, body: StartBody, request: web.Request) -> ConsoleSize | None:
        if not body.tty or self._dialect.version_of(request) < self._dialect.console_size_since:
            return None
        return body.size()

    def _is_raw(self, body: StartBody, session_id: str) -> bool:
        """Return whether the output is sent as it is, without frames."""
        if self._dialect.framed_by is TtyOf.START:
            return body.tty
        return self._manager.inspect(session_id).config.tty

    def _detached(self) -> web.Response:
        text = self._dialect.detached_answer
        return web.Response(text=text, charset="us-ascii") if text else web.Response()


def _hijack(request: web.Request, dialect: Dialect, *, multiplexed: bool) -> HijackedStream:
    """Take the request's connection over and put the head of the answer on the wire."""
    version: ApiVersion = dialect.version_of(request)
    front = front_of(request)
    stream: HijackedStream | None = None

    def successor(transport: Any, held: bytes, eof: bool) -> HijackedStream:
        nonlocal stream
        stream = HijackedStream(
            transport,
            held,
            eof,
            multiplexed=multiplexed,
            error_line=dialect.error_line,
            lost=front.connection_lost,
        )
        return stream

    front.take_over(successor)
    assert stream is not None
    stream.begin(upgrade_head(dialect, version, upgrade="Upgrade" in request.headers, multiplexed=multiplexed))
    return stream


class _AlreadyAnswered(web.StreamResponse):
    """Tells aiohttp that nothing is left to be written: the connection was ours, and is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.force_close()

    async def prepare(self, request: web.BaseRequest) -> None:
        """Write no head."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Write no end."""


def _dimension(request: web.Request, key: str, name: str) -> int:
    """Parse a uint32 as Go does, and bound it to what a terminal can have (16 bits)."""
    text = request.query.get(key, "")
    if not _NUMBER.fullmatch(text):
        raise InvalidArgument(f'invalid resize {name} "{text[:64]}": invalid syntax')
    value = int(text[:20])
    if text.startswith("-") or len(text) > 20 or value > _WINSIZE_MAX:
        raise InvalidArgument(f'invalid resize {name} "{text[:64]}": value out of range')
    return value
