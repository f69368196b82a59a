"""The front of a connection, without a socket: what it hands on, what it holds, when it has had enough."""

import asyncio
import json
from typing import Any, cast

import pytest

from execgate.http import front as front_module
from execgate.http.front import HELD_LIMIT, FrontProtocol
from execgate.model.errors import Internal

PING = b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n"
START = b"POST /exec/abc/start HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"


class FakeTransport:
    """Writes down what is done to it."""

    def __init__(self) -> None:
        self.written = b""
        self.said: list[str] = []
        self.protocol: Any = None

    def write(self, data: bytes) -> None:
        assert "close" not in self.said
        assert "write_eof" not in self.said
        self.written += data

    def write_eof(self) -> None:
        self.said.append("write_eof")

    def can_write_eof(self) -> bool:
        return True

    def close(self) -> None:
        self.said.append("close")

    def is_closing(self) -> bool:
        return "close" in self.said

    def pause_reading(self) -> None:
        self.said.append("pause_reading")

    def resume_reading(self) -> None:
        self.said.append("resume_reading")

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol


class FakeInner:
    """aiohttp's side: what it was given."""

    def __init__(self) -> None:
        self.got = b""
        self.said: list[str] = []

    def connection_made(self, transport: Any) -> None:
        self.said.append("made")

    def connection_lost(self, exc: Exception | None) -> None:
        self.said.append("lost")

    def data_received(self, data: bytes) -> None:
        self.got += data

    def pause_writing(self) -> None:
        self.said.append("pause_writing")

    def resume_writing(self) -> None:
        self.said.append("resume_writing")

    def close(self) -> None:
        self.said.append("close")


class World:
    """A front between a fake transport and a fake aiohttp."""

    def __init__(self) -> None:
        self.inner, self.transport = FakeInner(), FakeTransport()
        self.front = FrontProtocol(cast("Any", self.inner), max_body=1000)
        self.front.connection_made(cast("Any", self.transport))

    def feed(self, data: bytes) -> None:
        self.front.data_received(data)

    def take_over(self) -> tuple[bytes, bool]:
        taken: list[tuple[bytes, bool]] = []

        def successor(transport: Any, held: bytes, eof: bool) -> asyncio.Protocol:
            taken.append((held, eof))
            return asyncio.Protocol()

        self.front.take_over(successor)
        return taken[0]

    @property
    def error(self) -> tuple[int, str]:
        head, _, body = self.transport.written.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)["message"]


@pytest.fixture
async def world() -> Any:
    world = World()
    yield world
    world.front.connection_lost(None)


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEAD_TIMEOUT", "BODY_TIMEOUT", "_LINGER"):
        monkeypatch.setattr(front_module, name, 0.02)


async def until(world: World, word: str) -> None:
    async with asyncio.timeout(2):
        while word not in world.transport.said:
            await asyncio.sleep(0.005)


async def test_ordinary_requests_pass_as_they_are(world: World) -> None:
    for position in range(len(PING) * 2):
        world.feed((PING * 2)[position : position + 1])
    assert world.inner.got == PING * 2
    assert not world.transport.written


@pytest.mark.parametrize("cut", [1, 10, len(START) - 1, len(START), len(START) + 3])
async def test_what_stands_behind_a_start_is_held(world: World, cut: int) -> None:
    stream = START + b"stdin" + PING
    world.feed(stream[:cut])
    world.feed(stream[cut:])
    assert world.inner.got == START
    assert world.take_over() == (b"stdin" + PING, False)
    assert isinstance(world.transport.protocol, asyncio.Protocol)


async def test_an_early_end_of_input_is_handed_over(world: World) -> None:
    world.feed(START + b"all")
    assert world.front.eof_received()
    assert world.take_over() == (b"all", True)


async def test_what_is_held_is_bounded(world: World) -> None:
    world.feed(START + b"x" * HELD_LIMIT)
    assert "pause_reading" not in world.transport.said
    world.feed(b"x")
    assert "pause_reading" in world.transport.said


async def test_a_start_is_taken_over_once(world: World) -> None:
    world.feed(START)
    world.take_over()
    with pytest.raises(Internal):
        world.take_over()


async def test_other_requests_are_never_taken_over(world: World) -> None:
    world.feed(PING)
    with pytest.raises(Internal):
        world.take_over()


async def test_a_client_that_is_gone() -> None:
    world = World()
    world.feed(START)
    world.front.connection_lost(None)
    with pytest.raises(ConnectionError):
        world.take_over()
    assert world.inner.said[-1] == "lost"


@pytest.mark.parametrize(
    ("behind", "failed", "ends"), [(b"", False, False), (b"", True, True), (b"x", False, True), (b"x", True, True)]
)
async def test_after_a_start_that_was_answered(world: World, behind: bytes, failed: bool, ends: bool) -> None:
    world.feed(START + behind)
    assert world.front.request_done(failed=failed) is ends
    if not ends:
        world.feed(PING)
        assert world.inner.got == START + PING


async def test_an_answer_before_the_start_takes_nothing_of_it(world: World) -> None:
    world.feed(PING + START + b"stdin")
    assert world.front.request_done(failed=False) is False
    assert world.take_over() == (b"stdin", False)


async def test_a_start_refused_before_its_body_ends_the_connection(world: World) -> None:
    world.feed(START[:-1])
    assert world.front.request_done(failed=True) is True
    world.feed(b"}" + PING)
    assert PING not in world.inner.got


async def test_a_half_close_waits_for_the_answers(world: World) -> None:
    world.feed(PING + PING)
    assert world.front.eof_received()
    assert world.front.request_done(failed=False) is False
    assert world.front.request_done(failed=False) is True


async def test_a_half_close_of_nobody_is_an_end() -> None:
    world = World()
    assert not world.front.eof_received()
    world.front.connection_lost(None)


async def test_a_half_close_within_a_request_is_an_end(world: World) -> None:
    world.feed(START[:-1])
    assert not world.front.eof_received()


async def test_a_refusal_is_json_and_an_orderly_end(world: World) -> None:
    world.feed(b"nonsense\r\n\r\n" + PING)
    assert world.error[0] == 400
    assert world.transport.said == ["write_eof"]
    world.feed(PING)
    assert world.inner.got == b""
    assert not world.front.eof_received()


@pytest.mark.parametrize(
    ("sent", "keys"),
    [
        (b"GET /v4.3.1/libpod/info HTTP/1.1\r\nno field\r\n", ["cause", "message", "response"]),
        (b"GET /v4.3.1/%6cibpod/info HTTP/1.1\r\nno field\r\n", ["cause", "message", "response"]),
        (b"GET /v4.3.1/info?/libpod/ HTTP/1.1\r\nno field\r\n", ["message"]),
        (b"GET /v4.3.1/libpod/info\r\n", ["message"]),
    ],
)
async def test_a_refusal_has_the_form_of_the_tree_that_was_asked(sent: bytes, keys: list[str], world: World) -> None:
    world.feed(sent)
    head, _, body = world.transport.written.partition(b"\r\n\r\n")
    assert list(json.loads(body)) == keys
    assert f"Content-Length: {len(body)}".encode() in head


async def test_a_refusal_does_not_land_within_another_answer(world: World) -> None:
    world.feed(PING + b"nonsense\r\n\r\n")
    assert not world.transport.written
    assert "close" in world.inner.said


async def test_a_bad_body_is_answered(world: World) -> None:
    world.feed(b"POST /containers/x/exec HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
    assert world.error[0] == 400
    assert "close" in world.transport.said


@pytest.mark.parametrize(
    "sent", [b"", b"GET", START[:-1], PING + b"GET /"], ids=["silent", "half a head", "half a body", "half behind one"]
)
async def test_too_slow(short_timeouts: None, sent: bytes) -> None:
    world = World()
    world.feed(sent) if sent else None
    await until(world, "close")
    if sent == b"GET":
        assert world.error[0] == 408
    world.front.connection_lost(None)


async def test_an_idle_connection_is_not_hurried(short_timeouts: None) -> None:
    """aiohttp's own keep-alive timeout watches it."""
    world = World()
    world.feed(PING)
    world.front.request_done(failed=False)
    await asyncio.sleep(0.06)
    assert world.transport.said == []
    world.front.connection_lost(None)


async def test_a_session_has_no_timer(short_timeouts: None) -> None:
    world = World()
    world.feed(START)
    world.take_over()
    await asyncio.sleep(0.06)
    assert world.transport.said == []
    world.front.connection_lost(None)


@pytest.mark.parametrize("how", ["eof", "lost", "before"])
async def test_client_left(how: str) -> None:
    world = World()
    world.feed(PING)
    if how == "before":
        world.front.eof_received()
    waiting = asyncio.create_task(world.front.client_left())
    await asyncio.sleep(0)
    if how == "eof":
        world.front.eof_received()
    elif how == "lost":
        world.front.connection_lost(ConnectionResetError())
    await asyncio.wait_for(waiting, 1)
    if how != "lost":
        world.front.connection_lost(None)


async def test_flow_control_is_passed_on(world: World) -> None:
    world.front.pause_writing()
    world.front.resume_writing()
    assert world.inner.said == ["made", "pause_writing", "resume_writing"]
