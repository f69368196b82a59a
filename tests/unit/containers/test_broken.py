"""Broken state hides, or flags, the container that it belongs to, with a reason; the others do not notice."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from execgate.containers.catalog import Catalog
from execgate.model.container import ContainerStatus
from execgate.model.errors import Internal, NotFound
from execgate.model.ids import ContainerId
from support.found import catalog_below, places_below, this_process
from support.trees import (
    CONTAINER_BREAKERS,
    FILE_BREAKERS,
    Life,
    Placed,
    containerd_tree,
    crio_tree,
    docker_tree,
    kubernetes_tree,
    nerdctl_tree,
    oci_tree,
    plans,
    podman_tree,
)


def docker(root: Path, runtime: str) -> list[Placed]:
    return list(docker_tree(root, plans(3, inits=[this_process()], lives=[Life.RUNNING])))


def podman(root: Path, runtime: str) -> list[Placed]:
    return list(podman_tree(root, plans(3, inits=[this_process()], lives=[Life.RUNNING], runtimes=[runtime])))


def crio(root: Path, runtime: str) -> list[Placed]:
    """Made from CRI-O's sources, not by CRI-O."""
    tree = crio_tree(root, plans(3, inits=[this_process()], lives=[Life.RUNNING], runtimes=[runtime]))
    return [placed for placed in tree if not placed.plan.is_infra]


def containerd(root: Path, runtime: str) -> list[Placed]:
    return list(containerd_tree(root, plans(3, inits=[this_process()], lives=[Life.RUNNING])))


def nerdctl(root: Path, runtime: str) -> list[Placed]:
    return list(nerdctl_tree(root, plans(3, inits=[this_process()], lives=[Life.RUNNING])))


def kubernetes(root: Path, runtime: str) -> list[Placed]:
    tree = kubernetes_tree(root, plans(3, inits=[this_process()], lives=[Life.RUNNING]))
    return [placed for placed in tree if not placed.plan.is_infra]


def bare(root: Path, runtime: str) -> list[Placed]:
    return list(oci_tree(root, plans(3, inits=[this_process()], lives=[Life.RUNNING], runtimes=[runtime])))


Make = Callable[[Path, str], list[Placed]]

TREES: dict[str, tuple[Make, str]] = {
    "docker": (docker, "runc"),
    "podman-runc": (podman, "runc"),
    "podman-crun": (podman, "crun"),
    "crio-runc": (crio, "runc"),
    "crio-crun": (crio, "crun"),
    "containerd": (containerd, "runc"),
    "nerdctl": (nerdctl, "runc"),
    "kubernetes": (kubernetes, "runc"),
    "runc": (bare, "runc"),
    "crun": (bare, "crun"),
}

SHOWN = {"dead_pid", "reused_pid"}
"""Nothing is wrong with the files: the container has ended."""


def looks(catalog: Catalog, placed: Placed) -> None:
    """Ask for a container in every way; the answer may be that there is none, and nothing worse."""
    for ref in (placed.plan.id, placed.name, placed.plan.id[:12], "f" * 64, "nosuch"):
        try:
            container = catalog.find(ref)
        except NotFound:
            continue
        try:
            catalog.spec(container)
        except (NotFound, Internal):
            continue


@pytest.mark.parametrize("breaker", CONTAINER_BREAKERS)
@pytest.mark.parametrize("tree", TREES)
def test_one_broken_container_breaks_no_other(tmp_path: Path, tree: str, breaker: str) -> None:
    make, runtime = TREES[tree]
    first, broken, last = make(tmp_path, runtime)
    seasoned = catalog_below(tmp_path)
    seasoned.list()
    CONTAINER_BREAKERS[breaker](broken)
    for catalog in (catalog_below(tmp_path), seasoned):
        found = {str(container.id): container for container in catalog.list()}
        looks(catalog, broken)
        for whole in (first, last):
            assert found[whole.plan.id].status is ContainerStatus.RUNNING
            assert found[whole.plan.id].name == catalog.find(whole.name).name == whole.name
            assert catalog.spec(found[whole.plan.id])
            assert all(whole.plan.id not in place for place, _ in catalog.problems())
        assert found.keys() <= {first.plan.id, broken.plan.id, last.plan.id, "f" * 64}
        container = found.get(broken.plan.id)
        if breaker in SHOWN:
            assert container is not None
            assert container.status is ContainerStatus.EXITED
            continue
        if container is None or container.init is not None:
            assert _is_told(catalog, broken, breaker, found.keys() - {first.plan.id, last.plan.id})


def _is_told(catalog: Catalog, broken: Placed, breaker: str, left: set[str]) -> bool:
    """Return whether a reason is given for what is wrong with a container."""
    if any(broken.plan.id in f"{place} {reason}" and reason for place, reason in catalog.problems()):
        return True
    if breaker == "wrong_types_spec":  # its process is one, however useless
        return True
    if breaker.endswith("_spec") and (broken.state_dir / "config.json").is_file():
        return True  # crun has a copy of its own
    if breaker == "bundle_elsewhere" and (broken.state_dir / "config.json").is_file():
        return True
    if breaker in {"missing_state", "looping_state"}:
        return not left  # a container of a bare runtime is its state: a symlink or nothing is none
    if breaker == "foreign_id":
        return left == {"f" * 64} or any("f" * 64 in place for place, _ in catalog.problems())
    if breaker not in {"missing_bundle", "looping_bundle"}:
        return False
    # crun has a copy; and to containerd the bundle is the task.
    return (broken.state_dir / "config.json").is_file() or "io.containerd.runtime.v2.task" in str(broken.bundle)


@pytest.mark.parametrize("breaker", FILE_BREAKERS)
@pytest.mark.parametrize("name", ["config.v2.json", "hostconfig.json"])
def test_docker_records(tmp_path: Path, name: str, breaker: str) -> None:
    """Without its record a container is nobody; without the host's half it has defaults."""
    first, broken, last = docker(tmp_path, "runc")
    assert broken.record is not None
    FILE_BREAKERS[breaker](broken.record.with_name(name))
    catalog = catalog_below(tmp_path)
    ids = {str(container.id) for container in catalog.list()}
    looks(catalog, broken)
    assert {first.plan.id, last.plan.id} <= ids
    assert (broken.plan.id in ids) == (name == "hostconfig.json")
    places = [place for place, _ in catalog.problems()]
    assert places == ([] if name == "hostconfig.json" else [str(broken.record.parent)])


@pytest.mark.parametrize("breaker", FILE_BREAKERS)
@pytest.mark.parametrize("was_seen", [True, False])
def test_the_list_that_all_share(tmp_path: Path, breaker: str, was_seen: bool) -> None:
    """A broken list hides those it has not told of yet, and says so; other engines do not notice."""
    wanted = podman(tmp_path, "crun")
    others = docker(tmp_path / "docker", "runc")
    catalog = catalog_below(tmp_path)
    two = replace(
        places_below(tmp_path),
        docker_data_root=tmp_path / "docker/var/lib/docker",
        docker_exec_root=tmp_path / "docker/run/docker",
    )
    both = catalog_below(tmp_path, places=two)
    path = wanted[0].record
    assert path is not None
    kept = path.with_suffix(".kept")
    shutil.copy(path, kept)
    if was_seen:
        assert len(both.list()) == 3  # the same plans: each id is Docker's
        assert len(catalog.list()) == 3
    FILE_BREAKERS[breaker](path)
    found = catalog.list()
    is_told = str(path) in [place for place, _ in catalog.problems()]
    assert is_told or breaker in {"missing", "empty"}
    assert len(found) == (3 if was_seen and breaker not in {"missing", "empty", "not_an_object", "wrong_types"} else 0)
    assert [container.id for container in both.list()] == sorted(placed.plan.id for placed in others)
    if path.is_dir():
        path.rmdir()
    kept.replace(path)
    assert len(catalog.list()) == 3
    assert catalog.problems() == []


REPLACEMENTS: dict[str, Callable[[Path], None]] = {
    "file": lambda path: path.touch(),
    "fifo": lambda path: os.mkfifo(path),
    "loop": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize(
    "place",
    [
        "var/lib/docker/containers",
        "run/containerd/io.containerd.runtime.v2.task",
        "run/containerd/io.containerd.runtime.v2.task/default",
        "var/lib/containers/storage",
        "run/runc",
        "var/lib/nerdctl",
    ],
)
@pytest.mark.parametrize("kind", [*REPLACEMENTS, "forbidden"])
def test_a_directory_of_an_engine(tmp_path: Path, place: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs what is below it, and no engine more."""
    make_all(tmp_path)
    everyone = {container.engine for container in catalog_below(tmp_path).list()}
    path = tmp_path / place
    if kind == "forbidden":
        scandir = os.scandir

        def refuse(name: str) -> object:
            if str(name) == str(path):
                raise PermissionError(13, "Permission denied")
            return scandir(name)

        monkeypatch.setattr(os, "scandir", refuse)
    else:
        shutil.rmtree(path)
        REPLACEMENTS[kind](path)
    catalog = catalog_below(tmp_path)
    found = {container.engine for container in catalog.list()}
    assert len(everyone - found) <= 1
    assert "nosuch" not in {container.name for container in catalog.list()}
    with pytest.raises(NotFound):
        catalog.find("nosuch")
    if kind == "forbidden" and place != "var/lib/nerdctl":
        assert str(path) in [one for one, _ in catalog.problems()]
    assert catalog.get(ContainerId("nosuch")) is None
    for _, lines in catalog.looks():
        assert lines


def make_all(root: Path) -> None:
    lives = [Life.RUNNING]
    me = this_process()
    docker_tree(root, plans(2, inits=[me], prefix="d", lives=lives))
    podman_tree(root, plans(2, inits=[me], prefix="p", lives=lives, runtimes=["crun"]))
    nerdctl_tree(root, plans(2, inits=[me], prefix="n", lives=lives))
    oci_tree(root, plans(2, inits=[me], prefix="o", lives=lives))


def test_problems_are_told_once_and_end(tmp_path: Path) -> None:
    _, broken, _ = docker(tmp_path, "runc")
    whole = broken.state_file.read_text()
    catalog = catalog_below(tmp_path)
    broken.state_file.write_text("{")
    catalog.list()
    with pytest.raises(NotFound) as caught:
        catalog.find(broken.plan.id)
    ((_, reason),) = catalog.problems()
    assert reason in caught.value.hint
    broken.state_file.write_text(whole)
    assert catalog.find(broken.name).id == broken.plan.id
    assert catalog.problems() == []
