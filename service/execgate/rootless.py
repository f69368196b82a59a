"""Rootless: the service as an ordinary user, for the containers of that user's own Podman.

The theory. A user's Podman keeps all of its containers in *one* user namespace, in which the user is root and the
ranges of /etc/subuid and /etc/subgid (mapped by newuidmap and newgidmap) are everybody else. A mount namespace, in
which the containers' file systems are mounted, belongs to it. A runtime can enter such a container only from there: as
the plain user runc fails in its first setns(2).

So the service moves there too, before it does anything else, and stays: it is root then over exactly what the user's
subordinate ids own. It keeps its pid, descriptors, environment and working directory, so nothing changes for systemd
or a terminal. (`podman unshare execgate serve` would do as well, but for this: podman does not pass on the SIGTERM
that should stop the service.)

Which namespaces these are is Podman's to say: up to version 5 an idle process holds them, whose pid is in a file,
version 6 keeps file handles, and either is made anew, or found by a running container, when it is missing. So Podman
is asked to run a shell in there, and that is the process whose namespaces are entered.

A user without Podman stays where they are: each of their containers has a user namespace of its own, which its
runtime enters by itself. What was found to be true of Podman 4.3.1 is in docs/rootless.md.
"""

import contextlib
import ctypes
import logging
import os
import select
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from execgate.model.errors import Unavailable
from execgate.oci.text import shown

log = logging.getLogger(__name__)

_GUIDE = ("unshare", "sh", "-c", "echo $$ && read -r _")
"""A podman command that says the pid of a process in its namespaces, which waits for the end of its input."""

_GUIDE_TIMEOUT = 60.0
_CLONE_NEWNS = 0x00020000  # linux/sched.h
_CLONE_NEWUSER = 0x10000000

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
    namespaces do not exist yet (no podman command ran since the user's first login) Podman makes them.

    Call it before there is a second thread: the kernel moves no others. Raises Unavailable with the reason, one of
    Podman's own where it has one.
    """
    if os.getuid() == 0:
        return False
    podman = shutil.which("podman", path=environ.get("PATH"))
    if podman is None:
        return False
    with _guide(podman, environ) as pid:
        _join(pid)
    log.info("runs in the user namespace of podman")
    return True


@contextlib.contextmanager
def _guide(podman: str, environ: Mapping[str, str]) -> Iterator[int]:
    """Yield the pid of a process in Podman's namespaces that lives as long as the `with`."""
    command = "podman unshare"
    try:
        process = subprocess.Popen(
            [podman, *_GUIDE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(environ),
        )
    except OSError as error:
        raise Unavailable("podman cannot be run", hint=f"{command}: {error}") from error
    with process:  # closes its input, which is its end, and waits for it
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        if not select.select([process.stdout], [], [], _GUIDE_TIMEOUT)[0]:
            process.kill()
            raise Unavailable("podman cannot enter its user namespace", hint=f"{command} does not answer")
        answer = process.stdout.readline().strip()
        if not answer.isdigit():
            process.stdin.close()
            said = process.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise Unavailable("podman cannot enter its user namespace", hint=f"{command}: {shown(said, 400)}")
        yield int(answer)


def _join(pid: int) -> None:
    """Enter the user and mount namespaces of a process. Unavailable."""
    here = Path.cwd()
    try:
        with _opened(f"/proc/{pid}/ns/user") as user, _opened(f"/proc/{pid}/ns/mnt") as mount:
            _setns(user, _CLONE_NEWUSER)
            _setns(mount, _CLONE_NEWNS)
        # The user is root in there already; a group other than the user's own may have no name there.
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        os.chdir(here)  # a mount namespace is entered at its root
    except OSError as error:
        hint = f"the namespaces of process {pid}: {error.strerror}"
        raise Unavailable("the user namespace of podman cannot be entered", hint=hint) from error


def _setns(fd: int, kind: int) -> None:
    if _libc.setns(ctypes.c_int(fd), ctypes.c_int(kind)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
