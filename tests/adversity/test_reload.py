"""What a graceful reload costs those whose answers are still to come, or have begun: nothing."""

import base64
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.api import OUTPUT, RawApi
from support.faults import faulty_runtime, fifo
from support.raw import Answer, Connection, request_bytes
from support.runtimes import RuntimeHost, TestContainer
from support.service import Service

NewService = Callable[..., Service]

_SLOW = 'while [ -e "$MARK" ]; do sleep 0.05; done\nexec "$REAL" "$@"'
"""An exec takes as long as the mark is there."""


def run_answer(answer: Answer) -> tuple[int, bytes, bytes]:
    assert answer.status == 200, answer
    found = answer.json
    assert found["Encoding"] == "base64"
    assert not found["Truncated"]
    return found["ExitCode"], base64.b64decode(found["Stdout"]), base64.b64decode(found["Stderr"])


def running(api: RawApi) -> list[str]:
    """The sessions that run."""
    return [one["ID"] for one in api.call("GET", "/exec/json").json if one["Running"]]


def await_running(api: RawApi, count: int) -> list[str]:
    while len(found := running(api)) < count:
        time.sleep(0.01)
    return found


def test_a_run_gets_its_answer(new_service: NewService, container: TestContainer) -> None:
    """Input that is not read yet, output of before and after, and the exit code: through three services."""
    service = new_service()
    api = RawApi(service.socket)
    data = random.Random(1).randbytes(600_000)  # more than a pipe holds
    script = "echo begun; echo error >&2; while [ ! -e /tmp/go ]; do sleep 0.05; done; rm /tmp/go; cat; exit 7"
    body = {
        "Cmd": ["sh", "-c", script],
        "Stdin": base64.b64encode(data).decode(),
        "Encoding": "base64",
    }
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(api.call, "POST", f"/containers/{container.id}/exec/run", body)
        (session,) = await_running(api, 1)
        service.reload()
        service.reload()
        assert running(api) == [session]
        (container.rootfs / "tmp/go").touch()
        assert run_answer(answer.result()) == (7, b"begun\n" + data, b"error\n")
    assert answer.result().json["Id"] == session
    service.assert_clean_log()


def test_runs_under_reloads(new_service: NewService, runc_container: TestContainer) -> None:
    """Whatever a run is about when a reload comes: each one has its one answer, and was run once."""
    service = new_service()
    api = RawApi(service.socket)
    over = threading.Event()
    log = runc_container.rootfs / "tmp/runs-under-reloads"
    log.write_bytes(b"")

    def client(name: int) -> int:
        done = 0
        while not over.is_set():
            script = (
                f"echo {name}.{done} >>/tmp/runs-under-reloads; cat; sleep 0.1; echo {name}.{done}; exit {done % 100}"
            )
            body = {"Cmd": ["sh", "-c", script], "Stdin": "in ", "Timeout": 60}
            found = api.call("POST", f"/containers/{runc_container.id}/exec/run", body)
            assert found.status == 200, found
            assert (found.json["ExitCode"], found.json["Stdout"]) == (done % 100, f"in {name}.{done}\n")
            done += 1
        return done

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, name) for name in range(4)]
        try:
            for _ in range(6):
                time.sleep(0.3)  # they are somewhere in the midst, wherever that is
                service.reload()
        finally:
            over.set()
        counts = [one.result() for one in clients]
    expected = {f"{name}.{number}" for name, count in enumerate(counts) for number in range(count)}
    lines = log.read_text().split()
    log.unlink()
    assert len(lines) == len(expected)
    assert set(lines) == expected
    service.assert_clean_log()


@pytest.mark.parametrize("captured", [True, False])
def test_output_of_a_session_that_is_over(
    new_service: NewService, runc_container: TestContainer, captured: bool
) -> None:
    """Whoever still reads it, from what was captured or from what is remembered for him, reads it to its end."""
    service = new_service()
    api = RawApi(service.socket)
    size = 5_000_000 if captured else 700_000  # more than the connection takes, and no more than is remembered
    with fifo(runc_container, "over") as go:
        script = f"read line </tmp/over; head -c {size} /dev/zero"
        session = api.create(
            runc_container.id, "sh", "-c", script, CaptureStdout=captured, OnDisconnect="keep", **OUTPUT
        )
        assert api.start_detached(session).status == 200
        with api.reattach(session) as stream, api.reattach(session) as other:
            go()
            api.wait_stopped(session)
            replay = api.reattach(session, after=0) if captured else other
            service.reload()
            service.reload()
            for one in (stream, other, replay) if captured else (stream, other):
                with one:
                    assert one.output() == (bytes(size), b"")
    service.assert_clean_log()


def test_connections_that_are_made_just_then(new_service: NewService) -> None:
    """One that is accepted in the moment of a reload is served like any other, by whichever service."""
    service = new_service()
    api = RawApi(service.socket)
    over = threading.Event()

    def ask() -> int:
        asked = 0
        while not over.is_set():
            assert api.call("GET", "/_ping").status == 200
            asked += 1
        return asked

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(ask) for _ in range(4)]
        try:
            for _ in range(10):
                time.sleep(0.1)
                service.reload()
        finally:
            over.set()
        assert all(one.result() for one in clients)
    service.assert_clean_log()


def test_a_client_of_a_run_that_leaves_later(new_service: NewService, runc_container: TestContainer) -> None:
    """It takes the process with it, in the next service too."""
    service = new_service()
    api = RawApi(service.socket)
    with api.connect() as connection:
        body = {"Cmd": ["sleep", "600"]}
        connection.send(request_bytes("POST", f"/containers/{runc_container.id}/exec/run", body))
        (session,) = await_running(api, 1)
        service.reload()
        assert running(api) == [session]
    deadline = time.monotonic() + 20
    while api.call("GET", f"/exec/{session}/json").status != 404:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("fails", [False, True])
def test_a_slow_detached_start(
    new_service: NewService, runc: RuntimeHost, runc_container: TestContainer, host_dir: Path, fails: bool
) -> None:
    """It is answered by the next service, with what became of it; a second start of the same session is refused."""
    name = f"slow-{fails}"
    mark = host_dir / f"{name}-mark"
    mark.touch()
    faulty = faulty_runtime(runc, host_dir / name, "runc", f"MARK={mark}; {_SLOW}")
    service = new_service(flags=[f"--runtime=runc={faulty.program}"])
    api = RawApi(service.socket)
    session = api.create(runc_container.id, *(["nosuch"] if fails else ["sh", "-c", "exit 8"]))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(api.start_detached, session)
        await_running(api, 1)
        service.reload()
        assert not answer.done()
        assert api.start_detached(session).status == 409
        mark.unlink()
        if fails:
            assert answer.result().status == 400
            assert "nosuch" in answer.result().message
        else:
            assert answer.result().status == 200
    assert api.wait_stopped(session)["ExitCode"] == (127 if fails else 8)
    service.assert_clean_log()


def test_a_stop_that_is_over_when_the_next_service_comes(
    new_service: NewService, runc_container: TestContainer
) -> None:
    service = new_service()
    api = RawApi(service.socket)
    script = "trap 'echo asked; sleep 1; exit 4' TERM; echo begun; while :; do sleep 0.05; done"
    session = api.create(runc_container.id, "sh", "-c", script, CaptureStdout=True)
    assert api.start_detached(session).status == 200
    with ThreadPoolExecutor(1) as pool, follow(api, session) as following:
        pieces = payloads(following)
        assert next(pieces) == b"begun\n"
        answer = pool.submit(api.call, "POST", f"/exec/{session}/stop?t=20")
        assert next(pieces) == b"asked\n"
        service.reload()
        assert answer.result().status == 204
        assert set(pieces) <= {b"asked\n"}  # the next service asks it, too
    assert api.wait_stopped(session)["ExitCode"] == 4


class follow:  # noqa: N801  (used as a function)
    """The captured output of a session, over a connection of its own."""

    def __init__(self, api: RawApi, session: str, query: str = "follow=1") -> None:
        self._connection = api.connect()
        self._connection.send(request_bytes("GET", f"/exec/{session}/logs?{query}"))
        assert self._connection.read_head().status == 200

    def __enter__(self) -> Connection:
        return self._connection

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def payloads(connection: Connection) -> Iterator[bytes]:
    """Yield what each chunk tells, in frames that are whole, to the end of the answer."""
    for chunk in connection.read_chunks():
        assert chunk[0] == 1
        assert int.from_bytes(chunk[4:8], "big") == len(chunk) - 8
        yield chunk[8:]


LINES = 40_000
STREAM = f"i=0; while [ $i -lt {LINES} ]; do echo line $i of the output of this session; i=$((i+1)); done; exit 7"
EXPECTED = b"".join(b"line %d of the output of this session\n" % number for number in range(LINES))


def test_followers_of_the_output_notice_nothing(new_service: NewService, container: TestContainer) -> None:
    """Fast ones, a slow one, one that was silent all along: every byte once, and then the next request."""
    service = new_service()
    api = RawApi(service.socket)
    session = api.create(container.id, "sh", "-c", STREAM, CaptureStdout=True)
    silent = api.create(container.id, "sh", "-c", "sleep 600", CaptureStdout=True, OnDisconnect="kill")
    for one in (session, silent):
        assert api.start_detached(one).status == 200

    def read(connection: Connection, pause: float) -> bytes:
        found = bytearray()
        for piece in payloads(connection):
            found += piece
            time.sleep(pause)
        return bytes(found)

    with (
        follow(api, session) as fast,
        follow(api, session) as slow,
        follow(api, silent) as waiting,
        ThreadPoolExecutor(2) as pool,
    ):
        reading = [pool.submit(read, fast, 0.0), pool.submit(read, slow, 0.001)]
        for _ in range(4):
            time.sleep(0.3)  # they are somewhere in the midst, wherever that is
            service.reload()
        assert [one.result() == EXPECTED for one in reading] == [True, True]
        assert fast.request("GET", "/_ping").status == 200  # the connection goes on, too
        assert api.call("POST", f"/exec/{silent}/kill").status == 204
        assert list(waiting.read_chunks()) == []
        assert waiting.request("GET", "/_ping").status == 200
    service.assert_clean_log()


def test_a_follower_that_does_not_read_yet(new_service: NewService, runc_container: TestContainer) -> None:
    """What it has not taken is not lost: it is handed over in the middle of a chunk, again and again."""
    service = new_service()
    api = RawApi(service.socket)
    data = random.Random(2).randbytes(4_000_000)
    (runc_container.rootfs / "tmp/data").write_bytes(data)
    session = api.create(runc_container.id, "cat", "/tmp/data", CaptureStdout=True)
    assert api.start_detached(session).status == 200
    api.wait_stopped(session)
    with follow(api, session) as following:
        pieces = payloads(following)
        found = b""
        for _ in range(3):
            service.reload()
            found += next(pieces)
        assert found + b"".join(pieces) == data
    service.assert_clean_log()


@pytest.mark.parametrize("reload", [False, True])
def test_what_cannot_be_gone_on_with_has_no_end(
    new_service: NewService, runc_container: TestContainer, reload: bool
) -> None:
    """Captured output that was removed under a reader: the answer is cut, not ended, and nothing is added to it."""
    service = new_service()
    api = RawApi(service.socket)
    session = api.create(runc_container.id, "head", "-c", "4000000", "/dev/zero", CaptureStdout=True)
    assert api.start_detached(session).status == 200
    api.wait_stopped(session)
    with follow(api, session) as following:
        assert api.call("DELETE", f"/exec/{session}").status == 204
        if reload:
            service.reload()
        rest = following.read_until_closed()
    assert not rest.endswith(b"0\r\n\r\n")
    assert b"HTTP/1.1" not in rest
    service.assert_clean_log()


def test_listeners_to_events_notice_nothing(new_service: NewService, container: TestContainer) -> None:
    """No event is missed and none is told twice, with filters, `since` and `until`, by all who listened all along."""
    service = new_service()
    api = RawApi(service.socket)
    count, told = 40, {"event": ["exec_create"]}
    until = time.time() + 6

    def listen(events: Iterator[dict[str, Any]]) -> list[str]:
        return [event["Actor"]["Attributes"]["execID"] for event in events if event["Action"].startswith("exec_create")]

    first = api.create(container.id, "true")
    with (
        api.events(until=f"{until:.3f}") as live,
        api.events(since="1", until=f"{until:.3f}", filters=told) as all_along,
        ThreadPoolExecutor(3) as pool,
    ):
        listening = [pool.submit(listen, live), pool.submit(listen, all_along)]

        def create() -> list[str]:
            created = []
            for _ in range(count):
                time.sleep(0.05)  # so that it takes as long as the reloads do
                created.append(api.create(container.id, "true"))
            return created

        creating = pool.submit(create)
        for _ in range(3):
            time.sleep(0.4)
            service.reload()
        created = creating.result()
        late = listening[0].result(), listening[1].result()
    assert late == (created, [first, *created])
    assert time.time() >= until
    service.assert_clean_log()
