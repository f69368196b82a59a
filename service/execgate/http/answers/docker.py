"""Docker's shapes."""

import base64
import time
from typing import Any

from execgate.containers import proc
from execgate.containers.entry import text, texts
from execgate.http.answers.subjects import NEVER, Answers, Counts, Host, Json, Subject, rfc3339
from execgate.model.container import ContainerStatus
from execgate.model.session import ByteCounts, ExecSession


def error_body(_status: int, message: str, _cause: str) -> Json:
    """Return the JSON of an error."""
    return {"message": message}


def summary(subject: Subject) -> Json:
    """Return a container as `GET /containers/json` lists it."""
    container = subject.container
    return {
        "Id": container.id,
        "Names": [f"/{name}" for name in (container.name, *container.aliases)],
        "Image": container.image,
        "ImageID": container.image_id,
        "Command": " ".join(container.command),
        "Created": int(container.created),
        "Ports": [],
        "Labels": dict(container.labels),
        "Engine": container.engine,
        "State": container.status,
        "Status": _age(subject),
        "HostConfig": {"NetworkMode": "none"},
        "NetworkSettings": {"Networks": {}},
        "Mounts": [],
    }


def container(subject: Subject, _version: tuple[int, ...]) -> Json:
    """Return a container as `GET /containers/{name}/json` shows it."""
    one, process, args = subject.container, subject.process, list(subject.container.command)
    return {
        "Id": one.id,
        "Created": rfc3339(one.created),
        "Path": args[0] if args else "",
        "Args": args[1:],
        "State": state(subject),
        "Image": one.image_id or one.image,
        "Name": f"/{one.name}",
        "Engine": one.engine,
        "RestartCount": 0,
        "Driver": "oci",
        "Platform": "linux",
        "ExecIDs": list(subject.sessions) or None,
        "HostConfig": {"NetworkMode": "none", "Runtime": one.runtime.name, "Privileged": one.privileged},
        "GraphDriver": {"Name": "oci", "Data": None},
        "Mounts": [],
        "Config": {
            "Hostname": text(subject.spec.get("hostname")),
            "User": one.user,
            "Tty": one.tty,
            "OpenStdin": False,
            "Env": list(texts(process.get("env"))),
            "Cmd": args,
            "Image": one.image,
            "WorkingDir": text(process.get("cwd")),
            "Entrypoint": None,
            "Labels": dict(one.labels),
            "StopTimeout": None if one.stop_timeout is None else int(one.stop_timeout),
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
        "ExitCode": one.exit_code or 0,
        "Error": "",
        "StartedAt": rfc3339(one.created),
        "FinishedAt": NEVER,
    }


def session(one: ExecSession, transferred: ByteCounts) -> Json:
    """Return a session, and what it has transferred by now, as `GET /exec/{id}/json` shows it.

    `ExitCodeSource` says how the code was learnt, `unknown` included, in which case the code is 255.
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
        "ProcessConfig": process,
        "OpenStdin": config.attach_stdin,
        "OpenStderr": config.attach_stderr,
        "OpenStdout": config.attach_stdout,
        "CanRemove": one.exit is not None,
        "ContainerID": one.container.container_id,
        "DetachKeys": base64.b64encode(config.detach_keys).decode("ascii"),  # as Go encodes its []byte
        "Pid": one.process.pid if one.process and one.running else 0,
        # From here on ours.
        "ExitCodeSource": one.exit.source if one.exit else None,
        "ContainerPid": (one.process and one.running and proc.namespace_pid(one.process)) or 0,
        "CreatedAt": rfc3339(one.created_at),
        "StartedAt": rfc3339(one.started_at) if one.started_at is not None else NEVER,
        "FinishedAt": rfc3339(one.finished_at) if one.finished_at is not None else NEVER,
        "TimedOut": one.timed_out,
        "Timeout": config.timeout or 0,
        "IdleTimeout": config.idle_timeout or 0,
        "Labels": dict(config.labels),
        "CaptureStdout": config.capture_stdout,
        "CaptureStderr": config.capture_stderr,
        "OnDisconnect": config.on_disconnect,
        "Owner": one.owner,
        "Rule": one.rule,
        "Error": one.error,
        "StdinBytes": transferred.stdin,
        "StdoutBytes": transferred.stdout,
        "StderrBytes": transferred.stderr,
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
    if one.status is ContainerStatus.EXITED and one.exit_code is not None:
        return f"Exited ({one.exit_code})"
    return words.get(one.status, one.status.capitalize()) + suffix
