"""Rows 31, 32 and 37 of the fault matrix: what comes over the wire and is no decent HTTP."""

import json
import select
import socket
import statistics
import subprocess
import time

import pytest

from support.api import OUTPUT, RawApi, start_bytes
from support.programs import find_program
from support.raw import JSON, request_bytes
from support.runtimes import TestContainer
from support.service import Service

pytestmark = pytest.mark.usefixtures("unharmed")

PING = request_bytes("GET", "/_ping")
NO_SUCH_ID = "0" * 64
SMUGGLED = request_bytes("GET", "/version")

CREATE = "/containers/nobody/exec"
_HEAD = b"Host: x\r\nContent-Type: application/json\r\n"


def _post(fields: bytes, body: bytes = b"", path: str = CREATE) -> bytes:
    return b"POST " + path.encode() + b" HTTP/1.1\r\n" + _HEAD + fields + b"\r\n" + body


GARBAGE = {
    "content-length and chunked": _post(b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
    "two different lengths": _post(b"Content-Length: 2\r\nContent-Length: 5\r\n", b"{}"),
    "two equal lengths": _post(b"Content-Length: 2\r\nContent-Length: 2\r\n", b"{}"),
    "signed length": _post(b"Content-Length: +2\r\n", b"{}"),
    "hex length": _post(b"Content-Length: 0x2\r\n", b"{}"),
    "length of 10,000 digits": _post(b"Content-Length: " + b"9" * 10_000 + b"\r\n"),
    "body over the bound": _post(b"Content-Length: 104857600\r\n", b"{"),
    "unknown transfer coding": _post(b"Transfer-Encoding: gzip, chunked\r\n", b"0\r\n\r\n"),
    "chunked twice": _post(b"Transfer-Encoding: chunked, chunked\r\n", b"0\r\n\r\n"),
    "chunk size is no number": _post(b"Transfer-Encoding: chunked\r\n", b"xyz\r\n{}\r\n0\r\n\r\n"),
    "negative chunk size": _post(b"Transfer-Encoding: chunked\r\n", b"-1\r\n{}\r\n0\r\n\r\n"),
    "chunk longer than its size": _post(b"Transfer-Encoding: chunked\r\n", b"1\r\n{}}}}\r\n0\r\n\r\n"),
    "chunk size overflows": _post(b"Transfer-Encoding: chunked\r\n", b"f" * 17 + b"\r\n{}\r\n"),
    "endless chunk extension": _post(b"Transfer-Encoding: chunked\r\n", b"1;" + b"x" * 100_000),
    "chunked body over the bound": _post(
        b"Transfer-Encoding: chunked\r\n", (b"8000\r\n" + b" " * 0x8000 + b"\r\n") * 40
    ),
    "expectation that nobody can meet": b"GET /_ping HTTP/1.1\r\nHost: x\r\nExpect: miracles\r\n\r\n",
    "gzip behind identity": _post(
        b"Content-Encoding: identity\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n", b"\x1f\x8b\x08\x00"
    ),
    "gzip": _post(b"Content-Encoding: gzip\r\nContent-Length: 4\r\n", b"\x1f\x8b\x08\x00"),
    "obs-fold": b"GET /_ping HTTP/1.1\r\nHost: x\r\nX-A: b\r\n c\r\n\r\n",
    "space before colon": b"GET /_ping HTTP/1.1\r\nHost : x\r\n\r\n",
    "no colon": b"GET /_ping HTTP/1.1\r\nHost: x\r\nnonsense\r\n\r\n",
    "NUL in a value": b"GET /_ping HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n",
    "NUL in the target": b"GET /_p\0ing HTTP/1.1\r\nHost: x\r\n\r\n",
    "bare LF": b"GET /_ping HTTP/1.1\nHost: x\n\n",
    "bare CR": b"GET /_ping HTTP/1.1\rHost: x\r\r",
    "two hosts": b"GET /_ping HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "no host": b"GET /_ping HTTP/1.1\r\n\r\n",
    "HTTP/0.9": b"GET /_ping\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    "HTTP/3.0": b"GET /_ping HTTP/3.0\r\nHost: x\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(range(128)),
    "header of 1 MB": b"GET /_ping HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (1 << 20) + b"\r\n\r\n",
    "10,000 headers": b"GET /_ping HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
    "target of 1 MB": b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "method of 1 MB": b"A" * (1 << 20),
    "CONNECT": b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    "bad port in absolute-form": b"GET http://a:99999999/_ping HTTP/1.1\r\nHost: x\r\n\r\n",
    "bad address in absolute-form": b"GET http://[::g/_ping HTTP/1.1\r\nHost: x\r\n\r\n",
    "address that is none at all": b"GET http://[%]@/ HTTP/1.1\r\nHost: x\r\n\r\n",
    "unknown method": b"FOO /_ping HTTP/1.1\r\nHost: x\r\n\r\n",
    "method in lower case": b"get /_ping HTTP/1.1\r\nHost: x\r\n\r\n",
    "method of HTTP/2": b"PRI /_ping HTTP/1.1\r\nHost: x\r\n\r\n",
    "two content types": _post(b"Content-Type: text/plain\r\nContent-Length: 2\r\n", b"{}"),
    "websocket of long ago": b"GET /_ping HTTP/1.1\r\nHost: x\r\nSec-WebSocket-Key1: 4 @1 46546xW%0l 1 5\r\n\r\n",
    "space in the target": b"GET /_ping /x HTTP/1.1\r\nHost: x\r\n\r\n",
    "trailer that changes the framing": _post(
        b"Transfer-Encoding: chunked\r\n", b"2\r\n{}\r\n0\r\nContent-Length: 9\r\n\r\n"
    ),
}


@pytest.mark.parametrize("garbage", list(GARBAGE.values()), ids=list(GARBAGE))
def test_garbage_gets_an_error_in_json_or_the_end(api: RawApi, garbage: bytes) -> None:
    """Neither a success nor a hang; and what stands behind it is never answered."""
    with api.connect(timeout=5) as connection:
        connection.try_send(garbage + SMUGGLED)
        answered = connection.read_until_closed()
    assert b"ApiVersion" not in answered, "what stood behind the garbage was served"
    if answered:
        head, _, body = answered.partition(b"\r\n\r\n")
        assert 400 <= int(head.split()[1]) < 600, answered[:300]
        assert json.loads(body)["message"], answered[:300]
        assert answered.count(b"\r\n\r\n") == 1, answered


@pytest.mark.parametrize(
    "request_line",
    [
        b"GET http://docker/_ping HTTP/1.1",
        b"GET /_ping?a=%00 HTTP/1.1",
        b"HEAD /_ping HTTP/1.1",
        b"GET /_ping HTTP/1.1\r\nX-Long: " + b"a" * 20_000,
    ],
)
def test_unusual_but_right(api: RawApi, request_line: bytes) -> None:
    with api.connect() as connection:
        connection.send(request_line + b"\r\nHost: x\r\n\r\n")
        assert connection.read_answer(request_line.split()[0].decode()).status == 200


def test_http_1_0_is_answered_in_kind(api: RawApi) -> None:
    with api.connect() as connection:
        connection.send(b"GET /_ping HTTP/1.0\r\nHost: x\r\n\r\n")
        answered = connection.read_to_end()
    assert answered.startswith(b"HTTP/1.0 200 OK\r\n")
    assert answered.endswith(b"\r\n\r\nOK")


@pytest.mark.parametrize("upgrade", ["websocket", "h2c", "tcp", "TLS/1.3", "nonsense, websocket"])
def test_an_upgrade_nobody_offered_is_ignored(api: RawApi, upgrade: str) -> None:
    """RFC 9110 7.8: the answer is as if the field were not there, and the connection goes on."""
    headers = {"Connection": "Upgrade", "Upgrade": upgrade}
    with api.connect(timeout=5) as connection:
        for _ in range(2):
            answer = connection.request("GET", "/_ping", headers)
            assert (answer.status, answer.body) == (200, b"OK")
            if answer.headers.get("connection") == "close":
                return


@pytest.mark.parametrize("upgrade", ["websocket", "h2c", "tcp"])
def test_an_upgrade_does_not_lose_the_body(api: RawApi, runc_container: TestContainer, upgrade: str) -> None:
    """Two readers of one body must never read two different requests."""
    headers = {"Connection": "Upgrade", "Upgrade": upgrade}
    with api.connect(timeout=5) as connection:
        path = f"/containers/{runc_container.id}/exec"
        answer = connection.request("POST", path, {"Cmd": ["true"]}, headers)
        assert answer.status == 201, answer
        exec_id = answer.json["Id"]
    with api.connect(timeout=5) as connection:
        body = {"Detach": True}
        answer = connection.request("POST", f"/exec/{exec_id}/start", body, headers)
        assert answer.status == 200, answer
        assert answer.headers.get("content-type", "") != "application/vnd.docker.raw-stream", "Detach was not seen"
    assert api.wait_stopped(exec_id)["ExitCode"] == 0


@pytest.mark.parametrize("cut", ["behind the head", "within the body"])
def test_a_client_that_leaves_within_its_body(api: RawApi, cut: str) -> None:
    with api.connect() as connection:
        connection.send(_post(b"Content-Length: 100\r\n", b"" if cut == "behind the head" else b'{"Cmd":'))
    assert api.call("GET", "/_ping").status == 200


def test_expect_100_continue(api: RawApi, runc_container: TestContainer) -> None:
    body = json.dumps({"Cmd": ["true"]}).encode()
    with api.connect() as connection:
        head = _post(
            b"Expect: 100-continue\r\nContent-Length: %d\r\n" % len(body), path=f"/containers/{runc_container.id}/exec"
        )
        connection.send(head)
        assert connection.read_head().status == 100
        connection.send(body)
        assert connection.read_answer().status == 201


def test_pipelined_requests_are_answered_in_order(api: RawApi) -> None:
    with api.connect() as connection:
        paths = ["/_ping", "/version", "/nowhere", "/containers/json", "/_ping", f"/exec/{NO_SUCH_ID}/json"] * 5
        connection.send(b"".join(request_bytes("GET", path) for path in paths))
        answers = [connection.read_answer() for _ in paths]
    statuses = [answer.status for answer in answers]
    assert statuses == [200, 200, 404, 200, 200, 404] * 5
    assert b"ApiVersion" in answers[1].body
    assert answers[4].body == b"OK"


def test_a_half_closed_client_gets_its_answers(api: RawApi, service: Service) -> None:
    with api.connect() as connection:
        connection.send(PING + PING)
        connection.half_close()
        assert [connection.read_answer().body for _ in range(2)] == [b"OK", b"OK"]
        assert connection.read_until_closed() == b""
    socat = [str(find_program("socat")), "-t5", "-", f"UNIX-CONNECT:{service.socket}"]
    done = subprocess.run(socat, input=PING, capture_output=True, timeout=10, check=True)
    assert done.stdout.startswith(b"HTTP/1.1 200 OK")


def test_one_byte_at_a_time(api: RawApi, runc_container: TestContainer) -> None:
    request = request_bytes("POST", f"/containers/{runc_container.id}/exec", {"Cmd": ["true"]})
    with api.connect() as connection:
        for byte in request:
            connection.send(bytes([byte]))
        assert connection.read_answer().status == 201


def test_a_flood_of_pipelined_requests_is_bounded(api: RawApi) -> None:
    """Nobody reads the answers: the sender is blocked, the service does not swell (see the memory bound)."""
    with api.connect() as connection:
        sent = connection.send_until_blocked(PING * ((32 << 20) // len(PING)), patience=0.5)
        assert sent < 8 << 20, f"{sent} bytes of requests were taken in"


# -- row 37: what follows a start request is stdin, never HTTP


def test_bytes_behind_a_start_request_are_stdin(api: RawApi, container: TestContainer) -> None:
    exec_id = api.create_attached(container.id, "cat")
    with api.connect() as connection:
        connection.send(start_bytes(exec_id) + SMUGGLED)
        connection.half_close()
        assert connection.read_head().status == 101
        received = connection.read_until_closed()
    assert received == bytes([1, 0, 0, 0]) + len(SMUGGLED).to_bytes(4, "big") + SMUGGLED


@pytest.mark.parametrize("split", [False, True], ids=["one segment", "two segments"])
@pytest.mark.parametrize("case", ["404", "409", "400 body", "400 version", "400 type"])
def test_bytes_behind_a_start_that_fails_are_never_http(
    api: RawApi, runc_container: TestContainer, case: str, split: bool
) -> None:
    exec_id = api.create(runc_container.id, "true", **OUTPUT)
    if case == "409":
        assert api.start_detached(exec_id).status == 200
    request = {
        "404": start_bytes(NO_SUCH_ID),
        "409": start_bytes(exec_id, Detach=True),
        "400 body": request_bytes("POST", f"/exec/{exec_id}/start", b"{", JSON | {"Upgrade": "tcp"}),
        "400 version": request_bytes("POST", f"/v9.99/exec/{exec_id}/start", {}),
        "400 type": request_bytes("POST", f"/exec/{exec_id}/start", b"{}", {"Content-Type": "text/plain"}),
    }[case]
    with api.connect(timeout=5) as connection:
        if split:
            connection.send(request)
            answer = connection.read_answer()
            connection.try_send(SMUGGLED)
        else:
            connection.send(request + SMUGGLED)
            answer = connection.read_answer()
        assert answer.status == int(case[:3])
        assert answer.message
        assert connection.read_until_closed() == b""


@pytest.mark.parametrize("case", ["400 version", "400 type"])
def test_a_start_refused_before_its_body_came(api: RawApi, runc_container: TestContainer, case: str) -> None:
    """The answer is there before the body: the connection must end or go on, and not hang."""
    exec_id = api.create(runc_container.id, "true", **OUTPUT)
    request = {
        "400 version": request_bytes("POST", f"/v9.99/exec/{exec_id}/start", b"{}", JSON),
        "400 type": request_bytes("POST", f"/exec/{exec_id}/start", b"{}", {"Content-Type": "text/plain"}),
    }[case]
    with api.connect(timeout=5) as connection:
        connection.send(request[:-2])
        assert connection.read_answer().status == 400
        connection.try_send(request[-2:] + SMUGGLED)
        assert connection.read_until_closed() == b""


def test_much_behind_a_start_that_fails_over_tcp(tcp_api: RawApi) -> None:
    """A close with unread input would make the kernel reset the connection, and the client would never know why."""
    for headers, words in ((tcp_api.headers, "No such exec instance"), ({}, "bearer token")):
        with tcp_api.connect(timeout=5) as connection:
            connection.try_send(start_bytes(NO_SUCH_ID, headers=headers) + b"x" * (4 << 20))
            assert words in connection.read_answer().json["message"]


def test_after_a_detached_start_the_connection_goes_on(api: RawApi, container: TestContainer) -> None:
    with api.connect() as connection:
        for _ in range(3):
            exec_id = api.create(container.id, "true", **OUTPUT)
            connection.send(start_bytes(exec_id, Detach=True))
            assert connection.read_answer().status == 200
            assert connection.request("GET", "/_ping").body == b"OK"


def test_bytes_behind_a_detached_start_end_the_connection(api: RawApi, runc_container: TestContainer) -> None:
    exec_id = api.create(runc_container.id, "true", **OUTPUT)
    with api.connect(timeout=5) as connection:
        connection.send(start_bytes(exec_id, Detach=True) + SMUGGLED)
        assert connection.read_answer().status == 200
        assert connection.read_until_closed() == b""


def test_a_start_behind_another_request(api: RawApi, container: TestContainer) -> None:
    """The answer to the first must not take what is meant for the second."""
    exec_id = api.create_attached(container.id, "cat")
    with api.connect(timeout=5) as connection:
        connection.send(PING + start_bytes(exec_id) + b"stdin")
        connection.half_close()
        assert connection.read_answer().body == b"OK"
        assert connection.read_head().status == 101
        assert connection.read_until_closed()[8:] == b"stdin"


def test_a_long_body_and_much_stdin_at_once(api: RawApi, container: TestContainer) -> None:
    """Both the body and what stands behind it are larger than what is held: reading pauses twice, and goes on."""
    exec_id = api.create_attached(container.id, "wc", "-c")
    body = b'{"Detach": false' + b" " * 900_000 + b"}"
    stdin = b"s" * 3_000_000
    with api.connect() as connection:
        connection.send(request_bytes("POST", f"/exec/{exec_id}/start", body, JSON | {"Upgrade": "tcp"}) + stdin)
        connection.half_close()
        assert connection.read_head().status == 101
        assert connection.read_until_closed()[8:] == b"3000000\n"


@pytest.mark.parametrize("target", ["http://x/exec/{}/start", "/v1.41/exec/{}/start", "/exec/{}/start?a=b", "encoded"])
def test_every_spelling_of_a_start_can_be_hijacked(api: RawApi, runc_container: TestContainer, target: str) -> None:
    exec_id = api.create_attached(runc_container.id, "cat")
    encoded = f"/%65xec/%{ord(exec_id[0]):02x}{exec_id[1:]}/st%61rt"
    path = encoded if target == "encoded" else target.format(exec_id)
    with api.connect(timeout=5) as connection:
        connection.send(request_bytes("POST", path, {}) + b"stdin")
        connection.half_close()
        assert connection.read_head().status == 200
        assert connection.read_until_closed()[8:] == b"stdin"


# -- row 31: connections that never say a word


def test_a_half_head_behind_a_request_is_not_waited_for(api: RawApi) -> None:
    with api.connect() as connection:
        connection.send(PING + b"GET /_pi")
        assert connection.read_answer().body == b"OK"
        assert connection.closes_within(12)


def test_2000_silent_or_half_headed_connections(api: RawApi) -> None:
    """All are closed within about ten seconds, and everybody else is served meanwhile as if they were not there."""
    begun = time.monotonic()
    silent = [api.connect() for _ in range(2000)]
    try:
        for number, connection in enumerate(silent):
            if number % 2:
                connection.send(b"GET /_ping HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        opened = time.monotonic() - begun
        poll = select.poll()
        left = {connection.socket.fileno(): connection for connection in silent}
        for fd in left:
            poll.register(fd, select.POLLIN | select.POLLHUP)
        pings: list[float] = []
        dripped = time.monotonic()
        with api.connect() as client:
            while left and time.monotonic() - begun < 20:
                if time.monotonic() - dripped > 1:  # a byte now and then must not buy time
                    dripped = time.monotonic()
                    for connection in silent[1:200:2]:
                        if connection.socket.fileno() in left:
                            connection.try_send(b"x")
                before = time.monotonic()
                assert client.request("GET", "/_ping").body == b"OK"
                pings.append(time.monotonic() - before)
                for fd, _ in poll.poll(10):
                    if _has_ended(left[fd].socket):
                        poll.unregister(fd)
                        del left[fd]
        took = time.monotonic() - begun
    finally:
        for connection in silent:
            connection.close()
    p50, p99 = statistics.median(pings), statistics.quantiles(pings, n=100)[98]
    print(f"opened in {opened:.2f} s, closed after {took:.2f} s; /_ping p50 {p50:.4f} p99 {p99:.4f} s n={len(pings)}")
    assert not left, f"{len(left)} connections were still open after {took:.1f} s"
    assert 9 < took < opened + 13
    assert p99 < 0.25


def _has_ended(connection: socket.socket) -> bool:
    try:
        while connection.recv(1 << 16, socket.MSG_DONTWAIT):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    return True
