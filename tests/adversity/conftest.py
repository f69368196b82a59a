"""What must hold after every fault, as fixtures."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.access import allow
from support.api import RawApi
from support.runtimes import TestContainer
from support.service import Service
from support.unharmed import Watched, WatchedServices, unharmed_service


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
def watched_service(new_service: Callable[..., Service], runc_container: TestContainer) -> Iterator[WatchedServices]:
    """Start services that must not be harmed: `new_service`, with what `unharmed_service` demands at the end."""
    with contextlib.ExitStack() as checks:
        yield WatchedServices(new_service, runc_container, checks)


@pytest.fixture
def tcp_api(new_service: Callable[..., Service], host_dir: Path) -> RawApi:
    """A service of the test's own, over TCP."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    directory = host_dir / "tcp"
    listen = [f"--listen=unix://{directory}/execgate.sock", f"--listen=tcp://127.0.0.1:{port}"]
    headers = allow(directory, "tcp", ["token:tcp"])
    new_service(directory, flags=listen)
    return RawApi(("127.0.0.1", port), headers=headers)
