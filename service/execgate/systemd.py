"""The one thing systemd wants to hear: sd_notify(3), a datagram to the socket named in NOTIFY_SOCKET."""

import logging
import os
import socket

log = logging.getLogger(__name__)


class Notifier:
    """Tells the service manager what the service is doing; without one it says nothing.

    The variable is taken out of the environment: nothing this process starts may speak for it.
    """

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")

    def tell(self, state: str) -> None:
        """Send `state`, such as `READY=1`. A manager that does not listen is no reason to fail."""
        if not self._address:
            return
        # A leading @ stands for the NUL of an abstract socket.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
                notify.sendto(state.encode(), address)
        except OSError as error:
            log.warning("the service manager was not told %s: %s", state, error)
