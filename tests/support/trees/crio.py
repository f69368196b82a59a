"""CRI-O's files, from its source alone: Debian does not ship it, so nothing here was compared with a real one.

Written after CRI-O 1.24, 1.30 and 1.36 (`internal/factory/container/container.go`, `server/sandbox_run_linux.go`,
`internal/oci/container.go`, `internal/storage/runtime.go`, `pkg/config/config_linux.go`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from support.trees.containerd import pod_of, pods_in, sandbox_of
from support.trees.plan import Life, Placed, Places, Placing, Plan, compact, rfc3339, write_json, write_text
from support.trees.runtimes import spec, write_state
from support.trees.storage import Store, entry, store_at, write_lists, write_storage_conf

OLD, NEW = "1.24", "1.36"
"""Of the differences those that can be seen: the list the containers are in, and the names of some annotations."""

_OWN = "io.kubernetes.cri-o."
_STATUS = {Life.CREATED: "created", Life.PAUSED: "paused", Life.EXITED: "stopped"}
_NEVER = "0001-01-01T00:00:00Z"


@dataclass(frozen=True, slots=True)
class CrioTree(Placing):
    """One CRI-O: its store, the runtimes' roots by name, and its configuration."""

    store: Store
    roots: Mapping[str, Path]
    config: Path
    placed: tuple[Placed, ...]


def crio_tree(
    root: Path,
    wanted: Iterable[Plan],
    *,
    version: str = NEW,
    drop_infra: bool = True,
    driver: str = "overlay",
) -> CrioTree:
    """Write pods of a CRI-O: each container in its pod, and each pod's sandbox.

    A plan without a pod gets one of its own. With `drop_infra`, the default of CRI-O, a sandbox has no process: it
    is in the store and not in the runtime's root. An ended container stays there until the kubelet removes it.
    """
    places = Places(root)
    store = store_at(places, driver=driver)
    roots = {runtime: places.run / runtime for runtime in ("runc", "crun")}
    containers = [plan if plan.pod else replace(plan, pod=pod_of(plan)) for plan in wanted]
    everything = [*(sandbox_of(pod, plan) for pod, plan in pods_in(containers).items()), *containers]
    placed = []
    for plan in everything:
        spoofed = plan.is_infra and drop_infra
        bundle, state = store.fleeting(plan.id), store.lasting(plan.id) / "state.json"
        config = crio_spec(plan, store, version, spoofed=spoofed)
        for directory in (store.lasting(plan.id), bundle):
            write_json(directory / "config.json", config, mode=0o644)
        write_json(state, container_state(plan, bundle, spoofed=spoofed), mode=0o644)
        given = replace(plan, life=Life.NEW) if spoofed else plan
        file = write_state(roots[plan.runtime], given, bundle, config, keeps_ended=True)
        if given.life is not Life.NEW:
            write_text(bundle / "pidfile", str(plan.process.pid), mode=0o644)
        name = _shown(plan)
        placed.append(Placed(plan=plan, name=name, state_dir=file.parent, state_file=file, bundle=bundle, record=state))
    entries = [entry(plan, _storage_names(plan), _metadata(plan), volatile=True) for plan in everything]
    write_lists(store, *(([], entries) if version == NEW else (entries,)))
    write_storage_conf(places.config / "containers/storage.conf", store)
    config_file = write_text(places.config / "crio/crio.conf.d/10-crio.conf", _crio_conf(roots, store), mode=0o644)
    return CrioTree(store, roots, config_file, tuple(placed))


def crio_spec(plan: Plan, store: Store, version: str, *, spoofed: bool = False) -> dict[str, Any]:
    """Return a container's config.json, the same in both of its directories."""
    annotations = _sandbox_annotations(plan, store, version, spoofed) if plan.is_infra else _annotations(plan, version)
    return spec(
        plan,
        rootfs=store.rootfs(plan),
        annotations=annotations,
        cgroup=f"/kubepods/pod{plan.pod.uid if plan.pod else ''}/crio-{plan.id}",
        extra_env=[f"HOSTNAME={plan.pod.name if plan.pod else ''}", "KUBERNETES_SERVICE_HOST=10.96.0.1"],
    )


def container_state(plan: Plan, bundle: Path, *, spoofed: bool = False) -> dict[str, Any]:
    """Return CRI-O's own record of a container's life: the runtime's answer to `state`, and more."""
    started = plan.life not in {Life.NEW, Life.CREATED}
    ended = plan.life is Life.EXITED
    alive = not ended and not spoofed and plan.life is not Life.NEW
    return {
        "ociVersion": "1.0.2",
        "id": plan.id,
        "status": "" if spoofed or plan.life is Life.NEW else _STATUS.get(plan.life, "running"),
        **({"pid": plan.process.pid} if alive else {}),
        "bundle": str(bundle),
        "created": rfc3339(plan.created),
        "started": rfc3339(plan.created + 0.5) if started else _NEVER,
        "finished": rfc3339(plan.created + 30) if ended else _NEVER,
        **({"exitCode": 137} if ended else {}),
        **({"initPid": plan.process.pid, "initStartTime": str(plan.process.start_time)} if alive or ended else {}),
        "checkpointedTime": _NEVER,
    }


def _labels(plan: Plan) -> dict[str, str]:
    pod = plan.pod or pod_of(plan)
    return {
        "io.kubernetes.container.name": "POD" if plan.is_infra else plan.name,
        "io.kubernetes.pod.name": pod.name,
        "io.kubernetes.pod.namespace": pod.namespace,
        "io.kubernetes.pod.uid": pod.uid,
        **(dict(plan.labels) if plan.is_infra else {}),
    }


def _kubelet_annotations(plan: Plan) -> dict[str, str]:
    if plan.is_infra:
        return {"kubernetes.io/config.source": "api", "kubernetes.io/config.seen": rfc3339(plan.created)}
    return {
        "io.kubernetes.container.hash": plan.id[:8],
        "io.kubernetes.container.restartCount": str(plan.restarts),
        "io.kubernetes.container.terminationMessagePath": "/dev/termination-log",
        "io.kubernetes.container.terminationMessagePolicy": "File",
        "io.kubernetes.pod.terminationGracePeriod": str(30 if plan.stop_timeout is None else plan.stop_timeout),
    }


def _annotations(plan: Plan, version: str) -> dict[str, str]:
    pod = plan.pod or pod_of(plan)
    kubelet, labels = _kubelet_annotations(plan), _labels(plan)
    own = {
        "Annotations": compact(kubelet),
        "ContainerID": plan.id,
        "ContainerType": "container",
        "Created": rfc3339(plan.created),
        "IP.0": "10.85.0.7",
        "Image": plan.image_id,  # the kubelet asks for what its pull has returned
        "ImageName": plan.image,
        "ImageRef": plan.image_id,
        "Labels": compact(labels),
        "LogPath": f"/var/log/pods/{pod.namespace}_{pod.name}_{pod.uid}/{plan.name}/{plan.restarts}.log",
        "Metadata": compact({"name": plan.name} | ({"attempt": plan.restarts} if plan.restarts else {})),
        "MountPoint": "/",
        "Name": _storage_names(plan)[0],
        "ResolvPath": "/etc/resolv.conf",
        "SandboxID": pod.infra,
        "SandboxName": f"k8s_{pod.name}_{pod.namespace}_{pod.uid}_0",
        "SeccompProfilePath": "RuntimeDefault",
        "Stdin": str(plan.tty).lower(),
        "StdinOnce": "false",
        "TTY": str(plan.tty).lower(),
        "Volumes": "[]",
    }
    found = {_OWN + name: value for name, value in own.items()}
    found |= {"io.container.manager": "cri-o", **kubelet, **labels}
    found |= {"org.opencontainers.image.stopSignal": plan.stop_signal} if plan.stop_signal else {}
    found |= {"platform-runtime-path.crio.io": ""} if version == NEW else {}
    return found


def _sandbox_annotations(plan: Plan, store: Store, version: str, spoofed: bool) -> dict[str, str]:
    pod = plan.pod or pod_of(plan)
    kubelet, labels = _kubelet_annotations(plan), _labels(plan)
    directory = store.fleeting(plan.id)
    container_name, name = _storage_names(plan)
    own = {
        "Annotations": compact(kubelet),
        "CNIResult": "",
        "CgroupParent": f"/kubepods/pod{pod.uid}",
        "ContainerID": plan.id,
        "ContainerName": container_name,
        "ContainerType": "sandbox",
        "Created": rfc3339(plan.created),
        "HostName": pod.name,
        "HostNetwork": "false",
        "HostnamePath": str(directory / "hostname"),
        "IP.0": "10.85.0.7",
        "Image": plan.image,
        "ImageName": plan.image,
        "KubeName": pod.name,
        "Labels": compact(labels),
        "LogPath": f"/var/log/pods/{pod.namespace}_{pod.name}_{pod.uid}/{plan.id}.log",
        "Metadata": compact({"name": pod.name, "uid": pod.uid, "namespace": pod.namespace}),
        "MountPoint": str(store.rootfs(plan)),
        "Name": name,
        "Namespace": pod.namespace,
        "NamespaceOptions": compact({"pid": 1}),
        "PortMappings": "[]",
        "PrivilegedRuntime": "false",
        "ResolvPath": str(directory / "resolv.conf"),
        "RuntimeHandler": "",
        "SandboxID": plan.id,
        "SandboxName": name,
        "SeccompProfilePath": "Unconfined",
        "ShmPath": str(directory / "shm"),
    }
    found = {_OWN + name: value for name, value in own.items()} | {"io.container.manager": "cri-o", **kubelet, **labels}
    if spoofed:
        found["spoofed.crio.io" if version == NEW else f"{_OWN}Spoofed"] = "true"
    return found


def _shown(plan: Plan) -> str:
    pod = plan.pod or pod_of(plan)
    return pod.name if plan.is_infra else f"{pod.name}/{plan.name}"


def _storage_names(plan: Plan) -> list[str]:
    """The names in the store: a sandbox has one as a container and one as a pod."""
    pod = plan.pod or pod_of(plan)
    tail = f"{pod.name}_{pod.namespace}_{pod.uid}"
    if plan.is_infra:
        return [f"k8s_POD_{tail}_0", f"k8s_{tail}_0"]
    return [f"k8s_{plan.name}_{tail}_{plan.restarts}"]


def _metadata(plan: Plan) -> dict[str, Any]:
    pod = plan.pod or pod_of(plan)
    names = _storage_names(plan)
    return {
        "pod-name": f"k8s_{pod.name}_{pod.namespace}_{pod.uid}_0",
        "pod-id": pod.infra,
        "image-name": plan.image,
        "image-id": plan.image_id,
        "name": names[0],
        "metadata-name": pod.name if plan.is_infra else plan.name,
        **({"uid": pod.uid, "namespace": pod.namespace} if plan.is_infra else {}),
        "created-at": int(plan.created),
        **({"attempt": plan.restarts} if plan.restarts else {}),
        **({"pod": True} if plan.is_infra else {}),
    }


def _crio_conf(roots: Mapping[str, Path], store: Store) -> str:
    handlers = "".join(
        f'[crio.runtime.runtimes.{name}]\nruntime_path = "/usr/bin/{name}"\nruntime_type = "oci"\n'
        f'runtime_root = "{directory}"\nmonitor_path = "/usr/bin/conmon"\n'
        for name, directory in roots.items()
    )
    return (
        f'[crio]\nroot = "{store.graph_root}"\nrunroot = "{store.run_root}"\nstorage_driver = "{store.driver}"\n'
        f'[crio.runtime]\ncgroup_manager = "cgroupfs"\ndefault_runtime = "crun"\n{handlers}'
    )
