"""The catalog over state roots: made-up ones around this process, and real runtimes."""

import errno
import json
import os
import select
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from execgate.containers import proc
from execgate.containers.catalog import Catalog
from execgate.containers.engines.oci import default_roots
from execgate.containers.engines.places import find_places
from execgate.containers.files import FileKey, read_json
from execgate.containers.host import host_catalog
from execgate.containers.states import RuntimeRoot
from execgate.model.container import Container, ContainerStatus, EngineName
from execgate.model.errors import Conflict, ExecgateError, Internal, InvalidArgument, NotFound, Unavailable
from execgate.model.ids import ContainerId
from execgate.model.process import ProcessIdentity
from support.runtimes import RuntimeHost, TestContainer

PROGRAMS = {"runc": Path("/usr/sbin/runc"), "crun": Path("/usr/bin/crun")}
ANNOTATIONS = {"org.example.team": "blue"}


def oci_catalog(roots: Sequence[RuntimeRoot], programs: Mapping[str, Path], **options: Any) -> Catalog:
    """The catalog of bare runtimes, whatever else this machine has."""
    return host_catalog(find_places({}, user=False), roots, programs, engines=[EngineName.OCI], **options)


class States:
    """Writes state roots in both formats; the init process of every container is this one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runc_root = directory / "runc"
        self.crun_root = directory / "crun"
        self.me = ProcessIdentity(os.getpid(), proc.start_time(os.getpid()) or 0)

    def catalog(self, **options: Any) -> Catalog:
        return oci_catalog([RuntimeRoot(self.runc_root), RuntimeRoot(self.crun_root)], PROGRAMS, **options)

    def bundle(self, container_id: str, annotations: object = ANNOTATIONS) -> Path:
        bundle = self.directory / "bundles" / container_id
        bundle.mkdir(parents=True, exist_ok=True)
        spec = {"process": {"args": ["init"]}, "annotations": annotations}
        (bundle / "config.json").write_text(json.dumps(spec))
        return bundle

    def runc(self, container_id: str, *, init: ProcessIdentity | None = None, **changes: Any) -> Path:
        init = init or self.me
        state = {
            "id": container_id,
            "init_process_pid": init.pid,
            "init_process_start": init.start_time,
            "created": "2026-11-23T19:08:07.5Z",
            "config": {"labels": [f"bundle={self.bundle(container_id)}"]},
        }
        return _write(self.runc_root / container_id / "state.json", state | changes)

    def crun(self, container_id: str, *, init: ProcessIdentity | None = None, **changes: Any) -> Path:
        init = init or self.me
        status = {
            "pid": init.pid,
            "process-start-time": init.start_time,
            "created": "2026-11-23T19:08:07.5Z",
            "bundle": str(self.bundle(container_id)),
        }
        return _write(self.crun_root / container_id / "status", status | changes)


def _write(path: Path, document: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def states(tmp_path: Path) -> States:
    return States(tmp_path)


def ids(containers: list[Container]) -> list[str]:
    return [container.id for container in containers]


def test_a_container_of_each_runtime(states: States) -> None:
    states.runc("demo")
    states.crun("other")
    demo, other = states.catalog().list()
    assert (demo.runtime.name, demo.runtime.path, demo.runtime.root) == (
        "runc",
        PROGRAMS["runc"],
        states.runc_root,
    )
    assert (other.runtime.name, other.runtime.root) == ("crun", states.crun_root)
    for container in (demo, other):
        assert container.name == container.id
        assert container.bundle == states.directory / "bundles" / container.id
        assert container.status is ContainerStatus.RUNNING
        assert container.init == states.me
        assert container.created == 1795460887.5
        assert json.dumps(container.labels) == json.dumps(ANNOTATIONS)


def test_no_roots_and_empty_roots(states: States) -> None:
    assert oci_catalog([], PROGRAMS).list() == []
    catalog = states.catalog()
    assert catalog.list() == []
    assert catalog.problems() == []  # runtimes make their root with their first container
    states.runc("demo")
    assert ids(catalog.list()) == ["demo"]


def test_status_is_the_kernels(states: States, monkeypatch: pytest.MonkeyPatch) -> None:
    states.runc("demo")
    states.runc("gone", init=ProcessIdentity(states.me.pid, states.me.start_time + 1))
    catalog = states.catalog()
    gone = catalog.find("gone")
    assert (gone.status, gone.init) == (ContainerStatus.EXITED, None)
    fifo = states.runc_root / "demo" / "exec.fifo"
    os.mkfifo(fifo)
    assert catalog.find("demo").status is ContainerStatus.CREATED
    monkeypatch.setattr(proc, "frozen", lambda _: True)
    assert catalog.find("demo").status is ContainerStatus.PAUSED
    assert catalog.find("gone").status is ContainerStatus.EXITED
    monkeypatch.undo()
    fifo.unlink()
    assert catalog.find("demo").status is ContainerStatus.RUNNING


def test_find_by_id_then_prefix(states: States) -> None:
    for container_id in ("abc", "abcd", "abd", "x1"):
        states.runc(container_id)
    catalog = states.catalog()
    assert catalog.find("abc").id == "abc"  # a full id is never ambiguous
    assert catalog.find("abcd").id == "abcd"
    assert catalog.find("x").id == "x1"
    assert catalog.find("/x1").id == "x1"
    with pytest.raises(InvalidArgument) as caught:
        catalog.find("ab")
    assert caught.value.message == "multiple IDs found with provided prefix: ab"


@pytest.mark.parametrize(
    "ref",
    ["", "/", ".", "..", "../crun/other", "demo/../demo", "//demo", "demo/", "de\0mo", "%2e%2e", "demo\n", "\ud800"],
)
def test_references_that_are_none(states: States, ref: str) -> None:
    states.runc("demo")
    states.crun("other")
    catalog = states.catalog()
    with pytest.raises(NotFound) as caught:
        catalog.find(ref)
    assert caught.value.message.startswith("No such container: ")
    assert caught.value.message.isprintable()
    assert catalog.get(ContainerId(ref)) is None


def test_a_long_reference_comes_back_short(states: States) -> None:
    with pytest.raises(NotFound) as caught:
        states.catalog().find("x" * 10_240)
    assert len(caught.value.message) < 200


def test_unknown(states: States) -> None:
    states.runc("demo")
    with pytest.raises(NotFound) as caught:
        states.catalog().find("nosuch")
    assert caught.value.message == "No such container: nosuch"
    assert states.catalog().get(ContainerId("nosuch")) is None
    assert states.catalog().get(ContainerId("dem")) is None


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _directory(path: Path) -> None:
    path.mkdir()


def _host_link(path: Path) -> None:
    outside = path.parents[2] / "outside"
    outside.write_text(json.dumps({"id": path.parent.name}))
    path.symlink_to(outside)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 30)


def _text(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(text)

    return write


HOSTILE: dict[str, Callable[[Path], None]] = {
    "fifo": _fifo,
    "directory": _directory,
    "link": _host_link,
    "loop": _loop,
    "sparse": _sparse,
    "empty": _text(""),
    "half": _text('{"id": "half", "init_pro'),
    "list": _text("[]"),
    "deep": _text("[" * 100_000),
    "nothing": _text("{}"),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("file_name", ["state.json", "status"])
def test_one_broken_entry_breaks_no_other(states: States, kind: str, file_name: str) -> None:
    states.runc("aaa")
    states.runc("zzz")
    broken = states.runc_root / "broken" / file_name
    broken.parent.mkdir()
    HOSTILE[kind](broken)
    catalog = states.catalog()
    assert ids(catalog.list()) == ["aaa", "zzz"]
    ((path, reason),) = catalog.problems()
    assert path == str(broken.parent)
    assert reason
    with pytest.raises(NotFound) as caught:
        catalog.find("broken")
    assert reason in caught.value.hint  # the user hears what Docker says, the operator why
    assert str(states.directory) not in caught.value.message


def test_a_problem_ends_with_its_cause(states: States) -> None:
    state = states.runc("demo")
    good = state.read_text()
    catalog = states.catalog()
    state.write_text("{")
    assert catalog.list() == []
    assert len(catalog.problems()) == 1
    state.write_text(good)
    assert ids(catalog.list()) == ["demo"]
    assert catalog.problems() == []
    state.write_text("{")
    catalog.list()
    state.unlink()
    state.parent.rmdir()
    catalog.list()
    assert catalog.problems() == []


@pytest.mark.parametrize(
    ("name", "is_problem"),
    [("-option", True), ("sp ace", True), ("nul\x01", True), (".cache", False), ("\udcff", False)],
)
def test_directories_that_are_no_containers(states: States, name: str, is_problem: bool) -> None:
    states.runc("demo")
    states.runc(name)
    catalog = states.catalog()
    assert ids(catalog.list()) == ["demo"]
    assert [Path(path).name for path, _ in catalog.problems()] == [name] * is_problem


def test_files_and_symlinks_in_a_root_are_nobodys(states: States) -> None:
    states.runc("demo")
    (states.runc_root / "file").touch()
    (states.runc_root / "alias").symlink_to("demo")
    catalog = states.catalog()
    assert ids(catalog.list()) == ["demo"]
    assert catalog.get(ContainerId("alias")) is None
    assert catalog.problems() == []


def test_one_id_in_two_roots_is_the_first_roots(states: States) -> None:
    states.runc("demo")
    states.crun("demo")
    catalog = states.catalog()
    assert [c.runtime.name for c in catalog.list()] == ["runc"]
    assert catalog.find("demo").runtime.name == "runc"
    ((path, reason),) = catalog.problems()
    assert path == str(states.crun_root / "demo")
    assert str(states.runc_root) in reason


def test_the_root_names_the_runtime(states: States) -> None:
    states.runc("demo")
    programs = PROGRAMS | {"runc-next": Path("/opt/runc")}
    named = oci_catalog([RuntimeRoot(states.runc_root, "runc-next")], programs).find("demo")
    assert (named.runtime.name, named.runtime.path) == ("runc-next", Path("/opt/runc"))
    unknown = oci_catalog([RuntimeRoot(states.runc_root, "kata")], programs)
    assert unknown.list() == []
    assert "kata" in unknown.problems()[0][1]


def test_a_root_that_is_no_directory(states: States) -> None:
    states.runc_root.touch()
    states.crun("demo")
    catalog = states.catalog()
    assert ids(catalog.list()) == ["demo"]
    assert [path for path, _ in catalog.problems()] == [str(states.runc_root)]


def test_a_recreated_container_is_another_one(states: States) -> None:
    states.runc("demo")
    catalog = states.catalog()
    first = catalog.binding(catalog.find("demo"))
    states.runc("demo", init=ProcessIdentity(1, proc.start_time(1) or 0))
    second = catalog.binding(catalog.find("demo"))
    assert first.init == states.me
    assert second.init.pid == 1
    assert first != second
    assert first.boot_id == second.boot_id == proc.boot_id()


def test_a_container_without_init_has_no_binding(states: States) -> None:
    states.runc("demo", init=ProcessIdentity(states.me.pid, 1))
    catalog = states.catalog()
    with pytest.raises(Conflict, match="container demo is not running"):
        catalog.binding(catalog.find("demo"))


def test_a_deleted_container_is_gone(states: States) -> None:
    state = states.runc("demo")
    catalog = states.catalog()
    assert catalog.find("demo").id == "demo"
    state.unlink()
    state.parent.rmdir()
    with pytest.raises(NotFound):
        catalog.find("demo")
    assert catalog.problems() == []


def test_spec(states: States) -> None:
    states.runc("demo")
    catalog = states.catalog()
    container = catalog.find("demo")
    assert catalog.spec(container)["process"] == {"args": ["init"]}
    states.bundle("demo", {"org.example.team": "green", "number": 5})
    assert catalog.spec(container)["annotations"]["org.example.team"] == "green"
    assert catalog.find("demo").labels == {"org.example.team": "green"}


def test_crun_has_a_spec_of_its_own(states: States) -> None:
    """An edit of the bundle after the creation changes neither the container nor its execs."""
    status = states.crun("demo")
    _write(status.parent / "config.json", {"process": {"args": ["as created"]}})
    catalog = states.catalog()
    assert catalog.spec(catalog.find("demo"))["process"] == {"args": ["as created"]}


def test_files_are_parsed_once(states: States, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless they are so young that the next change could have the same time stamp."""
    for path in (states.runc("demo"), states.directory / "bundles/demo/config.json"):
        os.utime(path, (time.time() - 60, time.time() - 60))
    reads: list[Path] = []

    def counted(path: Path, *, limit: int, follow: bool = False) -> tuple[dict[str, Any], FileKey]:
        reads.append(path)
        return read_json(path, limit=limit, follow=follow)

    monkeypatch.setattr("execgate.containers.states.read_json", counted)
    catalog = states.catalog()
    for _ in range(3):
        catalog.spec(catalog.find("demo"))
        catalog.list()
    assert len(reads) == len(set(reads)) == 2


@pytest.mark.parametrize(
    ("spoil", "category"),
    [(_text("{"), Internal), (_fifo, Internal), (_sparse, Internal), (None, NotFound), (_loop, Internal)],
)
def test_a_container_without_a_usable_spec_is_still_seen(
    states: States, spoil: Callable[[Path], None] | None, category: type[ExecgateError]
) -> None:
    states.runc("demo")
    config = states.directory / "bundles/demo/config.json"
    good = config.read_text()
    config.unlink()
    if spoil is not None:
        spoil(config)
    catalog = states.catalog()
    container = catalog.find("demo")
    assert (container.status, container.labels) == (ContainerStatus.RUNNING, {})
    assert [Path(path).name for path, _ in catalog.problems()] == ["demo"]
    with pytest.raises(category) as caught:
        catalog.spec(container)
    assert str(config) in caught.value.hint
    assert str(config) not in caught.value.message
    if config.is_symlink() or config.exists():
        config.unlink()
    config.write_text(good)
    assert catalog.find("demo").labels == ANNOTATIONS
    assert catalog.problems() == []


@pytest.mark.parametrize("annotations", [None, [], "x", 5])
def test_annotations_of_another_type_are_none(states: States, annotations: object) -> None:
    states.runc("demo")
    states.bundle("demo", annotations)
    assert states.catalog().find("demo").labels == {}


def test_few_specs_are_kept(states: States) -> None:
    for number in range(100):
        states.runc(f"c{number}")
        os.utime(states.directory / f"bundles/c{number}/config.json", (time.time() - 60, time.time() - 60))
    catalog = states.catalog()
    assert len(catalog.list()) == 100
    assert len(catalog._specs._kept) == 64


@pytest.mark.parametrize("where", ["scandir", "open", "stat"])
def test_without_descriptors_nothing_is_declared_absent(
    states: States, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    states.runc("demo")
    catalog = states.catalog()
    catalog.list()
    if where == "scandir":
        catalog = states.catalog()  # a known container needs no scan
    if where == "open":
        (states.runc_root / "demo/state.json").touch()  # it must be read again

    def exhausted(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, where, exhausted)
    for look in (catalog.list, lambda: catalog.get(ContainerId("demo")), lambda: catalog.find("de")):
        with pytest.raises(Unavailable):
            look()
    monkeypatch.undo()
    assert ids(catalog.list()) == ["demo"]


def test_default_roots() -> None:
    as_root = default_roots({"XDG_RUNTIME_DIR": "/run/user/0"}, user=False)
    assert [root.dir for root in as_root] == [Path("/run/runc"), Path("/run/crun"), Path("/run/user/0/crun")]
    as_user = default_roots({"XDG_RUNTIME_DIR": "/run/user/5"}, user=True)
    assert [root.dir for root in as_user] == [Path("/run/user/5/runc"), Path("/run/user/5/crun")]
    assert default_roots({"XDG_RUNTIME_DIR": "relative"}, user=True) == default_roots({}, user=False)


# -- real runtimes


def _catalog_of(host: RuntimeHost) -> Catalog:
    return oci_catalog([RuntimeRoot(host.root)], {host.name: host.program})


def test_a_real_container_through_its_life(new_container: Callable[..., TestContainer]) -> None:
    before = time.time()
    container = new_container(start=False, annotations=ANNOTATIONS)
    catalog = _catalog_of(container.host)

    def look() -> Container:
        return catalog.find(container.id)

    created = look()
    assert created.status is ContainerStatus.CREATED
    assert created.bundle == container.bundle
    assert created.runtime.name == container.host.name
    assert created.labels == ANNOTATIONS
    assert before - 1 <= created.created <= time.time() + 1
    container.start()
    assert look().status is ContainerStatus.RUNNING
    assert catalog.spec(look())["hostname"] == container.id[:63]
    binding = catalog.binding(look())
    assert binding.init.pid == container.init_pid
    container.pause()
    assert look().status is ContainerStatus.PAUSED
    container.resume()
    assert look().status is ContainerStatus.RUNNING
    pidfd = os.pidfd_open(binding.init.pid)
    try:
        container.kill()
        assert select.select([pidfd], [], [], 10)[0]
    finally:
        os.close(pidfd)
    assert look().status is ContainerStatus.EXITED
    container.delete()
    with pytest.raises(NotFound):
        look()
    assert catalog.problems() == []
