"""The four exec routes: create, start, resize, inspect."""

import re
from collections.abc import Sequence

from aiohttp import web

from execgate.gate.access import Access
from execgate.http.bodies import CreateBody, StartBody, console_size, read_body
from execgate.http.dialects import DEFAULT_DETACH_KEYS, Dialect, TtyOf
from execgate.http.front import FrontProtocol, front_of
from execgate.http.hijack import HijackedStream
from execgate.http.identity import access_of
from execgate.http.progress import Progress
from execgate.http.query import flag
from execgate.http.takeover import AlreadyAnswered, hijack
from execgate.http.tree import Route
from execgate.model.config import ConsoleSize, ExecConfig, OnDisconnect
from execgate.model.errors import Conflict, InvalidArgument
from execgate.sessions.manager import AlreadyStarted
from execgate.wire.detach_keys import parse_detach_keys

_NUMBER = re.compile(r"-?[0-9]+", re.ASCII)
_WINSIZE_MAX = 2**16 - 1


class ExecRoutes:
    """The exec API, in the manner of one dialect."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect

    def routes(self) -> Sequence[Route]:
        """See tree.RouteGroup."""
        return [
            ("POST", "/containers/{name}/exec", self.create),
            ("POST", "/exec/{id}/start", self.start),
            ("GET", "/exec/{id}/json", self.inspect),
            ("POST", "/exec/{id}/resize", self.resize),
        ]

    async def create(self, request: web.Request) -> web.Response:
        """POST /containers/{name}/exec."""
        body = await read_body(request, CreateBody, typed=self._dialect.checks_content_type)
        config = exec_config(body, self._dialect, request)
        session = await access_of(request).create(request.match_info["name"], config)
        return web.json_response({"Id": session.id}, status=201)

    async def start(self, request: web.Request) -> web.StreamResponse:
        """POST /exec/{id}/start: detached, or the connection becomes the session's stream."""
        body = await read_body(request, self._dialect.start_body, typed=self._dialect.checks_content_type)
        access, session_id = access_of(request), request.match_info["id"]
        size = self._start_size(body, request)
        if body.detach:
            await self._start_detached(front_of(request), access, session_id, size)
            return self._detached()
        raw = self._is_raw(body, access, session_id)

        async def take_over() -> HijackedStream:
            return hijack(request, self._dialect, multiplexed=not raw)

        try:
            await access.start_attached(session_id, size, take_over)
        except AlreadyStarted as error:
            if not self._dialect.tells_second_start_in_stream:
                raise
            # What dockerd finds out after the hijack it says in the stream, and clients look there.
            stream = await take_over()
            await stream.finish(error.message)
        return AlreadyAnswered()

    async def _start_detached(
        self, front: FrontProtocol, access: Access, session_id: str, size: ConsoleSize | None
    ) -> None:
        """Start, or go on with a start that an earlier service has begun."""

        def intended() -> None:
            front.progress = lambda: Progress(session_id=session_id)
            front.patient = True  # there is an answer whenever it comes, here or in the next service

        if front.resumed is None:
            await access.start_detached(session_id, size, intended=intended)
        else:
            front.patient = True
            await access.started(session_id)

    async def resize(self, request: web.Request) -> web.Response:
        """POST /exec/{id}/resize?h=&w=."""
        size = ConsoleSize(height=_dimension(request, "h", "height"), width=_dimension(request, "w", "width"))
        late = self._dialect.resize_may_come_late
        try:
            await access_of(request).resize(request.match_info["id"], size)
        except Conflict:
            if not late or not flag(request, late):
                raise
        return web.Response(status=self._dialect.resized_status)

    async def inspect(self, request: web.Request) -> web.Response:
        """GET /exec/{id}/json."""
        access = access_of(request)
        session = access.inspect(request.match_info["id"])
        return web.json_response(self._dialect.answers.session(session, access.transferred(session)))

    def _start_size(self, body: StartBody, request: web.Request) -> ConsoleSize | None:
        if not body.tty or self._dialect.version_of(request) < self._dialect.console_size_since:
            return None
        return body.size()

    def _is_raw(self, body: StartBody, access: Access, session_id: str) -> bool:
        """Return whether the output is sent as it is, without frames."""
        if self._dialect.framed_by is TtyOf.START:
            return body.tty
        return access.to_start(session_id).config.tty

    def _detached(self) -> web.Response:
        text = self._dialect.detached_answer
        return web.Response(text=text, charset="us-ascii") if text else web.Response()


def exec_config(body: CreateBody, dialect: Dialect, request: web.Request) -> ExecConfig:
    """Return what a body asks for, in the manner of its dialect. InvalidArgument."""
    if not body.cmd:
        raise InvalidArgument("No exec command specified")
    if body.preserve_fds or body.preserve_fd:
        raise InvalidArgument("descriptors cannot be preserved over HTTP; a Python program can hand them to the engine")
    sized = dialect.version_of(request) >= dialect.console_size_since
    return ExecConfig(
        args=tuple(body.cmd),
        tty=body.tty,
        console_size=console_size(body.console_size) if sized else None,
        attach_stdin=body.attach_stdin,
        attach_stdout=body.attach_stdout,
        attach_stderr=body.attach_stderr,
        detach_keys=_detach_keys(body.detach_keys, dialect),
        env=tuple(body.env),
        privileged=body.privileged,
        user=body.user,
        working_dir=body.working_dir,
        timeout=body.timeout or None,
        idle_timeout=body.idle_timeout or None,
        labels=body.labels,
        capture_stdout=body.capture_stdout,
        capture_stderr=body.capture_stderr,
        on_disconnect=OnDisconnect(body.on_disconnect),
    )


def _detach_keys(text: str | None, dialect: Dialect) -> bytes:
    if text == "" and dialect.empty_disables_detach_keys:
        return b""
    return parse_detach_keys(text or DEFAULT_DETACH_KEYS)


def _dimension(request: web.Request, key: str, name: str) -> int:
    """Parse a uint32 as Go does, and bound it to what a terminal can have (16 bits)."""
    text = request.query.get(key, "")
    if not _NUMBER.fullmatch(text):
        raise InvalidArgument(f'invalid resize {name} "{text[:64]}": invalid syntax')
    value = int(text[:20])
    if text.startswith("-") or len(text) > 20 or value > _WINSIZE_MAX:
        raise InvalidArgument(f'invalid resize {name} "{text[:64]}": value out of range')
    return value
