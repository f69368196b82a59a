"""The receiving end of sd_notify(3), and how a test waits for a real event of a child process."""

import os
import select
import socket
import subprocess
import time
from pathlib import Path

from support.errors import HostError


class NotifySocket:
    """A socket for the variable NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.bind(os.fspath(path))

    def close(self) -> None:
        """Stop listening and remove the file; harmless when done twice."""
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def wait_for(self, line: str, child: "subprocess.Popen[bytes]", *, timeout: float) -> None:
        """Return once `child` has sent `line` (`READY=1`).

        Raises HostError as soon as the child ends without it, or after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        pidfd = os.pidfd_open(child.pid)
        try:
            while True:
                left = max(0.0, deadline - time.monotonic())
                ready, _, _ = select.select([self._socket.fileno(), pidfd], [], [], left)
                if self._socket.fileno() in ready:
                    if line in self._socket.recv(4096).decode().splitlines():
                        return
                elif pidfd in ready:
                    raise HostError(f"it ended with {child.wait()} before it said {line}")
                else:
                    raise HostError(f"it did not say {line} within {timeout:g} s")
        finally:
            os.close(pidfd)
