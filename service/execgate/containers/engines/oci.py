"""Containers of bare runtimes: a state root, and nothing else. And the roots that these share with Podman and CRI-O.

These two call the runtime with its default root, so the entries of one root can belong to three parties. Whose an
entry is, its bundle says: both write `io.container.manager` into its annotations.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from execgate.containers.entry import EngineSource, Entry, Look, table, text, texts
from execgate.containers.files import key_or_none
from execgate.containers.formats import FORMATS, MalformedError
from execgate.containers.listing import Listing
from execgate.containers.states import (
    Programs,
    RuntimeRoot,
    Specs,
    StateFile,
    annotations_of,
    read_spec_or_reason,
    read_state,
)
from execgate.model.container import Container, ContainerStatus, EngineName, OciRuntime
from execgate.model.errors import Internal, NotFound
from execgate.model.ids import ContainerId

MANAGER = "io.container.manager"
MANAGERS = {"libpod": EngineName.PODMAN, "cri-o": EngineName.CRIO}
_IMAGE = "org.opencontainers.image.ref.name"


def default_roots(environ: Mapping[str, str], *, user: bool) -> list[RuntimeRoot]:
    """Return where runc and crun keep states when nobody says otherwise.

    That is /run, and for a user other than root `$XDG_RUNTIME_DIR`. crun goes there for root as well, whenever that
    variable is set (libcrun: get_run_directory).
    """
    system = [Path("/run") / form.runtime for form in FORMATS]
    private = environ.get("XDG_RUNTIME_DIR", "")
    own = [Path(private) / form.runtime for form in FORMATS] if private.startswith("/") else []
    if user:
        return [RuntimeRoot(path) for path in own or system]
    return [RuntimeRoot(path) for path in (*system, *(path for path in own if path.name == "crun"))]


class SharedRoots:
    """The state roots that more than one party may use: where a container's state is, and under which runtime."""

    def __init__(self, roots: Sequence[RuntimeRoot], programs: Programs) -> None:
        """Read nothing yet. Of two roots that hold one id the earlier one wins."""
        self._listings = [(root, Listing(str(root.dir))) for root in roots]
        self._programs = programs
        self._parts: list[frozenset[str]] = []
        self._ids: frozenset[ContainerId] = frozenset()
        self.problems: dict[str, str] = {}

    def ids(self) -> frozenset[ContainerId]:
        """Return the ids in all roots: the same object until one of them changes."""
        parts = []
        for _, listing in self._listings:
            try:
                parts.append(listing.names())
            except Internal as error:
                self.problems[listing.path] = error.hint
                parts.append(frozenset())
            else:
                self.problems.pop(listing.path, None)
        if parts != self._parts:
            self._parts = parts
            self._ids = frozenset(map(ContainerId, frozenset[str]().union(*parts)))
        return self._ids

    def taken(self) -> dict[str, str]:
        """Return the states whose id an earlier root has."""
        first: dict[str, str] = {}
        places = [
            (name, f"{root.dir}/{name}")
            for (root, _), names in zip(self._listings, self._parts, strict=False)
            for name in names
        ]
        return {
            place: f"the id is taken by {first[name]}"
            for name, place in places
            if first.setdefault(name, place) != place
        }

    def read(self, container_id: ContainerId, name: str = "") -> tuple[StateFile, OciRuntime]:
        """Return the state of a container, and the runtime that holds it. NotFound, MalformedError, Internal.

        `name` is what its engine calls the runtime, "" when it does not say. A root that cannot be read hides no
        container of another one.
        """
        problem: Exception = NotFound("no such container")
        for root, directory in self._places(container_id):
            try:
                state = read_state(directory, container_id)
            except NotFound:
                continue
            except (Internal, MalformedError) as error:
                problem = error
                continue
            return state, self._programs.runtime(root.dir, state, root.runtime_name or name or None)
        raise problem

    def places(self, container_id: ContainerId) -> list[str]:
        """Return the directories in which its state would be."""
        return [directory for _, directory in self._places(container_id)]

    def place(self, container_id: ContainerId) -> str:
        """Return the first directory that may hold its state."""
        return next((one for one in self.places(container_id) if key_or_none(one) is not None), container_id)

    def looks(self) -> list[Look]:
        """See EngineSource."""
        return [_look(listing) for _, listing in self._listings]

    def _places(self, container_id: ContainerId) -> list[tuple[RuntimeRoot, str]]:
        return [(root, f"{root.dir}/{container_id}") for root, _ in self._listings]


class OciSource:
    """What is in the shared roots and belongs to no engine."""

    engine = EngineName.OCI

    def __init__(self, roots: SharedRoots, specs: Specs, others: Mapping[EngineName, EngineSource]) -> None:
        """`others` are the engines that share the roots, as far as they are looked at."""
        self._roots = roots
        self._specs = specs
        self._others = others

    def ids(self) -> frozenset[ContainerId]:
        """See EngineSource."""
        return self._roots.ids()

    def load(self, container_id: ContainerId) -> Entry | None:
        """See EngineSource."""
        try:
            state, runtime = self._roots.read(container_id)
        except NotFound:
            return None
        spec, _, flaw = read_spec_or_reason(self._specs, state.spec_path)
        annotations = annotations_of(spec)
        manager = MANAGERS.get(annotations.get(MANAGER, ""))
        owner = self._others.get(manager) if manager is not None else None
        if owner is not None and container_id not in owner.ids():
            raise Internal("a container cannot be used", hint=f"it is {manager}'s, whose storage does not list it")
        process = table(spec.get("process"))
        container = Container(
            id=container_id,
            name=container_id,
            engine=self.engine,
            runtime=runtime,
            bundle=state.state.bundle,
            status=ContainerStatus.EXITED,
            created=state.state.created,
            labels=annotations,
            image=text(annotations.get(_IMAGE)),
            command=texts(process.get("args")),
            user=_user(process.get("user")),
            tty=process.get("terminal") is True,
        )
        return Entry(
            container=container,
            spec_path=state.spec_path,
            place=state.directory,
            read_from=state.read_from,
            init=state.state.init,
            exec_fifo=state.exec_fifo,
            flaw=flaw,
            hidden=manager is not None,
        )

    def place(self, container_id: ContainerId) -> str:
        """See EngineSource."""
        return self._roots.place(container_id)

    def renamed(self, _entry: Entry) -> bool:
        """See EngineSource: an id is for ever."""
        return False

    def names(self) -> object:
        """See EngineSource."""
        return self

    def problems(self) -> Mapping[str, str]:
        """See EngineSource."""
        return self._roots.problems | self._roots.taken()

    def looks(self) -> Sequence[Look]:
        """See EngineSource."""
        return self._roots.looks()


def _user(user: object) -> str:
    """Return `uid:gid`, empty for root."""
    uid, gid = table(user).get("uid", 0), table(user).get("gid", 0)
    return f"{uid}:{gid}" if (uid, gid) != (0, 0) else ""


def _look(listing: Listing) -> Look:
    try:
        count = len(listing.names())
    except Internal as error:
        return Look(listing.path, error.hint.rpartition(": ")[2], usable=False)
    if not count and not os.path.isdir(listing.path):  # noqa: PTH112
        return Look(listing.path, "not there", usable=False)
    return Look(listing.path, f"{count} states")
