"""Docker's containers, as dockerd 20.10 and 29 leave them on disk."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from execgate.containers import proc
from execgate.model.container import Container, ContainerStatus, EngineName
from execgate.model.errors import InvalidArgument, NotFound
from execgate.model.ids import ContainerId
from support.found import PROGRAMS, catalog_below, this_process
from support.trees import NOBODY, Life, Plan, docker_tree, hex_id, kubernetes_tree, plans

STATUS = {
    Life.NEW: ContainerStatus.CREATED,
    Life.CREATED: ContainerStatus.CREATED,
    Life.RUNNING: ContainerStatus.RUNNING,
    Life.PAUSED: ContainerStatus.RUNNING,  # the freezer says otherwise, and no tree can freeze
    Life.EXITED: ContainerStatus.EXITED,
    Life.LOST: ContainerStatus.EXITED,
}


def change(path: Path, **fields: Any) -> None:
    """Replace a record as dockerd does: the new one beside it, then a rename."""
    beside = path.with_name(f".tmp-{path.name}")
    beside.write_text(json.dumps(json.loads(path.read_text()) | fields))
    beside.rename(path)


def by_id(containers: list[Container]) -> dict[str, Container]:
    return {str(container.id): container for container in containers}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"version": "29.0"},
        {"own_containerd": False},
        {"namespace": "moby-100000.100000"},
        {"version": "29.0", "own_containerd": False, "binary": "/usr/bin/crun"},
    ],
    ids=str,
)
def test_every_life_in_every_version(tmp_path: Path, options: dict[str, Any]) -> None:
    me = this_process()
    tree = docker_tree(tmp_path, plans(16, inits=[me]), **options)
    catalog = catalog_below(tmp_path)
    found = by_id(catalog.list())
    assert found.keys() == {placed.plan.id for placed in tree}
    assert catalog.problems() == []
    for placed in tree:
        plan, container = placed.plan, found[placed.plan.id]
        assert (container.name, container.aliases, container.engine) == (plan.name, (), EngineName.DOCKER)
        assert (container.image, container.image_id) == (plan.image, f"sha256:{plan.image_id}")
        assert (container.labels, container.user, container.tty) == (plan.labels, plan.user, plan.tty)
        assert container.command == tuple(plan.args)
        assert container.created == plan.created
        assert container.stop_timeout == plan.stop_timeout
        assert container.status is STATUS[plan.life]
        assert container.init == (me if plan.life.has_init else None)
        assert container.exit_code == (137 if plan.life is Life.EXITED else None)
        assert not container.privileged
        if plan.life in {Life.NEW, Life.EXITED}:
            continue
        assert container.bundle == placed.bundle
        assert container.runtime.root == tree.runtime_root
        assert container.runtime.path == (PROGRAMS["runc"] if "binary" not in options else Path("/usr/bin/crun"))
        assert container.runtime.name == ("runc" if "binary" not in options else "crun")
        assert not container.runtime.systemd_cgroup
        assert catalog.spec(container)["process"]["args"] == list(plan.args)


def test_who_is_called_what(tmp_path: Path) -> None:
    (placed,) = docker_tree(tmp_path, [Plan(id=hex_id("web"), name="web", init=this_process())])
    catalog = catalog_below(tmp_path)
    for ref in (
        *("web", "/web", placed.plan.id, placed.plan.id[:12], placed.plan.id[:3]),
        *("docker:web", "docker:" + placed.plan.id, "docker:" + placed.plan.id[:12], "/docker:web"),
    ):
        assert catalog.find(ref).id == placed.plan.id
    for ref in ("podman:web", "oci:web", "Docker:web", "docker:", "docker:/web", "docker:docker:web", "we"):
        with pytest.raises(NotFound):
            catalog.find(ref)


def test_paused_is_what_the_freezer_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me = this_process()
    docker_tree(tmp_path, [Plan(id=hex_id("p"), name="p", init=me, life=Life.PAUSED)])
    catalog = catalog_below(tmp_path)
    monkeypatch.setattr(proc, "frozen", lambda pid: pid == me.pid)
    assert catalog.find("p").status is ContainerStatus.PAUSED
    monkeypatch.setattr(proc, "frozen", lambda _: False)
    assert catalog.find("p").status is ContainerStatus.RUNNING


def test_a_rename_is_seen(tmp_path: Path) -> None:
    (placed,) = docker_tree(tmp_path, [Plan(id=hex_id("old"), name="old", init=this_process())])
    catalog = catalog_below(tmp_path)
    assert catalog.find("old").name == "old"
    change(placed.record or Path(), Name="/new")
    assert catalog.find("new").id == placed.plan.id
    with pytest.raises(NotFound):
        catalog.find("old")
    change(placed.record or Path(), Name="/third")
    by_its_id = catalog.get(ContainerId(placed.plan.id))
    assert by_its_id is not None
    assert by_its_id.name == "third"


def test_a_new_name_comes_before_an_old_id(tmp_path: Path) -> None:
    """`docker rename database db`, and then an exec into `db`: it must not go to the container whose id begins so."""
    stranger = next(plan for plan in plans(5000, inits=[this_process()]) if plan.id.startswith("db"))
    (mine, _) = docker_tree(tmp_path, [Plan(id="0" * 64, name="database", init=this_process()), stranger])
    catalog = catalog_below(tmp_path)
    assert catalog.find("db").id == stranger.id
    change(mine.record or Path(), Name="/db")
    assert catalog.find("db").id == mine.plan.id
    assert catalog.find(stranger.id[:12]).id == stranger.id


def test_names_that_are_swapped(tmp_path: Path) -> None:
    """The deployment that puts a new container in the place of an old one."""
    blue, green = docker_tree(tmp_path, plans(2, inits=[this_process()], lives=[Life.RUNNING]))
    catalog = catalog_below(tmp_path)
    assert catalog.find(blue.name).id == blue.plan.id
    change(blue.record or Path(), Name=f"/{green.name}")
    change(green.record or Path(), Name=f"/{blue.name}")
    assert catalog.find(blue.name).id == green.plan.id
    assert catalog.find(green.name).id == blue.plan.id


@pytest.mark.parametrize("life", [Life.NEW, Life.EXITED])
@pytest.mark.parametrize("binary", ["runc", "/usr/bin/crun"])
def test_a_start_is_seen_before_dockerd_writes_it_down(tmp_path: Path, life: Life, binary: str) -> None:
    """dockerd records a start after it; the root is the same whatever the runtime is called."""
    me = this_process()
    tree = docker_tree(tmp_path, [Plan(id=hex_id("one"), name="one", init=me, life=life)], binary=binary)
    running = docker_tree(tmp_path / "model", [Plan(id=hex_id("one"), name="one", init=me)], binary=binary)
    catalog = catalog_below(tmp_path)
    assert catalog.find("one").init is None
    (placed,), (model,) = tree, running
    shutil.copytree(model.bundle, placed.bundle, ignore=shutil.ignore_patterns("log"), symlinks=True)
    tree.runtime_root.mkdir(parents=True, exist_ok=True)
    state = model.state_file.read_text().replace(str(tmp_path / "model"), str(tmp_path))
    placed.state_dir.mkdir()
    placed.state_file.write_text(state)
    container = catalog.find("one")
    assert (container.status, container.init) == (ContainerStatus.RUNNING, me)
    assert container.runtime.root == tree.runtime_root
    shutil.rmtree(placed.state_dir)
    assert catalog.find("one").init is None


def test_the_systemd_driver(tmp_path: Path) -> None:
    tree = docker_tree(tmp_path, plans(1, inits=[this_process()]))
    (placed,) = tree
    options = {"binary_name": "runc", "root": str(tree.runtime_root.parent), "systemd_cgroup": True}
    (placed.bundle / "options.json").write_text(json.dumps(options))
    assert catalog_below(tmp_path).find(placed.name).runtime.systemd_cgroup


def test_privileged_and_the_stop_timeout_of_zero(tmp_path: Path) -> None:
    (placed,) = docker_tree(tmp_path, [Plan(id=hex_id("a"), name="a", init=this_process(), stop_timeout=0)])
    assert placed.record is not None
    change(placed.record.with_name("hostconfig.json"), Privileged=True)
    container = catalog_below(tmp_path).find("a")
    assert (container.privileged, container.stop_timeout) == (True, 0.0)


@pytest.mark.parametrize("own_containerd", [True, False])
def test_docker_is_not_shown_a_second_time(tmp_path: Path, own_containerd: bool) -> None:
    """Its containers are in a namespace of a containerd: the host's, maybe, where others are, too."""
    me = this_process()
    docker = docker_tree(tmp_path, plans(4, inits=[me], lives=[Life.RUNNING]), own_containerd=own_containerd)
    others = kubernetes_tree(tmp_path, plans(3, inits=[me], prefix="k", lives=[Life.RUNNING]))
    for namespace in ("plugins.moby", "moby-100000.100000", "plugins.moby-100000.100000", "buildkit"):
        (others.tasks.parent / namespace / hex_id(namespace)).mkdir(parents=True)
    catalog = catalog_below(tmp_path)
    engines = [container.engine for container in catalog.list()]
    assert engines == [EngineName.DOCKER] * len(docker) + [EngineName.CONTAINERD] * 3
    assert catalog.problems() == []
    alone = catalog_below(tmp_path, engines=[EngineName.CONTAINERD])
    assert len(alone.list()) == 3


@pytest.mark.parametrize("field", ["Name", "Config", "State", "Image", "Path", "Args", "Created"])
@pytest.mark.parametrize("value", [None, 5, [], {}, "", "\ud800", "a\0b", [None, {}], {"User": 5, "Labels": []}])
def test_fields_of_another_kind(tmp_path: Path, field: str, value: object) -> None:
    broken, whole = docker_tree(tmp_path, plans(2, inits=[this_process()], lives=[Life.RUNNING]))
    change(broken.record or Path(), **{field: value})
    found = by_id(catalog_below(tmp_path).list())
    assert whole.plan.id in found
    assert found[broken.plan.id].name  # it is still one that can be entered


@pytest.mark.parametrize("value", ["a\0b", "\ud800", "relative", 5, [], "/nonexistent", "x" * 5000])
@pytest.mark.parametrize("field", ["root", "binary_name", "systemd_cgroup"])
def test_options_of_another_kind(tmp_path: Path, field: str, value: object) -> None:
    tree = docker_tree(tmp_path, plans(2, inits=[this_process()], lives=[Life.RUNNING]))
    broken, whole = tree
    (broken.bundle / "options.json").write_text(json.dumps({"root": str(tree.runtime_root.parent), field: value}))
    catalog = catalog_below(tmp_path)
    assert whole.plan.id in by_id(catalog.list())
    assert (broken.plan.id in by_id(catalog.list())) != bool(catalog.problems())


def test_two_that_have_one_name(tmp_path: Path) -> None:
    """Only a damaged record can say so."""
    one, two = docker_tree(tmp_path, plans(2, inits=[this_process()], lives=[Life.RUNNING]))
    change(two.record or Path(), Name=f"/{one.name}")
    catalog = catalog_below(tmp_path)
    first, second = sorted((one.plan.id, two.plan.id))
    with pytest.raises(InvalidArgument) as caught:
        catalog.find(one.name)
    assert caught.value.message == (
        f"multiple containers are named {one.name}: docker:{first[:12]}, docker:{second[:12]}"
    )
    os.unlink(two.state_file)
    two.state_dir.rmdir()
    assert catalog.find(one.name).id == one.plan.id  # the other one has stopped
    one.state_file.write_text(one.state_file.read_text().replace(str(one.plan.init.pid), str(NOBODY.pid)))
    with pytest.raises(InvalidArgument):
        catalog.find(one.name)
