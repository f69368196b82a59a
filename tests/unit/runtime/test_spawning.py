"""A child gets the descriptors that it was given, at their places, and nothing else; no cancel loses one."""

import asyncio
import fcntl
import os
import signal
import threading
from pathlib import Path

import pytest

from execgate.containers import proc
from execgate.runtime import spawning
from execgate.runtime.fdstore import NoFdStore
from execgate.runtime.posix_spawn import Child, PosixSpawn
from execgate.runtime.spawning import Spawner, _Ends

ENVIRONMENT = {"PATH": "/usr/bin:/bin", "WITH": "ä = ö"}


def output_of(script: str, *given: int | None) -> str:
    """Run a script with `given` as 0, 2, 3, … and return what it writes to 1."""
    read, write = os.pipe()
    ends = _Ends()
    places = ends.above([given[0], write, *given[1:]])
    pid = PosixSpawn(["/bin/sh", "-c", script], ENVIRONMENT, places).run().pid
    ends.close_theirs()
    os.close(write)
    with open(read, "rb") as file:
        text = file.read().decode()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return text


def test_descriptors_at_their_places(tmp_path: Path) -> None:
    """Whatever their numbers are here, those of other places among them."""
    files = []
    for index in range(12):
        path = tmp_path / str(index)
        path.write_text(f"{index} ")
        files.append(os.open(path, os.O_RDONLY))
    for order in (files, files[::-1], [*files[6:], *files[:6]]):
        script = "".join(f"cat <&{place}; " for place in range(3, 3 + len(order) - 2) if place < 10)
        said = output_of(script, None, *order[1:])
        assert said.split() == [Path(f"/proc/self/fd/{fd}").read_text().strip() for fd in order[2:9]]
        for fd in order:
            os.lseek(fd, 0, os.SEEK_SET)
    for fd in files:
        os.close(fd)


def test_what_is_not_given_is_not_there() -> None:
    ours = [fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, least) for least in (3, 60)]
    try:
        found = output_of('for fd in /proc/$$/fd/*; do echo "${fd##*/}"; done', None, None).split()
    finally:
        for fd in ours:
            os.close(fd)
    assert {"0", "1", "2"} <= set(found)
    assert str(ours[1]) not in found


def test_a_clean_child() -> None:
    """Python ignores SIGPIPE, and what is ignored or blocked is inherited."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        lines = output_of("grep Sig /proc/self/status; echo $WITH", None, None).splitlines()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    masks = dict(line.split(":\t") for line in lines[:-1])
    assert int(masks["SigBlk"], 16) == 0
    assert int(masks["SigIgn"], 16) & ~(1 << 31 | 1 << 32) == 0
    assert lines[-1] == "ä = ö"


def test_no_argument_is_cut() -> None:
    with pytest.raises(ValueError, match="null byte"):
        PosixSpawn(["/bin/true", "a\0b"], {}, [])


def test_all_threads_are_there_from_the_start() -> None:
    """One that is refused later, when the host has none left, would leave its work to another, unasked."""
    before = threading.active_count()
    spawner = Spawner(Path("/bin/true"), nofile=(1024, 1024), store=NoFdStore())
    assert threading.active_count() == before + spawning._PARALLEL
    spawner._threads.shutdown()


def test_no_such_program() -> None:
    with pytest.raises(FileNotFoundError):
        PosixSpawn(["/nowhere"], {}, []).run()


def test_a_start_time_that_is_told_is_the_kernels() -> None:
    told = 0
    for _ in range(50):
        child = PosixSpawn(["/bin/sleep", "1000"], ENVIRONMENT, [None, None, None]).run()
        read = proc.start_time(child.pid)
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        assert child.start_time in (read, None)
        told += child.start_time is not None
    assert told


class SlowSpawn(PosixSpawn):
    """One that waits until it may go on."""

    def __init__(self) -> None:
        super().__init__(["/bin/sleep", "1000"], ENVIRONMENT, [None, None, None])
        self.go = threading.Event()
        self.pid = 0

    def run(self) -> Child:
        assert self.go.wait(20)
        child = super().run()
        self.pid = child.pid
        return child


async def test_a_cancel_leaves_no_child() -> None:
    """It is heard only when the child is known, which is then ended: descriptors may be closed from then on."""
    spawner = Spawner(Path("/bin/sleep"), nofile=(1024, 1024), store=NoFdStore())
    spawn = SlowSpawn()
    task = asyncio.create_task(spawner._run(spawn))
    for _ in range(3):
        await asyncio.sleep(0.01)
        task.cancel()
    assert not task.done()
    spawn.go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert spawn.pid
    with pytest.raises(ProcessLookupError):
        os.kill(spawn.pid, 0)
