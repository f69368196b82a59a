"""A worker's link to its keeper, when it has no descriptors left."""

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import Iterator

from execgate.keeper import protocol
from execgate.worker import KeeperLink


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


async def test_out_of_descriptors_while_the_keeper_takes_nothing() -> None:
    """What cannot be duplicated is not kept. The rest is, each under its own name, and nothing stays open here."""
    ours, theirs = protocol.pair()
    ours.setblocking(False)
    link = KeeperLink(ours)
    names = [f"name{number}" for number in range(6)]
    files = {name: os.memfd_create(name) for name in names}
    told = 0
    before = open_descriptors()
    while not link._waiting:
        link.tell("status", str(told))
        told += 1
    with _room_for(3):
        link.keep(files)
    kept: dict[str, int] = {}
    theirs.setblocking(False)
    flushed = asyncio.ensure_future(link.flushed())
    while not flushed.done():
        kept |= await _received(theirs)
    kept |= await _received(theirs)
    assert len(kept) == 3
    for name, fd in kept.items():
        assert os.path.sameopenfile(fd, files[name])
    protocol.close_all(kept.values())
    assert open_descriptors() == before
    protocol.close_all(files.values())
    ours.close()
    theirs.close()


@contextlib.contextmanager
def _room_for(count: int) -> Iterator[None]:
    """Let this process open no more than `count` descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, open_descriptors())) + count + 1, hard))
    fillers: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                fillers.append(os.open(os.devnull, os.O_RDONLY))
        protocol.close_all(fillers[-count:])
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        protocol.close_all(fillers[:-count])


async def _received(keeper: socket.socket) -> dict[str, int]:
    """Take what has been said so far; return the descriptors that came with it."""
    found: dict[str, int] = {}
    while True:
        try:
            message = protocol.receive(keeper)
        except BlockingIOError:
            await asyncio.sleep(0)
            return found
        assert message is not None
        found |= message.named()
