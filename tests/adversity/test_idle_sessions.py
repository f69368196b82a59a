"""The idle timeout holds through crashes and reloads, which begin to count anew."""

from collections.abc import Callable

import pytest

from support.api import RawApi
from support.runtimes import TestContainer
from support.service import Service

NewService = Callable[..., Service]


@pytest.mark.parametrize("how", [Service.crash, Service.reload])
def test_the_next_service_goes_on(
    new_service: NewService, container: TestContainer, how: Callable[[Service], None]
) -> None:
    service = new_service()
    api = RawApi(service.socket)
    session = api.create(container.id, "sh", "-c", "trap 'exit 6' TERM; sleep 1210 & wait", IdleTimeout=3)
    assert api.start_detached(session).status == 200
    for _ in range(2):
        how(service)
    ended = api.wait_stopped(session)
    assert (ended["ExitCode"], ended["TimedOut"], ended["Error"]) == (6, True, "idle for 3 seconds")
    service.assert_clean_log()


@pytest.mark.parametrize("how", [Service.crash, Service.reload])
def test_an_end_that_was_begun(
    new_service: NewService, container: TestContainer, how: Callable[[Service], None]
) -> None:
    """The TERM was sent, and the service goes: the KILL comes from the next one, without another idle time."""
    service = new_service(env={"EXECGATE_TIMEOUT_GRACE_SECONDS": "3"})
    api = RawApi(service.socket)
    script = 'trap "touch /tmp/told" TERM; echo begun; while :; do sleep 0.1; done'
    told = container.rootfs / "tmp/told"
    session = api.create(container.id, "sh", "-c", script, IdleTimeout=2)
    assert api.start_detached(session).status == 200
    while not api.inspect(session)["TimedOut"]:
        pass
    how(service)
    found = api.inspect(session)
    assert (found["TimedOut"], found["Error"]) == (True, "idle for 2 seconds")
    ended = api.wait_stopped(session)
    assert (ended["ExitCode"], ended["TimedOut"], ended["Error"]) == (137, True, "idle for 2 seconds")
    told.unlink()
    service.assert_clean_log()
