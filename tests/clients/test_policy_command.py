"""`execgate policy`, the program itself, about a real container."""

import json
import os
import select
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.runtimes import RuntimeHost, TestContainer
from support.service import execgate_program, write_config

Run = Callable[..., "subprocess.CompletedProcess[str]"]

NO_POWER = {"EXECGATE_ALLOW_PRIVILEGED": "false", "EXECGATE_ALLOW_HOST_EQUIVALENT": "false"}

# The container is an ordinary one or not, as its runtime has it; what that means has its own tests.
POLICY = """
[[rule]]
id = "team"
who = ["user:daemon"]
host_equivalent = true
users = ["1000"]
argv = [["ls", "**"]]
max_time = "5m"
idle_time = 20
on_disconnect = ["hup", "kill"]
tty = false
max_sessions = 2
record = "output"
record_failure = "closed"

[[rule]]
id = "elsewhere"
who = ["uid:1"]
containers = ["nothing-*"]

[[rule]]
id = "machines"
who = ["cert:*.example.org", "token:ci-*", "gid:0"]
host_equivalent = true
"""


@pytest.fixture
def run(host_dir: Path, tmp_path: Path, runc: RuntimeHost) -> Run:
    """Run `execgate policy …` on this host's containers of runc; `policy` is the text of its file."""
    directory = host_dir / "policy"
    directory.mkdir(exist_ok=True)
    config = write_config(directory, [runc])
    file = tmp_path / "policy.toml"
    file.write_text(POLICY)
    file.chmod(0o644)

    def run(command: str, *arguments: str, policy: Path | None = file) -> "subprocess.CompletedProcess[str]":
        env = {name: value for name, value in os.environ.items() if not name.startswith("EXECGATE_")}
        env |= NO_POWER | ({"EXECGATE_POLICY": str(policy)} if policy else {})
        argv = [str(execgate_program()), "policy", command, "--config", str(config), *arguments]
        return subprocess.run(argv, capture_output=True, text=True, env=env, timeout=60, check=False)

    return run


def test_an_exec_that_is_allowed(run: Run, runc_container: TestContainer, tmp_path: Path) -> None:
    done = run("check", "--as", "user:daemon", "--container", runc_container.id, "--user", "app", "--", "ls", "-l")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0] == "ALLOWED by rule team"
    assert f"policy {tmp_path}/policy.toml" in lines
    assert f"container {runc_container.id} (oci)" in lines
    assert "who unix:1, groups 1" in lines
    assert "as uid 1000, groups 1000, 2000" in lines  # as the container's own files have it
    assert "time 300 s, without a byte 20 s" in lines
    assert "client gone: hup" in lines
    assert "sessions 2 at once" in lines
    assert "recorded output, or the session ends" in lines


def test_an_exec_that_is_denied(run: Run, runc_container: TestContainer) -> None:
    done = run("check", "--as", "uid:1", "--container", runc_container.id, "-t", "--", "sh", "-c", "id")
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "DENIED"
    assert lines[lines.index("  rule team") :] == [
        "  rule team",
        "    users: uid 0 is not in 1000",
        "    tty: it may not have a terminal",
        "    argv: the command matches none of its patterns",
        "  rule elsewhere",
        f"    containers: {runc_container.id} does not match nothing-*",
        "  1 other rules are not theirs",
    ]


@pytest.mark.parametrize(
    ("flags", "condition"),
    [
        (["--user", "daemon"], "users"),
        (["--user", "1000:0"], "gids"),
        (["--privileged"], "privileged"),
        (["--tty"], "tty"),
        (["--env", "PATH=/tmp"], "env"),
        (["--workdir", "/tmp"], "workdirs"),
        (["--timeout", "301"], "max_time"),
        (["--idle-timeout", "21"], "idle_time"),
        (["--on-disconnect", "keep"], "on_disconnect"),
    ],
)
def test_every_option_counts(run: Run, runc_container: TestContainer, flags: list[str], condition: str) -> None:
    asks = ["--as", "user:daemon", "--container", runc_container.id, "--json", "--user", "app", *flags]
    done = run("check", *asks, "--", "ls")
    assert done.returncode == 1, done.stderr
    team = json.loads(done.stdout)["Rules"][0]
    assert [failure["Condition"] for failure in team["Failures"]] == [condition]


def test_json(run: Run, runc_container: TestContainer, tmp_path: Path) -> None:
    asks = ["--as", "user:daemon", "--container", runc_container.id, "--json"]
    allowed = run("check", *asks, "--user", "app", "--timeout", "9", "--on-disconnect", "kill", "ls", "-l")
    assert allowed.returncode == 0
    found: dict[str, Any] = json.loads(allowed.stdout)
    rules = found.pop("Rules")
    found.pop("HostEquivalent")
    assert found == {
        "Allowed": True,
        "Policy": str(tmp_path / "policy.toml"),
        "Principal": "unix:1",
        "PrincipalGids": [1],
        "Container": {"Engine": "oci", "Names": [runc_container.id], "Image": ""},
        "User": {"Uid": 1000, "Gids": [1000, 2000]},
        "Rule": "team",
        "Timeout": 9,
        "IdleTimeout": 20,
        "OnDisconnect": "kill",
        "MaxSessions": 2,
        "Record": "output",
        "RecordOrEnd": True,
    }
    assert [(rule["Id"], rule["Applies"], rule["Shows"], len(rule["Failures"])) for rule in rules] == [
        ("team", True, True, 0),
        ("elsewhere", True, False, 1),
        ("machines", False, False, 1),
    ]
    denied = run("check", *asks, "--", "id")
    assert denied.returncode == 1
    found = json.loads(denied.stdout)
    assert (found["Allowed"], found["Visible"]) == (False, True)
    assert found["Message"].startswith("permission denied: ")


@pytest.mark.parametrize(
    ("who", "allowed"),
    [
        ("cert:build.example.org", True),
        ("cert:example.org", False),
        ("token:ci-1", True),
        ("token:build.example.org", False),
        ("user:root", True),  # by its group
        ("uid:4000000", False),  # that nobody has, and no group
    ],
)
def test_everybody_who_can_be_asked_about(run: Run, runc_container: TestContainer, who: str, allowed: bool) -> None:
    done = run("check", "--as", who, "--container", runc_container.id, "--", "sh")
    assert done.returncode == (0 if allowed else 1)
    assert ("no rule shows them this container: for them there is none (404)" in done.stdout) is not allowed


def test_without_a_policy_it_is_the_user_of_the_service(run: Run, runc_container: TestContainer) -> None:
    asks = ["--container", runc_container.id, "--", "sh"]
    stranger = run("check", "--as", "uid:1", *asks, policy=None)
    assert stranger.returncode == 1
    assert "policy     none: the own user of the service may do all" in stranger.stdout
    privileged = run("check", "--as", "uid:0", "--privileged", "--json", *asks, policy=None)
    assert privileged.returncode == 1
    (owner,) = json.loads(privileged.stdout)["Rules"]
    assert "privileged" in [failure["Condition"] for failure in owner["Failures"]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--as", "user:daemon", "--container", "nowhere", "--", "ls"], "No such container: nowhere"),
        (["--as", "user:daemon", "--container", "HERE"], "No exec command specified"),
        (["--as", "user:daemon", "--container", "HERE", "-u", "who", "ls"], "unable to find user who"),
        (["--as", "user:daemon", "--container", "HERE", "-w", "tmp", "ls"], "it needs to be an absolute path"),
        (
            ["--as", "nobody", "--container", "HERE", "ls"],
            "'nobody' is none of user:NAME, uid:N, cert:NAME",
        ),
        (["--as", "user:nobody-has-this-name", "--container", "HERE", "ls"], "this host has no user"),
        (["--as", "uid:-1", "--container", "HERE", "ls"], "'-1' is no uid"),
        (["--as", "cert:", "--container", "HERE", "ls"], "is none of"),
        (["--container", "HERE", "ls"], "the following arguments are required: --as"),
        (["--as", "uid:0", "ls"], "the following arguments are required: --container"),
    ],
)
def test_what_cannot_be_decided(run: Run, runc_container: TestContainer, arguments: list[str], said: str) -> None:
    done = run("check", *(runc_container.id if one == "HERE" else one for one in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_a_container_that_does_not_run_has_no_users(run: Run, runc: RuntimeHost) -> None:
    container = runc.run()
    try:
        pidfd = os.pidfd_open(container.init_pid)
        container.kill()
        assert select.select([pidfd], [], [], 30)[0]
        os.close(pidfd)
        asks = ["--as", "user:root", "--container", container.id]
        named = run("check", *asks, "-u", "app", "--", "ls")
        assert (named.returncode, named.stdout) == (2, "")
        assert f"container {container.id} is not running" in named.stderr
        assert run("check", *asks, "--", "ls").returncode == 0  # as its own user it can be asked about
    finally:
        container.delete()


def test_a_policy_with_mistakes(run: Run, runc_container: TestContainer, tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text('[[rule]]\nid = "r"\nwho = ["*"]\nusers = ["app"]\n')
    broken.chmod(0o644)
    done = run("validate", str(broken))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{broken}: rule r (line 3): who: " in done.stderr
    assert f"{broken}: rule r (line 4): users: " in done.stderr
    check = run("check", "--policy", str(broken), "--as", "uid:0", "--container", runc_container.id, "--", "ls")
    assert (check.returncode, check.stdout, check.stderr) == (2, "", done.stderr)


def test_a_policy_that_is_fine(run: Run, tmp_path: Path) -> None:
    done = run("validate", str(tmp_path / "policy.toml"))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/policy.toml: 3 rules\n")
    assert run("validate").stdout == done.stdout  # the one of the configuration
    (tmp_path / "policy.toml").chmod(0o666)
    writable = run("validate")
    assert writable.returncode == 2
    assert f"chmod go-w {tmp_path}/policy.toml" in writable.stderr
    nothing = run("validate", policy=None)
    assert (nothing.returncode, nothing.stderr) == (2, "execgate: there is no policy\n  name a file\n")


def test_check_config_reads_the_policy_too(run: Run, host_dir: Path) -> None:
    assert run("validate").returncode == 0  # the configuration is there
    flags = ["check-config", "--config", str(host_dir / "policy/execgate.toml")]
    env = os.environ | NO_POWER | {"EXECGATE_POLICY": "/nowhere"}
    done = subprocess.run([execgate_program(), *flags], capture_output=True, env=env, timeout=60, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["policy"] == "/nowhere"
    assert b"execgate: /nowhere: No such file or directory" in done.stderr
