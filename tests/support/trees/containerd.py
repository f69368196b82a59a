"""containerd's tasks, and those who make them: `ctr`, nerdctl, the kubelet through the CRI plugin.

Written after containerd 1.6.20 and 2.3.4 (`runtime/v2/bundle.go`, `runc/container.go`, `cri/annotations`) and
nerdctl 2.3.5 (`pkg/labels`, `pkg/namestore`, `pkg/ocihook`). `core/metadata`'s meta.db, in which containerd keeps
labels, is not written: its daemon has it locked, and nothing can rely on reading it.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from support.trees.plan import Life, Placed, Places, Placing, Plan, Pod, User, compact, hex_id, write_json, write_text
from support.trees.runtimes import spec, write_state

TASKS = "io.containerd.runtime.v2.task"
KUBERNETES = "k8s.io"
SHIM = "/usr/bin/containerd-shim-runc-v2"
NEW, OLD = "2.3", "1.6"
"""Versions that differ: bootstrap.json took the place of the shim's `address`."""

Annotate = Callable[[Plan], Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class ContainerdTree(Placing):
    """One namespace of a containerd.

    `state` and `data` are its `state` and `root`; `tasks` holds the bundles of the namespace, `runtime_root` runc's
    states. `names` is nerdctl's store of names, None when nerdctl has no part in it.
    """

    state: Path
    data: Path
    namespace: str
    tasks: Path
    runtime_root: Path
    placed: tuple[Placed, ...]
    names: Path | None = None


def containerd_tree(
    root: Path,
    wanted: Iterable[Plan],
    *,
    namespace: str = "default",
    annotate: Annotate = lambda plan: plan.labels,
    version: str = NEW,
    options: Mapping[str, object] | None = None,
    user: User | None = None,
) -> ContainerdTree:
    """Write what containerd leaves of a namespace's tasks; by default those that `ctr run` made.

    `options` are the runc options of the tasks. Without them options.json names the root, because the shim's
    default is the constant /run/containerd/runc wherever the rest may be. A rootless containerd lives in a mount
    namespace in which its directory *is* /run/containerd: so its files say, and there is no option then.

    An ended task stays until somebody deletes it.
    """
    places = Places(root, user)
    state, data = places.run / "containerd", places.data / "containerd"
    tasks, runtime_root = state / TASKS / namespace, state / "runc" / namespace
    if options is None:
        options = {"root": str(runtime_root.parent)} if user is None else {}
    seen = state if user is None else Path("/run/containerd")
    placed = []
    for plan in wanted:
        bundle = tasks / plan.id
        config = spec(plan, rootfs="rootfs", annotations=annotate(plan), cgroup=f"/{namespace}/{plan.id}")
        write_task(bundle, plan, work=data / TASKS / namespace / plan.id, version=version, options=options)
        if plan.life is not Life.NEW:
            write_json(bundle / "config.json", config, mode=0o644)
        told = seen / bundle.relative_to(state)
        file = write_state(runtime_root, replace(plan, runtime="runc"), told, config, keeps_ended=True)
        placed.append(Placed(plan=plan, name=plan.id, state_dir=file.parent, state_file=file, bundle=bundle))
    places.hand_over()
    return ContainerdTree(state, data, namespace, tasks, runtime_root, tuple(placed))


def write_task(bundle: Path, plan: Plan, *, work: Path, version: str, options: Mapping[str, object]) -> None:
    """Write a task's directory but for config.json; without a task there is none."""
    if plan.life is Life.NEW:
        return
    (bundle / "rootfs").mkdir(parents=True)
    bundle.chmod(0o700)
    work.mkdir(parents=True)
    (bundle / "work").symlink_to(work)
    write_json(bundle / "options.json", options)
    write_text(bundle / "runtime", str(options.get("binary_name", "")))
    write_text(bundle / "shim-binary-path", SHIM)
    write_text(bundle / "init.pid", str(plan.process.pid), mode=0o644)
    write_text(bundle / "log.json", "", mode=0o644)
    os.mkfifo(bundle / "log", 0o700)
    address = f"unix:///run/containerd/s/{hex_id(plan.id)}"
    if version == OLD:
        write_text(bundle / "address", address)
    else:
        write_json(bundle / "bootstrap.json", {"version": 3, "address": address, "protocol": "ttrpc"}, mode=0o644)


# -- Kubernetes


def kubernetes_tree(root: Path, wanted: Iterable[Plan], *, version: str = NEW) -> ContainerdTree:
    """Write pods on containerd: each container in its pod, and each pod's sandbox.

    A plan without a pod gets one of its own. The CRI plugin deletes the task of a container that ended.
    """
    containers = [plan if plan.pod else replace(plan, pod=pod_of(plan)) for plan in wanted]
    everything = [*(sandbox_of(pod, plan) for pod, plan in pods_in(containers).items()), *containers]
    alive = [replace(plan, life=Life.NEW) if plan.life is Life.EXITED else plan for plan in everything]
    tree = containerd_tree(root, alive, namespace=KUBERNETES, annotate=_kubernetes_annotations, version=version)
    placed = (replace(one, name=_kubernetes_name(one.plan)) for one in tree.placed)
    return replace(tree, placed=tuple(placed))


def pod_of(plan: Plan) -> Pod:
    """Return a pod for one container."""
    uid = hex_id(f"uid {plan.id}")
    dashed = "-".join((uid[:8], uid[8:12], uid[12:16], uid[16:20], uid[20:32]))
    return Pod(name=f"{plan.name}-pod", namespace="default", uid=dashed, infra=hex_id(f"sandbox {plan.id}"))


def pods_in(wanted: Iterable[Plan]) -> dict[Pod, Plan]:
    """Return the pods of some containers, each with the container that came first."""
    found: dict[Pod, Plan] = {}
    for plan in wanted:
        if plan.pod is not None:
            found.setdefault(plan.pod, plan)
    return found


def sandbox_of(pod: Pod, first: Plan) -> Plan:
    """Return the container that holds a pod's namespaces: it lives for as long as the first one."""
    return Plan(
        id=pod.infra,
        name=pod.name,
        image="registry.k8s.io/pause:3.10",
        args=("/pause",),
        life=first.life,
        init=first.init,
        created=first.created - 1,
        runtime=first.runtime,
        pod=pod,
        is_infra=True,
    )


def _kubernetes_name(plan: Plan) -> str:
    pod = plan.pod or pod_of(plan)
    return pod.name if plan.is_infra else f"{pod.name}/{plan.name}"


def _kubernetes_annotations(plan: Plan) -> dict[str, str]:
    pod = plan.pod or pod_of(plan)
    own = (
        {
            "container-type": "sandbox",
            "podsandbox.image-name": plan.image,
            "sandbox-cpu-period": "100000",
            "sandbox-cpu-quota": "0",
            "sandbox-cpu-shares": "2",
            "sandbox-log-directory": f"/var/log/pods/{pod.namespace}_{pod.name}_{pod.uid}",
            "sandbox-memory": "0",
        }
        if plan.is_infra
        else {"container-name": plan.name, "container-type": "container", "image-name": plan.image}
    )
    shared = {
        "sandbox-id": pod.infra,
        "sandbox-name": pod.name,
        "sandbox-namespace": pod.namespace,
        "sandbox-uid": pod.uid,
    }
    return {f"io.kubernetes.cri.{name}": value for name, value in (own | shared).items()}


# -- nerdctl


def nerdctl_tree(
    root: Path,
    wanted: Iterable[Plan],
    *,
    renamed: Mapping[str, str] | None = None,
    version: str = NEW,
    user: User | None = None,
) -> ContainerdTree:
    """Write containers of nerdctl, with its store of names.

    `renamed` maps names at creation to those that `nerdctl rename` gave since: only the store follows it, the
    annotation stays. A container without a task has given its name back; labels of users are nowhere.
    """
    renamed = renamed or {}
    places, namespace = Places(root, user), "default"
    socket = "/run/containerd/containerd.sock"
    store = places.data / "nerdctl" / hashlib.sha256(socket.encode()).hexdigest()[:8]
    tree = containerd_tree(
        root,
        wanted,
        namespace=namespace,
        annotate=lambda plan: _nerdctl_annotations(plan, namespace, store),
        version=version,
        user=user,
    )
    names = store / "names" / namespace
    names.mkdir(parents=True, mode=0o700)
    placed = []
    for one in tree.placed:
        name = renamed.get(one.plan.name, one.plan.name)
        if one.plan.life is not Life.NEW:
            write_text(names / name, one.plan.id)
        placed.append(replace(one, name=name, record=names / name))
        _write_hosts(store / "etchosts" / namespace / one.plan.id, one.plan, name, namespace)
    places.hand_over()
    return replace(tree, placed=tuple(placed), names=names)


def _nerdctl_annotations(plan: Plan, namespace: str, store: Path) -> dict[str, str]:
    values = {
        "auto-remove": str(plan.auto_remove).lower(),
        "dns": compact({"DNSServers": None, "DNSResolvConfOptions": None, "DNSSearchDomains": None}),
        "domainname": "",
        "extraHosts": "null",
        "host-config": compact({"BlkioWeight": 0, "CidFile": "", "Devices": None}),
        "hostname": plan.id[:12],
        "log-config": compact({"driver": "json-file", "address": "/run/containerd/containerd.sock"}),
        "log-uri": f"binary:///usr/local/bin/nerdctl?_NERDCTL_INTERNAL_LOGGING={store}",
        "mounts.0": "[]",
        "name": plan.name,
        "namespace": namespace,
        "networks": '["bridge"]',
        "platform": "linux/amd64",
        "state-dir": str(store / "containers" / namespace / plan.id),
    }
    values |= {"stop-timeout": str(plan.stop_timeout)} if plan.stop_timeout is not None else {}
    values |= {"user": plan.user} if plan.user else {}
    return {f"nerdctl/{name}": value for name, value in values.items()}


def _write_hosts(directory: Path, plan: Plan, name: str, namespace: str) -> None:
    write_text(directory / "hosts", "127.0.0.1 localhost\n", mode=0o644)
    meta = {"Namespace": namespace, "ID": plan.id, "Networks": {}, "Hostname": plan.id[:12], "Name": name}
    write_json(directory / "meta.json", meta, mode=0o644)
