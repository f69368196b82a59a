"""Whether root in a container is root on its host, as far as the container's config.json tells.

The theory. A container is a handful of fences, and each of the things below is a known way over them for whoever is
uid 0 inside, with the capabilities of the container's bounding set. One is enough. So this does not weigh anything: it
names every way that it knows, and a container without one is as ordinary as engines make them.

It is decided from the text of the configuration alone. Where that does not say, the answer is the careful one: a
namespace that is joined by path may be the host's, unless the caller knows better (`same_as_host`); paths are resolved
as text, with the symlinks that every host has; a read-only mount is no fence before a socket or a device.

What it cannot see: symlinks of the host's own making, idle files that some program of the host will run one day, what a
container that shares a namespace with this one may do (who joins another container is as strong as that one: ask for
that one as well), SELinux and AppArmor, and the kernel's bugs. An exec that asks for Privileged brings all capabilities
along, whatever is said here.

"The host" is what the runtime took for it. For rootless engines that is the user's own namespace, and root there is the
user.

Not counted, on purpose:

- the host's network namespace alone: the sockets of containerd's shims in it are closed since 1.3.9 (CVE-2020-15257),
  and what else listens there is the host's affair, as it is on any network; its ipc, uts, cgroup and time namespaces;
- a container without seccomp, AppArmor or no_new_privs: fences behind the fences;
- in a user namespace, all that is a matter of capabilities or of file permissions: there root is some other uid.
"""

import functools
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from execgate.oci.text import shown

ENGINE_SOCKETS = (
    "/run/docker.sock", "/run/docker/containerd/containerd.sock", "/run/containerd/containerd.sock",
    "/run/containerd/containerd.sock.ttrpc", "/run/podman/podman.sock", "/run/crio/crio.sock", "/run/dockershim.sock",
    "/run/cri-dockerd.sock", "/run/k3s/containerd/containerd.sock", "/run/buildkit/buildkitd.sock",
    "/run/execgate.sock", "/run/execgate/execgate.sock", "/run/libvirt/libvirt-sock", "/run/lxd.socket",
    "/var/lib/lxd/unix.socket", "/var/snap/lxd/common/lxd/unix.socket", "/var/lib/incus/unix.socket",
    # systemd starts any program as root for a peer whose uid is 0, and a container's root has that uid.
    "/run/dbus/system_bus_socket", "/run/systemd/private",
)  # fmt: skip
"""Where those listen who start processes on the host as root for whoever can connect."""

ENGINE_DIRECTORIES = (
    "/var/lib/docker", "/var/lib/containerd", "/var/lib/containers", "/var/lib/nerdctl", "/var/lib/rancher/k3s/agent",
    "/var/lib/rancher/rke2/agent", "/run/docker", "/run/containerd", "/run/containers", "/run/crio", "/run/runc",
    "/run/crun", "/run/libpod", "/run/k3s", "/run/execgate",
)  # fmt: skip
"""Where engines and runtimes keep what they believe: who writes there makes containers, hooks included."""

_DENY_WHAT_NO_RULE_NAMES = frozenset({"runc"})
"""Runtimes that close every device when a configuration has no rule for devices. crun closes none [seen with 1.8.1]."""

_MAX_REASONS = 16

# Each alone is enough, in the initial user namespace: capabilities(7) and what is said of it.
_STRONG = (
    "CAP_SYS_ADMIN",  # mounts a writable sysfs (uevent_helper) or cgroup v1 (release_agent), loads eBPF
    "CAP_SYS_MODULE",  # loads its own code into the kernel
    "CAP_SYS_RAWIO",  # iopl(2) and ioperm(2): talks to the hardware behind the kernel's back
    "CAP_DAC_READ_SEARCH",  # open_by_handle_at(2): any file of any file system that it has a piece of: /etc/hosts
    "CAP_SYS_BOOT",  # kexec_load(2): another kernel, for the next crash if not at once
)
# Only together they read all of the kernel's memory, keys and passwords in it: bpf_probe_read_kernel(), bpf-helpers(7).
_STRONG_TOGETHER = ("CAP_BPF", "CAP_PERFMON")
# Left out: CAP_SYS_PTRACE and CAP_KILL reach whom they can see, so that the pid namespace is the question;
# CAP_CHECKPOINT_RESTORE likewise; CAP_NET_ADMIN and CAP_NET_RAW stay in their network namespace; CAP_MAC_ADMIN and
# CAP_MAC_OVERRIDE take down a fence behind the fences; CAP_SYSLOG, CAP_PERFMON and CAP_BPF alone show addresses and
# samples; CAP_SYS_TIME, CAP_SYS_RESOURCE, CAP_SYS_NICE, CAP_AUDIT_CONTROL, CAP_WAKE_ALARM, CAP_BLOCK_SUSPEND do harm
# and give nothing. CAP_MKNOD is a question of the device rules, below.


@dataclass(frozen=True, slots=True)
class _Brought:
    """A path of the host that a mount brings into the container, resolved.

    `recursive`: what is mounted below it comes along, writable as it is, but for what lies under another mount of the
    container: `covered`. `within`: it counts as well where it lies in a place; else only where it is or contains one.
    """

    path: str
    writable: bool
    recursive: bool = False
    covered: frozenset[str] = frozenset()
    within: bool = True


@dataclass(frozen=True, slots=True)
class _Place:
    """A place of the host that a container must not have.

    A mount has it that *is* it or contains it, and with `inside` also one that lies in it. `written`: only if it can be
    written to. `mounted`: it is a file system of its own on every host, which a plain `ro` above it does not reach.
    `engine`: engines themselves mount files out of it, see `_GIVEN`.
    """

    path: str
    inside: bool = False
    written: bool = False
    mounted: bool = False
    engine: bool = False


def _written(*paths: str) -> tuple[_Place, ...]:
    return tuple(_Place(path, inside=True, written=True) for path in paths)


_PLACES = (
    # Any process of the host: its /proc/PID/root is the host's root, and root can become the uid that may go there.
    _Place("/proc", mounted=True),
    _Place("/proc/sys", inside=True, written=True, mounted=True),  # kernel/core_pattern names a program to run
    _Place("/sys", inside=True, written=True, mounted=True),  # kernel/uevent_helper, fs/cgroup/*/release_agent
    _Place("/sys/fs/cgroup", inside=True, written=True, mounted=True),
    # The terminals of the host, which the device rules of every engine let it open; and the nodes of its disks.
    _Place("/dev", mounted=True),
    _Place("/dev/pts", mounted=True),
    # What root has for itself, and what it takes for true.
    _Place("/root"),
    _Place("/root/.ssh", inside=True),
    _Place("/etc/shadow"),
    _Place("/etc/kubernetes", inside=True),
    _Place("/etc/rancher", inside=True),
    _Place("/var/lib/rancher/k3s/server", inside=True),
    _Place("/var/lib/rancher/rke2/server", inside=True),
    _Place("/var/lib/kubelet", inside=True, engine=True),
    # Every user's authorized_keys, an administrator's among them. One user's own directory is that user's affair.
    _Place("/home", written=True),
    # What the host runs, or reads before it runs something.
    *_written("/boot", "/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec"),
    *_written("/usr/local/bin", "/usr/local/sbin", "/usr/local/lib", "/opt/cni", "/var/spool/cron"),
    *_written("/etc/passwd", "/etc/group", "/etc/gshadow", "/etc/subuid", "/etc/subgid", "/etc/sudoers"),
    *_written("/etc/sudoers.d", "/etc/pam.conf", "/etc/pam.d", "/etc/security", "/etc/nsswitch.conf", "/etc/polkit-1"),
    *_written("/etc/ssh", "/etc/doas.conf", "/etc/environment", "/etc/profile", "/etc/profile.d", "/etc/bash.bashrc"),
    *_written("/etc/bashrc", "/etc/shells", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ld.so.preload"),
    *_written("/etc/ld.so.cache", "/etc/crontab", "/etc/anacrontab", "/etc/cron.d", "/etc/cron.hourly"),
    *_written("/etc/cron.daily", "/etc/cron.weekly", "/etc/cron.monthly", "/etc/systemd", "/etc/init.d", "/etc/rc.d"),
    *_written("/etc/rc.local", "/etc/inittab", "/etc/fstab", "/etc/modules", "/etc/modules-load.d", "/etc/modprobe.d"),
    *_written("/etc/udev", "/etc/dbus-1", "/etc/default", "/etc/sysconfig", "/etc/sysctl.conf", "/etc/sysctl.d"),
    *_written("/etc/binfmt.d", "/etc/tmpfiles.d", "/etc/logrotate.d", "/etc/apt", "/etc/dnf", "/etc/yum.repos.d"),
    *_written("/etc/alternatives", "/etc/network", "/etc/NetworkManager", "/etc/docker", "/etc/containerd"),
    *_written("/etc/containers", "/etc/crio", "/etc/cni", "/etc/cdi", "/etc/execgate", "/root/.bashrc"),
    *_written("/root/.bash_profile", "/root/.profile", "/root/.config/systemd", "/root/.local/bin"),
)

_A_PROCESS = re.compile(r"/proc/(?:[0-9]+|self|thread-self)(?:/.*)?", re.DOTALL)
"""What is in there can lead anywhere."""

_GIVEN = re.compile(
    r"(?:.*/containers/[0-9a-f]+/(?:hosts|hostname|resolv\.conf|mounts/.+|secrets/.+)"  # Docker
    r"|.*/volumes/(?:[^/]+/)?[^/]+/_data(?:/.*)?"  # Docker, Podman, nerdctl
    r"|.*/[a-z0-9]+-containers/[0-9a-f]+/userdata/(?!config\.json$).+"  # Podman, CRI-O
    r"|.*/io\.containerd\.[a-z0-9.]+/(?:sandboxes|containers)/[^/]+/.+"  # containerd for Kubernetes
    r"|.*/nerdctl/[^/]+/(?:etchosts|containers)/[^/]+/[^/]+/(?:hosts|hostname|resolv\.conf)"
    r"|/var/lib/kubelet/pods/[^/]+/(?:etc-hosts|(?:containers|volumes|volume-subpaths)/.+))"
)
"""What engines keep for one container within their own directories and give to it, volumes included."""

_SYMLINKS = {
    "/var/run": "/run", "/var/lock": "/run/lock", "/bin": "/usr/bin", "/sbin": "/usr/sbin", "/lib": "/usr/lib",
    "/lib32": "/usr/lib32", "/lib64": "/usr/lib64", "/var/home": "/home", "/var/roothome": "/root",
}  # fmt: skip
"""Those that every host has, or most of them: hier(7), and what image-based systems do."""

_KERNEL_FILES = frozenset({"sysfs", "debugfs", "tracefs", "securityfs", "binfmt_misc", "efivarfs"})
"""File systems whose files are settings of the whole kernel."""

_DISKS = re.compile(
    r"/dev/(?:mem|kmem|port|(?:sd|vd|xvd|hd|dm-|md|nvme|mmcblk|loop|nbd|sg|bsg|mapper/|disk/).*)", re.DOTALL
)
"""Nodes that a mount can bring, by their names: a mount does not say its numbers."""


@dataclass(frozen=True, slots=True)
class _Devices:
    """Devices by kind (`b`, `c`), major and minor; None: all of them."""

    kind: str
    major: int | None = None
    minor: int | None = None


# admin-guide/devices.rst of the kernel.
_DANGEROUS = (
    _Devices("b"),  # disks, and what is made of them
    _Devices("c", 1, 1),  # /dev/mem
    _Devices("c", 1, 2),  # /dev/kmem
    _Devices("c", 1, 4),  # /dev/port
    _Devices("c", 21),  # SCSI without the block layer: /dev/sg*
)


@dataclass(frozen=True, slots=True)
class _Rule:
    """One rule of the device cgroup; the kind is "" for every device."""

    allow: bool
    devices: _Devices
    access: str

    def touches(self, wanted: _Devices) -> bool:
        """Whether it is about any of `wanted`."""
        return self.devices.kind in ("", wanted.kind) and all(
            None in (own, other) or own == other
            for own, other in ((self.devices.major, wanted.major), (self.devices.minor, wanted.minor))
        )

    def covers(self, wanted: _Devices) -> bool:
        """Whether it is about all of `wanted`."""
        return self.devices.kind in ("", wanted.kind) and all(
            own is None or own == other
            for own, other in ((self.devices.major, wanted.major), (self.devices.minor, wanted.minor))
        )


class _Atlas:
    """Some places, found by path: there are many, and a container has many mounts."""

    def __init__(self, places: Iterable[_Place]) -> None:
        self._by_directory: dict[str, list[_Place]] = {}
        self._with_insides: dict[str, _Place] = {}
        for place in places:
            for directory in (place.path, *_above(place.path)):
                self._by_directory.setdefault(directory, []).append(place)
            if place.inside:
                self._with_insides[place.path] = place

    def has_any(self, brought: _Brought) -> bool:
        """Whether who has `brought` has one of the places, or something in it that is as good."""
        for place in self._by_directory.get(brought.path, ()):
            if brought.writable or not place.written:
                return True
            if place.mounted and brought.recursive and place.path not in (brought.path, *brought.covered):
                return True
        return brought.within and any(self._is_inside(brought, directory) for directory in _above(brought.path))

    def _is_inside(self, brought: _Brought, directory: str) -> bool:
        place = self._with_insides.get(directory)
        if place is None or (place.written and not brought.writable):
            return False
        return not (place.engine and _GIVEN.fullmatch(brought.path))


@functools.lru_cache(maxsize=8)
def _atlas(sockets: tuple[str, ...], directories: tuple[str, ...] | None) -> _Atlas:
    """Return the places that count for root on the host; without `directories` those that count for everybody."""
    where_engines_listen = (_Place(_resolved(path)) for path in sockets)
    if directories is None:
        return _Atlas(where_engines_listen)
    own = (_Place(_resolved(path), inside=True, written=True, engine=True) for path in directories)
    return _Atlas((*where_engines_listen, *_PLACES, *own))


def host_equivalent(
    spec: Mapping[str, Any],
    *,
    sockets: Collection[str] = ENGINE_SOCKETS,
    directories: Collection[str] = ENGINE_DIRECTORIES,
    runtime: str = "",
    same_as_host: Callable[[str], bool] | None = None,
) -> tuple[str, ...]:
    """Return the reasons why root in the container of `spec` is root on the host; empty: none is known.

    `spec` is an OCI config.json; any part of it may be missing or of another type, which never raises. Each reason is a
    phrase for a user, printable, at most some 160 characters, and there are at most 16. `sockets` and `directories` are
    absolute paths of the host, of engines and of this service; `runtime` is the name of the runtime that made the
    container, if that is known. `same_as_host` says whether the namespace that a path leads to is the host's own;
    without it, whoever joins a pid namespace by path is taken to join the host's.
    """
    container = _Container(spec, runtime, same_as_host)
    found: dict[str, None] = {}
    atlas = _atlas(tuple(sockets), tuple(directories) if container.is_host_root else None)
    powers = container.powers() if container.is_host_root else ()
    reasons = itertools.chain(container.namespaces(), powers, container.mounts(atlas))
    for reason in reasons:
        found[reason] = None
        if len(found) == _MAX_REASONS:
            break
    return tuple(found)


class _Container:
    """A configuration, and the questions to it."""

    def __init__(self, spec: Mapping[str, Any], runtime: str, same_as_host: Callable[[str], bool] | None) -> None:
        self._linux = _table(spec.get("linux"))
        self._root = _table(spec.get("root"))
        self._mounts = [_table(mount) for mount in _list(spec.get("mounts"))]
        self._bounding = _capabilities(spec)
        self._runtime = runtime
        self._same_as_host = same_as_host
        self._joined = {
            str(entry.get("type")): str(entry.get("path") or "")
            for entry in map(_table, _list(self._linux.get("namespaces")))
        }

    @functools.cached_property
    def is_host_root(self) -> bool:
        """Whether some uid in the container is the host's uid 0: there is no user namespace, or one that maps it.

        A user namespace that is joined by path, and whose mapping is not given, is taken for none.
        """
        mappings = [_table(entry) for entry in _list(self._linux.get("uidMappings"))]
        return "user" not in self._joined or not mappings or any(_number(one.get("hostID")) == 0 for one in mappings)

    def namespaces(self) -> Iterator[str]:
        """Yield the reasons that lie in the namespaces.

        Who sees the host's processes can become the uid of one of them, and then its /proc/PID/root is open: ptrace(2)
        asks for no more than the same uid and no more capabilities.
        """
        for kind in ("pid", "mount"):
            path = self._joined.get(kind)
            if path is None or (path and self._is_host(path) is True):
                yield f"it shares the host's {kind} namespace"
            elif path and self._is_host(path) is None:
                yield f"it joins a {kind} namespace that may be the host's"

    def _is_host(self, path: str) -> bool | None:
        """Return whether a path leads to the host's own namespace; None: nobody knows."""
        if _resolved(path).startswith("/proc/1/"):
            return True
        return None if self._same_as_host is None else self._same_as_host(path)

    # -- mounts

    def mounts(self, atlas: _Atlas) -> Iterator[str]:
        """Yield the reasons that lie in files of the host: one for each mount that has a place of `atlas`."""
        for mount in self._mounts:
            for brought in self._brought(mount):
                if self._is_way_out(brought, atlas) and not self._is_mere_cgroup(mount, brought):
                    yield f"it mounts {shown(brought.path)} of the host"
        root = str(self._root.get("path") or "")
        if root.startswith("/"):
            brought = _Brought(_resolved(root), self._root.get("readonly") is not True, within=False)
            if atlas.has_any(brought):
                yield f"its root is {shown(brought.path)} of the host"

    def _brought(self, mount: Mapping[str, Any]) -> Iterator[_Brought]:
        options, source = _options(mount), str(mount.get("source") or "")
        if mount.get("type") == "bind" or not {"bind", "rbind"}.isdisjoint(options):
            if source.startswith("/"):  # a relative one is the bundle's own
                path, writable = _resolved(source), _is_writable(options)
                recursive = "rbind" in options and "rro" not in options
                covered = frozenset() if writable else self._covered(path, _resolved(str(mount.get("destination"))))
                yield _Brought(path, writable, recursive, covered)
        elif mount.get("type") == "overlay":
            for option in options:
                name, _, value = option.partition("=")
                if name in ("lowerdir", "upperdir"):
                    layers = (path for path in value.split(":") if path.startswith("/"))
                    yield from (_Brought(_resolved(path), name == "upperdir") for path in layers)
        elif source.startswith("/dev/"):
            yield _Brought(_resolved(source), _is_writable(options))

    def _covered(self, path: str, destination: str) -> frozenset[str]:
        """Return the paths of the host below `path`, mounted at `destination`, on which another mount lies."""
        mounted = (_resolved(str(other.get("destination"))) for other in self._mounts)
        below = "/" if destination == "/" else f"{destination}/"
        return frozenset(_resolved(f"{path}/{one[len(below) :]}") for one in mounted if one.startswith(below))

    def _is_way_out(self, brought: _Brought, atlas: _Atlas) -> bool:
        if atlas.has_any(brought):
            return True
        if not self.is_host_root:
            return False
        if _A_PROCESS.fullmatch(brought.path):
            return True
        return _DISKS.fullmatch(brought.path) is not None and self._can_open(*_DANGEROUS)

    def _is_mere_cgroup(self, mount: Mapping[str, Any], brought: _Brought) -> bool:
        """Whether it is a cgroup hierarchy without the one file that names a program: Podman does so for systemd."""
        agent = f"{_resolved(str(mount.get('destination')))}/release_agent"
        return brought.path.startswith("/sys/fs/cgroup/") and agent in _list(self._linux.get("maskedPaths"))

    # -- what it may do with what it has

    def powers(self) -> Iterator[str]:
        """Yield the reasons that only count where there is no user namespace."""
        if self._bounding.issuperset(_STRONG):
            yield "it is privileged: it has every capability that counts, without a user namespace"
        else:
            yield from (f"{name} without a user namespace" for name in _STRONG if name in self._bounding)
            if self._bounding.issuperset(_STRONG_TOGETHER):
                yield f"{' with '.join(_STRONG_TOGETHER)} without a user namespace"
            yield from self._devices()
        yield from self._kernel_settings()

    def _devices(self) -> Iterator[str]:
        for entry in map(_table, _list(self._linux.get("devices"))):
            kind = {"u": "c"}.get(str(entry.get("type")), str(entry.get("type")))
            device = _Devices(kind, _number(entry.get("major")), _number(entry.get("minor")))
            if any(_Rule(True, one, "").covers(device) for one in _DANGEROUS) and self._can_open(device):
                yield f"it has the host's device {shown(str(entry.get('path')))}"
        if "CAP_MKNOD" in self._bounding and self._can_open(*_DANGEROUS):
            yield "CAP_MKNOD, and no rule that keeps it from the host's disks and memory"

    def _can_open(self, *devices: _Devices) -> bool:
        """Whether the device rules let it read or write any of some devices. The last rule counts."""
        rules = [_rule(_table(rule)) for rule in _list(_table(self._linux.get("resources")).get("devices"))]
        return any(self._is_open(wanted, rules) for wanted in devices)

    def _is_open(self, wanted: _Devices, rules: Sequence[_Rule]) -> bool:
        is_open = not rules and self._runtime not in _DENY_WHAT_NO_RULE_NAMES
        for rule in rules:
            if rule.allow and rule.touches(wanted) and not {"r", "w"}.isdisjoint(rule.access):
                is_open = True
            elif not rule.allow and rule.covers(wanted) and {"r", "w"}.issubset(rule.access):
                is_open = False
        return is_open

    def _kernel_settings(self) -> Iterator[str]:
        """Yield file systems of the kernel's own that it can write to, as an engine mounts them in a privileged one.

        Root owns the files, so that no capability is asked for.
        """
        guarded = [
            _resolved(str(path)) for name in ("readonlyPaths", "maskedPaths") for path in _list(self._linux.get(name))
        ]
        for mount in self._mounts:
            kind, destination = str(mount.get("type")), _resolved(str(mount.get("destination")))
            checked = f"{destination}/sys" if kind == "proc" else destination
            if (kind == "proc" or kind in _KERNEL_FILES) and _is_writable(_options(mount)):
                if not any(checked == path or checked.startswith(f"{path}/") for path in guarded):
                    yield f"it can write to {'/proc/sys' if kind == 'proc' else kind} of the host"
            elif kind == "devtmpfs":
                yield "it has all device files of the host"


def _above(path: str) -> list[str]:
    """Return the directories above a resolved path, up to the root."""
    return [path[:end] or "/" for end, letter in enumerate(path) if letter == "/"] if path != "/" else []


def _options(mount: Mapping[str, Any]) -> list[str]:
    return [option for option in _list(mount.get("options")) if isinstance(option, str)]


def _is_writable(options: Iterable[str]) -> bool:
    """Whether a mount can be written to: the last word counts."""
    words = [option for option in options if option in ("ro", "rro", "rw")]
    return not words or words[-1] == "rw"


def _resolved(path: str) -> str:
    """Return a path without `.`, `..`, doubled slashes and the symlinks that every host has, as the kernel walks it."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
            if target := _SYMLINKS.get("/" + "/".join(parts)):
                parts = target.split("/")[1:]
    return "/" + "/".join(parts)


def _capabilities(spec: Mapping[str, Any]) -> frozenset[str]:
    """Return the bounding set, which is what an exec as root gets."""
    named = _table(_table(spec.get("process")).get("capabilities")).get("bounding")
    upper = (str(name).upper() for name in _list(named))
    return frozenset(name if name.startswith("CAP_") else f"CAP_{name}" for name in upper)


def _rule(entry: Mapping[str, Any]) -> _Rule:
    kind = str(entry.get("type") or "a")
    numbers = (_number(entry.get("major")), _number(entry.get("minor")))
    # "a" closes or opens everything, whatever numbers are beside it: cgroup-v1/devices.rst.
    devices = _Devices("") if kind == "a" else _Devices({"u": "c"}.get(kind, kind), *numbers)
    return _Rule(entry.get("allow") is True, devices, str(entry.get("access") or "rwm"))


def _number(value: object) -> int | None:
    """Return a number of at least 0; None for all else, which stands for every number."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()
