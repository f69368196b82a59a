"""Rootless: the service as an ordinary user, for the containers of that user's own Podman.

The theory. A user's Podman keeps all of its containers in *one* user namespace, in which the user is root and the
ranges of /etc/subuid and /etc/subgid (mapped by newuidmap and newgidmap) are everybody else. An idle process, "podman
pause", holds that namespace and a mount namespace in which the containers' file systems are mounted. A runtime can
enter such a container only from there: as the plain user runc fails in its first setns(2).

So the service moves there too, before it does anything else, and stays: it is root then over exactly what the user's
subordinate ids own. It keeps its pid, descriptors, environment and working directory, so nothing changes for systemd
or a terminal. (`podman unshare execgate serve` would do as well, but for this: podman does not pass on the SIGTERM
that should stop the service.)

A user without Podman stays where they are: each of their containers has a user namespace of its own, which its
runtime enters by itself. What was found to be true of Podman 4.3.1 is in docs/rootless.md.
"""

import contextlib
import ctypes
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from execgate.model.errors import Unavailable
from execgate.oci.text import shown

log = logging.getLogger(__name__)

PAUSE_PID = Path("libpod/tmp/pause.pid")
"""Below `$XDG_RUNTIME_DIR`: the pid, in decimal, without an end of line."""

_PAUSE_NAMES = ("podman", "catatonit")
"""What the idle process calls itself: "podman pause", in old versions just "podman"; or the program it execs."""

_CLONE_NEWNS = 0x00020000  # linux/sched.h
_CLONE_NEWUSER = 0x10000000
_PODMAN_TIMEOUT = 60.0

_libc = ctypes.CDLL(None, use_errno=True)


def user_id() -> int:
    """Return whose process this is: its uid as the initial user namespace has it, also after `enter_podman`.

    There os.getuid() is 0, and what a user has by default would be taken for what root has.
    """
    return outside(os.getuid(), Path("/proc/self/uid_map").read_text(encoding="ascii"))


def outside(uid: int, uid_map: str) -> int:
    """Return what a uid is outside of the user namespace with this map: lines of `INSIDE OUTSIDE COUNT`.

    A uid that is not mapped (the kernel shows 65534) is returned as it is; the initial namespace maps each to itself.
    """
    for line in uid_map.splitlines():
        inside, origin, count = map(int, line.split())
        if inside <= uid < inside + count:
            return origin + uid - inside
    return uid


def enter_podman(environ: Mapping[str, str]) -> bool:
    """Move this process into the namespaces of the user's Podman; return whether it did.

    It does nothing for root, which includes whoever was moved already, nor for a user who has no Podman. Where the
    namespaces do not exist yet (no podman command ran since the user's first login) Podman is told to make them.

    Call it before there is a second thread: the kernel moves no others. Raises Unavailable with the reason, one of
    Podman's own where it has one.
    """
    if os.getuid() == 0:
        return False
    runtime_dir = environ.get("XDG_RUNTIME_DIR", "")
    if not runtime_dir.startswith("/"):
        log.warning("XDG_RUNTIME_DIR is not set: the containers of a rootless Podman cannot be found")
        return False
    pid_file = Path(runtime_dir) / PAUSE_PID
    if _join(pid_file):
        return True
    podman = shutil.which("podman", path=environ.get("PATH"))
    if podman is None:
        return False
    _make_namespaces(podman, environ)
    if not _join(pid_file):
        raise Unavailable("podman has no user namespace", hint=f"{pid_file} names no process that holds one")
    return True


def _make_namespaces(podman: str, environ: Mapping[str, str]) -> None:
    """Run a podman command that does nothing: it makes the namespaces, or finds them by a running container."""
    try:
        done = subprocess.run(
            [podman, "unshare", "true"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PODMAN_TIMEOUT,
            env=dict(environ),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable("podman cannot be run", hint=f"podman unshare true: {error}") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise Unavailable("podman cannot make a user namespace", hint=f"podman unshare true: {shown(said, 400)}")


def _join(pid_file: Path) -> bool:
    """Enter the user and mount namespaces of the process that the file names; False when there is no such process."""
    with contextlib.ExitStack() as cleanup:
        try:
            pid = int(pid_file.read_text(encoding="ascii"))
            # All is read by way of one directory: were the pid given to another process, it would stay empty.
            process = cleanup.enter_context(_directory(f"/proc/{pid}"))
            if not _is_pause_process(process):
                return False
            user = cleanup.enter_context(_opened("ns/user", process))
            mount = cleanup.enter_context(_opened("ns/mnt", process))
        except (OSError, ValueError):
            return False
        if os.path.sameopenfile(user, cleanup.enter_context(_opened("/proc/self/ns/user", None))):
            return False
        here = Path.cwd()
        try:
            _setns(user, _CLONE_NEWUSER)
            _setns(mount, _CLONE_NEWNS)
            # The user is root in there already; a group other than the user's own may have no name there.
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            os.chdir(here)  # a mount namespace is entered at its root
        except OSError as error:
            hint = f"the namespaces of process {pid}: {error.strerror}"
            raise Unavailable("the user namespace of podman cannot be entered", hint=hint) from error
    log.info("runs in the user namespace of podman, that of process %d", pid)
    return True


def _is_pause_process(process: int) -> bool:
    """Whether a process that podman's file names is the one: after a crash the file may name any other."""
    with open(os.open("comm", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process), encoding="utf-8") as comm:  # noqa: PTH123
        return comm.read().startswith(_PAUSE_NAMES)


def _setns(fd: int, kind: int) -> None:
    if _libc.setns(ctypes.c_int(fd), ctypes.c_int(kind)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@contextlib.contextmanager
def _directory(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _opened(path: str, directory: int | None) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        yield fd
    finally:
        os.close(fd)
