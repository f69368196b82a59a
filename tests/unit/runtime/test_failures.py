"""Which number a failed start gets, and what a client is told of it."""

import json

import pytest

from execgate.runtime import failures

RUNC = "exec failed: unable to start container process: "


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (RUNC + 'exec: "nope": executable file not found in $PATH', 127),
        (RUNC + 'exec: "/nope": stat /nope: no such file or directory', 127),
        (RUNC + 'exec: "/etc/passwd/x": stat /etc/passwd/x: not a directory', 127),
        (RUNC + 'exec: "/etc": permission denied', 126),
        (RUNC + 'exec: "/etc": is a directory', 126),
        ("open executable: Operation not permitted", 126),
        ("executable file `nope` not found in $PATH: No such file or directory", 127),
        (RUNC + 'chdir to cwd ("/nope") set in config.json failed: no such file or directory', 127),
        ("cannot exec in a paused container", 128),
        ("", 128),
        ("EXEC: PERMISSION DENIED", 126),
    ],
)
def test_codes(text: str, code: int) -> None:
    failure = failures.start_failure(text)
    assert failure.exit_code == code
    assert failure.message.startswith("OCI runtime exec failed: ")


@pytest.mark.parametrize("text", ["is a directory", "open executable: Operation not permitted", "permission denied"])
def test_the_words_that_the_docker_cli_looks_for(text: str) -> None:
    assert failures.start_failure(text).message.lower().count("permission denied") == 1


def test_no_reason_is_said_so() -> None:
    assert "gave no reason" in failures.start_failure(" \n").message


@pytest.mark.parametrize(
    "text", ["\x1b[31mred", "a\r\nb\x00c", "\x9b31m", "\x7f", "tab\tand\nnewline", "\u2028", "\ud800"]
)
def test_what_is_shown_cannot_speak_to_a_terminal(text: str) -> None:
    shown = failures.printable(text)
    assert "\n" not in shown
    assert shown == shown.encode().decode()
    assert not any(ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0 for character in shown)


def test_what_is_shown_is_bounded() -> None:
    assert len(failures.printable("\x01" * 10_000_000)) <= failures.MESSAGE_LIMIT
    assert len(failures.printable("x" * 10_000_000)) == failures.MESSAGE_LIMIT


def line(level: object, msg: object) -> bytes:
    return json.dumps({"level": level, "msg": msg, "time": "now"}).encode()


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (b"", ""),
        (line("error", "one"), "one"),
        (line("error", "one") + b"\n" + line("error", "two") + b"\n", "two"),
        (line("error", "one") + b"\n" + line("warning", "later, harmless"), "one"),
        (line("fatal", "end"), "end"),
        (line("error", "one") + b'\n{"level":"error","ms', "one"),
        (b"no JSON\n\xff\xfe\n" + line("error", "one") + b"\n[]\n1\nnull\n", "one"),
        (line("error", 5), ""),
        (line(["error"], "x"), ""),
        (b"[" * 60_000, ""),
        (line("error", "é\u2028x"), "é\u2028x"),
        (b'{"msg":"exec \xff: not found","level":"error"}', "exec \ufffd: not found"),
    ],
)
def test_the_last_error_counts(log: bytes, expected: str) -> None:
    assert failures.last_error(log) == expected
