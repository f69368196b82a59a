"""Podman's files: the store, the bundles, and libpod's database where it is SQLite.

Written after Podman 4.3.1 (what it wrote was compared) and 5.8.2 (`libpod/container_config.go`,
`libpod/sqlite_state_internal.go`). Before 4.8 the database is a BoltDB file, which this does not write;
`container_config` and `container_state` are its values too.
"""

import contextlib
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.trees.containerd import pods_in
from support.trees.plan import (
    Life,
    Placed,
    Places,
    Placing,
    Plan,
    Pod,
    User,
    compact,
    hex_id,
    rfc3339,
    write_json,
    write_text,
)
from support.trees.runtimes import spec, write_state
from support.trees.storage import Store, entry, store_at, write_lists, write_storage_conf

V4, V5 = "4.3", "5.8"
_NEVER = "0001-01-01T00:00:00Z"
_STATES = {Life.NEW: 1, Life.CREATED: 2, Life.RUNNING: 3, Life.LOST: 3, Life.PAUSED: 5, Life.EXITED: 6}
"""libpod/define/containerstate.go."""
_PAUSE = ("/catatonit", "-P")


@dataclass(frozen=True, slots=True)
class PodmanTree(Placing):
    """One Podman: its store, the runtimes' roots by name, its database (None: not written) and tmp_dir."""

    store: Store
    roots: Mapping[str, Path]
    database: Path | None
    tmp_dir: Path
    storage_conf: Path
    placed: tuple[Placed, ...]


def podman_tree(
    root: Path,
    wanted: Iterable[Plan],
    *,
    version: str = V5,
    with_database: bool | None = None,
    renamed: Mapping[str, str] | None = None,
    driver: str = "overlay",
    user: User | None = None,
) -> PodmanTree:
    """Write the containers of a Podman, and for those in a pod the pod's infra container.

    `renamed` maps names at creation to those that `podman rename` gave since: the store's list and the database
    follow it, the metadata in that list does not. The database is written for version 5 unless said otherwise.

    An ended container keeps its bundle, and nothing of it is in the runtime's root. Those that are to be removed
    at their end are, since version 4.4, in the store's volatile list.
    """
    renamed = renamed or {}
    places = Places(root, user)
    store = store_at(places, driver=driver)
    roots = {runtime: places.run / runtime for runtime in ("runc", "crun")}
    tmp_dir = places.run / ("libpod" if user is None else "libpod/tmp")
    given = list(wanted)
    everything = [*(_infra_of(pod, plan) for pod, plan in pods_in(given).items()), *given]
    placed = [_place(plan, renamed.get(plan.name, plan.name), store, roots, version) for plan in everything]
    entries = {kind: [_entry(one) for one in placed if one.plan.auto_remove is kind] for kind in (False, True)}
    write_lists(store, *(entries.values() if version == V5 else ([*entries[False], *entries[True]],)))
    database = store.graph_root / "db.sql" if (version == V5 if with_database is None else with_database) else None
    if database is not None:
        _write_database(database, store, tmp_dir, placed)
    (tmp_dir / "exits").mkdir(parents=True)
    conf = write_storage_conf(places.config / "containers/storage.conf", store)
    places.hand_over()
    return PodmanTree(store, roots, database, tmp_dir, conf, tuple(placed))


def podman_spec(plan: Plan, store: Store, version: str) -> dict[str, Any]:
    """Return a container's config.json: it names neither the container, nor its image, nor its labels."""
    env = ["container=podman", f"HOSTNAME={plan.id[:12]}", "HOME=/root", *([] if plan.tty else ["TERM=xterm"])]
    return spec(
        plan,
        rootfs=store.rootfs(plan),
        annotations=_annotations(plan, version),
        cgroup=f"/libpod_parent/libpod-{plan.id}",
        extra_env=env,
    )


def container_config(plan: Plan, name: str, store: Store) -> dict[str, Any]:
    """Return libpod's configuration of a container, the JSON of the database; it holds a spec, not the last one."""
    optional: dict[str, Any] = {
        "pod": _pod_id(plan.pod) if plan.pod else "",
        "user": plan.user,
        "labels": dict(plan.labels),
        "stopTimeout": 10 if plan.stop_timeout is None else plan.stop_timeout,
        "stdin": plan.tty,
        "volatile": plan.auto_remove,
    }
    return {
        "spec": podman_spec(plan, store, V5),
        "id": plan.id,
        "name": name,
        "lockID": int(plan.id[:4], 16) % 2048,
        "CreateCommand": ["podman", "create", "--name", plan.name, plan.image, *plan.args],
        "RawImageName": plan.image,
        "idMappingsOptions": {
            "HostUIDMapping": True,
            "HostGIDMapping": True,
            "UIDMap": [],
            "GIDMap": [],
            "AutoUserNs": False,
            "AutoUserNsOpts": {"Size": 0, "InitialSize": 0, "PasswdFile": "", "GroupFile": ""},
        },
        "rootfsImageID": plan.image_id,
        "rootfsImageName": plan.image,
        "ShmDir": str(store.lasting(plan.id) / "shm"),
        "shmSize": 65536000,
        "shmSizeSystemd": 0,
        "staticDir": str(store.lasting(plan.id)),
        "mounts": [str(store.lasting(plan.id) / "shm")],
        "createWorkingDir": True,
        "secretsPath": str(store.lasting(plan.id) / "secrets"),
        "storageOpts": None,
        "privileged": False,
        "label_nested": False,
        "createNetNS": True,
        "useImageHostname": False,
        "networkMode": "bridge",
        "command": list(plan.args),
        "stopSignal": _signal(plan),
        "createdTime": rfc3339(plan.created, offset="+00:00"),
        "cgroupManager": "cgroupfs",
        "cgroupsMode": "enabled",
        "cgroupParent": "/libpod_parent",
        "kubeExitCodePropagation": "invalid",
        "logPath": str(store.lasting(plan.id) / "ctr.log"),
        "logTag": "",
        "logSize": -1,
        "logDriver": "k8s-file",
        "conmonPidFile": str(store.fleeting(plan.id) / "conmon.pid"),
        "postConfigureNetNS": False,
        "runtime": plan.runtime,
        "pause": plan.is_infra,
        "defaultPause": plan.is_infra,
        "isService": False,
        "sdnotifyMode": "container",
        "healthcheck": None,
        "healthcheck_on_failure_action": 0,
        "umask": "0022",
        "pid_file": str(store.fleeting(plan.id) / "pidfile"),
        "mountAllDevices": False,
        "readWriteTmpfs": False,
    } | {name: value for name, value in optional.items() if value}


def container_state(plan: Plan, store: Store) -> dict[str, Any]:
    """Return libpod's state of a container, the other JSON of the database."""
    started = plan.life not in {Life.NEW, Life.CREATED}
    optional: dict[str, Any] = {
        "configPath": str(store.lasting(plan.id) / "config.json") if plan.life is not Life.NEW else "",
        "runDir": str(store.fleeting(plan.id)),
        "mounted": plan.life.has_init or plan.life is Life.LOST,
        "mountPoint": str(store.rootfs(plan)),
        "exitCode": 137 if plan.life is Life.EXITED else 0,
        "exited": plan.life is Life.EXITED,
        "pid": plan.process.pid if plan.life not in {Life.NEW, Life.EXITED} else 0,
    }
    return {
        "state": _STATES[plan.life],
        "startedTime": rfc3339(plan.created + 0.5, offset="+00:00") if started else _NEVER,
        "finishedTime": rfc3339(plan.created + 30, offset="+00:00") if plan.life is Life.EXITED else _NEVER,
        "Service": {"type": 0, "pods": None},
        "checkpointedTime": _NEVER,
        "restoredTime": _NEVER,
    } | {name: value for name, value in optional.items() if value}


def _place(plan: Plan, name: str, store: Store, roots: Mapping[str, Path], version: str) -> Placed:
    _write_directories(store, plan)
    config, bundle = podman_spec(plan, store, version), store.lasting(plan.id)
    if plan.life is not Life.NEW:
        write_json(bundle / "config.json", config, mode=0o644)
    file = write_state(roots[plan.runtime], plan, bundle, config, keeps_ended=False)
    is_volatile = plan.auto_remove and version == V5
    record = store.containers / ("volatile-containers.json" if is_volatile else "containers.json")
    return Placed(plan=plan, name=name, state_dir=file.parent, state_file=file, bundle=bundle, record=record)


def _entry(one: Placed) -> dict[str, Any]:
    return entry(one.plan, [one.name], _metadata(one.plan), volatile=one.plan.auto_remove)


def _annotations(plan: Plan, version: str) -> dict[str, str]:
    found = {
        "io.container.manager": "libpod",
        "io.podman.annotations.autoremove": str(plan.auto_remove).upper(),
        "io.podman.annotations.init": "FALSE",
        "io.podman.annotations.privileged": "FALSE",
        "io.podman.annotations.publish-all": "FALSE",
        "org.opencontainers.image.stopSignal": str(_signal(plan)),
    }
    if plan.pod is not None and not plan.is_infra:
        found["io.kubernetes.cri-o.SandboxID"] = plan.pod.infra
    if version == V5:
        seconds = 10 if plan.stop_timeout is None else plan.stop_timeout
        found["org.systemd.property.KillSignal"] = str(_signal(plan))
        found |= {"org.systemd.property.TimeoutStopUSec": f"uint64 {seconds * 1_000_000}"} if seconds else {}
        return found
    found["io.kubernetes.cri-o.Created"] = rfc3339(plan.created)
    found["io.kubernetes.cri-o.TTY"] = str(plan.tty).lower()
    if plan.pod is not None and not plan.is_infra:
        found["io.kubernetes.cri-o.ContainerType"] = "container"
    return found


def _metadata(plan: Plan) -> dict[str, Any]:
    return {
        "image-name": plan.image,
        "image-id": plan.image_id,
        "name": plan.name,
        "created-at": int(plan.created),
    }


def _infra_of(pod: Pod, first: Plan) -> Plan:
    return Plan(
        id=pod.infra,
        name=f"{_pod_id(pod)[:12]}-infra",
        image="localhost/podman-pause:5.8.2-1775000000",
        args=_PAUSE,
        life=first.life,
        init=first.init,
        created=first.created - 1,
        runtime=first.runtime,
        pod=pod,
        is_infra=True,
    )


def _pod_id(pod: Pod) -> str:
    return hex_id(f"pod {pod.uid}")


def _signal(plan: Plan) -> int:
    return 3 if plan.stop_signal == "SIGQUIT" else 15


def _write_directories(store: Store, plan: Plan) -> None:
    lasting, fleeting = store.lasting(plan.id), store.fleeting(plan.id)
    for name in ("artifacts", "secrets", "shm"):
        (lasting / name).mkdir(parents=True)
    lasting.chmod(0o700)
    if plan.life is Life.NEW:
        return
    write_text(lasting / "ctr.log", "")
    # These stay after the end, the pid with them.
    write_text(fleeting / "pidfile", str(plan.process.pid), mode=0o644)
    for name in ("hostname", "hosts", "resolv.conf", ".containerenv", "oci-log"):
        write_text(fleeting / name, "", mode=0o644)


# libpod/sqlite_state_internal.go, schema version 1: the tables that say something of containers and pods.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS DBConfig(
    ID INTEGER PRIMARY KEY NOT NULL, SchemaVersion INTEGER NOT NULL, OS TEXT NOT NULL, StaticDir TEXT NOT NULL,
    TmpDir TEXT NOT NULL, GraphRoot TEXT NOT NULL, RunRoot TEXT NOT NULL, GraphDriver TEXT NOT NULL,
    VolumeDir TEXT NOT NULL, CHECK (ID IN (1)));
CREATE TABLE IF NOT EXISTS IDNamespace(ID TEXT PRIMARY KEY NOT NULL);
CREATE TABLE IF NOT EXISTS ContainerConfig(
    ID TEXT PRIMARY KEY NOT NULL, Name TEXT UNIQUE NOT NULL, PodID TEXT, JSON TEXT NOT NULL,
    FOREIGN KEY (ID) REFERENCES IDNamespace(ID) DEFERRABLE INITIALLY DEFERRED,
    FOREIGN KEY (ID) REFERENCES ContainerState(ID) DEFERRABLE INITIALLY DEFERRED,
    FOREIGN KEY (PodID) REFERENCES PodConfig(ID));
CREATE TABLE IF NOT EXISTS ContainerState(
    ID TEXT PRIMARY KEY NOT NULL, State INTEGER NOT NULL, ExitCode INTEGER, JSON TEXT NOT NULL,
    FOREIGN KEY (ID) REFERENCES ContainerConfig(ID) DEFERRABLE INITIALLY DEFERRED,
    CHECK (ExitCode BETWEEN -1 AND 255));
CREATE TABLE IF NOT EXISTS ContainerExecSession(
    ID TEXT PRIMARY KEY NOT NULL, ContainerID TEXT NOT NULL,
    FOREIGN KEY (ContainerID) REFERENCES ContainerConfig(ID));
CREATE TABLE IF NOT EXISTS ContainerExitCode(
    ID TEXT PRIMARY KEY NOT NULL, Timestamp INTEGER NOT NULL, ExitCode INTEGER NOT NULL,
    CHECK (ExitCode BETWEEN -1 AND 255));
CREATE TABLE IF NOT EXISTS PodConfig(
    ID TEXT PRIMARY KEY NOT NULL, Name TEXT UNIQUE NOT NULL, JSON TEXT NOT NULL,
    FOREIGN KEY (ID) REFERENCES IDNamespace(ID) DEFERRABLE INITIALLY DEFERRED,
    FOREIGN KEY (ID) REFERENCES PodState(ID) DEFERRABLE INITIALLY DEFERRED);
CREATE TABLE IF NOT EXISTS PodState(
    ID TEXT PRIMARY KEY NOT NULL, InfraContainerID TEXT, JSON TEXT NOT NULL,
    FOREIGN KEY (ID) REFERENCES PodConfig(ID) DEFERRABLE INITIALLY DEFERRED,
    FOREIGN KEY (InfraContainerID) REFERENCES ContainerConfig(ID) DEFERRABLE INITIALLY DEFERRED);
"""


def _write_database(path: Path, store: Store, tmp_dir: Path, placed: Iterable[Placed]) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(_SCHEMA)
        database.execute("PRAGMA foreign_keys = ON")
        static, volumes = store.graph_root / "libpod", store.graph_root / "volumes"
        directories = (static, tmp_dir, store.graph_root, store.run_root)
        with database:
            database.execute(
                "INSERT INTO DBConfig VALUES (1, 1, 'linux', ?, ?, ?, ?, ?, ?)",
                (*map(str, directories), store.driver, str(volumes)),
            )
            for pod in {one.plan.pod for one in placed if one.plan.pod is not None}:
                _insert_pod(database, pod)
            for one in placed:
                _insert_container(database, one, store)
    path.chmod(0o644)


def _insert_pod(database: sqlite3.Connection, pod: Pod) -> None:
    pod_id = _pod_id(pod)
    config = {
        "id": pod_id,
        "name": pod.name,
        "hostname": pod.name,
        "labels": {},
        "cgroupParent": "/libpod_parent",
        "sharesIpc": True,
        "sharesNet": True,
        "sharesUts": True,
        "hasInfra": True,
        "created": rfc3339(1_795_000_000, offset="+00:00"),
        "ExitPolicy": "continue",
        "lockID": int(pod_id[:4], 16) % 2048,
    }
    database.execute("INSERT INTO IDNamespace VALUES (?)", (pod_id,))
    database.execute("INSERT INTO PodConfig VALUES (?, ?, ?)", (pod_id, pod.name, compact(config)))
    state = {"cgroupPath": f"/libpod_parent/{pod_id}", "InfraContainerID": pod.infra}
    database.execute("INSERT INTO PodState VALUES (?, ?, ?)", (pod_id, pod.infra, compact(state)))


def _insert_container(database: sqlite3.Connection, one: Placed, store: Store) -> None:
    plan = one.plan
    config, state = container_config(plan, one.name, store), container_state(plan, store)
    pod_id = _pod_id(plan.pod) if plan.pod else None
    exit_code = state.get("exitCode", 0)
    database.execute("INSERT INTO IDNamespace VALUES (?)", (plan.id,))
    database.execute("INSERT INTO ContainerConfig VALUES (?, ?, ?, ?)", (plan.id, one.name, pod_id, compact(config)))
    database.execute(
        "INSERT INTO ContainerState VALUES (?, ?, ?, ?)", (plan.id, state["state"], exit_code, compact(state))
    )
