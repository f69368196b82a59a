"""TLS in front of plain sockets: what an end is and what none is, who is let in, and what is bounded."""

import asyncio
import contextlib
import json
import logging
import random
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from execgate.http import tls as tls_module
from execgate.http import tunnel as tunnel_module
from execgate.http.certificates import TlsSettings, server_context
from execgate.http.hang_ups import HangUps, hung_up
from execgate.http.tls import TlsServer
from execgate.model.principal import Method, Principal
from support.async_tls import TlsPeer, soon
from support.tls import Authority, Identity

A_WHILE = 0.05
"""Seconds in which what must not happen would have happened."""

MUCH = 100_000_000
BOUND = 24_000_000
"""Bytes that may be under way in one direction: by far most of it is the kernel's, which lets TCP have 4 to 6 MB on
each side."""


@dataclass(frozen=True, slots=True)
class Pki:
    authority: Authority
    server: Identity
    client: Identity


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    authority = Authority.make(tmp_path_factory.mktemp("tls") / "pki")
    client = authority.client("alice", "alice@example.org", "spiffe://example.org/alice")
    return Pki(authority, authority.server("server", "127.0.0.1", "localhost"), client)


class Served:
    """The plain side of one connection, as a service has it."""

    def __init__(self, connection: socket.socket, peer: Principal | None, cut: Callable[[], object]) -> None:
        self.socket, self.peer, self.cut = connection, peer, cut

    async def send(self, data: bytes) -> None:
        await soon(asyncio.get_running_loop().sock_sendall(self.socket, data))

    async def read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = await soon(asyncio.get_running_loop().sock_recv(self.socket, size - len(data)))
            assert piece, f"the end after {len(data)} of {size} bytes"
            data += piece
        return bytes(data)

    async def read_to_end(self) -> bytes:
        pieces = []
        while piece := await soon(asyncio.get_running_loop().sock_recv(self.socket, 1 << 16)):
            pieces.append(piece)
        return b"".join(pieces)

    def half_close(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.socket.close()

    async def hung_up(self) -> None:
        """Return once the other side is gone altogether."""
        hang_ups, gone = HangUps(), asyncio.Event()
        hang_ups.watch(self.socket.fileno(), gone.set)
        await soon(gone.wait())

    @property
    def is_hung_up(self) -> bool:
        return hung_up(self.socket)


class Site:
    """A TLS server whose connections the test serves, and its clients."""

    def __init__(self, server: TlsServer, address: tuple[str, int], pki: Pki, served: "asyncio.Queue[Served]") -> None:
        self.server, self.address, self.pki, self.served = server, address, pki, served
        self.peers: list[TlsPeer] = []

    def context(self, identity: Identity | None, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.pki.authority.ca)
        if version is not None:
            context.minimum_version = context.maximum_version = version
        if identity is not None:
            context.load_cert_chain(identity.certificate, identity.key)
        return context

    def peer(self, identity: Identity | None = None, *, piece: int = 0, version: Any = None) -> TlsPeer:
        """Connect, and do not shake hands yet; as alice, unless it is somebody else."""
        context = self.context(identity or self.pki.client, version)
        self.peers.append(TlsPeer(self.address, context, piece=piece))
        return self.peers[-1]

    def stranger(self) -> TlsPeer:
        self.peers.append(TlsPeer(self.address, self.context(None)))
        return self.peers[-1]

    async def connect(self, **options: Any) -> tuple[TlsPeer, Served]:
        peer = self.peer(**options)
        await soon(peer.handshake())
        return peer, await soon(self.served.get())


@asynccontextmanager
async def serving(pki: Pki, **settings: Any) -> AsyncIterator[Site]:
    chosen: dict[str, Any] = {
        "certificate": pki.server.certificate,
        "key": pki.server.key,
        "client_ca": pki.authority.ca,
        "client_required": True,
        "minimum": ssl.TLSVersion.TLSv1_3,
    } | settings
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)

    served: asyncio.Queue[Served] = asyncio.Queue()

    async def serve(connection: socket.socket, peer: Principal | None, cut: Callable[[], object]) -> None:
        here = Served(connection, peer, cut)
        everybody.append(here)
        served.put_nowait(here)

    everybody: list[Served] = []
    server = TlsServer(server_context(TlsSettings(**chosen)), serve, HangUps())
    site = Site(server, listener.getsockname(), pki, served)
    server.listen(listener)
    yield site
    for peer in site.peers:
        peer.close()
    for one in everybody:
        one.close()
    await soon(server.close())
    assert listener.fileno() < 0


@pytest.fixture
async def site(pki: Pki) -> AsyncIterator[Site]:
    async with serving(pki) as site:
        yield site


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def logged(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


@pytest.fixture(autouse=True)
def logging_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="execgate")


# -- bytes and their ends


async def test_both_ways(site: Site) -> None:
    peer, served = await site.connect()
    await peer.send(b"in")
    assert await served.read(2) == b"in"
    await served.send(b"out")
    assert await peer.read(3) == b"out"


@pytest.mark.parametrize("piece", [0, 1])
async def test_the_end_of_input_is_no_end_of_output(site: Site, piece: int) -> None:
    peer, served = await site.connect(piece=piece)
    await peer.send(b"all of it")
    await peer.half_close()
    assert await served.read_to_end() == b"all of it"
    assert not served.is_hung_up
    out = random.Random(1).randbytes(3_000_000)
    sending = asyncio.ensure_future(served.send(out + b"the end"))
    assert await soon(peer.read(len(out))) == out
    await sending
    served.half_close()
    served.close()
    assert await soon(peer.read_to_end()) == (b"the end", "close_notify")


@pytest.mark.parametrize("piece", [0, 1])
async def test_the_end_of_output_is_no_end_of_input(site: Site, piece: int) -> None:
    peer, served = await site.connect(piece=piece)
    await served.send(b"out")
    served.half_close()
    assert await soon(peer.read_to_end()) == (b"out", "close_notify")
    for number in range(3):
        await peer.send(b"in %d" % number)
        assert await served.read(4) == b"in %d" % number
    await peer.half_close()
    assert await served.read_to_end() == b""


async def test_our_end_in_the_midst_of_a_record(site: Site) -> None:
    """OpenSSL must not take what is half there for something that comes behind an end."""
    peer, served = await site.connect()
    records = peer.records(b"x" * 40_000)
    await peer.send_raw(records[:20_000])
    assert await served.read(1) == b"x"
    served.half_close()
    assert await soon(peer.read_to_end()) == (b"", "close_notify")
    for begin in range(20_000, len(records), 997):
        await peer.send_raw(records[begin : begin + 997])
    assert await served.read(39_999) == b"x" * 39_999
    await peer.half_close()
    assert await served.read_to_end() == b""


async def test_a_conversation_byte_by_byte(site: Site) -> None:
    peer, served = await site.connect(piece=1)
    for size in (1, 100, 20_000):
        data = random.Random(size).randbytes(size)
        sending = asyncio.ensure_future(peer.send(data))
        assert await served.read(size) == data
        await sending
        await served.send(data)
        assert await peer.read(size) == data


async def test_input_behind_a_half_close_is_not_input(site: Site) -> None:
    """Whatever comes behind a close_notify."""
    peer, served = await site.connect()
    await peer.half_close()
    await peer.send_raw(b"GET / HTTP/1.1\r\n\r\n")
    assert await served.read_to_end() == b""
    await served.send(b"out")
    assert await peer.read(3) == b"out"


@pytest.mark.parametrize("how", ["fin", "reset"])
@pytest.mark.parametrize("rest", [b"", b"\x17\x03\x03\x01\x00half a record"])
async def test_an_end_that_is_not_said_is_a_hang_up(site: Site, how: str, rest: bytes) -> None:
    peer, served = await site.connect()
    await peer.send(b"in")
    assert await served.read(2) == b"in"
    await peer.send_raw(rest)
    getattr(peer, how)()
    await served.hung_up()
    with contextlib.suppress(ConnectionError):
        assert await served.read_to_end() == b""


async def test_what_came_before_a_hang_up_is_still_there(site: Site) -> None:
    peer, served = await site.connect()
    await peer.send(b"in")
    peer.fin()
    await served.hung_up()
    assert await served.read_to_end() == b"in"


async def test_a_reset_is_noticed_while_nothing_moves(site: Site) -> None:
    """Behind the client's end too, and while the served side reads nothing."""
    peer, served = await site.connect()
    await peer.half_close()
    assert await served.read_to_end() == b""
    peer.reset()
    await served.hung_up()
    peer, served = await site.connect()
    await fill(peer)
    peer.reset()
    await served.hung_up()


async def test_a_cut_is_no_end(site: Site) -> None:
    peer, served = await site.connect()
    await served.send(b"out")
    assert await peer.read(3) == b"out"
    served.cut()
    served.close()
    assert await soon(peer.read_to_end()) == (b"", "reset")


async def test_so_is_the_end_of_the_server(site: Site) -> None:
    peer, served = await site.connect()
    await served.send(b"out")
    await site.server.drained(10)
    await site.server.close()
    assert await soon(peer.read_to_end()) == (b"out", "reset")
    await served.hung_up()


@pytest.mark.parametrize("size", [3, 3_000_000])
async def test_a_close_is_an_end_behind_all_that_was_written(site: Site, size: int) -> None:
    """Also of a client that goes on sending what nobody reads: a reset would cost it the answer."""
    peer, served = await site.connect()
    await peer.send(b"not read")
    sending = asyncio.ensure_future(served.send(b"x" * size))
    await asyncio.sleep(A_WHILE)
    await peer.send(b"nor this")
    data = await peer.read(size - 2)
    await sending
    served.close()
    await peer.send(b"nor that")
    await asyncio.sleep(A_WHILE)
    await peer.send(b"at last")
    rest, end = await soon(peer.read_to_end())
    assert (data + rest, end) == (b"x" * size, "close_notify")


async def test_a_client_that_does_not_close_is_closed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel_module, "FAREWELL", 0.1)
    peer, served = await site.connect()
    served.close()
    assert await soon(peer.read_to_end()) == (b"", "close_notify")
    await until(lambda: not site.server._tunnels)


async def test_a_change_of_keys(site: Site) -> None:
    """`K` has openssl change its keys and ask for new ones of ours."""
    client = site.pki.client
    files = ["-CAfile", client.ca, "-cert", client.certificate, "-key", client.key]
    address = f"127.0.0.1:{site.address[1]}"
    process = await asyncio.create_subprocess_exec(
        "openssl", "s_client", "-connect", address, *map(str, files),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    served = await soon(site.served.get())
    for number in range(3):
        process.stdin.write(b"K\n")
        assert b"KEYUPDATE" in await soon(process.stdout.readuntil(b"KEYUPDATE"))
        process.stdin.write(b"hello %d\n" % number)
        assert await served.read(8) == b"hello %d\n" % number
        await served.send(b"answer %d\n" % number)
        await soon(process.stdout.readuntil(b"answer %d\n" % number))
    process.stdin.close()
    served.close()
    await soon(process.wait())


# -- bounds


async def fill(peer: TlsPeer) -> int:
    """Send until the kernel takes no more, for a while; return how much that was."""
    sent, idle = 0, 0.0
    records = memoryview(peer.records(bytes(1 << 20)))
    while sent < MUCH and idle < 0.5:
        if not records:
            records = memoryview(peer.records(bytes(1 << 20)))
        try:
            taken = peer.tcp.send(records)
        except BlockingIOError:
            await asyncio.sleep(0.01)
            idle += 0.01
        else:
            records, sent, idle = records[taken:], sent + taken, 0.0
            await asyncio.sleep(0)
    return sent


async def test_input_that_nobody_reads_is_not_taken(site: Site) -> None:
    peer, served = await site.connect()
    assert await fill(peer) < BOUND
    await served.send(b"the other direction")
    assert await peer.read(19) == b"the other direction"


async def test_output_that_nobody_reads_is_not_taken(site: Site) -> None:
    peer, served = await site.connect()
    sent, idle = 0, 0.0
    while sent < MUCH and idle < 0.5:
        try:
            sent += served.socket.send(bytes(1 << 16))
            idle = 0.0
            await asyncio.sleep(0)
        except BlockingIOError:
            await asyncio.sleep(0.01)
            idle += 0.01
    assert sent < BOUND
    await peer.send(b"the other direction")
    assert await served.read(19) == b"the other direction"
    served.half_close()
    assert await soon(peer.read_to_end()) == (bytes(sent), "close_notify")


async def test_much_in_both_directions(site: Site) -> None:
    peer, served = await site.connect()
    there, back = random.Random(1).randbytes(20_000_000), random.Random(2).randbytes(20_000_000)

    async def say(send: Callable[[bytes], Awaitable[None]], data: bytes) -> None:
        for begin in range(0, len(data), 100_000):
            await send(data[begin : begin + 100_000])

    results = await asyncio.gather(
        say(peer.send, there), say(served.send, back), served.read(len(there)), peer.read(len(back))
    )
    assert results[2] == there
    assert results[3] == back


async def test_a_handshake_takes_no_time(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it is over: one that does not begin, and one that does not end."""
    monkeypatch.setattr(tls_module, "HANDSHAKE_TIMEOUT", 0.2)
    silent, slow = site.peer(), site.peer()
    with contextlib.suppress(ssl.SSLWantReadError):
        slow.tls.do_handshake()
    await slow.send_raw(slow._out.read()[:50])
    for peer in (silent, slow):
        with contextlib.suppress(ConnectionResetError):
            assert await soon(asyncio.get_running_loop().sock_recv(peer.tcp, 100)) == b""
    await until(lambda: not site.server._tunnels)


async def test_a_flood_of_silence_keeps_nobody_out(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_module, "MAX_UNFINISHED", 5)
    silent = [site.peer() for _ in range(20)]
    peer, served = await site.connect()
    await peer.send(b"in")
    assert await served.read(2) == b"in"
    assert len(site.server._tunnels) <= 6
    for one in silent[:15]:
        with contextlib.suppress(ConnectionResetError):
            assert await soon(asyncio.get_running_loop().sock_recv(one.tcp, 100)) == b""


async def test_a_host_without_descriptors(site: Site, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """No spinning, and it comes back."""
    monkeypatch.setattr(tls_module, "_ACCEPT_PAUSE", 0.2)
    real, refused = socket.socket.accept, 0

    def accept(listener: socket.socket) -> Any:
        nonlocal refused
        refused += 1
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "accept", accept)
        peer = site.peer()
        await asyncio.sleep(0.5)
        assert 1 <= refused <= 4
    assert real is socket.socket.accept
    await soon(peer.handshake())
    served = await soon(site.served.get())
    await served.send(b"out")
    assert await peer.read(3) == b"out"
    assert any("Too many open files" in line for line in logged(caplog, logging.ERROR))


# -- who is let in


async def refusal(peer: TlsPeer) -> str:
    """Return the alert that a client gets: with TLS 1.3 it believes at first that all is well."""
    try:
        await soon(peer.handshake())
        await peer.read_to_end()
    except ssl.SSLError as error:
        return error.reason or ""
    raise AssertionError("it was let in")


async def test_who_it_is(site: Site) -> None:
    _, served = await site.connect()
    names = frozenset({"email:alice@example.org", "uri:spiffe://example.org/alice"})
    assert served.peer == Principal(method=Method.CERTIFICATE, name="email:alice@example.org", names=names)


async def test_no_certificate(site: Site, caplog: Any) -> None:
    assert (await refusal(site.stranger())) == "TLSV13_ALERT_CERTIFICATE_REQUIRED"
    (line,) = logged(caplog, logging.INFO)
    assert line.startswith("127.0.0.1:")
    assert "peer did not return a certificate" in line


async def test_a_certificate_that_has_expired(site: Site, caplog: Any) -> None:
    old = site.pki.authority.client("old", "old@example.org", days=-1)
    assert (await refusal(site.peer(old))) == "SSLV3_ALERT_CERTIFICATE_EXPIRED"
    assert "certificate has expired" in logged(caplog, logging.INFO)[0]


async def test_a_certificate_of_another_authority(site: Site, tmp_path: Path, caplog: Any) -> None:
    stranger = Authority.make(tmp_path / "pki").client("alice", "alice@example.org")
    assert (await refusal(site.peer(stranger))) == "TLSV1_ALERT_UNKNOWN_CA"
    assert "certificate verify failed" in logged(caplog, logging.INFO)[0]


async def test_a_services_certificate_is_no_clients(site: Site, caplog: Any) -> None:
    """Whoever runs a service of the same authority is not one of its users by that."""
    assert (await refusal(site.peer(site.pki.server))) == "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE"
    assert "unsuitable certificate purpose" in logged(caplog, logging.INFO)[0]


NAMELESS = {
    "none": "",
    "another type": "subjectAltName = otherName:1.3.6.1.4.1.311.20.2.3;UTF8:alice@example.org",
    "a wildcard": "subjectAltName = DNS:*.example.org",
}


@pytest.mark.parametrize("extensions", NAMELESS.values(), ids=NAMELESS)
@pytest.mark.parametrize("required", [True, False])
async def test_a_certificate_without_a_name(
    pki: Pki, extensions: str, required: bool, caplog: Any, tmp_path: Path
) -> None:
    """Its common name is none. It is told, in HTTP."""
    nameless = pki.authority.unnamed_client(f"nameless-{tmp_path.name}-{random.randrange(10**9)}", extensions)
    async with serving(pki, client_required=required) as site:
        peer = site.peer(nameless)
        await soon(peer.handshake())
        await peer.send(b"GET /_ping HTTP/1.1\r\n\r\n")
        answer, end = await soon(peer.read_to_end())
        assert answer.startswith(b"HTTP/1.1 403 Forbidden\r\n")
        assert "subject alternative name" in json.loads(answer.partition(b"\r\n\r\n")[2])["message"]
        assert end == "close_notify"
        assert site.served.empty()
    (line,) = logged(caplog, logging.INFO)
    assert "names nobody" in line
    assert "commonName=nameless" in line


async def test_optional_certificates(pki: Pki, tmp_path: Path) -> None:
    async with serving(pki, client_required=False) as site:
        peer = site.stranger()
        await soon(peer.handshake())
        served = await soon(site.served.get())
        assert served.peer is None
        _, served = await site.connect()
        assert served.peer is not None
        stranger = Authority.make(tmp_path / "pki").client("alice", "alice@example.org")
        assert (await refusal(site.peer(stranger))) == "TLSV1_ALERT_UNKNOWN_CA"


async def test_no_authority_no_certificates(pki: Pki) -> None:
    async with serving(pki, client_required=False, client_ca=None) as site:
        _, served = await site.connect()
        assert served.peer is None


async def test_tls_1_2_is_not_spoken(site: Site) -> None:
    assert (await refusal(site.peer(version=ssl.TLSVersion.TLSv1_2))) == "TLSV1_ALERT_PROTOCOL_VERSION"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_tls_1_2_if_told_so(pki: Pki, version: ssl.TLSVersion) -> None:
    async with serving(pki, minimum=ssl.TLSVersion.TLSv1_2) as site:
        peer, served = await site.connect(version=version)
        await peer.send(b"in")
        await peer.half_close()
        assert await served.read_to_end() == b"in"
        await served.send(b"out")
        served.close()
        assert await soon(peer.read_to_end()) == (b"out", "close_notify")
        assert peer.tls.compression() is None


@pytest.mark.parametrize("request_line", [b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n", b"POST /x", b"P"])
async def test_plain_http(site: Site, request_line: bytes) -> None:
    """It is told what it did wrong, in the words of Go's servers."""
    peer = site.peer()
    await peer.send_raw(request_line)
    answer = b""
    while piece := await soon(asyncio.get_running_loop().sock_recv(peer.tcp, 4096)):
        answer += piece
    assert answer.startswith(b"HTTP/1.0 400 Bad Request\r\n")
    assert answer.endswith(b"\r\n\r\nClient sent an HTTP request to an HTTPS server.\n")


@pytest.mark.parametrize(
    "garbage", [b"\x00" * 100, b"\x16\x03\x01" + b"\xff" * 2000, bytes(range(256)) * 1000, b"\x80\x2e\x01"]
)
async def test_garbage(site: Site, garbage: bytes, caplog: Any) -> None:  # fmt: skip
    """The end, soon, and no line that an operator would see."""
    peer = site.peer()
    with contextlib.suppress(ConnectionError):
        await peer.send_raw(garbage)
        peer.fin()
        while await soon(asyncio.get_running_loop().sock_recv(peer.tcp, 4096)):
            pass
    await until(lambda: not site.server._tunnels)
    assert logged(caplog, logging.INFO) == []


async def test_garbage_within(site: Site) -> None:
    peer, served = await site.connect()
    await peer.send_raw(b"GET / HTTP/1.1\r\n\r\n")
    await served.hung_up()
    assert (await soon(peer.read_to_end()))[1] != "close_notify"


async def test_a_client_that_does_not_trust_us(site: Site, tmp_path: Path, caplog: Any) -> None:
    context = ssl.create_default_context(cafile=Authority.make(tmp_path / "pki").ca)
    peer = TlsPeer(site.address, context)
    with pytest.raises(ssl.SSLCertVerificationError):
        await soon(peer.handshake())
    await peer._push()
    peer.close()
    await until(lambda: not site.server._tunnels)
    assert logged(caplog, logging.WARNING) == []


async def test_there_is_nothing_to_resume(site: Site) -> None:
    """No ticket: whoever comes back shows the certificate again, which may have expired."""
    peer, served = await site.connect()
    await served.send(b"out")
    await peer.read(3)
    assert peer.tls.session is None or not peer.tls.session.has_ticket
