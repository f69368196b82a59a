"""A container as execgate sees it: who it is, which runtime holds it, what the kernel says of it now."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from execgate.model.ids import ContainerId
from execgate.model.process import ProcessIdentity


class ContainerStatus(StrEnum):
    """Docker's words for the state of a container."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class OciRuntime:
    """The runtime program that made a container, and where it keeps its states.

    `path` is absolute; `root` is what `--root` gets.
    """

    name: str
    path: Path
    root: Path


@dataclass(frozen=True, slots=True)
class ContainerBinding:
    """Which incarnation of a container a session belongs to.

    An id or a name can come back with another container behind it; the init process's pid and start time,
    within one boot, cannot.
    """

    container_id: ContainerId
    name: str
    init: ProcessIdentity
    boot_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """One container, as it was when it was looked up.

    `init` is None once the init process is gone. `created` is seconds since the epoch. `annotations` are the
    bundle's; Docker clients see them as labels.
    """

    id: ContainerId
    name: str
    runtime: OciRuntime
    bundle: Path
    status: ContainerStatus
    created: float
    init: ProcessIdentity | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)
