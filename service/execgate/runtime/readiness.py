"""Waiting for a file descriptor, on any event loop.

`loop.add_reader` allows one callback a descriptor, so each descriptor has one waiter at most. A waiter that is
cancelled leaves the loop as it found it.
"""

import asyncio
import os


async def readable(fd: int) -> None:
    """Return once `fd` can be read without blocking: data, end of file or an error all count."""
    await ReadWaiter(fd).wait()


class ReadWaiter:
    """Waits until a descriptor is readable, or until somebody else has a reason to look again, or to close it."""

    __slots__ = ("_fd", "_ready")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._ready: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Return once the descriptor is readable, or `wake` or `release` was called."""
        loop = asyncio.get_running_loop()
        ready = self._ready = loop.create_future()
        loop.add_reader(self._fd, _settle, ready)
        try:
            await ready
        finally:
            self.release()

    def wake(self) -> None:
        """End a wait that is under way."""
        if self._ready is not None:
            _settle(self._ready)

    def release(self) -> None:
        """End a wait that is under way and forget the descriptor, at once: its number may soon be another's."""
        ready, self._ready = self._ready, None
        if ready is not None:
            asyncio.get_running_loop().remove_reader(self._fd)
            _settle(ready)


class WriteWaiter:
    """Waits until a descriptor can be written, or can never be again, or until its owner is about to close it."""

    __slots__ = ("_fd", "_ready")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._ready: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Return once the descriptor is writable or `release` was called."""
        loop = asyncio.get_running_loop()
        ready = self._ready = loop.create_future()
        loop.add_writer(self._fd, _settle, ready)
        try:
            await ready
        finally:
            self.release()

    def release(self) -> None:
        """End a wait that is under way and forget the descriptor, at once: its number may soon be another's."""
        ready, self._ready = self._ready, None
        if ready is not None:
            asyncio.get_running_loop().remove_writer(self._fd)
            _settle(ready)


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


class Descriptor:
    """A file descriptor with one owner: closed once, however many ways lead to its end."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __repr__(self) -> str:
        return f"<Descriptor {self._fd}>" if self else "<Descriptor closed>"

    def __bool__(self) -> bool:
        return self._fd >= 0

    def fileno(self) -> int:
        """Return the number; ValueError once it is closed, so that a reused number is never touched."""
        if self._fd < 0:
            raise ValueError("the descriptor is closed")
        return self._fd

    def close(self) -> None:
        """Close it; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def detach(self) -> int:
        """Give the number away; the receiver closes it."""
        fd, self._fd = self.fileno(), -1
        return fd
