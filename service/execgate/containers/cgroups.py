"""Where the cgroups of a process are in the file system, and what they say.

The theory. `/proc/PID/cgroup` names a process's cgroup in each hierarchy, `/proc/self/mountinfo` says which
part of which hierarchy is mounted where; the directory is the one path laid below the other. Both texts are
relative to the cgroup namespace of the *reader*. What lies outside it starts with `/..`, and a hierarchy may
be mounted in part or not at all: then there is no directory, and this module says so instead of guessing.

v1 and v2 can be mounted side by side (hybrid), and two runtimes on one host may each use another of them. So
each question is put to every hierarchy that could answer it.
"""

import functools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from execgate.containers.files import read_kernel, translate
from execgate.model.errors import Unavailable

V2 = ""
"""The name of the unified hierarchy, as in the second field of `0::/path`."""

_MAX_DEPTH = 64
_ESCAPE = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class CgroupMount:
    """One mounted hierarchy: its controllers (`V2` for the unified one), the part mounted, and where."""

    controllers: frozenset[str]
    root: str
    point: str


@dataclass(frozen=True, slots=True)
class Cgroup:
    """A cgroup as a directory, with the mount point above which no parent is looked for."""

    directory: str
    top: str

    def lineage(self) -> Iterator[str]:
        """Yield the directory and its parents, nearest first, without the root of the mount."""
        directory = self.directory
        while len(directory) > len(self.top):
            yield directory
            directory = os.path.dirname(directory)  # noqa: PTH120


def memberships(pid: int | str) -> Mapping[str, str]:
    """Return the path of the process's cgroup for each v1 controller (`name=systemd` too) and for `V2`.

    Empty when the process is gone.
    """
    return _parsed_memberships(read_kernel(f"/proc/{pid}/cgroup", single=True) or b"")


@functools.lru_cache(maxsize=128)
def _parsed_memberships(text: bytes) -> Mapping[str, str]:
    """Return what a `/proc/PID/cgroup` says; that of a container is asked for at every request, and stays the same."""
    paths: dict[str, str] = {}
    for line in text.splitlines():
        _, _, rest = os.fsdecode(line).partition(":")
        controllers, _, path = rest.partition(":")
        paths |= dict.fromkeys(controllers.split(","), path)
    return paths


def find(controller: str, path: str) -> Cgroup | None:
    """Return the directory of a cgroup, given its path in `memberships`; None when it is not mounted."""
    found = _first_there(_places(controller, path))
    if found is None:
        # The mounts may have changed since they were read. A wrong cache can only miss: a hit was looked at.
        _forget_mounts()
        found = _first_there(_places(controller, path))
    return found


def is_frozen(cgroup: Cgroup, controller: str) -> bool:
    """Return whether the freezer has stopped, or is stopping, a cgroup: by itself or with a parent."""
    if controller == V2:
        return _is_frozen_v2(cgroup)
    # freezer.state is the effective state: a frozen parent shows in it (kernel: freezer-subsystem.rst).
    return _text(f"{cgroup.directory}/freezer.state") in ("FROZEN", "FREEZING")


def pids_below(directory: str) -> set[int]:
    """Return the processes of a cgroup and of all cgroups below it."""
    pids: set[int] = set()
    pending = [(directory, 0)]
    while pending:
        current, depth = pending.pop()
        pids.update(map(int, (read_kernel(f"{current}/cgroup.procs") or b"").split()))
        if depth < _MAX_DEPTH:
            pending += ((child, depth + 1) for child in _children(current))
    return pids - {0}  # 0 is a process that our pid namespace does not see


def parse_mounts(mountinfo: bytes) -> tuple[CgroupMount, ...]:
    """Return the cgroup mounts of a `/proc/PID/mountinfo`, proc_pid_mountinfo(5)."""
    return tuple(filter(None, map(_parse_mount, mountinfo.splitlines())))


def below(root: str, path: str) -> str | None:
    """Return `path` relative to `root`, `""` when they are the same, None when it is not under it.

    Both are relative to the reader's cgroup namespace: `/..` is a parent whose name is not known, so `/a` may
    well be under `/..`, but nobody can say by which name.
    """
    roots, parts = _parts(root), _parts(path)
    if parts[: len(roots)] != roots:
        return None
    rest = parts[len(roots) :]
    return None if ".." in rest else "/".join(rest)


@functools.cache
def _mounts() -> tuple[CgroupMount, ...]:
    return parse_mounts(read_kernel("/proc/self/mountinfo") or b"")


def _forget_mounts() -> None:
    _mounts.cache_clear()
    _places.cache_clear()


@functools.lru_cache(maxsize=128)
def _places(controller: str, path: str) -> tuple[Cgroup, ...]:
    """Return where a cgroup would be in each mount of its hierarchy."""
    mounts = [mount for mount in _mounts() if controller in mount.controllers]
    rests = [(mount.point, below(mount.root, path)) for mount in mounts]
    return tuple(Cgroup(f"{point}/{rest}".rstrip("/"), point) for point, rest in rests if rest is not None)


def _first_there(places: tuple[Cgroup, ...]) -> Cgroup | None:
    # cgroup.procs is in every cgroup of both versions, and in no directory that a later mount hides it with.
    there = (place for place in places if os.access(f"{place.directory}/cgroup.procs", os.F_OK))
    return next(there, None)


def _parse_mount(line: bytes) -> CgroupMount | None:
    front, _, back = line.partition(b" - ")
    fields, tail = front.split(b" "), back.split(b" ")
    if len(fields) < 6 or len(tail) < 3 or tail[0] not in (b"cgroup", b"cgroup2"):
        return None
    names = {V2} if tail[0] == b"cgroup2" else set(os.fsdecode(tail[2]).split(","))
    return CgroupMount(frozenset(names), _unescape(fields[3]), _unescape(fields[4]))


def _unescape(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field))


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def _is_frozen_v2(cgroup: Cgroup) -> bool:
    if "frozen 1" in _text(f"{cgroup.directory}/cgroup.events").splitlines():
        return True
    # `frozen` turns 1 only when the last task has stopped; an exec that starts meanwhile would hang as well.
    return any(_text(f"{directory}/cgroup.freeze") == "1" for directory in cgroup.lineage())


def _text(path: str) -> str:
    return (read_kernel(path, single=True) or b"").decode("ascii", "replace").strip()


def _children(directory: str) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        translated = translate(error, directory)
        if isinstance(translated, Unavailable):
            raise translated from error
        return []  # removed while we looked
