"""What runc and crun write, and bundles; every engine's tree ends here.

Written after runc 1.1.5 (libcontainer's `State`) and crun 1.8.1 (`src/libcrun/status.c`).
"""

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.bundle import DEFAULT_CAPABILITIES, bundle_config
from support.trees.plan import Life, Placed, Places, Placing, Plan, User, compact, rfc3339, write_json, write_text
from support.trees.seccomp import spec_filter, state_filter_text

_USERS = {"": (0, 0), "1000": (1000, 0), "app": (1000, 1000), "app:staff": (1000, 50), "1000:2000": (1000, 2000)}
_HIERARCHIES = ("blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "memory", "name=systemd", "pids")
_NAMESPACES = {"pid": "NEWPID", "network": "NEWNET", "ipc": "NEWIPC", "uts": "NEWUTS", "mount": "NEWNS"}
_DEVICES = {"null": 3, "random": 8, "full": 7, "zero": 5, "urandom": 9}
_HOOKS = ("createContainer", "createRuntime", "poststart", "poststop", "prestart", "startContainer")
_LOOPBACK = {
    "type": "loopback",
    **dict.fromkeys(("name", "bridge", "mac_address", "address", "gateway", "ipv6_address", "ipv6_gateway"), ""),
    "mtu": 0,
    "txqueuelen": 0,
    "host_interface_name": "",
    "hairpin_mode": False,
}
_NO_LIMITS: Mapping[str, Any] = {
    "devices": [{"type": ord("a"), "major": -1, "minor": -1, "permissions": "rwm", "allow": False}],
    **dict.fromkeys(("memory", "memory_reservation", "memory_swap", "cpu_shares", "cpu_quota", "cpu_period"), 0),
    **dict.fromkeys(("cpu_rt_quota", "cpu_rt_period", "blkio_weight", "blkio_leaf_weight", "cpu_weight"), 0),
    **dict.fromkeys(("cpuset_cpus", "cpuset_mems", "freezer"), ""),
    **dict.fromkeys(("blkio_weight_device", "hugetlb_limit", "memory_swappiness", "rdma", "unified")),
    "pids_limit": 2048,
    "oom_kill_disable": False,
    "net_cls_classid_u": 0,
}
"""libcontainer's `Resources` of a container that nobody limited."""


@dataclass(frozen=True, slots=True)
class OciTree(Placing):
    """Containers of bare runtimes: the state roots by the runtime's name."""

    roots: Mapping[str, Path]
    placed: tuple[Placed, ...]


def oci_tree(root: Path, wanted: Iterable[Plan], *, user: User | None = None) -> OciTree:
    """Write what runc and crun leave of containers that somebody made by hand.

    An ended container stays in its root until `delete`, and one that is new is nowhere but in its bundle.
    """
    places = Places(root, user)
    roots = {runtime: places.run / runtime for runtime in ("runc", "crun")}
    placed = []
    for plan in wanted:
        bundle = places.data / "bundles" / plan.id
        config = spec(plan, rootfs="rootfs", annotations=plan.labels, cgroup=f"/{plan.id}")
        (bundle / "rootfs").mkdir(parents=True)
        write_json(bundle / "config.json", config, mode=0o644)
        state = write_state(roots[plan.runtime], plan, bundle, config, keeps_ended=True)
        placed.append(Placed(plan=plan, name=plan.id, state_dir=state.parent, state_file=state, bundle=bundle))
    places.hand_over()
    return OciTree(roots, tuple(placed))


def spec(
    plan: Plan,
    *,
    rootfs: Path | str,
    annotations: Mapping[str, str],
    cgroup: str,
    hostname: str = "",
    extra_env: Iterable[str] = (),
) -> dict[str, Any]:
    """Return the config.json of a container.

    A runnable one has nothing that asks for more than a small machine gives; the others have the filters and
    resources that engines write.
    """
    config = bundle_config(
        hostname=hostname or plan.id[:12], cgroup=cgroup, annotations=annotations, no_new_privileges=False
    )
    config["root"] = {"path": os.fspath(rootfs)}
    config["process"]["env"] = [*plan.env, *extra_env, *(["TERM=xterm"] if plan.tty else [])]
    if plan.runnable:
        # A cgroup is unique on the whole host, and the parent that engines give it would stay behind.
        config["linux"]["cgroupsPath"] = f"/execgate-{plan.id[:12]}-{secrets.token_hex(4)}"
        return config
    uid, gid = _USERS.get(plan.user, (0, 0))
    config["process"] |= {
        "terminal": plan.tty,
        "user": {"uid": uid, "gid": gid, "additionalGids": [gid, 2000]},
        "args": list(plan.args),
        "cwd": plan.cwd,
        "oomScoreAdj": 0,
    }
    config["linux"] |= {
        "resources": {"devices": [{"allow": False, "access": "rwm"}], "pids": {"limit": 2048}},
        "seccomp": spec_filter(),
    }
    # Go omits what is empty: most documents have neither of these.
    for place, field in (("process", "terminal"), ("process", "noNewPrivileges"), ("process", "env")):
        if not config[place][field]:
            del config[place][field]
    if not annotations:
        del config["annotations"]
    return config


def write_state(root: Path, plan: Plan, bundle: Path, config: Mapping[str, Any], *, keeps_ended: bool) -> Path:
    """Write a container into a runtime's root, where its life has it there; return where the state file is.

    `keeps_ended`: an ended container stays until somebody deletes it. `bundle` is written as it is, and need
    not be where the bundle really is (rootless containerd's paths are those of another mount namespace).
    """
    state = root / plan.id / ("status" if plan.runtime == "crun" else "state.json")
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    if plan.runnable or plan.life is Life.NEW or (plan.life is Life.EXITED and not keeps_ended):
        return state
    state.parent.mkdir(mode=0o711)
    if plan.runtime == "crun":
        write_text(state, crun_status(plan, bundle, config))
        write_text(state.parent / "config.json", json.dumps(config))
    else:
        write_text(state, runc_state(plan, bundle, config))
    if plan.life is Life.CREATED:
        os.mkfifo(state.parent / "exec.fifo", 0o622)
    return state


def crun_status(plan: Plan, bundle: Path, config: Mapping[str, Any]) -> str:
    """Return the text of crun's `status`."""
    cgroup = config["linux"]["cgroupsPath"]
    return json.dumps(
        {
            "pid": plan.process.pid,
            "process-start-time": plan.process.start_time,
            "cgroup-path": cgroup,
            "scope": "",
            "rootfs": str(bundle / config["root"]["path"]),
            "systemd-cgroup": False,
            "bundle": str(bundle),
            "created": rfc3339(plan.created),
            "detached": True,
            "external_descriptors": '["/dev/null","/dev/null","/dev/null"]',
        },
        indent=4,
    )


def runc_state(plan: Plan, bundle: Path, config: Mapping[str, Any]) -> str:
    """Return the text of runc's `state.json`: some 35 kB, of which the filter is three quarters."""
    pid, cgroup = plan.process.pid, config["linux"]["cgroupsPath"]
    labels = [f"{name}={value}" for name, value in config.get("annotations", {}).items()]
    document = {
        "id": plan.id,
        "init_process_pid": pid,
        "init_process_start": plan.process.start_time,
        "created": rfc3339(plan.created),
        "config": {
            "no_pivot_root": False,
            "parent_death_signal": 0,
            "rootfs": str(bundle / config["root"]["path"]),
            "umask": 0o22,
            "readonlyfs": False,
            "rootPropagation": 0,
            "mounts": [_state_mount(mount) for mount in config["mounts"]],
            "devices": [_state_device(name, minor) for name, minor in _DEVICES.items()],
            "mount_label": "",
            "hostname": config["hostname"],
            "namespaces": [{"type": kind, "path": ""} for kind in _NAMESPACES.values()],
            "capabilities": {
                "Bounding": sorted(DEFAULT_CAPABILITIES),
                "Effective": sorted(DEFAULT_CAPABILITIES),
                "Inheritable": None,
                "Permitted": sorted(DEFAULT_CAPABILITIES),
                "Ambient": None,
            },
            "networks": [_LOOPBACK],
            "routes": None,
            "cgroups": {"path": cgroup, "scope_prefix": "", **_NO_LIMITS, "Systemd": False, "Rootless": False},
            "uid_mappings": None,
            "gid_mappings": None,
            "mask_paths": config["linux"]["maskedPaths"],
            "readonly_paths": config["linux"]["readonlyPaths"],
            "sysctl": None,
            "seccomp": "@seccomp@",
            "Hooks": dict.fromkeys(_HOOKS),
            "version": config["ociVersion"],
            "labels": [*labels, f"bundle={bundle}"],
            "no_new_keyring": False,
        },
        "rootless": False,
        "cgroup_paths": {name: f"/sys/fs/cgroup/{name.removeprefix('name=')}{cgroup}" for name in _HIERARCHIES},
        "namespace_paths": {kind: f"/proc/{pid}/ns/{_file_of(name)}" for name, kind in _NAMESPACES.items()},
        "external_descriptors": ["/dev/null", "pipe:[4711]", "pipe:[4712]"],
        "intel_rdt_path": "",
    }
    return compact(document).replace('"@seccomp@"', state_filter_text())


def _state_mount(mount: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "source": mount["source"],
        "destination": mount["destination"],
        "device": mount["type"],
        "flags": 14,
        "propagation_flags": None,
        "data": ",".join(option for option in mount["options"] if "=" in option),
        "relabel": "",
        "rec_attr": None,
        "extensions": 0,
        "premount_cmds": None,
        "postmount_cmds": None,
    }


def _state_device(name: str, minor: int) -> dict[str, Any]:
    return {
        "type": ord("c"),
        "major": 1,
        "minor": minor,
        "permissions": "rwm",
        "allow": True,
        "path": f"/dev/{name}",
        "file_mode": 0o666,
        "uid": 0,
        "gid": 0,
    }


def _file_of(namespace: str) -> str:
    return {"network": "net", "mount": "mnt"}.get(namespace, namespace)
