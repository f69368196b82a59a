"""Processes held by pidfd: real ones, ended in every way."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from execgate.model.process import ProcessIdentity
from execgate.model.session import ExitSource
from execgate.runtime import pidfd

SOON = 5.0


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def test_identify(sleeper: "subprocess.Popen[bytes]") -> None:
    identity = pidfd.identify(sleeper.pid)
    assert identity is not None
    assert identity == pidfd.identify(sleeper.pid)
    assert pidfd.identify(os.getpid()) != identity
    for nobody in (0, -1, 2**22 + 1):
        assert pidfd.identify(nobody) is None


def test_a_reused_pid_is_nobody(sleeper: "subprocess.Popen[bytes]") -> None:
    identity = pidfd.identify(sleeper.pid)
    assert identity is not None
    assert pidfd.open_pidfd(ProcessIdentity(identity.pid, identity.start_time - 1)) is None
    one = pidfd.open_pidfd(identity)
    assert one
    one.close()
    sleeper.kill()
    sleeper.wait()
    assert pidfd.open_pidfd(identity) is None


def test_a_process_is_named_and_held_in_one_step(sleeper: "subprocess.Popen[bytes]") -> None:
    name, one = pidfd.hold(sleeper.pid)
    assert (name, bool(one)) == (pidfd.identify(sleeper.pid), True)
    assert one
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and its number still its own
    again, other = pidfd.hold(sleeper.pid)
    assert (again, bool(other)) == (name, True)
    assert other
    sleeper.wait()
    assert pidfd.hold(sleeper.pid) == (ProcessIdentity(sleeper.pid, 0), None)
    one.close()
    other.close()


def test_one_that_is_reaped_behind_the_look_is_nobody(
    sleeper: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number could be another's by then, and the look one at that."""
    identity = pidfd.identify(sleeper.pid)

    def late(_: int) -> ProcessIdentity | None:
        sleeper.kill()
        sleeper.wait()
        return identity

    monkeypatch.setattr(pidfd, "identify", late)
    assert pidfd.hold(sleeper.pid) == (ProcessIdentity(sleeper.pid, 0), None)


async def test_ended(sleeper: "subprocess.Popen[bytes]") -> None:
    identity = pidfd.identify(sleeper.pid)
    assert identity is not None
    one = pidfd.open_pidfd(identity)
    assert one
    waiting = asyncio.create_task(pidfd.ended(one))
    await asyncio.sleep(0)
    assert not waiting.done()
    sleeper.kill()
    await asyncio.wait_for(waiting, SOON)
    one.close()


@pytest.mark.parametrize(
    ("script", "code"),
    [("import sys; sys.exit(0)", 0), ("import sys; sys.exit(7)", 7), ("import os; os._exit(255)", 255),
     ("import os; os.kill(os.getpid(), 9)", 137), ("import os; os.kill(os.getpid(), 15)", 143)],
)  # fmt: skip
async def test_the_kernel_tells_how_it_ended(script: str, code: int) -> None:
    """Once it is reaped, on kernels that know; on others the answer is none, and never a made-up one."""
    gate_read, gate_write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", f"import os; os.read({gate_read}, 1); {script}"], pass_fds=[gate_read]
    )
    identity = pidfd.identify(process.pid)
    assert identity is not None
    one = pidfd.open_pidfd(identity)
    assert one
    assert pidfd.exit_status(one) is None, "it has not ended"
    os.close(gate_read)
    os.close(gate_write)
    await asyncio.wait_for(pidfd.ended(one), SOON)
    process.wait()
    status = pidfd.exit_status(one)
    one.close()
    if tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (6, 15):
        assert status is not None
    if status is not None:
        assert (status.code, status.source) == (code, ExitSource.PIDFD)


@pytest.mark.parametrize(
    ("status", "code"), [(0, 0), (1 << 8, 1), (255 << 8, 255), (signal.SIGKILL, 137), (signal.SIGSEGV | 0x80, 139)]
)
def test_the_shells_number(status: int, code: int) -> None:
    assert pidfd.shell_code(status) == code
