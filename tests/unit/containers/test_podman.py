"""Podman's containers, as versions 4.3 and 5.8 leave them on disk, with either database or none."""

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from execgate.containers import proc
from execgate.containers.engines.podman_db import PodmanDatabase
from execgate.model.container import Container, ContainerStatus, EngineName
from execgate.model.errors import NotFound
from execgate.model.ids import ContainerId
from support.bolt import write_bolt
from support.found import PROGRAMS, catalog_below, this_process
from support.trees import FILE_BREAKERS, Life, Plan, Pod, PodmanTree, crio_tree, hex_id, oci_tree, plans, podman_tree
from support.trees.podman import V4, V5, container_config, container_state

STATUS = {
    Life.NEW: ContainerStatus.CREATED,
    Life.CREATED: ContainerStatus.CREATED,
    Life.RUNNING: ContainerStatus.RUNNING,
    Life.PAUSED: ContainerStatus.RUNNING,  # the freezer says otherwise, and no tree can freeze
    Life.EXITED: ContainerStatus.EXITED,
    Life.LOST: ContainerStatus.EXITED,
}


def write_bolt_database(tree: PodmanTree) -> Path:
    """Write the database of Podman 4 for a tree that has none."""
    containers = {
        one.plan.id.encode(): {
            b"config": json.dumps(container_config(one.plan, one.name, tree.store)).encode(),
            b"state": json.dumps(container_state(one.plan, tree.store)).encode(),
        }
        for one in tree
    }
    path = tree.store.graph_root / "libpod/bolt_state.db"
    path.parent.mkdir(exist_ok=True)
    return write_bolt(path, {b"ctr": containers, b"id-registry": {}, b"runtime-config": {}})


def rename(tree: PodmanTree, container_id: str, name: str) -> None:
    """Change a name in the store's list, as `podman rename` does first."""
    path = tree.store.containers / "containers.json"
    items = json.loads(path.read_text())
    for item in items:
        if item["id"] == container_id:
            item["names"] = [name]
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(items))
    beside.rename(path)


def by_id(containers: list[Container]) -> dict[str, Container]:
    return {str(container.id): container for container in containers}


@pytest.mark.parametrize("database", ["sqlite", "bolt", None])
@pytest.mark.parametrize("version", [V4, V5])
@pytest.mark.parametrize("driver", ["overlay", "vfs"])
def test_every_life(tmp_path: Path, version: str, driver: str, database: str | None) -> None:
    me = this_process()
    wanted = plans(16, inits=[me], runtimes=["crun", "runc"])
    tree = podman_tree(tmp_path, wanted, version=version, driver=driver, with_database=database == "sqlite")
    if database == "bolt":
        write_bolt_database(tree)
    catalog = catalog_below(tmp_path)
    found = by_id(catalog.list())
    assert found.keys() == {placed.plan.id for placed in tree}
    assert catalog.problems() == []
    for placed in tree:
        plan, container = placed.plan, found[placed.plan.id]
        assert (container.name, container.aliases, container.engine) == (plan.name, (), EngineName.PODMAN)
        assert (container.image, container.image_id) == (plan.image, plan.image_id)
        assert container.created == plan.created
        assert container.status is STATUS[plan.life]
        assert container.init == (me if plan.life.has_init else None)
        if plan.life is not Life.NEW:
            assert (container.tty, container.command) == (plan.tty, tuple(plan.args))
            assert container.bundle == placed.bundle
            assert catalog.spec(container)["process"]["cwd"] == plan.cwd
        if plan.life not in {Life.NEW, Life.EXITED}:
            assert container.runtime.name == plan.runtime
            assert container.runtime.path == PROGRAMS[plan.runtime]
            assert container.runtime.root == tree.roots[plan.runtime]
        if database is None:
            assert (container.labels, container.stop_timeout, container.user) == ({}, None, "")
            continue
        assert (container.labels, container.user) == (plan.labels, plan.user)
        assert container.stop_timeout == (10 if plan.stop_timeout is None else plan.stop_timeout)
        assert container.exit_code == (137 if plan.life is Life.EXITED else None)


def test_paused_is_what_the_freezer_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    podman_tree(tmp_path, [Plan(id=hex_id("p"), name="p", init=this_process(), life=Life.PAUSED, runtime="crun")])
    catalog = catalog_below(tmp_path)
    monkeypatch.setattr(proc, "frozen", lambda _: True)
    assert catalog.find("podman:p").status is ContainerStatus.PAUSED


def test_the_name_is_the_stores(tmp_path: Path) -> None:
    """`metadata.name` is the name at creation, and stays."""
    wanted = plans(3, inits=[this_process()], lives=[Life.RUNNING, Life.EXITED, Life.NEW])
    tree = podman_tree(tmp_path, wanted, renamed={"c-0": "zero", "c-1": "one"})
    catalog = catalog_below(tmp_path)
    assert sorted(container.name for container in catalog.list()) == ["c-2", "one", "zero"]
    with pytest.raises(NotFound):
        catalog.find("c-0")
    for placed in tree:
        rename(tree, placed.plan.id, f"{placed.plan.name}-again")
        assert catalog.find(f"{placed.plan.name}-again").id == placed.plan.id
        got = catalog.get(ContainerId(placed.plan.id))
        assert got is not None
        assert got.name == f"{placed.plan.name}-again"
    with pytest.raises(NotFound):
        catalog.find("zero")


def test_a_new_name_comes_before_an_old_id(tmp_path: Path) -> None:
    stranger = next(plan for plan in plans(5000, inits=[this_process()]) if plan.id.startswith("db"))
    tree = podman_tree(tmp_path, [Plan(id="0" * 64, name="database", init=this_process()), stranger])
    catalog = catalog_below(tmp_path)
    assert catalog.find("db").id == stranger.id
    rename(tree, "0" * 64, "db")
    assert catalog.find("db").id == "0" * 64


def test_pods(tmp_path: Path) -> None:
    """The members are containers like others. The infra container is listed, too, as `podman ps` does."""
    pod = Pod(name="web", namespace="", uid="u", infra=hex_id("infra"))
    member = Plan(id=hex_id("m"), name="m", init=this_process(), pod=pod)
    podman_tree(tmp_path, [member])
    catalog = catalog_below(tmp_path)
    assert catalog.find("m").id == member.id
    assert catalog.find(hex_id("infra")).name.endswith("-infra")


def test_podman_crio_and_bare_runtimes_share_everything_but_containers(tmp_path: Path) -> None:
    """One store, one root for each runtime; an annotation and a record say whose a container is."""
    me = this_process()
    lives = [Life.RUNNING, Life.EXITED, Life.CREATED]
    crio = crio_tree(tmp_path, plans(6, inits=[me], prefix="k", lives=lives, runtimes=["crun", "runc"]))
    podman = podman_tree(tmp_path, plans(6, inits=[me], prefix="p", lives=lives, runtimes=["crun", "runc"]))
    bare = oci_tree(tmp_path, plans(6, inits=[me], prefix="o", lives=lives, runtimes=["crun", "runc"]))
    catalog = catalog_below(tmp_path)
    found = catalog.list()
    assert [container.engine for container in found] == [
        *([EngineName.PODMAN] * 6),
        *([EngineName.CRIO] * 6),
        *([EngineName.OCI] * 6),
    ]
    assert {container.name for container in found} == {
        placed.name for placed in (*podman, *crio, *bare) if not placed.plan.is_infra
    }
    assert catalog.problems() == []
    only_bare = catalog_below(tmp_path, engines=[EngineName.OCI])
    assert by_id(only_bare.list()).keys() == {placed.plan.id for placed in bare}
    only_podman = catalog_below(tmp_path, engines=[EngineName.PODMAN])
    assert by_id(only_podman.list()).keys() == {placed.plan.id for placed in podman}


def test_a_container_in_both_lists_is_the_lasting_ones(tmp_path: Path) -> None:
    tree = podman_tree(tmp_path, [Plan(id=hex_id("a"), name="a", init=this_process())])
    items = json.loads((tree.store.containers / "containers.json").read_text())
    volatile = tree.store.containers / "volatile-containers.json"
    volatile.write_text(json.dumps([items[0] | {"names": ["other"]}]))
    assert catalog_below(tmp_path).find(hex_id("a")).name == "a"


def test_buildahs_working_containers_are_not_podmans(tmp_path: Path) -> None:
    tree = podman_tree(tmp_path, [Plan(id=hex_id("a"), name="a", init=this_process())])
    path = tree.store.containers / "containers.json"
    working = {"id": hex_id("w"), "names": ["alpine-working-container"], "layer": hex_id("l")}
    path.write_text(json.dumps([*json.loads(path.read_text()), working]))
    catalog = catalog_below(tmp_path)
    assert by_id(catalog.list()).keys() == {hex_id("a")}
    assert catalog.problems() == []


@pytest.mark.parametrize("breaker", FILE_BREAKERS)
@pytest.mark.parametrize("database", ["sqlite", "bolt"])
def test_a_broken_database_costs_what_only_it_knows(tmp_path: Path, database: str, breaker: str) -> None:
    plan = Plan(id=hex_id("a"), name="a", init=this_process(), labels={"a": "b"})
    tree = podman_tree(tmp_path, [plan], with_database=database == "sqlite")
    path = tree.database if tree.database is not None else write_bolt_database(tree)
    whole = path.with_suffix(".whole")
    shutil.copy(path, whole)
    if breaker != "wrong_types":  # that is JSON's
        FILE_BREAKERS[breaker](path)
    catalog = catalog_below(tmp_path)
    container = catalog.find("a")
    assert container.status is ContainerStatus.RUNNING
    if breaker not in {"missing", "wrong_types", "loop", "half_written", "empty", "huge"}:
        assert container.labels == {}
        assert [place for place, _ in catalog.problems()] == [str(path)]
    if path.is_dir():
        path.rmdir()
    whole.replace(path)
    assert catalog.find("a").labels == {"a": "b"}  # at once, without a restart of anything
    assert catalog.problems() == []


def test_a_busy_database_is_asked_again(tmp_path: Path) -> None:
    """A writer holds SQLite's lock for a moment, and that is when containers are new. No label is lost for that."""
    plan = Plan(id=hex_id("a"), name="a", init=this_process(), labels={"a": "b"})
    tree = podman_tree(tmp_path, [plan])
    assert tree.database is not None
    catalog = catalog_below(tmp_path)
    with contextlib.closing(sqlite3.connect(tree.database)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        assert catalog.find("a").labels == {}
        assert [place for place, _ in catalog.problems()] == [str(tree.database)]
        writer.rollback()
    assert catalog.find("a").labels == {"a": "b"}
    assert catalog.problems() == []


def test_a_container_that_the_database_gets_later(tmp_path: Path) -> None:
    """Podman writes the store's list first, and its own database after it."""
    plans_ = [Plan(id=hex_id(name), name=name, labels={"n": name}, life=Life.NEW) for name in "ab"]
    later = podman_tree(tmp_path / "later", plans_)
    tree = podman_tree(tmp_path, plans_[:1])
    items = (later.store.containers / "containers.json").read_text()
    (tree.store.containers / "containers.json").write_text(items)
    catalog = catalog_below(tmp_path)
    assert catalog.find("b").labels == {}
    assert later.database is not None
    assert tree.database is not None
    later.database.replace(tree.database)
    assert catalog.find("b").labels == {"n": "b"}


@pytest.mark.parametrize(
    "text", ["{", "[]", "5", '{"labels": 5, "user": [], "command": 5, "stopTimeout": "x"}', '"\\ud800"']
)
def test_a_record_of_another_kind(tmp_path: Path, text: str) -> None:
    tree = podman_tree(tmp_path, [Plan(id=hex_id("a"), name="a", init=this_process())])
    assert tree.database is not None
    with contextlib.closing(sqlite3.connect(tree.database)) as database, database:
        database.execute("UPDATE ContainerConfig SET JSON = ?", (text,))
        database.execute("UPDATE ContainerState SET JSON = ?", (text,))
    container = catalog_below(tmp_path).find("a")
    assert (container.labels, container.user, container.status) == ({}, "", ContainerStatus.RUNNING)


@pytest.mark.parametrize(
    "items",
    [
        {},
        5,
        [5],
        [None],
        [{"id": 5}],
        [{"id": "../x"}],
        [{"id": ""}],
        [[]],
    ],
    ids=str,
)
def test_items_of_the_list_that_are_none(tmp_path: Path, items: Any) -> None:
    tree = podman_tree(tmp_path, [Plan(id=hex_id("a"), name="a", init=this_process())])
    path = tree.store.containers / "containers.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps([*whole, *items] if isinstance(items, list) else items))
    catalog = catalog_below(tmp_path)
    found = [container.id for container in catalog.list() if container.engine is EngineName.PODMAN]
    assert found == ([hex_id("a")] if isinstance(items, list) else [])
    assert str(path) in [place for place, _ in catalog.problems()]
    assert [place for place, _ in catalog.problems() if "containers.json" in place] == [str(path)]


@pytest.mark.parametrize("container_id", ["a\0b", "\ud800", "-option", "..", ".", "x" * 300, "a b"])
def test_ids_that_are_none(tmp_path: Path, container_id: str) -> None:
    tree = podman_tree(tmp_path, [Plan(id=hex_id("a"), name="a", init=this_process())])
    path = tree.store.containers / "containers.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps([*whole, whole[0] | {"id": container_id, "names": ["b"]}]))
    catalog = catalog_below(tmp_path)
    assert by_id(catalog.list()).keys() == {hex_id("a")}
    ((_, reason),) = catalog.problems()
    assert reason == "its name cannot be a container id"


@pytest.mark.parametrize("names", [None, [], "a", [5], ["", "a"], ["a", "a"], ["\ud800"], [{}]])
def test_names_of_another_kind(tmp_path: Path, names: Any) -> None:
    tree = podman_tree(tmp_path, [Plan(id=hex_id("a"), name="a", init=this_process())])
    path = tree.store.containers / "containers.json"
    whole = json.loads(path.read_text())
    catalog = catalog_below(tmp_path)
    assert catalog.find("a").id == hex_id("a")
    path.write_text(json.dumps([whole[0] | {"names": names}]))
    assert catalog.find(hex_id("a")).name
    with pytest.raises(NotFound):
        catalog.find("")
    path.write_text(json.dumps(whole))
    assert catalog.find("a").aliases == ()


def test_without_any_state_root(tmp_path: Path) -> None:
    from execgate.containers.host import host_catalog
    from support.found import places_below

    podman_tree(tmp_path, [Plan(id=hex_id("a"), name="a", life=Life.EXITED)])
    assert host_catalog(places_below(tmp_path), [], PROGRAMS).find("a").status is ContainerStatus.EXITED


def test_both_databases_are_asked(tmp_path: Path) -> None:
    """Podman 5 goes on with a bolt file that it finds, and may have begun an SQLite one."""
    old = podman_tree(tmp_path / "old", [Plan(id=hex_id("old"), name="old", user="old")], with_database=False)
    new = podman_tree(tmp_path / "new", [Plan(id=hex_id("new"), name="new", user="new")])
    target = new.store.graph_root / "libpod/bolt_state.db"
    target.parent.mkdir()
    write_bolt_database(old).rename(target)
    database = PodmanDatabase(new.store.graph_root)
    assert [database.find(ContainerId(hex_id(name))).user for name in ("old", "new", "none")] == ["old", "new", ""]
