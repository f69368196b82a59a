"""What an earlier service has written for the next one: records, files of a session's directory, a handover."""

import asyncio
import functools
import math
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from execgate import handover
from execgate.http.hijack import OpenStreams
from execgate.keeper.protocol import ONCE, close_all
from execgate.model.ids import parse_session_id
from execgate.runtime.directory import exit_file_status, read_held, read_pid_file, runtime_log
from execgate.sessions.store import _dump, _load_or_none
from execgate.status import read_status
from execgate.worker import KeeperLink
from fuzz.target import Target, scratch


def session_files(data: bytes) -> None:
    """A kind on the first line (`record`, `held` …), behind it what that holds: it says something, or nothing."""
    kind, _, content = data.partition(b"\n")
    _KINDS.get(kind.decode(errors="replace"), _record)(content)


def _record(content: bytes) -> None:
    """Hold that a session of the file can be written again, and is the same then."""
    session = _load_or_none(content.decode(errors="surrogateescape"))
    if session is None:
        return
    assert parse_session_id(session.id) == session.id
    times = (session.created_at, session.started_at, session.finished_at, session.since, session.config.timeout)
    if not all(map(math.isfinite, filter(None, times))):  # 1e999; JSON has no way to write that again
        return
    again = _load_or_none(_dump(session))
    assert again is not None
    assert again == session


@functools.cache
def _directory() -> Path:
    """Return a session's directory."""
    path = scratch() / "session"
    (path / "exit").mkdir(parents=True)
    return path


def _file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], None]:
    def check(content: bytes) -> None:
        path = _directory() / name
        path.write_bytes(content)
        try:
            read(_directory())
        finally:
            path.unlink()

    return check


def _read_exit(directory: Path) -> None:
    status = exit_file_status(directory)
    assert status is None or 0 <= status.code < 10**8


_KINDS: Mapping[str, Callable[[bytes], None]] = {
    "record": _record,
    "held": _file("held", read_held),
    "pid": _file("pid", read_pid_file),
    "exit": _file("exit/c", _read_exit),
    "status": _file("service.json", read_status),
    "log": _file("oci-log", runtime_log),
}


# -- a handover


class _Link:
    """What a keeper has kept: a document, and descriptors."""

    def __init__(self, document: bytes) -> None:
        memory = os.memfd_create("handover", os.MFD_CLOEXEC)
        os.write(memory, document)
        self.peers: list[socket.socket] = []
        self.kept = {f"{ONCE}document": memory}
        for number in range(3):
            ours, theirs = socket.socketpair()
            self.kept[f"{ONCE}{number}"] = ours.detach()
            self.peers.append(theirs)

    def take(self, name: str) -> int | None:
        return self.kept.pop(name, None)

    def take_all(self, prefix: str) -> dict[str, int]:
        found, self.kept = self.kept, {}
        return found


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def handover_document(data: bytes) -> None:
    """What a service has told the next: it is understood or not, and no descriptor is lost on the way."""
    _loop().run_until_complete(_take(data))


async def _take(data: bytes) -> None:
    before = _open_files()
    link, streams = _Link(data), OpenStreams()
    found = handover.take(cast("KeeperLink", link), streams)
    assert found is not None
    for stream in streams:
        stream.abandon()
    await asyncio.sleep(0)
    close_all(connection.fd for connection in found.connections)
    for peer in link.peers:
        peer.close()
    assert _open_files() == before


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


TARGETS = (
    Target(
        check=session_files,
        is_json=True,
        has_first_line=True,
        tokens=(
            *(
                b"record\n",
                b"held\n",
                b"pid\n",
                b"exit\n",
                b"status\n",
                b"log\n",
                b"-1",
                b"137",
                b"1e999",
                b'"streams"',
            ),
            *(b'"monitor"', b'"record"', b'"id"', b'"container"', b'"config"', b'"user"', b'"state"', b'"created_at"'),
            *(
                b'"running"',
                b'"created"',
                b'"stopped"',
                b'"exit"',
                b'"code"',
                b'"source"',
                b'"sync-pipe"',
                b'"process"',
            ),
            *(b'"pid"', b'"start_time"', b'"args"', b'"env"', b'"labels"', b'"uid"', b'"gid"', b'"additional_gids"'),
            *(
                b'"transferred"',
                b'"stdin"',
                b'"keeper"',
                b'"worker"',
                b'"version"',
                b'"failure"',
                b'"failures"',
                b"\xff",
            ),
            *(b'"container_id"', b'"name"', b'"init"', b'"boot_id"', b'"since"', b'"detach_keys"', b'"on_disconnect"'),
        ),
    ),
    Target(
        check=handover_document,
        is_json=True,
        tokens=(
            *(b'"version"', b'"sessions"', b'"connections"', b'"events"', b'"next_event"', b'"farewells"', b'"fd"'),
            *(
                b'"once.0"',
                b'"once.1"',
                b'"once.2"',
                b'"state"',
                b'"dialect"',
                b'"docker"',
                b'"libpod"',
                b'"multiplexed"',
            ),
            *(
                b'"unsent"',
                b'"head"',
                b'"unread"',
                b'"eof"',
                b'"finished"',
                b'"base64"',
                b'"aGk="',
                b'"read"',
                b'"progress"',
            ),
            *(
                b'"session_id"',
                b'"collected"',
                b'"position"',
                b'"stdin"',
                b'"stdout"',
                b'"stderr"',
                b'"left"',
                b'"truncated"',
            ),
            *(
                b'"attachments"',
                b'"stream"',
                b'"first"',
                b'"rest"',
                b'"withheld"',
                b'"offset"',
                b'"wanted"',
                b'"transferred"',
            ),
            *(b'"timed_out"', b'"stdin_ended"', b'"output"', b'"end"', b'"chunks"', b'"data"', b'{"base64":"aGk="}'),
        ),
    ),
)
