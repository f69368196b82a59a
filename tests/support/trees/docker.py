"""Docker's files: its records of containers, and the tasks of its containerd.

Written after dockerd 20.10.24 (what it wrote was compared), 28.5 and 29 (`daemon/container/container.go`,
`daemon/runtime_unix.go`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from support.trees.containerd import NEW, OLD, TASKS, write_task
from support.trees.plan import Life, Placed, Places, Placing, Plan, User, hex_id, rfc3339, write_json, write_text
from support.trees.runtimes import spec, write_state

V20, V29 = "20.10", "29.0"
_NO_DEVICES = (
    *("BlkioWeightDevice", "BlkioDeviceReadBps", "BlkioDeviceWriteBps"),
    *("BlkioDeviceReadIOps", "BlkioDeviceWriteIOps", "Devices"),
)
_NO_NUMBERS = (
    *("BlkioWeight", "CpuPeriod", "CpuQuota", "CpuRealtimePeriod", "CpuRealtimeRuntime", "CpuCount", "CpuPercent"),
    *("KernelMemory", "KernelMemoryTCP", "MemoryReservation", "MemorySwap", "IOMaximumIOps", "IOMaximumBandwidth"),
)
_NEVER = "0001-01-01T00:00:00Z"


@dataclass(frozen=True, slots=True)
class DockerTree(Placing):
    """One dockerd: its data and exec roots, runc's states, and the tasks of its namespace in containerd."""

    data_root: Path
    exec_root: Path
    runtime_root: Path
    tasks: Path
    namespace: str
    placed: tuple[Placed, ...]


def docker_tree(
    root: Path,
    wanted: Iterable[Plan],
    *,
    version: str = V20,
    own_containerd: bool = True,
    namespace: str = "moby",
    binary: str = "runc",
    user: User | None = None,
) -> DockerTree:
    """Write the containers of a dockerd.

    `own_containerd`: dockerd started one for itself; else the host's is used, and the bundles are below
    /run/containerd. `binary` is the runtime's program: whatever it is, the root is called runtime-runc. With
    `namespace` `moby-<uid>.<gid>` it looks like userns-remap.

    An ended container is a record and nothing else.
    """
    places = Places(root, user)
    data, exec_root = places.data / "docker", places.run / "docker"
    containerd = exec_root / "containerd/daemon" if own_containerd else places.run / "containerd"
    work = data / "containerd/daemon" if own_containerd else places.data / "containerd"
    tasks, runtime_root = containerd / TASKS / namespace, exec_root / "runtime-runc" / namespace
    options = {"binary_name": binary, "root": str(runtime_root.parent)}
    placed = []
    for plan in wanted:
        bundle, record = tasks / plan.id, data / "containers" / plan.id / "config.v2.json"
        _write_record(record, plan, data, version, binary)
        with_task = replace(plan, life=Life.NEW) if plan.life is Life.EXITED else plan
        shim = OLD if version == V20 else NEW
        write_task(bundle, with_task, work=work / TASKS / namespace / plan.id, version=shim, options=options)
        config = spec(
            plan,
            rootfs=_rootfs(plan, data, version),
            annotations={},
            cgroup=f"/docker/{plan.id}",
            extra_env=[f"HOSTNAME={plan.id[:12]}"],
        )
        if with_task.life is not Life.NEW:
            write_json(bundle / "config.json", config, mode=0o644)
        file = write_state(runtime_root, replace(with_task, runtime="runc"), bundle, config, keeps_ended=False)
        placed.append(
            Placed(plan=plan, name=plan.name, state_dir=file.parent, state_file=file, bundle=bundle, record=record)
        )
    places.hand_over()
    return DockerTree(data, exec_root, runtime_root, tasks, namespace, tuple(placed))


def config_v2(plan: Plan, directory: Path, version: str) -> dict[str, Any]:
    """Return a container's config.v2.json; `directory` is the one it lies in."""
    running = plan.life in {Life.RUNNING, Life.PAUSED, Life.LOST}
    started = plan.life not in {Life.NEW, Life.CREATED}
    new = version == V29
    return {
        "StreamConfig": {},
        "State": {
            "Running": running,
            "Paused": plan.life is Life.PAUSED,
            "Restarting": False,
            "OOMKilled": False,
            **({} if new else {"RemovalInProgress": False}),
            "Dead": False,
            "Pid": plan.process.pid if running else 0,
            "ExitCode": 137 if plan.life is Life.EXITED else 0,
            "Error": "",
            "StartedAt": rfc3339(plan.created + 0.5) if started else _NEVER,
            "FinishedAt": rfc3339(plan.created + 30) if plan.life is Life.EXITED else _NEVER,
            "Health": None,
        },
        "ID": plan.id,
        "Created": rfc3339(plan.created),
        "Managed": False,
        "Path": plan.args[0],
        "Args": list(plan.args[1:]),
        "Config": _config(plan, new=new),
        "Image": f"sha256:{plan.image_id}",
        **({"ImageManifest": _manifest(plan)} if new else {}),
        "NetworkSettings": _network(plan),
        "LogPath": str(directory / f"{plan.id}-json.log"),
        "Name": f"/{plan.name}",
        "Driver": "overlayfs" if new else "overlay2",
        "OS": "linux",
        **({"ImagePlatform": {"architecture": "amd64", "os": "linux"}} if new else {}),
        "MountLabel": "",
        "ProcessLabel": "",
        "RestartCount": plan.restarts,
        "HasBeenStartedBefore": started,
        "HasBeenManuallyStopped": plan.life is Life.EXITED,
        "MountPoints": {},
        "SecretReferences": None,
        "ConfigReferences": None,
        "AppArmorProfile": "docker-default",
        "HostnamePath": str(directory / "hostname"),
        "HostsPath": str(directory / "hosts"),
        "ShmPath": "",
        "ResolvConfPath": str(directory / "resolv.conf"),
        "SeccompProfile": "",
        "NoNewPrivileges": False,
        **({"WritableCgroups": None} if new else {}),
        "LocalLogCacheMeta": {"HaveNotifyEnabled": False},
    }


def host_config(plan: Plan, binary: str) -> dict[str, Any]:
    """Return a hostconfig.json: of one who asked for nothing."""
    return {
        "Binds": None,
        "ContainerIDFile": "",
        "LogConfig": {"Type": "json-file", "Config": {}},
        "NetworkMode": "bridge",
        "PortBindings": {},
        "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
        "AutoRemove": plan.auto_remove,
        "VolumeDriver": "",
        "VolumesFrom": None,
        "CapAdd": None,
        "CapDrop": None,
        "CgroupnsMode": "private",
        "Dns": [],
        "DnsOptions": [],
        "DnsSearch": [],
        "ExtraHosts": None,
        "GroupAdd": None,
        "IpcMode": "private",
        "Cgroup": "",
        "Links": None,
        "OomScoreAdj": 0,
        "PidMode": "",
        "Privileged": False,
        "PublishAllPorts": False,
        "ReadonlyRootfs": False,
        "SecurityOpt": None,
        "UTSMode": "",
        "UsernsMode": "",
        "ShmSize": 67108864,
        "Runtime": Path(binary).name,
        "ConsoleSize": [0, 0],
        "Isolation": "",
        "CpuShares": 0,
        "Memory": 0,
        "NanoCpus": 0,
        "CgroupParent": "",
        **{name: [] for name in _NO_DEVICES},
        **dict.fromkeys(_NO_NUMBERS, 0),
        **dict.fromkeys(("DeviceCgroupRules", "DeviceRequests", "MemorySwappiness", "PidsLimit")),
        "CpusetCpus": "",
        "CpusetMems": "",
        "OomKillDisable": False,
        "Ulimits": [],
        "MaskedPaths": ["/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/sys/firmware"],
        "ReadonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
    }


def _write_record(record: Path, plan: Plan, data: Path, version: str, binary: str) -> None:
    directory = record.parent
    (directory / "checkpoints").mkdir(parents=True, mode=0o700)
    (directory / "mounts").mkdir(mode=0o710)
    directory.chmod(0o710)
    data.chmod(0o710)
    # json.Encoder ends with a newline.
    write_json(record, config_v2(plan, directory, version))
    with record.open("a") as file:
        file.write("\n")
    write_json(directory / "hostconfig.json", host_config(plan, binary), mode=0o644)
    write_text(directory / "hostname", f"{plan.id[:12]}\n", mode=0o644)
    write_text(directory / "hosts", "127.0.0.1\tlocalhost\n", mode=0o644)
    write_text(directory / "resolv.conf", "nameserver 127.0.0.53\n", mode=0o644)
    write_text(directory / f"{plan.id}-json.log", "", mode=0o640)


def _config(plan: Plan, *, new: bool) -> dict[str, Any]:
    optional: dict[str, Any] = {"StopSignal": plan.stop_signal} if plan.stop_signal else {}
    optional |= {"StopTimeout": plan.stop_timeout} if plan.stop_timeout is not None else {}
    return {
        "Hostname": plan.id[:12],
        "Domainname": "",
        "User": plan.user,
        "AttachStdin": False,
        "AttachStdout": False,
        "AttachStderr": False,
        "Tty": plan.tty,
        "OpenStdin": plan.tty,
        "StdinOnce": False,
        "Env": list(plan.env),
        "Cmd": list(plan.args),
        "Image": plan.image,
        "Volumes": None,
        "WorkingDir": plan.cwd if plan.cwd != "/" else "",
        "Entrypoint": None,
        **({} if new else {"OnBuild": None}),
        "Labels": dict(plan.labels),
        **optional,
    }


def _network(plan: Plan) -> Mapping[str, Any]:
    sandbox = hex_id(f"network {plan.id}")
    return {
        "Bridge": "",
        "SandboxID": sandbox,
        "HairpinMode": False,
        "LinkLocalIPv6Address": "",
        "LinkLocalIPv6PrefixLen": 0,
        "Networks": {
            "bridge": {
                "IPAMConfig": None,
                "Links": None,
                "Aliases": None,
                "NetworkID": hex_id("bridge"),
                "EndpointID": hex_id(f"endpoint {plan.id}"),
                "Gateway": "172.17.0.1",
                "IPAddress": "172.17.0.2",
                "IPPrefixLen": 16,
                "IPv6Gateway": "",
                "GlobalIPv6Address": "",
                "GlobalIPv6PrefixLen": 0,
                "MacAddress": "02:42:ac:11:00:02",
                "DriverOpts": None,
                "IPAMOperational": False,
            }
        },
        "Service": None,
        "Ports": {},
        "SandboxKey": f"/var/run/docker/netns/{sandbox[:12]}",
        "SecondaryIPAddresses": None,
        "SecondaryIPv6Addresses": None,
        "IsAnonymousEndpoint": False,
        "HasSwarmEndpoint": False,
    }


def _manifest(plan: Plan) -> dict[str, Any]:
    return {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": f"sha256:{hex_id(f'manifest {plan.image}')}",
        "size": 610,
        "platform": {"architecture": "amd64", "os": "linux"},
    }


def _rootfs(plan: Plan, data: Path, version: str) -> Path:
    if version == V29:  # the image store of containerd is the default
        return data / "rootfs/overlayfs" / plan.id
    return data / "overlay2" / hex_id(f"layer {plan.id}") / "merged"
