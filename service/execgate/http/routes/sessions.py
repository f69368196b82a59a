"""What neither Docker nor Podman offers: list, kill, stop, wait, remove, logs, attach, stdin, run.

They stand beside Docker's own routes in both trees, and answer errors in the words of the tree.
"""

import asyncio
import base64
import binascii
import re
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from aiohttp import web

from execgate.http.answers.subjects import rfc3339
from execgate.http.bodies import RunBody, read_body
from execgate.http.dialects import MULTIPLEXED_STREAM, RAW_STREAM, Dialect
from execgate.http.filters import parse_filters
from execgate.http.front import front_of
from execgate.http.hang_ups import hung_up
from execgate.http.hijack import HijackedStream
from execgate.http.query import flag
from execgate.http.routes.execs import exec_config
from execgate.http.takeover import AlreadyAnswered, hijack
from execgate.http.tree import Route
from execgate.model.errors import InvalidArgument
from execgate.model.session import ExecSession, SessionState
from execgate.sessions.backlog import Backlog
from execgate.sessions.manager import SessionManager
from execgate.sessions.oneshot import RunResult, run
from execgate.wire import stdcopy

OFFSET_HEADER = "Execgate-Offset"
"""The offset of the first byte of output that is sent; greater than `after`, if what was between was dropped."""

_FILTERS = frozenset({"container", "state", "label"})
_STATES = {
    "created": (SessionState.CREATED,),
    "running": (SessionState.STARTING, SessionState.RUNNING),
    "stopped": (SessionState.STOPPED,),
}
_OFFSET = re.compile(r"[0-9]{1,18}", re.ASCII)
_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,3})?", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,2}", re.ASCII)
_REAL_TIME = re.compile(r"RTMIN\+([0-9]{1,2})|RTMAX-([0-9]{1,2})", re.ASCII)
_HANG_UP_POLL = 0.25


class SessionRoutes:
    """The verbs beyond Docker's over a `SessionManager`, in the manner of one dialect."""

    def __init__(self, manager: SessionManager, dialect: Dialect) -> None:
        self._manager = manager
        self._dialect = dialect

    def routes(self) -> Sequence[Route]:
        """See tree.RouteGroup."""
        return [
            ("GET", "/exec/json", self.list_all),
            ("GET", "/containers/{name}/exec/json", self.list_container),
            ("POST", "/containers/{name}/exec/run", self.run),
            ("POST", "/exec/{id}/kill", self.kill),
            ("POST", "/exec/{id}/stop", self.stop),
            ("POST", "/exec/{id}/wait", self.wait),
            ("DELETE", "/exec/{id}", self.remove),
            ("GET", "/exec/{id}/logs", self.logs),
            ("POST", "/exec/{id}/attach", self.attach),
            ("POST", "/exec/{id}/stdin", self.stdin),
        ]

    async def list_all(self, request: web.Request) -> web.Response:
        """GET /exec/json?filters=: container, state, label."""
        filters = parse_filters(request.query.get("filters", ""), _FILTERS)
        containers: Sequence[str | None] = filters.get("container") or [None]
        found = {one.id: one for ref in containers for one in self._selected(ref, filters)}
        return self._sessions(sorted(found.values(), key=lambda one: one.created_at))

    async def list_container(self, request: web.Request) -> web.Response:
        """GET /containers/{name}/exec/json?filters=: state, label."""
        filters = parse_filters(request.query.get("filters", ""), _FILTERS - {"container"})
        return self._sessions(self._selected(request.match_info["name"], filters))

    async def kill(self, request: web.Request) -> web.Response:
        """POST /exec/{id}/kill?signal=: KILL (the default) ends the whole tree, and is answered when it has."""
        await self._manager.kill(request.match_info["id"], parse_signal(request.query.get("signal", "")))
        return web.Response(status=204)

    async def stop(self, request: web.Request) -> web.Response:
        """POST /exec/{id}/stop?t=: TERM, after `t` seconds KILL."""
        text = request.query.get("t", "")
        if text and not _SECONDS.fullmatch(text):
            raise InvalidArgument(f'invalid value of t "{text[:64]}": not a number of seconds')
        front_of(request).patient = True
        await self._manager.stop(request.match_info["id"], float(text) if text else None)
        return web.Response(status=204)

    async def wait(self, request: web.Request) -> web.Response:
        """POST /exec/{id}/wait: answered when the session is over."""
        waiting = asyncio.ensure_future(self._manager.wait(request.match_info["id"]))
        if not await _unless_gone(request, waiting):
            return web.Response()
        session = waiting.result()
        assert session.exit is not None
        return web.json_response(
            {"StatusCode": session.exit.code, "TimedOut": session.timed_out, "Error": session.error}
        )

    async def remove(self, request: web.Request) -> web.Response:
        """DELETE /exec/{id}?force=."""
        await self._manager.remove(request.match_info["id"], force=flag(request, "force"))
        return web.Response(status=204)

    async def stdin(self, request: web.Request) -> web.Response:
        """POST /exec/{id}/stdin?eof=1: the body is input, and then, with `eof`, comes its end."""
        data = await request.read()
        writing = asyncio.ensure_future(
            self._manager.write_stdin(request.match_info["id"], data, eof=flag(request, "eof"))
        )
        if await _unless_gone(request, writing):
            writing.result()
        return web.Response(status=204)

    async def run(self, request: web.Request) -> web.Response:
        """POST /containers/{name}/exec/run: one request, one answer. A client that goes takes the process with it."""
        body = await read_body(request, RunBody, typed=self._dialect.checks_content_type)
        config = exec_config(body, self._dialect, request)
        stdin = _decoded(body)
        running = asyncio.ensure_future(
            run(self._manager, request.match_info["name"], config, stdin=stdin, limit=body.output_limit)
        )
        if not await _unless_gone(request, running):
            return web.Response()
        return web.json_response(_run_answer(running.result(), body.encoding))

    async def logs(self, request: web.Request) -> web.StreamResponse:
        """GET /exec/{id}/logs?after=&follow=&stdout=&stderr=: the captured output."""
        session = self._manager.inspect(request.match_info["id"])
        after, wanted = _after(request) or 0, _wanted(request)
        backlog = await self._manager.output(session.id)
        if after > backlog.end:
            raise InvalidArgument(f"the output has {backlog.end} bytes; it cannot begin after {after}")
        raw = session.config.tty
        response = web.StreamResponse(
            headers={
                "Content-Type": RAW_STREAM if raw else MULTIPLEXED_STREAM,
                OFFSET_HEADER: str(max(after, backlog.start)),
            }
        )
        await response.prepare(request)
        follow = flag(request, "follow")
        sending = asyncio.ensure_future(_send_logs(response, backlog, after, wanted, follow=follow, raw=raw))
        if await _unless_gone(request, sending, patient=follow):
            sending.result()
        return response

    async def attach(self, request: web.Request) -> web.StreamResponse:
        """POST /exec/{id}/attach?after=&stdin=&stdout=&stderr=: replay, then live; the connection is the stream."""
        session = self._manager.inspect(request.match_info["id"])

        async def take_over(offset: int) -> HijackedStream:
            headers = {OFFSET_HEADER: str(offset)}
            return hijack(request, self._dialect, multiplexed=not session.config.tty, headers=headers)

        await self._manager.attach(
            session.id,
            take_over,
            after=_after(request),
            stdin="stdin" not in request.query or flag(request, "stdin"),
            wanted=_wanted(request),
        )
        return AlreadyAnswered()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _selected(self, container: str | None, filters: dict[str, list[str]]) -> Sequence[ExecSession]:
        states: list[SessionState] = []
        for name in filters.get("state", []):
            if name not in _STATES:
                raise InvalidArgument(f"invalid filter 'state': {name[:64]!r} is none of {', '.join(_STATES)}")
            states += _STATES[name]
        labels = {}
        for label in filters.get("label", []):
            key, equals, value = label.partition("=")
            labels[key] = value if equals else None
        return self._manager.list(container, states=states, labels=labels)

    def _sessions(self, sessions: Sequence[ExecSession]) -> web.Response:
        shown = (replace(one, transferred=self._manager.transferred(one)) for one in sessions)
        return web.json_response([self._dialect.answers.session(one) for one in shown])


def parse_signal(text: str) -> int:
    """Return a signal's number: `KILL`, `SIGKILL`, `9`, `RTMIN+3`; KILL for nothing. InvalidArgument."""
    name = text.upper().removeprefix("SIG") if text else "KILL"
    if _NUMBER.fullmatch(name):
        number = int(name)
    elif found := _REAL_TIME.fullmatch(name):
        number = signal.SIGRTMIN + int(found[1]) if found[1] else signal.SIGRTMAX - int(found[2])
        number = max(number, signal.SIGRTMIN - 1)  # which is none: the C library keeps those below for itself
    else:
        number = getattr(signal.Signals, f"SIG{name}", 0)
    if number not in signal.valid_signals():
        raise InvalidArgument(f"Invalid signal: {text[:64]}")
    return int(number)


def _after(request: web.Request) -> int | None:
    text = request.query.get("after")
    if text is None:
        return None
    if not _OFFSET.fullmatch(text):
        raise InvalidArgument(f'invalid value of after "{text[:64]}": not an offset in bytes')
    return int(text)


def _wanted(request: web.Request) -> frozenset[int]:
    """Return the streams that are asked for: those said to be, and with nothing said, both."""
    names = {"stdout": stdcopy.STDOUT, "stderr": stdcopy.STDERR}
    said = {stream for name, stream in names.items() if flag(request, name)}
    unsaid = {stream for name, stream in names.items() if name not in request.query}
    wanted = said or unsaid
    if not wanted:
        raise InvalidArgument("no stream is asked for: stdout, stderr or both")
    return frozenset(wanted)


def _decoded(body: RunBody) -> bytes:
    if body.encoding == "utf-8":
        try:
            return body.stdin.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument("Stdin contains a lone surrogate; use the encoding base64") from error
    try:
        return base64.b64decode(body.stdin, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidArgument("Stdin is not base64") from error


def _run_answer(result: RunResult, encoding: str) -> dict[str, Any]:
    def text(data: bytes) -> str:
        return base64.b64encode(data).decode("ascii") if encoding == "base64" else data.decode(errors="replace")

    session = result.session
    return {
        "Id": session.id,
        "ExitCode": result.exit_code,
        "Stdout": text(result.stdout),
        "Stderr": text(result.stderr),
        "Encoding": encoding,
        "TimedOut": result.timed_out,
        "Truncated": result.truncated,
        "Error": session.error,
        "StartedAt": rfc3339(session.started_at or session.created_at),
        "FinishedAt": rfc3339(session.finished_at or session.created_at),
    }


async def _send_logs(
    response: web.StreamResponse, backlog: Backlog, after: int, wanted: frozenset[int], *, follow: bool, raw: bool
) -> None:
    """Send what is there, and with `follow` what comes. What a slow reader lost is said, where frames can say it."""
    offset = max(after, backlog.start)  # the head has said what was dropped before
    with backlog.reader():
        while chunks := await (backlog.read(offset) if follow else backlog.read_now(offset)):
            for chunk in chunks:
                if chunk.offset > offset and not raw:
                    text = f"execgate: output from {offset} to {chunk.offset} was dropped\n".encode()
                    await response.write(stdcopy.frame_header(stdcopy.SYSTEMERR, len(text)) + text)
                if chunk.stream in wanted:
                    header = b"" if raw else stdcopy.frame_header(chunk.stream, len(chunk.data))
                    await response.write(header + chunk.data)
                offset = chunk.end


async def _unless_gone(request: web.Request, work: "asyncio.Future[Any]", *, patient: bool = True) -> bool:
    """Wait for `work`; when the client goes before, cancel it. Return whether there is a result to be told.

    `patient` is work that may take for ever: a service that hands over does not wait for it.
    A half-close is not going: on a unix socket the kernel tells the two apart (POLLHUP), over TCP nothing does.
    """
    front_of(request).patient = patient
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        return work.done()
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _gone(request: web.Request) -> None:
    """Return once the client's connection is closed in both directions."""
    await front_of(request).client_left()
    async for _ in _ticks():
        transport = request.transport
        if transport is None or transport.is_closing() or hung_up(transport.get_extra_info("socket")):
            return


async def _ticks() -> AsyncIterator[None]:
    while True:
        yield
        await asyncio.sleep(_HANG_UP_POLL)  # the loop watches for data and its end, and for nothing behind that
