"""What the contract's tests share: the judging client, and containers in every state."""

import os
import select
import shutil
from collections.abc import Callable, Iterator

import pytest

from contract.api import Api
from contract.document import Document
from support.raw import TIMEOUT
from support.runtimes import RuntimeHost, TestContainer
from support.service import Service


@pytest.fixture(scope="session")
def document() -> Document:
    """The document."""
    return Document.load()


@pytest.fixture(scope="session")
def api(service: Service, document: Document) -> Api:
    """The shared service."""
    return Api(service.socket, document)


@pytest.fixture(scope="session")
def stopped_container(runtime_host: RuntimeHost) -> TestContainer:
    """A container of each runtime in turn whose init has ended."""
    container = runtime_host.run()
    stop(container)
    return container


@pytest.fixture(scope="session")
def paused_container(runtime_host: RuntimeHost) -> Iterator[TestContainer]:
    """A container of each runtime in turn that is frozen."""
    container = runtime_host.run()
    container.pause()
    yield container
    container.resume()


@pytest.fixture
def recreate(new_container: Callable[..., TestContainer]) -> Callable[[TestContainer], TestContainer]:
    """Delete a container and make another one with the same id."""

    def make_again(container: TestContainer) -> TestContainer:
        container.delete()
        shutil.rmtree(container.bundle)
        return new_container(container.id)

    return make_again


def stop(container: TestContainer) -> None:
    """Kill a container and return once its init has ended."""
    init = os.pidfd_open(container.init_pid)
    try:
        container.kill()
        assert select.select([init], [], [], TIMEOUT)[0], f"{container.id} does not end"
    finally:
        os.close(init)


@pytest.fixture(scope="session")
def labelled_runc(runc: RuntimeHost) -> TestContainer:
    """A container that has labels and an image's name, for tests that are not about runtimes."""
    annotations = {"team": "shop", "empty": "", "org.opencontainers.image.ref.name": "busybox:1.36"}
    return runc.run(annotations=annotations)
