"""What an answer can be about, before any API has given it its shape."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from execgate.model.container import Container, ContainerStatus
from execgate.model.ids import SessionId
from execgate.model.session import ByteCounts, ExecSession

NEVER = "0001-01-01T00:00:00Z"
"""Go's zero time."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A container with its config.json (empty where only a summary is wanted) and the sessions that run in it."""

    container: Container
    spec: Mapping[str, Any]
    sessions: Sequence[SessionId] = ()

    @property
    def process(self) -> Mapping[str, Any]:
        """The bundle's process; empty where there is none."""
        process = self.spec.get("process")
        return process if isinstance(process, Mapping) else {}

    @property
    def running(self) -> bool:
        """Whether its init lives and has been started."""
        alive = self.container.status in (ContainerStatus.RUNNING, ContainerStatus.PAUSED)
        return alive and self.container.init is not None

    @property
    def pid(self) -> int:
        """The pid of its init on the host, 0 once that has ended."""
        return self.container.init.pid if self.container.init else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The machine, the service on it, and the containers that it sees.

    `machine` is uname's word, `architecture` Go's. `memory` is in bytes. `version` is the service's own,
    `api_version` and `oldest_api_version` those of the API that is asked.
    """

    name: str
    system: str
    machine: str
    architecture: str
    kernel: str
    processors: int
    memory: int
    version: str
    api_version: str
    oldest_api_version: str


@dataclass(frozen=True, slots=True)
class Counts:
    """How many containers there are, by state."""

    all: int
    running: int
    paused: int

    @property
    def stopped(self) -> int:
        """Those that neither run nor are paused."""
        return self.all - self.running - self.paused


Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The shapes of one API.

    `container` also gets the version that the request was made in, `session` what that has transferred by now.
    """

    summary: Callable[[Subject], Json]
    container: Callable[[Subject, tuple[int, ...]], Json]
    session: Callable[[ExecSession, ByteCounts], Json]
    version: Callable[[Host], Json]
    info: Callable[[Host, Counts], Json]


def rfc3339(seconds: float) -> str:
    """Return a time (seconds since the epoch) as Go's JSON has it, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
