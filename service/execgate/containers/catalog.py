"""The containers of bare OCI runtimes: the catalog of their state roots.

The theory. A state root is the truth about which containers exist; it is read at each question, nothing is
watched. What a runtime wrote about a container does not change while the file does not, so parsed files are
kept by `FileKey`, and a look at a known container costs a few system calls. What *does* change behind the
file, the life of the init process and the freezer, is asked of the kernel each time: a state file goes on
saying "running" of a container that died.

What always holds:

- No path is built from what a client sent. A reference is checked for form, then compared with names that a
  scan of the root found.
- One broken entry breaks no other. It is left out, and `problems` says why.
- One id, one container: of two roots that hold the same id the earlier one wins, and the other is a problem.
- An error that means "we cannot look" (Unavailable) is raised, never read as "there is none".

All methods are synchronous, do short local file reads, and may be called from several threads.
"""

import logging
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from execgate.containers import proc
from execgate.containers.files import FileKey, key_of, read_json, translate
from execgate.containers.formats import (
    EXEC_FIFO,
    FORMATS,
    Format,
    MalformedError,
    RuntimeState,
    parse_container_id,
)
from execgate.model.container import Container, ContainerBinding, ContainerStatus, OciRuntime
from execgate.model.errors import Conflict, ExecgateError, Internal, InvalidArgument, NotFound, Unavailable
from execgate.model.ids import ContainerId
from execgate.oci.text import shown

MAX_STATE = 16 * 1024 * 1024
MAX_SPEC = 16 * 1024 * 1024
_MAX_KEPT_SPECS = 64

_log = logging.getLogger(__name__)

Naming = Callable[[ContainerId, Mapping[str, str]], str]
"""From a container's id and annotations to its name."""

Problems = list[tuple[Path, str]]
"""Directories that were left out, each with the reason."""


@dataclass(frozen=True, slots=True)
class RuntimeRoot:
    """A directory in which a runtime keeps the states of its containers.

    `runtime_name` picks the program among those given to the catalog; None lets the format of each entry
    decide.
    """

    dir: Path
    runtime_name: str | None = None


@dataclass(frozen=True, slots=True)
class _Entry:
    """A container as its files have it: everything but the kernel's view."""

    id: ContainerId
    name: str
    runtime: OciRuntime
    directory: Path
    state: RuntimeState
    annotations: Mapping[str, str]
    keys: tuple[str, FileKey, str, FileKey | None]
    """State file and spec file with the keys they had; None: there was no usable spec."""
    exec_fifo: str


def default_roots(environ: Mapping[str, str], *, uid: int) -> list[RuntimeRoot]:
    """Return where runc and crun keep states when nobody says otherwise.

    That is /run; for a user other than root, `$XDG_RUNTIME_DIR` before it.
    """
    bases = [Path("/run")]
    private = environ.get("XDG_RUNTIME_DIR", "")
    if uid != 0 and private.startswith("/"):
        bases.insert(0, Path(private))
    return [RuntimeRoot(base / form.runtime) for base in bases for form in FORMATS]


def id_as_name(container_id: ContainerId, _annotations: Mapping[str, str]) -> str:
    """Name a container as the bare runtimes do, which have nothing but ids."""
    return container_id


class Catalog:
    """The containers of a sequence of state roots."""

    def __init__(
        self, roots: Sequence[RuntimeRoot], runtimes: Mapping[str, Path], *, naming: Naming = id_as_name
    ) -> None:
        """Read nothing yet. `runtimes` maps the name of each runtime to its program's absolute path."""
        self._roots = tuple(roots)
        self._runtimes = dict(runtimes)
        self._naming = naming
        # Paths as text: this is looked at several times a request, and a Path costs more than the system call.
        self._entries: dict[str, _Entry] = {}
        self._specs: dict[str, tuple[FileKey, Mapping[str, Any]]] = {}
        self._problems: dict[Path, str] = {}

    def list(self) -> list[Container]:
        """Return every readable container, in all states, in the order of the roots, then by id.

        Raises Unavailable when the host is out of descriptors or memory.
        """
        return [self._observe(entry) for entry in self._scan()]

    def find(self, ref: str) -> Container:
        """Return the container that `ref` means: a full id, else a name (`/name` too), else an id's unique
        prefix.

        Raises NotFound, InvalidArgument for an ambiguous prefix, Unavailable.
        """
        text = ref.removeprefix("/")
        wanted = parse_container_id(text)
        if wanted is None:
            raise NotFound(f"No such container: {shown(ref)}")
        entry = self._lookup(wanted)
        return self._observe(entry if entry is not None else self._search(text, ref))

    def get(self, container_id: ContainerId) -> Container | None:
        """Return the container with this full id, None when there is none, or none that can be read."""
        wanted = parse_container_id(container_id)
        entry = self._lookup(wanted) if wanted is not None else None
        return self._observe(entry) if entry is not None else None

    def problems(self) -> Problems:
        """Return the entries that were left out when last looked at, each with its reason."""
        return sorted(self._problems.copy().items())

    def spec(self, container: Container) -> Mapping[str, Any]:
        """Return the parsed config.json of a container; it is shared, so treat it as frozen, all the way
        down.

        crun's own copy in the state root comes before the bundle's: it is what the container was made from,
        and the bundle may have been edited since. Raises NotFound when there is none, Internal when it is
        unusable.
        """
        path = _spec_path(f"{container.runtime.root}/{container.id}", container.bundle)
        try:
            return self._read_spec(path)[0]
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

    # -- which entries there are

    def _scan(self) -> tuple[_Entry, ...]:
        """Return the entries of all roots, and forget what is no longer there."""
        found: dict[ContainerId, _Entry] = {}
        seen: set[Path] = set()
        for root in self._roots:
            seen.add(root.dir)
            for name in self._names(root):
                seen.add(root.dir / name)
                entry = self._load(root, name)
                if entry is not None and found.setdefault(entry.id, entry) is not entry:
                    other = found[entry.id].directory
                    self._report(entry.directory, f"the id is taken by {other}")
        for path in [path for path in self._problems.copy() if path not in seen]:
            self._problems.pop(path, None)
        for text in [text for text in self._entries.copy() if Path(text) not in seen]:
            self._entries.pop(text, None)
        return tuple(found.values())

    def _lookup(self, container_id: ContainerId) -> _Entry | None:
        """Return one entry by its full id."""
        # A name that a scan once found, in whichever root, needs no other scan: a look at each root is enough.
        scanned = any(f"{root.dir}/{container_id}" in self._entries for root in self._roots)
        for root in self._roots:
            if _is_directory(f"{root.dir}/{container_id}") if scanned else container_id in self._names(root):
                entry = self._load(root, container_id)
                if entry is not None:
                    return entry
        return None

    def _search(self, text: str, ref: str) -> _Entry:
        """Return the entry of a name or a unique prefix."""
        entries = self._scan()
        matches = [entry for entry in entries if entry.name == text] or [
            entry for entry in entries if entry.id.startswith(text)
        ]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise InvalidArgument(f"multiple IDs found with provided prefix: {shown(text)}")
        reasons = [f"{path}: {reason}" for path, reason in self.problems() if path.name == text]
        raise NotFound(f"No such container: {shown(ref)}", hint="; ".join(reasons))

    def _names(self, root: RuntimeRoot) -> Sequence[str]:
        """Return the names of the directories in a root, sorted; a root that does not exist yet has none."""
        try:
            with os.scandir(root.dir) as entries:
                # A dot begins what is the runtime's own (crun's .cache). Symlinks are nobody's.
                names = [e.name for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)]
        except OSError as error:
            translated = translate(error, str(root.dir))
            if isinstance(translated, Unavailable):
                raise translated from error
            if not isinstance(error, FileNotFoundError):
                self._report(root.dir, error.strerror or str(error))
            return []
        self._problems.pop(root.dir, None)
        return sorted(names)

    # -- one entry

    def _load(self, root: RuntimeRoot, name: str) -> _Entry | None:
        """Return the entry of one directory; None, with its problem kept, when it cannot be read."""
        directory = root.dir / name
        try:
            entry = self._cached(str(directory)) or self._read(root, directory)
        except Unavailable:
            raise
        except (ExecgateError, MalformedError) as error:
            self._entries.pop(str(directory), None)
            # A container that was deleted meanwhile is no problem.
            if _key_or_none(directory) is None:
                self._problems.pop(directory, None)
            else:
                self._report(directory, getattr(error, "hint", "") or str(error))
            return None
        self._entries[str(directory)] = entry
        if entry.keys[3] is not None:
            self._problems.pop(directory, None)
        return entry

    def _cached(self, directory: str) -> _Entry | None:
        entry = self._entries.get(directory)
        if entry is None:
            return None
        state_path, state_key, spec_path, spec_key = entry.keys
        unchanged = _key_or_none(state_path) == state_key and _key_or_none(spec_path) == spec_key
        return entry if unchanged else None

    def _read(self, root: RuntimeRoot, directory: Path) -> _Entry:
        container_id = parse_container_id(directory.name)
        if container_id is None:
            raise MalformedError("its name cannot be a container id")
        form, document, state_key = _read_state(directory)
        state = form.parse(container_id, document)
        spec_path = _spec_path(str(directory), state.bundle)
        annotations, spec_key = self._annotations(directory, spec_path)
        return _Entry(
            id=container_id,
            name=self._naming(container_id, annotations),
            runtime=self._runtime(root, form),
            directory=directory,
            state=state,
            annotations=annotations,
            keys=(f"{directory}/{form.file_name}", state_key, spec_path, spec_key),
            exec_fifo=f"{directory}/{EXEC_FIFO}",
        )

    def _runtime(self, root: RuntimeRoot, form: Format) -> OciRuntime:
        name = root.runtime_name or form.runtime
        path = self._runtimes.get(name)
        if path is None:
            raise MalformedError(f"no program is known for the runtime {shown(name)}")
        return OciRuntime(name, path, root.dir)

    def _annotations(self, directory: Path, spec_path: str) -> tuple[Mapping[str, str], FileKey | None]:
        """Return a bundle's annotations; without a config.json a container can still be listed."""
        try:
            spec, key = self._read_spec(spec_path)
        except (NotFound, Internal) as error:
            self._report(directory, error.hint)
            return {}, None
        given = spec.get("annotations")
        texts = given.items() if isinstance(given, Mapping) else ()
        return {name: value for name, value in texts if isinstance(value, str)}, key

    def _read_spec(self, path: str) -> tuple[Mapping[str, Any], FileKey]:
        kept = self._specs.pop(path, None)
        if kept is None or key_of(path) != kept[0]:
            spec, key = read_json(Path(path), limit=MAX_SPEC, follow=True)
            kept = (key, spec)
        # Put back last: a dict keeps its order, and what was not used for longest is first.
        self._specs[path] = kept
        while len(self._specs) > _MAX_KEPT_SPECS:
            self._specs.pop(next(iter(self._specs)), None)
        return kept[1], kept[0]

    def _report(self, path: Path, reason: str) -> None:
        if self._problems.get(path) != reason:
            _log.info("container state left out: %s: %s", shown(str(path), 512), shown(reason, 512))
        self._problems[path] = reason

    # -- the kernel's view

    def _observe(self, entry: _Entry) -> Container:
        status = _status(entry)
        return Container(
            id=entry.id,
            name=entry.name,
            runtime=entry.runtime,
            bundle=entry.state.bundle,
            status=status,
            created=entry.state.created,
            init=None if status is ContainerStatus.EXITED else entry.state.init,
            annotations=dict(entry.annotations),
        )


def _status(entry: _Entry) -> ContainerStatus:
    """Return the state of a container by the kernel; paused comes before created, as in runc."""
    if not proc.is_alive(entry.state.init):
        return ContainerStatus.EXITED
    if proc.frozen(entry.state.init.pid):
        return ContainerStatus.PAUSED
    if _key_or_none(entry.exec_fifo) is not None:
        return ContainerStatus.CREATED
    return ContainerStatus.RUNNING


def _read_state(directory: Path) -> tuple[Format, dict[str, Any], FileKey]:
    for form in FORMATS:
        try:
            document, key = read_json(directory / form.file_name, limit=MAX_STATE)
        except NotFound:
            continue
        return form, document, key
    raise MalformedError(f"it has none of {', '.join(form.file_name for form in FORMATS)}")


def _spec_path(directory: str, bundle: Path) -> str:
    """Return crun's copy of the configuration if there is one, else the bundle's own."""
    copy = f"{directory}/config.json"
    return copy if _key_or_none(copy) is not None else f"{bundle}/config.json"


def _is_directory(path: str) -> bool:
    """Whether `path` itself is a directory: symlinks in a state root are nobody's."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def _key_or_none(path: str | Path) -> FileKey | None:
    try:
        return key_of(path)
    except (NotFound, Internal):
        return None
