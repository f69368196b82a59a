"""What Podman alone knows of a container: its labels, user, stop timeout, runtime. They are in libpod's own database.

`bolt_state.db` until Podman 4.7, and as long as it exists until Podman 5; else SQLite, `db.sql`. Both hold the
container's configuration as JSON (libpod: `ContainerConfig`), which changes only with `podman update` and `rename`;
so it is read once for each state of a container that is seen. A database that cannot be read costs these fields, not
the container; they are looked for again when it has changed, or at once when it was only busy.
"""

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from execgate.containers import bolt
from execgate.containers.entry import Look, seconds, table, text, text_table, texts
from execgate.containers.files import key_or_none, parse_json
from execgate.containers.states import Source
from execgate.model.errors import Internal, NotFound, Unavailable
from execgate.model.ids import ContainerId

_BUSY_TIMEOUT = 0.05
"""Seconds that SQLite waits for a writer: the event loop waits with it."""


@dataclass(frozen=True, slots=True)
class PodmanRecord:
    """The fields of a container's configuration and state that nothing else tells. `runtime` is a name or a path.

    `env` is the environment that a `podman exec` begins with: that of the container as it was asked for, without the
    HOME and the HOSTNAME that Podman adds at each start.
    `read_from`: as long as this holds, a record that is missing stays so.
    """

    labels: Mapping[str, str] = field(default_factory=dict)
    user: str = ""
    command: tuple[str, ...] = ()
    stop_timeout: float | None = None
    runtime: str = ""
    privileged: bool = False
    exit_code: int | None = None
    env: tuple[str, ...] | None = None
    read_from: tuple[Source, ...] = ()


class PodmanDatabase:
    """libpod's database of one containers/storage."""

    def __init__(self, graph_root: Path) -> None:
        """Read nothing yet."""
        self._bolt = graph_root / "libpod" / "bolt_state.db"
        self._places = (graph_root / "db.sql", graph_root / "libpod" / "db.sql", self._bolt)
        self.problems: dict[str, str] = {}

    def find(self, container_id: ContainerId) -> PodmanRecord:
        """Return what is on record of a container; nothing at all when there is no record."""
        doubts: list[Source] = []
        for path in self._places:
            key = key_or_none(path)
            if key is None:
                doubts.append((str(path), None))  # until there is one
                continue
            try:
                config, state = (_read_bolt if path == self._bolt else _read_sqlite)(path, container_id)
            except NotFound:
                continue
            except (Internal, Unavailable) as error:
                self.problems[str(path)] = error.hint
                # One that was busy is asked again: it is there, and a key of None never holds.
                doubts.append((str(path), None if isinstance(error, Unavailable) else key))
                continue
            self.problems.pop(str(path), None)
            if config:
                return _record(config, state)
            doubts.append((str(path), key))
        return PodmanRecord(read_from=tuple(doubts))

    def looks(self) -> list[Look]:
        """See EngineSource."""
        paths = self._paths()
        if not paths:
            place = str(self._bolt.parent)
            return [Look(place, "no database of Podman: labels and stop timeouts are not known", usable=False)]
        return [
            Look(str(path), self.problems.get(str(path), "readable"), str(path) not in self.problems) for path in paths
        ]

    def _paths(self) -> list[Path]:
        """Return the databases that are there. Versions differ in which they prefer; each container is in one."""
        return [path for path in self._places if key_or_none(path) is not None]


def _read_bolt(path: Path, container_id: ContainerId) -> tuple[object, object]:
    def question(root: bolt.Bucket) -> tuple[bytes, bytes]:
        container = root.bucket(b"ctr", container_id.encode())
        if container is None:
            return b"{}", b"{}"
        return container.get(b"config") or b"{}", container.get(b"state") or b"{}"

    config, state = bolt.read(path, question)
    return _parsed(path, config), _parsed(path, state)


def _read_sqlite(path: Path, container_id: ContainerId) -> tuple[object, object]:
    query = (
        "SELECT ContainerConfig.JSON, ContainerState.JSON FROM ContainerConfig "
        "LEFT JOIN ContainerState USING (ID) WHERE ContainerConfig.ID = ?"
    )
    if not path.is_file():  # SQLite would wait for the other end of a FIFO
        raise Internal("Podman's database cannot be read", hint=f"{path}: not a regular file")
    try:
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT)) as database:
            row = database.execute(query, (container_id,)).fetchone()
    except sqlite3.OperationalError as error:
        raise Unavailable("Podman's database cannot be read now", hint=f"{path}: {error}") from error
    except sqlite3.Error as error:
        raise Internal("Podman's database cannot be read", hint=f"{path}: {error}") from error
    config, state = row or ("{}", "{}")
    return _parsed(path, config), _parsed(path, state or "{}")


def _parsed(path: Path, data: str | bytes) -> object:
    try:
        return parse_json(data)
    except (ValueError, TypeError, RecursionError) as error:  # TypeError: a column of SQLite can hold a number
        raise Internal("Podman's database cannot be read", hint=f"{path}: not JSON") from error


def _record(config_json: object, state_json: object) -> PodmanRecord:
    config, state = table(config_json), table(state_json)
    process = table(table(config.get("spec")).get("process"))
    code = state.get("exitCode")
    ended = not text(state.get("finishedTime")).startswith("0001-") and "finishedTime" in state
    return PodmanRecord(
        labels=text_table(config.get("labels")),
        user=text(config.get("user")),
        command=texts(config.get("entrypoint")) + texts(config.get("command")),
        # libpod leaves out a timeout of 0 as it leaves out none; it always sets its default otherwise.
        stop_timeout=seconds(config.get("stopTimeout", 0)) if config else None,
        runtime=text(config.get("runtime")),
        privileged=config.get("privileged") is True,
        exit_code=(code if isinstance(code, int) else 0) if ended else None,
        env=texts(process.get("env")) if "env" in process else None,
    )
