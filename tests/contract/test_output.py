"""The verbs beyond Docker's about a session's streams: logs, attach, stdin."""

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

from contract.api import Api
from contract.document import Document
from contract.verbs import (
    KEPT,
    LIBPOD,
    attached,
    begin,
    force_remove,
    frames,
    logs,
    message,
    opened,
    output,
    post,
    script,
    sent,
    wait,
)
from execgate.wire.stdcopy import SYSTEMERR
from support.api import demultiplex
from support.raw import request_bytes
from support.runtimes import TestContainer
from support.service import Service

pytestmark = pytest.mark.usefixtures("no_leaks")

RAW = "application/vnd.docker.raw-stream"
MULTIPLEXED = "application/vnd.docker.multiplexed-stream"
OFFSET = "execgate-offset"

# Speaks, waits for a line, answers it on stderr, and ends with its input.
DIALOGUE = "echo one; read x; echo got $x >&2; cat; exit 4"


@pytest.fixture(params=["", LIBPOD], ids=["docker", "libpod"])
def tree(request: pytest.FixtureRequest) -> str:
    """The prefix of each tree in turn."""
    return str(request.param)


@pytest.fixture
def small_api(new_service: Callable[..., Service], document: Document) -> Api:
    """A service that keeps a mebibyte of output."""
    return Api(new_service(env={"EXECGATE_CAPTURE_BYTES": str(2**20)}).socket, document)


def lines(count: int) -> bytes:
    """What `seq -w 1 COUNT` prints: lines of one width, so that every piece of it tells where it belongs."""
    width = len(str(count))
    return b"".join(b"%0*d\n" % (width, number) for number in range(1, count + 1))


# -- logs ------------------------------------------------------------------------------------------------------------


def test_logs(tree: str, api: Api, container: TestContainer) -> None:
    session_id = script(api, container, "echo one; sleep 0.2; echo two >&2; sleep 0.2; echo three", **KEPT)
    wait(api, session_id)
    told = logs(api, session_id, tree=tree)
    assert told.headers["content-type"] == MULTIPLEXED
    assert told.headers[OFFSET] == "0"
    assert frames(told.body) == [(1, b"one\n"), (2, b"two\n"), (1, b"three\n")]
    assert frames(logs(api, session_id, tree=tree, stdout=1).body) == [(1, b"one\n"), (1, b"three\n")]
    assert frames(logs(api, session_id, tree=tree, stdout=0).body) == [(2, b"two\n")]
    assert frames(logs(api, session_id, tree=tree, stderr="true").body) == [(2, b"two\n")]
    assert frames(logs(api, session_id, tree=tree, stderr="false").body) == [(1, b"one\n"), (1, b"three\n")]
    assert logs(api, session_id, tree=tree, stdout=1, stderr=1).body == told.body


def test_logs_from_every_offset(api: Api, container: TestContainer) -> None:
    session_id = script(api, container, "echo one; sleep 0.2; echo two >&2", **KEPT)
    wait(api, session_id)
    for after in range(9):
        told = logs(api, session_id, after=after)
        assert told.headers[OFFSET] == str(after)
        assert output(told.body) == b"one\ntwo\n"[after:]
        # An offset counts the bytes of both streams, also when one of them is not asked for.
        assert demultiplex(logs(api, session_id, after=after, stderr=1).body) == (b"", b"two\n"[max(0, after - 4) :])


def test_logs_beyond_the_end(tree: str, api: Api, container: TestContainer) -> None:
    session_id = begin(api, container, "echo", "one", **KEPT)
    wait(api, session_id)
    for after in (5, 10**17):
        response = logs(api, session_id, tree=tree, after=after)
        said = f"the output has 4 bytes; it cannot begin after {after}"
        assert (response.status, message(response)) == (400, said)
        assert post(api, tree, session_id, f"attach?after={after}").status == 400


def test_a_result(tree: str, api: Api, container: TestContainer) -> None:
    """What `run` answers, asked for before the end and after it, by anybody; one who leaves changes nothing."""
    script = "echo one; echo two >&2; sleep 0.5; echo three; exit 5"
    session_id = begin(api, container, "sh", "-c", script, **KEPT)
    with api.connect() as connection:
        connection.send(request_bytes("GET", f"{tree}/exec/{session_id}/result"))
    told = api.call("GET", f"{tree}/exec/{session_id}/result").json
    assert (told["Id"], told["ExitCode"], told["TimedOut"], told["Error"]) == (session_id, 5, False, "")
    assert (told["Stdout"], told["Stderr"], told["Encoding"]) == ("one\nthree\n", "two\n", "utf-8")
    assert not told["Truncated"]
    short = api.call("GET", f"{tree}/exec/{session_id}/result?limit=9&encoding=base64").json
    assert (short["Stdout"], short["Stderr"], short["Truncated"]) == ("b25lCnQ=", "dHdvCg==", True)
    whole = api.call("GET", f"{tree}/exec/{session_id}/result?limit=14").json
    assert (whole["Stdout"], whole["Truncated"]) == ("one\nthree\n", False)


@pytest.mark.parametrize(
    "query", ["limit=x", "limit=-1", f"limit={16 * 1024 * 1024 + 1}", "encoding=latin-1", "encoding="]
)
def test_a_result_that_cannot_be_given(query: str, tree: str, api: Api, runc_container: TestContainer) -> None:
    session_id = begin(api, runc_container, "echo", "one", **KEPT)
    response = api.call("GET", f"{tree}/exec/{session_id}/result?{query}")
    assert response.status == 400
    assert "invalid value of" in message(response)


def test_the_result_of_a_start_that_failed(tree: str, api: Api, container: TestContainer) -> None:
    session_id = api.create(container.id, "nosuch", CaptureStdout=True)
    assert api.call("POST", f"/exec/{session_id}/start", {"Detach": True}).status == 400
    told = api.call("GET", f"{tree}/exec/{session_id}/result").json
    assert (told["ExitCode"], told["Stdout"], told["Stderr"]) == (127, "", "")
    assert "nosuch" in told["Error"]


@pytest.mark.parametrize("after", ["x", "-1", "1.5", "", "1e3", "9" * 19, "%D9%A1"])
def test_a_bad_offset(after: str, tree: str, api: Api, runc_container: TestContainer) -> None:
    session_id = begin(api, runc_container, "echo", "one", **KEPT)
    wait(api, session_id)
    for method, verb in (("GET", "logs"), ("POST", "attach")):
        response = api.call(method, f"{tree}/exec/{session_id}/{verb}?after={after}")
        assert response.status == 400
        assert message(response).endswith("not an offset in bytes")


def test_no_stream_at_all(tree: str, api: Api, runc_container: TestContainer) -> None:
    session_id = begin(api, runc_container, "echo", "one", **KEPT)
    wait(api, session_id)
    for method, verb in (("GET", "logs"), ("POST", "attach")):
        response = api.call(method, f"{tree}/exec/{session_id}/{verb}?stdout=0&stderr=0")
        assert (response.status, message(response)) == (400, "no stream is asked for: stdout, stderr or both")


def test_logs_of_what_is_not_captured(tree: str, api: Api, container: TestContainer) -> None:
    running, ended = begin(api, container, "sleep", "1000"), begin(api, container, "true")
    wait(api, ended)
    for session_id in (running, ended):
        response = logs(api, session_id, tree=tree)
        assert (response.status, message(response)) == (409, f"the output of exec {session_id} is not captured")
    force_remove(api, running)


def test_logs_before_the_start(tree: str, api: Api, container: TestContainer) -> None:
    response = logs(api, api.create(container.id, "true", CaptureStdout=True), tree=tree)
    assert response.status == 409
    assert "is not running" in message(response)


def test_logs_of_a_terminal_are_raw(tree: str, api: Api, container: TestContainer) -> None:
    session_id = script(api, container, "echo out; echo err >&2", Tty=True, CaptureStdout=True)
    wait(api, session_id)
    told = logs(api, session_id, tree=tree, after=1)
    assert (told.headers["content-type"], told.headers[OFFSET]) == (RAW, "1")
    assert told.body == b"ut\r\nerr\r\n"


def test_logs_that_follow(tree: str, api: Api, container: TestContainer) -> None:
    fields = {"AttachStdin": True, "OnDisconnect": "keep", **KEPT}
    session_id = script(api, container, DIALOGUE, **fields)
    target = f"{tree}/exec/{session_id}/logs?follow=1&after=0"
    with opened(api, "GET", target, upgrade=False) as first, opened(api, "GET", target, upgrade=False) as second:
        for stream in (first, second):
            stream.connection.read_until(b"one\n")
        # Without `follow` the answer ends with what there is.
        assert output(logs(api, session_id).body) == b"one\n"
        assert post(api, tree, session_id, "stdin?eof=1", b"two\nthree\n").status == 204
        for stream in (first, second):
            stream.connection.read_until(b"three\n")
            assert stream.connection.read_until(b"0\r\n\r\n").endswith(b"\r\n0\r\n\r\n")
    assert wait(api, session_id)["StatusCode"] == 4
    assert demultiplex(logs(api, session_id).body) == (b"one\nthree\n", b"got two\n")


def test_a_follower_that_leaves(api: Api, container: TestContainer) -> None:
    session_id = begin(api, container, "sleep", "1000", **KEPT)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(opened(api, "GET", f"/exec/{session_id}/logs?follow=1", upgrade=False))
    assert api.inspect(session_id)["Running"]
    force_remove(api, session_id)


def test_old_output_is_dropped_and_the_gap_is_said(tree: str, small_api: Api, container: TestContainer) -> None:
    whole = lines(1_000_000)
    session_id = begin(small_api, container, "seq", "-w", "1", "1000000", **KEPT)
    wait(small_api, session_id)
    told = logs(small_api, session_id, tree=tree)
    offset = int(told.headers[OFFSET])
    assert output(told.body) == whole[offset:]
    assert 0 < len(whole) - offset <= 2**20
    last = logs(small_api, session_id, tree=tree, after=len(whole) - 6)
    assert (last.headers[OFFSET], output(last.body)) == (str(len(whole) - 6), whole[-6:])
    with attached(small_api, session_id, tree=tree, after=1) as stream:
        assert stream.head.headers[OFFSET] == str(offset)
        assert output(stream.read_raw()) == whole[offset:]
    kept = sum(file.stat().st_size for file in Path(str(small_api.target)).parent.glob("state/captures/*/*"))
    assert 0 < kept <= 2**20


def test_what_a_slow_reader_loses_is_said_in_the_stream(small_api: Api, container: TestContainer) -> None:
    whole = lines(1_000_000)
    session_id = small_api.create_attached(container.id, "sh", "-c", "read x; exec seq -w 1 1000000", **KEPT)
    with small_api.attach(session_id) as first:
        target = f"/exec/{session_id}/logs?follow=1"
        with opened(small_api, "GET", target, upgrade=False) as slow:
            first.send(b"\n")
            assert first.read_frames() == (whole, b"")
            position = 0
            gaps = []
            for stream, payload in frames(b"".join(slow.connection.read_chunks())):
                if stream == SYSTEMERR:
                    words = payload.decode().split()
                    assert words[:3] == ["execgate:", "output", "from"]
                    gaps.append((int(words[3]), int(words[5])))
                    assert gaps[-1][0] == position < gaps[-1][1]
                    position = gaps[-1][1]
                else:
                    assert payload == whole[position : position + len(payload)]
                    position += len(payload)
            assert gaps
            assert position == len(whole)


# -- attach ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upgrade", [True, False], ids=["101", "200"])
def test_attach_replays_and_goes_on(upgrade: bool, tree: str, api: Api, container: TestContainer) -> None:
    fields = {"AttachStdin": True, "OnDisconnect": "keep", **KEPT}
    session_id = script(api, container, DIALOGUE, **fields)
    with opened(api, "GET", f"/exec/{session_id}/logs?follow=1", upgrade=False) as logged:
        logged.connection.read_until(b"one\n")
    with attached(api, session_id, tree=tree, upgrade=upgrade, after=1) as stream:
        assert stream.head.headers[OFFSET] == "1"
        assert stream.head.headers["content-type"] == (MULTIPLEXED if upgrade and not tree else RAW)
        stream.send(b"two\nthree\n")
        stream.half_close()
        assert stream.read_frames() == (b"ne\nthree\n", b"got two\n")
    assert wait(api, session_id)["StatusCode"] == 4


def test_attach_from_now_on(tree: str, api: Api, container: TestContainer) -> None:
    session_id = api.create_attached(container.id, "sh", "-c", DIALOGUE)
    with api.attach(session_id) as first:
        first.connection.read_until(b"one\n")
        with attached(api, session_id, tree=tree) as late, attached(api, session_id, tree=tree, stderr=1) as errors:
            assert late.head.headers[OFFSET] == errors.head.headers[OFFSET] == "4"
            late.send(b"two\nthree\n")
            first.half_close()
            assert late.read_frames() == (b"three\n", b"got two\n")
            assert errors.read_frames() == (b"", b"got two\n")
        assert first.read_frames() == (b"three\n", b"got two\n")


def test_attach_in_a_terminal(tree: str, api: Api, container: TestContainer) -> None:
    fields = {"Tty": True, "CaptureStdout": True}
    session_id = api.create_attached(container.id, "sh", "-c", "stty -echo; echo one; read x; echo got $x", **fields)
    with api.attach(session_id, Tty=True) as first:
        first.connection.read_until(b"one\r\n")
        with attached(api, session_id, tree=tree, after=0) as second:
            assert second.head.headers["content-type"] == RAW
            second.connection.read_until(b"one\r\n")
            second.send(b"\x10\x11")  # the keys detach the one that types them
            assert second.read_raw() == b""
        with attached(api, session_id, tree=tree, after=0) as third:
            third.send(b"two\n")
            assert third.read_raw() == b"one\r\ngot two\r\n"
        assert first.read_raw() == b"got two\r\n"


def test_attach_without_stdin(tree: str, api: Api, container: TestContainer) -> None:
    session_id = api.create_attached(container.id, "cat", CaptureStdout=True)
    with api.attach(session_id) as first:
        with attached(api, session_id, tree=tree, after=0, stdin=0) as watcher:
            watcher.send(b"not read by anybody\n")
            watcher.half_close()
            first.send(b"from the first\n")
            watcher.connection.read_until(b"from the first\n")
            assert api.inspect(session_id)["Running"]
            first.half_close()
            assert watcher.read_raw() == b""
        assert first.read_frames() == (b"from the first\n", b"")


def test_a_watcher_that_hangs_up_leaves_the_input_of_the_others_open(api: Api, container: TestContainer) -> None:
    session_id = api.create_attached(container.id, "cat", CaptureStdout=True)
    with api.attach(session_id) as first:
        first.send(b"one\n")
        first.connection.read_until(b"one\n")
        for _ in range(3):
            with attached(api, session_id, after=0) as watcher:
                watcher.connection.read_until(b"one\n")
        first.send(b"two\n")
        first.half_close()
        assert first.read_frames() == (b"two\n", b"")
    assert api.inspect(session_id)["StdinBytes"] == 8


def test_attach_to_what_has_ended(tree: str, api: Api, container: TestContainer) -> None:
    session_id = script(api, container, "echo out; sleep 0.2; echo err >&2; exit 3", **KEPT)
    wait(api, session_id)
    with attached(api, session_id, tree=tree, after=0) as stream:
        assert stream.read_frames() == (b"out\n", b"err\n")
    with attached(api, session_id, tree=tree, after=2, stdout=1) as stream:
        assert stream.read_frames() == (b"t\n", b"")
    with attached(api, session_id, tree=tree) as stream:  # from now on there is nothing
        assert stream.head.headers[OFFSET] == "8"
        assert stream.read_raw() == b""


def test_who_leaves_in_the_middle_of_a_replay(api: Api, container: TestContainer, service: Service) -> None:
    session_id = begin(api, container, "seq", "-w", "1", "1000000", **KEPT)
    wait(api, session_id)
    for _ in range(3):
        with attached(api, session_id, after=0) as stream:
            stream.connection.read_exactly(100_000)
    with attached(api, session_id, after=0) as stream:
        assert stream.read_frames() == (lines(1_000_000), b"")
    service.assert_clean_log()


def test_several_watch_and_a_slow_one_disturbs_nobody(api: Api, container: TestContainer) -> None:
    whole = lines(1_000_000)
    session_id = api.create_attached(container.id, "sh", "-c", "read x; exec seq -w 1 1000000", **KEPT)
    with api.attach(session_id) as first, attached(api, session_id, after=0) as slow:
        with attached(api, session_id, after=0) as other, attached(api, session_id, after=0) as gone:
            first.send(b"\n")
            gone.connection.read_exactly(1000)
            gone.connection.close()
            assert first.read_frames() == (whole, b"")
            assert other.read_frames() == (whole, b"")
        assert wait(api, session_id)["StatusCode"] == 0  # and `slow` has read nothing yet
        assert slow.read_frames() == (whole, b"")


def test_a_watcher_that_is_too_slow_is_told_so(tree: str, api: Api, container: TestContainer) -> None:
    """Without capture a mebibyte is remembered, and between here and there the sockets hold less than one."""
    whole = lines(1_000_000)
    session_id = api.create_attached(container.id, "sh", "-c", "read x; exec seq -w 1 1000000")
    with api.attach(session_id) as first, attached(api, session_id, tree=tree) as slow:
        first.send(b"\n")
        assert first.read_frames() == (whole, b"")
        stdout, stderr = slow.read_frames()
        said = b"output was dropped: this client reads too slowly"
        if tree:
            assert stderr == b"Error: " + said + b"\n"
        else:
            assert stdout.endswith(said + b"\r\n")
            stdout = stdout.removesuffix(said + b"\r\n")
        assert 0 < len(stdout) < len(whole)
        assert whole.startswith(stdout)
    assert api.inspect(session_id)["ExitCode"] == 0


def test_a_half_close_reaches_who_waits_for_it(tree: str, api: Api, container: TestContainer) -> None:
    session_id = begin(api, container, "wc", "-c", AttachStdin=True, OnDisconnect="keep", **KEPT)
    data = os.urandom(300_000)
    with attached(api, session_id, tree=tree) as stream:
        stream.send(data)
        stream.half_close()
        assert stream.read_frames() == (b"300000\n", b"")


# -- stdin -----------------------------------------------------------------------------------------------------------


def test_stdin(tree: str, api: Api, container: TestContainer) -> None:
    session_id = begin(api, container, "cat", AttachStdin=True, OnDisconnect="keep", **KEPT)
    data = bytes(range(256))
    assert post(api, tree, session_id, "stdin", data).status == 204
    assert post(api, tree, session_id, "stdin").status == 204
    assert post(api, tree, session_id, "stdin?eof=0", b"more").status == 204
    assert api.inspect(session_id)["Running"]
    assert post(api, tree, session_id, "stdin?eof=1").status == 204
    assert wait(api, session_id)["StatusCode"] == 0
    assert output(logs(api, session_id).body) == data + b"more"
    assert api.inspect(session_id)["StdinBytes"] == len(data) + 4


def test_stdin_that_is_not_open(tree: str, api: Api, container: TestContainer) -> None:
    never = begin(api, container, "sleep", "1000")
    no_longer = begin(api, container, "sleep", "1000", AttachStdin=True, OnDisconnect="keep")
    assert post(api, tree, no_longer, "stdin?eof=1").status == 204
    for session_id in (never, no_longer):
        response = post(api, tree, session_id, "stdin", b"x")
        assert (response.status, message(response)) == (409, f"the stdin of exec {session_id} is not open")
        force_remove(api, session_id)


def test_the_end_of_input_comes_behind_what_is_being_written(api: Api, container: TestContainer) -> None:
    """The first of two writers waits for a process that does not read yet; the end comes from the second."""
    gate = f"/tmp/{secrets.token_hex(8)}"
    api.run(container.id, "mkfifo", gate)
    session_id = script(api, container, f"read x <{gate}; wc -c", AttachStdin=True, OnDisconnect="keep", **KEPT)
    with attached(api, session_id) as stream:
        stream.send(bytes(400_000))  # more than the pipe takes: the rest waits behind it
        target = f"/exec/{session_id}/stdin?eof=1"
        with sent(api, "POST", target) as ending:
            assert api.checked("POST", target, ending.read_answer()).status == 204
        api.run(container.id, "sh", "-c", f"echo >{gate}")
        stdout, _ = stream.read_frames()
        assert 0 < int(stdout) <= 400_000
    assert wait(api, session_id)["StatusCode"] == 0


def test_a_writer_that_leaves(api: Api, container: TestContainer) -> None:
    """Nobody reads what it writes: it waits, and is forgotten when it goes."""
    session_id = begin(api, container, "sleep", "1000", AttachStdin=True, OnDisconnect="keep")
    body = bytes(200_000)
    for _ in range(3):
        with attached(api, session_id) as stream:
            stream.send(body)
    assert api.inspect(session_id)["Running"]
    assert post(api, "", session_id, "kill").status == 204
