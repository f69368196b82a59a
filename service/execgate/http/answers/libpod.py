"""Podman's own shapes (libpod/define, pkg/domain/entities).

Podman decodes into Go structs: a field of another type fails the whole answer, a missing one is its zero value. So
what is not known here is left out.
"""

from typing import Any

from execgate.containers.entry import text, texts
from execgate.containers.states import annotations_of
from execgate.http.answers import docker
from execgate.http.answers.subjects import NEVER, Answers, Counts, Host, Json, Subject, rfc3339
from execgate.model.container import ContainerStatus
from execgate.model.session import ByteCounts, ExecSession
from execgate.wire.detach_keys import format_detach_keys

_ENTRYPOINT_IS_A_LIST_SINCE = (5,)
_NO_KEYS = "<none>"

# podman's client looks for the version of the libpod API in the component of this name, and nowhere else.
_ENGINE = "Podman Engine"


def error_body(status: int, message: str, cause: str) -> Json:
    """Return the JSON of an error (pkg/errorhandling: ErrorModel)."""
    return {"cause": cause, "message": message, "response": status}


def summary(subject: Subject) -> Json:
    """Return a container as `GET /libpod/containers/json` lists it (ListContainer)."""
    one = subject.container
    return {
        "Id": one.id,
        "Names": [one.name, *one.aliases],
        "Image": one.image,
        "ImageID": one.image_id,
        "Command": list(one.command),
        "Created": rfc3339(one.created),
        "StartedAt": int(one.created),
        "Exited": one.status is ContainerStatus.EXITED,
        "ExitedAt": 0,
        "ExitCode": one.exit_code or 0,
        "IsInfra": False,
        "Labels": dict(one.labels),
        "Mounts": [],
        "Networks": [],
        "Pid": subject.pid,
        "Pod": "",
        "PodName": "",
        "Ports": [],
        "State": one.status,
        "Status": "",  # of a health check; podman computes the age itself
    }


def container(subject: Subject, version: tuple[int, ...]) -> Json:
    """Return a container as `GET /libpod/containers/{name}/json` shows it (InspectContainerData).

    Podman 5 made a list of the entry point and a name of the stop signal; whoever asks in an older version gets the
    older types.
    """
    one, process, args = subject.container, subject.process, list(subject.container.command)
    is_new = version >= _ENTRYPOINT_IS_A_LIST_SINCE
    return {
        "Id": one.id,
        "Created": rfc3339(one.created),
        "Path": args[0] if args else "",
        "Args": args[1:],
        "State": docker.state(subject),
        "Image": one.image_id,
        "ImageName": one.image,
        "OCIRuntime": one.runtime.name,
        "Name": one.name,
        "RestartCount": 0,
        "Driver": "oci",
        "ExecIDs": list(subject.sessions),
        "Mounts": [],
        "IsInfra": False,
        "Config": {
            "Hostname": text(subject.spec.get("hostname")),
            "User": one.user,
            "Tty": one.tty,
            "OpenStdin": False,
            "Env": list(texts(process.get("env"))),
            "Cmd": args,
            "Image": one.image,
            "WorkingDir": text(process.get("cwd")),
            "Entrypoint": [] if is_new else "",
            "StopSignal": "SIGTERM" if is_new else 15,
            "Labels": dict(one.labels),
            "Annotations": annotations_of(subject.spec),
        },
        "HostConfig": {"NetworkMode": "none", "Runtime": "oci", "Privileged": one.privileged},
        "NetworkSettings": {"Ports": {}},
    }


def session(one: ExecSession, transferred: ByteCounts) -> Json:
    """Return a session as `GET /libpod/exec/{id}/json` shows it: the keys that detach are text here."""
    keys = one.config.detach_keys
    return docker.session(one, transferred) | {"DetachKeys": format_detach_keys(keys) if keys else _NO_KEYS}


def version(host: Host) -> Json:
    """Return what `GET /libpod/version` tells: Docker's shape, with the versions where podman looks for them."""
    details = {
        "APIVersion": host.api_version,
        "MinAPIVersion": host.oldest_api_version,
        "Arch": host.architecture,
        "Os": host.system,
        "KernelVersion": host.kernel,
        "GitCommit": "",
        "GoVersion": "",
        "BuildTime": NEVER,
        "Experimental": "false",
    }
    return docker.version(host) | {
        "BuildTime": NEVER,
        "Components": [{"Name": _ENGINE, "Version": host.version, "Details": details}],
    }


def info(host: Host, counts: Counts) -> Json:
    """Return what `GET /libpod/info` tells (define.Info)."""
    containers: dict[str, Any] = {
        "number": counts.all,
        "running": counts.running,
        "paused": counts.paused,
        "stopped": counts.stopped,
    }
    return {
        "host": {
            "arch": host.architecture,
            "cpus": host.processors,
            "distribution": {"distribution": "execgate", "version": host.version},
            "hostname": host.name,
            "kernel": host.kernel,
            "memTotal": host.memory,
            "os": host.system,
            "serviceIsRemote": False,
        },
        "store": {"containerStore": containers, "graphDriverName": "oci", "imageStore": {"number": 0}},
        "registries": {},
        "plugins": {"volume": [], "network": [], "log": [], "authorization": None},
        "version": {
            "APIVersion": host.api_version,
            "Version": host.version,
            "GoVersion": "",
            "GitCommit": "",
            "BuiltTime": "",
            "Built": 0,
            "OsArch": f"{host.system}/{host.architecture}",
            "Os": host.system,
        },
    }


ANSWERS = Answers(summary=summary, container=container, session=session, version=version, info=info)
