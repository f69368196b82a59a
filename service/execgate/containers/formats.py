"""How runc and crun write down a container: two formats, one record. Pure.

Each container has a directory of its own name in the state root. runc (and what follows it: Docker's,
containerd's) keeps `state.json` there, crun keeps `status` and a copy of the bundle's config.json. Both keep
`exec.fifo` from `create` to `start`. A file is taken whole or not at all; `MalformedError` says why.

Seen with runc 1.1.5 and crun 1.8.1.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from execgate.model.ids import ContainerId
from execgate.model.process import ProcessIdentity

EXEC_FIFO = "exec.fifo"
"""Exists from `create` until `start` has released the init process, in both runtimes."""

# runc's own rule for ids; without a leading "-", which the next program would read as an option.
_CONTAINER_ID = re.compile(r"[A-Za-z0-9_+.][A-Za-z0-9_+.-]{0,254}")


_LAST_SECOND = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()


class MalformedError(ValueError):
    """A state file does not say what a state file must."""


@dataclass(frozen=True, slots=True)
class RuntimeState:
    """What a runtime wrote about a container, when it made it.

    `init` was its first process and may be long gone. `created` is seconds since the epoch, 0.0 if not said.
    `systemd_cgroup`: it was told to let systemd make the cgroups.
    """

    init: ProcessIdentity
    bundle: Path
    created: float
    systemd_cgroup: bool = False


@dataclass(frozen=True, slots=True)
class Format:
    """One runtime's format: the file it is known by, and how that is read."""

    runtime: str
    file_name: str
    parse: Callable[[ContainerId, Mapping[str, Any]], RuntimeState]


def parse_container_id(name: str) -> ContainerId | None:
    """Return `name` as a container id, None when it cannot be one: a path, an option, too long for a name."""
    return ContainerId(name) if _CONTAINER_ID.fullmatch(name) and name not in (".", "..") else None


def parse_runc(container_id: ContainerId, state: Mapping[str, Any]) -> RuntimeState:
    """Read runc's `state.json`; the bundle is one of the labels given to libcontainer, `bundle=PATH`."""
    if state.get("id") != container_id:
        raise MalformedError("its id is not the name of its directory")
    config = state.get("config")
    config = config if isinstance(config, Mapping) else {}
    labels, cgroups = config.get("labels"), config.get("cgroups")
    texts = [label for label in labels if isinstance(label, str)] if isinstance(labels, list) else []
    bundle = next((text.removeprefix("bundle=") for text in texts if text.startswith("bundle=")), None)
    return RuntimeState(
        _identity(state, "init_process_pid", "init_process_start"),
        _bundle(bundle),
        parse_time(state.get("created")),
        isinstance(cgroups, Mapping) and cgroups.get("Systemd") is True,
    )


def parse_crun(_container_id: ContainerId, status: Mapping[str, Any]) -> RuntimeState:
    """Read crun's `status`; it does not repeat the id."""
    return RuntimeState(
        _identity(status, "pid", "process-start-time"),
        _bundle(status.get("bundle")),
        parse_time(status.get("created")),
        status.get("systemd-cgroup") is True,
    )


FORMATS: tuple[Format, ...] = (
    Format("runc", "state.json", parse_runc),
    Format("crun", "status", parse_crun),
)


def _identity(state: Mapping[str, Any], pid_field: str, start_field: str) -> ProcessIdentity:
    # Without its start time a pid means nothing (early versions of crun wrote none).
    return ProcessIdentity(_positive(state, pid_field), _positive(state, start_field))


def _positive(state: Mapping[str, Any], field: str) -> int:
    value = state.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**63:
        raise MalformedError(f"{field} is no positive number")
    return value


def _bundle(path: object) -> Path:
    if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
        raise MalformedError("its bundle is no absolute path")
    return Path(path)


def parse_time(text: object) -> float:
    """Return an RFC 3339 time in seconds since the epoch; 0.0 for anything else and for Go's zero time.

    Only lists depend on it. A time that is written in the year 9999 and is in the next one in UTC can be said of
    nothing either.
    """
    try:
        moment = datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        moment = None
    if moment is None:
        return 0.0
    seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return seconds if 0 <= seconds <= _LAST_SECOND else 0.0
