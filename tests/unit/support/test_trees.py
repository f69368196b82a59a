"""The state trees: real runtimes read them, real containers run in them, what breaks breaks alone."""

import contextlib
import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from execgate.containers import proc
from execgate.model.container import ContainerStatus
from execgate.model.process import ProcessIdentity
from support.found import catalog_below
from support.programs import find_program, run_program
from support.trees import (
    CONTAINER_BREAKERS,
    Life,
    Plan,
    Pod,
    crio_tree,
    docker_tree,
    hex_id,
    kubernetes_tree,
    nerdctl_tree,
    oci_tree,
    plans,
    podman_tree,
    real,
)
from support.trees.plan import Placing

ME = ProcessIdentity(os.getpid(), proc.start_time(os.getpid()) or 0)
POD = Pod(name="web", namespace="shop", uid="7c6d0e0a-0000-4000-8000-000000000001", infra=hex_id("infra"))


Maker = Callable[[Path, list[Plan]], Placing]
MAKERS: list[Maker] = [oci_tree, docker_tree, kubernetes_tree, nerdctl_tree, podman_tree, crio_tree]


@pytest.mark.parametrize("make", MAKERS)
def test_a_container_with_a_process_runs_and_one_without_does_not(make: Maker, tmp_path: Path) -> None:
    wanted = plans(4, inits=[ME], lives=[Life.RUNNING, Life.LOST])
    tree = make(tmp_path, wanted)
    found = catalog_below(tmp_path).list()
    infra = {one.plan.id for one in tree if one.plan.is_infra}  # hidden, or not: that is the engine's affair
    running = {each.id for each in found if each.status is ContainerStatus.RUNNING}
    assert running - infra == {one.plan.id for one in tree if one.plan.life is Life.RUNNING} - infra
    assert wanted[0].id in running
    assert {wanted[1].id, wanted[3].id} <= {each.id for each in found if each.status is ContainerStatus.EXITED}


@pytest.mark.parametrize("make", MAKERS)
def test_the_files_are_where_the_tree_says(make: Maker, tmp_path: Path) -> None:
    tree = make(tmp_path, plans(1, inits=[ME]))
    (one,) = [one for one in tree if not one.plan.is_infra]
    (found,) = [each for each in catalog_below(tmp_path).list() if each.id == one.plan.id]
    assert found.bundle == one.bundle
    assert found.runtime.root == one.state_dir.parent
    assert json.loads(one.spec_file.read_text())["process"]["args"] == list(one.plan.args)
    assert tree[one.name] is one is tree[one.plan.id]


@pytest.mark.parametrize(("name", "fields"), [("runc", ("id", "bundle")), ("crun", ("id", "bundle"))])
def test_the_real_runtime_reads_its_state(name: str, fields: tuple[str, ...], tmp_path: Path) -> None:
    tree = oci_tree(tmp_path, plans(6, inits=[ME], lives=[Life.RUNNING, Life.EXITED, Life.NEW], runtimes=[name]))
    program = find_program(name)
    for one in tree:
        if one.plan.life is not Life.NEW:
            told = json.loads(run_program([program, "--root", tree.roots[name], "state", one.plan.id]))
            assert [told[field] for field in fields] == [one.plan.id, str(one.bundle)]
            assert (told["pid"] == ME.pid) == (one.plan.life is Life.RUNNING)


def test_the_database_keeps_its_own_rules(tmp_path: Path) -> None:
    in_pod = [Plan(id=hex_id("a"), name="a", pod=POD, labels={"k": "v"}), Plan(id=hex_id("b"), name="b")]
    tree = podman_tree(tmp_path, in_pod, renamed={"b": "newer"})
    assert tree.database is not None
    with contextlib.closing(sqlite3.connect(tree.database)) as database:
        assert database.execute("PRAGMA foreign_key_check").fetchall() == []
        rows: dict[str, Any] = {
            name: json.loads(text) for name, text in database.execute("SELECT Name, JSON FROM ContainerConfig")
        }
    assert sorted(rows) == sorted(one.name for one in tree)
    assert rows["a"]["labels"] == {"k": "v"}
    assert [name for name, config in rows.items() if config["pause"]] == [tree[POD.infra].name]


def test_a_sandbox_that_was_dropped_is_in_the_store_alone(tmp_path: Path) -> None:
    wanted = [Plan(id=hex_id("a"), name="a", pod=POD, init=ME, runtime="crun")]
    dropped, kept = crio_tree(tmp_path / "1", wanted), crio_tree(tmp_path / "2", wanted, drop_infra=False)
    assert not dropped[POD.infra].state_dir.exists()
    assert kept[POD.infra].state_file.exists()
    for tree in (dropped, kept):
        entries = json.loads((tree.store.containers / "volatile-containers.json").read_text())
        assert [json.loads(entry["metadata"]).get("pod", False) for entry in entries] == [True, False]


@pytest.mark.parametrize("runtime", ["runc", "crun"])
@pytest.mark.parametrize("breaker", CONTAINER_BREAKERS)
def test_what_breaks_breaks_alone(breaker: str, runtime: str, tmp_path: Path) -> None:
    wanted = plans(3, inits=[ME], lives=[Life.RUNNING], runtimes=[runtime])
    tree = podman_tree(tmp_path, wanted)
    catalog, whole = catalog_below(tmp_path), wanted[1].id
    before = {each.id: each for each in catalog.list()}
    CONTAINER_BREAKERS[breaker](tree[whole])
    after = {each.id: each for each in catalog.list()}
    others = before.keys() - {whole}
    assert {name: after.get(name) for name in others} == {name: before[name] for name in others}


def test_a_real_container_runs_among_the_written_ones(tmp_path: Path) -> None:
    wanted = [Plan(id=hex_id("real"), name="real", runnable=True), *plans(3, lives=[Life.LOST])]
    tree, runc = docker_tree(tmp_path, wanted), find_program("runc")
    real.start(tree["real"], runc, tmp_path / "log")
    try:
        found = catalog_below(tmp_path).list()
        assert len(found) == len(wanted)
        assert [each.id for each in found if each.status is ContainerStatus.RUNNING] == [hex_id("real")]
    finally:
        real.delete(tree["real"], runc)


@pytest.mark.parametrize(("version", "expected"), [("4.3", [["a", "b"], []]), ("5.8", [["b"], ["a"]])])
def test_what_is_removed_at_its_end_is_in_a_list_of_its_own(
    version: str, expected: list[list[str]], tmp_path: Path
) -> None:
    wanted = [Plan(id=hex_id("a"), name="a", auto_remove=True), Plan(id=hex_id("b"), name="b")]
    store = podman_tree(tmp_path, wanted, version=version).store.containers
    lists = [store / "containers.json", store / "volatile-containers.json"]
    texts = [path.read_text() if path.exists() else "[]" for path in lists]
    assert [sorted(entry["names"][0] for entry in json.loads(text)) for text in texts] == expected
