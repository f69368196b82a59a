"""What must hold after every fault, whatever it was."""

import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from support.api import RawApi
from support.faults import fifo
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
    service: Service, bystander: TestContainer, *, dies: Literal["", "worker", "service"] = "", **fields: Any
) -> Iterator[Watched]:
    """Hold a service to the promises that survive every fault.

    A session of `bystander`, created with `fields`, runs all along and must notice nothing. If the worker `dies`, its
    client attaches again; if the keeper does with it, and so the session's stdin, it has no client. At the end there
    are no more descriptors, processes or directories than before, memory is bounded, and the log shows no traceback.
    """
    watched = Watched(service)
    assert RawApi(service.socket).call("GET", "/_ping").status == 200
    before, memory, logged = footprint(service), resident_bytes(service), len(service.log())
    with (_without_client if dies == "service" else _with_client)(watched, bystander, dies == "worker", fields):
        yield watched
    service = watched.service
    assert_no_leaks(service, before)
    grown = resident_bytes(service) - memory
    assert grown < MEMORY_BOUND, f"the service grew by {grown >> 20} MiB"
    log = service.log()[logged:]
    signs = ("Traceback", "was never", "was destroyed")
    assert not any(sign in log for sign in signs), f"the service logged:\n{log}"


@contextlib.contextmanager
def _with_client(
    watched: Watched, bystander: TestContainer, comes_back: bool, fields: Mapping[str, Any]
) -> Iterator[None]:
    api = RawApi(watched.service.socket)
    if comes_back:
        fields = {**fields, "OnDisconnect": "keep"}
    with contextlib.ExitStack() as streams:
        control = streams.enter_context(api.open(bystander.id, "cat", stdin=True, **fields))
        assert control.echo(b"before\n") == b"before\n"
        yield
        if comes_back:
            control = streams.enter_context(api.reattach(control.id))
        assert control.echo(b"after\n") == b"after\n"
        control.half_close()
        assert control.finish() == (b"", b"")
        assert control.exit_code() == 0


@contextlib.contextmanager
def _without_client(
    watched: Watched, bystander: TestContainer, _comes_back: bool, fields: Mapping[str, Any]
) -> Iterator[None]:
    with fifo(bystander, "bystander") as end:
        api = RawApi(watched.service.socket)
        session = api.create(bystander.id, "sh", "-c", "read line < /tmp/bystander; exit 42", **fields)
        assert api.start_detached(session).status == 200
        pid = api.inspect(session)["Pid"]
        yield
        api = RawApi(watched.service.socket)
        assert api.inspect(session)["Pid"] == pid
        end()
        assert api.wait_stopped(session)["ExitCode"] == 42


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
