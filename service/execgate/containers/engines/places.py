"""Where engines keep their files on this host: what their own configuration says, else their defaults.

Read once, when the service starts. A configuration that cannot be read counts as absent, and `execgate doctor` says
where was looked.
"""

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from execgate.containers.entry import table, text, texts
from execgate.containers.files import parse_json

_SYSTEM = (Path("/usr/share/containers"), Path("/etc/containers"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The directories of each engine. `runtimes` are programs that Podman's configuration names."""

    docker_data_root: Path
    docker_exec_root: Path
    containerd_root: Path
    containerd_state: Path
    containerd_runc_root: Path
    nerdctl_root: Path
    storage_graph_root: Path
    storage_run_root: Path
    runtimes: Mapping[str, Path]


def find_places(environ: Mapping[str, str], *, user: bool) -> Places:
    """Return the places on this host. With `user` those of an unprivileged user's own engines."""
    docker = _json(Path("/etc/docker/daemon.json"))
    data_root = Path(text(docker.get("data-root")) or "/var/lib/docker")
    containerd = _toml(Path("/etc/containerd/config.toml"))
    graph_root, run_root = _storage(environ, user=user)
    return Places(
        docker_data_root=_remapped(data_root) if docker.get("userns-remap") else data_root,
        docker_exec_root=Path(text(docker.get("exec-root")) or "/run/docker"),
        containerd_root=Path(text(containerd.get("root")) or "/var/lib/containerd"),
        containerd_state=Path(text(containerd.get("state")) or "/run/containerd"),
        # The shim's constant: it does not follow containerd's own `state`.
        containerd_runc_root=Path("/run/containerd/runc"),
        nerdctl_root=Path("/var/lib/nerdctl"),
        storage_graph_root=graph_root,
        storage_run_root=run_root,
        runtimes=_podman_runtimes(environ, user=user),
    )


def _storage(environ: Mapping[str, str], *, user: bool) -> tuple[Path, Path]:
    """Return graphroot and runroot: of several files the first one counts, containers-storage.conf(5)."""
    home = Path(environ.get("XDG_CONFIG_HOME") or _home(environ) / ".config") / "containers"
    named = environ.get("CONTAINERS_STORAGE_CONF")
    files = [Path(named)] if named else []
    files += [home / "storage.conf"] if user or environ.get("XDG_CONFIG_HOME") else []
    if user:
        data = Path(environ.get("XDG_DATA_HOME") or _home(environ) / ".local/share") / "containers/storage"
        run = Path(environ.get("XDG_RUNTIME_DIR") or f"/run/user/{environ.get('UID', os.getuid())}") / "containers"
        defaults = (data, run)
    else:
        files += [directory / "storage.conf" for directory in reversed(_SYSTEM)]
        defaults = (Path("/var/lib/containers/storage"), Path("/run/containers/storage"))
    found = next((path for path in files if os.path.exists(path)), None)  # noqa: PTH110  (that never raises)
    storage = table(_toml(found).get("storage")) if found else {}
    graph_root, run_root = (
        _expanded(text(storage.get(key)), environ) or default
        for key, default in zip(("graphroot", "runroot"), defaults, strict=True)
    )
    return graph_root, run_root


def _podman_runtimes(environ: Mapping[str, str], *, user: bool) -> dict[str, Path]:
    """Return the programs of `[engine.runtimes]`: of several files a later one counts, containers.conf(5)."""
    found: dict[str, Path] = {}
    for path in _containers_confs(environ, user=user):
        for name, candidates in table(table(_toml(path).get("engine")).get("runtimes")).items():
            program = next((one for one in texts(candidates) if os.access(one, os.X_OK)), None)
            if program:
                found[name] = Path(program)
    return found


def _containers_confs(environ: Mapping[str, str], *, user: bool) -> Sequence[Path]:
    override = environ.get("CONTAINERS_CONF_OVERRIDE")
    last = [Path(override)] if override else []
    if named := environ.get("CONTAINERS_CONF"):
        return [Path(named), *last]
    directories = list(_SYSTEM)
    if user or environ.get("XDG_CONFIG_HOME"):
        directories.append(Path(environ.get("XDG_CONFIG_HOME") or _home(environ) / ".config") / "containers")
    files: list[Path] = []
    for directory in directories:
        files.append(directory / "containers.conf")
        files += sorted(_glob(directory / "containers.conf.d", "*.conf"))
    return [*files, *last]


def _remapped(data_root: Path) -> Path:
    """Return where dockerd with user namespaces keeps its data: below the ids of its root user, `UID.GID`."""
    found = sorted(_glob(data_root, "[0-9]*.[0-9]*"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else data_root


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("HOME") or "/root")


def _expanded(path: str, environ: Mapping[str, str]) -> Path | None:
    """Return a path of a configuration with its `$VARIABLES`; None for none."""
    # $UID is containers/storage's own, and hardly ever in the environment.
    for name, value in sorted({"UID": str(os.getuid()), **environ}.items(), reverse=True):
        path = path.replace(f"${{{name}}}", value).replace(f"${name}", value)
    return Path(path) if path.startswith("/") else None


def _glob(directory: Path, pattern: str) -> list[Path]:
    """Return what matches; nothing where we may not look."""
    try:
        return list(directory.glob(pattern))
    except OSError:
        return []


def _json(path: Path) -> Mapping[str, object]:
    try:
        return table(parse_json(path.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return {}


def _toml(path: Path) -> Mapping[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
