"""The four exec routes: create, start, resize, inspect."""

import base64
import re
from typing import Any

from aiohttp import web

from execgate.http.bodies import CreateBody, StartBody, console_size, read_body
from execgate.http.dialects import ApiVersion, Dialect, upgrade_head
from execgate.http.front import front_of
from execgate.http.hijack import HijackedStream
from execgate.model.config import ConsoleSize, ExecConfig
from execgate.model.errors import InvalidArgument
from execgate.model.session import ExecSession
from execgate.sessions.manager import AlreadyStarted, SessionManager
from execgate.wire.detach_keys import parse_detach_keys

_DEFAULT_DETACH_KEYS = "ctrl-p,ctrl-q"
_NUMBER = re.compile(r"-?[0-9]+", re.ASCII)
_WINSIZE_MAX = 2**16 - 1


class ExecRoutes:
    """Docker's exec API over a `SessionManager`."""

    def __init__(self, manager: SessionManager, dialect: Dialect) -> None:
        self._manager = manager
        self._dialect = dialect

    async def create(self, request: web.Request) -> web.Response:
        """POST /containers/{name}/exec."""
        body = await read_body(request, CreateBody)
        if not body.cmd:
            raise InvalidArgument("No exec command specified")
        session = await self._manager.create(request.match_info["name"], self._config(body, request))
        return web.json_response({"Id": session.id}, status=201)

    async def start(self, request: web.Request) -> web.StreamResponse:
        """POST /exec/{id}/start: detached, or the connection becomes the session's stream."""
        body = await read_body(request, StartBody)
        session_id = request.match_info["id"]
        size = self._start_size(body, request)
        if body.detach:
            await self._manager.start_detached(session_id, size)
            return web.Response()

        async def take_over() -> HijackedStream:
            return _hijack(request, self._dialect, multiplexed=not body.tty)

        try:
            await self._manager.start_attached(session_id, size, take_over)
        except AlreadyStarted as error:
            # What dockerd finds out after the hijack it says in the stream, and clients look there.
            stream = await take_over()
            await stream.finish(error.message)
            await stream.wait_closed()
        return _AlreadyAnswered()

    async def resize(self, request: web.Request) -> web.Response:
        """POST /exec/{id}/resize?h=&w=."""
        size = ConsoleSize(height=_dimension(request, "h", "height"), width=_dimension(request, "w", "width"))
        await self._manager.resize(request.match_info["id"], size)
        return web.Response()

    async def inspect(self, request: web.Request) -> web.Response:
        """GET /exec/{id}/json."""
        return web.json_response(inspection(self._manager.inspect(request.match_info["id"])))

    def _config(self, body: CreateBody, request: web.Request) -> ExecConfig:
        sized = self._dialect.version_of(request) >= self._dialect.console_size_since
        return ExecConfig(
            args=tuple(body.cmd),
            tty=body.tty,
            console_size=console_size(body.console_size) if sized else None,
            attach_stdin=body.attach_stdin,
            attach_stdout=body.attach_stdout,
            attach_stderr=body.attach_stderr,
            detach_keys=parse_detach_keys(body.detach_keys or _DEFAULT_DETACH_KEYS),
            env=tuple(body.env),
            privileged=body.privileged,
            user=body.user,
            working_dir=body.working_dir,
        )

    def _start_size(self, body: StartBody, request: web.Request) -> ConsoleSize | None:
        if not body.tty or self._dialect.version_of(request) < self._dialect.console_size_since:
            return None
        return console_size(body.console_size)


def inspection(session: ExecSession) -> dict[str, Any]:
    """Return a session as `GET /exec/{id}/json` shows it.

    `ExitCodeSource` is ours: how the code was learnt, `unknown` included, in which case the code is 255.
    """
    config = session.config
    process: dict[str, Any] = {
        "tty": config.tty,
        "entrypoint": config.args[0],
        "arguments": list(config.args[1:]),
        "privileged": config.privileged,
    }
    if config.user:
        process["user"] = config.user
    return {
        "ID": session.id,
        "Running": session.running,
        "ExitCode": session.exit.code if session.exit else None,
        "ExitCodeSource": session.exit.source if session.exit else None,
        "ProcessConfig": process,
        "OpenStdin": config.attach_stdin,
        "OpenStderr": config.attach_stderr,
        "OpenStdout": config.attach_stdout,
        "CanRemove": session.exit is not None,
        "ContainerID": session.container.container_id,
        "DetachKeys": base64.b64encode(config.detach_keys).decode("ascii"),  # as Go encodes its []byte
        "Pid": session.process.pid if session.process and session.running else 0,
    }


def _hijack(request: web.Request, dialect: Dialect, *, multiplexed: bool) -> HijackedStream:
    """Take the request's connection over and put the head of the answer on the wire."""
    version: ApiVersion = dialect.version_of(request)
    front = front_of(request)
    stream: HijackedStream | None = None

    def successor(transport: Any, held: bytes, eof: bool) -> HijackedStream:
        nonlocal stream
        stream = HijackedStream(transport, held, eof, multiplexed=multiplexed, lost=front.connection_lost)
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
