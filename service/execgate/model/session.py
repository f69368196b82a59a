"""An exec session and its lifecycle.

The theory. A session moves along one line and never back::

    created ──► starting ──► running ──► stopped
                    └───────────────────────▲   the start failed: 126, 127, 128

`starting` is written *before* the monitor is spawned (intent before effect), so that whoever reads the record
after a crash knows that a process may exist. Outwards it shows as running. Nothing but `TRANSITIONS` says which
step is legal, and nothing but the store's compare-and-set takes one: of two requests, or two processes, that
start the same session, exactly one wins.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from execgate.model.access import Record
from execgate.model.config import ExecConfig, ResolvedUser
from execgate.model.container import ContainerBinding, EngineName
from execgate.model.ids import SessionId
from execgate.model.process import ProcessIdentity


class SessionState(StrEnum):
    """Where a session stands in its life."""

    CREATED = "created"
    STARTING = "starting"
    RUNNING = "running"
    STOPPED = "stopped"


TRANSITIONS: frozenset[tuple[SessionState, SessionState]] = frozenset(
    {
        (SessionState.CREATED, SessionState.STARTING),
        (
            SessionState.CREATED,
            SessionState.STOPPED,
        ),  # its container is gone, or a start was refused before the spawn
        (SessionState.STARTING, SessionState.RUNNING),
        (SessionState.STARTING, SessionState.STOPPED),
        (SessionState.RUNNING, SessionState.RUNNING),  # its time is over, and it is about to be ended
        (SessionState.RUNNING, SessionState.STOPPED),
    }
)


class ExitSource(StrEnum):
    """Where an exit code was learnt, best first. `UNKNOWN` is said, never hidden behind a made-up 0."""

    SYNC_PIPE = "sync-pipe"
    EXIT_FILE = "exit-file"
    PIDFD = "pidfd"
    START_FAILURE = "start-failure"
    TIMEOUT = "timeout"
    UNKNOWN = "unknown"


UNKNOWN_EXIT_CODE = 255
"""What clients are told when nobody saw the end: containerd's number for an unknown exit status.

Not null, because the docker CLI reads a null ExitCode as 0, and a failure would look like success.
"""


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a process ended: 0…255 (128 + signal for signals), and how we know."""

    code: int
    source: ExitSource


UNKNOWN_EXIT = ExitStatus(UNKNOWN_EXIT_CODE, ExitSource.UNKNOWN)


@dataclass(frozen=True, slots=True)
class ByteCounts:
    """Bytes that passed through the service, in and out. All output of a terminal is stdout."""

    stdin: int = 0
    stdout: int = 0
    stderr: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecSession:
    """The record of one session; every change makes a new one.

    Times are seconds since the epoch, for those who look. What is reckoned with is `since`: when the session came into
    its state, in seconds of the monotonic clock, which nobody sets and which means the same to every process of a boot;
    no record outlives that. `process` and `monitor` (conmon) are set while they are known to exist or have existed;
    `exit` is set exactly when `state` is stopped. `error` is why a start failed. `transferred` is what had passed at
    the end. `attended`: somebody is attached, or was until a service died, and the process is to go with its clients.
    `container_labels`, `aliases`, `engine` and `image` are those of the container at create: events show them, and
    rules go by them when it is gone. `owner` is the principal that created it, `rule` what permitted that; `record`
    and `record_or_end` are that rule's (`access.Grant`).
    """

    id: SessionId
    container: ContainerBinding
    config: ExecConfig
    user: ResolvedUser
    state: SessionState
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    since: float = 0.0
    process: ProcessIdentity | None = None
    monitor: ProcessIdentity | None = None
    exit: ExitStatus | None = None
    error: str = ""
    timed_out: bool = False
    transferred: ByteCounts = ByteCounts()
    attended: bool = False
    container_labels: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    engine: EngineName = EngineName.OCI
    image: str = ""
    owner: str = ""
    rule: str = ""
    record: Record = Record.NOTHING
    record_or_end: bool = False

    @property
    def running(self) -> bool:
        """What inspect calls Running: a start that is under way counts."""
        return self.state in (SessionState.STARTING, SessionState.RUNNING)
