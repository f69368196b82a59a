"""Docker's shapes."""

import base64
import time
from typing import Any

from execgate.http.answers.subjects import NEVER, Answers, Counts, Host, Json, Subject, rfc3339
from execgate.model.container import ContainerStatus
from execgate.model.session import ExecSession


def error_body(_status: int, message: str, _cause: str) -> Json:
    """Return the JSON of an error."""
    return {"message": message}


def summary(subject: Subject) -> Json:
    """Return a container as `GET /containers/json` lists it."""
    container = subject.container
    return {
        "Id": container.id,
        "Names": [f"/{container.name}"],
        "Image": subject.image,
        "ImageID": "",
        "Command": " ".join(subject.args),
        "Created": int(container.created),
        "Ports": [],
        "Labels": dict(container.annotations),
        "State": container.status,
        "Status": _age(subject),
        "HostConfig": {"NetworkMode": "none"},
        "NetworkSettings": {"Networks": {}},
        "Mounts": [],
    }


def container(subject: Subject, _version: tuple[int, ...]) -> Json:
    """Return a container as `GET /containers/{name}/json` shows it."""
    one, process, args = subject.container, subject.process, subject.args
    return {
        "Id": one.id,
        "Created": rfc3339(one.created),
        "Path": args[0] if args else "",
        "Args": args[1:],
        "State": state(subject),
        "Image": subject.image,
        "Name": f"/{one.name}",
        "RestartCount": 0,
        "Driver": "oci",
        "Platform": "linux",
        "ExecIDs": list(subject.sessions) or None,
        "HostConfig": {"NetworkMode": "none", "Runtime": one.runtime.name, "Privileged": False},
        "GraphDriver": {"Name": "oci", "Data": None},
        "Mounts": [],
        "Config": {
            "Hostname": subject.spec.get("hostname", ""),
            "User": subject.user,
            "Tty": bool(process.get("terminal")),
            "OpenStdin": False,
            "Env": list(process.get("env") or ()),
            "Cmd": args,
            "Image": subject.image,
            "WorkingDir": process.get("cwd", ""),
            "Entrypoint": None,
            "Labels": dict(one.annotations),
        },
        "NetworkSettings": {"Networks": {}, "Ports": {}},
    }


def state(subject: Subject) -> Json:
    """Return the state of a container; libpod has the same fields, and more."""
    one = subject.container
    return {
        "Status": one.status,
        "Running": subject.running,
        "Paused": one.status is ContainerStatus.PAUSED,
        "Restarting": False,
        "OOMKilled": False,
        "Dead": False,
        "Pid": subject.pid,
        "ExitCode": 0,
        "Error": "",
        "StartedAt": rfc3339(one.created),
        "FinishedAt": NEVER,
    }


def session(one: ExecSession) -> Json:
    """Return a session as `GET /exec/{id}/json` shows it.

    `ExitCodeSource` is ours: how the code was learnt, `unknown` included, in which case the code is 255.
    """
    config = one.config
    process: dict[str, Any] = {
        "tty": config.tty,
        "entrypoint": config.args[0],
        "arguments": list(config.args[1:]),
        "privileged": config.privileged,
    }
    if config.user:
        process["user"] = config.user
    return {
        "ID": one.id,
        "Running": one.running,
        "ExitCode": one.exit.code if one.exit else None,
        "ExitCodeSource": one.exit.source if one.exit else None,
        "ProcessConfig": process,
        "OpenStdin": config.attach_stdin,
        "OpenStderr": config.attach_stderr,
        "OpenStdout": config.attach_stdout,
        "CanRemove": one.exit is not None,
        "ContainerID": one.container.container_id,
        "DetachKeys": base64.b64encode(config.detach_keys).decode("ascii"),  # as Go encodes its []byte
        "Pid": one.process.pid if one.process and one.running else 0,
    }


def version(host: Host) -> Json:
    """Return what `GET /version` tells."""
    numbers = {
        "ApiVersion": host.api_version,
        "MinAPIVersion": host.oldest_api_version,
        "GitCommit": "",
        "GoVersion": "",
        "Os": host.system,
        "Arch": host.architecture,
        "KernelVersion": host.kernel,
        "BuildTime": "",
    }
    return {
        "Platform": {"Name": "execgate"},
        "Components": [{"Name": "execgate", "Version": host.version, "Details": numbers}],
        "Version": host.version,
        **numbers,
    }


def info(host: Host, counts: Counts) -> Json:
    """Return what `GET /info` tells."""
    return {
        "ID": "",
        "Name": host.name,
        "ServerVersion": host.version,
        "Containers": counts.all,
        "ContainersRunning": counts.running,
        "ContainersPaused": counts.paused,
        "ContainersStopped": counts.stopped,
        "Images": 0,
        "Driver": "oci",
        "DriverStatus": [],
        "Plugins": {"Volume": [], "Network": [], "Authorization": [], "Log": []},
        "OperatingSystem": "execgate",
        "OSType": host.system,
        "Architecture": host.machine,
        "KernelVersion": host.kernel,
        "NCPU": host.processors,
        "MemTotal": host.memory,
        "DefaultRuntime": "",
        "Runtimes": {},
        "Swarm": {"LocalNodeState": "inactive"},
        "Labels": [],
        "Warnings": [],
        "SecurityOptions": [],
        "ExperimentalBuild": False,
    }


ANSWERS = Answers(summary=summary, container=container, session=session, version=version, info=info)


def _age(subject: Subject) -> str:
    """Return Docker's column STATUS, near enough."""
    one = subject.container
    seconds = max(0, int(time.time() - one.created))
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            age = f"{seconds // length} {unit}"
            break
    else:
        age = f"{seconds} seconds"
    suffix = " (Paused)" if one.status is ContainerStatus.PAUSED else ""
    words = {ContainerStatus.RUNNING: f"Up {age}", ContainerStatus.PAUSED: f"Up {age}"}
    return words.get(one.status, one.status.capitalize()) + suffix
