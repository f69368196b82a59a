"""The state directories of OCI runtimes: what runc and crun wrote about one container, with its bundle's config.json.

What a runtime wrote does not change while the file does not: a `StateFile` names each file it was made from with the
`FileKey` it had, and stays true as long as those do. What does change behind them, the life of the init process and
the freezer, is asked of the kernel each time (`catalog`).
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from execgate.containers.files import FileKey, is_settled, key_if_there, key_or_none, now, read_json
from execgate.containers.formats import EXEC_FIFO, FORMATS, Format, MalformedError, RuntimeState
from execgate.model.container import OciRuntime
from execgate.model.errors import Internal, NotFound
from execgate.model.ids import ContainerId
from execgate.oci.text import shown

MAX_STATE = 16 * 1024 * 1024
MAX_SPEC = 16 * 1024 * 1024
_MAX_KEPT_SPECS = 64

Source = tuple[str, FileKey | None]
"""A path, and the key that what it named had; None: there was nothing."""


@dataclass(frozen=True, slots=True)
class RuntimeRoot:
    """A directory in which a runtime keeps the states of its containers.

    `runtime_name` picks the program among the configured ones; None lets the format of each entry decide.
    """

    dir: Path
    runtime_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFile:
    """One state directory as it was read. `spec_path` is where its config.json is, or should be."""

    directory: str
    format: Format
    state: RuntimeState
    spec_path: str
    read_from: tuple[Source, ...]

    @property
    def exec_fifo(self) -> str:
        """What exists until the init process has been released."""
        return f"{self.directory}/{EXEC_FIFO}"


class Specs:
    """The config.json of bundles, parsed; the last few are kept. What it returns is shared: treat it as frozen."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[FileKey, Mapping[str, Any]]] = {}

    def read(self, path: str) -> tuple[Mapping[str, Any], FileKey]:
        """Return a config.json with its key. Raises NotFound, Internal, Unavailable."""
        kept = self._kept.pop(path, None)
        if kept is None or key_if_there(path) != kept[0]:
            read_at = now()
            spec, key = read_json(Path(path), limit=MAX_SPEC, follow=True)
            if not is_settled(key, read_at):
                return spec, key
            kept = (key, spec)
        # Put back last: a dict keeps its order, and what was not used for longest is first.
        self._kept[path] = kept
        while len(self._kept) > _MAX_KEPT_SPECS:
            self._kept.pop(next(iter(self._kept)), None)
        return kept[1], kept[0]


def read_state(directory: str, container_id: ContainerId) -> StateFile:
    """Read a container's state directory.

    Raises NotFound when it is not there, MalformedError when nothing in it is a state, Internal, Unavailable.
    """
    for form in FORMATS:
        path = f"{directory}/{form.file_name}"
        try:
            document, key = read_json(Path(path), limit=MAX_STATE)
        except NotFound:
            continue
        state = form.parse(container_id, document)
        spec_path = _spec_path(directory, state.bundle)
        return StateFile(
            directory=directory,
            format=form,
            state=state,
            spec_path=spec_path,
            read_from=((path, key), (spec_path, key_or_none(spec_path))),
        )
    if key_or_none(directory) is None:
        raise NotFound("no such container", hint=directory)
    raise MalformedError(f"it has none of {', '.join(form.file_name for form in FORMATS)}")


class Programs:
    """The programs of the runtimes: the configured ones by name, else what is on the PATH."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        """Take the configured ones: each name with its absolute path."""
        self._paths = dict(paths)

    def find(self, name: str) -> Path:
        """Return the program of the runtime that an engine calls `name`, which may be a path. Raises MalformedError."""
        path = self._paths.get(name) or shutil.which(name)
        if path is None:
            raise MalformedError(f"no program is known for the runtime {shown(name)}")
        return Path(path)

    def runtime(self, root: Path, state: StateFile, name: str | None = None) -> OciRuntime:
        """Return the runtime that holds a state: by its maker's word where there is one, else by its format."""
        program = self.find(name or state.format.runtime)
        known_as = program.name if name and "/" in name else name or state.format.runtime
        return OciRuntime(known_as, program, root, systemd_cgroup=state.state.systemd_cgroup)


def annotations_of(spec: Mapping[str, Any]) -> dict[str, str]:
    """Return the annotations of a config.json; what is no text is left out."""
    given = spec.get("annotations")
    texts = given.items() if isinstance(given, Mapping) else ()
    return {name: value for name, value in texts if isinstance(value, str)}


def read_spec_or_reason(specs: Specs, path: str) -> tuple[Mapping[str, Any], FileKey | None, str]:
    """Return a config.json, its key, and "" or why there is none: a container without one can still be listed."""
    try:
        spec, key = specs.read(path)
    except (NotFound, Internal) as error:
        return {}, key_or_none(path), error.hint
    return spec, key, ""


def _spec_path(directory: str, bundle: Path) -> str:
    """Return crun's copy of the configuration if there is one, else the bundle's own.

    The copy is what the container was made from, and the bundle may have been edited since.
    """
    copy = f"{directory}/config.json"
    return copy if key_or_none(copy) is not None else f"{bundle}/config.json"
