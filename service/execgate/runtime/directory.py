"""The directory of one live session: what conmon, the runtime and the next service find in it, and how it is removed.

Nothing else makes, reads or names a file in there; captured output has a place of its own.
"""

import contextlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from execgate.model.config import ConsoleSize
from execgate.model.errors import Internal
from execgate.model.ids import SessionId
from execgate.model.process import ProcessIdentity
from execgate.model.session import ExitSource, ExitStatus
from execgate.oci.text import shown
from execgate.runtime import failures, pidfd
from execgate.runtime.readiness import Descriptor

log = logging.getLogger(__name__)

NO_CODE = -1
"""What conmon writes as the exit code when it has none: after its timeout, or when it cannot tell."""

_HELD = "held"
"""The file with what the next service needs to know: see `Held`."""

_LEFT = ("pid", _HELD, "oci-log")
"""What a process without a terminal leaves behind that was started, beside the directory of the exit file."""

_AS_IT_IS = json.JSONEncoder(ensure_ascii=False)  # made once: json.dumps makes one at each call that is not plain

_CONSOLE_SOCKET_NAME = "/conmon-term.XXXXXX"
"""conmon makes a socket of this name in it; with that the path must fit sun_path."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a session's directory keeps for the next service.

    `streams`: which of conmon's descriptors are the read ends of the output pipes, by stream. `record` is that of the
    session when it was started, in case the database is lost.
    """

    streams: Mapping[int, int]
    monitor: ProcessIdentity | None
    record: str


def session_directory(parent: Path, session_id: SessionId) -> Path:
    """Return where a session keeps its files: half of its id names it, for the sake of the limit of sun_path."""
    return parent / session_id[:32]


def longest_state_dir() -> int:
    """Return how many bytes the path of a state directory may have.

    conmon makes a console socket in the session's directory, and the path of a unix socket ends at 107 bytes.
    """
    return 107 - len("/sessions/") - 32 - len(_CONSOLE_SOCKET_NAME)


def write_files(directory: Path, held: Held, process_file: str, process: Mapping[str, Any]) -> None:
    """Write what the next service reads, then what the runtime reads once conmon is let go. OSError."""
    text = str(directory)
    os.mkdir(f"{text}/exit", 0o700)  # noqa: PTH102  (Path costs more than the system call)
    monitor = [held.monitor.pid, held.monitor.start_time] if held.monitor is not None else None
    fields = {"streams": held.streams, "monitor": monitor, "record": held.record}
    _write_new(f"{text}/{_HELD}", json.dumps(fields).encode())
    # surrogateescape: an environment may hold bytes that are no UTF-8, and they must arrive as they were
    _write_new(f"{text}/{process_file}", _AS_IT_IS.encode(process).encode(errors="surrogateescape"))


def new_process_file() -> str:
    """Return a name for a process.json that no other start has.

    The conmon of a service that died is let go by that death. It must find nothing, not what a later start of the same
    session has written.
    """
    return f"process-{time.monotonic_ns():x}.json"


def forget_process(directory: Path, process_file: str = "") -> None:
    """Remove process.json once the runtime has read it: it holds secrets."""
    names = [process_file] if process_file else [path.name for path in directory.glob("process-*.json")]
    for name in names:
        with contextlib.suppress(OSError):
            os.unlink(f"{directory}/{name}")  # noqa: PTH108  (Path costs more than the system call)


def _write_new(path: str, data: bytes) -> None:
    """Write a private file that is not there yet. OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    finally:
        os.close(fd)


def read_held(directory: Path) -> Held | None:
    """Return what a session's directory says of it; None when it says nothing that can be understood."""
    try:
        fields = json.loads((directory / _HELD).read_text(encoding="utf-8"))
        streams = {int(stream): int(number) for stream, number in fields["streams"].items()}
        monitor = ProcessIdentity(*map(int, fields["monitor"])) if fields["monitor"] else None
        return Held(streams, monitor, str(fields["record"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            # Not the error's repr: it may hold the whole file.
            reason = shown(f"{type(error).__name__}: {error}")
            log.warning("what %s says of its session cannot be understood: %s", directory.name, reason)
        return None


def read_pid_file(directory: Path) -> ProcessIdentity | None:
    """Return who has the pid that the runtime has written down; None without one that lives."""
    try:
        return pidfd.identify(int((directory / "pid").read_text(encoding="ascii")))
    except (OSError, ValueError):
        return None


def exit_file_code(directory: Path) -> int | None:
    """Read the exit file of a session's directory: conmon writes a bare decimal. None when there is none."""
    with contextlib.suppress(OSError, ValueError):
        for entry in (directory / "exit").iterdir():
            return int(entry.read_text(encoding="ascii")[:8])
    return None


def exit_file_status(directory: Path) -> ExitStatus | None:
    """Return what the exit file of a session's directory tells, if it does."""
    code = exit_file_code(directory)
    return None if code is None or code < 0 else ExitStatus(code, ExitSource.EXIT_FILE)


def resize_terminal(directory: Path, size: ConsoleSize) -> None:
    """Tell the conmon of a session's directory the size of its terminal: one line into its ctl FIFO."""
    try:
        fd = os.open(directory / "ctl", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.closing(Descriptor(fd)):
            os.write(fd, f"1 {size.height} {size.width}\n".encode())
    except OSError as error:
        raise Internal("the terminal cannot be resized", hint=f"conmon's ctl FIFO: {error}") from error


def connect_attach(directory: Path) -> socket.socket:
    """Connect to conmon's attach socket by way of the directory's descriptor: its path may be longer than sun_path."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.setblocking(False)
        with contextlib.closing(Descriptor(os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))) as parent:
            connection.connect(f"/proc/self/fd/{parent.fileno()}/attach")
    except BaseException:
        connection.close()
        raise
    return connection


def runtime_log(directory: Path) -> bytes:
    """Return the end of what the runtime has logged."""
    path = directory / "oci-log"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - failures.LOG_LIMIT))
            return file.read(failures.LOG_LIMIT)
    except OSError:
        return b""


def remove_directory(directory: Path) -> None:
    """Remove it: what is in most of them, and if that was not all, whatever it holds."""
    text = str(directory)
    try:
        for name in _LEFT:
            os.unlink(f"{text}/{name}")  # noqa: PTH108  (Path costs more than the system call)
        for name in os.listdir(f"{text}/exit"):  # noqa: PTH208
            os.unlink(f"{text}/exit/{name}")  # noqa: PTH108
        os.rmdir(f"{text}/exit")  # noqa: PTH106
        os.rmdir(text)  # noqa: PTH106
    except OSError:
        shutil.rmtree(directory, ignore_errors=True)
