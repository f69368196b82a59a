"""A service with TLS, what it is certified with, and who may do what there."""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.access import EVERYTHING, bearer, rule, write_policy
from support.service import Service
from support.tls import Authority, Identity, TlsTarget


@dataclass(frozen=True, slots=True)
class TlsService:
    """A running service that listens on its unix socket and, with TLS, on a port of 127.0.0.1.

    `authority` has certified it and its clients; `server` is its own certificate, `client` that of its usual client,
    alice@example.org. Who may do what there is decided in one place, `tls_service` below.
    """

    service: Service
    port: int
    authority: Authority
    server: Identity
    client: Identity

    def token(self) -> dict[str, str]:
        """Return the header that shows a new bearer token of `ci`."""
        return bearer(self.service.directory, "ci")

    def target(self, identity: Identity | None = None, **fields: Any) -> TlsTarget:
        """Return its address for `support.raw` and `support.api`, as seen by a client: its usual one."""
        return TlsTarget(self.port, self.authority.ca, identity or self.client, **fields)

    def stranger(self, **fields: Any) -> TlsTarget:
        """Return its address for a client without a certificate."""
        return TlsTarget(self.port, self.authority.ca, None, **fields)

    @property
    def address(self) -> str:
        """What `execgate -H` takes."""
        return f"tls://127.0.0.1:{self.port}"

    @property
    def docker_host(self) -> str:
        """What DOCKER_HOST takes."""
        return f"tcp://127.0.0.1:{self.port}"


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


EVERYBODY = ["uid:0", "cert:*@example.org", "cert:dns:*.example.org", "token:ci"]
"""Who may do all with a service of `tls_service`: root at its socket, and clients of its authority."""


@contextlib.contextmanager
def tls_service(start: Callable[..., Service], directory: Path, **settings: str) -> Iterator[TlsService]:
    """Have `start` (`new_service`, `Service.start`) start a service with TLS in `directory`, and its own authority.

    Its policy lets EVERYBODY do all. `settings` are further keys of its configuration, `tls_minimum="1.2"`; "" takes
    one out.
    """
    directory.mkdir(parents=True, exist_ok=True)
    authority = Authority.make(directory / "pki")
    server = authority.server("server", "localhost", "127.0.0.1")
    client = authority.client("alice", "alice@example.org", "spiffe://example.org/alice")
    port = free_port()
    chosen = {
        "tls_certificate": str(server.certificate),
        "tls_key": str(server.key),
        "tls_client_ca": str(authority.ca),
    } | settings
    write_policy(directory, rule("all", EVERYBODY, **EVERYTHING))
    env = {f"EXECGATE_{name.upper()}": value for name, value in chosen.items() if value}
    flags = [f"--listen=unix://{directory}/execgate.sock", f"--listen=tls://127.0.0.1:{port}"]
    service = start(directory, flags=flags, env=env)
    yield TlsService(service, port, authority, server, client)


def await_log(service: Service, text: str, *, timeout: float = 10.0) -> str:
    """Return the line of a service's log that has `text`, once it is there: a file has no event."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        for line in service.log().splitlines():
            if text in line:
                return line
        time.sleep(0.02)
    raise AssertionError(f"nothing in the log says {text!r}:\n{service.log()}")
