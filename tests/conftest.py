"""Fixtures that every test shares: real containers under both runtimes, the real service, its real clients.

A test that needs a root's powers fails without them; it does not skip. The one thing that may be missing is
crun, on a host whose cgroups it refuses; its tests are then skipped with the reason, which pytest prints.
"""

import asyncio
import contextlib
import itertools
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import aiodocker
import docker as docker_sdk  # type: ignore[import-untyped]
import hypothesis
import pytest
from podman import PodmanClient

from support.clients import Curl, DockerCli, PodmanRemote
from support.errors import HostError
from support.leaks import SharedContainer, assert_no_leaks, assert_nothing_stays, footprint
from support.runtimes import RuntimeHost, TestContainer, crun_host, runc_host
from support.service import Service
from support.tls_service import TlsService, tls_service

# How fast a machine draws examples, or runs one, is no property of the code: shared cores stall for seconds.
hypothesis.settings.register_profile(
    "execgate", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("execgate")

RUNTIMES = ("runc", "crun")
EVENT_LOOPS = ("auto", "asyncio", "uvloop")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--event-loop",
        choices=EVENT_LOOPS,
        default="auto",
        help="the event loop of the service and of the asynchronous tests (auto: uvloop when installed)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what it puts in the background with SIGINT ignored, and so would be every client of the tests.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "soak: minutes of load; `make test` runs it under one event loop only")


def pytest_report_header(config: pytest.Config) -> str:
    return f"execgate: event loop {config.getoption('--event-loop')}"


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run asynchronous tests on the event loop that the option names."""
    name = str(config.getoption("--event-loop"))
    return {name: _loop_factory(name)}


def _loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "asyncio":
        return asyncio.new_event_loop
    try:
        import uvloop
    except ImportError:
        if name == "uvloop":
            raise
        return asyncio.new_event_loop
    return uvloop.new_event_loop


@pytest.fixture(scope="session")
def event_loop_name(request: pytest.FixtureRequest) -> str:
    """What EXECGATE_EVENT_LOOP gets in this run."""
    return str(request.config.getoption("--event-loop"))


@pytest.fixture(scope="session")
def host_dir() -> Iterator[Path]:
    """A directory with a short name: the path of a unix socket ends at 107 bytes, and pytest's are long."""
    with tempfile.TemporaryDirectory(prefix="eg-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def runc(host_dir: Path) -> Iterator[RuntimeHost]:
    """Bare runc with a state root of its own."""
    host = runc_host(host_dir / "runc")
    yield host
    host.close()


@pytest.fixture(scope="session")
def crun(host_dir: Path) -> Iterator[RuntimeHost]:
    """Bare crun with a state root of its own; skips, with the reason, where crun cannot run."""
    try:
        host = crun_host(host_dir / "crun")
    except HostError as error:
        pytest.skip(f"crun cannot run here: {error}")
    yield host
    host.close()


@pytest.fixture(scope="session", params=RUNTIMES)
def runtime_host(request: pytest.FixtureRequest) -> RuntimeHost:
    """Each runtime in turn."""
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


@pytest.fixture(scope="session", params=RUNTIMES)
def container(request: pytest.FixtureRequest) -> TestContainer:
    """The shared container of each runtime in turn."""
    return request.getfixturevalue(f"{request.param}_container")  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def shared_containers() -> list[SharedContainer]:
    """The containers below that run so far."""
    return []


@pytest.fixture(scope="session")
def runc_container(runc: RuntimeHost, shared_containers: list[SharedContainer]) -> TestContainer:
    """A running container of runc that every test shares: leave it running, and nothing of yours in it."""
    container = runc.run()
    shared_containers.append(SharedContainer(container))
    return container


@pytest.fixture(scope="session")
def crun_container(crun: RuntimeHost, shared_containers: list[SharedContainer]) -> TestContainer:
    """A running container of crun that every test shares: leave it running, and nothing of yours in it."""
    container = crun.run()
    shared_containers.append(SharedContainer(container))
    return container


@pytest.fixture(autouse=True)
def nothing_stays(shared_containers: list[SharedContainer]) -> Iterator[None]:
    """Fail the test that leaves a process or a terminal in a container that others use after it.

    Being in use everywhere it is torn down last: what a test's own services end has ended by then.
    """
    before = [(container, container.look()) for container in shared_containers]
    yield
    for container, then in before:
        assert_nothing_stays(container, then)


@pytest.fixture
def new_container(runtime_host: RuntimeHost) -> Iterator[Callable[..., TestContainer]]:
    """Make containers of the test's own, under each runtime in turn: takes what `RuntimeHost.run` takes."""
    made: list[TestContainer] = []

    def make(*arguments: Any, **options: Any) -> TestContainer:
        made.append(runtime_host.run(*arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.delete()


@pytest.fixture(scope="session")
def hosts(runc: RuntimeHost, request: pytest.FixtureRequest) -> list[RuntimeHost]:
    """The runtimes that run on this machine: runc always, crun where it can."""
    try:
        return [runc, request.getfixturevalue("crun")]
    except pytest.skip.Exception:
        return [runc]


@pytest.fixture(scope="session")
def service(host_dir: Path, hosts: list[RuntimeHost], event_loop_name: str) -> Iterator[Service]:
    """The service that every test shares; at the end it must stop as promised, with a clean log."""
    running = Service.start(host_dir / "service", hosts, event_loop=event_loop_name)
    yield running
    running.stop()


@pytest.fixture
def new_service(host_dir: Path, hosts: list[RuntimeHost], event_loop_name: str) -> Iterator[Callable[..., Service]]:
    """Start services of the test's own: takes the options of `Service.start`, `directory` for a second life.

    Those that still run at the end of the test must stop as promised.
    """
    started: list[Service] = []

    def start(directory: Path | None = None, **options: Any) -> Service:
        where = directory or host_dir / f"service-{next(_SERIAL)}"
        started.append(Service.start(where, hosts, **{"event_loop": event_loop_name, **options}))
        return started[-1]

    yield start
    for one in reversed(started):
        if one.process.poll() is None:
            one.stop()
        else:
            one.kill()  # what this process has open for it


_SERIAL = itertools.count(1)


@pytest.fixture(scope="session")
def tls(host_dir: Path, hosts: list[RuntimeHost], event_loop_name: str) -> Iterator[TlsService]:
    """A service with TLS that every test shares; at the end it must stop as promised, with a clean log."""

    def start(directory: Path, **options: Any) -> Service:
        return Service.start(directory, hosts, event_loop=event_loop_name, **options)

    with tls_service(start, host_dir / "tls") as running:
        yield running
        running.service.stop()


@pytest.fixture
def new_tls(new_service: Callable[..., Service], host_dir: Path) -> Iterator[Callable[..., TlsService]]:
    """Start services with TLS of the test's own: takes the settings of `tls_service`."""
    with contextlib.ExitStack() as started:

        def start(**settings: str) -> TlsService:
            where = host_dir / f"tls-{next(_SERIAL)}"
            return started.enter_context(tls_service(new_service, where, **settings))

        yield start


@pytest.fixture
def no_leaks(service: Service) -> Iterator[None]:
    """Fail the test when the shared service holds more after it than before it."""
    before = footprint(service)
    yield
    assert_no_leaks(service, before)


@pytest.fixture(scope="session")
def docker(service: Service) -> DockerCli:
    """The docker CLI: `docker("exec", container.id, "true").returncode`."""
    return DockerCli.for_service(service)


@pytest.fixture(scope="session")
def podman(service: Service) -> PodmanRemote:
    """podman as a remote client: `podman("exec", container.id, "true").returncode`."""
    return PodmanRemote.for_service(service)


@pytest.fixture(scope="session")
def curl(service: Service) -> Curl:
    """curl: `curl("/_ping").stdout`."""
    return Curl.for_service(service)


@pytest.fixture
def docker_py(service: Service) -> Iterator[docker_sdk.DockerClient]:
    """A docker-py client."""
    client = docker_sdk.DockerClient(base_url=service.host, timeout=60)
    yield client
    client.close()


@pytest.fixture
def podman_py(service: Service) -> Iterator[PodmanClient]:
    """A podman-py client."""
    with PodmanClient(base_url=service.host, timeout=60) as client:
        yield client


@pytest.fixture
async def aio_docker(service: Service) -> AsyncIterator[aiodocker.Docker]:
    """An aiodocker client."""
    async with aiodocker.Docker(url=service.host) as client:
        yield client
