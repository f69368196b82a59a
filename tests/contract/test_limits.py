"""The bounds: how many sessions there may be, how many starts at once, and what is said to those who come too late."""

import contextlib
import select
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from contract.api import Api
from contract.document import Document
from contract.verbs import LIBPOD, force_remove, message, sent
from support.raw import (
    TIMEOUT,
    Answer,
)
from support.runtimes import RuntimeHost, TestContainer
from support.service import Service

NewApi = Callable[..., Api]


@pytest.fixture
def new_api(new_service: Callable[..., Service], document: Document) -> NewApi:
    """Start a service with these settings, given as its environment has them in lower case."""

    def start(**settings: object) -> Api:
        env = {f"EXECGATE_{name.upper()}": str(value) for name, value in settings.items()}
        return Api(new_service(env=env).socket, document)

    return start


def _create(api: Api, container: TestContainer, tree: str = "") -> Answer:
    return api.call("POST", f"{tree}/containers/{container.id}/exec", {"Cmd": ["sleep", "1000"]})


def _refused(response: Answer) -> str:
    assert response.status == 429, response
    assert int(response.headers["retry-after"]) >= 1
    return message(response)


def test_sessions_that_wait_for_their_start(new_api: NewApi, runc_container: TestContainer) -> None:
    api = new_api(max_created=2)
    first, second = (_create(api, runc_container).json["Id"] for _ in range(2))
    for tree in ("", LIBPOD):
        assert _refused(_create(api, runc_container, tree)) == (
            "2 exec sessions wait for their start already; try again later"
        )
    assert api.start_detached(first).status == 200  # one that was started does not wait any more
    third = _create(api, runc_container)
    assert third.status == 201
    assert _create(api, runc_container).status == 429
    force_remove(api, second)
    assert _create(api, runc_container).status == 201
    force_remove(api, first)


def test_sessions_in_one_container(new_api: NewApi, runc: RuntimeHost, runc_container: TestContainer) -> None:
    api = new_api(max_sessions_per_container=2)
    created, running = (_create(api, runc_container).json["Id"] for _ in range(2))
    assert api.start_detached(running).status == 200
    for tree in ("", LIBPOD):
        said = f"container {runc_container.id} has 2 exec sessions already; try again later"
        assert _refused(_create(api, runc_container, tree)) == said
    other = runc.run()
    assert _create(api, other).status == 201
    other.delete()
    api.call("POST", f"/exec/{running}/kill")  # what has ended does not count
    again = _create(api, runc_container)
    assert again.status == 201
    assert _create(api, runc_container).status == 429
    force_remove(api, created)
    assert _create(api, runc_container).status == 201


@pytest.fixture
def held(runc: RuntimeHost, tmp_path: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """A runtime whose execs wait until they are let go: what `runtimes` takes, and how."""
    gate, program = tmp_path / "open", tmp_path / "runc"
    wait = f'case " $* " in *" exec "*) until [ -e {gate} ]; do sleep 0.02; done;; esac'
    program.write_text(f'#!/bin/sh\n{wait}\nexec {runc.program} "$@"\n')
    program.chmod(0o755)
    yield f"runc={program}", gate.touch
    gate.touch()


@contextlib.contextmanager
def _starting(api: Api, container: TestContainer) -> Iterator[str]:
    """Yield a session whose start has its turn and does not come to its end."""
    session_id = api.create(container.id, "true")
    with (
        api.events(filters={"event": ["exec_start"]}) as events,
        sent(api, "POST", f"/exec/{session_id}/start", {"Detach": True}) as connection,
    ):
        assert next(events)["Actor"]["Attributes"]["execID"] == session_id
        yield session_id
        assert connection.read_answer().status == 200


def test_starts_at_once(new_api: NewApi, runc_container: TestContainer, held: tuple[str, Callable[[], None]]) -> None:
    runtimes, let_go = held
    api = new_api(parallel_starts=1, queued_starts=0, runtimes=runtimes)
    late = api.create(runc_container.id, "true", AttachStdout=True)
    with _starting(api, runc_container) as first:
        for tree in ("", LIBPOD):
            for body in ({"Detach": True}, {}):
                response = api.call("POST", f"{tree}/exec/{late}/start", body)
                assert _refused(response) == "0 starts are waiting already; try again later"
            assert _refused(api.call("POST", f"{tree}/containers/{runc_container.id}/exec/run", {"Cmd": ["true"]}))
        known = {one["ID"] for one in api.call("GET", "/exec/json").json}
        assert known == {first, late}, "a refused run leaves a session that nobody knows"
        let_go()
    with api.attach(late) as stream:  # it was not used up
        stream.read_raw()
    assert api.inspect(late)["ExitCode"] == 0


def test_starts_that_wait_for_their_turn(
    new_api: NewApi, runc_container: TestContainer, held: tuple[str, Callable[[], None]]
) -> None:
    runtimes, let_go = held
    api = new_api(parallel_starts=1, queued_starts=1, runtimes=runtimes)
    ids = [api.create(runc_container.id, "true") for _ in range(3)]
    with _starting(api, runc_container), contextlib.ExitStack() as stack:
        queued = [stack.enter_context(sent(api, "POST", f"/exec/{one}/start", {"Detach": True})) for one in ids]
        # Which of the three waits is the kernel's choice; the other two are told at once.
        pending = {connection.socket: connection for connection in queued}
        for _ in range(2):
            ready, _, _ = select.select(list(pending), [], [], TIMEOUT)
            refused = pending.pop(ready[0])
            assert _refused(refused.read_answer()) == "1 starts are waiting already; try again later"
        let_go()
        (waiting,) = pending.values()
        assert waiting.read_answer().status == 200
