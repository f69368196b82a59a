"""Noticing that a client is gone while nobody reads from it or writes to it.

The kernel tells EPOLLHUP and EPOLLERR of whatever is registered in an epoll, asked for or not (epoll_ctl(2)). So the
sockets are registered for nothing else, all in one epoll, and the event loop watches that one.

On a unix socket EPOLLHUP means that the peer has closed, or that both sides have ended what they send. Over TCP a
half-close and a close look alike until something is sent; a reset shows at once.
"""

import asyncio
import select
import socket
from collections.abc import Callable


class HangUps:
    """The descriptors of one event loop that are watched for a hang-up. It holds one of its own while there are any."""

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self._watched: dict[int, Callable[[], None]] = {}

    def watch(self, fd: int, tell: Callable[[], None]) -> None:
        """Call `tell` once, when the other side of `fd` is gone, and then forget it. OSError: the host has no room."""
        epoll = self._opened()
        try:
            epoll.register(fd, 0)
        except OSError:
            self._close_unused()
            raise
        self._watched[fd] = tell

    def forget(self, fd: int) -> None:
        """Watch it no more; harmless when it is not watched. To be called before `fd` is closed or given away.

        An epoll knows the open file, not the number: while another process has it too, it would go on telling.
        """
        if self._watched.pop(fd, None) is not None and self._epoll is not None:
            self._epoll.unregister(fd)
            self._close_unused()

    def _opened(self) -> select.epoll:
        if self._epoll is None:
            self._epoll = select.epoll()
            asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._look)
        return self._epoll

    def _close_unused(self) -> None:
        if self._epoll is not None and not self._watched:
            epoll, self._epoll = self._epoll, None
            asyncio.get_running_loop().remove_reader(epoll.fileno())
            epoll.close()

    def _look(self) -> None:
        events = [] if self._epoll is None else self._epoll.poll(0)
        for fd, _ in events:
            tell = self._watched.get(fd)  # one that was told before may have had it forgotten
            if tell is not None:
                self.forget(fd)
                tell()


def hung_up(connection: socket.socket) -> bool:
    """Return whether a connection is closed in both directions: on a unix socket, whether the peer has closed it."""
    poll = select.poll()
    poll.register(connection.fileno(), 0)  # POLLHUP is told always, poll(2)
    return any(events & select.POLLHUP for _, events in poll.poll(0))
