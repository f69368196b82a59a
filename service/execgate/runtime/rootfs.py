"""Reading a file as a container sees it, without leaving the container.

The theory. `/proc/PID/root/etc/passwd` opened plainly is resolved by *our* rules: a symlink in the container
that points to `/etc/shadow` leads to the host's. openat2(2) with RESOLVE_IN_ROOT makes the container's root
the end of every `..` and the start of every absolute link, and RESOLVE_NO_MAGICLINKS closes the ways out
through /proc/…/fd, /root and /cwd. Whatever is found is first opened with O_PATH, which touches nothing
(opening a device or a FIFO has effects); only what fstat(2) calls a regular file is opened again, through our
own descriptor of that very inode, so that nothing can be swapped in between.

What the file is, is the container's affair: one that is missing, no regular file, too large, or at the end of
a loop of symlinks, is as good as empty (CVE-2024-9676), and never an error that the container could use to
harm the service.

A hostile FUSE mount can still make an open take as long as it likes. Call this from a thread, with a
deadline.
"""

import ctypes
import errno
import logging
import os
import stat

from execgate.containers.files import read_bounded, translate
from execgate.model.errors import Internal, NotFound, Unavailable
from execgate.oci.text import shown

DEFAULT_LIMIT = 1024 * 1024

_SYS_OPENAT2 = 437  # the same on every architecture that Python runs on but alpha: asm-generic/unistd.h
_RESOLVE_NO_MAGICLINKS = 0x02  # linux/openat2.h
_RESOLVE_IN_ROOT = 0x10
_ATTEMPTS = 32

_log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    """`struct open_how` of linux/openat2.h."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def read_in_container(pid: int, path: str, *, limit: int = DEFAULT_LIMIT) -> bytes:
    """Return the contents of `path` in the root of process `pid`, `b""` when there is no such regular file.

    A file of more than `limit` bytes counts as none, and so does one that the kernel refuses to read. A pid
    can be reused: check after the call that the process is still the one that was meant.

    Raises NotFound when the process is gone, Unavailable when descriptors or memory are short or the kernel
    has no openat2 (before 5.6), Internal when the process's root is not ours to look at.
    """
    root = _open_root(pid)
    try:
        fd = _open_below(root, path)
    except OSError as error:
        return _as_empty(error, pid, path)
    finally:
        os.close(root)
    try:
        return _read_regular(fd, limit)
    except OSError as error:
        return _as_empty(error, pid, path)
    finally:
        os.close(fd)


def _open_root(pid: int) -> int:
    path = f"/proc/{pid}/root"
    try:
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        translated = translate(error, path)
        if isinstance(translated, NotFound):
            raise NotFound(f"process {pid} is gone", hint=translated.hint) from error
        if isinstance(translated, Unavailable):
            raise translated from error
        raise Internal("the container's file system cannot be reached", hint=translated.hint) from error


def _open_below(root: int, path: str) -> int:
    """Return an O_PATH descriptor of `path` with `root` as its root. Raises OSError."""
    for _ in range(_ATTEMPTS):
        try:
            return _openat2(root, path, os.O_PATH | os.O_CLOEXEC, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
        except BlockingIOError:
            # EAGAIN: something was renamed or mounted while ".." was resolved, openat2(2). Bounded, because
            # a container can go on renaming.
            continue
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def _openat2(directory: int, path: str, flags: int, resolve: int) -> int:
    how = _OpenHow(flags=flags, mode=0, resolve=resolve)
    encoded = ctypes.c_char_p(os.fsencode(path))
    fd: int = _libc.syscall(
        ctypes.c_long(_SYS_OPENAT2),
        ctypes.c_int(directory),
        encoded,
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return fd


def _read_regular(fd: int, limit: int) -> bytes:
    """Return what the O_PATH descriptor `fd` names. Raises OSError, EFBIG for a file larger than `limit`."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if status.st_size > limit:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        data = read_bounded(readable, limit + 1)
    finally:
        os.close(readable)
    if len(data) > limit:  # it grew, or is one of those whose size says 0
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return data


def _as_empty(error: OSError, pid: int, path: str) -> bytes:
    if error.errno == errno.ENOSYS:
        hint = "openat2 is missing (Linux before 5.6) or a seccomp filter hides it"
        raise Unavailable("files of the container cannot be read safely", hint=hint) from error
    translated = translate(error, path)
    if isinstance(translated, Unavailable):
        raise translated from error
    _log.debug("%s in the root of process %d counts as empty: %s", shown(path), pid, error.strerror)
    return b""
