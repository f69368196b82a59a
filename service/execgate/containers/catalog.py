"""The containers of this host, whoever made them.

The theory. What engines and runtimes keep on disk is the truth about which containers exist; it is read when a
question comes, nothing is watched and nothing polled. Three things keep that cheap:

- Each engine's *ids* are the names in a few directories, or one list. A stat of each tells whether they are the same
  as before; only what is new is read then.
- What was read of a container, an `Entry`, knows the files it was made from. A look at a known container is a stat of
  each of them; nothing is parsed again that has not changed.
- Names are looked up in an index, and a hit is believed only if its entry still holds. Only a name that nobody has
  makes us look for renamed containers: one stat a container at most. A short prefix of an id is such a name, too:
  whoever was just renamed to `db` comes before the one whose id begins so.

What does change behind the files, the life of the init process and the freezer, is asked of the kernel each time: a
state file goes on saying "running" of a container that died.

What always holds:

- No path is built from what a client sent: a reference is compared with ids and names that were found.
- One broken container breaks no other. It is left out, and `problems` says why.
- One id, one container: of two engines that hold the same id the earlier one wins, and the other is a problem.
- An error that means "we cannot look" (Unavailable) is raised, never read as "there is none".

All methods are synchronous, do short local file reads, and may be called from several threads.
"""

import logging
import re
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from execgate.containers import proc
from execgate.containers.entry import EngineSource, Entry, Look
from execgate.containers.files import key_or_none, now
from execgate.containers.formats import MalformedError, parse_container_id
from execgate.containers.states import Specs
from execgate.model.container import Container, ContainerBinding, ContainerStatus, EngineName
from execgate.model.errors import Conflict, ExecgateError, Internal, InvalidArgument, NotFound, Unavailable
from execgate.model.ids import ContainerId
from execgate.model.process import ProcessIdentity
from execgate.oci.text import shown

log = logging.getLogger(__name__)

_SHORT_ID = re.compile(r"[0-9a-f]{12,}")
"""What tools print of an id, or more: nobody is asked whether it has become a name before it is taken for an id."""

Problems = list[tuple[str, str]]
"""Places that were left out, each with the reason."""

Shown = Callable[[Container], bool]
"""Whether a container exists for whoever asks."""

LabelFilter = tuple[str, str | None]
"""A label that a container must have, with its value; None: any value."""


@dataclass(slots=True)
class _Shelf:
    """What is known of one engine.

    `names` leads from each name to those that have it; `compared` are the source's own when all entries were last
    compared with them. `unsettled` are the entries that are too young to be known by the keys of their files. `broken`
    are the containers that could not be read, with the reason.
    """

    source: EngineSource
    ids: frozenset[ContainerId] = frozenset()
    entries: dict[ContainerId, Entry] = field(default_factory=dict)
    names: dict[str, set[ContainerId]] = field(default_factory=dict)
    compared: object | None = None
    unsettled: set[ContainerId] = field(default_factory=set)
    broken: dict[ContainerId, tuple[str, str]] = field(default_factory=dict)


class Catalog:
    """The containers of a sequence of engines; with `labels` only those that have them all."""

    def __init__(self, sources: Sequence[EngineSource], specs: Specs, *, labels: Sequence[LabelFilter] = ()) -> None:
        """Read nothing yet. `specs` is what the sources read through, too."""
        self._shelves = [_Shelf(source) for source in sources]
        self._specs = specs
        self._labels = tuple(labels)
        self._sorted: tuple[list[frozenset[ContainerId]], list[ContainerId]] = ([], [])
        self._lock = threading.RLock()

    def list(self) -> list[Container]:
        """Return every container that can be shown, in all states, in the order of the engines, then by id.

        Raises Unavailable when the host is out of descriptors or memory.
        """
        with self._lock:
            self._refresh()
            wanted = [(shelf, container_id) for shelf in self._shelves for container_id in sorted(shelf.ids)]
        seen: set[ContainerId] = set()
        found = []
        for shelf, container_id in wanted:
            with self._lock:  # once for each, so that a long list keeps nobody waiting
                entry = self._current(shelf, container_id)
            if entry is None or entry.hidden or container_id in seen:
                continue
            seen.add(container_id)
            if self._is_chosen(entry):
                found.append(_observe(entry))
        return found

    def find(self, ref: str, shown_to: Shown | None = None) -> Container:
        """Return the container that `ref` means: a full id, else a name (`/name` too), else an id's unique prefix.

        `engine:` before it means those of one engine. One that is not `shown_to` whoever asks is as if it were not
        there: no error tells of it. Raises NotFound, InvalidArgument when several are meant, Unavailable.
        """
        text = ref.removeprefix("/")
        shown_to = shown_to or _to_anybody
        with self._lock:
            self._refresh()
            shelves, text = self._among(text)
            entry = self._by_id(shelves, text, shown_to) or self._by_name(shelves, text, shown_to)
            if entry is None and _SHORT_ID.fullmatch(text):
                entry = self._by_prefix(shelves, text, shown_to)
            if entry is None:
                self._look_for_renamed()
                entry = self._by_name(shelves, text, shown_to) or self._by_prefix(shelves, text, shown_to)
            if entry is None:
                raise NotFound(f"No such container: {shown(ref)}", hint=self._why_not(text))
        return _observe(entry)

    def get(self, container_id: ContainerId) -> Container | None:
        """Return the container with this full id, None when there is none, or none that can be read."""
        with self._lock:
            self._refresh()
            entry = self._by_id(self._shelves, container_id, _to_anybody)
        return _observe(entry) if entry is not None else None

    def problems(self) -> Problems:
        """Return what was left out when last looked at, each place with its reason."""
        with self._lock:
            found = [problem for shelf in self._shelves for problem in shelf.broken.values()]
            found += [(e.place, e.flaw) for shelf in self._shelves for e in shelf.entries.values() if e.flaw]
            found += [problem for shelf in self._shelves for problem in shelf.source.problems().items()]
            return sorted({*found, *self._taken()})

    def looks(self) -> Sequence[tuple[EngineName, Sequence[Look]]]:
        """Return where each engine's containers are looked for, and what is there."""
        with self._lock:
            return [(shelf.source.engine, shelf.source.looks()) for shelf in self._shelves]

    def spec(self, container: Container) -> Mapping[str, Any]:
        """Return the parsed config.json of a container; it is shared, so treat it as frozen, all the way down.

        It is read from where it was when the container was last looked up. Raises NotFound when there is none,
        Internal when it is unusable.
        """
        with self._lock:
            of_engine = (shelf for shelf in self._shelves if shelf.source.engine is container.engine)
            entry = next((shelf.entries[container.id] for shelf in of_engine if container.id in shelf.entries), None)
            path = entry.spec_path if entry is not None else f"{container.bundle}/config.json"
            try:
                return self._specs.read(path)[0]
            except NotFound as error:
                message = f"the configuration of container {shown(container.id)} is gone"
                raise NotFound(message, hint=error.hint) from error
            except Internal as error:
                message = f"the configuration of container {shown(container.id)} cannot be read"
                raise Internal(message, hint=error.hint) from error

    def binding(self, container: Container) -> ContainerBinding:
        """Return which incarnation of the container this is. Raises Conflict when it has no init process."""
        if container.init is None:
            raise Conflict(f"container {container.id} is not running")
        return ContainerBinding(container.id, container.name, container.init, proc.boot_id())

    # -- what a reference means --------------------------------------------------------------------------------------

    def _among(self, text: str) -> tuple[Sequence[_Shelf], str]:
        """Return the engines that `engine:rest` speaks of, and the rest; of all without an engine."""
        engine, colon, rest = text.partition(":")
        if colon and engine in list(EngineName):
            return [shelf for shelf in self._shelves if shelf.source.engine == engine], rest
        return self._shelves, text

    def _by_id(self, shelves: Sequence[_Shelf], text: str, shown_to: Shown) -> Entry | None:
        wanted = ContainerId(text)
        for shelf in shelves:
            entry = self._current(shelf, wanted)
            if entry is not None and not entry.hidden:
                return entry if self._is_chosen(entry) and shown_to(entry.container) else None
        return None

    def _by_name(self, shelves: Sequence[_Shelf], text: str, shown_to: Shown) -> Entry | None:
        holders = {container_id for shelf in shelves for container_id in shelf.names.get(text, ())}
        entries = (self._by_id(shelves, container_id, shown_to) for container_id in sorted(holders))
        found = [entry for entry in entries if entry is not None and text in entry.names]
        if len(found) > 1:
            # A container that stopped gives way to one that has its name now: Kubernetes keeps the dead for a while.
            found = [entry for entry in found if entry.init is not None and proc.is_alive(entry.init)] or found
        if len(found) > 1:
            meant = ", ".join(f"{entry.container.engine}:{entry.id[:12]}" for entry in found)
            raise InvalidArgument(f"multiple containers are named {shown(text)}: {meant}")
        return found[0] if found else None

    def _by_prefix(self, shelves: Sequence[_Shelf], text: str, shown_to: Shown) -> Entry | None:
        if not text:
            return None
        found: list[Entry] = []
        for container_id in self._with_prefix(text):
            entry = self._by_id(shelves, container_id, shown_to)
            found += [entry] if entry is not None else []
            if len(found) > 1:
                raise InvalidArgument(f"multiple IDs found with provided prefix: {shown(text)}")
        return found[0] if found else None

    def _with_prefix(self, text: str) -> Iterator[ContainerId]:
        parts, ids = self._sorted
        current = [shelf.ids for shelf in self._shelves]
        if len(parts) != len(current) or any(new is not old for new, old in zip(current, parts, strict=True)):
            ids = sorted(frozenset[ContainerId]().union(*current))
            self._sorted = (current, ids)
        for index in range(bisect_left(ids, text), len(ids)):
            if not ids[index].startswith(text):
                return
            yield ids[index]

    def _is_chosen(self, entry: Entry) -> bool:
        labels = entry.container.labels
        return all(name in labels and value in (None, labels[name]) for name, value in self._labels)

    def _why_not(self, text: str) -> str:
        broken = (shelf.broken.get(ContainerId(text)) for shelf in self._shelves)
        return "; ".join(f"{place}: {reason}" for place, reason in filter(None, broken))

    # -- what is there -----------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Take over which containers there are; read those that are new."""
        for shelf in self._shelves:
            ids = shelf.source.ids()
            if ids is shelf.ids:
                continue
            for container_id in shelf.ids - ids:
                self._forget(shelf, container_id)
                shelf.broken.pop(container_id, None)
            for container_id in ids - shelf.ids:
                self._read(shelf, container_id)
            shelf.ids = ids  # only now: what could not be looked at is new the next time, too

    def _look_for_renamed(self) -> None:
        """Read again whoever may have got a name since it was read, and whoever could not be read."""
        for shelf in self._shelves:
            names = shelf.source.names()
            is_same = names is not None and names is shelf.compared
            renamed = [] if is_same else [one.id for one in shelf.entries.values() if shelf.source.renamed(one)]
            shelf.compared = names
            for container_id in {*renamed, *shelf.unsettled, *shelf.broken}:
                self._read(shelf, container_id)

    def _current(self, shelf: _Shelf, container_id: ContainerId) -> Entry | None:
        """Return a container of a shelf as it is now; None when it has none of this id."""
        entry = shelf.entries.get(container_id)
        if entry is not None and self._is_current(shelf, entry):
            return entry
        return self._read(shelf, container_id) if container_id in shelf.ids else None

    def _is_current(self, shelf: _Shelf, entry: Entry) -> bool:
        return entry.id not in shelf.unsettled and entry.holds() and not shelf.source.renamed(entry)

    def _read(self, shelf: _Shelf, container_id: ContainerId) -> Entry | None:
        """Read a container; None, with the reason kept, when that cannot be done."""
        self._forget(shelf, container_id)
        read_at = now()
        try:
            if parse_container_id(container_id) is None:
                raise MalformedError("its name cannot be a container id")
            entry = shelf.source.load(container_id)
        except Unavailable:
            raise
        except (ExecgateError, MalformedError) as error:
            problem = (shelf.source.place(container_id), getattr(error, "hint", "") or str(error))
            if shelf.broken.get(container_id) != problem:
                log.info("container left out: %s: %s", shown(problem[0], 512), shown(problem[1], 512))
            shelf.broken[container_id] = problem
            return None
        shelf.broken.pop(container_id, None)
        if entry is not None:
            shelf.entries[container_id] = entry
            if not entry.is_settled(read_at):
                shelf.unsettled.add(container_id)
            for name in entry.names:
                shelf.names.setdefault(name, set()).add(container_id)
        return entry

    def _forget(self, shelf: _Shelf, container_id: ContainerId) -> None:
        entry = shelf.entries.pop(container_id, None)
        shelf.unsettled.discard(container_id)
        for name in set(entry.names) if entry is not None else ():
            holders = shelf.names[name]
            holders.discard(container_id)
            if not holders:
                del shelf.names[name]

    def _taken(self) -> Problems:
        """Return the containers whose id an earlier engine has."""
        first: dict[ContainerId, Entry] = {}
        return [
            (entry.place, f"the id is taken by {first[container_id].place}")
            for shelf in self._shelves
            for container_id, entry in shelf.entries.items()
            if not entry.hidden and first.setdefault(container_id, entry) is not entry
        ]


def _to_anybody(_: Container) -> bool:
    return True


def _observe(entry: Entry) -> Container:
    """Return a container with the kernel's view of it."""
    if entry.init is None or not proc.is_alive(entry.init):
        return entry.container
    return entry.living(_status(entry, entry.init))


def _status(entry: Entry, init: ProcessIdentity) -> ContainerStatus:
    """Return the state of a container whose init lives; paused comes before created, as in runc."""
    if proc.frozen(init.pid):
        return ContainerStatus.PAUSED
    if key_or_none(entry.exec_fifo) is not None:
        return ContainerStatus.CREATED
    return ContainerStatus.RUNNING
