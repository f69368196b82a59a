"""Whose root is the host's: one change to an ordinary configuration, and the reason that comes of it."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from execgate.oci.capabilities import CAPABILITIES
from execgate.oci.equivalence import ENGINE_SOCKETS, host_equivalent
from support.bundle import bundle_config
from support.engines import IMAGE, Docker, Engine, Podman, docker_engine, podman_engine
from support.trees import crio_tree, docker_tree, kubernetes_tree, nerdctl_tree, oci_tree, plans, podman_tree
from support.trees.plan import Placing

ID = "5f" * 32
POD = "7c6d0e0a-0000-4000-8000-000000000001"
NO_REASON: tuple[str, ...] = ()
DENY_ALL = {"allow": False, "access": "rwm"}


def bind(source: str, *options: str, destination: str = "/inside") -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": source, "options": ["rbind", *options]}


def ordinary(*mounts: dict[str, Any], **linux: Any) -> dict[str, Any]:
    """The configuration of a container of Docker's that nobody asked anything special of."""
    spec = bundle_config(hostname="c")
    spec["root"] = {"path": f"/var/lib/docker/overlay2/{ID}/merged"}
    spec["mounts"] += [
        bind(f"/var/lib/docker/containers/{ID}/{name}", "rprivate", destination=f"/etc/{name}")
        for name in ("resolv.conf", "hostname", "hosts")
    ]
    spec["mounts"] += mounts
    spec["linux"]["resources"] = {"devices": [DENY_ALL, allow("c", 1, 3), allow("c", 136)]}
    spec["linux"] |= linux
    return spec


def allow(kind: str, major: int | None = None, minor: int | None = None, access: str = "rwm") -> dict[str, Any]:
    numbers = {name: number for name, number in (("major", major), ("minor", minor)) if number is not None}
    return {"allow": True, "type": kind, "access": access, **numbers}


def with_namespace(kind: str, path: str | None = None) -> list[dict[str, str]]:
    """The namespaces of an ordinary container with this one joined by path, or without it."""
    others = [one for one in ordinary()["linux"]["namespaces"] if one["type"] != kind]
    return others if path is None else [*others, {"type": kind, "path": path}]


def user_namespace(*mappings: tuple[int, int, int]) -> dict[str, Any]:
    names = ("containerID", "hostID", "size")
    return {
        "namespaces": [*ordinary()["linux"]["namespaces"], {"type": "user"}],
        "uidMappings": [dict(zip(names, mapping, strict=True)) for mapping in mappings],
    }


def with_capabilities(*names: str, spec: dict[str, Any] | None = None) -> dict[str, Any]:
    spec = copy.deepcopy(spec or ordinary())
    spec["process"]["capabilities"]["bounding"] = [*spec["process"]["capabilities"]["bounding"], *names]
    return spec


# -- what every engine makes is no way out


@pytest.mark.parametrize("make", [oci_tree, docker_tree, kubernetes_tree, nerdctl_tree, podman_tree, crio_tree])
def test_what_engines_write(make: Callable[[Path, list[Any]], Placing], tmp_path: Path) -> None:
    specs = [json.loads(one.spec_file.read_text()) for one in make(tmp_path, plans(8)) if one.spec_file.exists()]
    assert specs
    assert {host_equivalent(spec) for spec in specs} == {NO_REASON}


@pytest.mark.parametrize(
    "source",
    [
        # what engines give to a container out of their own directories
        f"/var/lib/docker/containers/{ID}/hosts",
        f"/var/lib/docker/100000.100000/containers/{ID}/resolv.conf",
        f"/var/lib/docker/containers/{ID}/mounts/shm",
        f"/var/lib/docker/containers/{ID}/mounts/secrets/key",
        "/var/lib/docker/volumes/data/_data",
        "/var/lib/docker/volumes/data/_data/sub",
        f"/run/containers/storage/overlay-containers/{ID}/userdata/hosts",
        f"/run/containers/storage/overlay-containers/{ID}/userdata/run/secrets",
        f"/var/run/containers/storage/overlay-containers/{ID}/userdata/.containerenv",
        f"/var/lib/containers/storage/vfs-containers/{ID}/userdata/shm",
        "/var/lib/containers/storage/volumes/data/_data",
        f"/run/containerd/io.containerd.grpc.v1.cri/sandboxes/{ID}/shm",
        f"/var/lib/containerd/io.containerd.grpc.v1.cri/sandboxes/{ID}/resolv.conf",
        f"/var/lib/rancher/k3s/agent/containerd/io.containerd.grpc.v1.cri/sandboxes/{ID}/hostname",
        f"/var/lib/kubelet/pods/{POD}/etc-hosts",
        f"/var/lib/kubelet/pods/{POD}/containers/app/0123abcd",
        f"/var/lib/kubelet/pods/{POD}/volumes/kubernetes.io~projected/kube-api-access-x2x4z",
        f"/var/lib/kubelet/pods/{POD}/volume-subpaths/config/app/0",
        f"/var/lib/nerdctl/1935db59/etchosts/default/{ID}/hosts",
        "/var/lib/nerdctl/1935db59/volumes/default/data/_data",
        # what people mount
        "/srv/data",
        "/data",
        "/opt/app",
        "/home/alice/project",
        "/root/project",
        "/root/.config/app",
        "/var/log",
        "/var/lib/postgresql",
        "/etc/localtime",
        "/etc/app",
        "/etc/ssl/certs",
        "/etc/letsencrypt",
        "/etc/hosts",
        "/etc/resolv.conf",
        "/tmp/.X11-unix",
        "/dev/shm",
        "/dev/snd",
        "/run/user/1000/pulse",
        "/usr/share/zoneinfo",
        "/var/lib/lxcfs/proc/meminfo",
        # what only looks like another
        "/etcetera",
        "/rooted",
        "/var/lib/dockerish/containers",
        "/run/docker.sock.d",
        "/processes",
    ],
)
def test_mounts_of_no_account(source: str) -> None:
    assert host_equivalent(ordinary(bind(source))) == NO_REASON


@pytest.mark.parametrize(
    "spec",
    [
        ordinary(bind("/usr", "ro")),
        ordinary(bind("/boot", "ro")),
        ordinary(bind("/var/lib/docker", "ro")),
        ordinary(bind(f"/var/lib/docker/containers/{ID}", "ro")),
        ordinary(bind("/home", "ro")),
        ordinary(bind("/lib/modules", "ro")),
        ordinary(bind("/etc/passwd", "ro")),
        ordinary(bind("/proc/cpuinfo", "ro")),
        ordinary(bind("/sys", "rro")),
        ordinary(bind("/sys/class/net", "ro")),
        ordinary(bind("/sys/fs/cgroup", "ro")),
        ordinary(bind("/sys", "ro", destination="/s"), bind("/data", destination="/s/fs/cgroup")),
        ordinary({"destination": "/d", "type": "none", "source": "data", "options": ["bind"]}),
        ordinary({"destination": "/d", "type": "tmpfs", "source": "tmpfs"}),
        ordinary({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["rw"]}),
        # Podman for a systemd inside, on cgroup v1
        ordinary(
            bind("/sys/fs/cgroup/systemd", "rprivate", destination="/sys/fs/cgroup/systemd"),
            maskedPaths=["/sys/fs/cgroup/systemd/release_agent"],
        ),
        *(ordinary(namespaces=with_namespace(kind)) for kind in ("network", "ipc", "uts", "cgroup", "time")),
        ordinary(namespaces=with_namespace("network", "/proc/1/ns/net")),
        ordinary(seccomp=None),
    ],
    ids=repr,
)
def test_what_does_not_count(spec: dict[str, Any]) -> None:
    assert host_equivalent(spec) == NO_REASON


# -- namespaces


def test_the_hosts_processes() -> None:
    assert host_equivalent(ordinary(namespaces=with_namespace("pid"))) == ("it shares the host's pid namespace",)


def test_the_hosts_mounts() -> None:
    assert host_equivalent(ordinary(namespaces=with_namespace("mount"))) == ("it shares the host's mount namespace",)


@pytest.mark.parametrize("kind", ["pid", "mount"])
@pytest.mark.parametrize(
    ("path", "same", "reason"),
    [
        ("/proc/4711/ns/pid", None, "it joins a {} namespace that may be the host's"),
        ("/proc/4711/ns/pid", True, "it shares the host's {} namespace"),
        ("/proc/4711/ns/pid", False, ""),
        ("/proc/1/ns/pid", None, "it shares the host's {} namespace"),
        ("//proc/./2/../1/ns/pid", False, "it shares the host's {} namespace"),
    ],
)
def test_a_namespace_that_is_joined(kind: str, path: str, same: bool | None, reason: str) -> None:
    """Without a look at it nobody knows: it may be a pod's, or the host's under another number."""
    asked: list[str] = []

    def same_as_host(path: str) -> bool:
        asked.append(path)
        return same is True

    spec = ordinary(namespaces=with_namespace(kind, path))
    found = host_equivalent(spec, same_as_host=None if same is None else same_as_host)
    assert found == ((reason.format(kind),) if reason else NO_REASON)
    assert set(asked) <= {path}


# -- a user namespace

SYS_ADMIN = "CAP_SYS_ADMIN without a user namespace"
ETC = "it mounts /etc of the host"


@pytest.mark.parametrize(
    ("linux", "is_one"),
    [
        (user_namespace((0, 100000, 65536)), True),
        (user_namespace((0, 100000, 1000), (1000, 1000, 1)), True),
        (user_namespace((0, 0, 4294967295)), False),
        (user_namespace((0, 0, 1), (1, 100000, 65536)), False),
        (user_namespace((1, 100000, 65535), (0, 0, 1)), False),
        (user_namespace((0, 100000, 65536), (70000, 0, 1)), False),
        (user_namespace(), False),
        ({"uidMappings": [{"containerID": 0, "hostID": 100000, "size": 65536}]}, False),
        ({"namespaces": with_namespace("user", "/proc/4711/ns/user")}, False),
    ],
)
def test_a_user_namespace_takes_the_capabilities_their_power(linux: dict[str, Any], is_one: bool) -> None:
    """Only one in which nobody is the host's root."""
    spec = with_capabilities("CAP_SYS_ADMIN", spec=ordinary(bind("/etc"), **linux))
    assert host_equivalent(spec) == (NO_REASON if is_one else (SYS_ADMIN, ETC))


def test_in_a_user_namespace() -> None:
    """Files have owners and devices have rules there; who listens at a socket may take anybody for root."""
    inside = user_namespace((0, 100000, 65536))
    open_devices = {"resources": {"devices": [allow("a")]}, "devices": [{"type": "b", "path": "/dev/sda", "major": 8}]}
    powerful = with_capabilities(
        *CAPABILITIES, spec=ordinary(bind("/etc"), bind("/proc/1/root"), **inside, **open_devices)
    )
    assert host_equivalent(powerful) == NO_REASON
    assert host_equivalent(ordinary(bind("/run/docker.sock"), **inside)) == ("it mounts /run/docker.sock of the host",)
    assert host_equivalent(ordinary(bind("/"), **inside)) == ("it mounts / of the host",)
    shared = {**inside, "namespaces": [one for one in inside["namespaces"] if one["type"] != "pid"]}
    assert host_equivalent(ordinary(**shared)) == ("it shares the host's pid namespace",)


# -- capabilities


@pytest.mark.parametrize("name", CAPABILITIES)
def test_one_capability_more(name: str) -> None:
    strong = {"CAP_SYS_ADMIN", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_DAC_READ_SEARCH", "CAP_SYS_BOOT"}
    expected = (f"{name} without a user namespace",) if name in strong else NO_REASON
    assert host_equivalent(with_capabilities(name)) == expected


def test_two_that_are_strong_together() -> None:
    assert host_equivalent(with_capabilities("CAP_BPF", "CAP_PERFMON")) == (
        "CAP_BPF with CAP_PERFMON without a user namespace",
    )


def test_names_in_any_spelling() -> None:
    assert host_equivalent(with_capabilities("sys_admin")) == (SYS_ADMIN,)
    assert host_equivalent(with_capabilities("cap_sys_admin")) == (SYS_ADMIN,)


def test_only_the_bounding_set_counts() -> None:
    """It is what an exec as root gets; the init's own sets may be smaller."""
    spec = with_capabilities("CAP_SYS_ADMIN")
    capabilities = spec["process"]["capabilities"]
    assert "CAP_SYS_ADMIN" not in capabilities["effective"]
    assert host_equivalent(spec) == (SYS_ADMIN,)
    capabilities["bounding"], capabilities["effective"] = capabilities["effective"], capabilities["bounding"]
    assert host_equivalent(spec) == NO_REASON


@pytest.mark.parametrize("missing", [(), ("CAP_SYS_RESOURCE",), ("CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE")])
def test_privileged(missing: tuple[str, ...]) -> None:
    """One reason for all; what the engine itself does not have, or does not know, is no difference."""
    spec = with_capabilities(*(name for name in CAPABILITIES if name not in missing))
    spec["linux"] |= {"maskedPaths": [], "readonlyPaths": [], "resources": {"devices": [allow("a")]}}
    spec["mounts"][-4]["options"] = spec["mounts"][4]["options"] = ["nosuid", "rw"]
    assert host_equivalent(spec) == (
        "it is privileged: it has every capability that counts, without a user namespace",
        "it can write to /proc/sys of the host",
        "it can write to sysfs of the host",
    )


# -- files of the host


@pytest.mark.parametrize("source", ENGINE_SOCKETS)
@pytest.mark.parametrize("options", [(), ("ro",), ("rro",)])
def test_a_socket_of_an_engine(source: str, options: tuple[str, ...]) -> None:
    """To connect is not to write: a read-only mount is no fence."""
    assert host_equivalent(ordinary(bind(source, *options))) == (f"it mounts {source} of the host",)


def test_sockets_that_the_caller_knows() -> None:
    for source in ("/srv/gate/exec.sock", "/srv/gate", "/srv", "/var/run/gate.sock"):
        found = host_equivalent(ordinary(bind(source)), sockets=["/srv/gate/exec.sock", "/run/gate.sock"])
        assert found == (f"it mounts {source.removeprefix('/var')} of the host",)
    assert host_equivalent(ordinary(bind("/run/docker.sock")), sockets=[]) == NO_REASON


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/", "/"),
        ("//", "/"),
        ("/..", "/"),
        ("/srv/../", "/"),
        ("/var", "/var"),
        ("/var/run", "/run"),
        ("/run", "/run"),
        ("/var/run/docker.sock", "/run/docker.sock"),
        ("//var//run/./docker.sock", "/run/docker.sock"),
        ("/srv/../run/docker.sock/", "/run/docker.sock"),
        ("/var/run/../etc", "/etc"),  # as the kernel walks it: /var/run is a symlink
        ("/lib/../bin", "/usr/bin"),
        ("/run/containerd", "/run/containerd"),
        ("/run/podman", "/run/podman"),
        ("/run/dbus", "/run/dbus"),
        ("/etc", "/etc"),
        ("/etc/passwd", "/etc/passwd"),
        ("/etc/cron.d/job", "/etc/cron.d/job"),
        ("/etc/sudoers.d", "/etc/sudoers.d"),
        ("/root", "/root"),
        ("/root/.ssh/authorized_keys", "/root/.ssh/authorized_keys"),
        ("/home", "/home"),
        ("/boot/grub", "/boot/grub"),
        ("/usr", "/usr"),
        ("/bin", "/usr/bin"),
        ("/lib/modules", "/usr/lib/modules"),
        ("/usr/local/bin", "/usr/local/bin"),
        ("/dev", "/dev"),
        ("/dev/pts", "/dev/pts"),
        ("/proc", "/proc"),
        ("/proc/1/root", "/proc/1/root"),
        ("/proc/self/fd/3", "/proc/self/fd/3"),
        ("/proc/4711", "/proc/4711"),
        ("/proc/1/root/srv\n", "/proc/1/root/srv\\n"),
        ("/proc/sys/kernel", "/proc/sys/kernel"),
        ("/sys", "/sys"),
        ("/sys/kernel", "/sys/kernel"),
        ("/sys/fs/cgroup/memory", "/sys/fs/cgroup/memory"),
        ("/var/lib", "/var/lib"),
        ("/var/lib/docker", "/var/lib/docker"),
        ("/var/lib/docker/containers", "/var/lib/docker/containers"),
        (f"/var/lib/docker/containers/{ID}", f"/var/lib/docker/containers/{ID}"),
        ("/var/lib/docker/overlay2/x/diff", "/var/lib/docker/overlay2/x/diff"),
        ("/var/lib/docker/volumes", "/var/lib/docker/volumes"),
        ("/var/lib/containers", "/var/lib/containers"),
        ("/var/lib/kubelet", "/var/lib/kubelet"),
        ("/var/lib/kubelet/pki", "/var/lib/kubelet/pki"),
        ("/var/lib/kubelet/pods", "/var/lib/kubelet/pods"),
        ("/etc/kubernetes/admin.conf", "/etc/kubernetes/admin.conf"),
        ("/opt/cni/bin", "/opt/cni/bin"),
        ("/run/execgate", "/run/execgate"),
        ("/run/runc/other/state.json", "/run/runc/other/state.json"),
        ("/etc/\x1b[31m/../cron.d/\x1b[2J", "/etc/cron.d/\\x1b[2J"),
    ],
)
def test_a_mount_of_the_host(source: str, shown: str) -> None:
    assert host_equivalent(ordinary(bind(source))) == (f"it mounts {shown} of the host",)


@pytest.mark.parametrize(
    "source", ["/", "/run", "/etc", "/root", "/root/.ssh", "/dev", "/dev/pts", "/proc", "/proc/1", "/var/lib/kubelet"]
)
@pytest.mark.parametrize("options", [("ro",), ("rw", "rro")])
def test_read_only_is_enough(source: str, options: tuple[str, ...]) -> None:
    assert host_equivalent(ordinary(bind(source, *options))) == (f"it mounts {source} of the host",)


def test_read_only_does_not_reach_what_is_mounted_below() -> None:
    """mount(8): only `rro` does, and `bind` alone brings nothing along."""
    plain, recursive = bind("/sys", "ro"), bind("/sys", "rro")
    alone = {**plain, "options": ["bind", "ro"]}
    found = [host_equivalent(ordinary(mount)) for mount in (plain, recursive, alone)]
    assert found == [("it mounts /sys of the host",), NO_REASON, NO_REASON]


def test_the_last_word_about_writing_counts() -> None:
    assert host_equivalent(ordinary(bind("/boot", "ro", "rw"))) == ("it mounts /boot of the host",)
    assert host_equivalent(ordinary(bind("/boot", "rw", "ro"))) == NO_REASON


def test_directories_that_the_caller_knows() -> None:
    spec = ordinary(bind("/data/docker/image"), bind(f"/data/docker/containers/{ID}/hosts"))
    assert host_equivalent(spec) == NO_REASON
    assert host_equivalent(spec, directories=["/data/docker/"]) == ("it mounts /data/docker/image of the host",)


def test_the_bundle_of_a_container_is_not_given_to_it() -> None:
    source = f"/var/lib/containers/storage/overlay-containers/{ID}/userdata/config.json"
    assert host_equivalent(ordinary(bind(source))) == (f"it mounts {source[:128]}... of the host",)


def test_other_ways_to_mount() -> None:
    kinds: list[dict[str, Any]] = [
        {"destination": "/x", "source": "/etc", "options": ["bind"]},
        {"destination": "/x", "type": "none", "source": "/etc", "options": ["ro", "rbind"]},
        {"destination": "/x", "type": "bind", "source": "/etc"},
        {"destination": "/x", "type": "overlay", "source": "overlay", "options": ["lowerdir=/a:/etc,upperdir=/b"]},
        {"destination": "/x", "type": "overlay", "source": "overlay", "options": ["upperdir=/srv", "lowerdir=/a:/etc"]},
    ]
    assert [host_equivalent(ordinary(kind)) for kind in kinds] == [(ETC,), (ETC,), (ETC,), NO_REASON, (ETC,)]


def test_a_root_that_is_the_hosts() -> None:
    for path, readonly, expected in (
        ("/", False, ("its root is / of the host",)),
        ("/", True, ("its root is / of the host",)),
        ("/srv/..", True, ("its root is / of the host",)),
        ("/var/lib", False, ("its root is /var/lib of the host",)),
        ("/var/lib/docker/vfs/dir/x", False, NO_REASON),
        ("/srv/rootfs", False, NO_REASON),
        ("rootfs", False, NO_REASON),
    ):
        assert host_equivalent(ordinary() | {"root": {"path": path, "readonly": readonly}}) == expected, path


# -- settings of the kernel


def test_sysctls() -> None:
    reason = ("it can write to /proc/sys of the host",)
    assert host_equivalent(ordinary(readonlyPaths=[])) == reason
    assert host_equivalent(ordinary(readonlyPaths=["/proc/bus", "/proc/system"])) == reason
    assert host_equivalent(ordinary(readonlyPaths=["/proc"])) == NO_REASON
    assert host_equivalent(ordinary(readonlyPaths=[], maskedPaths=["/proc/sys"])) == NO_REASON
    second = {"destination": "/host/proc", "type": "proc", "source": "proc"}
    assert host_equivalent(ordinary(second)) == reason
    assert host_equivalent(ordinary({**second, "options": ["ro"]})) == NO_REASON


@pytest.mark.parametrize("kind", ["sysfs", "debugfs", "tracefs", "securityfs", "binfmt_misc", "efivarfs"])
def test_file_systems_of_the_kernel(kind: str) -> None:
    mount = {"destination": "/k", "type": kind, "source": kind, "options": ["nosuid"]}
    assert host_equivalent(ordinary(mount)) == (f"it can write to {kind} of the host",)
    assert host_equivalent(ordinary({**mount, "options": ["ro"]})) == NO_REASON
    assert host_equivalent(ordinary(mount, readonlyPaths=["/k", "/proc/sys"])) == NO_REASON


def test_all_device_files() -> None:
    mount = {"destination": "/dev", "type": "devtmpfs", "source": "udev", "options": ["ro"]}
    assert host_equivalent(ordinary(mount)) == ("it has all device files of the host",)


# -- devices

MKNOD = ("CAP_MKNOD, and no rule that keeps it from the host's disks and memory",)


@pytest.mark.parametrize(
    ("rules", "is_open"),
    [
        ([DENY_ALL], False),
        ([{"allow": False}], False),
        ([DENY_ALL, allow("c", None, None, "m"), allow("b", None, None, "m")], False),
        ([DENY_ALL, allow("c", 10, 200)], False),
        ([{"allow": True, "access": "rwm"}], True),
        ([allow("a")], True),
        ([allow("a", -1, -1)], True),
        ([DENY_ALL, allow("a", 1, 3)], True),  # the numbers beside an "a" mean nothing
        ([DENY_ALL, allow("b")], True),
        ([DENY_ALL, allow("b", -1, -1, "r")], True),
        ([DENY_ALL, allow("b", 8, 0)], True),
        ([DENY_ALL, allow("c")], True),
        ([DENY_ALL, allow("c", 1)], True),
        ([DENY_ALL, allow("c", 1, 1, "r")], True),
        ([DENY_ALL, allow("u", 1, 4)], True),
        ([DENY_ALL, allow("c", 21, 0)], True),
        ([allow("a"), DENY_ALL], False),
        ([allow("a"), {"allow": False, "type": "b", "major": 8, "access": "rwm"}], True),
        ([allow("b", 8), {"allow": False, "type": "b", "access": "rwm"}], False),
        ([allow("b", 8), {"allow": False, "type": "b", "access": "m"}], True),
    ],
)
def test_device_rules(rules: list[dict[str, Any]], is_open: bool) -> None:
    """The last rule counts, and one for mknod alone opens nothing."""
    spec = ordinary(resources={"devices": rules})
    assert host_equivalent(spec) == (MKNOD if is_open else NO_REASON)
    spec["process"]["capabilities"]["bounding"].remove("CAP_MKNOD")
    assert host_equivalent(spec) == NO_REASON


@pytest.mark.parametrize("resources", [{}, {"devices": []}, {"devices": None}, None])
def test_without_rules_it_is_the_runtimes_affair(resources: object) -> None:
    spec = ordinary(resources=resources)
    assert host_equivalent(spec, runtime="runc") == NO_REASON
    assert host_equivalent(spec, runtime="crun") == MKNOD
    assert host_equivalent(spec) == MKNOD


@pytest.mark.parametrize(
    ("device", "rule", "expected"),
    [
        ({"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}, allow("b", 8, 0), True),
        ({"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}, allow("b", 8, 0, "r"), True),
        ({"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}, allow("b", 8, 0, "m"), False),
        ({"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}, allow("b", 9, 0), False),
        ({"path": "/dev/mem", "type": "c", "major": 1, "minor": 1}, allow("c", 1, 1), True),
        ({"path": "/dev/port", "type": "u", "major": 1, "minor": 4}, allow("c", 1, 4), True),
        ({"path": "/dev/sg0", "type": "c", "major": 21, "minor": 0}, allow("c", 21, 0), True),
        ({"path": "/dev/null", "type": "c", "major": 1, "minor": 3}, allow("c", 1, 3), False),
        ({"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}, allow("c", 10, 232), False),
        ({"path": "/dev/fifo", "type": "p"}, DENY_ALL, False),
    ],
)
def test_a_device_of_its_own(device: dict[str, Any], rule: dict[str, Any], expected: bool) -> None:
    spec = ordinary(devices=[device], resources={"devices": [DENY_ALL, rule]})
    spec["process"]["capabilities"]["bounding"] = []
    assert host_equivalent(spec) == ((f"it has the host's device {device['path']}",) if expected else NO_REASON)


@pytest.mark.parametrize(
    "source", ["/dev/sda1", "/dev/mem", "/dev/mapper/root", "/dev/disk/by-label/x", "/dev/nvme0n1"]
)
def test_a_disk_that_is_mounted_as_a_file(source: str) -> None:
    """It is the rules that open it: without any for it the node is a mere name."""
    spec = ordinary(bind(source, "ro"), resources={"devices": [DENY_ALL, allow("b", 8)]})
    spec["process"]["capabilities"]["bounding"] = []
    assert host_equivalent(spec) == (f"it mounts {source} of the host",)
    spec["linux"]["resources"]["devices"].pop()
    assert host_equivalent(spec) == NO_REASON


# -- any document at all


def test_a_document_without_anything() -> None:
    assert host_equivalent({}) == ("it shares the host's pid namespace", "it shares the host's mount namespace")


ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=4)
    | st.sampled_from(["/", "/etc", "bind", "user", "b"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "path", "source", "options", "hostID", "allow", "access", "major", "destination"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(
    linux=st.dictionaries(
        st.sampled_from(
            ["namespaces", "uidMappings", "devices", "resources", "maskedPaths", "readonlyPaths", "mountLabel"]
        ),
        ANY_JSON,
    ),
    rest=st.dictionaries(st.sampled_from(["mounts", "root", "process", "linux"]), ANY_JSON),
)
def test_no_document_raises(linux: dict[str, Any], rest: dict[str, Any]) -> None:
    for spec in (ordinary(**linux), {**rest}, {**ordinary(), **rest}):
        found = host_equivalent(spec)
        assert len(found) == len(set(found)) <= 16
        assert all(reason.isprintable() and len(reason) < 800 for reason in found)


def test_few_reasons_of_many() -> None:
    spec = ordinary(*(bind(f"/etc/cron.d/{number}", destination=f"/x{number}") for number in range(100)))
    assert len(host_equivalent(spec)) == 16


# -- the engines themselves


@pytest.fixture(scope="module")
def docker(host_dir: Path) -> Iterator[Docker]:
    with docker_engine(host_dir / "equivalent-docker") as engine:
        yield engine


@pytest.fixture(scope="module")
def podman(host_dir: Path) -> Iterator[Podman]:
    with podman_engine(host_dir / "equivalent-podman") as engine:
        yield engine


ASKED: dict[tuple[str, ...], tuple[str, ...]] = {
    ("--init", "--tmpfs=/t", "--volume=named:/v", "--volume=/srv:/s"): NO_REASON,
    ("--ipc=host", "--uts=host", "--network=host"): NO_REASON,
    ("--pid=host",): ("it shares the host's pid namespace",),
    ("--volume=/:/host:ro",): ("it mounts / of the host",),
    ("--volume=/var/run:/x", "--volume=/etc:/y"): ("it mounts /run of the host", ETC),
    ("--cap-add=SYS_ADMIN", "--cap-add=DAC_READ_SEARCH"): (
        SYS_ADMIN,
        "CAP_DAC_READ_SEARCH without a user namespace",
    ),
}


@pytest.mark.parametrize("flags", ASKED, ids=" ".join)
def test_what_docker_makes_of_it(docker: Docker, flags: tuple[str, ...]) -> None:
    assert sorted(_made(docker, flags)) == sorted(ASKED[flags])


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--security-opt=systempaths=unconfined", "it can write to /proc/sys of the host"),
        ("--device-cgroup-rule=b *:* rwm", MKNOD[0]),
    ],
)
def test_what_only_docker_has(docker: Docker, flag: str, reason: str) -> None:
    assert _made(docker, (flag,)) == (reason,)


PODMAN_ASKED = {(*(flag for flag in flags if flag != "--init"),): reasons for flags, reasons in ASKED.items()} | {
    ("--security-opt=unmask=ALL",): ("it can write to /proc/sys of the host",),
    ("--systemd=always", "--user=1234", "--read-only"): NO_REASON,
    ("--uidmap=0:100000:65536", "--cap-add=SYS_ADMIN"): NO_REASON,
    ("--privileged",): (
        "it is privileged: it has every capability that counts, without a user namespace",
        "it can write to /proc/sys of the host",
        "it can write to sysfs of the host",
    ),
}


@pytest.mark.parametrize("flags", PODMAN_ASKED, ids=" ".join)
def test_what_podman_makes_of_it(podman: Podman, flags: tuple[str, ...]) -> None:
    assert sorted(_made(podman, flags)) == sorted(PODMAN_ASKED[flags])


def _made(engine: Engine, flags: tuple[str, ...]) -> tuple[str, ...]:
    """Return the reasons for a container that an engine has made; Podman's need not run for that, or could not."""
    network = () if "--network=host" in flags else ("--network=none",)
    container = engine.command("create", *network, *flags, IMAGE, "sleep", "1000")
    try:
        if isinstance(engine, Docker):
            engine.command("start", container)
            (path,) = engine.exec_root.glob(
                f"containerd/daemon/io.containerd.runtime.v2.task/moby/{container}/config.json"
            )
        else:
            assert isinstance(engine, Podman)
            engine.command("init", container)
            (path,) = engine.graph_root.glob(f"*-containers/{container}/userdata/config.json")
        return host_equivalent(json.loads(path.read_text()), runtime="runc")
    finally:
        engine.command("rm", "--force", container)
