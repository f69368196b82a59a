"""What may be asked, of what, and what a permission comes to: the words between the gate and those who obey it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from execgate.model.config import ExecConfig, ResolvedUser
from execgate.model.container import Container, EngineName


class Verb(StrEnum):
    """What is done to a session, or in a container.

    EXEC: create, start and resize. INSPECT: list, inspect, wait, and events. ATTACH: attach, and write to stdin. LOGS:
    captured output, and the result made of it. KILL: any signal, and stop. REMOVE: forget. TOP: the processes of a
    container.
    """

    EXEC = "exec"
    INSPECT = "inspect"
    ATTACH = "attach"
    LOGS = "logs"
    KILL = "kill"
    REMOVE = "remove"
    TOP = "top"


class Record(StrEnum):
    """What of a session is recorded for those who look later: nothing, what it writes, what it is given as well."""

    NOTHING = ""
    OUTPUT = "output"
    ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A container as rules see it; it may be gone by now. `names` are its name and its aliases, the name first."""

    engine: EngineName
    names: tuple[str, ...]
    image: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


def target_of(container: Container) -> Target:
    """Return a container as rules see it."""
    return Target(
        engine=container.engine,
        names=(container.name, *container.aliases),
        image=container.image,
        labels=container.labels,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """An exec as it would run: nothing of it is looked up again behind the decision.

    `host_equivalent`: why root in this container is root on the host, empty when no reason is known.
    """

    target: Target
    config: ExecConfig
    user: ResolvedUser
    host_equivalent: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """A permission: by which rule, and with which bounds.

    `config` is what was asked with the bounds of the rule in it, and what runs. `max_sessions`: how many sessions of
    this owner and rule may be unfinished at once, this one among them; None: no bound but the service's. A recording
    that cannot be written ends a session if `record_or_end`, else it is only missing.
    """

    owner: str
    rule: str
    config: ExecConfig
    max_sessions: int | None = None
    record: Record = Record.NOTHING
    record_or_end: bool = False
