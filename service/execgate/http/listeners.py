"""Where the service listens: addresses, unix sockets (stale ones are replaced, live ones respected), inherited ones."""

import errno
import grp
import ipaddress
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from execgate.model.errors import Conflict, InvalidArgument, Unavailable

BACKLOG = 1024
_SUN_PATH_MAX = 107
LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""The hosts that plain TCP, and so a token without TLS, is for."""
_PROBE_TIMEOUT = 1.0


@dataclass(frozen=True, slots=True)
class Address:
    """A unix socket's path, or a TCP host and port, with or without TLS."""

    path: Path | None = None
    host: str = ""
    port: int = 0
    tls: bool = False

    def __str__(self) -> str:
        if self.path:
            return f"unix://{self.path}"
        host = f"[{self.host}]" if self.tls and ":" in self.host else self.host
        return f"{'tls' if self.tls else 'tcp'}://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket, and whether TLS is spoken on it."""

    socket: socket.socket
    tls: bool = False

    def __str__(self) -> str:
        name = self.socket.getsockname()
        return f"unix://{name}" if isinstance(name, str) else str(Address(host=name[0], port=name[1], tls=self.tls))


def parse_address(text: str) -> Address:
    """Parse `unix:///PATH`, `tls://HOST:PORT` or `tcp://HOST:PORT`. ValueError says what is wrong."""
    scheme, separator, rest = text.partition("://")
    if scheme == "unix" and separator and rest:
        path = Path(rest).expanduser().absolute()
        if len(os.fsencode(path)) > _SUN_PATH_MAX:
            raise ValueError(f"{text}: the path is longer than the {_SUN_PATH_MAX} bytes that a unix socket allows")
        return Address(path=path)
    host, colon, port = rest.rpartition(":")
    if scheme in ("tcp", "tls") and host and colon and port.isascii() and port.isdigit() and int(port) < 65536:
        host = host.removeprefix("[").removesuffix("]")
        if scheme == "tcp" and host not in LOOPBACK:
            raise ValueError(
                f"{text}: only loopback addresses; whoever reaches this port can run commands as root. "
                "Others are for tls://"
            )
        return Address(host=host, port=int(port), tls=scheme == "tls")
    raise ValueError(f"{text}: expected unix:///PATH, tls://HOST:PORT or tcp://127.0.0.1:PORT")


def open_listener(address: Address, *, mode: int, group: str) -> socket.socket:
    """Return a listening socket. Conflict when somebody serves there already; Unavailable, InvalidArgument."""
    try:
        return _open_unix(address.path, mode, group) if address.path else _open_tcp(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Conflict(f"{address} is in use by another process") from error
        raise Unavailable(f"cannot listen on {address}: {error.strerror}") from error


def adopt_listener(fd: int) -> socket.socket:
    """Return the listening socket of a descriptor that somebody else has opened. Unavailable when it is none."""
    try:
        found = socket.socket(fileno=fd)
    except OSError as error:
        raise Unavailable(f"cannot listen on inherited descriptor {fd}: {error.strerror}") from error
    found.setblocking(False)
    return found


def adopt_activated(fd: int, *, tls: bool) -> Listener:
    """Return the listener that the service manager has opened; on one of TCP TLS is spoken if there is `tls`.

    InvalidArgument: without TLS others than this host could reach it, as no address that is configured lets them.
    Unavailable.
    """
    found = adopt_listener(fd)
    if found.family == socket.AF_UNIX:
        return Listener(found)
    name = found.getsockname()
    if not tls and not _is_loopback(name[0] if isinstance(name, tuple) else name):
        found.close()
        raise InvalidArgument(
            f"the socket of the service manager listens on {name}: without TLS it must be a loopback address",
            hint="set tls_certificate and tls_key, or ListenStream=127.0.0.1:PORT",
        )
    return Listener(found, tls=tls)


def _is_loopback(host: object) -> bool:
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:  # of another family
        return False


def adopt_unix_listener(fd: int, path: Path, *, mode: int, group: str) -> socket.socket | None:
    """Return the listening socket that an earlier service has opened at `path`; None when the path is no longer its.

    Its file gets the permissions that are configured now.
    """
    found = adopt_listener(fd)
    if socket_identity(path) is None:
        found.close()
        return None
    _permit(path, mode, group)
    return found


def remove_socket_file(path: Path, identity: tuple[int, int] | None) -> None:
    """Remove the file of a unix socket that is no longer served, unless somebody else's stands there by now."""
    if identity is not None and socket_identity(path) == identity:
        path.unlink(missing_ok=True)


def socket_identity(path: Path) -> tuple[int, int] | None:
    """Return (device, inode) of a socket file, or None when there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else None


def _open_unix(path: Path, mode: int, group: str) -> socket.socket:
    _clear_stale(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _listening(socket.AF_UNIX) as listener:
        # bind creates the file with the umask's mode: closed first, opened when owner and mode are right.
        before = os.umask(0o177)
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(before)
        _permit(path, mode, group)
    return listener


def _permit(path: Path, mode: int, group: str) -> None:
    if group:
        os.chown(path, -1, _gid(group))
    path.chmod(mode)


def _clear_stale(path: Path) -> None:
    """Remove a socket file that nobody serves. Conflict when somebody does, or when it is something else."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise Conflict(f"{path} exists and is no socket", hint="remove it, or listen somewhere else")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_TIMEOUT)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except OSError:  # EAGAIN: its backlog is full, so it lives
            pass
    raise Conflict(f"{path} is served by another process")


def _open_tcp(address: Address) -> socket.socket:
    family, _, _, _, name = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
    with _listening(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(name)
    return listener


@contextmanager
def _listening(family: socket.AddressFamily) -> Iterator[socket.socket]:
    """Give out a stream socket to be bound; it listens afterwards, or is closed if anything fails."""
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        yield listener
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise


def _gid(group: str) -> int:
    try:
        return int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise InvalidArgument(f"there is no group {group!r} for the socket") from error
