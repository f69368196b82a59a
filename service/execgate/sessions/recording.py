"""What records sessions for those who look later, as sessions see it. `gate.recording` writes files.

The theory. A recording stands in the way of the bytes: it is given each piece, in order, before the client is. It
*accepts* a piece at once, so that whoever is cancelled has lost nothing; and before the next one is taken from the
process, or from a client, `room` is waited for. So it needs to drop nothing, and holds no more than its bound.

One that can write no more is *lost*: it takes nothing any more, and tells why. What follows from that is the session's
business: it goes on unrecorded, or it ends (`ExecSession.record_or_end`).
"""

from collections.abc import Callable
from typing import Protocol

from execgate.model.config import ConsoleSize
from execgate.model.session import ExecSession, ExitStatus


class Recording(Protocol):
    """The recording of one session. No call but `begin` of `Recordings` raises anything."""

    @property
    def output(self) -> bool:
        """Whether it takes, now, what the process writes."""

    @property
    def input(self) -> bool:
        """Whether it takes, now, what the process is given."""

    def wrote(self, stream: int, data: bytes) -> None:
        """Take what the process has written: 1 stdout, 2 stderr."""

    def given(self, data: bytes) -> None:
        """Take what the process has been given."""

    def resized(self, size: ConsoleSize) -> None:
        """Take note of the terminal's new size."""

    async def room(self) -> None:
        """Return when there is room for more. After `leave` never: what comes is the next service's."""

    def when_lost(self, tell: Callable[[str], None]) -> None:
        """Have `tell` called once with the reason when it is lost; at once, if it is already."""

    def finish(self, status: ExitStatus, remark: str = "") -> None:
        """End it behind what it has, with the exit code and a remark, if any."""

    def leave(self) -> None:
        """Stop behind what it has, without an end. The next service goes on with it."""

    def discard(self) -> None:
        """Leave nothing of it: the session was not started."""

    async def closed(self) -> None:
        """Return, after `finish` or `leave`, once all is written or lost."""


class Recordings(Protocol):
    """Where recordings are made."""

    async def begin(self, session: ExecSession, size: ConsoleSize | None) -> Recording:
        """Begin the recording of a session before anything of it runs; `size`: that of its terminal, if it is known.

        Unavailable when that is not possible and the session must not run without (`record_or_end`).
        """

    def resume(self, session: ExecSession, *, in_order: bool) -> Recording:
        """Go on with the recording of a session that an earlier service has begun.

        `in_order`: that service has left it; else it crashed, and what it held is missing.
        """

    async def close(self) -> None:
        """Leave what is not finished, and return once all is written."""


class Unrecorded:
    """The recording of a session that is not recorded."""

    output = False
    input = False

    def wrote(self, stream: int, data: bytes) -> None:
        """See `Recording`."""

    def given(self, data: bytes) -> None:
        """See `Recording`."""

    def resized(self, size: ConsoleSize) -> None:
        """See `Recording`."""

    async def room(self) -> None:
        """See `Recording`."""

    def when_lost(self, tell: Callable[[str], None]) -> None:
        """See `Recording`."""

    def finish(self, status: ExitStatus, remark: str = "") -> None:
        """See `Recording`."""

    def leave(self) -> None:
        """See `Recording`."""

    def discard(self) -> None:
        """See `Recording`."""

    async def closed(self) -> None:
        """See `Recording`."""


class NoRecordings:
    """Records nothing."""

    async def begin(self, session: ExecSession, size: ConsoleSize | None) -> Recording:  # noqa: ARG002
        """See `Recordings`."""
        return Unrecorded()

    def resume(self, session: ExecSession, *, in_order: bool) -> Recording:  # noqa: ARG002
        """See `Recordings`."""
        return Unrecorded()

    async def close(self) -> None:
        """See `Recordings`."""
