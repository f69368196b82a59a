"""Who is at the other end: what the kernel says, what a certificate says, and what it does not."""

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from execgate.http import peers
from execgate.http.peers import MAX_NAMES, Unnamed, certificate_peer, kernels_word, unix_peer
from execgate.model.principal import Method, certificate_name


def connect_as(listener: socket.socket, uid: int, gid: int, groups: list[int]) -> tuple[socket.socket, int]:
    """Return the connection of another user's process, and its pid; it is over by now."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups(groups)
            os.setgid(gid)
            os.setuid(uid)
            socket.socket(socket.AF_UNIX).connect(listener.getsockname())
        finally:
            os._exit(0)
    connection, _ = listener.accept()
    os.waitpid(pid, 0)
    return connection, pid


@pytest.fixture
def listener(tmp_path: Path) -> Any:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0execgate-test-{os.getpid()}-{os.urandom(4).hex()}")
        listener.listen()
        yield listener


@pytest.mark.parametrize("count", [0, 1, 256, 257, 65536])
def test_another_user(listener: socket.socket, count: int) -> None:
    groups = list(range(100_000, 100_000 + count))
    connection, pid = connect_as(listener, 1234, 4321, groups)
    with connection:
        found = unix_peer(connection)
    assert (found.method, found.name, found.names) == (Method.UNIX, "1234", frozenset({"1234"}))
    assert (found.uid, found.pid) == (1234, pid)
    assert found.gids == frozenset({4321, *groups})
    assert found.id == "unix:1234"


def test_a_kernel_that_tells_no_groups(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SO_PEERGROUPS", 9999)
    connection, _ = connect_as(listener, 1234, 4321, [1])
    with connection:
        assert unix_peer(connection).gids == frozenset({4321})


async def test_the_kernels_word_for_a_transport(listener: socket.socket) -> None:
    """On both event loops, and the socket stays the transport's; TCP has none."""
    with socket.socket(socket.AF_UNIX) as client, socket.create_server(("127.0.0.1", 0)) as tcp:
        client.connect(listener.getsockname())
        connection, _ = listener.accept()
        transport, _ = await asyncio.get_running_loop().connect_accepted_socket(asyncio.Protocol, connection)
        for _ in range(2):
            found = kernels_word(transport)
            assert found is not None
            assert (found.uid, found.pid) == (os.getuid(), os.getpid())
        transport.write(b"here")
        assert await asyncio.to_thread(client.recv, 4) == b"here"
        transport.close()
        other = socket.create_connection(tcp.getsockname())
        transport, _ = await asyncio.get_running_loop().connect_accepted_socket(asyncio.Protocol, other)
        assert kernels_word(transport) is None
        transport.close()


def names(*alternatives: tuple[str, Any]) -> list[str]:
    found = certificate_peer({"subject": ((("commonName", "x"),),), "subjectAltName": alternatives})
    assert found.method is Method.CERTIFICATE
    assert found.name in found.names
    return sorted(found.names)


@pytest.mark.parametrize(
    ("alternative", "name"),
    [
        (("email", "alice@example.org"), "email:alice@example.org"),
        (("email", "Alice+ci@Example.ORG"), "email:Alice+ci@example.org"),
        (("email", "o'brien@example.org"), "email:o'brien@example.org"),
        (("DNS", "Build.Example.org"), "dns:build.example.org"),
        (("DNS", "alice"), "dns:alice"),
        (("URI", "spiffe://example.org/ns/ci"), "uri:spiffe://example.org/ns/ci"),
        (("URI", "urn:uuid:f81d4fae-7dec-11d0-a765-00a0c91e6bf6"), "uri:urn:uuid:f81d4fae-7dec-11d0-a765-00a0c91e6bf6"),
        (("URI", "email:alice@example.org"), "uri:email:alice@example.org"),
        (("IP Address", "192.0.2.7"), "ip:192.0.2.7"),
        (("IP Address", "2001:DB8:0:0:0:0:0:1\n"), "ip:2001:db8::1"),
    ],
)
def test_names(alternative: tuple[str, str], name: str) -> None:
    assert names(alternative) == [name]


@pytest.mark.parametrize(
    "alternative",
    [
        ("DNS", "alice@example.org"),
        ("DNS", "*.example.org"),
        ("DNS", "a b"),
        ("DNS", "a\0.example.org"),
        ("DNS", "a\n"),
        ("DNS", "x" * 300),
        ("DNS", ""),
        ("DNS", "münchen.example.org"),
        ("email", "alice"),
        ("email", "a@b@example.org"),
        ("email", "uri:x@example.org"),
        ("email", "*@example.org"),
        ("email", '"a b"@example.org'),
        ("email", "alice@example.org\n"),
        ("URI", "example.org"),
        ("URI", "spiffe://example.org/a b"),
        ("URI", "spiffe://example.org/*"),
        ("URI", "spiffe://example.org/\x1b[31m"),
        ("URI", "x:" + "y" * 3000),
        ("IP Address", "<invalid>"),
        ("DirName", ((("commonName", "alice@example.org"),),)),
        ("Registered ID", "1.2.3"),
        ("othername", "<unsupported>"),
    ],
)
def test_what_is_no_name(alternative: tuple[str, Any]) -> None:
    with pytest.raises(Unnamed, match="commonName=x"):
        names(alternative)
    assert names(alternative, ("DNS", "a.example.org")) == ["dns:a.example.org"]


def test_the_first_one_is_the_name() -> None:
    alternatives = (("othername", "<unsupported>"), ("DNS", "b.example.org"), ("DNS", "a.example.org"))
    assert certificate_peer({"subjectAltName": alternatives}).id == "cert:dns:b.example.org"


@pytest.mark.parametrize("certificate", [{}, {"subject": ((("commonName", "alice@example.org"),),)}])
def test_a_common_name_is_no_name(certificate: dict[str, Any]) -> None:
    with pytest.raises(Unnamed):
        certificate_peer(certificate)


def test_so_many_names() -> None:
    assert len(names(*(("DNS", f"h{number}.example.org") for number in range(1000)))) == MAX_NAMES


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("alice@example.org", "email:alice@example.org"),
        ("*@Example.org", "email:*@example.org"),
        ("*.Example.org", "dns:*.example.org"),
        ("host", "dns:host"),
        ("spiffe://example.org/**", "uri:spiffe://example.org/**"),
        ("192.0.2.*", "ip:192.0.2.*"),
        ("2001:db8::1", "ip:2001:db8::1"),
        ("email:alice@example.org", "email:alice@example.org"),
        ("uri:email:x@example.org", "uri:email:x@example.org"),
        ("DNS:x", "uri:DNS:x"),
        ("**", "**"),
    ],
)
def test_how_a_rule_says_it(text: str, name: str) -> None:
    assert certificate_name(text) == name
    assert certificate_name(name) == name


@pytest.fixture
def matches() -> Callable[[str, tuple[str, str]], bool]:
    """Whether a rule's glob is about the owner of a certificate."""
    from execgate.gate.globs import Globs

    def match(rule: str, alternative: tuple[str, str]) -> bool:
        return any(
            map(Globs((certificate_name(rule),)).match, certificate_peer({"subjectAltName": [alternative]}).names)
        )

    return match


@pytest.mark.parametrize(
    ("rule", "owner", "impostors"),
    [
        (
            "*@example.org",
            ("email", "alice@example.org"),
            [
                ("URI", "x:y@example.org"),
                ("URI", "spiffe://y@example.org"),
                ("email", "alice@example.org.evil.example"),
            ],
        ),
        (
            "*.example.org",
            ("DNS", "ci.example.org"),
            [("email", "alice@evil.example.org"), ("URI", "x:evil.example.org"), ("DNS", "example.org")],
        ),
        (
            "spiffe://example.org/*",
            ("URI", "spiffe://example.org/ci"),
            [("email", "spiffe@example.org"), ("URI", "spiffe://example.org.evil.example/ci")],
        ),
        ("192.0.2.7", ("IP Address", "192.0.2.7"), [("DNS", "192.0.2.7"), ("URI", "ip:192.0.2.7")]),
        ("email:*@example.org", ("email", "a@example.org"), [("URI", "email:a@example.org")]),
    ],
)
def test_no_type_passes_for_another(
    matches: Callable[..., bool], rule: str, owner: tuple[str, str], impostors: list[tuple[str, str]]
) -> None:
    assert matches(rule, owner)
    for impostor in impostors:
        assert not matches(rule, impostor), impostor
