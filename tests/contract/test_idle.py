"""A session that is idle is ended, and one that is not is left alone, by whatever way its bytes go."""

import threading
import time
from collections.abc import Callable

import pytest

from contract.api import Api
from contract.document import Document
from contract.verbs import begin, script, wait
from support.runtimes import TestContainer
from support.service import Service

IDLE = "idle for 1.5 seconds"


@pytest.mark.parametrize("tty", [False, True])
def test_an_idle_session_is_ended(api: Api, container: TestContainer, *, tty: bool) -> None:
    """As by its timeout: what was written is kept, and its own exit code; and it is said which of the two it was."""
    session_id = script(
        api,
        container,
        "trap 'exit 6' TERM; echo begun; sleep 1200 & wait",
        Tty=tty,
        IdleTimeout=1.5,
        CaptureStdout=True,
    )
    begun = time.monotonic()
    assert wait(api, session_id) == {"StatusCode": 6, "TimedOut": True, "Error": IDLE}
    assert time.monotonic() - begun > 1.0
    found = api.inspect(session_id)
    assert (found["ExitCode"], found["TimedOut"], found["Error"]) == (6, True, IDLE)
    assert b"begun" in api.call("GET", f"/exec/{session_id}/logs").body


def test_who_does_not_obey_is_killed(
    new_service: Callable[..., Service], document: Document, container: TestContainer
) -> None:
    api = Api(new_service(env={"EXECGATE_TIMEOUT_GRACE_SECONDS": "0.2"}).socket, document)
    session_id = script(api, container, 'trap "" TERM; (setsid sleep 1201 &); sleep 1202', IdleTimeout=1.5)
    assert wait(api, session_id) == {"StatusCode": 137, "TimedOut": True, "Error": IDLE}
    assert not any("120" in word for argv in container.processes().values() for word in argv)


def test_its_timeout_can_be_over_before(api: Api, container: TestContainer) -> None:
    session_id = begin(api, container, "sleep", "1203", Timeout=1.0, IdleTimeout=600)
    assert wait(api, session_id) == {"StatusCode": 143, "TimedOut": True, "Error": ""}


def test_output_that_nobody_asked_for_counts(api: Api, runc_container: TestContainer) -> None:
    talking = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do echo $i; sleep 0.5; done; exit 3"
    sessions = [script(api, runc_container, talking, IdleTimeout=4, Tty=tty) for tty in (False, True)]
    for session_id in sessions:
        assert wait(api, session_id) == {"StatusCode": 3, "TimedOut": False, "Error": ""}


def test_input_counts(api: Api, runc_container: TestContainer) -> None:
    """Of a process that never answers."""
    session_id = api.create_attached(runc_container.id, "sh", "-c", "cat >/dev/null; exit 3", IdleTimeout=4)
    with api.attach(session_id, Detach=False, Tty=False) as stream:
        for _ in range(12):
            time.sleep(0.5)
            stream.send(b"x")
        stream.half_close()
        assert stream.output() == (b"", b"")
    assert (stream.exit_code(), api.inspect(session_id)["TimedOut"]) == (3, False)


def test_what_the_kernel_moves_counts(api: Api, runc_container: TestContainer) -> None:
    """A slow reader of much output: each byte that he takes is one, though it was promised to him long before."""
    command = "head -c 8000000 /dev/zero; exit 3"
    session_id = api.create_attached(runc_container.id, "sh", "-c", command, IdleTimeout=4)
    with api.attach(session_id, Detach=False, Tty=False) as stream:
        slowly_until, size = time.monotonic() + 8, 0
        while data := stream.connection.read(50_000):
            size += len(data)
            if time.monotonic() < slowly_until:
                time.sleep(0.25)
    assert size > 8_000_000
    assert (stream.exit_code(), api.inspect(session_id)["TimedOut"]) == (3, False)


def test_a_reader_who_does_not_read_is_idle(api: Api, container: TestContainer) -> None:
    session_id = api.create_attached(container.id, "head", "-c", "8000000", "/dev/zero", IdleTimeout=1.5)
    with api.attach(session_id, Detach=False, Tty=False) as stream:
        ended = threading.Event()
        while not api.inspect(session_id)["TimedOut"]:
            assert not ended.wait(0.1)
        stream.finish()
    assert api.wait_stopped(session_id)["Error"] == IDLE
