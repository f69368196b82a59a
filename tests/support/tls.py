"""TLS for tests: an authority made as the documentation says, and a client by hand.

The client is Python's own TLS over memory, as the service's is, but written apart from it and blocking; where it would
hide a mistake that both make, a test uses openssl, curl or the docker CLI.
"""

import contextlib
import os
import select
import socket
import ssl
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

TIMEOUT = 30.0
_SCRIPT = Path(__file__).parents[2] / "deploy/certs.sh"
_RECEIVE = 256 * 1024


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate, its key, and the authority that it trusts: a directory as Docker's clients take it."""

    directory: Path

    @property
    def ca(self) -> Path:
        return self.directory / "ca.pem"

    @property
    def certificate(self) -> Path:
        return self.directory / "cert.pem"

    @property
    def key(self) -> Path:
        return self.directory / "key.pem"


@dataclass(frozen=True, slots=True)
class Authority:
    """What signs certificates."""

    directory: Path

    @classmethod
    def make(cls, directory: Path) -> "Authority":
        """Make a new one."""
        _run("ca", directory)
        return cls(directory)

    @property
    def ca(self) -> Path:
        """Its certificate."""
        return self.directory / "ca.pem"

    def server(self, name: str, *names: str, days: int | None = None) -> Identity:
        """Certify a service that is reached under these names; the same `name` again replaces the files."""
        _run("server", self.directory, name, *names, days=days)
        return Identity(self.directory / name)

    def client(self, name: str, *names: str, days: int | None = None) -> Identity:
        """Certify a client of these names; with negative `days` it was valid, and is not any more."""
        _run("client", self.directory, name, *names, days=days)
        return Identity(self.directory / name)

    def unnamed_client(self, name: str, extensions: str = "") -> Identity:
        """Certify a client with just these lines of extensions: none that Docker's guide does not have."""
        where = self.directory / name
        where.mkdir()
        found = Identity(where)
        found.ca.write_bytes(self.ca.read_bytes())
        request = where / "request.pem"
        _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", found.key)
        _openssl("req", "-new", "-key", found.key, "-subj", f"/CN={name}", "-out", request)
        (where / "extensions").write_text(f"extendedKeyUsage = clientAuth\n{extensions}\n")
        signed_by: list[str | Path] = ["-CA", self.ca, "-CAkey", self.directory / "ca-key.pem", "-CAcreateserial"]
        signs: list[str | Path] = ["-in", request, "-out", found.certificate, "-extfile", where / "extensions"]
        _openssl("x509", "-req", "-days", "2", *signed_by, *signs)
        return found


def _run(what: str, directory: Path, *names: str, days: int | None = None) -> None:
    env = {**os.environ} if days is None else {**os.environ, "DAYS": str(days)}
    subprocess.run([str(_SCRIPT), what, str(directory), *names], check=True, env=env, stdin=subprocess.DEVNULL)


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, stdin=subprocess.DEVNULL)


@dataclass(frozen=True, slots=True)
class TlsTarget:
    """A service's TLS address, and who asks there. `ca` is whom the client trusts."""

    port: int
    ca: Path
    identity: Identity | None
    version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3

    @property
    def context(self) -> ssl.SSLContext:
        """What a client's library is configured with."""
        context = ssl.create_default_context(cafile=self.ca)
        context.minimum_version = context.maximum_version = self.version
        if self.identity is not None:
            context.load_cert_chain(self.identity.certificate, self.identity.key)
        return context

    def connect(self, timeout: float = TIMEOUT) -> "TlsSocket":
        """Connect, and shake hands. ssl.SSLError, ConnectionError."""
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.settimeout(timeout)
        try:
            return TlsSocket(connection, self.context)
        except BaseException:
            connection.close()
            raise


class Truncated(ConnectionError):
    """The connection has ended without a close_notify."""


class TlsSocket:
    """A socket for `support.raw`, with TLS: `shutdown(SHUT_WR)` is a close_notify, after which it can still be read."""

    def __init__(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        self.tcp = connection
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._in, self._out, server_hostname="127.0.0.1")
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._push()
                self._pull()
        self._push()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def settimeout(self, seconds: float) -> None:
        self.tcp.settimeout(seconds)

    def fileno(self) -> int:
        return self.tcp.fileno()

    def sendall(self, data: bytes) -> None:
        self.tls.write(data)
        self._push()

    def send(self, data: bytes, _flags: int = 0) -> int:
        """Send it whole: the next one may not be taken, see `select`."""
        self.sendall(data)
        return len(data)

    def records(self, data: bytes) -> bytes:
        """Return what would go over the wire, for a test that sends it in its own way: with `tcp`."""
        self.tls.write(data)
        return self._out.read()

    def recv(self, size: int = _RECEIVE) -> bytes:
        """Return what comes; b"" at the close_notify. Truncated when the connection ends without."""
        while True:
            try:
                return self.tls.read(size)
            except ssl.SSLWantReadError:
                self._push()
                self._pull()
            except ssl.SSLZeroReturnError:
                return b""

    def shutdown(self, _how: int) -> None:
        """Say that nothing more will be sent."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        self._push()

    def close(self) -> None:
        """Hang up: no close_notify."""
        self.tcp.close()

    def reset(self) -> None:
        """Break it off."""
        self.tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.tcp.close()

    def send_until_blocked(self, piece: bytes, *, patience: float, most: int) -> int:
        """Send until nothing more is taken for `patience` seconds, and return how much was; the rest stays unsent."""
        sent = 0
        rest = memoryview(b"")
        while sent < most and select.select([], [self.tcp], [], patience)[1]:
            if not rest:
                rest = memoryview(self.records(piece))
                sent += len(piece)
            rest = rest[self.tcp.send(rest, socket.MSG_DONTWAIT) :]
        return sent

    def _push(self) -> None:
        if data := self._out.read():
            self.tcp.sendall(data)

    def _pull(self) -> None:
        data = self.tcp.recv(_RECEIVE)
        if not data:
            raise Truncated("the connection ended without a close_notify")
        self._in.write(data)
