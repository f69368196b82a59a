"""Recordings in files: `TIME-CONTAINER-SESSION.cast.gz` for a terminal, `….jsonl.gz` for all else (`gate.cast`).

The theory. A recording is written in pieces, each a gzip member of its own (`gate.members`), at most a second after the
first byte of it came, by a thread: the disk may be slow, and compressing takes time. While one is written the next one
is collected, up to a bound; then `room` keeps its session waiting. What a kill of the service costs is what was
collected and not written, and if it comes in the midst of a write, that piece: it is cut off by the next service, which
notes in the recording that output may be missing there. A service that leaves in order writes all, and says so in its
last member. The name of a file follows from the session's record, so the next service finds it.

Who writes a file has it locked (flock): that tells recordings that are under way from those that are over. All of
them together have a bound, too; when it is reached, the oldest that are over are removed.

What fails, fails for good: the recording is *lost*, with a note at its end if there is room for one, and its session is
told. A write that takes longer than half a minute has failed.
"""

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import re
import stat
import threading
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from execgate.gate.cast import USUAL_SIZE, About, Encoder, Event, What, encoder, read_about
from execgate.gate.members import HEAD_MAX, Head, Kind, pack, parse_head
from execgate.model.access import Record
from execgate.model.config import ConsoleSize
from execgate.model.errors import Unavailable
from execgate.model.session import ExecSession, ExitStatus
from execgate.sessions.recording import Recording, Unrecorded
from execgate.wire import stdcopy

log = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds that a byte waits at most before it is written, while the disk keeps up."""

PIECE = 256 * 1024
"""What is written without waiting that long."""

BOUND = 1024 * 1024
"""Bytes that are held of a session; it waits when there are more. One read may come on top of it."""

_EVENT_COST = 128
"""Bytes that an event takes beside its data, or nearly so: a million single bytes must not be a million events."""

_PATIENCE = 30.0
"""Seconds that the disk has for one piece."""

_BEGIN_PATIENCE = 5.0
"""The same for a new file, which somebody waits for."""

_LEAVE_PATIENCE = 5.0
"""The same for all that is left to be written when the service goes, on which the next one waits."""

_LOCK_PATIENCE = 2.0
_LOCK_POLL = 0.02
_THREADS = 2
_NOTE_ROOM = 1024
"""Bytes at the end of a recording that only its last words may use."""

_OURS = re.compile(r"\d{8}T\d{6}Z-.+-[0-9a-f]{12}\.(?:cast|jsonl)\.gz", re.ASCII | re.DOTALL)
_NAME_MAX = 160
_TOLD_NAMES = ("TERM", "SHELL")

RESTARTED = "the service was restarted; output may be missing here"
_EARLIER_PART_GONE = "the service was restarted; what was recorded before is missing"


class Full(Exception):
    """A bound is reached."""


class FileRecordings:
    """The recordings of a directory, which is made, 0700, when it is needed (`sessions.recording.Recordings`).

    `session_bytes` and `total_bytes` bound one file and all of them, in bytes on the disk.
    """

    def __init__(self, directory: Path, *, session_bytes: int, total_bytes: int) -> None:
        self._shelf = Shelf(directory, total_bytes)
        self._session_bytes = session_bytes
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="record")
        self._open: set[FileRecording] = set()

    async def begin(self, session: ExecSession, size: ConsoleSize | None) -> Recording:
        """See `Recordings`."""
        recording = self._recording(session, about_of(session, size))
        try:
            await recording.begin()
        except (OSError, Full) as error:
            if session.record_or_end:
                raise Unavailable(
                    "the session cannot be recorded, and must not run without", hint=_told(error)
                ) from error
            log.error("exec %s is not recorded: %s", session.id[:12], _told(error))
            return Unrecorded()
        return recording

    def resume(self, session: ExecSession, *, in_order: bool) -> Recording:
        """See `Recordings`."""
        recording = self._recording(session, about_of(session, None))
        recording.resume(in_order=in_order)
        return recording

    async def close(self) -> None:
        """See `Recordings`. What a stuck disk has not taken soon is missing, and the next service says so."""
        recordings = list(self._open)
        for recording in recordings:
            recording.leave()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_PATIENCE):
                await asyncio.gather(*[recording.closed() for recording in recordings])

    def _recording(self, session: ExecSession, about: About) -> "FileRecording":
        file = RecordingFile(self._shelf, file_name(session), about, self._session_bytes)
        recording = FileRecording(
            file, takes_input=session.record is Record.ALL, call=self._call, over=self._open.discard
        )
        self._open.add(recording)
        return recording

    async def _call(self, work: Callable[[], None], patience: float) -> None:
        """Do in a thread what may block. OSError, TimeoutError among them; Full."""
        done = asyncio.get_running_loop().run_in_executor(self._threads, work)
        done.add_done_callback(_retrieved)
        await asyncio.wait_for(asyncio.shield(done), patience)


class FileRecording:
    """One recording as its session has it (`sessions.recording.Recording`): what is collected, and when it is written.

    `call` does the file's work, one piece at a time; `over` is told when there is no more of it.
    """

    def __init__(
        self,
        file: "RecordingFile",
        *,
        takes_input: bool,
        call: Callable[[Callable[[], None], float], Awaitable[None]],
        over: Callable[["FileRecording"], None],
    ) -> None:
        self._file = file
        self._takes_input = takes_input
        self._call = call
        self._over = over
        self._events: list[Event] = []
        self._held = 0  # bytes that are not written yet, those that are being written included
        self._before: Callable[[], None] | None = None  # what is to be done before anything is written
        self._last: Kind | None = None  # how it shall end, once that is known
        self._lost = ""
        self._tell_lost: Callable[[str], None] = lambda _: None
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Task[None] | None = None
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._closed = asyncio.get_running_loop().create_future()

    def __repr__(self) -> str:
        return f"<FileRecording {self._file.name} held={self._held} last={self._last} lost={self._lost!r}>"

    async def begin(self) -> None:
        """Make the file, with its head. OSError, Full; then, and when it is cancelled, nothing is left of it."""
        try:
            await self._call(self._file.begin, _BEGIN_PATIENCE)
        except BaseException:
            self.discard()
            raise

    def resume(self, *, in_order: bool) -> None:
        """Go on with the file; before anything else is written."""
        self._before = partial(self._file.resume, in_order=in_order)
        self._begin_write()

    # -- sessions.recording.Recording --------------------------------------------------------------------------------

    @property
    def output(self) -> bool:
        """See `Recording`."""
        return self._last is None

    @property
    def input(self) -> bool:
        """See `Recording`."""
        return self._takes_input and self._last in (None, Kind.LEFT)  # whoever still writes waits in `room`

    def wrote(self, stream: int, data: bytes) -> None:
        """See `Recording`."""
        self._take(What.STDERR if stream == stdcopy.STDERR else What.STDOUT, data)

    def given(self, data: bytes) -> None:
        """See `Recording`."""
        if data:
            self._take(What.STDIN, data)

    def resized(self, size: ConsoleSize) -> None:
        """See `Recording`."""
        self._take(What.SIZE, f"{size.width}x{size.height}".encode())

    async def room(self) -> None:
        """See `Recording`."""
        while not self._has_room.is_set():
            await self._has_room.wait()

    def when_lost(self, tell: Callable[[str], None]) -> None:
        """See `Recording`."""
        if self._lost:
            tell(self._lost)
        else:
            self._tell_lost = tell

    def finish(self, status: ExitStatus, remark: str = "") -> None:
        """See `Recording`."""
        words = f"exit code {status.code} ({status.source})" + (f": {remark}" if remark else "")
        self._take(What.NOTE, words.encode(), exit={"code": status.code, "source": status.source})
        self._close(Kind.END)

    def leave(self) -> None:
        """See `Recording`."""
        if self._last is None:
            self._has_room.clear()
        self._close(Kind.LEFT)

    def discard(self) -> None:
        """See `Recording`."""
        self._file.part(remove=True)
        self._end()

    async def closed(self) -> None:
        """See `Recording`."""
        await asyncio.shield(self._closed)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _take(self, what: What, data: bytes, **more: Any) -> None:
        if self._last is not None:
            return
        self._events.append(Event(time.monotonic(), what, data, more))
        self._held += _EVENT_COST + len(data)
        if self._held >= BOUND:
            self._has_room.clear()
        self._schedule()

    def _close(self, last: Kind) -> None:
        if self._last is None:
            self._last = last
            self._schedule()

    def _schedule(self) -> None:
        """See to it that what is held gets written: at once if it is much or all there will be, else soon."""
        if self._writing is not None or self._closed.done():
            return
        if self._last is not None or self._held >= PIECE:
            self._begin_write()
        elif self._events and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(INTERVAL, self._begin_write)

    def _begin_write(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._writing = asyncio.create_task(self._write(), name=f"record {self._file.name}")

    async def _write(self) -> None:
        """Write what is held now, and see to the rest."""
        before, self._before = self._before, None
        events, held = self._piece()
        last = None if self._events else self._last
        try:
            if before is not None:
                await self._call(before, _PATIENCE)
            await self._call(partial(self._file.append, events, last or Kind.PIECE), _PATIENCE)
        except (OSError, Full) as error:
            self._lose(_told(error))
            return
        finally:
            self._writing = None
        self._held -= held
        if last is not None:
            self._end()
            return
        if self._last is not Kind.LEFT and self._held < BOUND:
            self._has_room.set()
        self._schedule()

    def _piece(self) -> tuple[list[Event], int]:
        """Take the next events, about PIECE bytes of them if there are more; return them and what they hold."""
        size = count = 0
        while count < len(self._events) and size < PIECE:
            size += _EVENT_COST + len(self._events[count].data)
            count += 1
        events, self._events = self._events[:count], self._events[count:]
        return events, size

    def _lose(self, reason: str) -> None:
        log.error("the recording %s ends: %s", self._file.name, reason)
        self._file.part(remove=False)  # a thread may still be stuck in it
        self._lost = f"its recording ends: {reason}"
        self._last = Kind.END
        self._events.clear()
        self._held = 0
        self._has_room.set()
        self._end()
        self._tell_lost(self._lost)

    def _end(self) -> None:
        self._last = self._last or Kind.END
        if self._timer is not None:
            self._timer.cancel()
        if not self._closed.done():
            self._closed.set_result(None)
        self._over(self)


class RecordingFile:
    """One file, from its first member to its last. Its calls may block; each is one thread's at a time, but `part`.

    When one of them has failed, the file is closed, and there is nothing to be done with it any more.
    """

    def __init__(self, shelf: "Shelf", name: str, about: About, limit: int) -> None:
        self.name = name
        self._shelf = shelf
        self._path = shelf.directory / name
        self._about = about
        self._limit = limit
        self._encoder: Encoder = encoder(tty=about.tty, since=about.since)
        self._file = -1
        self._size = 0
        self._made = False
        self._parted = self._removed = False  # what `part` has asked for
        self._turn = threading.Lock()

    def begin(self) -> None:
        """Make it, with its head. One of that name is the rest of a start that was never on record. OSError, Full."""
        with self._working():
            self._open()
            self._begin_anew()

    def resume(self, *, in_order: bool) -> None:
        """Go on behind what an earlier service has written, and cut off what of that is not whole. OSError, Full."""
        with self._working():
            self._open()
            about, last = self._look()
            if about is None or last is None:
                self._begin_anew()
                self._note(_EARLIER_PART_GONE)
                return
            if last.kind is Kind.LOST:
                raise Full("it had ended before the service was restarted")
            if last.kind is Kind.END:  # and only the session's record did not say so
                self._close()
                return
            self._about = about
            self._encoder = encoder(tty=about.tty, since=about.since, rest=last.rest)
            if not (in_order and last.kind is Kind.LEFT):
                self._note(RESTARTED)

    def append(self, events: Iterable[Event], kind: Kind) -> None:
        """Write a piece, and close the file if it is the last one. OSError, Full."""
        with self._working():
            if self._file >= 0:
                self._append(events, kind)
                if kind is not Kind.PIECE:
                    self._close()

    def part(self, *, remove: bool) -> None:
        """Close it, and remove it if that is asked for; as soon as no thread works on it any more."""
        self._parted, self._removed = True, remove
        if self._turn.acquire(blocking=False):
            try:
                self._part()
            finally:
                self._turn.release()

    # -- inside ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        with self._turn:
            try:
                yield
            except BaseException:
                self._close()
                raise
            finally:
                if self._parted:
                    self._part()

    def _part(self) -> None:
        self._close()
        if self._removed and self._made and _remove_unless_locked(self._path):
            self._shelf.release(self._size)

    def _open(self) -> None:
        """Open the file, which may be there, and lock it."""
        self._shelf.prepare()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        deadline = time.monotonic() + _LOCK_PATIENCE
        while True:
            self._file = os.open(self._path, flags, 0o600)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._made = os.fstat(self._file).st_nlink > 0  # else whoever had it locked was removing it
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise OSError(errno.EBUSY, "another service writes it") from None
            if self._made:
                return
            self._close()
            time.sleep(_LOCK_POLL)

    def _begin_anew(self) -> None:
        os.ftruncate(self._file, 0)
        self._size = 0
        self._encoder = encoder(tty=self._about.tty, since=self._about.since)
        self._put(pack(self._encoder.head(self._about)), spare=_NOTE_ROOM)

    def _look(self) -> tuple[About | None, Head | None]:
        """Return what the head says and what the last whole member is, and cut off what is behind that."""
        position, last = 0, None
        end = os.fstat(self._file).st_size
        while (head := parse_head(os.pread(self._file, HEAD_MAX, position))) and position + head.length <= end:
            position, last = position + head.length, head
        os.ftruncate(self._file, position)
        self._size = position
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            about = read_about(file)
        same = about is not None and about.session_id == self._about.session_id and about.tty == self._about.tty
        return about if same else None, last

    def _append(self, events: Iterable[Event], kind: Kind) -> None:
        data = self._encoder.encode(events)
        rest = self._encoder.rest() if kind is Kind.LEFT else (b"", b"")
        try:
            self._put(pack(data, kind, rest), spare=0 if kind is Kind.END else _NOTE_ROOM)
        except (OSError, Full) as error:
            with contextlib.suppress(OSError, Full):
                self._note(f"the recording ends here: {_told(error)}", Kind.LOST)
            raise

    def _note(self, words: str, kind: Kind = Kind.PIECE) -> None:
        note = Event(time.monotonic(), What.NOTE, words.encode())
        self._put(pack(self._encoder.encode([note]), kind), spare=0)

    def _put(self, member: bytes, *, spare: int) -> None:
        """Write at the end, all or nothing, and leave `spare` bytes of what there is room for. OSError, Full."""
        if self._size + len(member) + spare > self._limit:
            raise Full(f"recording_bytes ({self._limit}) is reached")
        self._shelf.reserve(len(member))
        written = 0
        try:
            while written < len(member):
                written += os.pwrite(self._file, memoryview(member)[written:], self._size + written)
        except OSError:
            self._shelf.release(len(member))
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise
        self._size += written

    def _close(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


class Shelf:
    """A directory of recordings, and the bound of all together. For several threads."""

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory = directory
        self._limit = limit
        self._used: int | None = None  # as far as we know: what others do there is seen when it becomes full
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Have the directory there. OSError; PermissionError when others can write to it."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.directory.stat()
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or found.st_uid not in (0, os.geteuid()):
            raise PermissionError(errno.EPERM, f"others can write to {self.directory}")

    def reserve(self, size: int) -> None:
        """Count `size` bytes that are about to be written, and remove old recordings if need be. OSError, Full."""
        with self._lock:
            if self._used is None:
                self._used = sum(found.st_size for _, found in self._files())
            self._used += size
            if self._used > self._limit:
                self._used = self._make_room(size)

    def release(self, size: int) -> None:
        """Count `size` bytes that are gone."""
        with self._lock:
            if self._used is not None:
                self._used = max(0, self._used - size)

    def _make_room(self, size: int) -> int:
        """Remove the oldest that are over until there is room for `size` bytes, and some to spare; return what is used.

        Full when there is none.
        """
        files = sorted(self._files(), key=lambda file: file[1].st_mtime_ns)
        used = sum(found.st_size for _, found in files) + size
        for path, found in files:
            if used <= self._limit - self._limit // 20:
                break
            if _remove_unless_locked(path):
                log.info("the recording %s is removed: there are more than recordings_total_bytes", path.name)
                used -= found.st_size
        if used > self._limit:
            raise Full(f"recordings_total_bytes ({self._limit}) is reached by recordings that are under way")
        return used

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if _OURS.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        yield Path(entry.path), entry.stat(follow_symlinks=False)


def file_name(session: ExecSession) -> str:
    """Return what the recording of a session is called, always the same: its time is that of its creation, in UTC."""
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(session.created_at))
    name = urllib.parse.quote(session.container.name, safe="")[:_NAME_MAX]
    form = "cast" if session.config.tty else "jsonl"
    return f"{moment}-{name or '%'}-{session.id[:12]}.{form}.gz"


def about_of(session: ExecSession, size: ConsoleSize | None) -> About:
    """Return what the head of a recording that is begun now says."""
    variables = dict(text.split("=", 1) for text in session.config.env if "=" in text)
    usual = {"TERM": "xterm"} if session.config.tty else {}  # what a runtime gives a terminal
    return About(
        session_id=session.id,
        container_id=session.container.container_id,
        container_name=session.container.name,
        owner=session.owner,
        rule=session.rule,
        args=session.config.args,
        tty=session.config.tty,
        begun_at=time.time(),
        since=time.monotonic(),
        size=size if size is not None and size.height and size.width else USUAL_SIZE,
        environment=usual | {name: variables[name] for name in _TOLD_NAMES if name in variables},
    )


def _remove_unless_locked(path: Path) -> bool:
    """Remove a recording that nobody writes; return whether it is gone."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        return error.errno == errno.ENOENT
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except OSError:
        return False
    finally:
        os.close(file)
    return True


def _told(error: Exception) -> str:
    if isinstance(error, TimeoutError) and error.errno is None:
        return "the disk does not take it in time"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _retrieved(done: "asyncio.Future[None]") -> None:
    """Have the outcome of work that nobody waits for any more looked at."""
    if not done.cancelled():
        done.exception()
