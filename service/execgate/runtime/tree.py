"""All processes of one session: who they are, and how all of them are ended.

The theory. A process that daemonizes leaves its session, its process group and its parent; what it cannot leave is
a cgroup. The container's own cgroups are the runtime's and the engine's, and moving a process there would change what
the container may use. So the sessions get a cgroup hierarchy of their own: a cgroup v1 *named* hierarchy without any
controller (`none,name=execgate`, cgroups(7)), which limits nothing and only remembers who belongs together. A
session's monitor is put there before it runs anything, and all that comes from it inherits the place; the runtimes
move the process in the hierarchies that they know, and this is none of them.

- The hierarchy is mounted detached (fsmount(2)): it is at no path, for nobody else, and gone with the service. The
  memberships stay as long as the processes, and the next service finds them again.
- `favordynmods` (Linux 6.0) makes a move cost 0.1 ms instead of an RCU grace period of some 10 ms.
- A container with CAP_SYS_ADMIN on the host can mount hierarchies itself and leave. Nothing stops that one.

Where the hierarchy cannot be had (no CAP_SYS_ADMIN, a kernel without cgroup v1, before 5.2), a tree is what can be
found from the process while it lives: its descendants and whoever shares a session id with one of them. A child that
both forked twice and called setsid(2) is missed then. `SessionCgroups.open` logs which of the two it is.
"""

import asyncio
import contextlib
import ctypes
import errno
import logging
import os
import signal
import time
from collections.abc import Sequence

from execgate.containers import proc
from execgate.containers.files import read_kernel
from execgate.model.errors import ExecgateError
from execgate.model.ids import SessionId
from execgate.model.process import ProcessIdentity
from execgate.runtime import pidfd
from execgate.runtime.readiness import Descriptor

log = logging.getLogger(__name__)

_HIERARCHY = b"execgate"
_MOUNT_TIME = 2.0
"""Seconds in which a hierarchy whose last user has just gone is torn down. Until then the kernel refuses it: a mount
waits for that by restarting fsconfig(2), which finds its context spent, and says EBUSY. A service that follows one
without sessions meets this."""
_KILL_TIME = 10.0
"""Seconds in which a tree is killed again and again until nothing is left of it: one that forks takes several passes,
and the kernel takes its time to end what has much memory."""
_PAUSE = 0.005
_ADD_ATTEMPTS = 5
_BATCH = 128
"""Processes that are held at once, by a descriptor each."""

# The same numbers on every architecture that Python runs on but alpha: asm-generic/unistd.h; linux/mount.h.
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_SET_FLAG, _SET_STRING, _CMD_CREATE = 0, 1, 6

_libc = ctypes.CDLL(None, use_errno=True)


class SessionCgroups:
    """The hierarchy of the sessions' cgroups, one flat directory a session."""

    def __init__(self, mount: Descriptor | None) -> None:
        self._mount = mount

    @classmethod
    def open(cls) -> "SessionCgroups":
        """Mount the hierarchy if this host and our rights allow it."""
        for options in ((b"favordynmods",), ()):
            try:
                return cls(_mount_when_free(options))
            except OSError as error:
                reason = error.strerror
        log.warning("no cgroup hierarchy for sessions (%s): a kill can miss children that daemonized", reason)
        return cls(None)

    @property
    def usable(self) -> bool:
        """Whether trees are known by cgroup."""
        return self._mount is not None

    def close(self) -> None:
        """Let go of the hierarchy; the memberships stay. What is asked afterwards is answered as without one."""
        mount, self._mount = self._mount, None
        if mount is not None:
            mount.close()

    def add(self, session_id: SessionId, pid: int) -> None:
        """Put a process, and so all that it will start, into the session's cgroup. OSError."""
        if self._mount is None:
            return
        directory = self._mount.fileno()
        for attempts_left in reversed(range(_ADD_ATTEMPTS)):
            with contextlib.suppress(FileExistsError):
                os.mkdir(_name(session_id), 0o700, dir_fd=directory)
            try:
                fd = os.open(f"{_name(session_id)}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
                with contextlib.closing(Descriptor(fd)):
                    os.write(fd, str(pid).encode())
                return
            except OSError as error:
                # The hierarchy is the host's: another service that sweeps takes a new cgroup for a forgotten one.
                if error.errno not in (errno.ENOENT, errno.ENODEV) or not attempts_left:
                    raise

    def pids(self, session_id: SessionId) -> set[int] | None:
        """Return the members of a session's cgroup; None when nobody can tell."""
        if self._mount is None:
            return None
        path = f"{_name(session_id)}/cgroup.procs"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._mount.fileno())
            with open(fd, "rb") as file:  # noqa: PTH123  (a descriptor, not a path)
                return {int(line) for line in file.read().split()} - {0}
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV):  # it is removed, before or after the open
                return set()
            return None  # no descriptor, no memory: look for them in another way

    def remove(self, session_id: SessionId) -> bool:
        """Remove the session's cgroup if nobody is in it any more; return whether it is gone."""
        if self._mount is None:
            return True
        try:
            os.rmdir(_name(session_id), dir_fd=self._mount.fileno())
        except OSError as error:
            return error.errno == errno.ENOENT
        return True

    def sweep(self) -> None:
        """Remove every cgroup that is empty: those of sessions whose background children have ended."""
        if self._mount is None:
            return
        for name in self._names():
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=self._mount.fileno())

    def _names(self) -> list[str]:
        """Return the names of all cgroups that there are."""
        if self._mount is None:
            return []
        root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._mount.fileno())
        with contextlib.closing(Descriptor(root)), os.scandir(root) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


class ProcessTree:
    """The processes of one session.

    `process` is the one that was asked for; its monitor is never counted or signalled.
    """

    def __init__(self, cgroups: SessionCgroups, session_id: SessionId, process: ProcessIdentity) -> None:
        self._cgroups = cgroups
        self._session_id = session_id
        self._process = process
        self._known = {process.pid: process.start_time}  # who was found, where no cgroup tells

    @property
    def alive(self) -> bool:
        """Whether the session's own process still runs."""
        return proc.is_alive(self._process)

    def signal(self, number: int) -> bool:
        """Send a signal to the session's own process and to no other; return whether it still was there."""
        if not self._cgroups.usable:  # who belongs to it is found from the process, while that lives
            self._known = _relatives(self._known)
        fd = pidfd.open_pidfd(self._process)
        if fd is None:
            return False
        with contextlib.closing(fd):
            return _send(fd, number)

    def pids(self, monitor: ProcessIdentity | None) -> set[int]:
        """Return the pids of all processes of the session that run now."""
        members = self._cgroups.pids(self._session_id)
        if members is None:
            self._known = _relatives(self._known)
            return set(self._known)
        return {pid for pid in members - {monitor.pid if monitor else 0} if _facts(pid) is not None}

    async def kill(self, monitor: ProcessIdentity | None) -> bool:
        """Send SIGKILL until nothing is left; return whether that came about."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _KILL_TIME
        while True:
            members = sorted(self.pids(monitor))  # before anybody dies: children of the dead are nobody's
            self.signal(signal.SIGKILL)
            if not members:
                return True
            if loop.time() > deadline:
                log.error("exec %s: %d processes cannot be killed", self._session_id[:12], len(members))
                return False
            for begin in range(0, len(members), _BATCH):
                self._kill_members(members[begin : begin + _BATCH], monitor)
            await asyncio.sleep(_PAUSE)  # the kernel has no event for "this cgroup is empty" in a v1 hierarchy

    def _kill_members(self, pids: Sequence[int], monitor: ProcessIdentity | None) -> None:
        """Kill those of `pids` that still are members once a pidfd holds them: no reuse of a number can move that."""
        with contextlib.ExitStack() as held:
            found: dict[int, Descriptor] = {}
            for pid in pids:
                with contextlib.suppress(OSError):  # gone; or too many descriptors: the next pass has it
                    found[pid] = Descriptor(os.pidfd_open(pid))
                    held.callback(found[pid].close)
            for pid in found.keys() & self.pids(monitor):
                _send(found[pid], signal.SIGKILL)


def _send(fd: Descriptor, number: int) -> bool:
    try:
        signal.pidfd_send_signal(fd.fileno(), number)
    except ProcessLookupError:
        return False
    return True


def _relatives(known: dict[int, int]) -> dict[int, int]:
    """Return who of `known` (pid to start time) lives, their descendants, and all of the sessions begun among them."""
    facts = {pid: fact for pid in _all_pids() if (fact := _facts(pid)) is not None}
    members = {pid for pid, start_time in known.items() if pid in facts and facts[pid][2] == start_time}
    while True:
        sids = {facts[pid][1] for pid in members} & members  # sessions that were begun inside the tree
        more = {pid for pid, (parent, sid, _) in facts.items() if parent in members or sid in sids} - members
        if not more:
            return {pid: facts[pid][2] for pid in members}
        members |= more


def _facts(pid: int) -> tuple[int, int, int] | None:
    """Return ppid, sid and start time (fields 4, 6 and 22 of `/proc/PID/stat`); None of the dead."""
    try:
        data = read_kernel(f"/proc/{pid}/stat", single=True)
    except ExecgateError:
        return None
    if not data:
        return None
    fields = data[data.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else (int(fields[1]), int(fields[3]), int(fields[19]))


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]  # noqa: PTH208


def _name(session_id: SessionId) -> str:
    return session_id[:32]


def _mount_when_free(options: tuple[bytes, ...]) -> Descriptor:
    """Return a detached mount of the hierarchy, once an earlier one is torn down. Blocks, for a moment. OSError."""
    deadline = time.monotonic() + _MOUNT_TIME
    while True:
        try:
            return _mount_detached(options)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE)


def _mount_detached(options: tuple[bytes, ...]) -> Descriptor:
    """Return a detached mount of the hierarchy. OSError."""
    with contextlib.closing(Descriptor(_call(_SYS_FSOPEN, b"cgroup", _FSOPEN_CLOEXEC))) as context:
        for flag in (b"none", *options):
            _call(_SYS_FSCONFIG, context.fileno(), _SET_FLAG, flag, None, 0)
        _call(_SYS_FSCONFIG, context.fileno(), _SET_STRING, b"name", _HIERARCHY, 0)
        _call(_SYS_FSCONFIG, context.fileno(), _CMD_CREATE, None, None, 0)
        return Descriptor(_call(_SYS_FSMOUNT, context.fileno(), _FSMOUNT_CLOEXEC, 0))


def _call(number: int, *arguments: int | bytes | None) -> int:
    converted = [ctypes.c_long(one) if isinstance(one, int) else ctypes.c_char_p(one) for one in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *converted)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
