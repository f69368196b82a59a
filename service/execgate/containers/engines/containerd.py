"""containerd's containers, in every namespace but Docker's: Kubernetes pods, nerdctl's, ctr's.

A container that has a task has a bundle, `STATE/io.containerd.runtime.v2.task/NAMESPACE/ID`, and a state of runc in
the root that its `options.json` names, else in the shim's own default, which does not follow `STATE`. A container
without a task is in containerd's database only, and nobody can exec into it: it is not shown.

What they are called. Kubernetes: `pod/container` and `namespace/pod/container`, by the annotations of the CRI plugin;
its sandboxes hold no program of the user's and are left out, as in `crictl ps`. nerdctl: the name in its name store,
which is where a rename shows, else the annotation. Everything else: the id, which the user chose.
"""

from collections.abc import Mapping, Sequence
from itertools import filterfalse
from pathlib import Path

from execgate.containers import bolt
from execgate.containers.engines.places import Places
from execgate.containers.engines.shim import check_shim, read_options, shim_runtime
from execgate.containers.entry import Entry, Look, table, text, texts
from execgate.containers.files import FileKey, is_settled, key_or_none, now, read_regular
from execgate.containers.listing import Listing
from execgate.containers.states import (
    Programs,
    Specs,
    annotations_of,
    read_spec_or_reason,
    read_state,
)
from execgate.model.container import Container, ContainerStatus, EngineName
from execgate.model.errors import ExecgateError, Internal, NotFound
from execgate.model.ids import ContainerId

_TASKS = "io.containerd.runtime.v2.task"
_METADATA = "io.containerd.metadata.v1.bolt/meta.db"
_CRI = "io.kubernetes.cri."
_NERDCTL = "nerdctl/"


class ContainerdSource:
    """The containers of one containerd."""

    engine = EngineName.CONTAINERD

    def __init__(self, places: Places, specs: Specs, programs: Programs) -> None:
        """Read nothing yet."""
        state = places.containerd_state
        self._database = f"{places.containerd_root}/{_METADATA}"
        self._runc_root = places.containerd_runc_root
        self._specs = specs
        self._programs = programs
        self._namespaces = Listing(f"{state}/{_TASKS}")
        self._tasks: dict[str, Listing] = {}
        self._parts: dict[str, frozenset[str]] = {}
        self._namespace_of: dict[ContainerId, str] = {}
        self._ids: frozenset[ContainerId] = frozenset()
        self._names = NerdctlNames(places.nerdctl_root)
        self._problems: dict[str, str] = {}

    def ids(self) -> frozenset[ContainerId]:
        """See EngineSource. Of two namespaces that have the same id the first one counts; the other is a problem."""
        self._problems = {}
        self._names.refresh()
        parts = {namespace: self._listed(listing) for namespace, listing in self._listings().items()}
        if parts.keys() != self._parts.keys() or any(parts[name] is not self._parts[name] for name in parts):
            self._parts = parts
            self._namespace_of = {
                ContainerId(name): namespace for namespace in sorted(parts, reverse=True) for name in parts[namespace]
            }
            self._ids = frozenset(self._namespace_of)
        if sum(map(len, parts.values())) != len(self._ids):
            for namespace, names in parts.items():
                for name in names:
                    if (first := self._namespace_of[ContainerId(name)]) != namespace:
                        self._problems[self._bundle(namespace, name)] = f"the id is taken by the namespace {first}"
        return self._ids

    def load(self, container_id: ContainerId) -> Entry | None:
        """See EngineSource."""
        namespace = self._namespace_of.get(container_id, "")
        bundle = self._bundle(namespace, container_id)
        if key_or_none(bundle) is None:
            return None
        check_shim(bundle)
        options = read_options(bundle)
        root = Path(text(options.get("root")) or self._runc_root) / namespace
        state = read_state(f"{root}/{container_id}", container_id)
        spec, _, flaw = read_spec_or_reason(self._specs, state.spec_path)
        annotations = annotations_of(spec)
        image, labels = self._record(namespace, container_id)
        process = table(spec.get("process"))
        name, *aliases = self._names_of(namespace, container_id, annotations)
        container = Container(
            id=container_id,
            name=name,
            aliases=tuple(aliases),
            engine=self.engine,
            runtime=shim_runtime(state, root, self._programs),
            bundle=state.state.bundle,
            status=ContainerStatus.EXITED,
            created=state.state.created,
            labels={"io.containerd.namespace": namespace} | annotations | labels,
            image=annotations.get(f"{_CRI}image-name", "") or image,
            command=texts(process.get("args")),
            user=annotations.get(f"{_NERDCTL}user", ""),
            tty=process.get("terminal") is True,
        )
        return Entry(
            container=container,
            spec_path=state.spec_path,
            place=bundle,
            read_from=state.read_from,
            init=state.state.init,
            exec_fifo=state.exec_fifo,
            flaw=flaw,
            hidden=annotations.get(f"{_CRI}container-type") == "sandbox",
        )

    def place(self, container_id: ContainerId) -> str:
        """See EngineSource."""
        return self._bundle(self._namespace_of.get(container_id, ""), container_id)

    def renamed(self, entry: Entry) -> bool:
        """See EngineSource: only nerdctl renames, and its stores are read with the ids."""
        name = self._names.find(self._namespace_of.get(entry.id, ""), entry.id)
        return name not in ("", entry.names[0])

    def names(self) -> object:
        """See EngineSource: what was read of nerdctl's stores."""
        return self._names.all

    def problems(self) -> Mapping[str, str]:
        """See EngineSource."""
        return self._problems

    def looks(self) -> Sequence[Look]:
        """See EngineSource."""
        if key_or_none(self._namespaces.path) is None:
            return [Look(self._namespaces.path, "not there", usable=False)]
        self.ids()
        found = [
            Look(listing.path, f"{len(self._listed(listing))} tasks", usable=listing.path not in self._problems)
            for listing in self._listings().values()
        ]
        return found or [Look(self._namespaces.path, "no namespaces")]

    def _listings(self) -> dict[str, Listing]:
        namespaces = frozenset(filterfalse(_is_dockers, self._listed(self._namespaces)))
        if namespaces != self._tasks.keys():
            self._tasks = {
                name: self._tasks.get(name) or Listing(f"{self._namespaces.path}/{name}") for name in sorted(namespaces)
            }
        return self._tasks

    def _listed(self, listing: Listing) -> frozenset[str]:
        try:
            return listing.names()
        except Internal as error:
            self._problems[listing.path] = error.hint
            return frozenset()

    def _bundle(self, namespace: str, name: str) -> str:
        return f"{self._namespaces.path}/{namespace}/{name}"

    def _names_of(self, namespace: str, container_id: ContainerId, annotations: Mapping[str, str]) -> tuple[str, ...]:
        """Return what a container is called."""
        pod, container = annotations.get(f"{_CRI}sandbox-name"), annotations.get(f"{_CRI}container-name")
        if pod and container:
            name = f"{pod}/{container}"
            space = annotations.get(f"{_CRI}sandbox-namespace")
            return (name, f"{space}/{name}") if space else (name,)
        return (self._names.find(namespace, container_id) or annotations.get(f"{_NERDCTL}name") or container_id,)

    def _record(self, namespace: str, container_id: ContainerId) -> tuple[str, dict[str, str]]:
        """Return a container's image and labels as containerd has them; neither when its database cannot be read."""
        path = (b"v1", namespace.encode(), b"containers", container_id.encode())

        def question(root: bolt.Bucket) -> tuple[str, dict[str, str]]:
            bucket = root.bucket(*path)
            if bucket is None:
                return "", {}
            labels = bucket.bucket(b"labels")
            return _decoded(bucket.get(b"image")), {
                _decoded(name): _decoded(value) for name, value in (labels.items() if labels else ())
            }

        try:
            return bolt.read(Path(self._database), question)
        except ExecgateError as error:
            if not isinstance(error, NotFound):
                self._problems[self._database] = error.hint
            return "", {}


class NerdctlNames:
    """nerdctl's name stores: `ROOT/ADDRESS/names/NAMESPACE/NAME`, each file holding the id of who has that name."""

    def __init__(self, root: Path) -> None:
        """Read nothing yet."""
        self._addresses = Listing(str(root))
        self._namespaces: dict[str, Listing] = {}
        self._seen: dict[str, FileKey | None] = {}
        self._holders: dict[str, tuple[FileKey | None, str]] = {}
        self._names: dict[tuple[str, str], str] = {}

    @property
    def all(self) -> Mapping[tuple[str, str], str]:
        """The names as of the last `refresh`, by namespace and id: the same object until they are read again."""
        return self._names

    def find(self, namespace: str, container_id: str) -> str:
        """Return the name of a container as of the last `refresh`, "" without one."""
        return self._names.get((namespace, container_id), "")

    def refresh(self) -> None:
        """Take over what has changed, which costs a stat of each store when nothing has. Raises Unavailable."""
        read_at = now()
        stores = {
            f"{names}/{namespace}": namespace
            for names in (f"{self._addresses.path}/{address}/names" for address in _listed(self._addresses))
            for namespace in _listed(self._namespaces.setdefault(names, Listing(names)))
        }
        keys = {store: key_or_none(store) for store in stores}
        if keys == self._seen:
            return
        found = {
            (store, name): self._holder(f"{store}/{name}", read_at)
            for store in stores
            for name in _listed(Listing(store, directories=False))
        }
        self._holders = {f"{store}/{name}": holder for (store, name), holder in found.items()}
        self._names = {(stores[store], holder): name for (store, name), (_, holder) in found.items()}
        is_final = all(key is not None and is_settled(key, read_at) for key in keys.values())
        self._seen = keys if is_final else {}

    def _holder(self, path: str, read_at: int) -> tuple[FileKey | None, str]:
        """Return who has a name, and the key of the file that says so; None when the next look has to read it again."""
        kept = self._holders.get(path)
        if kept is not None and kept[0] is not None and kept[0] == key_or_none(path):
            return kept
        try:
            data, key = read_regular(Path(path), limit=4096)
        except (NotFound, Internal):
            return None, ""
        return key if is_settled(key, read_at) else None, data.decode(errors="replace").strip()


def _listed(listing: Listing) -> frozenset[str]:
    """Return the names in a directory, none when it cannot be looked at."""
    try:
        return listing.names()
    except Internal:
        return frozenset()


def _is_dockers(namespace: str) -> bool:
    """Return whether a namespace is dockerd's (`moby`, `moby-UID.GID`, its plugins), or BuildKit's."""
    return namespace.removeprefix("plugins.").partition("-")[0] == "moby" or namespace == "buildkit"


def _decoded(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")
