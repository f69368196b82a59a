"""A container as execgate sees it: who it is, which engine and runtime hold it, what the kernel says of it now."""

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


class EngineName(StrEnum):
    """Who made a container; `OCI` is a runtime that was called by hand, or by somebody who leaves no records."""

    DOCKER = "docker"
    PODMAN = "podman"
    CONTAINERD = "containerd"
    CRIO = "crio"
    OCI = "oci"


@dataclass(frozen=True, slots=True)
class OciRuntime:
    """The runtime program that made a container, and where it keeps its states.

    `path` is absolute, or only a name while the container does not run; `root` is what `--root` gets.
    `systemd_cgroup`: it was told to let systemd make the cgroups, and has to be told again.
    """

    name: str
    path: Path
    root: Path
    systemd_cgroup: bool = False


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
class ExecManner:
    """In what an engine's own exec departs from "the container's process, with other arguments".

    `env`: what the environment begins with, None for the container's own. `own_terminal`: the TERM in it is for the
    container's own terminal, and not for an exec without one. `fixed_capabilities`: another user changes nothing about
    them. `ambient_when_privileged`: Privileged leaves a container's own user, other than root, what it has.
    """

    env: tuple[str, ...] | None = None
    own_terminal: bool = False
    fixed_capabilities: bool = False
    ambient_when_privileged: bool = False


PLAIN = ExecManner()
"""No departure at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """One container, as it was when it was looked up.

    `name` is what its users call it, `aliases` are further names it answers to. `init` is None once the init process
    is gone. `created` is seconds since the epoch. `labels` are the engine's; a bare runtime has only the annotations
    of the bundle. `command` and `tty` are those of its init. `user` is as the engine was told (`app`, `1000:1000`;
    empty: root, or not known). `stop_timeout` is in seconds, None when nobody said one, `exit_code` None when it has
    not ended or nobody knows.
    """

    id: ContainerId
    name: str
    runtime: OciRuntime
    bundle: Path
    status: ContainerStatus
    created: float
    engine: EngineName = EngineName.OCI
    aliases: tuple[str, ...] = ()
    init: ProcessIdentity | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    image: str = ""
    image_id: str = ""
    command: tuple[str, ...] = ()
    user: str = ""
    tty: bool = False
    privileged: bool = False
    stop_timeout: float | None = None
    exit_code: int | None = None
    manner: ExecManner = PLAIN
