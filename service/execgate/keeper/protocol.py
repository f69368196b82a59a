"""What a keeper and its workers say to each other, and a worker to the one that replaces it.

A message is one packet of a SEQPACKET unix socket: a verb, then words, separated by spaces. With `keep` and `kept` each
word is the name of a descriptor that comes with the packet (SCM_RIGHTS, unix(7)).

==========  ========================  ==================================================================================
who         says                      meaning
==========  ========================  ==================================================================================
worker      ``take``                  it is ready to take over, and waits for what is kept
keeper      ``kept NAME …``           a part of that
keeper      ``go``                    that was all: serve
worker      ``ready [standby]``       it serves; and another worker should stand by
worker      ``keep NAME …``           keep these, until they are dropped; a name that is taken is replaced
worker      ``drop NAME …``           close these
keeper      ``leave``                 hand over what only you know, and end
keeper      ``stop``                  end: nobody follows
keeper      ``failed TEXT``           the reload did not come about
==========  ========================  ==================================================================================

Names have no spaces, colons or control characters, because systemd allows none (FDNAME, sd_notify(3)). What is named
`once.…` is given to one worker and then forgotten: it is only true at the moment of a handover.
"""

import array
import contextlib
import os
import socket
from collections.abc import Iterable, Iterator, Sequence

ONCE = "once."
"""What such names stand for goes to the next worker and to no other."""

ACTIVATED = "socket."
"""What such names stand for are listening sockets that the service manager has opened."""

ENVIRONMENT = "EXECGATE_KEEPER"
"""The variable in which a worker finds the number of its end of the socket."""

RESTARTED = "EXECGATE_RESTARTED"
"""The variable that tells a worker that it takes the place of one that dies, and not that of one that is replaced."""

BATCH = 64
"""Descriptors in one message; the kernel takes 253 (SCM_MAX_FD, unix(7))."""

_MESSAGE_MAX = 64 * 1024


class Message:
    """One message: `verb`, `words`, and the descriptors that came with it, which are the receiver's to close."""

    __slots__ = ("fds", "verb", "words")

    def __init__(self, verb: str, words: Sequence[str], fds: Sequence[int]) -> None:
        self.verb = verb
        self.words = words
        self.fds = fds

    def __repr__(self) -> str:
        return f"<Message {self.verb} {' '.join(self.words)} fds={len(self.fds)}>"

    def named(self) -> dict[str, int]:
        """Return the descriptors by name; a sender that gave no name to one of them loses it."""
        for fd in self.fds[len(self.words) :]:
            os.close(fd)
        return dict(zip(self.words, self.fds, strict=False))


def pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a new connection; the second one may be inherited."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.set_inheritable(True)
    return ours, theirs


def send(connection: socket.socket, verb: str, words: Iterable[str] = (), fds: Sequence[int] = ()) -> None:
    """Send one message. OSError."""
    text = " ".join((verb, *words)).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    connection.sendmsg([text], rights)


def receive(connection: socket.socket) -> Message | None:
    """Return the next message, None at the end. OSError, BlockingIOError among them."""
    space = socket.CMSG_SPACE(BATCH * array.array("i").itemsize)
    data, ancillary, _, _ = connection.recvmsg(_MESSAGE_MAX, space, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    if not data:
        return None
    verb, *words = data.decode(errors="replace").split(" ")
    return Message(verb, words, fds.tolist())


def batches(descriptors: dict[str, int]) -> Iterator[tuple[list[str], list[int]]]:
    """Cut named descriptors into what fits one message each."""
    names = list(descriptors)
    for begin in range(0, len(names), BATCH):
        some = names[begin : begin + BATCH]
        yield some, [descriptors[name] for name in some]


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors; one that cannot be closed is gone all the same (close(2))."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
