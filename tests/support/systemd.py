"""A service manager with a file descriptor store: what systemd does for a unit with FileDescriptorStoreMax=."""

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from support.errors import HostError

# The variables are those of the process that reads them (sd_listen_fds(3)), so they are set behind the fork.
_PASS = """
import os, sys
count = int(sys.argv[1])
fds = [int(fd) for fd in sys.argv[3].split(",") if fd]
copies = [os.dup(fd) for fd in fds]
high = [__import__("fcntl").fcntl(fd, 0, 3 + count) for fd in copies]
for number, fd in enumerate(high):
    os.dup2(fd, 3 + number, inheritable=True)
os.closerange(3 + count, 4096)
os.environ |= {"LISTEN_FDS": str(count), "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": sys.argv[2]}
os.execv(sys.argv[4], sys.argv[4:])
"""


class Manager:
    """Starts a service, keeps what it stores, and passes it to the next one."""

    def __init__(self, directory: Path) -> None:
        self.stored: list[tuple[str, int]] = []
        self._path = directory / "manager"
        self._path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self._path))

    def start(self, argv: Sequence[str], environ: Mapping[str, str], log: Path) -> "subprocess.Popen[bytes]":
        """Start a service with everything that is stored, which is then its own; return once it is ready."""
        names, fds = ":".join(name for name, _ in self.stored), [fd for _, fd in self.stored]
        command = [sys.executable, "-c", _PASS, str(len(fds)), names, ",".join(map(str, fds)), *argv]
        environ = {**environ, "NOTIFY_SOCKET": str(self._path), "FDSTORE": "1000"}
        with log.open("ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environ, pass_fds=fds)
        for fd in fds:
            os.close(fd)
        self.stored = []
        self.listen(process, until="READY=1")
        return process

    def listen(self, process: "subprocess.Popen[bytes]", *, until: str = "", timeout: float = 30.0) -> None:
        """Take what the service says until it says `until`, or else until it has ended and said everything."""
        deadline = time.monotonic() + timeout
        pidfd = os.pidfd_open(process.pid)
        try:
            while True:
                waited = [self._socket.fileno(), pidfd]
                ready, _, _ = select.select(waited, [], [], max(0.0, deadline - time.monotonic()))
                if self._socket.fileno() in ready:
                    if until in self._take() and until:
                        return
                elif pidfd in ready and not until:
                    return
                else:
                    raise HostError(f"it did not say {until}, or did not end")
        finally:
            os.close(pidfd)

    def close(self) -> None:
        """Close everything."""
        self._socket.close()
        for _, fd in self.stored:
            os.close(fd)

    def _take(self) -> list[str]:
        data, fds, _, _ = socket.recv_fds(self._socket, 4096, 8)
        lines = data.decode().splitlines()
        if "FDSTORE=1" in lines:
            assert "FDPOLL=0" in lines, lines
            name = next(line.removeprefix("FDNAME=") for line in lines if line.startswith("FDNAME="))
            self.stored += [(name, fd) for fd in fds]
        else:
            for fd in fds:  # the barrier's
                os.close(fd)
        return lines
