"""containerd's containers: those of `ctr`, of nerdctl and of Kubernetes, as versions 1.6 and 2.3 leave them on disk."""

import itertools
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from execgate.model.container import Container, ContainerStatus, EngineName
from execgate.model.errors import InvalidArgument, NotFound
from execgate.model.ids import ContainerId
from support.bolt import Tree, write_bolt
from support.found import PROGRAMS, catalog_below, this_process
from support.trees import (
    FILE_BREAKERS,
    Life,
    Plan,
    Pod,
    containerd_tree,
    docker_tree,
    hex_id,
    kubernetes_tree,
    nerdctl_tree,
    oci_tree,
    plans,
)
from support.trees.containerd import NEW, OLD

STATUS = {
    Life.CREATED: ContainerStatus.CREATED,
    Life.RUNNING: ContainerStatus.RUNNING,
    Life.PAUSED: ContainerStatus.RUNNING,  # the freezer says otherwise, and no tree can freeze
    Life.EXITED: ContainerStatus.EXITED,
    Life.LOST: ContainerStatus.EXITED,
}


TEXT_BREAKERS = [name for name in FILE_BREAKERS if name != "wrong_types"]  # that is JSON's


def by_id(containers: list[Container]) -> dict[str, Container]:
    return {str(container.id): container for container in containers}


@pytest.mark.parametrize("version", [OLD, NEW])
def test_every_life_of_a_task(tmp_path: Path, version: str) -> None:
    me = this_process()
    tree = containerd_tree(tmp_path, plans(16, inits=[me]), version=version, namespace="work")
    catalog = catalog_below(tmp_path)
    found = by_id(catalog.list())
    with_task = [placed for placed in tree if placed.plan.life is not Life.NEW]
    assert found.keys() == {placed.plan.id for placed in with_task}  # nobody can enter one without a task
    assert catalog.problems() == []
    for placed in with_task:
        plan, container = placed.plan, found[placed.plan.id]
        assert (container.name, container.aliases, container.engine) == (plan.id, (), EngineName.CONTAINERD)
        assert container.labels == {"io.containerd.namespace": "work", **plan.labels}
        assert (container.tty, container.command) == (plan.tty, tuple(plan.args))
        assert (container.created, container.stop_timeout) == (plan.created, None)
        assert container.status is STATUS[plan.life]
        assert container.init == (me if plan.life.has_init else None)
        assert (container.bundle, container.runtime.root) == (placed.bundle, tree.runtime_root)
        assert (container.runtime.name, container.runtime.path) == ("runc", PROGRAMS["runc"])


def test_what_only_its_database_knows(tmp_path: Path) -> None:
    tree = containerd_tree(tmp_path, [Plan(id="web", name="web", init=this_process(), labels={"a": "b"})])
    record: Tree = {b"image": b"docker.io/library/nginx:1", b"labels": {b"com.example": b"yes"}}
    path = tree.data / "io.containerd.metadata.v1.bolt/meta.db"
    path.parent.mkdir()
    write_bolt(path, {b"v1": {b"default": {b"containers": {b"web": record}}}})
    container = catalog_below(tmp_path).find("web")
    assert container.image == "docker.io/library/nginx:1"
    assert container.labels == {"io.containerd.namespace": "default", "a": "b", "com.example": "yes"}


def test_a_broken_database_is_a_problem_and_no_more(tmp_path: Path) -> None:
    tree = containerd_tree(tmp_path, plans(2, inits=[this_process()]))
    path = tree.data / "io.containerd.metadata.v1.bolt/meta.db"
    path.parent.mkdir()
    path.write_bytes(b"no database" * 1000)
    catalog = catalog_below(tmp_path)
    assert len(catalog.list()) == 2


@pytest.mark.parametrize(
    ("options", "path", "systemd"),
    [
        ({}, PROGRAMS["runc"], False),
        ({"systemd_cgroup": True}, PROGRAMS["runc"], True),
        ({"binary_name": "/usr/bin/crun"}, Path("/usr/bin/crun"), False),
        ({"binary_name": "crun", "systemd_cgroup": True}, PROGRAMS["crun"], True),
    ],
)
def test_the_shims_options(tmp_path: Path, options: dict[str, Any], path: Path, systemd: bool) -> None:
    """Without a root in them the shim's own default counts."""
    containerd_tree(tmp_path, plans(1, inits=[this_process()]), options=options)
    (container,) = catalog_below(tmp_path).list()
    assert (container.runtime.path, container.runtime.systemd_cgroup) == (path, systemd)
    assert container.runtime.root == tmp_path / "run/containerd/runc/default"


@pytest.mark.parametrize("shim", ["/usr/bin/containerd-shim-kata-v2", "/opt/bin/containerd-shim-runsc-v1\n"])
def test_a_sandbox_is_left_out_and_said_so(tmp_path: Path, shim: str) -> None:
    kata, runc = containerd_tree(tmp_path, plans(2, inits=[this_process()]))
    (kata.bundle / "shim-binary-path").write_text(shim)
    catalog = catalog_below(tmp_path)
    assert by_id(catalog.list()).keys() == {runc.plan.id}
    ((place, reason),) = catalog.problems()
    assert place == str(kata.bundle)
    assert shim.strip() in reason


@pytest.mark.parametrize(
    ("name", "breaker"),
    [
        *itertools.product(("shim-binary-path", "runtime", "init.pid"), TEXT_BREAKERS),
        *(("options.json", one) for one in FILE_BREAKERS),
    ],
)
def test_broken_files_of_the_shim(tmp_path: Path, name: str, breaker: str) -> None:
    """They are small helps: what they say is taken where it can be read, and nothing waits for it."""
    tree = containerd_tree(tmp_path, plans(2, inits=[this_process()], lives=[Life.RUNNING]))
    broken, whole = tree
    FILE_BREAKERS[breaker](broken.bundle / name)
    catalog = catalog_below(tmp_path)
    assert whole.plan.id in by_id(catalog.list())
    assert [place for place, _ in catalog.problems() if place != str(broken.bundle)] == []


def test_namespaces_with_one_id(tmp_path: Path) -> None:
    """The first one by name counts; the other is a problem that says so."""
    me = this_process()
    plan = Plan(id="same", name="same", init=me)
    one = containerd_tree(tmp_path, [plan], namespace="a")
    two = containerd_tree(tmp_path, [plan], namespace="b")
    catalog = catalog_below(tmp_path)
    assert [container.labels["io.containerd.namespace"] for container in catalog.list()] == ["a"]
    assert catalog.problems() == [(str(two["same"].bundle), "the id is taken by the namespace a")]
    shutil.rmtree(one["same"].bundle)
    shutil.rmtree(one["same"].state_dir)
    assert catalog.find("same").labels["io.containerd.namespace"] == "b"
    assert catalog.problems() == []


# -- nerdctl


def test_nerdctls_names(tmp_path: Path) -> None:
    """A rename is in the name store only; a stopped container is in none, and keeps the name it was given."""
    me = this_process()
    tree = nerdctl_tree(tmp_path, plans(8, inits=[me]), renamed={"c-1": "one"})
    catalog = catalog_below(tmp_path)
    assert catalog.find("one").id == hex_id("c 1")
    with pytest.raises(NotFound):
        catalog.find("c-1")
    for placed in tree:
        if placed.plan.life is Life.NEW:
            continue
        container = catalog.find(placed.name)
        assert (container.id, container.user) == (placed.plan.id, placed.plan.user)
        assert container.status is STATUS[placed.plan.life]
    assert catalog.problems() == []


def test_a_nerdctl_rename_is_seen(tmp_path: Path) -> None:
    tree = nerdctl_tree(tmp_path, plans(2, inits=[this_process()], lives=[Life.RUNNING]))
    one, two = tree
    catalog = catalog_below(tmp_path)
    assert catalog.find("c-0").id == one.plan.id
    assert tree.names is not None
    (tree.names / "c-0").rename(tree.names / "new")
    assert catalog.find("new").id == one.plan.id
    with pytest.raises(NotFound):
        catalog.find("c-0")
    (tree.names / "c-1").rename(tree.names / "c-0")
    assert catalog.find("c-0").id == two.plan.id
    got = catalog.get(ContainerId(two.plan.id))
    assert got is not None
    assert got.name == "c-0"


def test_nerdctl_names_that_are_swapped(tmp_path: Path) -> None:
    """The store has the same names before and after."""
    tree = nerdctl_tree(tmp_path, plans(2, inits=[this_process()], lives=[Life.RUNNING]))
    one, two = tree
    catalog = catalog_below(tmp_path)
    assert tree.names is not None
    for _ in range(5):
        assert catalog.find("c-0").id == one.plan.id
        (tree.names / "c-0").rename(tree.names / "x")
        (tree.names / "c-1").rename(tree.names / "c-0")
        (tree.names / "x").rename(tree.names / "c-1")
        one, two = two, one
        assert (catalog.find("c-0").id, catalog.find("c-1").id) == (one.plan.id, two.plan.id)


@pytest.mark.parametrize("breaker", TEXT_BREAKERS)
def test_a_broken_name_falls_back_to_the_annotation(tmp_path: Path, breaker: str) -> None:
    tree = nerdctl_tree(tmp_path, plans(2, inits=[this_process()], lives=[Life.RUNNING]))
    assert tree.names is not None
    FILE_BREAKERS[breaker](tree.names / "c-0")
    catalog = catalog_below(tmp_path)
    assert {container.name for container in catalog.list()} == {"c-0", "c-1"}
    assert catalog.find("c-0").id == hex_id("c 0")


# -- Kubernetes


@pytest.mark.parametrize("version", [OLD, NEW])
def test_pods(tmp_path: Path, version: str) -> None:
    me = this_process()
    tree = kubernetes_tree(tmp_path, plans(12, inits=[me]), version=version)
    catalog = catalog_below(tmp_path)
    found = by_id(catalog.list())
    shown = [one for one in tree if not one.plan.is_infra and one.plan.life not in {Life.NEW, Life.EXITED}]
    assert found.keys() == {placed.plan.id for placed in shown}
    assert catalog.problems() == []
    for placed in shown:
        plan, container = placed.plan, found[placed.plan.id]
        assert plan.pod is not None
        assert container.name == f"{plan.pod.name}/{plan.name}"
        assert container.aliases == (f"{plan.pod.namespace}/{plan.pod.name}/{plan.name}",)
        assert (container.image, container.tty) == (plan.image, plan.tty)
        assert container.status is STATUS[plan.life]
        assert container.labels["io.containerd.namespace"] == "k8s.io"
        assert {catalog.find(ref).id for ref in (container.name, *container.aliases, f"containerd:{plan.id}")} == {
            container.id
        }


def test_a_sandbox_is_nobodys_to_enter(tmp_path: Path) -> None:
    tree = kubernetes_tree(tmp_path, plans(1, inits=[this_process()]))
    (sandbox,) = [placed for placed in tree if placed.plan.is_infra]
    catalog = catalog_below(tmp_path)
    for ref in (sandbox.plan.id, sandbox.plan.id[:12], sandbox.plan.name, f"containerd:{sandbox.plan.id}"):
        with pytest.raises(NotFound):
            catalog.find(ref)
    assert catalog.get(ContainerId(sandbox.plan.id)) is None
    assert catalog.problems() == []


def test_pods_of_one_name_in_two_namespaces(tmp_path: Path) -> None:
    me = this_process()
    wanted = [
        Plan(id=hex_id(space), name="app", init=me, pod=Pod("web", space, f"uid-{space}", hex_id(f"{space} infra")))
        for space in ("blue", "green")
    ]
    kubernetes_tree(tmp_path, wanted)
    catalog = catalog_below(tmp_path)
    assert catalog.find("blue/web/app").id == hex_id("blue")
    assert catalog.find("green/web/app").id == hex_id("green")
    with pytest.raises(InvalidArgument, match="multiple containers are named web/app: containerd:"):
        catalog.find("web/app")


def test_a_container_that_kubernetes_restarted(tmp_path: Path) -> None:
    """Another id under the same name; the dead one may be there for a moment, and gives way."""
    pod = Pod("web", "default", "uid", hex_id("infra"))
    old = Plan(id=hex_id("old"), name="app", pod=pod, life=Life.LOST)
    new = replace(old, id=hex_id("new"), life=Life.RUNNING, init=this_process())
    kubernetes_tree(tmp_path, [old, new])
    assert catalog_below(tmp_path).find("web/app").id == new.id


# -- with others


def test_one_id_in_several_engines(tmp_path: Path) -> None:
    """The first engine has it; the rest are problems, and come to light when the first one lets go."""
    me = this_process()
    plan = Plan(id=hex_id("same"), name="same", init=me)
    docker = docker_tree(tmp_path, [plan], own_containerd=True)
    tasks = containerd_tree(tmp_path, [plan])
    bare = oci_tree(tmp_path, [plan])
    catalog = catalog_below(tmp_path)
    (container,) = catalog.list()
    assert container.engine is EngineName.DOCKER
    record = docker["same"].record
    assert record is not None
    taken = f"the id is taken by {record.parent}"
    assert catalog.problems() == sorted(
        [(str(tasks[plan.id].bundle), taken), (str(bare[plan.id].state_dir), taken)],
    )
    for engine in ("docker", "containerd", "oci"):
        assert catalog.find(f"{engine}:{plan.id}").engine == engine
    assert catalog.find(plan.id).engine is EngineName.DOCKER
    shutil.rmtree(record.parent)
    assert catalog.find(plan.id).engine is EngineName.CONTAINERD
    shutil.rmtree(tasks[plan.id].bundle)
    assert catalog.find(plan.id).engine is EngineName.OCI
    shutil.rmtree(bare[plan.id].state_dir)
    with pytest.raises(NotFound):
        catalog.find(plan.id)
    assert catalog.problems() == []


def test_one_name_in_several_engines(tmp_path: Path) -> None:
    me = this_process()
    docker_tree(tmp_path, [Plan(id=hex_id("d"), name="web", init=me)])
    containerd_tree(tmp_path, [Plan(id="web", name="web", init=me)])
    nerdctl = nerdctl_tree(tmp_path, [Plan(id=hex_id("n"), name="db", init=me)])
    docker_tree(tmp_path / "other", [])
    oci_tree(tmp_path, [Plan(id=hex_id("o"), name="o", init=me)])
    catalog = catalog_below(tmp_path)
    assert catalog.find("web").engine is EngineName.CONTAINERD  # a full id comes before a name
    assert catalog.find("docker:web").engine is EngineName.DOCKER
    assert nerdctl.names is not None
    (nerdctl.names / "db").rename(nerdctl.names / "shop")
    assert catalog.find("shop").id == hex_id("n")


def test_a_name_that_two_engines_know(tmp_path: Path) -> None:
    me = this_process()
    docker_tree(tmp_path, [Plan(id=hex_id("d"), name="web", init=me)])
    tree = nerdctl_tree(tmp_path, [Plan(id=hex_id("n"), name="web", init=me)])
    catalog = catalog_below(tmp_path)
    first, second = sorted([(hex_id("d"), "docker"), (hex_id("n"), "containerd")])
    with pytest.raises(InvalidArgument) as caught:
        catalog.find("web")
    assert caught.value.message == (
        f"multiple containers are named web: {first[1]}:{first[0][:12]}, {second[1]}:{second[0][:12]}"
    )
    assert catalog.find("docker:web").id == hex_id("d")
    assert catalog.find("containerd:web").id == hex_id("n")
    state = tree[hex_id("n")].state_file
    document = json.loads(state.read_text())
    state.write_text(json.dumps(document | {"init_process_start": 1}))
    assert catalog.find("web").id == hex_id("d")  # the other one has died


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        ([("com.example.team", "team-1")], {"d-1", "d-6"}),
        ([("com.example.number", None)], {f"d-{number}" for number in range(8)}),
        ([("com.example.team", "team-1"), ("com.example.number", "6")], {"d-6"}),
        ([("com.example.team", "")], set()),
        ([("nosuch", None)], set()),
    ],
)
def test_label_filters(tmp_path: Path, labels: list[tuple[str, str | None]], shown: set[str]) -> None:
    """What is not chosen is not there: in no list, by no reference, whatever engine has it."""
    me = this_process()
    docker = docker_tree(tmp_path, plans(8, inits=[me], prefix="d"))
    nerdctl_tree(tmp_path, plans(4, inits=[me], prefix="n"))
    catalog = catalog_below(tmp_path, labels=labels)
    assert {container.name for container in catalog.list()} == shown
    for placed in docker:
        for ref in (placed.name, placed.plan.id, placed.plan.id[:12], f"docker:{placed.name}"):
            if placed.name in shown:
                assert catalog.find(ref).id == placed.plan.id
                continue
            with pytest.raises(NotFound) as caught:
                catalog.find(ref)
            assert caught.value.hint == ""
        assert (catalog.get(ContainerId(placed.plan.id)) is not None) == (placed.name in shown)


@pytest.mark.parametrize("engine", list(EngineName))
def test_engines_that_are_switched_off(tmp_path: Path, engine: EngineName) -> None:
    me = this_process()
    docker_tree(tmp_path, [Plan(id=hex_id("d"), name="d", init=me)])
    containerd_tree(tmp_path, [Plan(id="c", name="c", init=me)])
    oci_tree(tmp_path, [Plan(id="o", name="o", init=me)])
    catalog = catalog_below(tmp_path, engines=[engine])
    there = {EngineName.DOCKER: ["d"], EngineName.CONTAINERD: ["c"], EngineName.OCI: ["o"]}
    assert [container.name for container in catalog.list()] == there.get(engine, [])
    assert [name for name, _ in catalog.looks()] == [engine]


def test_a_monitor_of_threads(tmp_path: Path) -> None:
    """Several threads ask while containers come and go; each answer is one that was true at some time."""
    me = this_process()
    tree = containerd_tree(tmp_path, plans(12, inits=[me], lives=[Life.RUNNING]))
    catalog = catalog_below(tmp_path)
    errors: list[BaseException] = []
    done = threading.Event()

    def look() -> None:
        try:
            while not done.is_set():
                assert len(catalog.list()) <= 12
                catalog.get(ContainerId(hex_id("c 3")))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    aside = tmp_path / "aside"
    aside.mkdir()
    for placed in list(tree) * 4:
        placed.bundle.rename(aside / placed.plan.id)
        catalog.list()
        (aside / placed.plan.id).rename(placed.bundle)
    done.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(catalog.list()) == 12
    assert catalog.problems() == []
