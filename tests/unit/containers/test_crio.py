"""CRI-O's containers. The trees are made from its sources (1.24 and 1.36), not by CRI-O, which Debian does not ship."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from execgate.containers.entry import Entry
from execgate.model.container import ContainerStatus, EngineName
from execgate.model.errors import InvalidArgument, NotFound
from execgate.model.ids import ContainerId
from support.found import PROGRAMS, catalog_below, this_process
from support.trees import CrioTree, Life, Placed, Plan, Pod, crio_tree, hex_id, oci_tree, plans
from support.trees.crio import NEW, OLD

STATUS = {
    Life.NEW: ContainerStatus.EXITED,  # it has a configuration, and no runtime has it
    Life.CREATED: ContainerStatus.CREATED,
    Life.RUNNING: ContainerStatus.RUNNING,
    Life.PAUSED: ContainerStatus.RUNNING,  # the freezer says otherwise, and no tree can freeze
    Life.EXITED: ContainerStatus.EXITED,
    Life.LOST: ContainerStatus.EXITED,
}


def containers_of(tree: CrioTree) -> list[Placed]:
    return [placed for placed in tree if not placed.plan.is_infra]


@pytest.mark.parametrize("drop_infra", [True, False])
@pytest.mark.parametrize("version", [OLD, NEW])
@pytest.mark.parametrize("driver", ["overlay", "vfs"])
def test_every_life(tmp_path: Path, version: str, drop_infra: bool, driver: str) -> None:
    me = this_process()
    wanted = plans(12, inits=[me], runtimes=["crun", "runc"])
    tree = crio_tree(tmp_path, wanted, version=version, drop_infra=drop_infra, driver=driver)
    catalog = catalog_below(tmp_path)
    found = {str(container.id): container for container in catalog.list()}
    assert found.keys() == {placed.plan.id for placed in containers_of(tree)}
    assert catalog.problems() == []
    for placed in containers_of(tree):
        plan, container = placed.plan, found[placed.plan.id]
        assert plan.pod is not None
        short = f"{plan.pod.name}/{plan.name}"
        long = f"k8s_{plan.name}_{plan.pod.name}_{plan.pod.namespace}_{plan.pod.uid}_0"
        assert (container.name, container.engine) == (short, EngineName.CRIO)
        assert container.aliases == (f"{plan.pod.namespace}/{short}", long)
        assert (container.image, container.image_id) == (plan.image, plan.image_id)
        assert container.labels["io.kubernetes.container.name"] == plan.name
        assert (container.tty, container.command) == (plan.tty, tuple(plan.args))
        assert container.created == plan.created
        assert container.stop_timeout == (30 if plan.stop_timeout is None else plan.stop_timeout)
        assert container.status is STATUS[plan.life]
        assert container.init == (me if plan.life.has_init else None)
        if plan.life is not Life.NEW:
            assert container.bundle == placed.bundle
            assert (container.runtime.path, container.runtime.root) == (
                PROGRAMS[plan.runtime],
                tree.roots[plan.runtime],
            )
        for ref in (short, *container.aliases, f"crio:{short}", plan.id, plan.id[:12]):
            assert catalog.find(ref).id == plan.id


@pytest.mark.parametrize("drop_infra", [True, False])
def test_a_sandbox_is_nobodys_to_enter(tmp_path: Path, drop_infra: bool) -> None:
    tree = crio_tree(tmp_path, plans(1, inits=[this_process()]), drop_infra=drop_infra)
    (sandbox,) = [placed for placed in tree if placed.plan.is_infra]
    catalog = catalog_below(tmp_path)
    for ref in (sandbox.plan.id, sandbox.plan.id[:12], sandbox.plan.name, f"oci:{sandbox.plan.id}"):
        with pytest.raises(NotFound):
            catalog.find(ref)
    assert catalog.get(ContainerId(sandbox.plan.id)) is None
    assert catalog.problems() == []


def test_a_container_that_was_restarted(tmp_path: Path) -> None:
    """Another id under the same pod and name; CRI-O keeps the dead one, its state included, for a while."""
    pod = Pod("web", "default", "uid", hex_id("infra"))
    old = Plan(id=hex_id("old"), name="app", pod=pod, life=Life.EXITED, runtime="crun")
    older = replace(old, id=hex_id("older"), life=Life.LOST)
    new = replace(old, id=hex_id("new"), life=Life.RUNNING, init=this_process(), restarts=2)
    crio_tree(tmp_path, [older, replace(old, restarts=1), new])
    catalog = catalog_below(tmp_path)
    assert len(catalog.list()) == 3
    assert catalog.find("web/app").id == new.id
    assert catalog.find("default/web/app").id == new.id
    assert catalog.find(old.id).status is ContainerStatus.EXITED
    assert catalog.find("k8s_app_web_default_uid_1").id == old.id


def test_pods_of_one_name_in_two_namespaces(tmp_path: Path) -> None:
    wanted = [
        Plan(
            id=hex_id(space), name="app", init=this_process(), pod=Pod("web", space, f"u-{space}", hex_id(f"{space} s"))
        )
        for space in ("blue", "green")
    ]
    crio_tree(tmp_path, wanted)
    catalog = catalog_below(tmp_path)
    assert catalog.find("blue/web/app").id == hex_id("blue")
    with pytest.raises(InvalidArgument, match="multiple containers are named web/app: crio:"):
        catalog.find("web/app")


def test_a_sandbox_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has two names in the store; that is no rename, and a miss need not read it again."""
    tree = crio_tree(tmp_path, plans(5, inits=[this_process()], lives=[Life.RUNNING]))
    aged = time.time() - 60
    for path in [*tmp_path.rglob("*"), tree.config]:
        os.utime(path, (aged, aged), follow_symlinks=False)
    catalog = catalog_below(tmp_path)
    catalog.list()
    loads: list[str] = []
    source = catalog._shelves[[engine for engine, _ in catalog.looks()].index(EngineName.CRIO)].source
    load = source.load

    def noted(container_id: ContainerId) -> Entry | None:
        loads.append(container_id)
        return load(container_id)

    monkeypatch.setattr(source, "load", noted)
    with pytest.raises(NotFound):
        catalog.find("nosuch")
    assert loads == []


def test_without_crio_its_containers_are_not_bare_ones(tmp_path: Path) -> None:
    me = this_process()
    crio_tree(tmp_path, plans(3, inits=[me], runtimes=["crun"], lives=[Life.RUNNING]))
    oci_tree(tmp_path, [Plan(id="bare", name="bare", init=me, runtime="crun")])
    catalog = catalog_below(tmp_path, engines=[EngineName.OCI])
    assert [container.id for container in catalog.list()] == ["bare"]


def test_a_label_that_is_no_json(tmp_path: Path) -> None:
    (placed,) = containers_of(crio_tree(tmp_path, [Plan(id=hex_id("a"), name="a", init=this_process())]))
    spec = json.loads(placed.spec_file.read_text())
    spec["annotations"] |= {
        "io.kubernetes.cri-o.Labels": "{",
        "io.kubernetes.pod.terminationGracePeriod": "-5",
    }
    placed.spec_file.write_text(json.dumps(spec))
    container = catalog_below(tmp_path).find("a-pod/a")
    assert (container.labels, container.stop_timeout) == ({}, None)
