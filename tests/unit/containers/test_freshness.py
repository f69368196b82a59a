"""Whatever changes on disk is in the next answer, also when it changes within one tick of the file system's clock.

Containers come, go, start, die and change names at random, one change right after the other, and after each the
catalog has to agree with a plain table. Files are replaced as the engines do it, on a file system that is as bad as one
can be: its clock ticks a hundred times a second, and a new file has the inode of the one it replaces.
"""

import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from execgate.containers import files, proc
from execgate.containers.catalog import Catalog
from execgate.containers.files import FileKey
from execgate.model.container import ContainerStatus
from execgate.model.errors import ExecgateError, NotFound
from execgate.model.ids import ContainerId
from execgate.model.process import ProcessIdentity
from support.found import catalog_below, this_process
from support.trees import NOBODY, Life, Placed, Plan, containerd_tree, docker_tree, hex_id, oci_tree, podman_tree

STEPS = 120
TICK = 10_000_000  # ns: CONFIG_HZ=100


@pytest.fixture(autouse=True)
def coarse_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(status: os.stat_result) -> FileKey:
        return status.st_mtime_ns // TICK * TICK, status.st_size, 0, status.st_dev

    monkeypatch.setattr(files, "_key", key)


def parent() -> ProcessIdentity:
    """Another process that lives as long as this one."""
    return ProcessIdentity(os.getppid(), proc.start_time(os.getppid()) or 0)


@dataclass
class Known:
    """What is true of a container: `init` is None when no runtime holds it."""

    name: str
    init: ProcessIdentity | None
    waits: bool = False

    @property
    def status(self) -> ContainerStatus:
        if self.init in (None, NOBODY):
            return ContainerStatus.EXITED
        return ContainerStatus.CREATED if self.waits else ContainerStatus.RUNNING


def put(path: Path, text: str) -> None:
    """Replace a file as engines do: the new one beside it, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text)
    beside.rename(path)


class World:
    """Containers of one engine, and what is true of them."""

    can_rename: ClassVar[bool] = True
    can_stop: ClassVar[bool] = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.known: dict[str, Known] = {}
        self.inits = [this_process(), parent()]
        # Written once; the containers of the table are put together from its pieces.
        self.models: dict[str, Placed] = {placed.plan.id: placed for placed in self.write(root)}
        self.states = {key: placed.state_file.read_text() for key, placed in self.models.items()}
        self.bundles = root / "kept"
        for key, placed in self.models.items():
            shutil.copytree(placed.bundle, self.bundles / key, ignore=shutil.ignore_patterns("log", "work"))
            self.prepare(placed)
            self.remove(key)

    def write(self, root: Path) -> "list[Placed]":
        raise NotImplementedError

    def prepare(self, placed: Placed) -> None:
        """Keep what `create` needs."""

    def plans(self) -> list[Plan]:
        return [Plan(id=hex_id(f"c {n}"), name=f"c-{n}", init=this_process(), life=Life.RUNNING) for n in range(6)]

    def create(self, key: str, name: str) -> None:
        """Make a container that runs."""
        placed = self.models[key]
        if not placed.bundle.exists():
            shutil.copytree(self.bundles / key, placed.bundle)
        self.known[key] = Known(name, None)
        self.start(key, self.inits[0])

    def start(self, key: str, init: ProcessIdentity) -> None:
        """Give a container another init process: a restart, or a death that nobody took note of."""
        text = re.sub(r'"init_process_pid": ?\d+', f'"init_process_pid":{init.pid}', self.states[key])
        text = re.sub(r'"init_process_start": ?\d+', f'"init_process_start":{init.start_time}', text)
        put(self.models[key].state_file, text)
        self.known[key] = replace(self.known[key], init=init)

    def wait(self, key: str) -> None:
        """Let the init wait for `start`, or release it."""
        known = self.known[key]
        fifo = self.models[key].state_dir / "exec.fifo"
        if known.waits:
            fifo.unlink()
        else:
            os.mkfifo(fifo)
        known.waits = not known.waits

    def stop(self, key: str) -> None:
        """End a container, and let its engine take note."""
        shutil.rmtree(self.models[key].state_dir)
        self.known[key] = Known(self.known[key].name, None)

    def rename(self, key: str, name: str) -> None:
        self.known[key].name = name

    def remove(self, key: str) -> None:
        for path in (self.models[key].state_dir, self.models[key].bundle):
            shutil.rmtree(path, ignore_errors=True)
        self.known.pop(key, None)


class DockerWorld(World):
    def write(self, root: Path) -> list[Placed]:
        return list(docker_tree(root, self.plans()))

    def prepare(self, placed: Placed) -> None:
        assert placed.record is not None
        self.records = getattr(self, "records", {}) | {placed.plan.id: json.loads(placed.record.read_text())}
        shutil.rmtree(placed.record.parent)

    def create(self, key: str, name: str) -> None:
        self._record(key, name)
        super().create(key, name)

    def rename(self, key: str, name: str) -> None:
        self._record(key, name)
        super().rename(key, name)

    def remove(self, key: str) -> None:
        super().remove(key)
        record = self.models[key].record
        assert record is not None
        shutil.rmtree(record.parent, ignore_errors=True)

    def _record(self, key: str, name: str) -> None:
        record = self.models[key].record
        assert record is not None
        put(record, json.dumps(self.records[key] | {"Name": f"/{name}"}))


class PodmanWorld(World):
    def write(self, root: Path) -> list[Placed]:
        tree = podman_tree(root, self.plans())
        self.list = tree.store.containers / "containers.json"
        self.items = {item["id"]: item for item in json.loads(self.list.read_text())}
        self.list.write_text("[]")
        return list(tree)

    def create(self, key: str, name: str) -> None:
        super().create(key, name)
        self._write()

    def rename(self, key: str, name: str) -> None:
        super().rename(key, name)
        self._write()

    def remove(self, key: str) -> None:
        super().remove(key)
        self._write()

    def _write(self) -> None:
        put(self.list, json.dumps([self.items[key] | {"names": [one.name]} for key, one in self.known.items()]))


class ContainerdWorld(World):
    can_rename = False
    can_stop = False

    def write(self, root: Path) -> list[Placed]:
        return list(containerd_tree(root, self.plans()))

    def create(self, key: str, name: str) -> None:
        super().create(key, key)


class OciWorld(ContainerdWorld):
    def write(self, root: Path) -> list[Placed]:
        return list(oci_tree(root, self.plans()))


class Change:
    """Draws what happens next."""

    def __init__(self, world: World, choice: random.Random) -> None:
        self.world = world
        self.choice = choice

    def __call__(self) -> None:
        world, choice = self.world, self.choice
        absent = sorted(world.models.keys() - world.known.keys())
        names = [f"c-{n}" for n in range(8)]
        free = sorted(set(names) - {known.name for known in world.known.values()})
        if not world.known or (absent and choice.random() < 0.25):
            world.create(choice.choice(absent), choice.choice(free))
            return
        key = choice.choice(sorted(world.known))
        known = world.known[key]
        todo: list[Callable[[], None]] = [
            lambda: world.remove(key),
            lambda: world.start(key, choice.choice([*world.inits, NOBODY])),
        ]
        if known.init is not None:
            todo.append(lambda: world.wait(key))
            todo += [lambda: world.stop(key)] if world.can_stop else []
        if world.can_rename:
            todo.append(lambda: world.rename(key, choice.choice(free)))
            if absent:
                todo.append(lambda: self._recreate(key, choice.choice(absent)))
        choice.choice(todo)()

    def _recreate(self, key: str, other: str) -> None:
        """Make another container under the name of one that goes."""
        name = self.world.known[key].name
        self.world.remove(key)
        self.world.create(other, name)


def check(catalog: Catalog, world: World, choice: random.Random) -> None:
    """Compare some answer with the table."""
    key = choice.choice(sorted(world.models))
    known = world.known.get(key)
    match choice.randrange(5):
        case 0:
            found = {str(one.id): (one.name, one.status, one.init) for one in catalog.list()}
            assert found == {key: seen(known) for key, known in world.known.items()}
        case 1:
            got = catalog.get(ContainerId(key))
            assert (None if got is None else (got.name, got.status, got.init)) == (seen(known) if known else None)
        case 2:
            assert asked(catalog, key[:12]) == (key if known else None)
        case _:
            name = choice.choice([f"c-{n}" for n in range(8)])
            holder = next((key for key, one in world.known.items() if one.name == name), None)
            assert asked(catalog, name) == holder


def seen(known: Known) -> tuple[str, ContainerStatus, ProcessIdentity | None]:
    return known.name, known.status, None if known.status is ContainerStatus.EXITED else known.init


def asked(catalog: Catalog, ref: str) -> str | None:
    try:
        return str(catalog.find(ref).id)
    except NotFound:
        return None


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", [DockerWorld, PodmanWorld, ContainerdWorld, OciWorld])
def test_every_change_is_in_the_next_answer(tmp_path: Path, kind: type[World], seed: int) -> None:
    choice = random.Random(seed)
    world = kind(tmp_path)
    catalog = catalog_below(tmp_path)
    change = Change(world, choice)
    for step in range(STEPS):
        change()
        try:
            check(catalog, world, choice)
        except (AssertionError, ExecgateError) as error:
            raise AssertionError(f"step {step}: {world.known}") from error
    assert catalog.problems() == []


@pytest.mark.parametrize("kind", [DockerWorld, PodmanWorld])
def test_names_go_round(tmp_path: Path, kind: type[World]) -> None:
    """Two containers change names with each other, quickly, and every file stays as long as it is."""
    world = kind(tmp_path)
    first, second = itertools.islice(world.models, 2)
    world.create(first, "one")
    world.create(second, "two")
    catalog = catalog_below(tmp_path)
    for _ in range(30):
        assert (asked(catalog, "one"), asked(catalog, "two")) == (first, second)
        world.rename(first, "tmp")
        world.rename(second, "one")
        world.rename(first, "two")
        first, second = second, first
        world.known[first].name, world.known[second].name = "one", "two"


@pytest.mark.parametrize("kind", [DockerWorld, PodmanWorld, ContainerdWorld, OciWorld])
def test_a_restart_under_the_same_id(tmp_path: Path, kind: type[World]) -> None:
    """The binding of a session is to the init process, so no restart may be missed."""
    world = kind(tmp_path)
    key = next(iter(world.models))
    world.create(key, "c-0")
    catalog = catalog_below(tmp_path)
    for init in world.inits * 20:
        world.start(key, init)
        found = catalog.get(ContainerId(key))
        assert found is not None
        assert catalog.binding(found).init == init


def test_a_pause_is_seen_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes no file at all."""
    world = OciWorld(tmp_path)
    key = next(iter(world.models))
    world.create(key, key)
    catalog = catalog_below(tmp_path)
    paused = False
    monkeypatch.setattr(proc, "frozen", lambda _: paused)
    for paused in [True, False] * 5:
        expected = ContainerStatus.PAUSED if paused else ContainerStatus.RUNNING
        assert catalog.find(key).status is expected


def test_a_death_is_seen_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = DockerWorld(tmp_path)
    key = next(iter(world.models))
    world.create(key, "c-0")
    catalog = catalog_below(tmp_path)
    assert catalog.find("c-0").status is ContainerStatus.RUNNING
    monkeypatch.setattr(proc, "is_alive", lambda _: False)
    found = catalog.find("c-0")
    assert (found.status, found.init) == (ContainerStatus.EXITED, None)
