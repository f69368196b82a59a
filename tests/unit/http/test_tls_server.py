"""The HTTP server behind TLS: streams, ends and cuts, and what is still answered when the service is replaced."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from execgate.http.certificates import TlsFiles, TlsSettings, client_context, server_context
from execgate.http.dial import Secured, dial
from execgate.http.dialects import DOCKER
from execgate.http.front import front_of
from execgate.http.hijack import HijackedStream, OpenStreams
from execgate.http.listeners import Listener
from execgate.http.server import HttpServer, build_application
from execgate.http.takeover import AlreadyAnswered, hijack
from execgate.http.tree import Route, Tree
from execgate.wire import stdcopy
from support.async_tls import soon
from support.tls import Authority, Identity

START = (
    b"POST /exec/abc/start HTTP/1.1\r\nHost: x\r\nUpgrade: tcp\r\nConnection: Upgrade\r\nContent-Length: 2\r\n\r\n{}"
)
WAIT = b"POST /exec/abc/wait HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
PING = b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n"
EVENTS = b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n"


class Routes:
    """What is asked of the server."""

    def __init__(self) -> None:
        self.streams: asyncio.Queue[HijackedStream] = asyncio.Queue()
        self.waiting, self.over = asyncio.Event(), asyncio.Event()
        self.patient = True

    def routes(self) -> Sequence[Route]:
        return [
            ("POST", "/exec/{id}/start", self.start),
            ("POST", "/exec/{id}/wait", self.wait),
            ("GET", "/_ping", self.ping),
            ("GET", "/events", self.events),
        ]

    async def start(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        stream = hijack(request, DOCKER, multiplexed=True)
        self.streams.put_nowait(stream)
        await stream.wait_closed()
        return AlreadyAnswered()

    async def wait(self, request: web.Request) -> web.Response:
        front_of(request).patient = self.patient
        self.waiting.set()
        await self.over.wait()
        return web.Response(text="over")

    async def ping(self, request: web.Request) -> web.Response:
        peer = front_of(request).peer
        return web.Response(text="nobody" if peer is None else peer.id)

    async def events(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(b"event")
        self.waiting.set()
        await self.over.wait()
        front_of(request).cut()
        return answer


class Site:
    """A server, and its clients."""

    def __init__(self, server: HttpServer, routes: Routes, port: int, identity: Identity) -> None:
        self.server, self.routes, self._port = server, routes, port
        self.trusted = TlsFiles(ca=identity.ca)
        self.alice = TlsFiles(ca=identity.ca, certificate=identity.certificate, key=identity.key)
        self.clients: list[Secured] = []

    async def connect(self, sent: bytes, files: TlsFiles | None = None) -> Secured:
        client = await soon(dial("localhost", self._port, client_context(files or self.alice)))
        self.clients.append(client)
        client.writer.write(sent)
        return client

    async def stream(self) -> HijackedStream:
        return await soon(self.routes.streams.get())


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("tls") / "pki")


@asynccontextmanager
async def serving(authority: Authority, directory: Path) -> AsyncIterator[Site]:
    files = authority.server(directory.name, "localhost")
    alice = authority.client(f"{directory.name}-alice", "alice@example.org")
    settings = TlsSettings(
        certificate=files.certificate,
        key=files.key,
        client_ca=authority.ca,
        client_required=False,
        minimum=ssl.TLSVersion.TLSv1_3,
    )
    routes = Routes()
    server = HttpServer(build_application([Tree(DOCKER, [routes])], OpenStreams()))
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    site = Site(server, routes, listener.getsockname()[1], alice)
    await server.start([Listener(listener, tls=True)], server_context(settings))
    yield site
    routes.over.set()
    for client in site.clients:
        await soon(client.close(hang_up=True))
    for stream in server.streams:  # as the sessions do; aiohttp waits for its handlers
        stream.abandon()
    await soon(server.close())
    assert len(server.streams) == 0


@pytest.fixture
async def site(authority: Authority, tmp_path: Path) -> AsyncIterator[Site]:
    async with serving(authority, tmp_path) as site:
        yield site


async def head_of(client: Secured) -> bytes:
    return await soon(client.reader.readuntil(b"\r\n\r\n"))


def frame(stream: int, data: bytes) -> bytes:
    return stdcopy.frame_header(stream, len(data)) + data


async def test_a_request_becomes_a_stream(site: Site) -> None:
    """And ends in order on both sides."""
    client = await site.connect(START + b"behind")
    stream = await site.stream()
    assert (await head_of(client)).startswith(b"HTTP/1.1 101 UPGRADED\r\n")
    assert await soon(stream.receive()) == b"behind"
    client.writer.write_eof()
    assert await soon(stream.receive()) == b""
    await soon(stream.send(1, b"out"))
    await stream.finish("the end")
    assert await soon(client.reader.read()) == frame(1, b"out") + frame(1, b"the end\r\n")
    assert client.failure is None
    await soon(stream.wait_closed())


async def test_the_head_comes_alone(site: Site) -> None:
    """As one record that the client has before there is another: some throw away what they read with a head."""
    client = await site.connect(START)
    stream = await site.stream()
    sending = asyncio.ensure_future(stream.send(1, b"out"))
    assert (await soon(client.reader.read(1 << 16))).endswith(b"\r\n\r\n")
    await soon(sending)
    assert await soon(client.reader.readexactly(11)) == frame(1, b"out")


async def test_a_client_that_hangs_up(site: Site) -> None:
    """It is noticed at once: no byte need be sent; and what it sent before is still input."""
    client = await site.connect(START)
    stream = await site.stream()
    await head_of(client)
    client.writer.write(b"last words")
    await soon(client.close(hang_up=True))
    assert await soon(stream.receive()) == b"last words"
    await soon(stream.wait_closed())


async def test_a_client_that_closes_has_ended_its_input(site: Site) -> None:
    client = await site.connect(START)
    stream = await site.stream()
    await head_of(client)
    closing = asyncio.ensure_future(client.close(hang_up=False))
    assert await soon(stream.receive()) == b""
    await stream.finish()
    await soon(closing)
    assert client.failure is None


async def test_a_stream_that_is_abandoned_is_cut(site: Site) -> None:
    client = await site.connect(START)
    stream = await site.stream()
    await head_of(client)
    stream.abandon()
    assert await soon(client.reader.read()) == b""
    assert isinstance(client.failure, ConnectionResetError)


async def test_so_is_one_when_the_server_ends(site: Site) -> None:
    client = await site.connect(START)
    await site.stream()
    await head_of(client)
    await soon(site.server.close())
    assert await soon(client.reader.read()) == b""
    assert isinstance(client.failure, ConnectionResetError)


async def test_an_answer_that_breaks_is_cut(site: Site) -> None:
    client = await site.connect(EVENTS)
    await head_of(client)
    site.routes.over.set()
    await soon(client.reader.read())
    assert isinstance(client.failure, ConnectionResetError)


async def test_nothing_of_it_can_be_handed_over(site: Site) -> None:
    await site.connect(START)
    stream = await site.stream()
    assert stream.hand_over() is None
    await site.connect(WAIT)
    await soon(site.routes.waiting.wait())
    await site.server.quiesce()
    assert site.server.hand_over() == []


@pytest.mark.parametrize("patient", [True, False])
async def test_who_waits_for_an_answer_gets_it(site: Site, patient: bool) -> None:
    """If it comes soon, and with it the word that it is the last one of this connection."""
    site.routes.patient = patient
    client = await site.connect(WAIT)
    await soon(site.routes.waiting.wait())
    quiescing = asyncio.ensure_future(site.server.quiesce())
    await asyncio.sleep(0.01)
    site.routes.over.set()
    head = await head_of(client)
    assert b"Connection: close\r\n" in head
    assert await soon(client.reader.read()) == b"over"
    assert client.failure is None
    await soon(quiescing)


async def test_who_has_just_connected_is_answered(site: Site) -> None:
    client = await site.connect(b"")
    quiescing = asyncio.ensure_future(site.server.quiesce())
    await asyncio.sleep(0.01)
    client.writer.write(PING)
    assert b"Connection: close\r\n" in await head_of(client)
    assert await soon(client.reader.read()) == b"cert:email:alice@example.org"
    assert client.failure is None
    await soon(quiescing)


async def test_who_asks_nothing_is_told(site: Site) -> None:
    silent, idle = await site.connect(b""), await site.connect(PING)
    assert b"Connection: close\r\n" not in await head_of(idle)
    await soon(site.server.quiesce())
    for client in (silent, idle):
        await soon(client.reader.read())
        assert client.failure is None


async def test_who_it_is(site: Site) -> None:
    """And who is nobody by certificate is not the service's own user by its socket."""
    for files, who in ((site.alice, b"cert:email:alice@example.org"), (site.trusted, b"nobody")):
        client = await site.connect(PING, files)
        await head_of(client)
        assert await soon(client.reader.readexactly(len(who))) == who


async def test_a_service_that_is_somebody_else(site: Site, authority: Authority, tmp_path: Path) -> None:
    """Its certificate is of the right authority, and for another name."""
    with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
        await dial("127.0.0.1", site._port, client_context(site.alice))
