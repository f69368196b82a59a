"""`POST /exec/{id}/resize`: both values, their range, and when they count."""

import pytest

from contract.api import NO_SUCH_ID, Api
from support.runtimes import TestContainer
from support.tty import tell_size

SYNTAX = "invalid syntax"
RANGE = "value out of range"


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", f'invalid resize height "": {SYNTAX}'),
        ("h=40", f'invalid resize width "": {SYNTAX}'),
        ("w=120", f'invalid resize height "": {SYNTAX}'),
        ("h=&w=120", f'invalid resize height "": {SYNTAX}'),
        ("h=tall&w=120", f'invalid resize height "tall": {SYNTAX}'),
        ("h=40&w=wide", f'invalid resize width "wide": {SYNTAX}'),
        ("h=4.5&w=120", f'invalid resize height "4.5": {SYNTAX}'),
        ("h=0x10&w=120", f'invalid resize height "0x10": {SYNTAX}'),
        ("h=%2B40&w=120", f'invalid resize height "+40": {SYNTAX}'),
        ("h=%2040&w=120", f'invalid resize height " 40": {SYNTAX}'),
        ("h=1_0&w=120", f'invalid resize height "1_0": {SYNTAX}'),
        ("h=%D9%A4&w=120", f'invalid resize height "\u0664": {SYNTAX}'),
        ("h=-&w=120", f'invalid resize height "-": {SYNTAX}'),
        ("h=-1&w=120", f'invalid resize height "-1": {RANGE}'),
        ("h=4294967296&w=120", f'invalid resize height "4294967296": {RANGE}'),
        ("h=40&w=4294967296", f'invalid resize width "4294967296": {RANGE}'),
        ("h=99999999999999999999&w=120", f'invalid resize height "99999999999999999999": {RANGE}'),
        # A uint32 for Docker, which lets the kernel cut it to 16 bits: a size that nobody asked for.
        ("h=65536&w=120", f'invalid resize height "65536": {RANGE}'),
    ],
)
def test_a_value_that_is_no_size_is_refused(query: str, message: str, api: Api, runc_container: TestContainer) -> None:
    session_id = api.create(runc_container.id, "true", Tty=True)
    response = api.call("POST", f"/exec/{session_id}/resize?{query}")
    assert (response.status, response.message) == (400, message)


def test_a_very_long_number_is_refused_and_not_repeated_in_full(api: Api) -> None:
    response = api.call("POST", f"/exec/{NO_SUCH_ID}/resize?h={'9' * 5000}&w=1")
    assert (response.status, response.message) == (400, f'invalid resize height "{"9" * 64}": {RANGE}')


def test_the_values_are_looked_at_before_the_session(api: Api) -> None:
    assert api.call("POST", f"/exec/{NO_SUCH_ID}/resize?h=x&w=1").status == 400


def test_a_resize_before_the_start_is_kept_for_it(api: Api, container: TestContainer) -> None:
    """The docker CLI resizes at once, without knowing whether the start has come through."""
    session_id = api.create(container.id, *tell_size(container), Tty=True, AttachStdout=True, ConsoleSize=[24, 80])
    for h, w in [(39, 119), (40, 120)]:
        assert api.call("POST", f"/exec/{session_id}/resize?h={h}&w={w}").status == 200
    with api.attach(session_id, Tty=True) as stream:
        assert stream.read_raw() == b"40 120\r\n"


def test_the_size_at_start_comes_before_an_earlier_resize(api: Api, container: TestContainer) -> None:
    session_id = api.create(container.id, *tell_size(container), Tty=True, AttachStdout=True)
    assert api.call("POST", f"/exec/{session_id}/resize?h=40&w=120").status == 200
    with api.attach(session_id, Tty=True, ConsoleSize=[41, 121]) as stream:
        assert stream.read_raw() == b"41 121\r\n"


def test_a_resize_reaches_a_running_terminal(api: Api, container: TestContainer) -> None:
    script = "trap 'stty size; exit' WINCH; echo up; while :; do read line; done"
    session_id = api.create_attached(container.id, "sh", "-c", script, Tty=True)
    with api.attach(session_id, Tty=True) as stream:
        stream.connection.read_until(b"up\r\n")
        response = api.call("POST", f"/exec/{session_id}/resize?w=120&h=40")
        assert (response.status, response.body) == (200, b"")
        stream.send(b"\n")  # ash runs the trap between two commands
        assert b"40 120\r\n" in stream.read_raw()


def test_a_resize_without_a_terminal_does_nothing(api: Api, container: TestContainer) -> None:
    session_id = api.create_attached(container.id, "cat")
    with api.attach(session_id) as stream:
        assert api.call("POST", f"/exec/{session_id}/resize?h=40&w=120").status == 200
        stream.half_close()
        assert stream.read_frames() == (b"", b"")


def test_a_resize_after_the_end_is_a_conflict(api: Api, container: TestContainer) -> None:
    session_id = api.run(container.id, "true", Tty=True)["ID"]
    response = api.call("POST", f"/exec/{session_id}/resize?h=40&w=120")
    assert (response.status, response.message) == (409, f"exec command {session_id} is not running")
