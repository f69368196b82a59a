"""What one service leaves and the next finds, with a keeper that has no room for all of it."""

import asyncio
import json
import os
import socket
from collections.abc import Iterable, Mapping
from typing import cast

import pytest

from execgate import handover
from execgate.http.hijack import OpenStreams, StreamState
from execgate.http.takeover import restore
from execgate.keeper.protocol import ONCE
from execgate.model.ids import SessionId, new_session_id
from execgate.sessions.backlog import Remembered
from execgate.sessions.events import EventBus
from execgate.sessions.live import Attachment, Handed
from execgate.sessions.manager import HandedSession
from execgate.worker import KeeperLink

SOON = 5.0


class FakeLink:
    """Keeps everything but the descriptors whose numbers are in `lost`, in the order in which they were given."""

    def __init__(self, lost: Iterable[int]) -> None:
        self._lost = {f"{ONCE}{number}" for number in lost}
        self._kept: dict[str, int] = {}

    def keep(self, descriptors: Mapping[str, int]) -> None:
        self._kept |= {name: os.dup(fd) for name, fd in descriptors.items() if name not in self._lost}

    def damage(self, document: bytes | None) -> None:
        """Replace the document; None: by itself without its last field, when everything else was understood."""
        fd = self._kept[f"{ONCE}document"]
        if document is None:
            fields = json.loads(os.pread(fd, 1 << 20, 0))
            del fields["next_event"]
            document = json.dumps(fields).encode()
        os.ftruncate(fd, 0)
        os.pwrite(fd, document, 0)

    def take(self, name: str) -> int | None:
        return self._kept.pop(name, None)

    def take_all(self, prefix: str) -> dict[str, int]:
        found = {name: fd for name, fd in self._kept.items() if name.startswith(prefix)}
        for name in found:
            del self._kept[name]
        return found


async def test_a_connection_that_was_not_kept_costs_no_other_one() -> None:
    """Of three streams and three requests one each is lost on the way."""
    streams, peers = OpenStreams(), []
    sessions: dict[SessionId, HandedSession] = {}
    for _ in range(3):
        ours, theirs = socket.socketpair()
        peers.append(theirs)
        state = StreamState(dialect="docker", multiplexed=False, unsent=b"", head=None, unread=b"", eof=False)
        client = restore(ours.detach(), state, streams)
        live = Handed(attachments=[Attachment(client=client, first=True, stdin=True)])
        sessions[new_session_id()] = HandedSession(live, Remembered())
    pairs = [socket.socketpair() for _ in range(3)]
    connections = [handover.Connection(ours.detach(), b"GET", None) for ours, _ in pairs]
    link = cast("KeeperLink", FakeLink(lost=[0, 4]))
    handover.give(link, streams, sessions, connections, EventBus())
    for stream in streams:
        stream.abandon()

    after = OpenStreams()
    found = handover.take(link, after)
    assert found is not None
    assert [len(one.live.attachments) for one in found.sessions.values()].count(1) == 2
    assert len(found.connections) == 2
    for stream in after:
        await asyncio.wait_for(stream.send(1, b"goes on"), SOON)
        stream.abandon()
        await stream.wait_closed()
    assert sorted(peer.recv(100) for peer in peers) == [b"", b"goes on", b"goes on"]
    for connection in found.connections:
        os.close(connection.fd)
    for one in [*peers, *(theirs for _, theirs in pairs)]:
        one.close()


@pytest.mark.parametrize("damage", [b'{"version": 2', b"[" * 100_000, b"\xff", b'{"version": "SECRET"}', None])
async def test_a_document_that_cannot_be_understood(damage: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    """It costs all clients their connections, at once, and tells the log nothing of what they have sent."""
    streams = OpenStreams()
    (ours, theirs), (other, caller) = socket.socketpair(), socket.socketpair()
    state = StreamState(dialect="docker", multiplexed=False, unsent=b"SECRET", head=None, unread=b"", eof=False)
    client = restore(ours.detach(), state, streams)
    live = Handed(attachments=[Attachment(client=client, first=True, stdin=True)])
    sessions = {new_session_id(): HandedSession(live, Remembered())}
    link = FakeLink(lost=[])
    connection = handover.Connection(other.detach(), b"SECRET", None)
    handover.give(cast("KeeperLink", link), streams, sessions, [connection], EventBus())
    for stream in streams:
        stream.abandon()
    link.damage(damage)

    after = OpenStreams()
    found = handover.take(cast("KeeperLink", link), after)
    assert found == handover.Handover()
    assert not after
    for peer in (theirs, caller):
        peer.settimeout(SOON)
        assert peer.recv(100) == b""
        peer.close()
    assert "cannot be understood" in caplog.text
    assert "U0VDUkVU" not in caplog.text, "base64 of what is secret"
