"""Where the service listens: the sockets it makes, the ones it finds, and the ones it is given."""

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from execgate.http import listeners
from execgate.http.listeners import (
    Address,
    open_listener,
    parse_address,
    remove_socket_file,
    socket_identity,
)
from execgate.model.errors import Conflict, InvalidArgument, Unavailable


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="eg-", dir="/tmp") as directory:
        yield Path(directory) / "s.sock"


def open_unix(path: Path, mode: int = 0o660, group: str = "") -> socket.socket:
    return open_listener(Address(path=path), mode=mode, group=group)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:///run/x.sock", Address(path=Path("/run/x.sock"))),
        ("tcp://127.0.0.1:2375", Address(host="127.0.0.1", port=2375)),
        ("tcp://localhost:0", Address(host="localhost", port=0)),
        ("tcp://[::1]:80", Address(host="::1", port=80)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["", "unix", "unix:", "unix://", "/run/x.sock", "http://x", "tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:", "tcp://:2375",
     "tcp://127.0.0.1:65536", "tcp://127.0.0.1:-1", "tcp://127.0.0.1:²", "tcp://127.0.0.1:1/", "unix:///" + "x" * 107],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|longer"):
        parse_address(text)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.168.0.1", "example.org", "127.0.0.1.example.org", "*"])
def test_only_loopback(host: str) -> None:
    with pytest.raises(ValueError, match="only loopback"):
        parse_address(f"tcp://{host}:2375")


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_permissions_whatever_the_umask(path: Path, mode: int) -> None:
    before = os.umask(0o077)
    try:
        with open_unix(path, mode):
            assert stat.S_IMODE(path.stat().st_mode) == mode
            assert os.umask(0o077) == 0o077, "the umask was not put back"
    finally:
        os.umask(before)


def test_the_group(path: Path) -> None:
    with open_unix(path, group=str(os.getgid())):
        assert path.stat().st_gid == os.getgid()
    path.unlink()
    with pytest.raises(InvalidArgument, match="no-such-group"):
        open_unix(path, group="no-such-group")


def test_it_is_not_inherited_and_does_not_block(path: Path) -> None:
    with open_unix(path) as listener:
        assert not listener.get_inheritable()
        assert not listener.getblocking()


def test_a_stale_file_is_replaced(path: Path) -> None:
    open_unix(path).close()
    assert path.is_socket()
    before = socket_identity(path)
    with open_unix(path):
        assert socket_identity(path) != before or path.is_socket()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_a_live_one_is_respected(path: Path) -> None:
    with open_unix(path):
        before = socket_identity(path)
        with pytest.raises(Conflict, match="served by another process"):
            open_unix(path)
        assert socket_identity(path) == before


def test_one_with_a_full_backlog_lives(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "_PROBE_TIMEOUT", 0.05)
    with (
        socket.socket(socket.AF_UNIX) as server,
        socket.socket(socket.AF_UNIX) as first,
        socket.socket(socket.AF_UNIX) as second,
    ):
        server.bind(str(path))
        server.listen(0)
        first.connect(str(path))
        second.setblocking(False)
        second.connect_ex(str(path))
        with pytest.raises(Conflict):
            open_unix(path)
    assert path.is_socket()


@pytest.mark.parametrize("kind", ["file", "directory", "link", "fifo"])
def test_other_files_are_left_alone(path: Path, kind: str) -> None:
    match kind:
        case "file":
            path.write_text("x")
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to("nowhere")
        case _:
            os.mkfifo(path)
    before = path.lstat()
    with pytest.raises(Conflict):
        open_unix(path)
    assert path.lstat() == before


def test_directories_are_made(path: Path) -> None:
    with open_unix(path.parent / "a/b/s.sock"):
        assert (path.parent / "a/b/s.sock").is_socket()


def test_a_directory_that_cannot_be(path: Path) -> None:
    path.write_text("in the way")
    with pytest.raises(Unavailable):
        open_unix(path / "s.sock")


def test_only_the_own_file_is_removed(path: Path) -> None:
    with open_unix(path):
        identity = socket_identity(path)
    remove_socket_file(path, None)
    assert path.exists()
    path.rename(path.with_suffix(".old"))
    with open_unix(path):
        remove_socket_file(path, identity)
        assert path.is_socket(), "another service's file was removed"
    path.unlink()
    remove_socket_file(path, identity)
    path.with_suffix(".old").rename(path)
    remove_socket_file(path, identity)
    assert not path.exists()


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(Conflict, match="in use"):
            open_listener(Address(host="127.0.0.1", port=taken.getsockname()[1]), mode=0o600, group="")
