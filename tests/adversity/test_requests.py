"""Rows 33-36 of the fault matrix: requests that are HTTP, and mean no good."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from support.api import OUTPUT, RawApi
from support.raw import JSON, request_bytes
from support.runtimes import TestContainer
from support.service import Service
from support.tty import tell_size

pytestmark = pytest.mark.usefixtures("unharmed")

# -- row 33: hostile JSON

_DEEP = b"[" * 100_000 + b"]" * 100_000
BODIES: dict[str, bytes] = {
    "an array 100,000 deep": _DEEP,
    "an object 100,000 deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "depth where nobody looks": b'{"Cmd": ["true"], "Ignored": ' + _DEEP + b"}",
    "a key twice": b'{"Cmd": ["true"], "Cmd": ["false"]}',
    "a key twice in two cases": b'{"Cmd": ["true"], "cmd": ["false"]}',
    "a key twice, once escaped": b'{"Cmd": ["true"], "\\u0043md": ["false"]}',
    "a key twice, deep in": b'{"Cmd": ["true"], "X": {"a": 1, "a": 2}}',
    "a lone surrogate in an argument": b'{"Cmd": ["\\ud800"]}',
    "a lone surrogate in the environment": b'{"Cmd": ["true"], "Env": ["A=\\udc00"]}',
    "a lone surrogate in the user": b'{"Cmd": ["true"], "User": "\\udfff"}',
    "a lone surrogate in the directory": b'{"Cmd": ["true"], "WorkingDir": "/\\ud800"}',
    "a lone surrogate in a label": b'{"Cmd": ["true"], "Labels": {"a": "\\ud800"}}',
    "a lone surrogate in the detach keys": b'{"Cmd": ["true"], "DetachKeys": "\\ud800"}',
    "a NUL in an argument": b'{"Cmd": ["a\\u0000b"]}',
    "a NUL in the environment": b'{"Cmd": ["true"], "Env": ["A=a\\u0000b"]}',
    "a NUL in the user": b'{"Cmd": ["true"], "User": "root\\u0000x"}',
    "a NUL in the directory": b'{"Cmd": ["true"], "WorkingDir": "/\\u0000"}',
    "an argument longer than the kernel takes": json.dumps({"Cmd": ["echo", "x" * 131_072]}).encode(),
    "no name in the environment": b'{"Cmd": ["true"], "Env": ["=x"]}',
    "a directory that leads through a descriptor": b'{"Cmd": ["true"], "WorkingDir": "/proc/self/fd/7"}',
    "a relative directory": b'{"Cmd": ["true"], "WorkingDir": "tmp"}',
    "no UTF-8": b'{"Cmd": ["\xff\xfe"]}',
    "UTF-16": '{"Cmd": ["true"]}'.encode("utf-16"),
    "a BOM": b'\xef\xbb\xbf{"Cmd": ["true"]}',
    "NaN": b'{"Cmd": ["true"], "X": NaN}',
    "a number of 10,000 digits": b'{"Cmd": ["true"], "X": ' + b"9" * 10_000 + b"}",
    "a string for a list": b'{"Cmd": "true"}',
    "a number in a list": b'{"Cmd": [1]}',
    "a string for a truth": b'{"Cmd": ["true"], "Tty": "yes"}',
    "a number for a truth": b'{"Cmd": ["true"], "Tty": 1}',
    "no command": b"{}",
    "an empty command": b'{"Cmd": []}',
    "null": b"null",
    "a list": b"[]",
    "two documents": b'{"Cmd": ["true"]} {"Cmd": ["false"]}',
    "half a document": b'{"Cmd": ["true"',
    "a terminal of minus one": b'{"Cmd": ["true"], "Tty": true, "ConsoleSize": [-1, 80]}',
    "a terminal of 2^32": b'{"Cmd": ["true"], "Tty": true, "ConsoleSize": [4294967296, 80]}',
    "a terminal of 65536": b'{"Cmd": ["true"], "Tty": true, "ConsoleSize": [65536, 80]}',
    "a terminal of three dimensions": b'{"Cmd": ["true"], "Tty": true, "ConsoleSize": [1, 2, 3]}',
    "keys nobody has": b'{"Cmd": ["true"], "DetachKeys": "ctrl-1"}',
    "200 keys": json.dumps({"Cmd": ["true"], "DetachKeys": ",".join("a" * 200)}).encode(),
    "a user nobody knows": b'{"Cmd": ["true"], "User": "nobody-knows"}',
    "a user of 2^32": b'{"Cmd": ["true"], "User": "4294967296"}',
    "a user of minus one": b'{"Cmd": ["true"], "User": "-1"}',
    "a user of three parts": b'{"Cmd": ["true"], "User": "0:0:0"}',
}


@pytest.mark.parametrize("body", list(BODIES.values()), ids=list(BODIES))
def test_hostile_json(api: RawApi, runc_container: TestContainer, body: bytes) -> None:
    begun = time.monotonic()
    answer = api.call("POST", f"/containers/{runc_container.id}/exec", body, headers=JSON)
    assert answer.status == 400, answer
    assert len(answer.message) < 4096, "an error must not repeat a megabyte"
    assert time.monotonic() - begun < 5


def test_arguments_over_the_kernels_total(api: RawApi, runc_container: TestContainer) -> None:
    """100,000 short ones fit in a body and not in execve(2)."""
    answer = api.call("POST", f"/containers/{runc_container.id}/exec", {"Cmd": ["true"] + [""] * 300_000})
    assert answer.status in (400, 413), answer
    assert answer.message


def test_what_go_takes_is_taken(api: RawApi, runc_container: TestContainer) -> None:
    """Any case, null for nothing, unknown fields."""
    body = b'{"cMD": ["true"], "env": null, "Tty": null, "Unknown": {"x": [1]}, "CONSOLESIZE": null}'
    assert api.call("POST", f"/containers/{runc_container.id}/exec", body, headers=JSON).status == 201


# -- row 34: resizing


@pytest.mark.parametrize(
    "value", ["-1", "4294967296", "65536", "9" * 5000, "", "1.5", "0x10", "\uff11", "+1", " 1", "1_0", "nan"]
)
@pytest.mark.parametrize("name", ["h", "w"])
def test_sizes_that_are_none(api: RawApi, runc_container: TestContainer, name: str, value: str) -> None:
    exec_id = api.create(runc_container.id, "true", Tty=True)
    query = "&".join(f"{key}={value if key == name else '10'}" for key in ("h", "w"))
    answer = api.call("POST", f"/exec/{exec_id}/resize?{quote(query, safe='=&+')}")
    assert answer.status == 400, answer
    assert "invalid resize" in answer.message


@pytest.mark.parametrize("query", ["", "?h=1", "?w=1", "?h&w"])
def test_a_size_needs_both(api: RawApi, runc_container: TestContainer, query: str) -> None:
    exec_id = api.create(runc_container.id, "true", Tty=True)
    assert api.call("POST", f"/exec/{exec_id}/resize{query}").status == 400


def test_resize_storm(api: RawApi, container: TestContainer) -> None:
    """The terminal ends up with the last size, the process is not drowned in signals, and nothing queues up."""
    script = "stty -echo; printf up; while read line; do stty size; done"
    with api.open(container.id, "sh", "-c", script, stdin=True, tty=True) as session:
        session.connection.read_exactly(2)
        with api.connect() as connection:
            for block in range(20):
                sizes = [(block * 50 + number + 1, 80) for number in range(50)]
                paths = (f"/exec/{session.id}/resize?h={height}&w={width}" for height, width in sizes)
                connection.send(b"".join(request_bytes("POST", path) for path in paths))
                assert [connection.read_answer().status for _ in sizes] == [200] * 50
        deadline = time.monotonic() + 5
        seen = b""
        while b"1000 80" not in seen:  # conmon applies it in its own time
            assert time.monotonic() < deadline, seen[-200:]
            session.send(b"\n")
            seen += session.connection.read()
        session.send(b"\x04")
        session.finish()
        assert session.exit_code() == 0


def test_sizes_before_the_start(api: RawApi, container: TestContainer) -> None:
    exec_id = api.create(container.id, *tell_size(container), Tty=True, **OUTPUT)
    for height in range(1, 300):
        assert api.call("POST", f"/exec/{exec_id}/resize?h={height}&w=7").status == 200
    with api.attach(exec_id, Tty=True) as session:
        assert session.read_raw() == b"299 7\r\n"
    assert api.call("POST", f"/exec/{exec_id}/resize?h=1&w=1").status == 409


# -- row 35: ids

IDS = [
    "..", "...", ".", "%2e%2e", "%2e%2e%2f%2e%2e%2fetc", "..%2f..%2fetc%2fpasswd", "%2fetc", "%00", "a%00b", "%0a",
    "%0d%0aX:y",
    "%ff", "%ed%a0%80", "%25", "%", "~", "-rf", "--root=x", "*", "?", "x" * 7000, "a%2fb", "\\..\\", "%c0%ae%c0%ae",
    "state.json", "%20%20",
]  # fmt: skip


@pytest.mark.parametrize("name", [one.replace(" ", "") for one in IDS], ids=lambda one: one[:20])
def test_hostile_ids(api: RawApi, name: str) -> None:
    requests = [
        ("GET", f"/exec/{name}/json"),
        ("POST", f"/exec/{name}/start"),
        ("POST", f"/exec/{name}/resize?h=1&w=1"),
        ("GET", f"/containers/{name}/json"),
        ("GET", f"/containers/{name}/top"),
        ("POST", f"/containers/{name}/exec"),
    ]
    for method, path in requests:
        body = {"Cmd": ["true"]} if method == "POST" else None
        answer = api.call(method, path, body)
        assert answer.status == 404, (method, path, answer)
        assert len(answer.message) < 4096


@pytest.mark.parametrize(
    "change", [str.upper, lambda one: one[:63], lambda one: one + "0", lambda one: one[:12], lambda one: " " + one]
)
def test_ids_are_exact(api: RawApi, runc_container: TestContainer, change: Callable[[str], str]) -> None:
    exec_id = "a" + api.create(runc_container.id, "true")[1:]
    assert api.call("GET", f"/exec/{change(exec_id).replace(' ', '%20')}/json").status == 404


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v0.1/_ping", 400),
        ("/v1.23/_ping", 400),
        ("/v1.52/_ping", 400),
        ("/v99999.1/_ping", 400),
        ("/v1/_ping", 400),
        ("/v1.41.1/_ping", 400),
        ("/v./_ping", 400),
        ("/v1.041/_ping", 200),
        ("/vx/_ping", 404),
        ("//_ping", 404),
        ("/_ping/", 404),
        ("/v1.41/../_ping", 404),
        ("/containers/json?filters=%7B", 400),
        ("/containers/json?filters=%5B%5D", 400),
        ("/containers/json?filters=" + "%5B" * 2000, 400),
        ('/containers/json?filters={"name":1}', 400),
        ('/containers/json?filters={"x":["y"]}', 400),
        ('/containers/json?filters={"status":["x"]}', 400),
        ("/containers/json?limit=x", 400),
        ("/events?since=x", 400),
        ("/events?since=1e400", 400),
        ("/events?since=NaN", 400),
        ("/events?since=2&until=1", 400),
    ],
)
def test_paths_and_queries(api: RawApi, path: str, status: int) -> None:
    answer = api.call("GET", path.replace('"', "%22").replace("{", "%7B").replace("}", "%7D"))
    assert answer.status == status, answer
    assert status == 200 or answer.message


@pytest.mark.parametrize(
    "ps_args", ["-o%20pid,environ", "--help", "-ef;id", "$(id)", "%0a-ef", "-eo%20pid,args%00", "a" * 5000]
)
def test_top_takes_no_commands(api: RawApi, runc_container: TestContainer, ps_args: str) -> None:
    answer = api.call("GET", f"/containers/{runc_container.id}/top?ps_args={ps_args}")
    assert answer.status in (200, 400), answer
    assert b"uid=" not in answer.body


def test_a_log_line_cannot_be_forged(new_service: Callable[..., Service]) -> None:
    """What a client sends must not begin a line of the log."""
    service = new_service(flags=["--log-level=debug"])
    api = RawApi(service.socket)
    for path in (
        "/containers/%0aFORGED/json",
        "/exec/%0d%0aFORGED/json",
        "/containers/x%1b[31m%e2%80%a8%c2%85FORGED/json",
    ):
        assert api.call("GET", path).status == 404
    assert not [line for line in service.log().splitlines() if line.startswith("FORGED")], service.log()
    assert "\x1b" not in service.log()


# -- row 36: hostile /etc/passwd

_EVIL = b"evil:x:4242:4242::/:/bin/sh\n"


@pytest.fixture
def host_secret(tmp_path: Path) -> Path:
    path = tmp_path / "passwd"
    path.write_bytes(_EVIL)
    return path


@pytest.fixture(params=["passwd", "group"])
def account_file(
    request: pytest.FixtureRequest, new_container: Callable[..., TestContainer]
) -> tuple[TestContainer, Path]:
    container = new_container()
    path = container.rootfs / "etc" / request.param
    path.unlink()
    return container, path


def _link_to_host(path: Path, secret: Path) -> None:
    path.symlink_to(secret)


def _link_up_to_host(path: Path, secret: Path) -> None:
    path.symlink_to("../" * 40 + str(secret))


def _link_through_proc(path: Path, secret: Path) -> None:
    path.symlink_to(f"/proc/1/root{secret}")


def _directory_link(path: Path, secret: Path) -> None:
    path.parent.rename(path.parent.with_name("old"))
    path.parent.symlink_to(secret.parent)


def _fifo(path: Path, secret: Path) -> None:
    os.mkfifo(path)


def _directory(path: Path, secret: Path) -> None:
    path.mkdir()


def _gigabyte(path: Path, secret: Path) -> None:
    with path.open("wb") as file:
        file.write(_EVIL)
        file.truncate(1 << 30)


def _device(path: Path, secret: Path) -> None:
    path.symlink_to("/dev/zero")


def _loop(path: Path, secret: Path) -> None:
    path.symlink_to(path.name)


def _one_endless_line(path: Path, secret: Path) -> None:
    path.write_bytes(b"evil" * 200_000)


def _colons(path: Path, secret: Path) -> None:
    path.write_bytes(b":" * 1_000_000)


def _wrong_numbers(path: Path, secret: Path) -> None:
    path.write_bytes(
        b"evil:x:-1:-1::/:\nevil:x:4294967295:0::/:\nevil:x:" + b"9" * 5000 + b":0::/:\nevil:x:\xd9\xa1:0::/:\n"
    )


@pytest.mark.parametrize(
    "plant",
    [
        _link_to_host, _link_up_to_host, _link_through_proc, _directory_link, _fifo, _directory, _gigabyte, _device,
        _loop,
        _one_endless_line, _colons, _wrong_numbers,
    ],
)  # fmt: skip
def test_hostile_account_files(
    api: RawApi,
    account_file: tuple[TestContainer, Path],
    host_secret: Path,
    plant: Callable[[Path, Path], None],
) -> None:
    """Nothing of the host is read, no time is lost, and the number is no name of anybody; numbers still work."""
    container, path = account_file
    plant(path, host_secret)
    user = "evil" if path.name == "passwd" else "0:evil"
    begun = time.monotonic()
    answer = api.call("POST", f"/containers/{container.id}/exec", {"Cmd": ["id"], "User": user})
    assert answer.status == 400, answer
    assert "evil" in answer.message
    # What the runtime makes of the file at the start is its own affair (runc's hangs in a FIFO); ours is done.
    assert api.call("POST", f"/containers/{container.id}/exec", {"Cmd": ["id"], "User": "1234:1234"}).status == 201
    assert time.monotonic() - begun < 5


def test_many_creates_at_once(api: RawApi, container: TestContainer) -> None:
    """Two dozen clients, each of whom wants to start the same session: one of them does."""
    exec_id = api.create(container.id, "sh", "-c", "echo once >> /tmp/once")
    (container.rootfs / "tmp/once").unlink(missing_ok=True)
    statuses: list[int] = []
    barrier = threading.Barrier(24)

    def start() -> None:
        with api.connect() as connection:
            barrier.wait()
            answer = connection.request("POST", f"/exec/{exec_id}/start", {"Detach": True})
            statuses.append(answer.status)

    threads = [threading.Thread(target=start) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] + [409] * 23
    assert api.wait_stopped(exec_id)["ExitCode"] == 0
    assert (container.rootfs / "tmp/once").read_text() == "once\n"
