"""Trees of real processes, ended as a whole: with the cgroup hierarchy of the sessions, and without."""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from execgate.containers import proc
from execgate.model.ids import SessionId, new_session_id
from execgate.model.process import ProcessIdentity
from execgate.runtime import pidfd, tree
from execgate.runtime.tree import ProcessTree, SessionCgroups

SOON = 10.0

# Says "ready" and waits for a line; then begins what its arguments name, prints the pids and sleeps.
_PARENT = r"""
import os, signal, sys
def sleep():
    os.write(1, b"%d\n" % os.getpid())
    while True: signal.pause()
def child(way):
    if way == "setsid": os.setsid()
    if way == "nohup": signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if way == "stubborn": [signal.signal(s, signal.SIG_IGN) for s in (signal.SIGTERM, signal.SIGHUP)]
    if way == "double fork" and os.fork(): os._exit(0)
    if way == "daemon":
        if os.fork(): os._exit(0)
        os.setsid()
        if os.fork(): os._exit(0)
    sleep()
print("ready", flush=True)
sys.stdin.readline()
for way in sys.argv[1:]:
    if not os.fork(): child(way)
sleep()
"""
FOUND_BY_ALL = ("plain", "setsid", "nohup", "stubborn", "double fork")


@dataclass
class Family:
    """A process that stands for the exec'd one, and who came of it."""

    parent: "subprocess.Popen[str]"
    session_id: SessionId
    tree: ProcessTree
    members: list[ProcessIdentity]

    def alive(self) -> list[ProcessIdentity]:
        return [one for one in self.members if proc.is_alive(one)]


@pytest.fixture
def hierarchy() -> Iterator[SessionCgroups]:
    opened = SessionCgroups.open()
    if not opened.usable:
        pytest.skip("this kernel has no cgroup v1, or this process may not mount it: sessions are found by descent")
    yield opened
    opened.close()


@pytest.fixture(params=["hierarchy", "without"])
def cgroups(request: pytest.FixtureRequest) -> SessionCgroups:
    return request.getfixturevalue("hierarchy") if request.param == "hierarchy" else SessionCgroups(None)


@pytest.fixture
def family() -> Iterator[Callable[..., Family]]:
    """Start a parent with one child of each way; whatever is left of all of them is ended after the test."""
    made: list[Family] = []

    def start(cgroups: SessionCgroups, *ways: str) -> Family:
        parent = subprocess.Popen(
            [sys.executable, "-c", _PARENT, *ways],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # as the runtimes do it for what they exec
        )
        assert parent.stdin
        assert parent.stdout
        assert parent.stdout.readline() == "ready\n"
        session_id = new_session_id()
        cgroups.add(session_id, parent.pid)
        process = pidfd.identify(parent.pid)
        assert process is not None
        one = Family(parent, session_id, ProcessTree(cgroups, session_id, process), [])
        made.append(one)
        parent.stdin.write("go\n")
        parent.stdin.flush()
        for _ in range(len(ways) + 1):
            member = pidfd.identify(int(parent.stdout.readline()))
            assert member is not None
            one.members.append(member)
        return one

    yield start
    for one in made:
        for member in one.alive():
            os.kill(member.pid, signal.SIGKILL)
        one.parent.kill()
        one.parent.communicate()


@pytest.fixture
def bystander() -> Iterator[ProcessIdentity]:
    process = subprocess.Popen(["sleep", "1000"])
    identity = pidfd.identify(process.pid)
    assert identity is not None
    yield identity
    assert process.poll() is None, "a stranger was killed"
    process.kill()
    process.wait()


def until_empty(cgroups: SessionCgroups, session_id: SessionId) -> None:
    """The kernel takes a process out of its cgroup a little after its end."""
    deadline = time.monotonic() + SOON
    while not cgroups.remove(session_id):
        assert time.monotonic() < deadline
        time.sleep(0.005)


async def test_all_of_it_and_nothing_else(
    cgroups: SessionCgroups, family: Callable[..., Family], bystander: ProcessIdentity
) -> None:
    ways = FOUND_BY_ALL + (("daemon",) if cgroups.usable else ())
    one, other = family(cgroups, *ways), family(cgroups, "plain", "setsid")
    assert one.tree.pids(None) == {member.pid for member in one.members}
    alive_before = one.tree.alive
    assert await one.tree.kill(None)
    assert one.alive() == []
    assert (alive_before, one.tree.alive) == (True, False)
    assert len(other.alive()) == 3
    assert await one.tree.kill(None), "a second time there is nothing to do"
    assert await other.tree.kill(None)
    for session_id in (one.session_id, other.session_id):
        until_empty(cgroups, session_id)


async def test_fifty_that_hide(hierarchy: SessionCgroups, family: Callable[..., Family]) -> None:
    ways = ("daemon", "setsid", "nohup", "double fork", "stubborn")
    one = family(hierarchy, *(ways * 10))
    assert await one.tree.kill(None)
    assert one.alive() == []


async def test_one_that_forks_while_it_is_killed(hierarchy: SessionCgroups, family: Callable[..., Family]) -> None:
    one = family(hierarchy, "plain")
    # A chain: each forks its successor and ends, so that whoever is listed may be gone by the time it is killed.
    code = "import os\nwhile True:\n  if os.fork(): os._exit(0)\n  os.setsid()\n"
    waiting = f"import sys; sys.stdin.read(1); exec({code!r})"
    runner = subprocess.Popen([sys.executable, "-c", waiting], stdin=subprocess.PIPE)
    hierarchy.add(one.session_id, runner.pid)
    assert runner.stdin
    runner.stdin.write(b"x")
    runner.stdin.close()
    runner.wait(SOON)  # the first one has ended: the chain runs
    assert await one.tree.kill(None)
    assert hierarchy.pids(one.session_id) == set()


async def test_children_of_a_process_that_is_gone(hierarchy: SessionCgroups, family: Callable[..., Family]) -> None:
    one = family(hierarchy, "plain", "daemon")
    os.kill(one.parent.pid, signal.SIGKILL)
    one.parent.wait()
    assert not one.tree.signal(signal.SIGTERM), "the process itself is gone"
    assert len(one.alive()) == 2
    assert await one.tree.kill(None)
    assert one.alive() == []


async def test_without_a_hierarchy_the_children_are_known_from_the_last_signal_on(
    family: Callable[..., Family],
) -> None:
    """TERM ends the parent, and the kill that follows still finds whom it had."""
    one = family(SessionCgroups(None), "stubborn", "setsid")
    assert one.tree.signal(signal.SIGTERM)
    one.parent.wait(SOON)
    assert await one.tree.kill(None)
    assert one.alive() == []


async def test_the_monitor_is_no_part_of_it(hierarchy: SessionCgroups, family: Callable[..., Family]) -> None:
    one = family(hierarchy, "plain")
    monitor = subprocess.Popen(["sleep", "1000"])
    try:
        hierarchy.add(one.session_id, monitor.pid)
        identity = pidfd.identify(monitor.pid)
        assert monitor.pid not in one.tree.pids(identity)
        assert await one.tree.kill(identity)
        assert monitor.poll() is None
        assert not hierarchy.remove(one.session_id), "somebody is in it"
    finally:
        monitor.kill()
        monitor.wait()


def test_a_signal_is_for_the_process_alone(cgroups: SessionCgroups, family: Callable[..., Family]) -> None:
    one = family(cgroups, "plain")
    assert one.tree.signal(signal.SIGTERM)
    assert one.parent.wait(SOON) == -signal.SIGTERM
    assert len(one.alive()) == 1
    assert not one.tree.signal(signal.SIGTERM)


async def test_a_reused_pid_is_nobody(cgroups: SessionCgroups, bystander: ProcessIdentity) -> None:
    """The process is gone and a stranger has its number."""
    gone = ProcessIdentity(bystander.pid, bystander.start_time - 1)
    tree = ProcessTree(cgroups, new_session_id(), gone)
    assert not tree.alive
    assert not tree.signal(signal.SIGKILL)
    assert tree.pids(None) == set()
    assert await tree.kill(None)
    assert proc.is_alive(bystander)


async def test_a_member_that_is_replaced_while_it_is_looked_up(
    hierarchy: SessionCgroups, bystander: ProcessIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listed member ends, and its number is a stranger's by the time the number is used."""
    listings = iter([{bystander.pid}, set()])
    monkeypatch.setattr(SessionCgroups, "pids", lambda *_: next(listings, set()))
    tree = ProcessTree(hierarchy, new_session_id(), ProcessIdentity(2**22 + 1, 1))
    assert await tree.kill(None)
    assert proc.is_alive(bystander)


async def test_what_cannot_be_killed_is_given_up(
    hierarchy: SessionCgroups, bystander: ProcessIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("execgate.runtime.tree._KILL_TIME", 0.05)
    monkeypatch.setattr("execgate.runtime.tree._send", lambda *_: True)
    monkeypatch.setattr(SessionCgroups, "pids", lambda *_: {bystander.pid})
    assert not await ProcessTree(hierarchy, new_session_id(), bystander).kill(None)


# -- the hierarchy


def test_memberships_outlive_the_mount(hierarchy: SessionCgroups, family: Callable[..., Family]) -> None:
    """The next service finds whom the earlier one put there."""
    one = family(hierarchy, "daemon")
    expected = {member.pid for member in one.members}
    hierarchy.close()
    again = SessionCgroups.open()
    try:
        found = again.pids(one.session_id)
        assert found is not None
        assert found >= expected  # and who forked the daemon may not be gone yet
    finally:
        again.close()


@pytest.mark.usefixtures("hierarchy")
def test_it_can_be_had_right_after_its_last_user_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a service that follows one without sessions: the kernel is still about to tear it down."""
    monkeypatch.setattr(tree, "_HIERARCHY", f"execgate-{secrets.token_hex(4)}".encode())  # which has no other user
    for _ in range(20):
        following = SessionCgroups.open()
        assert following.usable
        following.close()


def test_a_sweep_removes_what_is_empty(hierarchy: SessionCgroups, family: Callable[..., Family]) -> None:
    full, empty = family(hierarchy, "plain"), new_session_id()
    short = subprocess.Popen(["true"])
    hierarchy.add(empty, short.pid)
    short.wait()
    hierarchy.sweep()
    assert empty[:32] not in hierarchy._names()
    assert full.session_id[:32] in hierarchy._names()
    assert hierarchy.pids(empty) == set()
    assert hierarchy.remove(empty)


async def test_after_its_close_nothing_fails(hierarchy: SessionCgroups, family: Callable[..., Family]) -> None:
    one = family(hierarchy, "plain")
    hierarchy.close()
    hierarchy.close()
    assert not hierarchy.usable
    hierarchy.add(one.session_id, one.parent.pid)
    hierarchy.sweep()
    assert hierarchy.pids(one.session_id) is None
    assert hierarchy.remove(one.session_id)
    assert await one.tree.kill(None), "then by descent"
    assert one.alive() == []
    again = SessionCgroups.open()
    until_empty(again, one.session_id)
    again.close()


def test_a_host_that_has_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("execgate.runtime.tree._call", refuse)
    opened = SessionCgroups.open()
    assert not opened.usable
    assert "a kill can miss children that daemonized" in caplog.text


def test_a_process_that_cannot_be_added(hierarchy: SessionCgroups) -> None:
    session_id = new_session_id()
    with pytest.raises(OSError, match="No such process"):
        hierarchy.add(session_id, 2**22 + 1)
    assert hierarchy.remove(session_id)
