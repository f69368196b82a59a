"""Where the audit log goes: a file that is rotated, stdout, or both; and what becomes of it when that takes nothing.

The order of one entry: the file is there and has room (else it is opened anew, or rotated); what is due is written
first, that a line was torn, that a service began, that entries were lost; then the entry itself, in one write(2). Then
the link to it is kept beside the sessions (`Anchor`), for a service that finds another file, or none.

What always holds: an entry that was acknowledged is in the file, in the kernel's hands at least, and the chain goes on
from it whoever writes next. Half an entry is never followed by another on the same line: it is cut off at once, and
what a dead service has left of one is told by the next.

The calls are synchronous on the event loop on purpose: a write to a local file is some microseconds, and the order of
entries is that of the steps. Only `flushed` waits for a disk, in a thread.
"""

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import re
import select
import stat
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from execgate.gate.audit_chain import BEGINNING, LOST, MAX_LINE, RECOVERED, Link, digest_of, encode, parse
from execgate.model.errors import Conflict, Unavailable

log = logging.getLogger(__name__)

_STDOUT = 1
_TAIL = 1024 * 1024
"""Bytes at the end of a file in which its last entry is looked for."""
_MAX_UNFLUSHED = 4
"""Files that were rotated away and wait for a flush; with more, the oldest is flushed where it stands."""
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_FOR_GOOD = {
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.EPERM,
}  # fmt: skip
"""What keeps a file from ever being a log: somebody has to change something."""
_ANCHOR = re.compile(rb"(\d{20}) ([0-9a-f]{64}) (\d{20})\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSettings:
    """What is configured: no `path` and no `stdout` is no audit log.

    The file is rotated when it would grow beyond `max_bytes` (0: never), and `keep` old ones are kept. `strict`: what
    cannot be written is not done. `sync`: it is on the disk before a process is started. `anchor` is the file beside
    the sessions that knows the last entry.
    """

    anchor: Path
    path: Path | None = None
    stdout: bool = False
    max_bytes: int = 100 * 1024 * 1024
    keep: int = 10
    strict: bool = False
    sync: bool = False

    @property
    def enabled(self) -> bool:
        """Whether there is an audit log at all."""
        return self.path is not None or self.stdout


@dataclass(frozen=True, slots=True)
class Tail:
    """How a file ends: in which entry, and in how many bytes behind its last newline, that hash to `torn_digest`."""

    link: Link | None = None
    torn: int = 0
    torn_digest: str = ""


class AuditFile:
    """The file: one writer, appended to, rotated by renaming; opened anew when it was moved or removed."""

    def __init__(self, path: Path, *, max_bytes: int, keep: int) -> None:
        self.replaced: deque[int] = deque()
        """Descriptors of the files before this one, which are not flushed yet."""
        self._path = path
        self._name = str(path)
        self._max_bytes = max_bytes
        self._keep = keep
        self._lock: int | None = None
        self._fd: int | None = None
        self._identity = (0, 0)
        self._size = 0
        self._limit = max_bytes
        self._begin = b""  # what a line begins with: a newline, behind one that is torn

    def lock(self) -> None:
        """Be the only writer. OSError, BlockingIOError when there is another.

        The lock is a file of its own: the log's is renamed.
        """
        if self._lock is None:
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            lock = os.open(f"{self._name}.lock", _FLAGS, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BaseException:
                os.close(lock)
                raise
            self._lock = lock

    def ensure(self) -> Tail | None:
        """Have the file of our name open; if it was not, return how it ends. OSError."""
        if self._fd is not None and self._is_ours():
            return None
        self.lock()
        self._retire()
        fd = os.open(self._name, _FLAGS, 0o600)
        try:
            tail = self._adopt(fd)
        except BaseException:
            os.close(fd)
            raise
        if tail.link is None:  # a service that died within a rotation, or a logrotate
            tail = Tail(last_entry(f"{self._name}.1"), tail.torn, tail.torn_digest)
        self._begin = b"\n" if tail.torn else b""
        return tail

    def write(self, line: bytes) -> None:
        """Append a line, all of it or nothing. OSError."""
        data = self._begin + line + b"\n"
        if self._max_bytes and self._size and self._size + len(data) > self._limit:
            self._rotate()
            data = line + b"\n"
        assert self._fd is not None
        written = 0
        try:
            written = os.write(self._fd, data)
            if written < len(data):  # a disk that gets full takes what still fits
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._take_back(written)
            raise
        self._size += written
        self._begin = b""

    def take_unflushed(self) -> list[int]:
        """Return descriptors of all that may not be on the disk, for the caller to close. OSError."""
        found = [] if self._fd is None else [os.dup(self._fd)]
        found += self.replaced
        self.replaced.clear()
        return found

    def close_replaced(self, most: int = 0, *, flush: bool = False) -> None:
        """Let go of the files before this one, but for the `most` latest. OSError."""
        while len(self.replaced) > most:
            _close_all([self.replaced.popleft()], flush=flush)

    def close(self) -> None:
        """Let go of it."""
        self._retire()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self.close_replaced()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _is_ours(self) -> bool:
        """Whether our name is still that of the file which is open: whoever moves it away need not tell us."""
        try:
            status = os.stat(self._name, follow_symlinks=False)  # noqa: PTH116  (for each entry)
        except FileNotFoundError:
            return False
        return (status.st_dev, status.st_ino) == self._identity

    def _adopt(self, fd: int) -> Tail:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        tail = _tail(fd, status.st_size)
        self._fd, self._size, self._limit = fd, status.st_size, self._max_bytes
        self._identity = (status.st_dev, status.st_ino)
        return tail

    def _take_back(self, written: int) -> None:
        """Leave no half line; where that is not allowed, the file is looked at anew, and the line told as torn."""
        if written:
            assert self._fd is not None
            try:
                os.ftruncate(self._fd, self._size)
            except OSError:
                self._retire()

    def _rotate(self) -> None:
        """Rename the file and begin another one; it stays in use if it cannot be renamed. OSError."""
        assert self._fd is not None
        before = os.fstat(self._fd)
        try:
            for number in range(self._keep - 1, 0, -1):
                with contextlib.suppress(FileNotFoundError):
                    os.rename(f"{self._name}.{number}", f"{self._name}.{number + 1}")  # noqa: PTH104
            os.rename(self._name, f"{self._name}.1")  # noqa: PTH104
        except OSError as error:
            log.error("the audit log is not rotated: %s", error)
            self._limit = self._size + self._max_bytes
            return
        self._retire()
        fd = os.open(self._name, _FLAGS | os.O_EXCL, 0o600)
        self._adopt(fd)
        self._begin = b""
        with contextlib.suppress(OSError):  # whoever may read the one may read the other
            os.fchown(fd, before.st_uid, before.st_gid)
            os.fchmod(fd, stat.S_IMODE(before.st_mode) & 0o777)

    def _retire(self) -> None:
        if self._fd is not None:
            self.replaced.append(self._fd)
            self._fd = None


class Anchor:
    """The last entry, and how many could not be written, on record beside the sessions.

    It is for what the log itself cannot tell the next service: a file that was moved away, stdout. Nothing depends on
    it else, so that a state directory without room changes nothing.
    """

    def __init__(self, path: Path) -> None:
        self._fd: int | None = None
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(path, _FLAGS & ~os.O_APPEND, 0o600)
        except OSError as error:
            log.warning("the end of the audit log is not kept beside the sessions: %s", error)

    def read(self) -> tuple[Link, int]:
        """Return the last entry, and the number of those that were lost since."""
        if self._fd is not None:
            with contextlib.suppress(OSError):
                if found := _ANCHOR.fullmatch(os.pread(self._fd, 256, 0)):
                    return Link(int(found[1]), found[2].decode()), int(found[3])
        return BEGINNING, 0

    def keep(self, link: Link, lost: int) -> None:
        """Keep both."""
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._fd, b"%020d %s %020d\n" % (link.seq, link.digest.encode(), lost), 0)

    def close(self) -> None:
        """Let go of it."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class Trouble:
    """Something that fails again and again, and is told once; and once more when it is over."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._told = False

    def met(self, error: OSError) -> None:
        """It fails."""
        if not self._told:
            log.error("the audit log is not %s: %s", self._what, error)
        self._told = True

    def over(self) -> None:
        """It works."""
        if self._told:
            log.warning("the audit log is %s again", self._what)
        self._told = False


class AuditLog:
    """The log: the one chain of entries, wherever they go.

    With a file and stdout the file counts: stdout gets what the file has taken.
    """

    def __init__(self, settings: AuditSettings) -> None:
        self._settings = settings
        self._file = (
            None
            if settings.path is None
            else AuditFile(settings.path, max_bytes=settings.max_bytes, keep=settings.keep)
        )
        self._anchor = Anchor(settings.anchor)
        self._link, self._lost = self._anchor.read()
        self._due: deque[tuple[str, Mapping[str, Any]]] = deque()
        self._trouble, self._flush_trouble = Trouble("written"), Trouble("flushed to the disk")
        self._copy_trouble = Trouble("copied to stdout")
        self._closed = False
        self._flushed = self._link.seq
        self._flushing = asyncio.Lock()
        self._stdout = select.poll()
        if settings.stdout:
            self._stdout.register(_STDOUT, select.POLLOUT)

    def begin(self, fields: Mapping[str, Any]) -> None:
        """Tell that a service begins; Conflict when another one writes this log."""
        self._due.append(("opened", fields))
        try:
            if self._file is not None:
                self._file.lock()
        except BlockingIOError as error:
            raise Conflict(f"the audit log {self._settings.path} belongs to another running execgate") from error
        except OSError as error:
            self._trouble.met(error)
            return
        try:
            self._settle_dues()
        except OSError as error:  # what runs needs a service all the same
            self._trouble.met(error)

    def write(self, event: str, fields: Mapping[str, Any], *, refusable: bool = False) -> None:
        """Write an entry. Unavailable when it is `refusable`, cannot be written, and the log is strict."""
        try:
            self._settle_dues()
            self._put(event, fields)
        except OSError as error:
            self._trouble.met(error)
            if refusable and self._settings.strict:
                raise self._unavailable(error) from error
            self._lost += 1
            self._anchor.keep(self._link, self._lost)
        else:
            self._trouble.over()

    async def flushed(self) -> None:
        """Return once all that was written is on the disk, if that is wanted. Unavailable, as from `write`."""
        if not self._settings.sync or self._file is None:
            return
        wanted = self._link.seq
        async with self._flushing:  # those who wait here are served by one flush
            if self._flushed >= wanted:
                return
            reached = self._link.seq
            try:
                await asyncio.to_thread(_close_all, self._file.take_unflushed(), flush=True)
            except OSError as error:
                self._flush_trouble.met(error)
                if self._settings.strict:
                    raise self._unavailable(error) from error
            else:
                self._flush_trouble.over()
                self._flushed = reached

    def close(self) -> None:
        """Tell that the service ends, and let go of everything; harmless when that was done."""
        if not self._closed:
            self.write("closed", {})
            self._closed = True
            if self._file is not None:
                self._file.close()
            self._anchor.close()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _settle_dues(self) -> None:
        """Open the file if need be, and write what has to stand before the next entry. OSError."""
        if self._file is not None:
            if (tail := self._file.ensure()) is not None:
                self._go_on_from(tail)
            if self._file.replaced:
                self._file.close_replaced(_MAX_UNFLUSHED if self._settings.sync else 0, flush=self._settings.sync)
        while self._due:
            self._put(*self._due[0])
            self._due.popleft()
        if self._lost:
            lost, self._lost = self._lost, 0
            try:
                self._put(LOST, {"lines": lost})
            except OSError:
                self._lost = lost
                raise

    def _go_on_from(self, tail: Tail) -> None:
        """Find the last entry: what we remember, unless the file knows a later one; what is torn is told first."""
        if tail.link is not None and tail.link.seq > self._link.seq:
            self._link, self._lost = tail.link, 0
        told = {one for one, _ in self._due}
        if tail.torn and RECOVERED not in told:
            self._due.appendleft((RECOVERED, {"torn_bytes": tail.torn, "torn_sha256": tail.torn_digest}))

    def _put(self, event: str, fields: Mapping[str, Any]) -> None:
        line = encode(self._link, time.time_ns(), event, fields)
        assert len(line) < MAX_LINE
        if self._file is not None:
            self._file.write(line)
        else:
            self._print(line)
        self._link = self._link.after(line)
        self._anchor.keep(self._link, self._lost)
        if self._file is not None and self._settings.stdout:
            self._print_copy(line)

    def _print_copy(self, line: bytes) -> None:
        try:
            self._print(line)
        except OSError as error:
            self._copy_trouble.met(error)
        else:
            self._copy_trouble.over()

    def _print(self, line: bytes) -> None:
        """Write to stdout, unless nobody takes it: the service must not wait for its log's reader. OSError."""
        if not self._stdout.poll(0):
            raise BlockingIOError(errno.EAGAIN, "nobody reads it")
        data = line + b"\n"
        if os.write(_STDOUT, data) < len(data):
            raise OSError(errno.ENOSPC, "only a part was taken")

    def _unavailable(self, error: OSError) -> Unavailable:
        return Unavailable(
            "the audit log cannot be written, and nothing is done without it",
            hint=f"{self._settings.path or 'stdout'}: {error.strerror}",
        )


def last_entry(path: str | Path) -> Link | None:
    """Return the last entry of a file; None when there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        return _tail(fd, status.st_size).link if stat.S_ISREG(status.st_mode) else None
    except OSError:
        return None
    finally:
        os.close(fd)


def check(settings: AuditSettings) -> None:
    """See whether the file can be one, and make it if it is not there. Unavailable when it never can.

    What may pass, a full disk say, must not keep a service from following one that has died.
    """
    if settings.path is None:
        return
    try:
        settings.path.parent.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(settings.path, _FLAGS, 0o600)
    except OSError as error:
        if error.errno in _FOR_GOOD:
            raise Unavailable(f"the audit log {settings.path} cannot be written: {error.strerror}") from error
        return
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Unavailable(f"the audit log {settings.path} cannot be written: it is not a regular file")
    finally:
        os.close(fd)


def _tail(fd: int, size: int) -> Tail:
    """Look at the end of a file. OSError."""
    begin = max(0, size - _TAIL)
    data = os.pread(fd, size - begin, begin)
    whole, newline, rest = data.rpartition(b"\n")
    lines = whole.split(b"\n")
    if begin and newline:
        del lines[0]  # the end of one
    link = next((Link(entry.seq, digest_of(line)) for line in reversed(lines) if (entry := parse(line))), None)
    if begin and not newline:  # a hole in the file that a power cut left; its hash would tell nobody anything
        return Tail(link, len(rest))
    return Tail(link, len(rest), digest_of(rest) if rest else "")


def _close_all(fds: Sequence[int], *, flush: bool) -> None:
    """Close descriptors, once what was written through them is on the disk. Blocks. OSError."""
    try:
        for fd in fds if flush else ():
            os.fdatasync(fd)
    finally:
        for fd in fds:
            os.close(fd)
