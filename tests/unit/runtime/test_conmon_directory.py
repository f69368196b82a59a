"""What is read from, and cleared out of, the sessions' directories: no conmon needed."""

import math
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from execgate.model.ids import new_session_id
from execgate.model.process import ProcessIdentity
from execgate.model.session import ExecSession, ExitSource, ExitStatus
from execgate.runtime import adopted
from execgate.runtime.adopted import AdoptedExec
from execgate.runtime.conmon import ConmonRuntime
from execgate.runtime.directory import exit_file_status, read_held, session_directory
from execgate.runtime.fdstore import NoFdStore
from execgate.runtime.tree import SessionCgroups
from support.records import new_session

GONE = ProcessIdentity(2**22 + 1, 1)


def directory_of(parent: Path, session: ExecSession, *, code: str | None = None, pid: int | None = None) -> Path:
    """Make a session's directory as a conmon leaves it."""
    directory = session_directory(parent, session.id)
    (directory / "exit").mkdir(parents=True)
    if code is not None:
        (directory / "exit" / session.id).write_text(code)
    if pid is not None:
        (directory / "pid").write_text(str(pid))
    return directory


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("0", ExitStatus(0, ExitSource.EXIT_FILE)),
        ("137", ExitStatus(137, ExitSource.EXIT_FILE)),
        ("-1", None),
        ("", None),
        ("x", None),
        (None, None),
    ],
)
def test_exit_files(tmp_path: Path, text: str | None, status: ExitStatus | None) -> None:
    assert exit_file_status(directory_of(tmp_path, new_session(), code=text)) == status


@pytest.mark.parametrize(
    ("timeout", "ago", "code", "expected"),
    [
        (2.0, 10.0, "-1", ExitStatus(137, ExitSource.TIMEOUT)),
        (2.0, 10.0, "0", ExitStatus(0, ExitSource.EXIT_FILE)),
        (60.0, 10.0, "-1", ExitStatus(255, ExitSource.UNKNOWN)),
        (None, 10.0, "-1", ExitStatus(255, ExitSource.UNKNOWN)),
        (2.0, 10.0, None, ExitStatus(255, ExitSource.UNKNOWN)),
    ],
)
async def test_how_it_ended_while_no_service_ran(
    tmp_path: Path, timeout: float | None, ago: float, code: str | None, expected: ExitStatus
) -> None:
    """conmon writes -1 for one that it ended itself, and for one whose end it did not see: time tells them apart."""
    session = replace(new_session(timeout=timeout), process=GONE, started_at=time.time(), since=time.monotonic() - ago)
    directory = directory_of(tmp_path, session, code=code)
    process = AdoptedExec(directory, session, SessionCgroups(None), NoFdStore(), 1.0)
    assert await process.wait() == expected
    await process.dispose()
    assert not directory.exists()


def test_one_without_a_limit_is_never_late() -> None:
    assert adopted._deadline(new_session()) == math.inf
    assert adopted._deadline(new_session(timeout=1.0)) == math.inf, "it was never started"


def test_a_sweep_removes_what_nobody_has(tmp_path: Path) -> None:
    """Known sessions keep their directories; so does a process that nobody knows, as long as it lives."""
    process = subprocess.Popen(["sleep", "1000"])
    try:
        known, ended, alive = (new_session() for _ in range(3))
        directory_of(tmp_path, known)
        directory_of(tmp_path, ended, code="0", pid=2**22 + 1)
        directory_of(tmp_path, alive, pid=process.pid)
        (session_directory(tmp_path, new_session_id())).mkdir()
        runtime = ConmonRuntime(
            conmon=Path("/bin/false"),
            directory=tmp_path,
            start_timeout=1,
            cgroups=SessionCgroups(None),
            store=NoFdStore(),
        )
        runtime.sweep({known.id})
        assert sorted(os.listdir(tmp_path)) == sorted([known.id[:32], alive.id[:32]])
    finally:
        process.kill()
        process.wait()
    runtime.sweep({known.id})
    assert os.listdir(tmp_path) == [known.id[:32]]


@pytest.mark.parametrize(
    "held",
    [
        b"",
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"streams": {"1": 1e999}, "monitor": null, "record": ""}',
        b'{"streams": {"1": 7}, "monitor": [5], "record": ""}',
        b'{"streams": {"1": 7}, "monitor": [5, 6], "record": "SECRET\xff"}',
    ],
)
def test_what_is_held_cannot_be_understood(tmp_path: Path, held: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """That is told, without what the file holds, and at no length."""
    (tmp_path / "held").write_bytes(held)
    assert read_held(tmp_path) is None
    assert "cannot be understood" in caplog.text
    assert "SECRET" not in caplog.text
    assert len(caplog.text) < 1000
