"""What neither Docker nor Podman offers: list, kill, stop, wait, remove, logs, attach, stdin, run.

They stand beside Docker's own routes in both trees, and answer errors in the words of the tree.
"""

import asyncio
import base64
import binascii
import re
import signal
from collections.abc import AsyncIterator, Sequence
from typing import Any

from aiohttp import web

from execgate.gate.access import Access
from execgate.http.answers.subjects import rfc3339
from execgate.http.bodies import MAX_OUTPUT, RunBody, read_body
from execgate.http.dialects import MULTIPLEXED_STREAM, RAW_STREAM, Dialect
from execgate.http.filters import parse_filters
from execgate.http.front import front_of
from execgate.http.hang_ups import hung_up
from execgate.http.hijack import HijackedStream
from execgate.http.identity import access_of
from execgate.http.progress import Progress
from execgate.http.query import flag
from execgate.http.routes.execs import exec_config
from execgate.http.streamed import Streamed
from execgate.http.takeover import AlreadyAnswered, hijack
from execgate.http.tree import Route
from execgate.model.errors import Conflict, InvalidArgument
from execgate.model.ids import SessionId
from execgate.model.session import ExecSession, SessionState
from execgate.sessions.backlog import Backlog, Chunk
from execgate.sessions.oneshot import Collector, RunResult
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
    """The verbs beyond Docker's, in the manner of one dialect."""

    def __init__(self, dialect: Dialect) -> None:
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
            ("GET", "/exec/{id}/result", self.result),
            ("POST", "/exec/{id}/attach", self.attach),
            ("POST", "/exec/{id}/stdin", self.stdin),
        ]

    async def list_all(self, request: web.Request) -> web.Response:
        """GET /exec/json?filters=: container, state, label."""
        filters = parse_filters(request.query.get("filters", ""), _FILTERS)
        containers: Sequence[str | None] = filters.get("container") or [None]
        access = access_of(request)
        found = {one.id: one for ref in containers for one in _selected(access, ref, filters)}
        return self._sessions(access, sorted(found.values(), key=lambda one: one.created_at))

    async def list_container(self, request: web.Request) -> web.Response:
        """GET /containers/{name}/exec/json?filters=: state, label."""
        filters = parse_filters(request.query.get("filters", ""), _FILTERS - {"container"})
        access = access_of(request)
        return self._sessions(access, _selected(access, request.match_info["name"], filters))

    async def kill(self, request: web.Request) -> web.Response:
        """POST /exec/{id}/kill?signal=: KILL (the default) ends the whole tree, and is answered when it has."""
        signal_number = parse_signal(request.query.get("signal", ""))
        await access_of(request).kill(request.match_info["id"], signal_number)
        return web.Response(status=204)

    async def stop(self, request: web.Request) -> web.Response:
        """POST /exec/{id}/stop?t=: TERM, after `t` seconds KILL."""
        text = request.query.get("t", "")
        if text and not _SECONDS.fullmatch(text):
            raise InvalidArgument(f'invalid value of t "{text[:64]}": not a number of seconds')
        front, session_id = front_of(request), request.match_info["id"]
        front.patient = True
        try:
            front.progress = lambda: Progress(session_id=session_id)
            await access_of(request).stop(session_id, float(text) if text else None)
        except Conflict:  # it was over when this service came
            if front.resumed is None:
                raise
        return web.Response(status=204)

    async def wait(self, request: web.Request) -> web.Response:
        """POST /exec/{id}/wait: answered when the session is over."""
        front_of(request).patient = True
        waiting = asyncio.ensure_future(access_of(request).wait(request.match_info["id"]))
        if not await _unless_gone(request, waiting):
            return web.Response()
        session = waiting.result()
        assert session.exit is not None
        return web.json_response(
            {"StatusCode": session.exit.code, "TimedOut": session.timed_out, "Error": session.error}
        )

    async def remove(self, request: web.Request) -> web.Response:
        """DELETE /exec/{id}?force=."""
        await access_of(request).remove(request.match_info["id"], force=flag(request, "force"))
        return web.Response(status=204)

    async def stdin(self, request: web.Request) -> web.Response:
        """POST /exec/{id}/stdin?eof=1: the body is input, and then, with `eof`, comes its end."""
        data = await request.read()
        front_of(request).patient = True
        writing = asyncio.ensure_future(
            access_of(request).write_stdin(request.match_info["id"], data, eof=flag(request, "eof"))
        )
        if await _unless_gone(request, writing):
            writing.result()
        return web.Response(status=204)

    async def run(self, request: web.Request) -> web.Response:
        """POST /containers/{name}/exec/run: one request, one answer. A client that goes takes the process with it."""
        body = await read_body(request, RunBody, typed=self._dialect.checks_content_type)
        front, access = front_of(request), access_of(request)

        def begun(session_id: SessionId, collector: Collector) -> None:
            front.progress = lambda: Progress(session_id=session_id, collector=collector)
            front.patient = True

        before = front.resumed
        if before is not None and before.collector is not None:
            begun(SessionId(before.session_id), before.collector)
            running = asyncio.ensure_future(access.resume(before.session_id, before.collector))
        else:
            config, stdin = exec_config(body, self._dialect, request), _decoded(body)
            container, limit = request.match_info["name"], body.output_limit
            running = asyncio.ensure_future(access.run(container, config, stdin=stdin, limit=limit, begun=begun))
        if not await _unless_gone(request, running):
            return web.Response()
        return web.json_response(_run_answer(running.result(), body.encoding))

    async def result(self, request: web.Request) -> web.Response:
        """GET /exec/{id}/result?limit=&encoding=: what `run` would have answered, of a session that is captured."""
        limit, encoding = _limit(request), _encoding(request)
        front_of(request).patient = True
        waiting = asyncio.ensure_future(access_of(request).result(request.match_info["id"], limit=limit))
        if not await _unless_gone(request, waiting):
            return web.Response()
        return web.json_response(_run_answer(waiting.result(), encoding))

    async def logs(self, request: web.Request) -> web.StreamResponse:
        """GET /exec/{id}/logs?after=&follow=&stdout=&stderr=: the captured output."""
        access = access_of(request)
        session = access.for_logs(request.match_info["id"])
        after, wanted = _after(request) or 0, _wanted(request)
        front = front_of(request)
        if (before := front.resumed) is not None and before.position is not None:
            after = before.position
        backlog = await access.output(session.id)
        if after > backlog.end:
            raise InvalidArgument(f"the output has {backlog.end} bytes; it cannot begin after {after}")
        raw = session.config.tty
        offset = max(after, backlog.start)
        headers = {"Content-Type": RAW_STREAM if raw else MULTIPLEXED_STREAM, OFFSET_HEADER: str(offset)}
        response = Streamed(front, headers, offset)
        async with response.begun(request):
            sending = asyncio.ensure_future(
                _send_logs(response, backlog, wanted, follow=flag(request, "follow"), raw=raw)
            )
            if await _unless_gone(request, sending):
                sending.result()
                if response.position < backlog.end:  # the rest was not kept, or removed: the latter is no end
                    access.for_logs(session.id)
        return response

    async def attach(self, request: web.Request) -> web.StreamResponse:
        """POST /exec/{id}/attach?after=&stdin=&stdout=&stderr=: replay, then live; the connection is the stream."""
        access = access_of(request)
        session = access.to_attach(request.match_info["id"])

        async def take_over(offset: int) -> HijackedStream:
            headers = {OFFSET_HEADER: str(offset)}
            return hijack(request, self._dialect, multiplexed=not session.config.tty, headers=headers)

        await access.attach(
            session.id,
            take_over,
            after=_after(request),
            stdin="stdin" not in request.query or flag(request, "stdin"),
            wanted=_wanted(request),
        )
        return AlreadyAnswered()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _sessions(self, access: Access, sessions: Sequence[ExecSession]) -> web.Response:
        return web.json_response([self._dialect.answers.session(one, access.transferred(one)) for one in sessions])


def _selected(access: Access, container: str | None, filters: dict[str, list[str]]) -> Sequence[ExecSession]:
    states: list[SessionState] = []
    for name in filters.get("state", []):
        if name not in _STATES:
            raise InvalidArgument(f"invalid filter 'state': {name[:64]!r} is none of {', '.join(_STATES)}")
        states += _STATES[name]
    labels = {}
    for label in filters.get("label", []):
        key, equals, value = label.partition("=")
        labels[key] = value if equals else None
    return access.list(container, states=states, labels=labels)


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


def _limit(request: web.Request) -> int:
    text = request.query.get("limit", str(RunBody.model_fields["output_limit"].default))
    if not _OFFSET.fullmatch(text) or int(text) > MAX_OUTPUT:
        raise InvalidArgument(f'invalid value of limit "{text[:64]}": not a number of bytes up to {MAX_OUTPUT}')
    return int(text)


def _encoding(request: web.Request) -> str:
    text = request.query.get("encoding", "utf-8")
    if text not in ("utf-8", "base64"):
        raise InvalidArgument(f'invalid value of encoding "{text[:64]}": neither utf-8 nor base64')
    return text


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


async def _send_logs(response: Streamed, backlog: Backlog, wanted: frozenset[int], *, follow: bool, raw: bool) -> None:
    """Send what is there, and with `follow` what comes. What a slow reader lost is said, where frames can say it."""
    with backlog.reader():
        while chunks := await _next_chunks(backlog, response.position, follow=follow):
            for chunk in chunks:
                offset = response.position
                if chunk.offset > offset and not raw:
                    text = f"execgate: output from {offset} to {chunk.offset} was dropped\n".encode()
                    await response.piece(stdcopy.frame_header(stdcopy.SYSTEMERR, len(text)) + text, chunk.offset)
                header = b"" if raw else stdcopy.frame_header(chunk.stream, len(chunk.data))
                await response.piece(header + chunk.data if chunk.stream in wanted else b"", chunk.end)


async def _next_chunks(backlog: Backlog, offset: int, *, follow: bool) -> Sequence[Chunk]:
    return await (backlog.read(offset) if follow else backlog.read_now(offset))


async def _unless_gone(request: web.Request, work: "asyncio.Future[Any]") -> bool:
    """Wait for `work`; when the client goes before, cancel it. Return whether there is a result to be told.

    A half-close is not going: on a unix socket the kernel tells the two apart (POLLHUP), over TCP nothing does.
    """
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
