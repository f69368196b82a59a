"""What the kernel says of a process: whether it lives, whether it is frozen, who shares its container.

A process is named by pid *and* start time. Nothing here trusts a bare pid to mean tomorrow what it meant
today, and no answer is made up: a process that is gone is None or False, a host that cannot be read raises.
"""

import fcntl
import functools
import os
from collections.abc import Mapping

from execgate.containers import cgroups
from execgate.containers.files import read_kernel, translate
from execgate.model.errors import Internal, NotFound, Unavailable
from execgate.model.process import ProcessIdentity

_NS_GET_PARENT = 0xB702  # linux/nsfs.h
_DEAD = frozenset("ZXx")
_CAP_SYS_RESOURCE = 24  # linux/capability.h
_LIMIT_COLUMN = 26  # fs/proc/base.c: proc_pid_limits
_LIMITS = {
    "Max cpu time": "RLIMIT_CPU",
    "Max file size": "RLIMIT_FSIZE",
    "Max data size": "RLIMIT_DATA",
    "Max stack size": "RLIMIT_STACK",
    "Max core file size": "RLIMIT_CORE",
    "Max resident set": "RLIMIT_RSS",
    "Max processes": "RLIMIT_NPROC",
    "Max open files": "RLIMIT_NOFILE",
    "Max locked memory": "RLIMIT_MEMLOCK",
    "Max address space": "RLIMIT_AS",
    "Max pending signals": "RLIMIT_SIGPENDING",
    "Max msgqueue size": "RLIMIT_MSGQUEUE",
    "Max nice priority": "RLIMIT_NICE",
    "Max realtime priority": "RLIMIT_RTPRIO",
    "Max realtime timeout": "RLIMIT_RTTIME",
}
INFINITY = 2**64 - 1
"""No limit, as the kernel has it and the OCI specification writes it."""
_OWN_FIRST = (cgroups.V2, "freezer", "pids", "devices", "memory", "cpu", "name=systemd")
"""The hierarchies that tell a container's processes, best first: runtimes create a cgroup in these."""


def start_time(pid: int) -> int | None:
    """Return field 22 of `/proc/PID/stat`, clock ticks since boot; None when there is no such process.

    A zombie has a start time: see `is_alive`. Raises Unavailable when the host is out of descriptors.
    """
    facts = _stat(pid)
    return facts[1] if facts else None


def is_alive(process: ProcessIdentity) -> bool:
    """Return whether this very process runs: its pid, its start time, and neither a zombie nor dead."""
    facts = _stat(process.pid)
    return facts is not None and facts[1] == process.start_time and facts[0] not in _DEAD


def namespace_pid(process: ProcessIdentity) -> int | None:
    """Return the pid of a process as its own pid namespace has it; None when it is gone."""
    for line in (read_kernel(f"/proc/{process.pid}/status", single=True) or b"").splitlines():
        name, _, value = line.partition(b":")
        if name == b"NSpid":
            return int(value.split()[-1]) if is_alive(process) else None
    return None


def limits(pid: int) -> dict[str, tuple[int, int]]:
    """Return the resource limits of a process that are not ours, by `RLIMIT_` name: soft and hard, getrlimit(2).

    RLIMIT_NOFILE is always among them, because the service raises its own. A hard limit above ours takes
    CAP_SYS_RESOURCE: without it, ours is returned instead. Empty when the process is gone.
    """
    theirs, ours = read_kernel(f"/proc/{pid}/limits", single=True) or b"", _required("/proc/self/limits")
    return dict(_differing(theirs, ours.encode()))


@functools.lru_cache(maxsize=32)
def _differing(theirs_text: bytes, own_text: bytes) -> Mapping[str, tuple[int, int]]:
    """Return what `limits` does of two `/proc/PID/limits`, theirs and ours."""
    found: dict[str, tuple[int, int]] = {}
    ours = _parsed_limits(own_text)
    for name, theirs in _parsed_limits(theirs_text).items():
        own = ours.get(name, theirs)
        if theirs != own or name == "RLIMIT_NOFILE":
            beyond = theirs[1] > own[1] and not _may_raise_limits()
            found[name] = (min(theirs[0], own[1]), own[1]) if beyond else theirs
    return found


def _parsed_limits(text: bytes) -> dict[str, tuple[int, int]]:
    """Return soft and hard limits by name."""
    found = {}
    for line in text.decode("ascii", "replace").splitlines()[1:]:
        name = _LIMITS.get(line[:_LIMIT_COLUMN].strip())
        if name is not None:
            soft, hard = (INFINITY if word == "unlimited" else int(word) for word in line[_LIMIT_COLUMN:].split()[:2])
            found[name] = (soft, hard)
    return found


@functools.cache
def _may_raise_limits() -> bool:
    for line in _required("/proc/self/status").splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return bool(int(value, 16) >> _CAP_SYS_RESOURCE & 1)
    return False


@functools.cache
def boot_id() -> str:
    """Return the kernel's random id of this boot, `xxxxxxxx-xxxx-…`."""
    return _required("/proc/sys/kernel/random/boot_id").strip()


def own_capability_bounds() -> int:
    """Return the bounding set of this process as a mask: the most that any exec of ours can hand out."""
    return _own_mask("CapBnd")


def own_capabilities() -> int:
    """Return the effective capabilities of this process as a mask."""
    return _own_mask("CapEff")


def _own_mask(wanted: str) -> int:
    for line in _required("/proc/self/status").splitlines():
        name, _, value = line.partition(":")
        if name == wanted:
            return int(value, 16)
    raise Internal("the capabilities of the service are unknown", hint=f"/proc/self/status has no {wanted} line")


def frozen(pid: int) -> bool:
    """Return whether the freezer of v1 or v2 holds the process, by its own cgroup or a parent's.

    False when the process is gone or its cgroups are not mounted here.
    """
    paths = cgroups.memberships(pid)
    for controller in ("freezer", cgroups.V2):
        path = paths.get(controller, "/")
        cgroup = cgroups.find(controller, path) if path != "/" else None
        if cgroup is not None and cgroups.is_frozen(cgroup, controller):
            return True
    return False


def pids_in_cgroup(pid: int) -> list[int]:
    """Return the pids, in our namespace and sorted, of all processes of the container whose init is `pid`.

    With a pid namespace of its own, that is who lives in it or in one below it. The cgroup would be the worse
    witness: it may have been joined and not created, two containers of one name share it, and systemd in a
    container moves itself into a cgroup beside that of the execs. Only where the container has the host's pid
    namespace does its cgroup decide, with all below it; without either only the init is known.

    Empty when the process is gone.
    """
    namespace, ours = _pid_namespace(pid), _pid_namespace("self")
    if namespace is None or namespace == ours:
        members = _cgroup_members(pid)
        return sorted(members | {pid} if namespace else members)
    inside = {namespace: True, ours: False, None: False}
    members = set()
    for candidate in _all_pids():
        theirs = _pid_namespace(candidate)
        if theirs not in inside:
            inside[theirs] = _descends(candidate, namespace)
        if inside[theirs]:
            members.add(candidate)
    return sorted(members)


def _stat(pid: int) -> tuple[str, int] | None:
    """Return state and start time."""
    data = read_kernel(f"/proc/{pid}/stat", single=True) if pid > 0 else None
    if not data:
        return None
    # The second field is the program's name in parentheses, and may itself hold spaces and parentheses:
    # what follows its *last* one is field 3 onwards, proc_pid_stat(5).
    fields = data[data.rindex(b")") + 2 :].split()
    return fields[0].decode(), int(fields[19])


def _cgroup_members(pid: int) -> set[int]:
    """Return the processes of the first hierarchy in which the container has a cgroup of its own."""
    paths, ours = cgroups.memberships(pid), cgroups.memberships("self")
    for controller in _OWN_FIRST:
        path = paths.get(controller, "/")
        # Where the service itself is at or below the path, the container only inherited it.
        if path == "/" or cgroups.below(path, ours.get(controller, "/")) is not None:
            continue
        cgroup = cgroups.find(controller, path)
        if cgroup is not None:
            return cgroups.pids_below(cgroup.directory)
    return set()


def _pid_namespace(pid: int | str) -> str | None:
    """Return the name of a process's pid namespace, None when it is gone or not ours to look at."""
    path = f"/proc/{pid}/ns/pid"
    try:
        return os.readlink(path)  # noqa: PTH115
    except PermissionError:
        return None
    except OSError as error:
        translated = translate(error, path)
        if isinstance(translated, NotFound):
            return None
        raise translated from error


def _descends(pid: int, namespace: str) -> bool:
    """Return whether the pid namespace of `pid` is somewhere below `namespace`."""
    inode = int(namespace.partition("[")[2].rstrip("]"))
    try:
        fd = os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        while True:
            try:
                parent = fcntl.ioctl(fd, _NS_GET_PARENT)
            finally:
                os.close(fd)
            fd = parent
            if os.fstat(fd).st_ino == inode:
                os.close(fd)
                return True
    except OSError as error:
        # EPERM is the end of the line: a parent beyond our own namespace, ioctl_ns(2).
        translated = translate(error, f"/proc/{pid}/ns/pid")
        if isinstance(translated, Unavailable):
            raise translated from error
        return False


def _all_pids() -> list[int]:
    try:
        with os.scandir("/proc") as entries:
            return [int(entry.name) for entry in entries if entry.name.isdecimal()]
    except OSError as error:
        raise translate(error, "/proc") from error


def _required(path: str) -> str:
    data = read_kernel(path, single=True)
    if data is None:
        raise Internal("the host cannot be read", hint=f"{path} is missing: is /proc mounted?")
    return data.decode("ascii", "replace")
