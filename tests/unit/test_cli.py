"""The command line: its exit codes, its tables, its JSON."""

import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from execgate import __version__, cli
from execgate.cli.execute import environment
from execgate.model.errors import InvalidArgument
from execgate.model.session import ExitSource, ExitStatus, SessionState
from execgate.sessions.store import SessionStore
from support.records import new_session


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("EXECGATE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory whose name is short enough for a state directory; pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="eg-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def state_dir(short_dir: Path) -> Path:
    """A state directory with one session in each state, one of them with a command that means no good."""
    store = SessionStore(short_dir / "sessions.db", boot_id="boot")
    created = new_session(args=("sh", "-c", "\x1b[31mred\nnew line"))
    store.add(created)
    running = new_session()
    store.add(running)
    running = store.move(running, replace(running, state=SessionState.STARTING))
    store.move(running, replace(running, state=SessionState.RUNNING))
    stopped = new_session()
    store.add(stopped)
    ended = ExitStatus(3, ExitSource.PIDFD)
    store.move(stopped, replace(stopped, state=SessionState.STOPPED, exit=ended, finished_at=2.0))
    store.close()
    return short_dir


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"execgate {__version__}\n"


@pytest.mark.parametrize(
    "command",
    [
        [],
        *([name] for name in ("serve", "containers", "sessions", "check-config")),
        *([name] for name in ("exec", "attach", "logs", "kill", "stop", "wait", "rm")),
    ],
)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--help"])
    assert end.value.code == 0
    assert "usage: execgate" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [[], ["nonsense"], ["serve", "--nonsense"], ["serve", "--log-level", "loud"], ["sessions", "extra"]],
)
def test_usage_errors(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == cli.EXIT_USAGE
    assert "usage: execgate" in capsys.readouterr().err


def test_a_wrong_configuration_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-config", "--config", "/nowhere/at/all.toml"]) == cli.EXIT_USAGE
    assert capsys.readouterr().err.startswith("execgate: /nowhere/at/all.toml: ")


def test_a_failure_is_no_usage_error(short_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (short_dir / "sessions.db").write_bytes(b"no database at all" * 100)
    assert cli.main(["sessions", "--state-dir", str(short_dir)]) == cli.EXIT_FAILURE
    assert "the session store is not available" in capsys.readouterr().err


def test_sessions_as_a_table(state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sessions", "--state-dir", str(state_dir)]) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    assert title.split() == ["SESSION", "CONTAINER", "STATE", "EXIT", "CREATED", "COMMAND"]
    assert [row.split()[2] for row in rows] == ["created", "running", "stopped"]
    assert "3 (pidfd)" in rows[2]
    assert "\x1b" not in "".join(rows)
    column = title.index("COMMAND")
    assert all(row[column - 1] == " " and row[column] != " " for row in rows)


def test_sessions_as_json(state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sessions", "--json", "--state-dir", str(state_dir)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["State"] for one in found] == ["created", "running", "stopped"]
    assert found[2]["ExitCode"] == 3
    assert found[2]["FinishedAt"].endswith("Z")
    assert found[0]["ExitCode"] is None


def test_sessions_that_are_asked_for(short_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = SessionStore(short_dir / "sessions.db", boot_id="boot")
    for container, labels in (("web", {"a": "1"}), ("web", {"a": "2", "b": ""}), ("db", {"a": "1"})):
        store.add(new_session(container=container, labels=labels))
    store.close()

    def shown(*filters: str) -> list[tuple[str, str]]:
        assert cli.main(["sessions", "--json", "--state-dir", str(short_dir), *filters]) == 0
        return [(one["Container"], one["Labels"]["a"]) for one in json.loads(capsys.readouterr().out)]

    assert shown("--container", "web") == [("web", "1"), ("web", "2")]
    assert shown("--label", "a=1") == [("web", "1"), ("db", "1")]
    assert shown("--label", "b") == [("web", "2")]
    assert shown("--label", "b", "--label", "a=1") == []
    assert len(shown("--state", "created")) == 3
    assert shown("--state", "running") == []


def test_sessions_of_nobody(short_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Looking makes nothing: not even the directory."""
    assert cli.main(["sessions", "--json", "--state-dir", str(short_dir / "none")]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert not (short_dir / "none").exists()


def test_looking_changes_nothing(state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (state_dir / "sessions.db").stat()
    assert cli.main(["sessions", "--state-dir", str(state_dir)]) == 0
    after = (state_dir / "sessions.db").stat()
    assert (before.st_mtime_ns, before.st_size, stat.S_IMODE(before.st_mode)) == (
        after.st_mtime_ns,
        after.st_size,
        stat.S_IMODE(after.st_mode),
    )


def test_the_environment_of_an_exec(tmp_path: Path) -> None:
    """Files first; a bare name takes the value that it has here; what has none is left out."""
    file = tmp_path / "env"
    file.write_text("# a comment\n\n  A=1\nHERE\n#B=2\nC=with = and  blanks \n")
    entries = environment(["D=4", "HERE", "NOWHERE", "E="], [str(file)], {"HERE": "h"})
    assert entries == ["A=1", "HERE=h", "C=with = and  blanks ", "D=4", "HERE=h", "E="]
    with pytest.raises(InvalidArgument, match="none: No such file"):
        environment([], [str(tmp_path / "none")], {})


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_containers_of_an_empty_root(tmp_path: Path, form: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["containers", *form, "--engine=oci", "--runtime-root", f"runc={tmp_path}"]) == 0
    out = capsys.readouterr().out
    titles = ["NAME", "ENGINE", "RUNTIME", "STATUS", "CREATED", "IMAGE", "ID"]
    assert json.loads(out) == [] if form else out.split() == titles


def test_a_broken_container_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/state.json").write_text("{")
    assert cli.main(["containers", "--engine=oci", "--runtime-root", f"runc={tmp_path}"]) == 0
    assert str(tmp_path / "broken") in capsys.readouterr().err


def test_check_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "program"
    program.touch(mode=0o755)
    file = tmp_path / "execgate.toml"
    file.write_text(f'conmon = "{program}"\n[runtimes]\nrunc = "{program}"\ncrun = "{program}"\n')
    assert cli.main(["check-config", "--config", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["conmon"] == str(program)
    file.write_text(f'conmon = "{tmp_path}/none"\n[runtimes]\nrunc = "{tmp_path}/none"\ncrun = "{program}"\n')
    assert cli.main(["check-config", "--config", str(file)]) == cli.EXIT_FAILURE
    err = capsys.readouterr().err
    assert "runtime runc: no program" in err
    assert "no conmon at" in err


def test_a_reader_that_has_seen_enough(state_dir: Path) -> None:
    """`execgate sessions | true`: no traceback."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as out:
        argv = [sys.executable, "-m", "execgate", "sessions", "--state-dir", str(state_dir)]
        done = subprocess.run(argv, stdout=out, stderr=subprocess.PIPE, timeout=20, check=False)
    assert done.stderr == b""
    assert done.returncode == cli.EXIT_FAILURE
