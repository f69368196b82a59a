"""The stream of a hijacked connection, over real sockets: what it promises, with and without a parked transport."""

import asyncio
import contextlib
import os
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import hypothesis
import hypothesis.strategies as st
import pytest

from execgate.http import hijack as hijack_module
from execgate.http.hijack import HijackedStream, OpenStreams, StreamState
from execgate.http.parking import Parking, duplicate
from execgate.http.takeover import restore
from execgate.sessions.pump import ClientGone
from execgate.wire import stdcopy

_T = TypeVar("_T")

SOON = 5.0
A_WHILE = 0.03
"""Seconds in which what must not happen would have happened."""
HEAD = b"HTTP/1.1 101 UPGRADED\r\n\r\n"
MUCH = 3_000_000
"""Bytes: more than the kernel takes from one side while the other does not read."""


async def soon(awaitable: Awaitable[_T]) -> _T:
    return await asyncio.wait_for(awaitable, SOON)


def frame(stream: int, data: bytes) -> bytes:
    return stdcopy.frame_header(stream, len(data)) + data


class Peer:
    """The client's end."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection

    async def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = await soon(asyncio.get_running_loop().sock_recv(self.socket, size - len(data)))
            assert piece, f"the end after {len(data)} of {size} bytes"
            data += piece
        return data

    async def read_to_end(self) -> bytes:
        pieces = []
        while piece := await soon(asyncio.get_running_loop().sock_recv(self.socket, 1 << 16)):
            pieces.append(piece)
        return b"".join(pieces)

    async def send(self, data: bytes) -> None:
        await soon(asyncio.get_running_loop().sock_sendall(self.socket, data))

    def fill(self) -> int:
        """Send until the kernel takes no more; return how much that was."""
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += self.socket.send(bytes(1 << 16))
        return sent

    def half_close(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def has_nothing_to_read(self) -> bool:
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True


class World:
    """A stream and its client. `family` and `parked` say what lies below."""

    def __init__(self, family: int, parked: bool) -> None:
        self.family, self.parked = family, parked
        self.streams = OpenStreams()
        self.lost: list[Exception | None] = []
        self.peers: list[Peer] = []

    async def open(self, **state: Any) -> tuple[HijackedStream, Peer]:
        ours, theirs = pair(self.family)
        peer = Peer(theirs)
        self.peers.append(peer)
        known: dict[str, Any] = {"dialect": "docker", "multiplexed": True, "unsent": b"", "head": None} | {
            "unread": b"", "eof": False, **state
        }  # fmt: skip
        full = StreamState(**known)
        if not self.parked:
            return restore(ours.detach(), full, self.streams), peer
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_accepted_socket(asyncio.Protocol, ours)
        parking = Parking(transport, self.lost.append)
        stream = HijackedStream(duplicate(transport), full, self.streams, parking)
        transport.set_protocol(parking)
        return stream, peer

    def go_on(self, stream: HijackedStream) -> HijackedStream:
        """Hand a stream over, and take it up where it stands."""
        handed = stream.hand_over()
        assert handed is not None
        return restore(*handed, self.streams)


def pair(family: int) -> tuple[socket.socket, socket.socket]:
    if family == socket.AF_UNIX:
        return socket.socketpair()
    client = socket.socket()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for side, option in ((listener, socket.SO_SNDBUF), (client, socket.SO_RCVBUF)):  # they would grow to megabytes
            side.setsockopt(socket.SOL_SOCKET, option, 1 << 17)
        client.connect(listener.getsockname())
        return listener.accept()[0], client


@contextlib.asynccontextmanager
async def nothing_stays(world: World) -> AsyncIterator[World]:
    yield world
    for stream in world.streams:
        stream.abandon()
    for peer in world.peers:
        peer.socket.close()
    await asyncio.sleep(A_WHILE)
    assert len(world.streams) == 0
    assert world.streams.hang_ups._epoll is None


@pytest.fixture(params=["unix", "unix, parked", "tcp, parked"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    family = socket.AF_UNIX if "unix" in request.param else socket.AF_INET
    async with nothing_stays(World(family, parked="parked" in request.param)) as world:
        yield world


@pytest.fixture(params=[False, True], ids=["bare", "parked"])
async def unix(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """Where the kernel tells a close from a half-close."""
    async with nothing_stays(World(socket.AF_UNIX, parked=request.param)) as world:
        yield world


@pytest.fixture
async def parked() -> AsyncIterator[World]:
    async with nothing_stays(World(socket.AF_UNIX, parked=True)) as world:
        yield world


# -- output -----------------------------------------------------------------------------------------------------------


async def test_output_in_frames(world: World) -> None:
    stream, peer = await world.open()
    await soon(stream.send(1, b"out"))
    await soon(stream.send(2, b"err"))
    expected = frame(1, b"out") + frame(2, b"err")
    assert await peer.read(len(expected)) == expected


async def test_raw_output(world: World) -> None:
    stream, peer = await world.open(multiplexed=False)
    await soon(stream.send(1, b"out"))
    await soon(stream.send(2, b"err"))
    assert await peer.read(6) == b"outerr"


async def test_output_waits_until_the_head_was_read(unix: World) -> None:
    stream, peer = await unix.open(unsent=HEAD, head=len(HEAD))
    sending = asyncio.create_task(stream.send(1, b"out"))
    await asyncio.sleep(A_WHILE)
    assert peer.socket.recv(1000, socket.MSG_PEEK) == HEAD
    assert not sending.done()
    assert await peer.read(len(HEAD)) == HEAD
    await soon(sending)
    assert await peer.read(11) == frame(1, b"out")


async def test_the_head_of_one_who_does_not_read(unix: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for for ever."""
    monkeypatch.setattr(hijack_module, "_HEAD_READ_TIMEOUT", 0.02)
    stream, peer = await unix.open(unsent=HEAD, head=len(HEAD))
    await soon(stream.send(1, b"out"))
    assert await peer.read(len(HEAD) + 11) == HEAD + frame(1, b"out")


async def test_the_head_and_then_output(world: World) -> None:
    stream, peer = await world.open(unsent=HEAD, head=len(HEAD))
    reading = asyncio.create_task(peer.read(len(HEAD) + 11))
    await soon(stream.send(1, b"out"))
    assert await reading == HEAD + frame(1, b"out")


async def test_output_is_held_back_by_a_reader_that_does_not_read(world: World) -> None:
    stream, peer = await world.open()
    data = os.urandom(MUCH)
    sending = asyncio.create_task(stream.send(1, data))
    await asyncio.sleep(A_WHILE)
    assert not sending.done()
    assert await peer.read(MUCH + 8) == frame(1, data)
    await soon(sending)


@pytest.mark.parametrize("seed", range(4))
async def test_concurrent_senders_that_are_cancelled_at_any_moment(world: World, seed: int) -> None:
    """What was accepted arrives once and whole, each stream in its order, whatever became of who sent it."""
    stream, peer = await world.open()
    dice = random.Random(seed)
    sent: dict[int, bytes] = {1: b"", 2: b""}

    async def send(number: int) -> None:
        for _ in range(40):
            data = dice.randbytes(dice.choice((1, 100, 70_000, 400_000)))
            sent[number] += data
            sending = asyncio.create_task(stream.send(number, data))
            await asyncio.sleep(0)  # a task that is cancelled before it begins accepts nothing
            if dice.random() < 0.5:
                await asyncio.sleep(dice.random() / 500)
                sending.cancel()
            await asyncio.wait([sending], timeout=SOON)

    reading = asyncio.create_task(peer.read_to_end())
    await asyncio.gather(send(1), send(2))
    await stream.finish()
    demultiplexed: dict[int, bytes] = {1: b"", 2: b""}
    for number, data in frames_of(await reading):
        demultiplexed[number] += data
    assert demultiplexed == sent


def frames_of(data: bytes) -> list[tuple[int, bytes]]:
    found = []
    while data:
        number, size = struct.unpack_from(">BxxxL", data)
        assert len(data) >= 8 + size, "half a frame"
        found.append((number, data[8 : 8 + size]))
        data = data[8 + size :]
    return found


async def test_a_client_that_is_gone_takes_no_output(world: World) -> None:
    stream, peer = await world.open()
    peer.reset()
    await asyncio.sleep(0)
    with contextlib.suppress(ClientGone):  # the first may get as far as the kernel
        await soon(stream.send(1, b"x"))
    with pytest.raises(ClientGone):
        await soon(stream.send(1, b"x"))
    await soon(stream.wait_closed())


async def test_a_client_that_goes_frees_who_sends_to_it(world: World) -> None:
    stream, peer = await world.open()
    senders = [asyncio.create_task(stream.send(number, bytes(MUCH))) for number in (1, 2)]
    await asyncio.sleep(A_WHILE)
    peer.reset()
    for sending in senders:
        with pytest.raises(ClientGone):
            await soon(sending)


# -- input ------------------------------------------------------------------------------------------------------------


async def test_what_is_held_comes_first(world: World) -> None:
    stream, peer = await world.open(unread=b"held")
    await peer.send(b"sent")
    assert await soon(stream.receive()) == b"held"
    assert await soon(stream.receive()) == b"sent"


async def test_the_end_of_input_is_told_again_and_again_and_output_goes_on(world: World) -> None:
    stream, peer = await world.open()
    receiving = asyncio.create_task(stream.receive())
    await peer.send(b"last")
    peer.half_close()
    assert await soon(receiving) == b"last"
    for _ in range(3):
        assert await soon(stream.receive()) == b""
    await soon(stream.send(1, b"out"))
    assert await peer.read(11) == frame(1, b"out")


async def test_an_end_that_came_before(world: World) -> None:
    stream, _ = await world.open(unread=b"all", eof=True)
    assert await soon(stream.receive()) == b"all"
    assert await soon(stream.receive()) == b""


async def test_a_receive_that_is_cancelled_loses_nothing(world: World) -> None:
    stream, peer = await world.open()
    data, received = os.urandom(200_000), b""
    dice = random.Random(1)

    async def send() -> None:
        for position in range(0, len(data), 1000):
            await peer.send(data[position : position + 1000])
            await asyncio.sleep(0)
        peer.half_close()

    sending = asyncio.create_task(send())
    while True:
        receiving = asyncio.create_task(stream.receive())
        for _ in range(dice.randrange(4)):
            await asyncio.sleep(0)
        receiving.cancel()
        await asyncio.wait([receiving])
        if not receiving.cancelled():
            if not receiving.result():
                break
            received += receiving.result()
    await sending
    assert received == data


async def test_input_stays_with_the_client_until_it_is_asked_for(world: World) -> None:
    stream, peer = await world.open()
    for _ in range(50):  # a kernel finds more room on a TCP connection once it sees that much comes, but not for ever
        if peer.fill() == 0:
            break
        await asyncio.sleep(A_WHILE)
    else:
        pytest.fail("somebody reads it")
    assert await soon(stream.receive())


async def test_a_flood_of_input_leaves_room_for_others(world: World) -> None:
    stream, peer = await world.open()
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    watching = asyncio.create_task(others())
    for _ in range(100):
        peer.fill()
        await soon(stream.receive())
    assert turns >= 99
    watching.cancel()


async def test_what_the_transport_reads_after_all_is_input(world: World) -> None:
    stream, peer = await world.open(unread=b"1")
    stream.unexpected_input(b"2")
    await peer.send(b"3")
    received = b""
    while len(received) < 3:
        received += await soon(stream.receive())
    assert received == b"123"
    receiving = asyncio.create_task(stream.receive())
    await asyncio.sleep(0)
    stream.unexpected_input(b"4")
    assert await soon(receiving) == b"4"
    stream.unexpected_input(b"")
    assert await soon(stream.receive()) == b""


# -- hang-ups ---------------------------------------------------------------------------------------------------------


async def test_a_client_that_closes_while_nothing_moves(unix: World) -> None:
    stream, peer = await unix.open()
    peer.socket.close()
    await soon(stream.wait_closed())
    assert len(unix.streams) == 0


async def test_a_reset_while_nothing_moves(world: World) -> None:
    stream, peer = await world.open()
    peer.reset()
    await soon(stream.wait_closed())


async def test_a_client_that_closes_after_the_end_of_its_input(unix: World) -> None:
    stream, peer = await unix.open()
    peer.half_close()
    assert await soon(stream.receive()) == b""
    await asyncio.sleep(A_WHILE)
    assert len(unix.streams) == 1
    peer.socket.close()
    await soon(stream.wait_closed())


async def test_a_client_that_closes_while_it_is_received_from(unix: World) -> None:
    stream, peer = await unix.open()
    receiving = asyncio.create_task(stream.receive())
    await asyncio.sleep(A_WHILE)
    peer.socket.close()
    with pytest.raises(ClientGone):
        await soon(receiving)
    await soon(stream.wait_closed())


@pytest.mark.parametrize("waits", [True, False])
async def test_what_a_client_sent_before_it_closed_is_input(unix: World, waits: bool) -> None:
    stream, peer = await unix.open()
    receiving = asyncio.create_task(stream.receive()) if waits else None
    await asyncio.sleep(A_WHILE)
    await peer.send(b"all that I have to say")
    peer.socket.close()
    await soon(stream.wait_closed())
    assert await soon(receiving or stream.receive()) == b"all that I have to say"
    with pytest.raises(ClientGone):
        await soon(stream.receive())


async def test_all_that_a_client_sent_before_it_closed_is_input(unix: World) -> None:
    stream, peer = await unix.open()
    sent = peer.fill()
    peer.socket.close()
    await soon(stream.wait_closed())
    await stream.finish()
    received = 0
    with contextlib.suppress(ClientGone):
        while data := await soon(stream.receive()):
            received += len(data)
    assert received == sent


async def test_aiohttp_is_told_of_the_end_once(world: World) -> None:
    stream, _ = await world.open()
    stream.abandon()
    await soon(stream.wait_closed())
    assert len(world.lost) == world.parked


async def test_a_transport_that_somebody_closes_takes_the_stream_along(parked: World) -> None:
    stream, peer = await parked.open()
    receiving = asyncio.create_task(stream.receive())
    await asyncio.sleep(0)
    assert stream._parking is not None
    stream._parking._transport.close()
    await soon(stream.wait_closed())
    with pytest.raises(ClientGone):
        await soon(receiving)
    assert await peer.read_to_end() == b""


# -- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "line"), [("docker", frame(1, b"no such thing\r\n")), ("libpod", frame(2, b"Error: no such thing\n"))]
)
async def test_the_last_line(world: World, dialect: str, line: bytes) -> None:
    stream, peer = await world.open(dialect=dialect)
    await soon(stream.finish("no such thing"))
    assert await peer.read_to_end() == line
    peer.socket.close()
    await soon(stream.wait_closed())


async def test_a_farewell_waits_for_a_slow_reader_and_nobody_waits_for_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hijack_module, "_LINGER", 0.01)
    stream, peer = await world.open()
    data = os.urandom(MUCH)
    sending = asyncio.create_task(stream.send(1, data))
    await asyncio.sleep(A_WHILE)
    sending.cancel()
    await stream.finish("the end")
    await asyncio.sleep(A_WHILE)
    assert len(world.streams) == 1
    assert await peer.read_to_end() == frame(1, data) + frame(1, b"the end\r\n")
    await soon(stream.wait_closed())


async def test_the_client_s_own_end_is_waited_for_but_not_for_ever(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hijack_module, "_LINGER", 3 * A_WHILE)
    stream, peer = await world.open()
    await stream.finish()
    assert await peer.read_to_end() == b""
    await peer.send(b"too late")
    assert len(world.streams) == 1
    await soon(stream.wait_closed())


async def test_the_client_s_own_end_ends_it(world: World) -> None:
    stream, peer = await world.open()
    await stream.finish()
    assert await peer.read_to_end() == b""
    peer.half_close()
    await asyncio.wait_for(stream.wait_closed(), 1)


async def test_one_who_reads_only_when_all_is_sent(world: World) -> None:
    """What it sends is thrown away, from the farewell on, so that it comes to reading at all."""
    stream, peer = await world.open(unread=b"nobody wants this")
    sending = asyncio.create_task(stream.send(1, bytes(MUCH)))
    await asyncio.sleep(A_WHILE)
    sending.cancel()
    await stream.finish()
    await peer.send(bytes(MUCH))
    assert len(await peer.read_to_end()) == MUCH + 8


async def test_input_that_nobody_read_does_not_reset_the_output(world: World) -> None:
    stream, peer = await world.open()
    peer.fill()
    peer.half_close()
    await soon(stream.send(1, bytes(100_000)))
    await stream.finish()
    await soon(stream.wait_closed())
    assert len(await peer.read_to_end()) == 100_008


async def test_receiving_is_over_with_the_farewell(world: World) -> None:
    stream, _ = await world.open()
    receiving = asyncio.create_task(stream.receive())
    await asyncio.sleep(0)
    await stream.finish()
    with pytest.raises(ClientGone):
        await soon(receiving)
    with pytest.raises(ClientGone):
        await soon(stream.receive())


async def test_a_client_that_goes_ends_the_farewell(world: World) -> None:
    stream, peer = await world.open()
    sending = asyncio.create_task(stream.send(1, bytes(MUCH)))
    await asyncio.sleep(A_WHILE)
    sending.cancel()
    await stream.finish()
    peer.reset()
    await soon(stream.wait_closed())


async def test_abandoned(world: World) -> None:
    stream, peer = await world.open()
    receiving, sending = asyncio.create_task(stream.receive()), asyncio.create_task(stream.send(1, bytes(MUCH)))
    await asyncio.sleep(A_WHILE)
    stream.abandon()
    for task in (receiving, sending):
        with pytest.raises(ClientGone):
            await soon(task)
    await stream.finish("nobody hears this")
    with pytest.raises(ClientGone):
        await soon(stream.send(1, b"nor this"))
    assert len(await peer.read_to_end()) < MUCH


# -- handing over -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [0, 1, 7, 8, 9, 1000, 65_536, 212_991, 500_000, MUCH, MUCH + 7, MUCH + 8, MUCH + 20])
async def test_handed_over_when_the_client_has_read_so_much(world: World, read: int) -> None:
    stream, peer = await world.open()
    first, second, third = os.urandom(MUCH), os.urandom(MUCH), os.urandom(1000)
    senders = [asyncio.create_task(stream.send(*output)) for output in ((1, first), (2, second))]
    await asyncio.sleep(0)
    taken = await peer.read(read)
    handed = stream.hand_over()
    assert handed is not None
    on_the_wire = 2 * (MUCH + 8) - len(handed[1].unsent)
    assert read <= on_the_wire < 2 * (MUCH + 8)
    await asyncio.sleep(A_WHILE)
    assert not senders[1].done()
    successor = restore(*handed, world.streams)
    sending = asyncio.create_task(successor.send(1, third))
    expected = frame(1, first) + frame(2, second) + frame(1, third)
    assert taken + await peer.read(len(expected) - read) == expected
    await soon(sending)
    for task in senders:
        task.cancel()
    await successor.finish()
    assert await peer.read_to_end() == b""
    stream.abandon()


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    sizes=st.lists(st.integers(1, 300_000), min_size=1, max_size=6), reads=st.lists(st.integers(0, 400_000), max_size=6)
)
async def test_handed_over_again_and_again(sizes: list[int], reads: list[int]) -> None:
    """The client reads, the connection changes hands, again and again: it sees every byte once."""
    world = World(socket.AF_UNIX, parked=False)
    stream, peer = await world.open()
    outputs = [(1 + number % 2, os.urandom(size)) for number, size in enumerate(sizes)]
    expected = b"".join(frame(*output) for output in outputs)
    senders = [asyncio.create_task(stream.send(*output)) for output in outputs]
    await asyncio.sleep(0)
    received = b""
    inert = []
    for read in reads:
        received += await peer.read(min(read, len(expected) - len(received)))
        inert.append(stream)
        stream = world.go_on(stream)
        more = b"+" * (read % 5)
        senders.append(asyncio.create_task(stream.send(1, more)))
        expected += frame(1, more)
        await asyncio.sleep(0)
    await stream.finish()
    received += await peer.read_to_end()
    assert received == expected
    for one in inert:
        one.abandon()
    await asyncio.gather(*senders, return_exceptions=True)
    peer.socket.close()
    await soon(stream.wait_closed())


async def test_input_is_handed_over_where_it_stands(world: World) -> None:
    stream, peer = await world.open(unread=b"0")
    data, received, inert = os.urandom(100_000), b"", []
    sending = asyncio.create_task(peer.send(data))
    while len(received) < len(data) + 1:
        receiving = asyncio.create_task(stream.receive())
        await asyncio.sleep(0)
        inert.append((stream, receiving))
        stream = world.go_on(stream)
        if receiving.done():
            received += receiving.result()
    await sending
    assert received == b"0" + data
    for one, task in inert:
        one.abandon()
        with contextlib.suppress(ClientGone):
            await soon(task)


async def test_what_was_not_received_is_handed_over(world: World) -> None:
    stream, peer = await world.open(unread=b"held")
    await peer.send(b" and sent")
    stream.unexpected_input(b" and come")
    handed = stream.hand_over()
    assert handed is not None
    assert handed[1].unread == b"held and come"
    successor = restore(*handed, world.streams)
    assert await soon(successor.receive()) == b"held and come"
    assert await soon(successor.receive()) == b" and sent"
    stream.abandon()


async def test_the_end_of_input_is_handed_over(world: World) -> None:
    stream, peer = await world.open()
    peer.half_close()
    assert await soon(stream.receive()) == b""
    successor = world.go_on(stream)
    assert await soon(successor.receive()) == b""
    await soon(successor.send(1, b"out"))
    assert await peer.read(11) == frame(1, b"out")
    stream.abandon()


async def test_a_head_that_was_not_read_is_waited_for_by_the_successor(unix: World) -> None:
    stream, peer = await unix.open(unsent=HEAD, head=len(HEAD))
    accepted = asyncio.create_task(stream.send(1, b"one"))
    await asyncio.sleep(A_WHILE)
    handed = stream.hand_over()
    assert handed is not None
    assert (handed[1].unsent, handed[1].head) == (frame(1, b"one"), 0)
    successor = restore(*handed, unix.streams)
    sending = asyncio.create_task(successor.send(1, b"two"))
    await asyncio.sleep(A_WHILE)
    assert peer.socket.recv(1000, socket.MSG_PEEK) == HEAD
    assert await peer.read(len(HEAD) + 22) == HEAD + frame(1, b"one") + frame(1, b"two")
    await soon(sending)
    stream.abandon()
    accepted.cancel()


async def test_what_was_accepted_is_delivered_by_the_successor_although_nothing_follows(unix: World) -> None:
    stream, peer = await unix.open(unsent=HEAD, head=len(HEAD))
    accepted = asyncio.create_task(stream.send(1, b"one"))
    await asyncio.sleep(A_WHILE)
    unix.go_on(stream)
    assert await peer.read(len(HEAD) + 11) == HEAD + frame(1, b"one")
    stream.abandon()
    accepted.cancel()


async def test_a_head_that_was_not_sent_is_sent_by_the_successor(world: World) -> None:
    stream, peer = await world.open(unsent=HEAD, head=len(HEAD))
    accepted = asyncio.create_task(stream.send(1, b"one"))
    handed = stream.hand_over()  # before any task ran
    assert handed is not None
    assert (handed[1].unsent, handed[1].head) == (HEAD, len(HEAD))
    successor = restore(*handed, world.streams)
    sending = asyncio.create_task(successor.send(1, b"two"))
    assert await peer.read(len(HEAD) + 11) == HEAD + frame(1, b"two")
    await soon(sending)
    stream.abandon()
    with pytest.raises(ClientGone):
        await soon(accepted)


async def test_a_farewell_is_handed_over(world: World) -> None:
    stream, peer = await world.open()
    data = os.urandom(MUCH)
    sending = asyncio.create_task(stream.send(1, data))
    await asyncio.sleep(A_WHILE)
    sending.cancel()
    await stream.finish("the end")
    taken = await peer.read(1000)
    handed = stream.hand_over()
    assert handed is not None
    assert handed[1].finished
    successor = restore(*handed, world.streams)
    assert taken + await peer.read_to_end() == frame(1, data) + frame(1, b"the end\r\n")
    peer.socket.close()
    await soon(successor.wait_closed())
    await soon(stream.wait_closed())


async def test_after_it_no_byte_moves(world: World) -> None:
    stream, peer = await world.open()
    waiting = [
        asyncio.create_task(one)
        for one in (stream.receive(), stream.send(1, b""), stream.wait_closed(), stream.send(2, bytes(MUCH)))
    ]
    await asyncio.sleep(0)
    handed = stream.hand_over()
    assert handed is not None
    fd, state = handed
    assert not os.get_inheritable(fd)
    assert stream.hand_over() is None
    waiting.append(asyncio.create_task(stream.send(1, b"not accepted any more")))
    await peer.read(MUCH + 8 + 8 - len(state.unsent))
    await peer.send(b"input")
    peer.half_close()
    await asyncio.sleep(A_WHILE)
    assert peer.has_nothing_to_read()
    with socket.socket(fileno=fd) as taken:
        assert taken.recv(100) == b"input"
    assert not waiting[0].done()
    assert not waiting[2].done()
    assert not waiting[4].done()
    await peer.read_to_end()
    await stream.finish("nobody hears this")
    assert not waiting[2].done()
    stream.abandon()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_client_that_is_gone_is_not_handed_over(unix: World) -> None:
    stream, peer = await unix.open()
    peer.socket.close()
    await soon(stream.wait_closed())
    assert stream.hand_over() is None


async def test_a_hang_up_meets_the_successor(unix: World) -> None:
    stream, peer = await unix.open()
    await peer.send(b"last words")
    successor = unix.go_on(stream)
    peer.socket.close()
    await soon(successor.wait_closed())
    assert await soon(successor.receive()) == b"last words"
    assert not stream._closed.done()
    stream.abandon()


# -- descriptors ------------------------------------------------------------------------------------------------------


async def test_no_descriptor_stays(world: World) -> None:
    async def live(end: Callable[[HijackedStream, Peer], Awaitable[None]]) -> None:
        stream, peer = await world.open(unsent=HEAD, head=len(HEAD))
        assert await peer.read(len(HEAD)) == HEAD
        await soon(stream.send(1, b"out"))
        await peer.read(11)
        await end(stream, peer)
        peer.socket.close()

    async def finish(stream: HijackedStream, peer: Peer) -> None:
        await stream.finish()
        await peer.read_to_end()
        peer.half_close()
        await soon(stream.wait_closed())

    async def reset(stream: HijackedStream, peer: Peer) -> None:
        receiving = asyncio.create_task(stream.receive())
        await asyncio.sleep(0)
        peer.reset()
        await asyncio.wait([receiving])
        await soon(stream.wait_closed())

    async def hand_over(stream: HijackedStream, peer: Peer) -> None:
        await finish(world.go_on(stream), peer)
        stream.abandon()

    async def abandon(stream: HijackedStream, _peer: Peer) -> None:
        stream.abandon()
        await soon(stream.wait_closed())

    ends = (finish, reset, hand_over, abandon)
    await live(finish)
    await asyncio.sleep(A_WHILE)
    before = sorted(os.listdir("/proc/self/fd"))
    for end in ends * 3:
        await live(end)
    await asyncio.sleep(A_WHILE)
    assert sorted(os.listdir("/proc/self/fd")) == before


async def test_a_host_without_room_leaves_everything_as_it_was(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(24, "too many open files")

    monkeypatch.setattr("execgate.http.hang_ups.select.epoll", refuse)
    before = sorted(os.listdir("/proc/self/fd"))
    ours, theirs = pair(world.family)
    with pytest.raises(OSError, match="too many"):
        restore(
            ours.detach(),
            StreamState(dialect="docker", multiplexed=True, unsent=b"", head=None, unread=b"", eof=False),
            world.streams,
        )
    theirs.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert len(world.streams) == 0
