"""Processes held by pidfd: waited for and judged without the pid being reused under our hands.

`os.pidfd_open` (Linux 5.3) works for any process, not only children. The exit code of a process that is not our
child is told by the ioctl `PIDFD_GET_INFO` with `PIDFD_INFO_EXIT` (Linux 6.15), as long as the pidfd was opened
before the process was reaped. On older kernels the answer is None, an honest "unknown".
"""

import asyncio
import fcntl
import os
import signal
import struct
from pathlib import Path

from execgate.containers import proc
from execgate.model.process import ProcessIdentity
from execgate.model.session import ExitSource, ExitStatus
from execgate.runtime.readiness import Descriptor, readable

# include/uapi/linux/pidfd.h: struct pidfd_info, 64 bytes in its first version:
# __u64 mask, __u64 cgroupid, then 12 ids of __u32 (pid, tgid, ppid, ruid … fsgid… ), the last an __s32 exit_code.
_INFO = struct.Struct("=QQ11Ii")
_PIDFD_INFO_EXIT = 1 << 3
_PIDFD_GET_INFO = (3 << 30) | (_INFO.size << 16) | (0xFF << 8) | 11  # _IOWR(0xFF, 11, struct pidfd_info)

_REAP_ATTEMPTS = 20
_REAP_INTERVAL = 0.05


def identify(pid: int) -> ProcessIdentity | None:
    """Name the process that has `pid` now, or None when there is none."""
    start_time = proc.start_time(pid)
    return None if start_time is None else ProcessIdentity(pid, start_time)


def open_pidfd(process: ProcessIdentity) -> Descriptor | None:
    """Return a pidfd of exactly this process, or None when it is gone and reaped."""
    try:
        fd = Descriptor(os.pidfd_open(process.pid))
    except OSError:  # ESRCH: gone. EMFILE, ENOMEM: without a pidfd we know less, and nothing breaks.
        return None
    # Opened by number, so compare the start time *after* the open: from here on the number cannot be reused.
    if proc.start_time(process.pid) != process.start_time:
        fd.close()
        return None
    return fd


def hold(pid: int) -> tuple[ProcessIdentity, Descriptor | None]:
    """Name the process that has `pid` now, and return a pidfd of exactly this one.

    None when it is gone and reaped, or none can be had; the start time of one whose name nobody learnt is 0.
    """
    try:
        fd = Descriptor(os.pidfd_open(pid))
    except OSError:  # as in `open_pidfd`
        return identify(pid) or ProcessIdentity(pid, 0), None
    try:
        identity = identify(pid)
        # A number is its process's until that is reaped. One that is not, after the look, is whom we have looked at.
        if identity is not None and not _reaped(fd):
            return identity, fd
    except BaseException:
        fd.close()
        raise
    fd.close()
    return ProcessIdentity(pid, 0), None


def _reaped(fd: Descriptor) -> bool:
    try:
        signal.pidfd_send_signal(fd.fileno(), 0)
    except ProcessLookupError:
        return True
    except OSError:  # EPERM: it is there, and another user's
        return False
    return False


async def ended(pidfd: Descriptor) -> None:
    """Return once the process has ended (it may still be a zombie)."""
    await readable(pidfd.fileno())


def exit_status(pidfd: Descriptor) -> ExitStatus | None:
    """Return how an ended and reaped process ended, or None where the kernel does not tell."""
    buffer = bytearray(_INFO.pack(_PIDFD_INFO_EXIT, *([0] * 12), 0))
    try:
        fcntl.ioctl(pidfd.fileno(), _PIDFD_GET_INFO, buffer)
    except OSError:  # ENOTTY, EINVAL: an older kernel; ESRCH: reaped before PIDFD_INFO_EXIT existed
        return None
    mask, *_, wait_status = _INFO.unpack(buffer)
    if not mask & _PIDFD_INFO_EXIT:
        return None
    return ExitStatus(shell_code(wait_status), ExitSource.PIDFD)


def zombie_status(process: ProcessIdentity) -> ExitStatus | None:
    """Return how a process ended that nobody has reaped yet, from `/proc/PID/stat`; None when it is no zombie.

    Field 52 (proc(5)) is the wait status. Together with `exit_status` there is an answer before and after the reaping.
    """
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b")")[2].split()  # from field 3 on; the name before it may hold anything
    if fields[0] != b"Z" or int(fields[19]) != process.start_time:
        return None
    return ExitStatus(shell_code(int(fields[49])), ExitSource.PIDFD)


async def kernel_status(process: ProcessIdentity | None, fd: Descriptor | None) -> ExitStatus | None:
    """Ask the kernel, which tells of an ended process in one place before it is reaped and in another after."""
    if process is None or fd is None:
        return None
    for _ in range(_REAP_ATTEMPTS):
        if status := zombie_status(process) or exit_status(fd):
            return status
        await asyncio.sleep(_REAP_INTERVAL)  # the kernel has no event for "reaped"
    return None


def shell_code(wait_status: int) -> int:
    """Return the shell's number for a wait status: the exit code, or 128 + signal."""
    code = os.waitstatus_to_exitcode(wait_status)
    return 128 - code if code < 0 else code
