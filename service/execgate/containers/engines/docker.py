"""Docker's containers.

dockerd keeps two files a container below its data root, `containers/ID/config.v2.json` and `hostconfig.json`, from
create to rm, and replaces them atomically at every change, a rename included. A container that runs also has a state
of its runtime, `EXEC_ROOT/runtime-NAME/moby/ID`, and a bundle of containerd's, whose `options.json` tells the program.
A stopped one has neither. (Seen with 20.10; the same in the source of 29.)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from execgate.containers.engines.shim import shim_runtime
from execgate.containers.entry import Entry, Look, seconds, table, text, text_table, texts
from execgate.containers.files import FileKey, key_or_none, read_json
from execgate.containers.formats import MalformedError, parse_time
from execgate.containers.listing import Listing
from execgate.containers.states import (
    MAX_STATE,
    Programs,
    Source,
    Specs,
    StateFile,
    read_spec_or_reason,
    read_state,
)
from execgate.model.container import Container, ContainerStatus, EngineName, ExecManner, OciRuntime
from execgate.model.errors import Internal, NotFound
from execgate.model.ids import ContainerId

_NAMESPACE = "moby"
"""Docker's namespace in containerd, and the last part of its runtimes' roots; `moby-UID.GID` with remapped users."""

_RUNTIME_ROOT = "runtime-"
_DEFAULT_RUNTIME = "runc"


class DockerSource:
    """The containers of one dockerd."""

    engine = EngineName.DOCKER

    def __init__(self, data_root: Path, exec_root: Path, specs: Specs, programs: Programs) -> None:
        """Read nothing yet; where they are is dockerd's `--data-root` and `--exec-root`."""
        self._exec_root = exec_root
        self._specs = specs
        self._programs = programs
        self._containers = Listing(f"{data_root}/containers")
        self._ids: frozenset[ContainerId] = frozenset()
        self._problems: dict[str, str] = {}

    def ids(self) -> frozenset[ContainerId]:
        """See EngineSource."""
        try:
            self._ids = cast("frozenset[ContainerId]", self._containers.names())
        except Internal as error:
            self._problems[self._containers.path] = error.hint
        else:
            self._problems.clear()
        return self._ids

    def load(self, container_id: ContainerId) -> Entry | None:
        """See EngineSource."""
        directory = self.place(container_id)
        config_path, host_path = f"{directory}/config.v2.json", f"{directory}/hostconfig.json"
        try:
            record, key = read_json(Path(config_path), limit=MAX_STATE)
        except NotFound:
            if key_or_none(directory) is None:
                return None
            raise
        if record.get("ID") != container_id:
            raise MalformedError("its id is not the name of its directory")
        host, host_key = _read_host(host_path)
        name = text(host.get("Runtime")) or _DEFAULT_RUNTIME
        read_from: list[Source] = [(config_path, key), (host_path, host_key)]
        state = self._state(container_id, name, read_from)
        if state is None:
            runtime = OciRuntime(name, Path(name), self._root(name))
            return Entry(
                container=_described(container_id, record, host, runtime, Path(directory)),
                spec_path=f"{directory}/config.json",
                place=directory,
                read_from=tuple(read_from),
            )
        runtime = shim_runtime(state, Path(state.directory).parent, self._programs)
        return Entry(
            container=_described(container_id, record, host, runtime, state.state.bundle),
            spec_path=state.spec_path,
            place=directory,
            read_from=tuple(read_from),
            init=state.state.init,
            exec_fifo=state.exec_fifo,
            flaw=read_spec_or_reason(self._specs, state.spec_path)[2],
        )

    def place(self, container_id: ContainerId) -> str:
        """See EngineSource."""
        return f"{self._containers.path}/{container_id}"

    def renamed(self, entry: Entry) -> bool:
        """See EngineSource: the name is in the first file of all that were read."""
        path, key = entry.read_from[0]
        return key_or_none(path) != key

    def names(self) -> None:
        """See EngineSource: each container has a file of its own, and nothing tells that one of them was replaced."""

    def problems(self) -> Mapping[str, str]:
        """See EngineSource."""
        return self._problems

    def looks(self) -> Sequence[Look]:
        """See EngineSource."""
        path = self._containers.path
        if key_or_none(path) is None:
            states = [root for root in self._roots() if Listing(root).names()]
            hint = f"not there, but {states[0]} has states: set docker_data_root" if states else "not there"
            return [Look(path, hint, usable=False)]
        found = [Look(path, f"{len(self.ids())} containers", usable=path not in self._problems)]
        return found + [Look(root, f"{len(Listing(root).names())} states") for root in self._roots()]

    def _state(self, container_id: ContainerId, name: str, read_from: list[Source]) -> StateFile | None:
        """Return the runtime's state of a container, None when it does not run; say in `read_from` what that is from.

        The root has the name of the runtime, or of dockerd's default one: versions differ, so all are looked at.
        """
        roots = dict.fromkeys((str(self._root(name)), str(self._root(_DEFAULT_RUNTIME)), *self._roots()))
        directories = [f"{root}/{container_id}" for root in roots]
        for directory in directories:
            try:
                state = read_state(directory, container_id)
            except NotFound:
                continue
            read_from.extend(state.read_from)
            return state
        read_from.extend((directory, None) for directory in directories)
        return None

    def _root(self, name: str) -> Path:
        return self._exec_root / f"{_RUNTIME_ROOT}{name}" / _NAMESPACE

    def _roots(self) -> list[str]:
        return sorted(map(str, self._exec_root.glob(f"{_RUNTIME_ROOT}*/{_NAMESPACE}*")))


def _described(
    container_id: ContainerId,
    record: Mapping[str, Any],
    host: Mapping[str, Any],
    runtime: OciRuntime,
    bundle: Path,
) -> Container:
    """Return what dockerd's two files tell of a container."""
    config, status = table(record.get("Config")), table(record.get("State"))
    tty = config.get("Tty") is True
    is_new = parse_time(status.get("StartedAt")) == 0.0
    return Container(
        id=container_id,
        name=text(record.get("Name")).removeprefix("/") or container_id,
        engine=EngineName.DOCKER,
        runtime=runtime,
        bundle=bundle,
        status=ContainerStatus.CREATED if is_new else ContainerStatus.EXITED,
        created=parse_time(record.get("Created")),
        exit_code=_exit_code(status),
        labels=text_table(config.get("Labels")),
        image=text(config.get("Image")) or text(record.get("Image")),
        image_id=text(record.get("Image")),
        command=tuple(filter(None, (text(record.get("Path")), *texts(record.get("Args"))))),
        user=text(config.get("User")),
        tty=tty,
        privileged=host.get("Privileged") is True,
        stop_timeout=seconds(config.get("StopTimeout")),
        # dockerd makes the environment of an exec anew: TERM is in it for a terminal of the exec's own. Of the
        # capabilities it touches nothing but for Privileged (execSetPlatformOpt).
        manner=ExecManner(
            own_terminal=tty and not any(entry.startswith("TERM=") for entry in texts(config.get("Env"))),
            fixed_capabilities=True,
        ),
    )


def _read_host(path: str) -> tuple[Mapping[str, Any], FileKey | None]:
    """Return a hostconfig.json: what depends on it has defaults."""
    try:
        return read_json(Path(path), limit=MAX_STATE)
    except (NotFound, Internal):
        return {}, key_or_none(path)


def _exit_code(status: Mapping[str, object]) -> int | None:
    code = status.get("ExitCode")
    return code if isinstance(code, int) and parse_time(status.get("FinishedAt")) else None
