"""A worker's side of the keeper: the socket to it, what was inherited through it, and what is kept there.

A `KeeperLink` is the `runtime.fdstore.FdStore` of a service that has a keeper. It never blocks the event loop: what the
keeper cannot take now waits here, with duplicates of its descriptors. A keeper that has died keeps nothing; the worker
goes on without it, and remembers what it would have kept, so that it can hand it to the next service itself.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence

from execgate.keeper import protocol

log = logging.getLogger(__name__)

_MAX_WAITING = 100_000
"""Messages that wait for a keeper that takes none."""


class KeeperLink:
    """The connection of a worker to its keeper."""

    def __init__(self, connection: socket.socket, *, restarted: bool = False) -> None:
        """`restarted`: we take the place of a worker that dies, and there is nobody to go on if we do not start."""
        self.restarted = restarted
        self._connection: socket.socket | None = connection
        self._inherited: dict[str, int] = {}
        self._kept: dict[str, int] = {}  # by name, the numbers that their owners have open
        self._waiting: deque[tuple[str, Sequence[str], list[int]]] = deque()
        self._drained = asyncio.Event()
        self._told: Callable[[protocol.Message | None], None] = lambda _: None

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> "KeeperLink | None":
        """Return the link that a keeper has left in the environment, and take it out of that."""
        number = environ.pop(protocol.ENVIRONMENT, "")
        restarted = bool(environ.pop(protocol.RESTARTED, ""))
        if not (number.isascii() and number.isdigit()):
            return None
        os.set_inheritable(int(number), False)
        return cls(socket.socket(fileno=int(number)), restarted=restarted)

    def wait_for_turn(self) -> bool:
        """Say that we are ready to take over, and wait until it is our turn; False when the keeper is gone. Blocks."""
        assert self._connection is not None
        with contextlib.suppress(OSError):
            protocol.send(self._connection, "take")
            while (message := protocol.receive(self._connection)) is not None:
                if message.verb == "go":
                    self._connection.setblocking(False)
                    return True
                self.inherit(message)
        self._connection.close()
        return False

    def inherit(self, message: protocol.Message) -> None:
        """Take in descriptors that an earlier service has left."""
        found = message.named()
        protocol.close_all(self._inherited[name] for name in found if name in self._inherited)
        self._inherited |= found

    def inherit_from(self, orphan: socket.socket) -> int:
        """Take in everything that a service without a keeper says it has; return how much that is. Blocks. OSError."""
        before = len(self._inherited)
        while (message := protocol.receive(orphan)) is not None:
            if message.verb != "keep":
                protocol.close_all(message.fds)
                continue
            self.inherit(message)
            self.keep({name: self._inherited[name] for name in message.words if not name.startswith(protocol.ONCE)})
        return len(self._inherited) - before

    def hand_to(self, successor: socket.socket) -> None:
        """Say from now on to a successor what the keeper would be told, and first of all what it would have."""
        successor.setblocking(False)
        self._connection = successor
        self.keep(self._kept)

    def listen(self, told: Callable[[protocol.Message | None], None]) -> None:
        """Call `told` with each message of the keeper, and with None when it has died."""
        self._told = told
        if self._connection is not None:
            asyncio.get_running_loop().add_reader(self._connection.fileno(), self._readable)

    @property
    def alive(self) -> bool:
        """Whether there is a keeper."""
        return self._connection is not None

    def tell(self, verb: str, *words: str) -> None:
        """Say something to the keeper."""
        self._send(verb, words, [])

    async def flushed(self) -> None:
        """Return once the keeper has been sent everything; at its death, at once."""
        if self._waiting:
            self._drained.clear()
            await self._drained.wait()

    # -- runtime.fdstore.FdStore -------------------------------------------------------------------------------------

    def keep(self, descriptors: Mapping[str, int]) -> None:
        """See `FdStore.keep`."""
        self._kept.update(descriptors)
        for names, fds in protocol.batches(dict(descriptors)):
            self._send("keep", names, fds)

    def drop(self, names: Iterable[str]) -> None:
        """See `FdStore.drop`."""
        gone = [name for name in names if self._kept.pop(name, None) is not None]
        for begin in range(0, len(gone), protocol.BATCH):
            self._send("drop", gone[begin : begin + protocol.BATCH], [])

    def take(self, name: str) -> int | None:
        """See `FdStore.take`."""
        fd = self._inherited.pop(name, None)
        if fd is not None and not name.startswith(protocol.ONCE):
            self._kept[name] = fd
        return fd

    def take_all(self, prefix: str) -> dict[str, int]:
        """Take everything whose name begins with `prefix`."""
        names = [name for name in self._inherited if name.startswith(prefix)]
        return {name: fd for name in names if (fd := self.take(name)) is not None}

    def drop_rest(self) -> int:
        """Have everything dropped that was inherited and not taken; return how much that was."""
        rest, self._inherited = self._inherited, {}
        self._kept |= rest
        self.drop(list(rest))
        protocol.close_all(rest.values())
        return len(rest)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _send(self, verb: str, words: Sequence[str], fds: Sequence[int]) -> None:
        if self._connection is None:
            return
        if not self._waiting and self._sent(verb, words, fds):
            return
        if len(self._waiting) >= _MAX_WAITING:
            log.error("the keeper takes nothing: %s %s is lost", verb, " ".join(words))
            return
        copies: list[int] = []
        with contextlib.suppress(OSError):  # no descriptors left: then the rest of these is not kept
            for fd in fds:
                copies.append(os.dup(fd))  # noqa: PERF401  (a comprehension that fails loses those that it has)
        self._waiting.append((verb, words[: len(copies)] if fds else words, copies))
        if len(self._waiting) == 1:
            asyncio.get_running_loop().add_writer(self._connection.fileno(), self._writable)

    def _sent(self, verb: str, words: Sequence[str], fds: Sequence[int]) -> bool:
        """Send a message now; False when the keeper takes none now."""
        assert self._connection is not None
        try:
            protocol.send(self._connection, verb, words, fds)
        except BlockingIOError:
            return False
        except OSError as error:  # its end is told by `_readable`
            log.debug("the keeper was not told %s: %s", verb, error)
        return True

    def _flush(self) -> None:
        while self._waiting and self._connection is not None:
            verb, words, fds = self._waiting[0]
            if not self._sent(verb, words, fds):
                return
            self._waiting.popleft()
            protocol.close_all(fds)

    def _writable(self) -> None:
        self._flush()
        if not self._waiting and self._connection is not None:
            asyncio.get_running_loop().remove_writer(self._connection.fileno())
            self._drained.set()

    def _readable(self) -> None:
        if self._connection is None:
            return
        try:
            message = protocol.receive(self._connection)
        except BlockingIOError:
            return
        except OSError:
            message = None
        if message is None:
            self._lose()
        else:
            protocol.close_all(message.fds)
        self._told(message)

    def _lose(self) -> None:
        """The keeper is dead: nobody keeps anything any more."""
        assert self._connection is not None
        loop, fd = asyncio.get_running_loop(), self._connection.fileno()
        loop.remove_reader(fd)
        loop.remove_writer(fd)
        self._connection.close()
        self._connection = None
        for _, _, fds in self._waiting:
            protocol.close_all(fds)
        self._waiting.clear()
        self._drained.set()
