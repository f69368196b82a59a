"""What the service manager wants to hear and can keep: sd_notify(3), sd_listen_fds(3), the file descriptor store.

The store is used when the keeper itself ends (`systemctl restart`): what it holds goes to systemd then, and comes back
to the next keeper as inherited descriptors. systemd 254 and later say in $FDSTORE how much they take; for older ones
the unit sets that variable beside `FileDescriptorStoreMax=`.
"""

import array
import os
import select
import socket
from collections.abc import Mapping, MutableMapping

from execgate.keeper.protocol import ACTIVATED

_LISTEN_FDS_START = 3
_PREFIX = "execgate-"
"""Marks in systemd's hands what came from us: names of sockets are those of their units."""

_BARRIER_TIMEOUT = 5000  # milliseconds, as sd_notify_barrier(3) suggests


class Notifier:
    """Tells the service manager what the service is doing; without one it says nothing.

    The variables are taken out of the environment: nothing this process starts may speak for it.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        address = environ.pop("NOTIFY_SOCKET", "")
        # A leading @ stands for the NUL of an abstract socket.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.stores = bool(address) and environ.pop("FDSTORE", "0") not in ("", "0")
        """Whether it keeps descriptors for the next service."""

    def tell(self, *lines: str) -> None:
        """Send lines such as `READY=1`. A manager that does not listen is no reason to fail."""
        self._send("\n".join(lines), [])

    def store(self, descriptors: Mapping[str, int]) -> None:
        """Have descriptors kept, and return once they are.

        FDPOLL=0, because systemd would else drop a pipe whose writer has ended, and with it what was not read yet.
        """
        for name, fd in descriptors.items():
            self._send(f"FDSTORE=1\nFDNAME={_PREFIX}{name}\nFDPOLL=0", [fd])
        # systemd finds out by pid whose messages these are: we must live until it has read them all.
        read, write = os.pipe2(os.O_CLOEXEC)
        self._send("BARRIER=1", [write])
        os.close(write)
        poll = select.poll()
        poll.register(read, 0)  # POLLHUP is told always, poll(2)
        poll.poll(_BARRIER_TIMEOUT)
        os.close(read)

    def _send(self, text: str, fds: list[int]) -> None:
        if not self._address:
            return
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
                notify.settimeout(_BARRIER_TIMEOUT / 1000)
                notify.sendmsg([text.encode()], rights, 0, self._address)
        except OSError:
            return


def inherited(environ: MutableMapping[str, str]) -> dict[str, int]:
    """Return what the service manager passed, by our names for it, and take the variables out of the environment.

    Descriptors that an earlier keeper had stored have the names that it gave them. OSError when one is none.
    """
    count, pid = environ.pop("LISTEN_FDS", ""), environ.pop("LISTEN_PID", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    found: dict[str, int] = {}
    if not (count.isascii() and count.isdigit()) or pid != str(os.getpid()):
        return found
    for number in range(int(count)):
        fd = _LISTEN_FDS_START + number
        name = names[number] if number < len(names) else ""
        try:
            os.set_inheritable(fd, False)
        except OSError as error:
            raise OSError(error.errno, f"cannot listen on inherited descriptor {fd}: {error.strerror}") from error
        ours = name.removeprefix(_PREFIX)
        found[ours if ours != name else f"{ACTIVATED}{number}"] = fd
    return found
