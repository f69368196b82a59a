"""From a process to the directories of its cgroups."""

from pathlib import Path

import pytest

from execgate.containers import cgroups
from execgate.containers.cgroups import V2, Cgroup, CgroupMount, below, is_frozen, parse_mounts, pids_below

HYBRID = rb"""31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 master:2 - cgroup cgroup rw,cpu,cpuacct
37 31 0:34 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 /part\040a /sys/fs/cgroup/uni\040fied\134 rw,relatime - cgroup2 cgroup2 rw
garbage
1 2 3 - cgroup
"""


def test_mounts() -> None:
    cpu, freezer, systemd, unified = parse_mounts(HYBRID)
    assert {"cpu", "cpuacct"} <= cpu.controllers
    assert freezer == CgroupMount(frozenset({"rw", "freezer"}), "/", "/sys/fs/cgroup/freezer")
    assert "name=systemd" in systemd.controllers
    assert unified == CgroupMount(frozenset({V2}), "/part a", "/sys/fs/cgroup/uni fied\\")


@pytest.mark.parametrize(
    ("root", "path", "expected"),
    [
        ("/", "/a/b", "a/b"),
        ("/", "/", ""),
        ("/a", "/a", ""),
        ("/a", "/a/b", "b"),
        ("/a", "/ab", None),
        ("/a/b", "/a", None),
        ("/", "/../sibling", None),  # outside of our cgroup namespace
        ("/..", "/../sibling", "sibling"),
        ("/..", "/a", None),  # it is there, under a name we do not know
        ("/../..", "/../x", None),
    ],
)
def test_paths_and_cgroup_namespaces(root: str, path: str, expected: str | None) -> None:
    assert below(root, path) == expected


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A cgroup2 file system in miniature: /a/b/c."""
    for path in (tmp_path, tmp_path / "a", tmp_path / "a/b", tmp_path / "a/b/c"):
        path.mkdir(exist_ok=True)
        (path / "cgroup.procs").write_text("")
        (path / "cgroup.freeze").write_text("0\n")
        (path / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    return tmp_path


def test_frozen_v2(tree: Path) -> None:
    cgroup = Cgroup(f"{tree}/a/b", str(tree))
    assert not is_frozen(cgroup, V2)
    (tree / "a/cgroup.freeze").write_text("1\n")  # a parent that is being frozen
    assert is_frozen(cgroup, V2)
    (tree / "a/cgroup.freeze").write_text("0\n")
    (tree / "a/b/cgroup.events").write_text("populated 1\nfrozen 1\n")
    assert is_frozen(cgroup, V2)


@pytest.mark.parametrize(("state", "frozen"), [("THAWED", False), ("FREEZING", True), ("FROZEN", True)])
def test_frozen_v1(tmp_path: Path, state: str, frozen: bool) -> None:
    (tmp_path / "freezer.state").write_text(state + "\n")
    assert is_frozen(Cgroup(str(tmp_path), str(tmp_path.parent)), "freezer") is frozen


def test_a_removed_cgroup_is_not_frozen_and_empty(tmp_path: Path) -> None:
    gone = Cgroup(f"{tmp_path}/gone", str(tmp_path))
    assert not is_frozen(gone, V2)
    assert not is_frozen(gone, "freezer")
    assert pids_below(gone.directory) == set()


def test_pids_of_the_whole_tree(tree: Path) -> None:
    (tree / "a/cgroup.procs").write_text("5\n6\n")
    (tree / "a/b/c/cgroup.procs").write_text("7\n0\n")
    assert pids_below(f"{tree}/a") == {5, 6, 7}
    assert pids_below(f"{tree}/a/b") == {7}


def test_lineage_ends_below_the_mount_point() -> None:
    assert list(Cgroup("/m/a/b", "/m").lineage()) == ["/m/a/b", "/m/a"]
    assert list(Cgroup("/m", "/m").lineage()) == []


def test_mounts_that_changed_are_read_again(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    def mountinfo(path: str) -> bytes:
        reads.append(path)
        point = "/nowhere" if len(reads) == 1 else tree
        return f"41 31 0:38 / {point} rw,relatime - cgroup2 cgroup2 rw\n".encode()

    cgroups._forget_mounts()
    monkeypatch.setattr(cgroups, "read_kernel", mountinfo)
    try:
        assert cgroups.find(V2, "/a/b") == Cgroup(f"{tree}/a/b", str(tree))
        assert cgroups.find(V2, "/a/b/c") == Cgroup(f"{tree}/a/b/c", str(tree))
        assert len(reads) == 2
        assert cgroups.find(V2, "/none") is None
        assert cgroups.find("freezer", "/a") is None
    finally:
        cgroups._forget_mounts()


def test_memberships_of_this_process() -> None:
    paths = cgroups.memberships("self")
    assert paths
    assert all(path.startswith("/") for path in paths.values())
    assert cgroups.memberships(2**31 - 1) == {}
