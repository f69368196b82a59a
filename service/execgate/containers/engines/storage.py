"""Podman's and CRI-O's containers: both keep them in containers/storage, often in the same one.

`GRAPHROOT/DRIVER-containers/containers.json` lists all containers with their names, from create to rm, and is replaced
at every change (`volatile-containers.json` has those that a reboot may forget). Podman keeps the bundle below it,
`ID/userdata/config.json`, from the first start to rm; CRI-O has one there and one in RUNROOT. The states are in the
default roots of the runtimes, which everybody shares (`oci.SharedRoots`). A record is CRI-O's if it belongs to a pod
sandbox. What Podman alone knows (labels, user, stop timeout) is in its own database (`podman_db`).

What they are called. Podman's: by the names in the list (a rename shows there, and only there). CRI-O's:
`pod/container` and `namespace/pod/container`, and the long name of the list; its sandboxes are left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from execgate.containers.engines.oci import SharedRoots
from execgate.containers.engines.podman_db import PodmanDatabase, PodmanRecord
from execgate.containers.entry import Entry, Look, table, text, text_table, texts
from execgate.containers.files import (
    FileKey,
    is_settled,
    key_if_there,
    key_or_none,
    now,
    parse_json,
    read_regular,
)
from execgate.containers.formats import parse_time
from execgate.containers.listing import Listing
from execgate.containers.states import (
    Specs,
    StateFile,
    annotations_of,
    read_spec_or_reason,
)
from execgate.model.container import Container, ContainerStatus, EngineName, ExecManner, OciRuntime
from execgate.model.errors import Internal, NotFound
from execgate.model.ids import ContainerId

_DRIVER = "-containers"
_FILES = ("containers.json", "volatile-containers.json")
_MAX_LIST = 256 * 1024 * 1024
_CRIO = "io.kubernetes.cri-o."


@dataclass(frozen=True, slots=True)
class StorageRecord:
    """One container of a list. `directory` is its own, `metadata` what its engine wrote about it."""

    names: tuple[str, ...]
    image_id: str
    created: float
    directory: str
    metadata: Mapping[str, object]

    @property
    def engine(self) -> EngineName | None:
        """Who made it: CRI-O writes of each of its containers to which pod it belongs. None for Buildah's."""
        if text(self.metadata.get("pod-id")):
            return EngineName.CRIO
        return EngineName.PODMAN if text(self.metadata.get("name")) else None


class Storage:
    """The containers of a containers/storage, read again when a list has changed."""

    def __init__(self, graph_root: Path, run_root: Path) -> None:
        """Read nothing yet."""
        self.graph_root = graph_root
        self._drivers = [Listing(str(graph_root)), Listing(str(run_root))]
        self._lists: dict[str, tuple[FileKey | None, Mapping[ContainerId, StorageRecord]]] = {}
        self._ids: dict[EngineName, frozenset[ContainerId]] = {}
        self.records: Mapping[ContainerId, StorageRecord] = {}
        self.problems: dict[str, str] = {}

    def ids(self, engine: EngineName) -> frozenset[ContainerId]:
        """Return the containers of one engine: the same object until they change."""
        if self._read_lists():
            # An id that is in both lists is a container of the first one, as in containers/storage.
            lists = sorted(self._lists.items(), key=lambda item: item[0].endswith(f"/{_FILES[0]}"))
            self.records = {key: record for _, (_, part) in lists for key, record in part.items()}
            for name in (EngineName.PODMAN, EngineName.CRIO):
                found = frozenset(key for key, record in self.records.items() if record.engine is name)
                if found != self._ids.get(name):
                    self._ids[name] = found
        return self._ids.get(engine, frozenset())

    def looks(self) -> list[Look]:
        """See EngineSource."""
        self.ids(EngineName.PODMAN)
        root = str(self.graph_root)
        if key_or_none(root) is None:
            return [Look(root, "not there", usable=False)]
        if root in self.problems:
            return [Look(root, self.problems[root], usable=False)]
        return [
            Look(path, self.problems.get(path, f"{len(self._lists[path][1])} containers"), path not in self.problems)
            for path in self._lists
        ] or [Look(root, "no list of containers", usable=False)]

    def _read_lists(self) -> bool:
        """Read the lists that have changed; return whether any has."""
        paths = [
            f"{drivers.path}/{name}/{file}"
            for drivers in self._drivers
            for name in sorted(self._driver_names(drivers))
            for file in _FILES
        ]
        changed = False
        for path in dict.fromkeys((*paths, *self._lists)):
            changed |= self._read_list(path)
        return changed

    def _driver_names(self, listing: Listing) -> list[str]:
        try:
            names = listing.names()
        except Internal as error:
            self.problems[listing.path] = error.hint
            return []
        self.problems.pop(listing.path, None)
        return [name for name in names if name.endswith(_DRIVER)]

    def _read_list(self, path: str) -> bool:
        """Read one list if it has changed; return whether it was read. One that is broken stays as it was read before.

        Raises Unavailable.
        """
        key, records = self._lists.get(path, (None, {}))
        read_at = now()
        try:
            found = key_if_there(path)
            if found is None:
                return self._drop_list(path)
            if found == key:
                return False
            data, key = read_regular(Path(path), limit=_MAX_LIST)
            items = parse_json(data or b"[]")
        except NotFound:
            return self._drop_list(path)
        except (Internal, ValueError, RecursionError) as error:
            self.problems[path] = getattr(error, "hint", "") or "not JSON"
            self._lists[path] = (None, records)
            return False
        self._lists[path] = (key if is_settled(key, read_at) else None, self._records(path, items))
        return True

    def _drop_list(self, path: str) -> bool:
        """Forget a list that is gone; return whether it was known."""
        self.problems.pop(path, None)
        return self._lists.pop(path, None) is not None

    def _records(self, path: str, items: object) -> dict[ContainerId, StorageRecord]:
        """Return the containers of a list; one item that is none breaks no other."""
        self.problems.pop(path, None)
        if not isinstance(items, list):
            self.problems[path] = "not a list"
            return {}
        directory = path.rpartition("/")[0]
        found = [_record(item, directory) for item in items]
        if None in found:
            self.problems[path] = f"{found.count(None)} of its {len(found)} items are no containers"
        return dict(filter(None, found))


class StorageSource:
    """The containers of Podman, or of CRI-O, in a `Storage`."""

    def __init__(
        self,
        engine: EngineName,
        storage: Storage,
        roots: SharedRoots,
        specs: Specs,
        database: PodmanDatabase | None = None,
    ) -> None:
        """`database` is Podman's own."""
        self.engine = engine
        self._storage = storage
        self._roots = roots
        self._specs = specs
        self._database = database

    def ids(self) -> frozenset[ContainerId]:
        """See EngineSource."""
        return self._storage.ids(self.engine)

    def load(self, container_id: ContainerId) -> Entry | None:
        """See EngineSource."""
        record = self._storage.records.get(container_id)
        if record is None:
            return None
        known = self._database.find(container_id) if self._database is not None else PodmanRecord()
        state, runtime = self._state(container_id, known)
        spec_path = state.spec_path if state else f"{record.directory}/userdata/config.json"
        spec, spec_key, flaw = read_spec_or_reason(self._specs, spec_path)
        annotations = annotations_of(spec)
        process = table(spec.get("process"))
        absent = tuple((path, None) for path in self._roots.places(container_id))
        files = state.read_from if state else (*absent, (spec_path, spec_key))
        name, *aliases = self._names(container_id, record, annotations)
        container = Container(
            id=container_id,
            name=name,
            aliases=tuple(aliases),
            engine=self.engine,
            runtime=runtime,
            bundle=state.state.bundle if state else Path(spec_path).parent,
            status=ContainerStatus.CREATED if state is None and spec_key is None else ContainerStatus.EXITED,
            created=record.created or (state.state.created if state else 0.0),
            exit_code=known.exit_code,
            labels=known.labels if self.engine is EngineName.PODMAN else _crio_labels(annotations),
            image=text(record.metadata.get("image-name")) or annotations.get(f"{_CRIO}ImageName", ""),
            image_id=record.image_id,
            command=known.command or texts(process.get("args")),
            user=known.user,
            tty=process.get("terminal") is True,
            privileged=known.privileged or annotations.get("io.podman.annotations.privileged") == "TRUE",
            stop_timeout=known.stop_timeout if self._database is not None else _grace_period(annotations),
            manner=ExecManner(env=known.env, ambient_when_privileged=self.engine is EngineName.PODMAN),
        )
        return Entry(
            container=container,
            spec_path=spec_path,
            place=record.directory,
            read_from=(*files, *known.read_from),
            init=state.state.init if state else None,
            exec_fifo=state.exec_fifo if state else "",
            flaw=flaw if state else "",
            hidden=self.engine is EngineName.CRIO
            and (annotations.get(f"{_CRIO}ContainerType") == "sandbox" or record.metadata.get("pod") is True),
        )

    def place(self, container_id: ContainerId) -> str:
        """See EngineSource."""
        record = self._storage.records.get(container_id)
        return record.directory if record is not None else container_id

    def renamed(self, entry: Entry) -> bool:
        """See EngineSource: the list is read with the ids."""
        record = self._storage.records.get(entry.id)
        if record is None:
            return True
        own = record.names or (entry.id,)
        return entry.names != (own if self.engine is EngineName.PODMAN else (*entry.names[:2], *record.names))

    def names(self) -> object:
        """See EngineSource: what was read of the lists."""
        return self._storage.records

    def problems(self) -> Mapping[str, str]:
        """See EngineSource."""
        return self._storage.problems | (self._database.problems if self._database is not None else {})

    def looks(self) -> Sequence[Look]:
        """See EngineSource."""
        return self._storage.looks() + (self._database.looks() if self._database is not None else [])

    def _state(self, container_id: ContainerId, known: PodmanRecord) -> tuple[StateFile | None, OciRuntime]:
        try:
            return self._roots.read(container_id, known.runtime)
        except NotFound:
            name = known.runtime or "crun"
            return None, OciRuntime(name, Path(name), Path(self._roots.place(container_id)).parent)

    def _names(
        self, container_id: ContainerId, record: StorageRecord, annotations: Mapping[str, str]
    ) -> tuple[str, ...]:
        if self.engine is EngineName.PODMAN:
            return record.names or (container_id,)
        pod = annotations.get("io.kubernetes.pod.name") or text(record.metadata.get("pod-name"))
        container = annotations.get("io.kubernetes.container.name") or text(record.metadata.get("metadata-name"))
        space = annotations.get("io.kubernetes.pod.namespace") or text(record.metadata.get("namespace"))
        short = f"{pod}/{container}"
        return (short, f"{space}/{short}", *record.names)


def _record(item: object, directory: str) -> tuple[ContainerId, StorageRecord] | None:
    """Return a record of a list; None for what is none."""
    fields: Mapping[str, Any] = table(item)
    container_id = text(fields.get("id"))
    if not container_id or "/" in container_id:
        return None
    try:
        metadata = table(parse_json(text(fields.get("metadata")) or "{}"))
    except (ValueError, RecursionError):
        metadata = {}
    record = StorageRecord(
        names=tuple(filter(None, texts(fields.get("names")))),
        image_id=text(fields.get("image")),
        created=parse_time(fields.get("created")),
        directory=f"{directory}/{container_id}",
        metadata=metadata,
    )
    return ContainerId(container_id), record


def _grace_period(annotations: Mapping[str, str]) -> float | None:
    period = annotations.get("io.kubernetes.pod.terminationGracePeriod", "")
    return float(period) if period.isdecimal() and len(period) < 10 else None


def _crio_labels(annotations: Mapping[str, str]) -> dict[str, str]:
    """Return the labels that CRI-O was given with a container: JSON within an annotation."""
    try:
        return text_table(parse_json(annotations.get(f"{_CRIO}Labels", "{}")))
    except (ValueError, RecursionError):
        return {}
