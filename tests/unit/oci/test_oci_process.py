"""process.json: what is inherited, what is overridden, and what is refused at create."""

import copy
import json
from typing import Any

import pytest

from execgate.model.config import ConsoleSize, ExecConfig, ResolvedUser
from execgate.model.errors import InvalidArgument
from execgate.oci.process import MAX_STRING, build_process, validate_config

ALL = ("CAP_CHOWN", "CAP_KILL", "CAP_SYS_ADMIN")
BOUND = ["CAP_CHOWN", "CAP_KILL"]
CONTAINER: dict[str, Any] = {
    "terminal": True,
    "consoleSize": {"height": 5, "width": 6},
    "user": {"uid": 1000, "gid": 1000, "additionalGids": [1000, 7], "umask": 23, "username": "x"},
    "args": ["init"],
    "commandLine": "init",
    "env": ["PATH=/bin", "A=1", "B=2"],
    "cwd": "/srv",
    "capabilities": {
        "bounding": BOUND,
        "effective": ["CAP_KILL"],
        "permitted": ["CAP_KILL"],
        "inheritable": ["CAP_KILL"],
        "ambient": ["CAP_KILL"],
    },
    "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2}],
    "noNewPrivileges": True,
    "apparmorProfile": "docker-default",
    "selinuxLabel": "system_u:system_r:container_t:s0",
    "oomScoreAdj": 100,
    "scheduler": {"policy": "SCHED_BATCH"},
    "ioPriority": {"class": "IOPRIO_CLASS_IDLE"},
    "aFieldOfTheFuture": {"nested": [1]},
}
OWN = ResolvedUser(uid=1000, gid=1000, additional_gids=(7, 1000), home="/home/own")


def build(
    *args: str,
    container: dict[str, Any] = CONTAINER,
    user: ResolvedUser = OWN,
    console_size: ConsoleSize | None = None,
    config_user: str = "",
    **config: Any,
) -> dict[str, Any]:
    before = copy.deepcopy(container)
    made = build_process(
        container,
        ExecConfig(args=args or ("true",), user=config_user, **config),
        user,
        console_size=console_size,
        all_capabilities=ALL,
    )
    assert container == before
    assert json.loads(json.dumps(made)) == made
    return made


def test_everything_without_an_override_is_inherited() -> None:
    made = build("echo", "hi")
    inherited = (
        "capabilities", "rlimits", "noNewPrivileges", "apparmorProfile", "selinuxLabel", "oomScoreAdj",
        "scheduler", "ioPriority", "aFieldOfTheFuture", "cwd",
    )  # fmt: skip
    assert {name: made[name] for name in inherited} == {name: CONTAINER[name] for name in inherited}
    assert made["args"] == ["echo", "hi"]
    assert "commandLine" not in made


def test_a_bundle_with_nothing_in_it() -> None:
    assert build(container={}, user=ResolvedUser(uid=0, gid=0, additional_gids=(0,), home="/")) == {
        "args": ["true"],
        "cwd": "/",
        "terminal": False,
        "env": ["HOME=/"],
        "user": {"uid": 0, "gid": 0, "additionalGids": [0]},
    }


def test_a_bundle_of_nulls() -> None:
    nulls = dict.fromkeys(CONTAINER)
    made = build(container=nulls, user=ResolvedUser(uid=3, gid=3, additional_gids=(3,)))
    assert (made["cwd"], made["env"]) == ("/", [])


def test_user_is_numbers_and_keeps_the_umask() -> None:
    assert build(user=ResolvedUser(uid=1, gid=2, additional_gids=(2, 3)))["user"] == {
        "uid": 1,
        "gid": 2,
        "additionalGids": [2, 3],
        "umask": 23,
    }


@pytest.mark.parametrize(
    ("tty", "size", "expected"),
    [
        (True, ConsoleSize(40, 120), {"height": 40, "width": 120}),
        (True, ConsoleSize(0, 0), None),
        (True, None, None),
        (False, ConsoleSize(40, 120), None),
    ],
)
def test_console_size(tty: bool, size: ConsoleSize | None, expected: dict[str, int] | None) -> None:
    """Never the container's own 5 by 6."""
    made = build(tty=tty, console_size=size)
    assert made.get("consoleSize") == expected
    assert made["terminal"] is tty


@pytest.mark.parametrize(
    ("inherited", "request_env", "tty", "expected"),
    [
        (["A=1", "B=2"], ("B=3", "C=4"), False, ["A=1", "B=3", "C=4", "HOME=/home/own"]),
        (["A=1", "B=2"], ("A",), False, ["B=2", "HOME=/home/own"]),
        (["A=1"], ("NOT_THERE", ""), False, ["A=1", "HOME=/home/own"]),
        (["A=1"], ("A", "A=2"), False, ["A=2", "HOME=/home/own"]),
        (["A=1"], ("A=x=y",), False, ["A=x=y", "HOME=/home/own"]),
        (["A=1"], ("A=",), False, ["A=", "HOME=/home/own"]),
        (["A=1", "A=2"], ("A",), False, ["HOME=/home/own"]),
        (["HOME=/c"], (), False, ["HOME=/c"]),
        ([], ("HOME=/r",), False, ["HOME=/r"]),
        ([], (), True, ["TERM=xterm", "HOME=/home/own"]),
        (["TERM=vt100"], (), True, ["TERM=vt100", "HOME=/home/own"]),
        ([], ("TERM=ansi",), True, ["TERM=ansi", "HOME=/home/own"]),
        ([], ("TERM",), True, ["HOME=/home/own"]),
        (["garbage"], (), False, ["HOME=/home/own"]),
    ],
)
def test_environment(inherited: list[str], request_env: tuple[str, ...], tty: bool, expected: list[str]) -> None:
    assert build(container={"env": inherited}, env=request_env, tty=tty)["env"] == expected


def test_cwd_is_the_requests_then_the_containers() -> None:
    assert build(working_dir="/tmp")["cwd"] == "/tmp"
    assert build()["cwd"] == "/srv"


def test_the_same_uid_keeps_the_capabilities_verbatim() -> None:
    assert build(user=OWN)["capabilities"] == CONTAINER["capabilities"]
    assert build(user=OWN, config_user="1000:5")["capabilities"] == CONTAINER["capabilities"]


def _other(uid: int, **config: Any) -> Any:
    user = ResolvedUser(uid=uid, gid=uid, additional_gids=(uid,))
    return build(user=user, config_user=str(uid), **config)["capabilities"]


def test_root_gets_what_the_container_is_bounded_by() -> None:
    assert _other(0) == {
        "bounding": BOUND,
        "effective": BOUND,
        "permitted": BOUND,
        "inheritable": [],
        "ambient": [],
    }


def test_another_user_gets_none_but_the_bound() -> None:
    nothing: list[str] = []
    expected = {
        "bounding": BOUND,
        "effective": nothing,
        "permitted": nothing,
        "inheritable": nothing,
        "ambient": nothing,
    }
    assert _other(5) == expected
    assert _other(5, container={**CONTAINER, "user": {"uid": 0, "gid": 0}}) == expected


def test_without_capabilities_in_the_bundle_another_user_has_none() -> None:
    assert not any(_other(0, container={"user": {"uid": 1, "gid": 1}}).values())


@pytest.mark.parametrize("uid", [0, 5, 1000])
def test_privileged_sets_all_whatever_the_uid(uid: int) -> None:
    every = list(ALL)
    assert _other(uid, privileged=True) == {
        "bounding": every,
        "effective": every,
        "permitted": every,
        "inheritable": [],
        "ambient": [],
    }


def test_privileged_keeps_the_rest() -> None:
    made = build(privileged=True)
    assert made["noNewPrivileges"] is True
    assert made["selinuxLabel"] == CONTAINER["selinuxLabel"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"args": ()}, "No exec command specified"),
        ({"args": (), "working_dir": "x"}, "No exec command specified"),
        ({"args": ("a\0b",)}, "an argument of the command contains a NUL character"),
        ({"args": ("\ud800",)}, "an argument of the command contains a lone surrogate"),
        ({"args": ("x" * (MAX_STRING + 1),)}, "an argument of the command is longer than 131071 bytes"),
        ({"args": ("\u00e9" * (MAX_STRING // 2 + 1),)}, "an argument of the command is longer than 131071"),
        ({"args": ("x" * MAX_STRING,) * 16}, "command and environment are longer than 2097152 bytes"),
        ({"args": ("",) * 300_000}, "command and environment are longer than 2097152 bytes"),
        ({"args": ("a",), "env": ("SECRET=\0",)}, "an environment variable contains a NUL character"),
        ({"args": ("a",), "env": ("=SECRET",)}, "invalid environment variable: its name is empty"),
        ({"args": ("a",), "user": "u\0"}, "the user contains a NUL character"),
        ({"args": ("a",), "working_dir": "/a\0"}, "the working directory contains a NUL character"),
        ({"args": ("a",), "working_dir": "rel"}, "'rel' is invalid, it needs to be an absolute path"),
        ({"args": ("a",), "working_dir": "../\n"}, r"'../\n' is invalid, it needs to be an absolute path"),
        ({"args": ("a",), "working_dir": "/proc/self/fd/8"}, "leads through a file descriptor"),
        ({"args": ("a",), "working_dir": "//proc/./1/x/../fd/"}, "leads through a file descriptor"),
        ({"args": ("a",), "working_dir": "/proc/1/task/1/fd/7/.."}, "leads through a file descriptor"),
        ({"args": ("a",), "working_dir": "/proc/self/fd/7/a\nb"}, "leads through a file descriptor"),
        ({"args": ("a",), "working_dir": "/dev/fd/7"}, "leads through a file descriptor"),
        (
            {"args": ("a",), "working_dir": "/proc/1/root/proc/1/task/1/root/dev/fd/7"},
            "leads through a file descriptor",
        ),
    ],
)
def test_refused_at_create(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        validate_config(ExecConfig(**config))
    assert message in caught.value.message
    assert "SECRET" not in caught.value.message


@pytest.mark.parametrize(
    "config",
    [
        {"args": ("",)},  # Docker creates it; the start says "executable file not found"
        {"args": ("x" * MAX_STRING,), "env": ("A", "B=", "C=\u00e9", "")},
        {"args": ("a",), "working_dir": "/proc/self/fdinfo"},
        {"args": ("a",), "working_dir": "/home/proc/1/fd"},
    ],
)
def test_accepted_at_create(config: dict[str, Any]) -> None:
    validate_config(ExecConfig(**config))
