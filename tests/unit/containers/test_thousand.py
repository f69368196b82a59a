"""A thousand containers: what a look-up costs does not depend on how many there are.

Counted are the calls that reach for the file system, not the time, which belongs to the machine: `python -m
bench.scale` measures that.
"""

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from execgate.containers.catalog import Catalog
from execgate.model.container import Container, EngineName
from execgate.model.errors import NotFound
from execgate.model.ids import ContainerId
from support.found import catalog_below, this_process
from support.trees import Life, docker_tree, nerdctl_tree, oci_tree, plans, podman_tree

CALLS = ("stat", "open", "scandir", "access", "readlink")
LIVES = (Life.RUNNING, Life.RUNNING, Life.EXITED, Life.RUNNING)
ENGINES = {"d": EngineName.DOCKER, "p": EngineName.PODMAN, "n": EngineName.CONTAINERD, "o": EngineName.OCI}
MOST = 40
"""Calls of one look-up that hits: some twenty to see what is new anywhere, a few for the container, two of /proc."""


def make_host(root: Path, count: int) -> Catalog:
    """Write `count` containers of four engines, all older than a moment."""
    me = this_process()
    made = {
        prefix: plans(count // 4, inits=[me], lives=LIVES, prefix=prefix, runtimes=["crun", "runc"])
        for prefix in ENGINES
    }
    docker_tree(root, made["d"])
    podman_tree(root, made["p"])
    nerdctl_tree(root, made["n"])
    oci_tree(root, made["o"])
    aged = time.time() - 60
    for directory, _, files in os.walk(root):
        for name in (directory, *(f"{directory}/{file}" for file in files)):
            os.utime(name, (aged, aged), follow_symlinks=False)
    return catalog_below(root)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Catalog]]:
    """A small host and a large one, each looked at once."""
    roots = {count: tmp_path_factory.mktemp(f"host{count}") for count in (40, 1000)}
    catalogs = {count: make_host(root, count) for count, root in roots.items()}
    for count, catalog in catalogs.items():
        assert len(catalog.list()) == count
        assert catalog.problems() == []
    yield catalogs
    for root in roots.values():
        shutil.rmtree(root)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the calls of `os` that reach for the file system."""
    counts: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, _counting(getattr(os, name), name, counts))
        yield counts


def _counting(call: Callable[..., object], name: str, counts: Counter[str]) -> Callable[..., object]:
    def wrapper(*args: object, **kwargs: object) -> object:
        counts[name] += 1
        return call(*args, **kwargs)

    return wrapper


def sample(catalog: Catalog, engine: EngineName) -> Container:
    """A container that runs."""
    return next(one for one in catalog.list() if one.engine is engine and one.init is not None)


def questions(catalog: Catalog, container: Container) -> dict[str, Callable[[], object]]:
    return {
        "name": lambda: catalog.find(container.name),
        "id": lambda: catalog.find(container.id),
        "prefix": lambda: catalog.find(container.id[:12]),
        "engine:name": lambda: catalog.find(f"{container.engine}:{container.name}"),
        "get": lambda: catalog.get(container.id),
        "no such id": lambda: catalog.get(ContainerId("f" * 64)),
    }


@pytest.mark.parametrize("question", ["name", "id", "prefix", "engine:name", "get", "no such id"])
@pytest.mark.parametrize("engine", list(ENGINES.values()))
def test_a_hit_costs_the_same_on_any_host(hosts: dict[int, Catalog], engine: EngineName, question: str) -> None:
    costs = {}
    for count, catalog in hosts.items():
        ask = questions(catalog, sample(catalog, engine))[question]
        ask()
        with counted() as counts:
            ask()
        costs[count] = counts
    assert costs[40] == costs[1000]
    assert 0 < costs[1000].total() <= MOST
    assert costs[1000]["scandir"] == 0


def test_a_miss_asks_each_container_once(hosts: dict[int, Catalog]) -> None:
    """It may have been renamed. Only Docker's have to be asked one by one, and nothing is read again."""
    catalog = hosts[1000]
    for ref in ("nosuch", "fff", "docker:nosuch"):
        with counted() as counts, pytest.raises(NotFound):
            catalog.find(ref)
        assert counts["open"] == counts["scandir"] == 0
        assert counts.total() <= 250 + MOST


def test_a_list_reads_nothing_again(hosts: dict[int, Catalog]) -> None:
    """A few stats a container; what is opened is /proc."""
    catalog = hosts[1000]
    opened: list[str] = []
    opening = os.open

    def noted(path: str, *args: Any, **rest: Any) -> int:
        opened.append(str(path))
        return opening(path, *args, **rest)

    with pytest.MonkeyPatch.context() as patch, counted() as counts:
        patch.setattr(os, "open", noted)
        assert len(catalog.list()) == 1000
    assert all(path.startswith("/proc/") for path in opened)
    assert counts["stat"] <= 8 * 1000
    assert counts["scandir"] == 0


def test_one_that_is_new_is_all_that_is_read(tmp_path: Path) -> None:
    catalog = make_host(tmp_path, 200)
    catalog.list()
    fresh = plans(1, inits=[this_process()], prefix="new")
    docker_tree(tmp_path, fresh)
    with counted() as counts:
        assert catalog.find("new-0").id == fresh[0].id
    assert counts["open"] < 30
