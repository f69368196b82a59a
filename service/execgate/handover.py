"""What one service tells the next in a graceful reload: clients stay connected, and no byte is lost or sent twice.

Descriptors go through the keeper, each under a name of its own. What belongs to them is one document, JSON in a memfd
that goes the same way: the position of each hijacked connection in its streams, input that is on its way to a process,
output that watchers have not read, connections with the requests that are owed an answer and how far each of these has
come, the last events.

A document that cannot be understood, because the next service is of another version, costs the clients their
connections and nothing else: the sessions are taken back from their records as after a crash.
"""

import base64
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from execgate.http.hijack import HijackedStream, OpenStreams, StreamState
from execgate.http.progress import Progress
from execgate.http.takeover import restore
from execgate.keeper.protocol import ONCE, close_all
from execgate.model.events import Event
from execgate.model.ids import SessionId, parse_session_id
from execgate.model.session import ByteCounts
from execgate.oci.text import shown
from execgate.sessions.backlog import Chunk, Remembered
from execgate.sessions.events import EventBus
from execgate.sessions.live import Attachment, Handed
from execgate.sessions.manager import HandedSession
from execgate.sessions.oneshot import Collected, Collector
from execgate.worker import KeeperLink

log = logging.getLogger(__name__)

_VERSION = 2
_DOCUMENT = f"{ONCE}document"


@dataclass(slots=True)
class Connection:
    """An HTTP connection between two requests, or within one that can be asked again.

    `read` is what of it was read already, `progress` what was done of the first request in it.
    """

    fd: int
    read: bytes
    progress: Progress | None


@dataclass(slots=True)
class Handover:
    """Everything, as the next service has it in its hands."""

    sessions: dict[SessionId, HandedSession] = field(default_factory=dict)
    connections: list[Connection] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    next_event: int = 0


def give(
    link: KeeperLink,
    streams: OpenStreams,
    sessions: Mapping[SessionId, HandedSession],
    connections: Iterable[Connection],
    events: EventBus,
) -> None:
    """Leave everything with the keeper. From here on this service touches none of it."""
    fds: dict[str, int] = {}

    def stored(fd: int) -> str:
        name = f"{ONCE}{len(fds)}"
        fds[name] = fd
        return name

    told = {id(stream): found for stream in streams if (found := stream.hand_over()) is not None}
    shown = {key: {"fd": stored(fd), "state": asdict(state)} for key, (fd, state) in told.items()}
    document: dict[str, Any] = {
        "version": _VERSION,
        "sessions": {session_id: _session(handed, shown) for session_id, handed in sessions.items()},
        "connections": [
            {"fd": stored(one.fd), "read": one.read, "progress": _progress(one.progress)} for one in connections
        ],
        "events": [asdict(event) for event in events.past(0)],
        "next_event": events.next,
    }
    document["farewells"] = list(shown.values())  # the sessions have taken theirs out
    memory = os.memfd_create("handover", os.MFD_CLOEXEC)
    with os.fdopen(memory, "wb") as file:
        file.write(json.dumps(document, default=_encoded).encode())
        file.flush()
        link.keep({_DOCUMENT: file.fileno(), **fds})
    close_all(fds.values())


def take(link: KeeperLink, streams: OpenStreams) -> Handover | None:
    """Take everything that an earlier service has left; None when it had no time to."""
    fd = link.take(_DOCUMENT)
    if fd is None:
        return None
    fds = link.take_all(ONCE)
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        text = file.read()
    try:
        found = _understood(json.loads(text, object_hook=_decoded), fds, streams)
    except Exception as error:  # there is no end to what can be wrong with it
        # Not the error's repr: it may hold the whole document, and that what clients have sent.
        reason = shown(f"{type(error).__name__}: {error}")
        log.error("what the service before this one has left cannot be understood: %s", reason)
        for stream in streams:
            stream.abandon()
        found = Handover()
    close_all(fds.values())
    return found


def _understood(document: dict[str, Any], fds: dict[str, int], streams: OpenStreams) -> Handover:
    """Return what a document says, and take the descriptors that it speaks of out of `fds`.

    Raises whatever it is that something is wrong with, and has taken no connection then.
    """
    if document["version"] != _VERSION:
        raise ValueError(f"version {document['version']}")
    found = Handover()
    connections = [
        (one["fd"], one["read"], _progress_of(one["progress"])) for one in document["connections"] if one["fd"] in fds
    ]
    collectors = {progress.session_id: progress.collector for _, _, progress in connections if progress is not None}
    for session_id, fields in document["sessions"].items():
        if (known := parse_session_id(session_id)) is not None:
            found.sessions[known] = _restored(fields, fds, streams, collectors.get(known))
    for fields in document["farewells"]:
        if fields["state"]["finished"]:  # else nobody would ever end it
            _stream(fields, fds, streams)
    found.events = [Event(**fields) for fields in document["events"]]
    found.next_event = document["next_event"]
    for name, read, progress in connections:
        if (fd := fds.pop(name, None)) is not None:
            found.connections.append(Connection(fd, read, progress))
    return found


def _session(handed: HandedSession, shown: dict[int, dict[str, Any]]) -> dict[str, Any]:
    live = handed.live
    return {
        "attachments": [
            {
                "stream": stream,
                "first": one.first,
                "stdin": one.stdin,
                "rest": bytes(one.rest),
                "withheld": one.withheld,
                "offset": one.offset,
                "wanted": sorted(one.wanted),
            }
            for one in live.attachments
            if (stream := shown.pop(id(one.client), None)) is not None or isinstance(one.client, Collector)
        ],
        "transferred": asdict(live.transferred),
        "timed_out": live.timed_out,
        "stdin_ended": live.stdin_ended,
        "output": {"end": handed.output.end, "chunks": [asdict(chunk) for chunk in handed.output.chunks]},
    }


def _restored(
    fields: dict[str, Any], fds: dict[str, int], streams: OpenStreams, collector: Collector | None
) -> HandedSession:
    """Return a session with its clients; `collector` is one if it is a one-shot's whose answer is owed."""
    attachments = [
        Attachment(
            client=client,
            first=one["first"],
            stdin=one["stdin"],
            rest=one["rest"],
            withheld=one["withheld"],
            offset=one["offset"],
            wanted=frozenset(one["wanted"]),
        )
        for one in fields["attachments"]
        if (client := collector if one["stream"] is None else _stream(one["stream"], fds, streams)) is not None
    ]
    if collector is not None and not attachments:  # its start was on record, and no more
        attachments.append(Attachment(client=collector, first=True, stdin=True))
    live = Handed(
        attachments=attachments,
        transferred=ByteCounts(**fields["transferred"]),
        timed_out=fields["timed_out"],
        stdin_ended=fields["stdin_ended"],
    )
    chunks = tuple(Chunk(**chunk) for chunk in fields["output"]["chunks"])
    return HandedSession(live, Remembered(fields["output"]["end"], chunks))


def _progress(progress: Progress | None) -> dict[str, Any] | None:
    if progress is None:
        return None
    collected = progress.collector.collected() if progress.collector is not None else None
    return {
        "session_id": progress.session_id,
        "collected": None if collected is None else asdict(collected),
        "position": progress.position,
        "unsent": progress.unsent,
    }


def _progress_of(fields: dict[str, Any] | None) -> Progress | None:
    if fields is None:
        return None
    collected = fields["collected"]
    return Progress(
        session_id=fields["session_id"],
        collector=None if collected is None else Collector.restore(Collected(**collected)),
        position=fields["position"],
        unsent=fields["unsent"],
    )


def _stream(fields: dict[str, Any], fds: dict[str, int], streams: OpenStreams) -> HijackedStream | None:
    """Return a stream; None, and the client is gone, when somebody on the way had no room for it."""
    state = StreamState(**fields["state"])
    if (fd := fds.pop(fields["fd"], None)) is None:
        return None
    try:
        return restore(fd, state, streams)
    except OSError as error:
        log.warning("a client's connection is lost: %s", error)
        return None


def _encoded(value: object) -> object:
    if isinstance(value, bytes | bytearray | memoryview):
        return {"base64": base64.b64encode(value).decode("ascii")}
    raise TypeError(f"{type(value)} cannot be handed over")


def _decoded(fields: dict[str, Any]) -> object:
    return base64.b64decode(fields["base64"]) if fields.keys() == {"base64"} else fields
