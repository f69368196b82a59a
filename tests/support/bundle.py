"""OCI bundles written by hand, like an engine would write them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Docker's default set; moby: daemon/pkg/oci/caps/defaults.go.
DEFAULT_CAPABILITIES = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
    "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL",
    "CAP_AUDIT_WRITE",
)  # fmt: skip

# An init that sleeps for ever, ends at once on SIGTERM, and reaps whatever is orphaned into it: ash collects
# every child that ends while it sits in `wait`.
SLEEP_FOREVER = ("/bin/sh", "-c", 'trap "exit 0" TERM; while :; do sleep 2147483 & wait $!; done')

_MASKED = ("/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/scsi", "/sys/firmware")
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def bundle_config(
    *,
    hostname: str,
    cgroup: str = "",
    args: Sequence[str] = SLEEP_FOREVER,
    annotations: Mapping[str, str] | None = None,
    env: Sequence[str] = (),
    no_new_privileges: bool = True,
    mounts: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return a config.json for a root file system `rootfs` beside it; a fresh dictionary to change at will.

    `cgroup` is a path below the root of the hierarchies; without one the runtime takes the container's id. `mounts` are
    further ones.

    The container has pid, mount, ipc, uts and network namespaces of its own. The configuration names no
    `linux.resources`, because crun's device filter needs more locked memory than some machines grant, and raises no
    rlimit, because some withhold CAP_SYS_RESOURCE.
    """
    capabilities = list(DEFAULT_CAPABILITIES)
    placement = {"cgroupsPath": cgroup} if cgroup else {}
    return {
        "ociVersion": "1.0.2",
        "hostname": hostname,
        "root": {"path": "rootfs", "readonly": False},
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": list(args),
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", *env],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities,
                "effective": capabilities,
                "permitted": capabilities,
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 1024}],
            "noNewPrivileges": no_new_privileges,
        },
        "mounts": [*_mounts(), *map(dict, mounts)],
        "annotations": dict(annotations or {}),
        "linux": {
            **placement,
            "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")],
            "maskedPaths": list(_MASKED),
            "readonlyPaths": list(_READ_ONLY),
        },
    }


def write_bundle(bundle: Path, config: Mapping[str, Any]) -> Path:
    """Write `config` as the config.json of `bundle` and return the bundle."""
    (bundle / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return bundle


def _mounts() -> list[dict[str, Any]]:
    return [
        _mount("/proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        _mount("/dev/shm", "tmpfs", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),
        _mount("/sys", "sysfs", "nosuid", "noexec", "nodev", "ro"),
    ]


def _mount(destination: str, kind: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": kind, "options": list(options)}
