"""Processes as the kernel has them."""

import os
import resource
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from execgate.containers import proc
from execgate.model.errors import Internal, Unavailable
from execgate.model.process import ProcessIdentity
from execgate.oci.capabilities import names
from support.runtimes import TestContainer

_NAMED = """
import sys
open("/proc/self/comm", "w").write(sys.argv[1])
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def named() -> Iterator[Callable[[str], int]]:
    """Start processes whose name, the second field of stat, is the given one."""
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str) -> int:
        command = [sys.executable, "-c", _NAMED, name]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process.pid

    yield start
    for process in started:
        with process:
            process.kill()


def _ticks_since_boot() -> float:
    return float(Path("/proc/uptime").read_text().split()[0]) * os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("name", ["plain", "a) S 1 1 (b", ")))))", "a b c d e f g", "(\n)", "\xff"])
def test_start_time_whatever_the_name(named: Callable[[str], int], name: str) -> None:
    before = _ticks_since_boot()
    pid = named(name)
    start = proc.start_time(pid)
    assert start is not None
    assert before - 5 <= start <= _ticks_since_boot() + 1
    assert proc.is_alive(ProcessIdentity(pid, start))


def test_another_start_time_is_another_process() -> None:
    me = os.getpid()
    start = proc.start_time(me)
    assert start is not None
    assert proc.is_alive(ProcessIdentity(me, start))
    assert not proc.is_alive(ProcessIdentity(me, start + 1))


def test_a_zombie_is_not_alive() -> None:
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        start = proc.start_time(child.pid)
        assert start is not None
        assert not proc.is_alive(ProcessIdentity(child.pid, start))
    assert proc.start_time(child.pid) is None
    assert not proc.is_alive(ProcessIdentity(child.pid, start))


@pytest.mark.parametrize("pid", [0, -1, 2**31 - 1, 2**70])
def test_no_such_process(pid: int) -> None:
    assert proc.start_time(pid) is None
    assert not proc.frozen(pid)
    assert proc.pids_in_cgroup(pid) == []


def test_without_descriptors_nobody_is_declared_dead() -> None:
    me = os.getpid()
    start = proc.start_time(me) or 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/", os.O_PATH)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(Unavailable):
            proc.is_alive(ProcessIdentity(me, start))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_boot_id() -> None:
    assert proc.boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_capability_bounds_are_this_processes() -> None:
    line = next(n for n in Path("/proc/self/status").read_text().splitlines() if n.startswith("CapBnd:"))
    assert f"{proc.own_capability_bounds():016x}" == line.split()[1]
    assert "CAP_KILL" in names(proc.own_capability_bounds())


def test_without_proc_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proc, "read_kernel", lambda _, **__: None)
    with pytest.raises(Internal) as caught:
        proc.own_capability_bounds()
    assert "/proc mounted" in caught.value.hint


def test_a_process_of_the_host_is_not_frozen() -> None:
    assert not proc.frozen(os.getpid())


def test_without_a_container_only_the_process_itself(named: Callable[[str], int]) -> None:
    """A host process shares our cgroups or a root: neither makes its neighbours a container."""
    pid = named("lonely")
    assert proc.pids_in_cgroup(pid) == [pid]


def test_frozen_follows_the_runtime(new_container: Callable[..., TestContainer]) -> None:
    container = new_container()
    pid = container.init_pid
    assert not proc.frozen(pid)
    container.pause()
    assert proc.frozen(pid)
    container.resume()
    assert not proc.frozen(pid)


def test_the_processes_of_a_container(new_container: Callable[..., TestContainer]) -> None:
    script = "sleep 1000 & sh -c 'sleep 1001 & echo > /up; wait' & wait"
    container = new_container(args=["/bin/sh", "-c", script], start=False)
    os.mkfifo(container.rootfs / "up")
    up = os.open(container.rootfs / "up", os.O_RDONLY | os.O_NONBLOCK)
    try:
        container.start()
        ready, _, _ = select.select([up], [], [], 10)
    finally:
        os.close(up)
    assert ready  # by then everything has been forked
    pids = proc.pids_in_cgroup(container.init_pid)
    assert container.init_pid in pids
    assert len(pids) == len(container.processes()) == 4
    assert pids == sorted(pids)


_UNSHARED = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_pid_namespaces_below_belong_to_it_and_those_beside_it_do_not(depth: int) -> None:
    """All of them in one cgroup, ours."""
    command = [*_UNSHARED * depth, "sh", "-c", "echo; exec cat"]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as container,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as sibling,
    ):
        for process in (container, sibling):
            assert process.stdout is not None
            process.stdout.readline()
        line = _descendants(container.pid)
        before = len(os.listdir("/proc/self/fd"))
        for level in range(depth):
            assert proc.pids_in_cgroup(line[level]) == sorted(line[level:])
        assert len(os.listdir("/proc/self/fd")) == before
        container.kill()
        sibling.kill()


def _descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(children[0]), *_descendants(int(children[0]))] if children else []
