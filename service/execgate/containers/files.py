"""Reading small files of the host: bounded, regular only, every OSError translated here.

State roots and /proc belong to root, and still a file there can be missing, half-written, huge, or a FIFO
that somebody put in its place. Three answers are kept apart, because they mean different things to a caller:
*it is not there* (NotFound), *it is there and unusable* (Internal), and *we cannot look now* (Unavailable).
To read the last as the first would declare every container dead as soon as the service runs out of
descriptors.
"""

import errno
import json
import os
import re
import stat
import time
from pathlib import Path
from typing import Any

from execgate.model.errors import ExecgateError, Internal, NotFound, Unavailable

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
"""What a surrogate looks like in JSON, lone or not."""

FileKey = tuple[int, int, int, int]
"""What changes when a file does: mtime in nanoseconds, size in bytes, inode, device."""

SETTLED_NS = 100_000_000
"""A time stamp is a tick of the kernel's coarse clock, 1 to 10 ms: two changes within one look like one, all the more
where the file system gives the same inode again. So a key tells changes only of what has been the same for this long.
"""

_PIECE = 1 << 16

_GONE = {errno.ENOENT, errno.ESRCH, errno.ENOTDIR}
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def translate(error: OSError, what: str) -> ExecgateError:
    """Return the category of `error`; `what` is the path, and goes to the hint only."""
    hint = f"{what}: {error.strerror or error}"
    if error.errno in _GONE:
        return NotFound("no such file", hint=hint)
    if error.errno in _EXHAUSTED:
        return Unavailable("the host is out of resources", hint=hint)
    return Internal("a file of the host cannot be read", hint=hint)


def key_if_there(path: str | Path) -> FileKey | None:
    """Return the key of the file that `path` names now, None when there is none. Raises Internal, Unavailable.

    Most engines are on few hosts: to find nothing must cost no more than to find something.
    """
    try:
        return _key(os.stat(path))  # noqa: PTH116  (asked at every request)
    except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
        return None
    except OSError as error:
        raise translate(error, str(path)) from error
    except ValueError as error:
        raise _no_path(path) from error


def key_or_none(path: str | Path) -> FileKey | None:
    """Return the key of what is at `path`; None when nothing is there, or nothing that can be looked at."""
    try:
        return key_if_there(path)
    except Internal:
        return None


def is_settled(key: FileKey, read_at: int) -> bool:
    """Return whether what was read after `read_at`, in nanoseconds since the epoch, is the same while its key is."""
    return abs(read_at - key[0]) > SETTLED_NS


def now() -> int:
    """Return a moment for `is_settled`; to be asked before the file is looked at."""
    return time.time_ns()


def read_regular(path: Path, *, limit: int, follow: bool = False) -> tuple[bytes, FileKey]:
    """Return the contents of a regular file of at most `limit` bytes, and the key of what was read.

    A symlink as the last part is refused unless `follow`. Never blocks on a FIFO. Raises as `translate` does;
    anything but a regular file, or a larger one, is Internal.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags)
    except OSError as error:
        raise translate(error, str(path)) from error
    except ValueError as error:
        raise _no_path(path) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Internal("a file of the host cannot be read", hint=f"{path}: not a regular file")
        data = b"" if status.st_size > limit else read_bounded(fd, limit + 1)
        if max(status.st_size, len(data)) > limit:
            raise Internal("a file of the host cannot be read", hint=f"{path}: larger than {limit} bytes")
        return data, _key(status)
    except OSError as error:
        raise translate(error, str(path)) from error
    finally:
        os.close(fd)


def read_bounded(fd: int, size: int) -> bytes:
    """Read `fd` to its end or up to `size` bytes, whichever comes first. Raises OSError."""
    chunks: list[bytes] = []
    while size > 0 and (chunk := os.read(fd, min(size, 1 << 20))):
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def read_json(path: Path, *, limit: int, follow: bool = False) -> tuple[dict[str, Any], FileKey]:
    """Return the JSON object in a file, and the key of what was read. No JSON, or no object, is Internal."""
    data, key = read_regular(path, limit=limit, follow=follow)
    try:
        value = parse_json(data)
    except (ValueError, RecursionError) as error:
        # The text of the error is left out: it may quote what the file holds.
        raise Internal("a file of the host cannot be read", hint=f"{path}: not JSON") from error
    if not isinstance(value, dict):
        raise Internal("a file of the host cannot be read", hint=f"{path}: not a JSON object")
    return value, key


def parse_json(data: bytes | str) -> Any:
    """Return what a JSON text of an engine or a runtime says. ValueError, RecursionError.

    Every text in it can be encoded. Like Go's decoder this takes U+FFFD for what is no UTF-8; the escape of a lone
    surrogate becomes a question mark. Else whoever puts such a name into a record would fail.
    """
    text = data if isinstance(data, str) else data.decode(errors="replace")
    value = json.loads(text)
    if _SURROGATE.search(text):
        return json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    return value


def read_kernel(path: str, *, single: bool = False) -> bytes | None:
    """Return a file of /proc or of a cgroup whole; None when it, or its process, is gone.

    `single`: it is one that the kernel shows in one piece (single_open or seq_show in its source, not seq_next), so
    that one read has all of it. Raises Unavailable and Internal as `translate` does. The kernel bounds these files; the
    deepest are mountinfo and cgroup.procs.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        _raise_unless_gone(error, path)
        return None
    try:
        data = os.read(fd, _PIECE)
        return data if single and len(data) < _PIECE else data + read_bounded(fd, 1 << 26)
    except OSError as error:
        if error.errno != errno.ENODEV:  # the cgroup was removed after the open
            _raise_unless_gone(error, path)
        return None
    finally:
        os.close(fd)


def _raise_unless_gone(error: OSError, path: str) -> None:
    translated = translate(error, path)
    if not isinstance(translated, NotFound):
        raise translated from error


def _no_path(path: str | Path) -> Internal:
    """Return the error for a path that no file can have: paths come from foreign files, NUL and all."""
    return Internal("a file of the host cannot be read", hint=f"{str(path)!r}: cannot be the name of a file")


def _key(status: os.stat_result) -> FileKey:
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev
