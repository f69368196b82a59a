"""What clients ask of a container around an exec: list, inspect, top."""

import asyncio
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from execgate.containers.catalog import Catalog
from execgate.containers.top import Top
from execgate.http.filters import matches_label, parse_filters
from execgate.model.container import Container, ContainerStatus
from execgate.model.errors import Internal, InvalidArgument, NotFound
from execgate.sessions.manager import SessionManager

_FILTERS = frozenset({"name", "id", "label", "status"})
_NEVER = "0001-01-01T00:00:00Z"
_IMAGE_LABEL = "org.opencontainers.image.ref.name"


class ContainerRoutes:
    """Docker's container queries over a `Catalog`."""

    def __init__(self, catalog: Catalog, manager: SessionManager, top: Callable[[Container, str], Top]) -> None:
        self._catalog = catalog
        self._manager = manager
        self._top = top

    async def list(self, request: web.Request) -> web.Response:
        """GET /containers/json?all=&limit=&filters=."""
        filters = parse_filters(request.query.get("filters", ""), _FILTERS)
        limit = _limit(request)
        everything = _flag(request, "all") or "status" in filters or limit > 0
        chosen = [
            container
            for container in sorted(self._catalog.list(), key=lambda c: c.created, reverse=True)
            if (everything or container.init is not None) and matches(container, filters)
        ]
        return web.json_response([self._summary(container) for container in chosen[: limit or None]])

    async def inspect(self, request: web.Request) -> web.Response:
        """GET /containers/{name}/json."""
        container = self._catalog.find(request.match_info["name"])
        return web.json_response(self._inspection(container))

    async def top(self, request: web.Request) -> web.Response:
        """GET /containers/{name}/top?ps_args=."""
        container = self._catalog.find(request.match_info["name"])
        top = await asyncio.to_thread(self._top, container, request.query.get("ps_args") or "-ef")
        return web.json_response({"Titles": top.titles, "Processes": top.processes})

    def _summary(self, container: Container) -> dict[str, Any]:
        process = self._process(container)
        return {
            "Id": container.id,
            "Names": [f"/{container.name}"],
            "Image": image(container),
            "ImageID": "",
            "Command": " ".join(process.get("args") or ()),
            "Created": int(container.created),
            "Ports": [],
            "Labels": dict(container.annotations),
            "State": container.status,
            "Status": _age(container),
            "HostConfig": {"NetworkMode": "none"},
            "NetworkSettings": {"Networks": {}},
            "Mounts": [],
        }

    def _inspection(self, container: Container) -> dict[str, Any]:
        process = self._process(container)
        spec = self._spec(container)
        args = list(process.get("args") or ())
        return {
            "Id": container.id,
            "Created": _rfc3339(container.created),
            "Path": args[0] if args else "",
            "Args": args[1:],
            "State": _state(container),
            "Image": image(container),
            "Name": f"/{container.name}",
            "RestartCount": 0,
            "Driver": "oci",
            "Platform": "linux",
            "ExecIDs": self._manager.running_in(container.id) or None,
            "HostConfig": {"NetworkMode": "none", "Runtime": container.runtime.name, "Privileged": False},
            "GraphDriver": {"Name": "oci", "Data": None},
            "Mounts": [],
            "Config": {
                "Hostname": spec.get("hostname", ""),
                "User": _user(process.get("user", {})),
                "Tty": bool(process.get("terminal")),
                "OpenStdin": False,
                "Env": list(process.get("env") or ()),
                "Cmd": args,
                "Image": image(container),
                "WorkingDir": process.get("cwd", ""),
                "Entrypoint": None,
                "Labels": dict(container.annotations),
            },
            "NetworkSettings": {"Networks": {}, "Ports": {}},
        }

    def _process(self, container: Container) -> Mapping[str, Any]:
        try:
            process = self._spec(container).get("process")
        except (NotFound, Internal):  # one broken bundle must not hide all other containers from a list
            return {}
        return process if isinstance(process, Mapping) else {}

    def _spec(self, container: Container) -> Mapping[str, Any]:
        return self._catalog.spec(container)


def matches(container: Container, filters: Mapping[str, list[str]]) -> bool:
    """Return whether a container passes: any value of a filter, all filters (labels: all values)."""
    tests: dict[str, Callable[[str], bool]] = {
        "name": lambda value: _name_matches(container.name, value),
        "id": container.id.startswith,
        "status": lambda value: _status(value) is container.status,
    }
    if not all(matches_label(container.annotations, label) for label in filters.get("label", [])):
        return False
    return all(any(map(tests[key], values)) for key, values in filters.items() if key in tests and values)


def image(container: Container) -> str:
    """Return the image's name as far as the bundle tells."""
    return container.annotations.get(_IMAGE_LABEL, "")


def _name_matches(name: str, value: str) -> bool:
    """Match part of a name, as Docker does, with its usual anchors; no other regular expression from outside."""
    start, end = value.startswith("^"), value.endswith("$")
    text = value[start : len(value) - end].removeprefix("/")
    if start and end:
        return name == text
    if start:
        return name.startswith(text)
    return name.endswith(text) if end else text in name


def _status(value: str) -> ContainerStatus:
    try:
        return ContainerStatus(value)
    except ValueError:
        raise InvalidArgument(f"invalid filter 'status={value[:32]}'") from None


def _state(container: Container) -> dict[str, Any]:
    running = container.init is not None and container.status in (
        ContainerStatus.RUNNING,
        ContainerStatus.PAUSED,
    )
    return {
        "Status": container.status,
        "Running": running,
        "Paused": container.status is ContainerStatus.PAUSED,
        "Restarting": False,
        "OOMKilled": False,
        "Dead": False,
        "Pid": container.init.pid if container.init else 0,
        "ExitCode": 0,
        "Error": "",
        "StartedAt": _rfc3339(container.created),
        "FinishedAt": _NEVER,
    }


def _age(container: Container) -> str:
    """Return Docker's column STATUS, near enough."""
    seconds = max(0, int(time.time() - container.created))
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            age = f"{seconds // length} {unit}"
            break
    else:
        age = f"{seconds} seconds"
    suffix = " (Paused)" if container.status is ContainerStatus.PAUSED else ""
    words = {ContainerStatus.RUNNING: f"Up {age}", ContainerStatus.PAUSED: f"Up {age}"}
    return words.get(container.status, container.status.capitalize()) + suffix


def _user(user: Mapping[str, Any]) -> str:
    uid, gid = user.get("uid", 0), user.get("gid", 0)
    return f"{uid}:{gid}" if (uid, gid) != (0, 0) else ""


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _flag(request: web.Request, key: str) -> bool:
    """Read a boolean as moby does: anything but these is true."""
    return request.query.get(key, "").lower() not in ("", "0", "no", "false", "none")


def _limit(request: web.Request) -> int:
    text = request.query.get("limit") or "0"
    try:
        return max(0, int(text[:10]))
    except ValueError:
        raise InvalidArgument(f"invalid limit {text[:32]!r}") from None
