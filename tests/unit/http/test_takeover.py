"""From a request to a stream, on a real server: what stands before it, what stands behind it, and what aiohttp sees."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import cast

import pytest
from aiohttp import web

from execgate.http.dialects import DOCKER
from execgate.http.front import front_of
from execgate.http.hijack import HijackedStream, OpenStreams
from execgate.http.listeners import Listener
from execgate.http.server import HttpServer, build_application
from execgate.http.takeover import AlreadyAnswered, hijack, restore
from execgate.http.tree import Route, Tree
from execgate.wire import stdcopy

SOON = 5.0
A_WHILE = 0.03
START = (
    b"POST /exec/abc/start HTTP/1.1\r\nHost: x\r\nUpgrade: tcp\r\nConnection: Upgrade\r\nContent-Length: 2\r\n\r\n{}"
)
WAIT = b"POST /exec/abc/wait HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
PING = b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n"
BIG = b"GET /containers/%d/json HTTP/1.1\r\nHost: x\r\n\r\n"


class Starts:
    """Routes: one that is hijacked, and one whose answer is as long as its path says."""

    def __init__(self) -> None:
        self.streams: asyncio.Queue[HijackedStream] = asyncio.Queue()
        self.waiting, self.over = asyncio.Event(), asyncio.Event()

    def routes(self) -> Sequence[Route]:
        return [
            ("POST", "/exec/{id}/start", self.start),
            ("GET", "/containers/{name}/json", self.big),
            ("GET", "/_ping", self.ping),
            ("POST", "/exec/{id}/wait", self.wait),
        ]

    async def start(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        stream = hijack(request, DOCKER, multiplexed=True)
        self.streams.put_nowait(stream)
        await stream.wait_closed()
        return AlreadyAnswered()

    async def big(self, request: web.Request) -> web.Response:
        return web.Response(body=b"x" * int(request.match_info["name"]))

    async def wait(self, request: web.Request) -> web.Response:
        front_of(request).patient = True
        self.waiting.set()
        await self.over.wait()
        return web.Response(text="over")

    async def ping(self, request: web.Request) -> web.Response:
        return web.Response(text="OK")


class Site:
    """A server, and its clients."""

    def __init__(self, family: int, address: str | tuple[str, int], server: HttpServer, starts: Starts) -> None:
        self.family, self.address, self.server, self.starts = family, address, server, starts
        self.clients: list[asyncio.StreamWriter] = []

    async def connect(self, sent: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        connection = socket.socket(self.family)
        connection.connect(self.address)
        reader, writer = await asyncio.open_connection(sock=connection, limit=1 << 12)
        self.clients.append(writer)
        writer.write(sent)
        return reader, writer

    async def stream(self) -> HijackedStream:
        return await asyncio.wait_for(self.starts.streams.get(), SOON)


@contextlib.asynccontextmanager
async def serving(family: int, directory: Path) -> AsyncIterator[Site]:
    starts = Starts()
    server = HttpServer(build_application([Tree(DOCKER, [starts])], OpenStreams()))
    listener = socket.socket(family)
    listener.bind(str(directory / "socket") if family == socket.AF_UNIX else ("127.0.0.1", 0))
    listener.setblocking(False)
    site = Site(family, listener.getsockname(), server, starts)
    await server.start([Listener(listener)])
    yield site
    for stream in server.streams:  # as the sessions do; aiohttp waits for its handlers
        stream.abandon()
    await asyncio.sleep(A_WHILE)
    await server.close()
    for writer in site.clients:
        writer.close()
    await asyncio.sleep(A_WHILE)
    assert len(server.streams) == 0
    listener.close()


@pytest.fixture(params=[socket.AF_UNIX, socket.AF_INET], ids=["unix", "tcp"])
async def site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Site]:
    async with serving(request.param, tmp_path) as site:
        yield site


async def read_head(reader: asyncio.StreamReader) -> bytes:
    return await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SOON)


async def read(reader: asyncio.StreamReader, size: int) -> bytes:
    return await asyncio.wait_for(reader.readexactly(size), SOON)


def frame(stream: int, data: bytes) -> bytes:
    return stdcopy.frame_header(stream, len(data)) + data


async def test_a_request_becomes_a_stream(site: Site) -> None:
    reader, writer = await site.connect(START + b"behind")
    stream = await site.stream()
    assert list(site.server.streams) == [stream]
    assert (await read_head(reader)).startswith(b"HTTP/1.1 101 UPGRADED\r\n")
    assert await asyncio.wait_for(stream.receive(), SOON) == b"behind"
    await asyncio.wait_for(stream.send(1, b"out"), SOON)
    assert await read(reader, 11) == frame(1, b"out")
    writer.write_eof()
    assert await asyncio.wait_for(stream.receive(), SOON) == b""
    await stream.finish()
    assert await asyncio.wait_for(reader.read(), SOON) == b""
    await asyncio.wait_for(stream.wait_closed(), SOON)
    assert len(site.server.streams) == 0


async def test_an_early_end_of_input(site: Site) -> None:
    reader, writer = await site.connect(START + b"all")
    writer.write_eof()
    stream = await site.stream()
    await read_head(reader)
    assert await asyncio.wait_for(stream.receive(), SOON) == b"all"
    assert await asyncio.wait_for(stream.receive(), SOON) == b""
    await asyncio.wait_for(stream.send(1, b"out"), SOON)
    assert await read(reader, 11) == frame(1, b"out")


@pytest.mark.parametrize("size", [1, 200_000, 230_000, 250_000, 270_000])
async def test_an_answer_that_is_not_read_yet_comes_before_the_head(site: Site, size: int) -> None:
    """Whatever of it still waits in the transport."""
    reader, _ = await site.connect(BIG % size + START)
    await asyncio.sleep(3 * A_WHILE)
    assert (await read_head(reader)).startswith(b"HTTP/1.1 200 OK\r\n")
    assert await read(reader, size) == b"x" * size
    assert (await read_head(reader)).startswith(b"HTTP/1.1 101 UPGRADED\r\n")
    stream = await site.stream()
    await asyncio.wait_for(stream.send(1, b"out"), SOON)
    assert await read(reader, 11) == frame(1, b"out")


async def test_what_waits_in_the_transport_cannot_be_handed_over(tmp_path: Path) -> None:
    async with serving(socket.AF_UNIX, tmp_path) as site:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(site.address)
        connection.sendall(BIG % 250_000 + START)  # more than the kernel takes, less than what stops aiohttp
        stream = await site.stream()
        await asyncio.sleep(A_WHILE)
        assert stream.hand_over() is None
        reader, writer = await asyncio.open_connection(sock=connection)
        site.clients.append(writer)
        await read_head(reader)
        await read(reader, 250_000)
        await read_head(reader)
        handed = stream.hand_over()
        assert handed is not None
        os.close(handed[0])


async def test_a_host_without_descriptors_answers(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """In HTTP, and what stands behind is no request: the connection ends."""

    def refuse(_fd: int) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("execgate.http.parking.os.dup", refuse)
        reader, _ = await site.connect(START + PING)
        answer = await asyncio.wait_for(reader.read(), SOON)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert answer.count(b"HTTP/1.1") == 1
    assert len(site.server.streams) == 0


async def test_a_client_that_leaves(site: Site) -> None:
    reader, writer = await site.connect(START)
    stream = await site.stream()
    await read_head(reader)
    cast("asyncio.Transport", writer.transport).abort()
    with contextlib.suppress(Exception):
        while True:  # over TCP it shows when something is sent
            await stream.send(1, b"x")
            await asyncio.sleep(0.001)
    await asyncio.wait_for(stream.wait_closed(), SOON)


@pytest.mark.parametrize("finished", [False, True])
async def test_the_service_ends_and_the_connection_goes_on(site: Site, finished: bool) -> None:
    reader, writer = await site.connect(START)
    stream = await site.stream()
    await read_head(reader)
    if finished:
        await stream.finish("the end")
    handed = stream.hand_over()
    assert handed is not None
    began = asyncio.get_running_loop().time()
    if not finished:
        stream.abandon()
    await site.server.close()
    assert asyncio.get_running_loop().time() - began < 1, "aiohttp still waits for the handler"
    successor = restore(*handed, site.server.streams)
    if not finished:
        writer.write(b"in")
        assert await asyncio.wait_for(successor.receive(), SOON) == b"in"
        await asyncio.wait_for(successor.send(1, b"the end\r\n"), SOON)
        await successor.finish()
    assert await asyncio.wait_for(reader.read(), SOON) == frame(1, b"the end\r\n")


async def test_the_end_of_the_server_is_the_end_of_every_stream(site: Site) -> None:
    reader, _ = await site.connect(START)
    stream = await site.stream()
    await read_head(reader)
    ours, theirs = socket.socketpair()
    handed = stream.hand_over()
    assert handed is not None
    os.close(handed[0])
    stream.abandon()
    one = restore(ours.detach(), handed[1], site.server.streams)
    await site.server.close()
    await asyncio.wait_for(one.wait_closed(), SOON)
    assert theirs.recv(1) == b""
    theirs.close()


async def test_an_answer_is_read_before_its_connection_is_handed_over(site: Site) -> None:
    reader, _ = await site.connect(BIG % 3_000_000)
    await read_head(reader)
    quiescing = asyncio.ensure_future(site.server.quiesce())
    await read(reader, 3_000_000)
    await asyncio.wait_for(quiescing, SOON)
    ((fd, rest, progress),) = site.server.hand_over()
    os.close(fd)
    assert (rest, progress) == (b"", None)


async def test_an_answer_that_is_not_read_is_not_waited_for(site: Site) -> None:
    reader, _ = await site.connect(BIG % 30_000_000)
    await read_head(reader)
    await asyncio.wait_for(site.server.quiesce(), SOON)
    assert site.server.hand_over() == []


async def test_a_client_that_has_ended_its_side_is_handed_over_too(site: Site, tmp_path: Path) -> None:
    """Its request is asked again of the next server, which learns of the end behind it."""
    reader, writer = await site.connect(WAIT)
    await asyncio.wait_for(site.starts.waiting.wait(), SOON)
    writer.write_eof()
    await asyncio.sleep(A_WHILE)
    await site.server.quiesce()
    ((fd, read_before, progress),) = site.server.hand_over()
    assert (read_before, progress) == (WAIT, None)
    directory = tmp_path / "next"
    directory.mkdir()
    async with serving(site.family, directory) as successor:
        await successor.server.adopt(fd, read_before, progress)
        await asyncio.wait_for(successor.starts.waiting.wait(), SOON)
        successor.starts.over.set()
        assert (await read_head(reader)).startswith(b"HTTP/1.1 200 OK\r\n")
        assert await read(reader, 4) == b"over"
    site.starts.over.set()


async def test_a_request_behind_another_is_asked_again_whole(site: Site) -> None:
    """It is kept from its first byte on, also while the one before it is being answered."""
    reader, _ = await site.connect(PING + WAIT)
    assert (await read_head(reader)).startswith(b"HTTP/1.1 200 OK\r\n")
    assert await read(reader, 2) == b"OK"
    await asyncio.wait_for(site.starts.waiting.wait(), SOON)
    await site.server.quiesce()
    ((fd, read_before, _),) = site.server.hand_over()
    os.close(fd)
    assert read_before == WAIT
    site.starts.over.set()
