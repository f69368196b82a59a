"""The verbs beyond Docker as their users mean them: kill, time out, re-attach, run; nothing left behind."""

import asyncio
import json
import os
import random
import select
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from execgate.runtime.tree import SessionCgroups
from support.api import RawApi
from support.async_raw import Answer, RawClient, RawStream, answer_on, request_bytes
from support.leaks import assert_no_leaks, footprint
from support.runtimes import TestContainer
from support.service import Service

SOON = 30.0
NewService = Callable[..., Service]

# In a real service the least is what a user calls patience; in a test it is what makes the timeout come.
QUICK_TIMEOUTS = {"EXECGATE_TIMEOUT_GRACE_SECONDS": "0"}


@pytest.fixture
def raw(service: Service) -> RawClient:
    """A client for many at once in one event loop."""
    return RawClient(service.socket)


@pytest.fixture
def unharmed(service: Service) -> Iterator[None]:
    """Fail the test when it leaves anything in the service; `nothing_stays` sees to the container."""
    before = footprint(service)
    yield
    assert_no_leaks(service, before)


def until(reached: Callable[[], bool]) -> None:
    """Wait for what has no event."""
    deadline = time.monotonic() + SOON
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def detached(raw: RawClient, container: TestContainer, script: str, **fields: Any) -> str:
    """Create and start `sh -c script` with nothing attached; return its id."""
    session_id = await raw.create(
        container.id, "sh", "-c", script, AttachStdin=False, AttachStdout=False, AttachStderr=False, **fields
    )
    answer = await raw.call("POST", f"/exec/{session_id}/start", {"Detach": True})
    assert answer.status == 200, answer
    return session_id


@asynccontextmanager
async def attached(raw: RawClient, session_id: str, query: str = "", *, tty: bool = False) -> AsyncIterator[RawStream]:
    """Attach to a running session, or to what was captured of one."""
    connection = await raw.connect()
    try:
        request = request_bytes(
            "POST", f"/exec/{session_id}/attach{query}", None, "Connection: Upgrade", "Upgrade: tcp"
        )
        await asyncio.get_running_loop().sock_sendall(connection, request)
        stream = await answer_on(connection, multiplexed=not tty)
        assert stream.status == 101, stream.head
        yield stream
    finally:
        connection.close()


async def waited(raw: RawClient, session_id: str) -> dict[str, Any]:
    """Wait for the end of a session, and return what the wait says."""
    async with asyncio.timeout(SOON):
        answer = await raw.call("POST", f"/exec/{session_id}/wait")
    assert answer.status == 200, answer
    found: dict[str, Any] = answer.json()
    return found


async def logs(raw: RawClient, session_id: str, query: str = "after=0") -> Answer:
    """Return `GET logs`, its body being the frames' payload."""
    connection = await raw.connect()
    try:
        request = request_bytes("GET", f"/exec/{session_id}/logs?{query}", None, "Connection: close")
        # HTTP/1.0: without chunks, the body is the stream itself.
        await asyncio.get_running_loop().sock_sendall(connection, request.replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        stream = await answer_on(connection, multiplexed=True)
        assert stream.status == 200, stream.head
        async with asyncio.timeout(SOON):
            stdout, stderr = await stream.output()
    finally:
        connection.close()
    return Answer(200, {}, stdout + stderr)


def counted(container: TestContainer, *argv: str) -> int:
    """Return how many processes of a container have this command line."""
    return list(container.processes().values()).count(list(argv))


# -- 6: kill


@pytest.mark.usefixtures("unharmed")
async def test_a_kill_takes_the_tree(raw: RawClient, container: TestContainer) -> None:
    """Scenario 6 of the demanding user."""
    session_id = await detached(raw, container, "sleep 9991 & wait")
    until(lambda: counted(container, "sleep", "9991") == 1)
    answer = await raw.call("POST", f"/exec/{session_id}/kill")
    assert answer.status == 204, answer
    inspected = await raw.inspect(session_id)
    assert (inspected["Running"], inspected["ExitCode"]) == (False, 137)
    assert counted(container, "sleep", "9991") == 0
    assert (await raw.call("POST", f"/exec/{session_id}/kill")).status == 409
    assert (await raw.call("POST", f"/exec/{'0' * 64}/kill")).status == 404


# busybox's nohup is this trap.
_FAMILY = """
i=0
while [ $i -lt 12 ]; do
  setsid sleep 9992 &
  (trap '' HUP; exec sleep 9992) &
  (sleep 9992 &)
  (setsid sh -c '(sleep 9992 &)' &)
  i=$((i+1))
done
sleep 9992 &
sleep 9992
"""


@pytest.mark.usefixtures("unharmed")
async def test_fifty_processes_that_hide_are_gone_after_one_kill(raw: RawClient, container: TestContainer) -> None:
    """setsid, nohup, double fork, both; what other sessions and the container itself run lives on."""
    bystander = await detached(raw, container, "setsid sleep 9993 & sleep 9993")
    session_id = await detached(raw, container, _FAMILY)
    until(lambda: counted(container, "sleep", "9992") == 50)
    until(lambda: counted(container, "sleep", "9993") == 2)
    others = [argv for argv in container.processes().values() if "9992" not in argv[-1]]
    assert (await raw.call("POST", f"/exec/{session_id}/kill?signal=KILL")).status == 204
    left = container.processes().values()
    assert ["sleep", "9992"] not in left
    assert Counter(map(tuple, others)) - Counter(map(tuple, left)) <= Counter([("sh", "-c", _FAMILY)])
    assert (await raw.inspect(session_id))["ExitCode"] == 137
    assert (await raw.inspect(bystander))["Running"]
    assert (await raw.call("DELETE", f"/exec/{bystander}?force=1")).status == 204
    assert counted(container, "sleep", "9993") == 0


@pytest.mark.usefixtures("unharmed")
async def test_a_stop_asks_first(raw: RawClient, container: TestContainer) -> None:
    polite = await detached(
        raw, container, "trap 'exit 7' TERM; echo; while :; do sleep 0.05; done", CaptureStdout=True
    )
    stubborn = await detached(raw, container, "trap '' TERM; echo; while :; do sleep 0.05; done", CaptureStdout=True)
    for session_id, grace, code in ((polite, 20, 7), (stubborn, 0.2, 137)):
        async with attached(raw, session_id, "?after=0") as stream:
            await stream.output_until(b"\n")  # its trap is set
            assert (await raw.call("POST", f"/exec/{session_id}/stop?t={grace}")).status == 204
            await stream.output()
        assert (await raw.inspect(session_id))["ExitCode"] == code


# -- 7: timeouts


@pytest.mark.usefixtures("unharmed")
async def test_its_time_is_over(raw: RawClient, container: TestContainer) -> None:
    """Scenario 7: the partial output, the end in time, the tree gone, and TimedOut."""
    session_id = await raw.create(container.id, "sh", "-c", "echo hi; setsid sleep 9994 & sleep 9994", Timeout=2)
    stream = await raw.start(session_id)
    begun = time.monotonic()
    async with asyncio.timeout(SOON):
        assert await stream.output() == (b"hi\n", b"")
    assert time.monotonic() - begun > 1.5
    stream.close()
    inspected = await raw.inspect(session_id)
    assert (inspected["Running"], inspected["TimedOut"]) == (False, True)
    assert inspected["ExitCode"] in (137, 143)
    assert counted(container, "sleep", "9994") == 0


async def test_its_time_is_over_while_no_service_runs(new_service: NewService, container: TestContainer) -> None:
    """conmon ends the process, the next service what else there is of the tree; and it says so."""
    service = new_service(env=QUICK_TIMEOUTS)
    raw = RawClient(service.socket)
    late = await detached(raw, container, "echo begun; setsid sleep 9995 & sleep 9995", Timeout=2, CaptureStdout=True)
    in_time = await detached(raw, container, "sleep 0.5; exit 4", Timeout=2)
    until(lambda: counted(container, "sleep", "9995") == 2)
    monitor = os.pidfd_open((await raw.inspect(late))["Pid"])
    service.kill()
    try:
        poll = select.poll()
        poll.register(monitor, select.POLLIN)
        assert poll.poll(SOON * 1000), "conmon does not enforce the timeout"
    finally:
        os.close(monitor)
    second = new_service(service.directory, env=QUICK_TIMEOUTS)
    raw = RawClient(second.socket)
    assert await waited(raw, late) == {"StatusCode": 137, "TimedOut": True, "Error": ""}
    assert await waited(raw, in_time) == {"StatusCode": 4, "TimedOut": False, "Error": ""}
    assert (await logs(raw, late)).body == b"begun\n"
    until(lambda: counted(container, "sleep", "9995") == 0)


# -- 8: clients that go, and come again

_LINES = 100_000
_SEQ = b"".join(b"%d\n" % number for number in range(1, _LINES + 1))


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("seed", range(4))
async def test_every_line_once_however_often_a_client_is_cut(
    raw: RawClient, container: TestContainer, seed: int
) -> None:
    """The first client is cut anywhere, in a frame or between two, and so are all that follow it but the last."""
    chance = random.Random(seed)
    session_id = await raw.create(
        container.id, "seq", "1", str(_LINES), AttachStdin=False, CaptureStdout=True, OnDisconnect="keep"
    )
    seen = bytearray()

    async def read(stream: RawStream, most: int) -> None:
        async for _, data in stream.pieces():
            seen.extend(data)
            if len(seen) >= most:
                return

    stream = await raw.start(session_id)
    await read(stream, chance.randint(1, len(_SEQ) // 2))
    stream.close()
    while chance.random() < 0.8:
        async with asyncio.timeout(SOON), attached(raw, session_id, f"?after={len(seen)}") as again:
            await read(again, len(seen) + chance.randint(1, len(_SEQ) // 3))
    async with asyncio.timeout(SOON), attached(raw, session_id, f"?after={len(seen)}") as last:
        await read(last, len(_SEQ) + 1)
    assert bytes(seen) == _SEQ
    assert await waited(raw, session_id) == {"StatusCode": 0, "TimedOut": False, "Error": ""}
    assert (await logs(raw, session_id)).body == _SEQ


@pytest.mark.usefixtures("unharmed")
async def test_a_client_is_killed_and_another_takes_over(raw: RawClient, container: TestContainer) -> None:
    """Scenario 8: still listed as running; its input stays open for whoever comes next."""
    session_id = await raw.create(
        container.id, "sh", "-c", "echo hello; cat", CaptureStdout=True, OnDisconnect="keep", Labels={"job": "train"}
    )
    first = await raw.start(session_id)
    await first.output_until(b"hello\n")
    first.close()
    answer = await raw.call("GET", '/exec/json?filters={"state":["running"],"label":["job=train"]}')
    assert [one["ID"] for one in answer.json()] == [session_id]
    async with asyncio.timeout(SOON), attached(raw, session_id, "?after=0") as second:
        await second.output_until(b"hello\n")
        await second.write(b"world\n")
        await second.output_until(b"world\n")
        second.end_input()
        assert await second.output() == (b"", b"")
    assert (await waited(raw, session_id))["StatusCode"] == 0
    assert (await logs(raw, session_id)).body == b"hello\nworld\n"


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("half_closed", [False, True], ids=["open", "half-closed"])
@pytest.mark.parametrize(("policy", "code"), [("kill", 137), ("hup", 9), ("", 0), ("keep", 0)])
async def test_what_becomes_of_a_process_without_a_client(
    raw: RawClient, container: TestContainer, policy: str, code: int, half_closed: bool
) -> None:
    """The process is silent: nothing that is sent to the client tells that it is gone."""
    script = "trap 'exit 9' HUP; echo begun; cat >/dev/null; echo read; until [ -e /tmp/go-$0 ]; do sleep 0.05; done"
    session_id = await raw.create(container.id, "sh", "-c", script, policy, OnDisconnect=policy)
    (container.rootfs / f"tmp/go-{policy}").unlink(missing_ok=True)
    stream = await raw.start(session_id)
    await stream.output_until(b"begun\n")
    if half_closed:
        stream.end_input()
        await stream.output_until(b"read\n")
    stream.close()
    if policy in ("", "keep"):
        assert (await raw.inspect(session_id))["Running"]
        (container.rootfs / f"tmp/go-{policy}").touch()
        if policy == "keep" and not half_closed:  # its input is open still: `cat` waits
            answer = await raw.call("POST", f"/exec/{session_id}/stdin?eof=1")
            assert answer.status == 204, answer
    assert (await waited(raw, session_id))["StatusCode"] == code


async def test_captured_output_goes_on_in_the_next_service(new_service: NewService, container: TestContainer) -> None:
    """The service is killed while a process writes: what the next one tells has every line once."""
    service = new_service()
    raw = RawClient(service.socket)
    script = "i=0; while [ $i -lt 300 ]; do echo line $i; i=$((i+1)); sleep 0.01; done; exit 3"
    session_id = await detached(raw, container, script, CaptureStdout=True)
    async with asyncio.timeout(SOON), attached(raw, session_id, "?after=0") as stream:
        await stream.output_until(b"line 20\n")
    service.kill()
    await asyncio.sleep(0.5)  # output piles up in the pipe while nobody is there
    second = new_service(service.directory)
    raw = RawClient(second.socket)
    expected = b"".join(b"line %d\n" % number for number in range(300))
    async with asyncio.timeout(SOON), attached(raw, session_id, "?after=0") as stream:
        assert await stream.output() == (expected, b"")
    assert (await waited(raw, session_id))["StatusCode"] == 3
    assert (await logs(raw, session_id)).body == expected
    second.stop()
    assert not list((second.state_dir / "sessions").iterdir())


async def test_a_terminal_is_taken_back_by_the_next_service(new_service: NewService, container: TestContainer) -> None:
    """The service is killed under a shell with a terminal: the next one attaches to it, both ways."""
    service = new_service()
    raw = RawClient(service.socket)
    session_id = await raw.create(container.id, "sh", Tty=True, OnDisconnect="keep")
    first = await raw.start(session_id, tty=True)
    await first.write(b"echo $((40+2))\n")
    await first.output_until(b"42\r\n")
    service.kill()
    first.close()
    second = new_service(service.directory)
    raw = RawClient(second.socket)
    async with asyncio.timeout(SOON), attached(raw, session_id, tty=True) as stream:
        await stream.write(b"echo $((50+5))\n")
        await stream.output_until(b"55\r\n")
        await stream.write(b"exit 6\n")
    assert (await waited(raw, session_id))["StatusCode"] == 6


async def test_a_restart_in_the_middle_of_much_output(new_service: NewService, container: TestContainer) -> None:
    """What a service that stops has read it has also kept, and the rest waits in the pipe."""
    service = new_service()
    raw = RawClient(service.socket)
    session_id = await detached(raw, container, f"sleep 0.2; exec seq 1 {_LINES * 10}", CaptureStdout=True)
    for _ in range(3):
        async with asyncio.timeout(SOON), attached(raw, session_id, "?after=0") as stream:
            await stream.read()
        service.stop()
        service = new_service(service.directory)
        raw = RawClient(service.socket)
    assert await waited(raw, session_id) == {"StatusCode": 0, "TimedOut": False, "Error": ""}
    expected = b"".join(b"%d\n" % number for number in range(1, _LINES * 10 + 1))
    assert (await logs(raw, session_id)).body == expected


# -- run

AT_ONCE = 200


@pytest.mark.usefixtures("unharmed")
async def test_two_hundred_runs_at_once(raw: RawClient, container: TestContainer) -> None:
    """Some fail, some cannot be started, some run out of time with a tree: every answer is right."""
    sessions = SessionCgroups.open()

    def wanted(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        name = f"{number}\n"
        match number % 5:
            case 0:
                return {"Cmd": ["sh", "-c", f"echo {number}; echo e{number} >&2; exit {number % 256}"]}, {
                    "ExitCode": number % 256, "Stdout": name, "Stderr": f"e{name}", "TimedOut": False,
                }  # fmt: skip
            case 1:
                return {"Cmd": ["cat"], "Stdin": name * 1000, "Timeout": 100}, {
                    "ExitCode": 0, "Stdout": name * 1000, "Stderr": "", "TimedOut": False,
                }  # fmt: skip
            case 2:
                script = f"echo {number}; setsid sleep 9996 & exec sleep 9996"
                return {"Cmd": ["sh", "-c", script], "Timeout": 4}, {
                    "ExitCode": 143, "Stdout": name, "Stderr": "", "TimedOut": True,
                }  # fmt: skip
            case 3:
                return {"Cmd": [f"nosuch{number}"]}, {"ExitCode": 127, "Stdout": "", "TimedOut": False}
            case _:
                return {"Cmd": ["seq", str(number), "100000"], "OutputLimit": 4}, {
                    "ExitCode": 0, "Stdout": f"{name}{number + 1}\n"[:4], "Truncated": True, "TimedOut": False,
                }  # fmt: skip

    async def one(number: int) -> str:
        body, expected = wanted(number)
        answer = await raw.call("POST", f"/containers/{container.id}/exec/run", body)
        assert answer.status == 200, answer
        found: dict[str, Any] = answer.json()
        assert {key: found[key] for key in expected} == expected, (number, found)
        return str(found["Id"])

    async with asyncio.timeout(120):
        ids = await asyncio.gather(*[one(number) for number in range(AT_ONCE)])
    assert len(set(ids)) == AT_ONCE
    try:
        until(lambda: not {session_id[:32] for session_id in ids} & set(sessions._names()))
    finally:
        sessions.close()
    assert counted(container, "sleep", "9996") == 0
    for session_id in ids:
        inspected = await raw.inspect(session_id)
        assert not inspected["Running"]
        assert inspected["ExitCode"] is not None


@pytest.mark.usefixtures("unharmed")
async def test_whoever_hangs_up_on_a_run_ends_it(raw: RawClient, container: TestContainer) -> None:
    body = {"Cmd": ["sh", "-c", "setsid sleep 9997 & sleep 9997"]}
    connection = await raw.connect()
    request = request_bytes("POST", f"/containers/{container.id}/exec/run", body)
    await asyncio.get_running_loop().sock_sendall(connection, request)
    until_running = asyncio.to_thread(until, lambda: counted(container, "sleep", "9997") == 2)
    await until_running
    connection.close()
    await asyncio.to_thread(until, lambda: counted(container, "sleep", "9997") == 0)


def test_a_list_is_json(service: Service) -> None:
    """The list needs nothing but GET."""
    answer = RawApi(service.socket).call("GET", "/exec/json")
    assert answer.status == 200
    assert isinstance(json.loads(answer.body), list)
