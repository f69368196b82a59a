"""What is on disk about one container: an engine's record and a runtime's state, put together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from execgate.containers.files import is_settled, key_or_none
from execgate.containers.states import Source
from execgate.model.container import Container, ContainerStatus, EngineName
from execgate.model.ids import ContainerId
from execgate.model.process import ProcessIdentity


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A container as its files have it: everything but the kernel's view.

    `container` is it without a process; its status is CREATED if it was never started, else EXITED. `init` was its
    first process, as the runtime wrote it down, None when no runtime holds the container now. `exec_fifo` exists until
    that process was released. `spec_path` is where its config.json is, or should be. `place` is the directory that
    stands for it in a message. `flaw` is what is wrong with a container that can still be shown. `hidden`: it is
    nobody's to exec into (the sandbox of a pod), or another engine's. All this is true as long as each path of
    `read_from` has its key.
    """

    container: Container
    spec_path: str
    place: str
    read_from: tuple[Source, ...]
    init: ProcessIdentity | None = None
    exec_fifo: str = ""
    flaw: str = ""
    hidden: bool = False
    _living: dict[ContainerStatus, Container] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def id(self) -> ContainerId:
        """Its full id."""
        return self.container.id

    @property
    def names(self) -> tuple[str, ...]:
        """What it answers to, its name first."""
        return (self.container.name, *self.container.aliases)

    def living(self, status: ContainerStatus) -> Container:
        """Return the container with its process, in a status: the same object each time."""
        known = self._living.get(status)
        if known is None:
            known = self._living[status] = replace(self.container, init=self.init, status=status)
        return known

    def holds(self) -> bool:
        """Return whether every file it was made from is the one it was."""
        return all(key_or_none(path) == key for path, key in self.read_from)

    def is_settled(self, read_at: int) -> bool:
        """Return whether `holds` can be relied upon, for an entry that was read after `read_at`."""
        return all(key is None or is_settled(key, read_at) for _, key in self.read_from)


@dataclass(frozen=True, slots=True)
class Look:
    """Where an engine's containers were looked for, and what came of it; for people."""

    place: str
    found: str
    usable: bool = True


class EngineSource(Protocol):
    """The containers of one engine. Its methods do short file reads, and are called under the catalog's lock."""

    engine: EngineName

    def ids(self) -> frozenset[ContainerId]:
        """Return who may be there now: the same object as long as nothing has changed, which costs a few stats.

        Raises Unavailable. What else goes wrong is in `problems`, and hides no other container.
        """

    def load(self, container_id: ContainerId) -> Entry | None:
        """Read one of `ids`; None when it is gone. Raises MalformedError and the categories."""

    def place(self, container_id: ContainerId) -> str:
        """Return the directory that stands for a container in a message."""

    def renamed(self, entry: Entry) -> bool:
        """Return whether the container may have got another name since `entry` was read, as of the last `ids`.

        At most one stat.
        """

    def names(self) -> object | None:
        """Return an object that is the same one as long as nobody can have got another name, as of the last `ids`.

        None where only each container itself can tell.
        """

    def problems(self) -> Mapping[str, str]:
        """Return the places that could not be looked at, each with the reason."""

    def looks(self) -> Sequence[Look]:
        """Return where it looks, for `execgate doctor`."""


def text(value: object) -> str:
    """Return a text of a foreign file; "" for anything else."""
    return value if isinstance(value, str) else ""


def texts(value: object) -> tuple[str, ...]:
    """Return the texts of a list of a foreign file."""
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def table(value: object) -> Mapping[str, object]:
    """Return an object of a foreign file; empty for anything else."""
    return value if isinstance(value, Mapping) else {}


def text_table(value: object) -> dict[str, str]:
    """Return the texts of an object of a foreign file."""
    return {name: item for name, item in table(value).items() if isinstance(item, str)}


def seconds(value: object) -> float | None:
    """Return a number of seconds of a foreign file; None for anything that cannot be one."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value < 2**31 else None  # type: ignore[operator,arg-type]
