"""What must hold after every fault, whatever it was."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.api import RawApi
from support.leaks import assert_no_leaks, footprint, resident_bytes
from support.runtimes import TestContainer
from support.service import Service

MEMORY_BOUND = 64 * 1024 * 1024
"""Bytes by which a service may have grown after any of this (reliability: "within 64 MB")."""


@dataclass(slots=True)
class Watched:
    """Who is held to it: a test that starts the service anew on its directory says so here."""

    service: Service


@contextlib.contextmanager
def unharmed_service(
    service: Service, bystander: TestContainer, *, worker_dies: bool = False, **fields: Any
) -> Iterator[Watched]:
    """Hold a service to the promises that survive every fault.

    A session of `bystander`, created with `fields`, runs all along and must notice nothing; with `worker_dies` its
    client may lose its connection, and attaches again. At the end there are no more descriptors, processes or
    directories than before, memory is bounded, and the log shows no traceback.
    """
    api, watched = RawApi(service.socket), Watched(service)
    assert api.call("GET", "/_ping").status == 200
    before, memory, logged = footprint(service), resident_bytes(service), len(service.log())
    if worker_dies:
        fields["OnDisconnect"] = "keep"
    with contextlib.ExitStack() as streams:
        control = streams.enter_context(api.open(bystander.id, "cat", stdin=True, **fields))
        assert control.echo(b"before\n") == b"before\n"
        yield watched
        if worker_dies:
            control = streams.enter_context(api.reattach(control.id))
        assert control.echo(b"after\n") == b"after\n"
        control.half_close()
        assert control.finish() == (b"", b"")
        assert control.exit_code() == 0
    service = watched.service
    assert_no_leaks(service, before)
    grown = resident_bytes(service) - memory
    assert grown < MEMORY_BOUND, f"the service grew by {grown >> 20} MiB"
    log = service.log()[logged:]
    signs = ("Traceback", "was never", "was destroyed")
    assert not any(sign in log for sign in signs), f"the service logged:\n{log}"


@pytest.fixture
def unharmed(service: Service, runc_container: TestContainer) -> Iterator[None]:
    """`unharmed_service` around the whole test, for the shared service."""
    with unharmed_service(service, runc_container):
        yield


@pytest.fixture
def api(service: Service) -> RawApi:
    """The shared service over its unix socket."""
    return RawApi(service.socket)


@pytest.fixture
def keep_unharmed() -> Callable[..., contextlib.AbstractContextManager[Watched]]:
    """`unharmed_service`, for a service of the test's own."""
    return unharmed_service


@pytest.fixture
def tcp_api(new_service: Callable[..., Service], host_dir: Path) -> RawApi:
    """A service of the test's own, over TCP."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    directory = host_dir / "tcp"
    listen = [f"--listen=unix://{directory}/execgate.sock", f"--listen=tcp://127.0.0.1:{port}"]
    new_service(directory, flags=listen)
    return RawApi(("127.0.0.1", port))
