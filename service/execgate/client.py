"""A client of a running service, for asyncio programs::

    async with Client("unix:///run/execgate.sock") as client:
        result = await client.run("web", ["ls", "/"], timeout=10)
        session_id = await client.create("web", ["sh"], tty=True, attach_stdin=True)
        async with await client.start(session_id) as stream:
            await stream.write(b"exit 3\n")
            async for number, data in stream:
                ...
        end = await client.wait(session_id)

A service on another host is asked over TLS: `Client("tls://host:2376", tls=TlsFiles(ca=…, certificate=…, key=…))`.

It speaks the libpod tree of the API, in which the session alone decides how its output is framed and a second start
is refused with a status; in Docker's the client decides, and is told of a second start in the stream.

Everything raises the categories of `execgate.model.errors` with the service's own words, and Unavailable when the
service cannot be reached. No call has a time limit of its own but for the connection; `asyncio.timeout` gives it one.

What can be asked twice without harm (to look, `wait`, `result`, `logs`) comes back by itself when its connection breaks
because the service crashed or was restarted: after 0.05 s, then ever more slowly, for `PATIENCE` seconds, and `logs`
goes on at the byte where it was. What cannot (create, start, run, kill, stop, write, remove) is never sent again. A
service that cannot be reached in the first place is Unavailable at once.
"""

import asyncio
import base64
import contextlib
import json
import re
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack
from urllib.parse import quote, urlsplit

import aiohttp
from yarl import URL

from execgate.http.certificates import TlsFiles, client_context, reason
from execgate.http.dial import Secured, dial
from execgate.http.listeners import LOOPBACK
from execgate.model.config import ConsoleSize, ExecConfig, OnDisconnect
from execgate.model.errors import (
    Conflict,
    ExecgateError,
    Exhausted,
    Forbidden,
    Internal,
    InvalidArgument,
    NotFound,
    StartFailed,
    TooLarge,
    Unauthenticated,
    Unavailable,
)
from execgate.model.ids import ContainerId, SessionId
from execgate.model.options import ExecOptions, exec_config
from execgate.model.session import ByteCounts, ExitSource, ExitStatus, SessionState
from execgate.wire.detach_keys import format_detach_keys
from execgate.wire.stdcopy import STDOUT, SYSTEMERR, Demultiplexer

DEFAULT_HOST = "unix:///run/execgate.sock"

PATIENCE = 10.0
"""Seconds for which a request whose connection broke is sent again; a service that crashed answers within 2."""

_SERVED = 1.0
"""A request that was under way for so many seconds was served: the patience with what comes begins anew."""

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 1.0

_TREE = "/v5.0.0/libpod"
_OFFSET_HEADER = "Execgate-Offset"
_MULTIPLEXED = "multiplexed"
_CONNECT_TIMEOUT = 10.0
_READ_SIZE = 256 * 1024
_MAX_ERROR = 1024 * 1024
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750
_CATEGORIES: Mapping[int, type[ExecgateError]] = {
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    500: Internal,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}

_DROPPED = re.compile(rb"execgate: output from [0-9]+ to ([0-9]+) was dropped\n")

_T = TypeVar("_T")


class _Unreachable(Unavailable):
    """There is no connection to the service."""


class _Lost(_Unreachable):
    """There was one: whether the service has done what it was asked is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerInfo:
    """A container that can be reached. `pid` is its init's, 0 once that is gone; `labels` are its annotations."""

    id: ContainerId
    name: str
    state: str
    pid: int
    args: tuple[str, ...]
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionInfo:
    """A session as the service sees it now.

    `pid` is the process's on the host and `container_pid` in its container, 0 when it does not run; `timeout` and
    `idle_timeout` are seconds, 0 for none; `error` is why a start failed, or why the service ended it.
    """

    id: SessionId
    container_id: ContainerId
    state: SessionState
    exit: ExitStatus | None
    error: str
    timed_out: bool
    args: tuple[str, ...]
    tty: bool
    user: str
    privileged: bool
    attach_stdin: bool
    attach_stdout: bool
    attach_stderr: bool
    capture_stdout: bool
    capture_stderr: bool
    on_disconnect: OnDisconnect
    timeout: float
    idle_timeout: float
    labels: Mapping[str, str]
    pid: int
    container_pid: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    transferred: ByteCounts

    @property
    def running(self) -> bool:
        """Whether it runs; a start that is under way counts."""
        return self.state is SessionState.RUNNING


@dataclass(frozen=True, slots=True)
class SessionEnd:
    """How a session ended: 0…255, whether its time was over before it was, and why its start failed if it did."""

    exit_code: int
    timed_out: bool
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunAnswer:
    """How a one-shot exec went. `truncated`: there was more output than was asked for; `error`: it did not start."""

    id: SessionId
    exit_code: int
    stdout: bytes
    stderr: bytes
    timed_out: bool
    truncated: bool
    error: str
    started_at: datetime
    finished_at: datetime


class Output:
    """What a session writes, piece by piece: 1 is stdout (and all output of a terminal), 2 is stderr.

    A piece of stream 3 is a word of the service itself: what was dropped before a slow reader came to it. `offset` is
    where in the whole output this one begins, and `position` where what has come of it ends. What is not read yet waits
    in the service, and the process with it.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[bytes]],
        close: Callable[[], Awaitable[None]],
        *,
        multiplexed: bool,
        offset: int,
    ) -> None:
        self.offset = self.position = offset
        self._receive = read
        self._release = close
        self._frames = Demultiplexer() if multiplexed else None
        self._pieces: deque[tuple[int, bytes]] = deque()
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, bytes]:
        while not self._pieces:
            data = b"" if self._closed else await self._receive()
            if not data:
                await self.close()
                if self._frames is not None and not self._frames.at_boundary:
                    raise Unavailable("the connection to the service broke within the output")
                raise StopAsyncIteration
            self._pieces.extend(self._split(data))
        return self._pieces.popleft()

    def _split(self, data: bytes) -> list[tuple[int, bytes]]:
        pieces = [(STDOUT, data)] if self._frames is None else self._frames.feed(data)
        self.position += sum(len(piece) for stream, piece in pieces if stream != SYSTEMERR)
        return pieces

    async def close(self) -> None:
        """Leave. May be called again."""
        if not self._closed:
            self._closed = True
            await self._release()


class _Captured(Output):
    """Captured output, which is asked for once more, from where it stands, when its connection breaks."""

    def __init__(
        self, ask: Callable[[int], Awaitable[aiohttp.ClientResponse]], answer: aiohttp.ClientResponse, host: str
    ) -> None:
        super().__init__(
            self._read, self._leave, multiplexed=_MULTIPLEXED in answer.content_type, offset=_offset_of(answer)
        )
        self._ask = ask
        self._answer = answer
        self._host = host
        self._patience = _Patience()
        self._word = b""  # of the service itself, as far as it is here

    def _split(self, data: bytes) -> list[tuple[int, bytes]]:
        pieces = super()._split(data)
        behind = sum(len(piece) for stream, piece in pieces if stream != SYSTEMERR)  # the piece that is looked at
        for stream, piece in pieces:
            if stream != SYSTEMERR:
                behind -= len(piece)
                continue
            self._word += piece
            if dropped := _DROPPED.fullmatch(self._word):
                self.position = int(dropped[1]) + behind
            if self._word.endswith(b"\n"):
                self._word = b""
        return pieces

    async def _read(self) -> bytes:
        while True:
            try:
                with _translated(self._host):
                    return await self._answer.content.readany()
            except _Unreachable as error:
                await self._come_back(error)

    async def _come_back(self, error: _Unreachable) -> None:
        """Ask for the rest, until it is answered or the patience is over."""
        self._answer.close()
        while True:
            await self._patience.wait(error)
            try:
                self._answer = await self._ask(self.position)
            except _Unreachable as again:
                error = again
            else:
                break
        self._word = b""
        if self._frames is not None:
            self._frames = Demultiplexer()
        if (offset := _offset_of(self._answer)) > self.position:
            text = f"execgate: output from {self.position} to {offset} was dropped\n"
            self._pieces.append((SYSTEMERR, text.encode()))
            self.position = offset

    async def _leave(self) -> None:
        self._answer.close()


class _Patience:
    """How long to send a request again: PATIENCE seconds from a loss on, anew once it was served in between."""

    def __init__(self) -> None:
        self._until: float | None = None
        self._pause = _FIRST_PAUSE
        self._asked = asyncio.get_running_loop().time()

    async def wait(self, error: Unavailable) -> None:
        """Wait until it is time to ask again; raise `error` if that would be of no use."""
        now = asyncio.get_running_loop().time()
        if isinstance(error, _Lost) and (self._until is None or now - self._asked > _SERVED):
            self._until, self._pause = now + PATIENCE, _FIRST_PAUSE
        if self._until is None or now >= self._until or not isinstance(error, _Unreachable):
            raise error
        await asyncio.sleep(self._pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._asked = asyncio.get_running_loop().time()


class Stream(Output):
    """A session's output and its input. Closing it before the end is what `OnDisconnect` speaks of."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        resize: Callable[[ConsoleSize], Awaitable[None]],
        *,
        multiplexed: bool,
        offset: int,
        secured: Secured | None = None,
    ) -> None:
        """`secured` is what carries reader and writer over TLS."""
        super().__init__(self._read, self._shut, multiplexed=multiplexed, offset=offset)
        self._reader = reader
        self._writer = writer
        self._resize = resize
        self._secured = secured
        self._ended = False  # one of the two sides has said so

    async def write(self, data: bytes) -> None:
        """Send input, waiting for room. What the process will not read any more is dropped."""
        if self._closed:
            return
        with contextlib.suppress(OSError):  # reading tells how the session or the connection ended
            self._writer.write(data)
            await self._writer.drain()

    async def write_eof(self) -> None:
        """End the input. A terminal has no such end: there it is a key, Ctrl-D."""
        if not self._closed:
            self._ended = True
            with contextlib.suppress(OSError, RuntimeError):
                self._writer.write_eof()

    async def resize(self, height: int, width: int) -> None:
        """Set the terminal's size. Conflict once the session is over."""
        await self._resize(ConsoleSize(height, width))

    async def _read(self) -> bytes:
        try:
            data = await self._reader.read(_READ_SIZE)
            if not data and self._secured is not None and self._secured.failure is not None:
                raise self._secured.failure
        except OSError as error:
            await self.close()
            raise Unavailable(f"the connection to the service broke: {_reason(error)}") from error
        self._ended = self._ended or not data
        return data

    async def _shut(self) -> None:
        await _close(self._writer, self._secured, hang_up=not self._ended)


class Client:
    """The exec API of one service. Use it as `async with Client(host) as client`.

    `host` is `unix:///PATH`, `tls://HOST:PORT` or `tcp://HOST:PORT`. `tls` is for the second: without it, the service
    has to be known to this host's authorities, and the client is nobody by certificate. `token` is a bearer token.
    """

    def __init__(self, host: str = DEFAULT_HOST, *, tls: TlsFiles | None = None, token: str = "") -> None:
        """InvalidArgument for a host that is no address, files that cannot be used, a token that is none."""
        self.host = host
        parts = urlsplit(host)
        self._path = parts.path if parts.scheme == "unix" and not parts.netloc else ""
        try:
            network = parts.scheme in ("tcp", "tls")
            self._address = (parts.hostname or "", parts.port or 0) if network else ("", 0)
        except ValueError as error:
            raise InvalidArgument(f"{host}: {error}") from error
        if not self._path and not all(self._address):
            raise InvalidArgument(f"{host!r}: expected unix:///PATH, tls://HOST:PORT or tcp://HOST:PORT")
        if token and not _TOKEN.fullmatch(token):
            raise InvalidArgument("the token is none: it has letters, digits and -._~+/, and = at its end")
        if token and parts.scheme == "tcp" and parts.hostname not in LOOPBACK:
            raise InvalidArgument("a token is not sent over a network without TLS", hint="tls://HOST:PORT")
        self._context: ssl.SSLContext | None = client_context(tls or TlsFiles()) if parts.scheme == "tls" else None
        self._token = token
        self._authority = parts.netloc or "execgate"
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"<Client {self.host}>"

    async def __aenter__(self) -> Self:
        # One connection a request: what was idle while the service restarted would fail the next call.
        connector: aiohttp.BaseConnector
        if self._path:
            connector = aiohttp.UnixConnector(self._path, force_close=True, limit=0)
        else:
            # But for TLS, whose handshakes cost something, and whose connections a service ends before it restarts.
            connector = aiohttp.TCPConnector(force_close=self._context is None, limit=0, ssl=self._context or True)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._credentials)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    # -- look --------------------------------------------------------------------------------------------------------

    async def containers(self, *, stopped: bool = False) -> list[ContainerInfo]:
        """Return the containers that run, and with `stopped` the others too."""
        found = await self._json("GET", "/containers/json", query={"all": "true"} if stopped else {}, again=True)
        return _understood(lambda: [_container(one) for one in found])

    async def sessions(
        self,
        *,
        containers: Sequence[str] = (),
        states: Sequence[SessionState] = (),
        labels: Mapping[str, str | None] | None = None,
    ) -> list[SessionInfo]:
        """Return the sessions, oldest first: of these containers, in these states, with all labels (None: any)."""
        filters = {
            "container": list(containers),
            "state": [str(state) for state in states],
            "label": [name if value is None else f"{name}={value}" for name, value in (labels or {}).items()],
        }
        chosen = {name: values for name, values in filters.items() if values}
        query = {"filters": json.dumps(chosen)} if chosen else {}
        found = await self._json("GET", "/exec/json", query=query, again=True)
        return _understood(lambda: [_session(one) for one in found])

    async def inspect(self, session_id: str) -> SessionInfo:
        """Return a session by its full id. NotFound."""
        found = await self._json("GET", _exec(session_id, "json"), again=True)
        return _understood(lambda: _session(found))

    # -- create and start --------------------------------------------------------------------------------------------

    async def create(self, container: str, args: Sequence[str], **options: Unpack[ExecOptions]) -> SessionId:
        """Register an exec in a running container and return its id. `options` are the fields of `ExecConfig`.

        NotFound, Conflict, InvalidArgument, Exhausted.
        """
        body = _create_body(exec_config(args, options))
        found = await self._json("POST", f"/containers/{_quoted(container)}/exec", body=body)
        return _understood(lambda: SessionId(found["Id"]))

    async def start_detached(self, session_id: str) -> None:
        """Start with nothing attached; return once the process runs. StartFailed, Conflict, NotFound, Exhausted."""
        try:
            await self._json("POST", _exec(session_id, "start"), body={"Detach": True})
        except (InvalidArgument, Internal) as error:
            raise await self._start_failure(session_id) or error from error

    async def start(self, session_id: str, *, size: ConsoleSize | None = None) -> Stream:
        """Start, attached to what the session was created to attach. Conflict when it was started before.

        A start that fails is told in the output, and by `wait`: 126, 127 or 128 and the reason.
        """
        body: dict[str, Any] = {"Tty": True, "h": size.height, "w": size.width} if size else {}
        return await self._hijack(session_id, "start", body, {})

    async def attach(
        self, session_id: str, *, after: int | None = None, stdin: bool = True, stdout: bool = True, stderr: bool = True
    ) -> Stream:
        """Attach to a running session, or to what is captured of one that is over.

        The output begins after `after` bytes, as far as it is captured (the stream's `offset` tells); None is "from
        now on". Conflict when there is nothing to attach to.
        """
        query = {"stdin": _flag(stdin), "stdout": _flag(stdout), "stderr": _flag(stderr)}
        if after is not None:
            query["after"] = str(after)
        return await self._hijack(session_id, "attach", {}, query)

    async def run(
        self,
        container: str,
        args: Sequence[str],
        *,
        stdin: bytes = b"",
        limit: int = 1024 * 1024,
        **options: Unpack[ExecOptions],
    ) -> RunAnswer:
        """Run a command to its end and return what it wrote, `limit` bytes of stdout and stderr together.

        A command that cannot be started is an answer too: 126, 127 or 128, and `error`. Over a unix socket, whoever
        cancels this kills the process.
        """
        body = _create_body(exec_config(args, options)) | {
            "Stdin": base64.b64encode(stdin).decode("ascii"),
            "Encoding": "base64",
            "OutputLimit": limit,
        }
        found = await self._json("POST", f"/containers/{_quoted(container)}/exec/run", body=body)
        return _understood(lambda: _run_answer(found))

    async def result(self, session_id: str, *, limit: int = 1024 * 1024) -> RunAnswer:
        """Return what `run` would have, of a session whose output is captured, once it is over. Conflict, NotFound.

        It is for whoever has lost the answer to a run, or has started the session in another way.
        """
        query = {"limit": str(limit), "encoding": "base64"}
        found = await self._json("GET", _exec(session_id, "result"), query=query, again=True)
        return _understood(lambda: _run_answer(found))

    # -- while it runs -----------------------------------------------------------------------------------------------

    async def resize(self, session_id: str, height: int, width: int) -> None:
        """Set the size of a session's terminal; before the start it is kept for the start. Conflict when it is over."""
        await self._json("POST", _exec(session_id, "resize"), query={"h": str(height), "w": str(width)})

    async def write_stdin(self, session_id: str, data: bytes, *, eof: bool = False) -> None:
        """Write to the process's stdin, and with `eof` end it. Conflict when it has none that is open."""
        await self._json("POST", _exec(session_id, "stdin"), query={"eof": _flag(eof)}, data=data)

    async def logs(self, session_id: str, *, after: int = 0, follow: bool = False) -> Output:
        """Return the captured output after `after` bytes: what is there, and with `follow` what comes. Conflict."""

        async def ask(position: int) -> aiohttp.ClientResponse:
            query = {"after": str(position), "follow": _flag(follow)}
            return await self._request("GET", _exec(session_id, "logs"), query=query)

        return _Captured(ask, await self._again(lambda: ask(after)), self.host)

    async def kill(self, session_id: str, signal: str | int = "KILL") -> None:
        """Send a signal to the process, KILL to its whole tree, which is then over. Conflict when it does not run."""
        name = signal if isinstance(signal, str) else str(int(signal))  # a member of an IntEnum prints as its name
        await self._json("POST", _exec(session_id, "kill"), query={"signal": name})

    async def stop(self, session_id: str, grace: float | None = None) -> None:
        """Send TERM, after `grace` seconds KILL to what is left, and return when it is over. Conflict."""
        await self._json("POST", _exec(session_id, "stop"), query={} if grace is None else {"t": f"{grace:.3f}"})

    async def wait(self, session_id: str) -> SessionEnd:
        """Return how the session ended, once it has. NotFound when it is forgotten before it was ever started."""
        found = await self._json("POST", _exec(session_id, "wait"), again=True)
        return _understood(lambda: SessionEnd(int(found["StatusCode"]), bool(found["TimedOut"]), str(found["Error"])))

    async def remove(self, session_id: str, *, force: bool = False) -> None:
        """Forget a session that does not run; with `force` kill it first. Conflict."""
        await self._json("DELETE", f"/exec/{_quoted(session_id)}", query={"force": _flag(force)})

    # -- inside ------------------------------------------------------------------------------------------------------

    async def _json(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        data: bytes | None = None,
        again: bool = False,
    ) -> Any:
        """Return the answer's JSON, or None when it has none. `again`: it can be asked twice."""
        sent = data if body is None else json.dumps(body).encode()

        async def ask() -> bytes:
            async with await self._request(method, path, query=query, data=sent) as response:
                with _translated(self.host):
                    return await response.read()

        text = await (self._again(ask) if again else ask())
        return _understood(lambda: json.loads(text) if text.strip() else None)

    async def _again(self, ask: Callable[[], Awaitable[_T]]) -> _T:
        """Return what `ask` does, which is called again when the connection breaks."""
        patience = _Patience()
        while True:
            try:
                return await ask()
            except _Unreachable as error:
                await patience.wait(error)

    async def _request(
        self, method: str, path: str, *, query: Mapping[str, str] | None = None, data: bytes | None = None
    ) -> aiohttp.ClientResponse:
        """Return a successful answer, its body unread; else raise its category."""
        if self._session is None:
            raise RuntimeError("a Client is used within its `async with`")
        scheme = "http" if self._context is None else "https"
        url = URL(f"{scheme}://{self._authority}{_TREE}{path}", encoded=True).with_query(query)
        with _translated(self.host):
            response = await self._session.request(method, url, data=data)
            if response.status < 400:
                return response
            async with response:
                text = await response.content.read(_MAX_ERROR)
        raise _category(response.status, text, response.headers)

    async def _hijack(self, session_id: str, verb: str, body: Mapping[str, Any], query: Mapping[str, str]) -> Stream:
        """Send a request whose connection becomes a stream, and return that."""
        url = URL(_TREE + _exec(session_id, verb), encoded=True).with_query(query)
        content = json.dumps(body).encode()
        fields = {
            "Host": self._authority,
            "Connection": "Upgrade",
            "Upgrade": "tcp",
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
        } | self._credentials
        lines = [f"POST {url} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
        head = "\r\n".join(lines)
        reader, writer, secured = await self._connect()
        try:
            with _translated(self.host, secured):
                writer.write(head.encode("ascii") + content)
                status, headers = _parse_head(await reader.readuntil(b"\r\n\r\n"))
                if status >= 300:
                    text = await reader.readexactly(min(int(headers.get("content-length", "0")), _MAX_ERROR))
                    raise _category(status, text, headers)
            return Stream(
                reader,
                writer,
                lambda size: self.resize(session_id, size.height, size.width),
                multiplexed=_MULTIPLEXED in headers.get("content-type", ""),
                offset=int(headers.get(_OFFSET_HEADER.lower(), "0")),
                secured=secured,
            )
        except BaseException:
            await _close(writer, secured, hang_up=True)
            raise

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Secured | None]:
        with _translated(self.host):
            async with asyncio.timeout(_CONNECT_TIMEOUT):
                if self._context is not None:
                    secured = await dial(*self._address, self._context)
                    return secured.reader, secured.writer, secured
                if self._path:
                    return *await asyncio.open_unix_connection(self._path, limit=_READ_SIZE), None
                return *await asyncio.open_connection(*self._address, limit=_READ_SIZE), None

    @property
    def _credentials(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    async def _start_failure(self, session_id: str) -> StartFailed | None:
        """Return why a start failed, if it was a start that failed and not the request."""
        with contextlib.suppress(ExecgateError):
            session = await self.inspect(session_id)
            if session.exit is not None and session.exit.source is ExitSource.START_FAILURE:
                return StartFailed(session.error, session.exit.code)
        return None


def _create_body(config: ExecConfig) -> dict[str, Any]:
    size = config.console_size
    return {
        "Cmd": list(config.args),
        "Tty": config.tty,
        "ConsoleSize": [size.height, size.width] if size else None,
        "AttachStdin": config.attach_stdin,
        "AttachStdout": config.attach_stdout,
        "AttachStderr": config.attach_stderr,
        "DetachKeys": format_detach_keys(config.detach_keys),
        "Env": list(config.env),
        "Privileged": config.privileged,
        "User": config.user,
        "WorkingDir": config.working_dir,
        "Timeout": config.timeout or 0,
        "IdleTimeout": config.idle_timeout or 0,
        "Labels": dict(config.labels),
        "CaptureStdout": config.capture_stdout,
        "CaptureStderr": config.capture_stderr,
        "OnDisconnect": config.on_disconnect,
    }


def _container(found: Mapping[str, Any]) -> ContainerInfo:
    return ContainerInfo(
        id=ContainerId(found["Id"]),
        name=found["Names"][0],
        state=found["State"],
        pid=found["Pid"],
        args=tuple(found["Command"]),
        labels=found["Labels"],
    )


def _session(found: Mapping[str, Any]) -> SessionInfo:
    process = found["ProcessConfig"]
    code, source = found["ExitCode"], found["ExitCodeSource"]
    ended = None if source is None else ExitStatus(code, ExitSource(source))
    state = SessionState.CREATED if ended is None else SessionState.STOPPED
    return SessionInfo(
        id=SessionId(found["ID"]),
        container_id=ContainerId(found["ContainerID"]),
        state=SessionState.RUNNING if found["Running"] else state,
        exit=ended,
        error=found["Error"],
        timed_out=found["TimedOut"],
        args=(process["entrypoint"], *process["arguments"]),
        tty=process["tty"],
        user=process.get("user", ""),
        privileged=process["privileged"],
        attach_stdin=found["OpenStdin"],
        attach_stdout=found["OpenStdout"],
        attach_stderr=found["OpenStderr"],
        capture_stdout=found["CaptureStdout"],
        capture_stderr=found["CaptureStderr"],
        on_disconnect=OnDisconnect(found["OnDisconnect"]),
        timeout=found["Timeout"],
        idle_timeout=found.get("IdleTimeout", 0),
        labels=found["Labels"],
        pid=found["Pid"],
        container_pid=found["ContainerPid"],
        created_at=datetime.fromisoformat(found["CreatedAt"]),
        started_at=_time(found["StartedAt"]),
        finished_at=_time(found["FinishedAt"]),
        transferred=ByteCounts(found["StdinBytes"], found["StdoutBytes"], found["StderrBytes"]),
    )


def _run_answer(found: Mapping[str, Any]) -> RunAnswer:
    return RunAnswer(
        id=SessionId(found["Id"]),
        exit_code=int(found["ExitCode"]),
        stdout=base64.b64decode(found["Stdout"]),
        stderr=base64.b64decode(found["Stderr"]),
        timed_out=found["TimedOut"],
        truncated=found["Truncated"],
        error=found["Error"],
        started_at=datetime.fromisoformat(found["StartedAt"]),
        finished_at=datetime.fromisoformat(found["FinishedAt"]),
    )


def _time(text: str) -> datetime | None:
    """Return a time, or None for Go's way to say that there was none: the year 1."""
    time = datetime.fromisoformat(text).astimezone(UTC)
    return None if time.year == 1 else time


def _understood(read: Callable[[], _T]) -> _T:
    """Return what `read` makes of an answer. Internal when that is not what this client expects."""
    try:
        return read()
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise Internal(f"the service's answer is not understood: {error!r}") from error


def _category(status: int, text: bytes, headers: Mapping[str, str]) -> ExecgateError:
    """Return a failure as its category, in the service's words."""
    try:
        message = str(json.loads(text)["message"])
    except (KeyError, TypeError, ValueError):
        message = text.decode(errors="replace").strip() or f"the service answered with status {status}"
    if status == 429:
        retry_after = headers.get("Retry-After", headers.get("retry-after", ""))
        return Exhausted(message, retry_after=int(retry_after) if retry_after.isdecimal() else 1)
    return _CATEGORIES.get(status, InvalidArgument)(message)


def _parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    """Return the status and the header fields, their names in lower case."""
    status_line, *lines = head.decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in lines if line)
    return int(status_line.split()[1]), {name.lower(): value.strip() for name, _, value in fields}


@contextlib.contextmanager
def _translated(host: str, secured: Secured | None = None) -> Iterator[None]:
    """Turn what the network raises into Unavailable, and what is no HTTP into Internal.

    Of a stream over TLS, `secured` knows why it has ended.
    """
    try:
        yield
    except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError) as error:
        raise _Unreachable(_unreached(host, getattr(error, "os_error", None) or error)) from error
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, asyncio.IncompleteReadError) as error:
        if secured is not None and secured.failure is not None:
            raise _Unreachable(_unreached(host, secured.failure)) from error
        raise _Lost(_unreached(host, getattr(error, "os_error", None) or error)) from error
    except OSError as error:  # TimeoutError is one
        raise _Unreachable(_unreached(host, error)) from error
    except (aiohttp.ClientError, asyncio.LimitOverrunError, IndexError, ValueError) as error:
        raise Internal(f"what answers at {host} does not speak HTTP: {error}") from error


def _unreached(host: str, error: BaseException) -> str:
    return f"cannot reach the service at {host}: {_reason(error)}"


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, ssl.SSLError):
        text = reason(error)
    return "no answer in time" if isinstance(error, TimeoutError) else text


def _offset_of(answer: aiohttp.ClientResponse) -> int:
    return int(answer.headers.get(_OFFSET_HEADER, "0"))


def _exec(session_id: str, verb: str) -> str:
    return f"/exec/{_quoted(session_id)}/{verb}"


def _quoted(text: str) -> str:
    return quote(text, safe="", errors="replace")


def _flag(value: bool) -> str:
    return "1" if value else "0"


async def _close(writer: asyncio.StreamWriter, secured: Secured | None = None, *, hang_up: bool = False) -> None:
    """Close a connection; `hang_up` is said where it can be told from an end."""
    if secured is not None:
        await secured.close(hang_up=hang_up)
        return
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
