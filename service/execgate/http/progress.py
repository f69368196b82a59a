"""How far a request has come whose answer is still owed, for a service that goes on with it where this one stopped.

A request that has had no effect is simply asked once more of the next service (`front`). One that has had an effect,
or has an answer that has begun, is asked once more with this beside it: it is never done twice, and nothing is
answered twice.
"""

from dataclasses import dataclass

from execgate.sessions.oneshot import Collector


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What was done of a request."""

    session_id: str = ""
    """The session that was created for it, or whose start or stop was begun."""

    collector: Collector | None = None
    """The client of a one-shot exec: its input, and the output so far."""

    position: int | None = None
    """Where the rest of an answer begins whose head and first pieces are on the wire: an offset, an event's number."""

    unsent: bytes = b""
    """What belongs before that and is not on the wire."""
