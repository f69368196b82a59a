"""What engines, runtimes and the makers of images have written on the host's disk.

Each engine has a small tree of files as it writes them, with a victim and a witness, both running. An input replaces
one file of the victim's, or one that both share. Whatever it is, every question must have an answer: the victim is
shown or left out with a reason, and where the file is the victim's own, the witness is shown as before.
"""

import contextlib
import functools
import json
import os
import sqlite3
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from execgate.containers import bolt, cgroups
from execgate.containers.catalog import Catalog
from execgate.containers.engines import places
from execgate.containers.formats import parse_container_id
from execgate.http.answers.subjects import Subject
from execgate.http.dialects import DOCKER, LIBPOD
from execgate.model.config import ConsoleSize, ExecConfig
from execgate.model.container import Container, EngineName
from execgate.model.errors import Internal, InvalidArgument, NotFound
from execgate.model.ids import ContainerId
from execgate.oci.process import build_process, process_of
from execgate.oci.users import container_user
from execgate.runtime.versions import parse_version
from fuzz.target import Target, scratch
from support.bolt import Tree, checksum, write_bolt
from support.found import catalog_below, this_process
from support.trees import (
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
from support.trees.podman import V4

_CONFIG = ExecConfig(args=("true",), tty=True, user="app", env=("A=b",))


# -- engines


@dataclass(frozen=True, slots=True)
class _Tree:
    """The files of one engine. `files` are those that an input can replace, by a name; `shared` are not the victim's
    alone. `witness` is the other container as the catalog has it."""

    root: Path
    engine: EngineName
    files: Mapping[str, Path]
    shared: frozenset[str]
    victim: Placed
    witness: Container

    def catalog(self) -> Catalog:
        return catalog_below(self.root, engines=[self.engine])


_Make = Callable[[Path], tuple[Placed, Placed, dict[str, Path], dict[str, Path]]]


def _tree(engine: EngineName, name: str, make: _Make) -> _Tree:
    root = scratch() / name
    victim, witness, own, shared = make(root)
    found = catalog_below(root, engines=[engine]).find(witness.plan.id)
    assert catalog_below(root, engines=[engine]).find(victim.name).id == victim.plan.id
    own = {"config.json": victim.spec_file, victim.state_file.name: victim.state_file, **own}
    return _Tree(root, engine, own | shared, frozenset(shared), victim, found)


def _two(runtime: str = "runc") -> Any:
    return plans(2, inits=[this_process()], lives=[Life.RUNNING], runtimes=[runtime])


def _make_docker(root: Path) -> Any:
    victim, witness = docker_tree(root, _two())
    assert victim.record is not None
    own = {
        "config.v2.json": victim.record,
        "hostconfig.json": victim.record.with_name("hostconfig.json"),
        "options.json": victim.bundle / "options.json",
    }
    return victim, witness, own, {}


def _make_podman(root: Path) -> Any:
    tree = podman_tree(root, _two("crun"))
    victim, witness = tree
    assert tree.database is not None
    return victim, witness, {}, {"containers.json": tree.store.containers / "containers.json", "db.sql": tree.database}


def _make_old_podman(root: Path) -> Any:
    """Podman before 4.8, whose database is a bolt file."""
    tree = podman_tree(root, _two(), version=V4, with_database=False)
    victim, witness = tree
    database = tree.store.graph_root / "libpod/bolt_state.db"
    database.parent.mkdir(parents=True)
    write_bolt(database, {b"ctr": {victim.plan.id.encode(): {b"config": b'{"user":"app"}', b"state": b"{}"}}})
    return victim, witness, {}, {"bolt_state.db": database}


def _make_crio(root: Path) -> Any:
    tree = crio_tree(root, _two())
    victim, witness = (one for one in tree if not one.plan.is_infra)
    return victim, witness, {}, {"containers.json": tree.store.containers / "volatile-containers.json"}


def _make_containerd(root: Path) -> Any:
    victim, witness = containerd_tree(root, _two())
    database = root / "var/lib/containerd/io.containerd.metadata.v1.bolt/meta.db"
    database.parent.mkdir(parents=True, exist_ok=True)
    record: Tree = {b"image": b"busybox", b"labels": {b"a": b"b"}}
    namespace = victim.bundle.parent.name.encode()
    write_bolt(database, {b"v1": {namespace: {b"containers": {victim.plan.id.encode(): record}}}})
    own = {"options.json": victim.bundle / "options.json", "shim-binary-path": victim.bundle / "shim-binary-path"}
    return victim, witness, own, {"meta.db": database}


def _make_nerdctl(root: Path) -> Any:
    victim, witness = nerdctl_tree(root, _two())
    assert victim.record is not None
    return victim, witness, {}, {"name": victim.record}  # which may claim to be the witness's


def _make_kubernetes(root: Path) -> Any:
    victim, witness = (one for one in kubernetes_tree(root, _two()) if not one.plan.is_infra)
    return victim, witness, {}, {}


def _make_oci(runtime: str) -> _Make:
    def make(root: Path) -> Any:
        victim, witness = oci_tree(root, _two(runtime))
        return victim, witness, {}, {}

    return make


@functools.cache
def _trees() -> Mapping[str, _Tree]:
    made = {
        "docker": (EngineName.DOCKER, _make_docker),
        "podman": (EngineName.PODMAN, _make_podman),
        "podman4": (EngineName.PODMAN, _make_old_podman),
        "crio": (EngineName.CRIO, _make_crio),
        "containerd": (EngineName.CONTAINERD, _make_containerd),
        "nerdctl": (EngineName.CONTAINERD, _make_nerdctl),
        "kubernetes": (EngineName.CONTAINERD, _make_kubernetes),
        "runc": (EngineName.OCI, _make_oci("runc")),
        "crun": (EngineName.OCI, _make_oci("crun")),
    }
    return {name: _tree(engine, name, make) for name, (engine, make) in made.items()}


def engine_files(data: bytes) -> None:
    """An engine and a file on the first line (`docker config.json`), behind it what that file holds."""
    head, _, content = data.partition(b"\n")
    tree, file = _named(head)
    with _replaced(tree.files[file], _placed(content, tree.root)):
        catalog = tree.catalog()
        shown = {container.id: container for container in catalog.list()}
        if file not in tree.shared:
            assert shown.get(tree.witness.id) == tree.witness
            assert shown.keys() <= {tree.witness.id, tree.victim.plan.id}
            assert tree.victim.plan.id in shown or any(tree.victim.plan.id in place for place, _ in catalog.problems())
        for container in shown.values():
            assert parse_container_id(container.id) is not None
            _check_container(catalog, container)
        for ref in (tree.victim.name, tree.victim.plan.id[:12]):
            with contextlib.suppress(NotFound, InvalidArgument):
                catalog.find(ref)
        json.dumps(catalog.problems())
        assert all(look.place for _, looks in catalog.looks() for look in looks)


def _named(head: bytes) -> tuple[_Tree, str]:
    """Return the tree and the file that a first line names; what names none is a number of one."""
    engine, _, file = head.decode(errors="replace").partition(" ")
    number = sum(head)
    tree = _trees().get(engine) or list(_trees().values())[number % len(_trees())]
    return tree, file if file in tree.files else list(tree.files)[number % len(tree.files)]


def _placed(content: bytes, root: Path) -> bytes:
    """Return content with what differs from run to run in it: where the tree is, and the process that lives."""
    content = _with_checksums(content)
    alive = this_process()
    for name, value in (("@ROOT@", root), ('"@PID@"', alive.pid), ('"@START@"', alive.start_time)):
        content = content.replace(name.encode(), str(value).encode())
    return content


@contextlib.contextmanager
def _replaced(path: Path, content: bytes) -> Iterator[None]:
    original = path.read_bytes()
    path.write_bytes(content)
    # An hour old: what is younger than a moment is read again at each look.
    hour_ago = time.time_ns() - 3600 * 10**9
    os.utime(path, ns=(hour_ago, hour_ago))
    try:
        yield
    finally:
        path.write_bytes(original)


def _check_container(catalog: Catalog, container: Container) -> None:
    """Hold that a container can be told in every dialect, and that an exec in it can be begun or is refused."""
    try:
        spec = catalog.spec(container)
    except (NotFound, Internal):
        spec = {}
    for dialect, version in ((DOCKER, (1, 51)), (LIBPOD, (4, 0, 0)), (LIBPOD, (5, 8, 0))):
        subject = Subject(container, spec)
        for answer in (dialect.answers.summary(subject), dialect.answers.container(subject, version)):
            json.dumps(answer, allow_nan=False).encode()
    _check_process(spec, container)


def _check_process(spec: Mapping[str, Any], container: Container) -> None:
    """Hold that a configuration gives a process.json that a runtime can read, or none at all."""
    try:
        process = process_of(spec)
    except Internal:
        return
    user = container_user(process)
    assert 0 <= user.uid < 2**32
    built = build_process(
        process,
        _CONFIG,
        user,
        console_size=ConsoleSize(24, 80),
        all_capabilities=["CAP_KILL"],
        manner=container.manner,
        default_limits={"RLIMIT_NOFILE": (1, 2)},
    )
    json.dumps(built, ensure_ascii=False).encode(errors="surrogateescape")
    assert built["args"] == ["true"]
    assert all(isinstance(entry, str) and "=" in entry for entry in built["env"])


# -- Podman's rows, bolt databases


@functools.cache
def _podman_database() -> tuple[_Tree, sqlite3.Connection]:
    tree = _trees()["podman"]
    database = sqlite3.connect(tree.files["db.sql"], isolation_level=None)
    database.execute("PRAGMA synchronous = OFF")
    database.execute("PRAGMA journal_mode = MEMORY")
    return tree, database


def podman_rows(data: bytes) -> None:
    """`config` or `state` on the first line, behind it what libpod's database holds of a container: text, or what
    SQLite also allows there, a number or a blob."""
    column, _, content = data.partition(b"\n")
    table = "ContainerState" if column == b"state" else "ContainerConfig"
    tree, database = _podman_database()
    query = f"UPDATE {table} SET JSON = ? WHERE ID = ?"
    select = f"SELECT JSON FROM {table} WHERE ID = ?"
    before = database.execute(select, (tree.victim.plan.id,)).fetchone()[0]
    database.execute(query, (_stored(content), tree.victim.plan.id))
    try:
        catalog = tree.catalog()
        shown = {container.id: container for container in catalog.list()}
        assert shown[tree.witness.id] == tree.witness
        told = [reason for place, reason in catalog.problems() if tree.victim.plan.id in place]
        if (victim := shown.get(ContainerId(tree.victim.plan.id))) is not None:
            _check_container(catalog, victim)
        else:  # a record costs its fields, not the container; but it is where the name of the runtime is
            assert all("no program" in reason for reason in told)
            assert told
    finally:
        database.execute(query, (before, tree.victim.plan.id))


def _stored(content: bytes) -> object:
    """Return a value as SQLite may have it."""
    if content.isdigit() and len(content) < 18:
        return int(content)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content


_BUDGET = 1 << 20


def bolt_database(data: bytes) -> None:
    """A bolt file, whose checksums are made to fit: all in it can be read or it is damaged, at a bounded cost."""
    path = scratch() / "bolt.db"
    path.write_bytes(_with_checksums(data))
    with mock.patch.object(bolt, "MAX_BYTES", _BUDGET):
        try:
            size = bolt.read(path, _size_of)
        except Internal as error:
            assert str(path) in error.hint
        else:
            assert size <= _BUDGET
        for keys in ((b"v1", b"default", b"containers", b"c", b"image"), (b"ctr", b"c", b"config"), (b"",)):
            with contextlib.suppress(Internal):
                value = bolt.read(path, lambda root, keys=keys: root.get(*keys))  # type: ignore[misc]
                assert value is None or len(value) <= len(data)


def _size_of(bucket: bolt.Bucket) -> int:
    """Return the bytes of all keys and values below a bucket."""
    return sum(len(key) + len(value) for key, value in bucket.items()) + sum(
        len(name) + _size_of(inner) for name, inner in bucket.buckets()
    )


def _with_checksums(data: bytes) -> bytes:
    """Return a file whose meta pages have the checksum that belongs to what they say."""
    fixed = bytearray(data)
    for offset in (0, *(1024 << shift for shift in range(4))):
        meta = bytes(fixed[offset + 16 : offset + 72])
        if len(fixed) >= offset + 80 and meta.startswith(struct.pack("=I", 0xED0CDAED)):
            fixed[offset + 72 : offset + 80] = struct.pack("=Q", checksum(meta))
    return bytes(fixed)


# -- small ones


def host_texts(data: bytes) -> None:
    """What else is read of a host: mounts and cgroups, an engine's configuration, what a runtime says of itself."""
    for one in cgroups.parse_mounts(data):
        assert one.controllers
        for path in ("/", "/a/b", one.root):
            below = cgroups.below(one.root, path)
            assert below is None or ".." not in below.split("/")
    cgroups._parsed_memberships.__wrapped__(data)
    configuration = scratch() / "configuration"
    configuration.write_bytes(data)
    places._json(configuration)
    places._toml(configuration)
    version = parse_version(data.decode(errors="replace"))
    assert len(version.text) <= 200 + len(data)


TARGETS = (
    Target(
        check=engine_files,
        is_json=True,
        has_first_line=True,
        max_length=12 * 1024,
        tokens=(
            *(
                b'"@ROOT@"',
                b'"@PID@"',
                b'"@START@"',
                b'"id"',
                b'"init_process_pid"',
                b'"init_process_start"',
                b'"created"',
            ),
            *(
                b'"config"',
                b'"labels"',
                b'"bundle=@ROOT@"',
                b'"bundle=/"',
                b'"bundle=/\\u0000"',
                b'"cgroups"',
                b'"Systemd"',
            ),
            *(
                b'"pid"',
                b'"process-start-time"',
                b'"bundle"',
                b'"systemd-cgroup"',
                b'"process"',
                b'"annotations"',
                b'"env"',
            ),
            *(
                b'"user"',
                b'"uid"',
                b'"gid"',
                b'"additionalGids"',
                b'"capabilities"',
                b'"bounding"',
                b'"effective"',
                b'"cwd"',
            ),
            *(b'"rlimits"', b'"type"', b'"args"', b'"terminal"', b'"hostname"', b'"umask"', b'"consoleSize"', b'"ID"'),
            *(
                b'"Created"',
                b'"Config"',
                b'"State"',
                b'"Tty"',
                b'"StartedAt"',
                b'"FinishedAt"',
                b'"ExitCode"',
                b'"Name"',
            ),
            *(
                b'"Labels"',
                b'"Image"',
                b'"Path"',
                b'"Args"',
                b'"User"',
                b'"StopTimeout"',
                b'"Runtime"',
                b'"Privileged"',
            ),
            *(
                b'"Env"',
                b'"TERM=x"',
                b'"binary_name"',
                b'"root"',
                b'"systemd_cgroup"',
                b'"names"',
                b'"image"',
                b'"metadata"',
            ),
            *(b'"{\\"pod-id\\":\\"a\\"}"', b'"{\\"name\\":\\"a\\"}"', b'"{\\"pod-id\\":[\\"\\\\ud800\\"]}"'),
            *(
                b'"io.kubernetes.cri.sandbox-name"',
                b'"io.kubernetes.cri.container-name"',
                b'"io.kubernetes.cri.container-type"',
            ),
            *(b'"sandbox"', b'"nerdctl/name"', b'"io.container.manager"', b'"libpod"', b'"io.kubernetes.cri-o.Labels"'),
            *(b'"io.kubernetes.pod.terminationGracePeriod"', b'"io.kubernetes.pod.name"', b'"runc"', b'"crun"', b'"/"'),
            *(
                b"docker ",
                b"podman ",
                b"crio ",
                b"containerd ",
                b"nerdctl ",
                b"kubernetes ",
                b"runc ",
                b"crun ",
                b"podman4 ",
            ),
            *(b"config.json\n", b"state.json\n", b"status\n", b"config.v2.json\n", b"containers.json\n", b"name\n"),
            *(b"meta.db\n", b"bolt_state.db\n", struct.pack("=HHI", 2, 1, 0), struct.pack("=IIII", 1, 16, 1, 16)),
        ),
    ),
    Target(
        check=podman_rows,
        is_json=True,
        has_first_line=True,
        tokens=(
            *(b"config\n", b"state\n", b'"spec"', b'"process"', b'"env"', b'"labels"', b'"user"', b'"entrypoint"'),
            *(
                b'"command"',
                b'"stopTimeout"',
                b'"runtime"',
                b'"privileged"',
                b'"exitCode"',
                b'"finishedTime"',
                b'"runc"',
            ),
            *(b'"0001-01-01T00:00:00Z"', b'"2026-01-31T12:00:00Z"', b"1" * 17, b"null", b"\xff", b'"/"', b"1e999"),
        ),
    ),
    Target(
        check=bolt_database,
        max_length=12 * 1024,
        tokens=(
            *(struct.pack("=I", 0xED0CDAED), struct.pack("=II", 2, 1024), struct.pack("=HHI", 1, 1, 0), b"\0" * 16),
            *(struct.pack("=HHI", 2, 1, 0), struct.pack("=HHI", 2, 1, 2**32 - 1), struct.pack("=HHI", 1, 2**16 - 1, 0)),
            *(
                struct.pack("=IIII", 1, 16, 1, 16),
                struct.pack("=IIQ", 16, 1, 3),
                struct.pack("=QQ", 3, 0),
                b"v1",
                b"ctr",
            ),
            *(struct.pack("=Q", page) for page in (0, 1, 2, 3, 4, 5, 2**63, 2**64 - 1)),
        ),
    ),
    Target(
        check=host_texts,
        tokens=(
            *(
                b"30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n",
                b" - cgroup cgroup rw,cpu,cpuacct\n",
                b"\\040",
            ),
            *(
                b"0::/a/b\n",
                b"3:cpu,cpuacct:/a\n",
                b"1:name=systemd:/..\n",
                b"/../a",
                b" - ",
                b"\\777",
                b"{",
                b"[" * 64,
            ),
            *(
                b'[storage]\ngraphroot = "/a"\n',
                b"[engine.runtimes]\n",
                b"a = [",
                b"{a = ",
                b'"data-root"',
                b"\r",
                b"\x85",
            ),
            *(
                b"runc version 1.4.0-rc.2\n",
                b"crun version 1.8.1\n",
                b"runc version v",
                b"9" * 64,
                b".",
                b"\xd9\xa1",
                b"~rc93",
            ),
        ),
    ),
)
