"""Request bodies: what Go takes, what nobody should take, and what is said of it."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from execgate.http.bodies import CreateBody, DockerStartBody, console_size, parse_body
from execgate.model.config import ConsoleSize
from execgate.model.errors import InvalidArgument


def refused(data: bytes, model: Any = CreateBody) -> str:
    with pytest.raises(InvalidArgument) as failure:
        parse_body(data, model)
    return failure.value.message


def test_every_field() -> None:
    body = parse_body(
        json.dumps(
            {
                "User": "u", "Privileged": True, "Tty": True, "ConsoleSize": [40, 120],
                "AttachStdin": True, "AttachStdout": True,
                "AttachStderr": True, "DetachKeys": "ctrl-a", "Env": ["A=b"], "WorkingDir": "/w", "Cmd": ["a", "b"],
            }
        ).encode(),
        CreateBody,
    )  # fmt: skip
    assert (body.user, body.privileged, body.tty, body.console_size) == ("u", True, True, [40, 120])
    assert (body.attach_stdin, body.attach_stdout, body.attach_stderr) == (True, True, True)
    assert (body.detach_keys, body.env, body.working_dir, body.cmd) == ("ctrl-a", ["A=b"], "/w", ["a", "b"])


@pytest.mark.parametrize(
    "data", [b"{}", b"null", b' {"Cmd": null, "Tty": null} ', b'{"Unknown": {"deep": [1, {"x": null}]}}']
)
def test_nothing_is_the_default(data: bytes) -> None:
    assert parse_body(data, CreateBody) == CreateBody()


@pytest.mark.parametrize("key", ["Detach", "detach", "DETACH", "dEtAcH"])
def test_any_case(key: str) -> None:
    assert parse_body(json.dumps({key: True}).encode(), DockerStartBody).detach


@pytest.mark.parametrize(
    "data", [b'{"Tty": true, "Tty": false}', b'{"Tty": true, "tty": true}', b'{"X": {"a": 1, "a": 1}}']
)
def test_no_key_twice(data: bytes) -> None:
    assert "twice" in refused(data)


def test_letters_that_go_takes_for_others() -> None:
    """`\u017f` is an s, and `\u212a` a k: a proxy in Go must not see a field that is not seen here."""
    assert parse_body('{"u\u017fer": "root"}'.encode(), CreateBody).user == "root"
    assert "twice" in refused('{"U\u017fer": "root", "User": "app"}'.encode())
    assert parse_body('{"detach\u212aeys": "a"}'.encode(), CreateBody).detach_keys == "a"


def test_labels_are_no_fields() -> None:
    """Their case is the client's, and two that differ in it are two."""
    body = parse_body(b'{"labels": {"Team": "a", "team": "b"}, "cmd": ["x"]}', CreateBody)
    assert body.labels == {"Team": "a", "team": "b"}
    assert "twice" in refused(b'{"Labels": {"a": "b", "a": "c"}}')


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b'{"Cmd": "true"}', "Cmd"),
        (b'{"Cmd": [1]}', "Cmd.0"),
        (b'{"AttachStdin": "true"}', "AttachStdin"),
        (b'{"WorkingDir": 1}', "WorkingDir"),
        (b'{"ConsoleSize": [1]}', "ConsoleSize"),
        (b'{"ConsoleSize": [1, "2"]}', "ConsoleSize.1"),
        (b'{"ConsoleSize": [1, 2.0]}', "ConsoleSize.1"),
        (b'{"ConsoleSize": [true, 2]}', "ConsoleSize.0"),
        (b'{"Env": {"A": "b"}}', "Env"),
    ],
)
def test_the_wrong_field_is_named_as_docker_spells_it(data: bytes, field: str) -> None:
    assert refused(data).startswith(f"invalid JSON: {field}: ")


@pytest.mark.parametrize(
    "data", [b"[]", b'"x"', b"1", b"true", b"{", b"{} {}", b"\xff", b"NaN", b'{"a": Infinity}', b"[" * 100_000]
)
def test_what_is_no_object(data: bytes) -> None:
    assert refused(data).startswith("invalid JSON")


def test_an_error_does_not_repeat_a_secret() -> None:
    assert "hunter2" not in refused(b'{"Env": ["A=b", {"SECRET": "hunter2"}]}')
    assert "hunter2" not in refused(b'{"Env": ["SECRET=hunter2"')


@given(st.binary(max_size=200))
def test_no_bytes_do_harm(data: bytes) -> None:
    with contextlib.suppress(InvalidArgument):  # and nothing else may be raised
        parse_body(data, CreateBody)


@given(
    st.dictionaries(
        st.text(max_size=12), st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=5)
    )
)
def test_no_document_does_harm(document: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidArgument):
        parse_body(json.dumps(document).encode(), CreateBody)


@pytest.mark.parametrize(
    ("box", "size"),
    [
        (None, None),
        ([0, 0], None),
        ([0, 80], None),
        ([40, 120], ConsoleSize(40, 120)),
        ([65535, 1], ConsoleSize(65535, 1)),
    ],
)
def test_console_size(box: list[int] | None, size: ConsoleSize | None) -> None:
    assert console_size(box) == size


def test_a_console_larger_than_a_terminal_can_be() -> None:
    with pytest.raises(InvalidArgument, match="out of range"):
        console_size([65536, 80])
