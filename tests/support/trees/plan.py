"""What the containers of a tree are to be, whatever the engine; and what became of them on disk."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from execgate.model.process import ProcessIdentity

NOBODY = ProcessIdentity(pid=2**22, start_time=1)
"""A process that cannot be: PID_MAX_LIMIT of a 64-bit Linux is 2**22, and pids stay below it."""

EPOCH = 1_795_000_000.25
"""When the first container of a tree was made, in seconds; each next one is a minute younger."""


_PATH = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",)


class Life(StrEnum):
    """How far a container has come. What that leaves on disk is the engine's affair."""

    NEW = "new"
    """Known to its engine and never given to a runtime: `docker create`."""
    CREATED = "created"
    """Made by the runtime, its init waits for `start`."""
    RUNNING = "running"
    PAUSED = "paused"
    """Written down as paused. The freezer is the kernel's, and no file of a tree can freeze a process."""
    EXITED = "exited"
    """Ended, and its engine took note."""
    LOST = "lost"
    """Ended behind its engine's back: every file says "running", and the process is gone."""

    @property
    def has_init(self) -> bool:
        """Whether a process belongs to it."""
        return self in {Life.CREATED, Life.RUNNING, Life.PAUSED}


@dataclass(frozen=True, slots=True)
class Pod:
    """The pod a container is in. `infra` is the id of the container that holds the namespaces."""

    name: str
    namespace: str
    uid: str
    infra: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A container to be written.

    `init` is the process that counts as its first; it is only looked at where `life` has one. `user`, `env` and
    `labels` are as the user gave them. `stop_timeout` is in seconds, None for the engine's default; `created` in
    seconds since the epoch. `runtime` is `runc` or `crun` (Docker and containerd always write runc's format).
    `runnable` leaves the runtime's state out and writes a configuration that a real runtime can start on a small
    machine: see `support.trees.real`.
    """

    id: str
    name: str
    image: str = "docker.io/library/busybox:1.36"
    labels: Mapping[str, str] = field(default_factory=dict)
    args: Sequence[str] = ("/bin/sh", "-c", "sleep infinity")
    user: str = ""
    env: Sequence[str] = _PATH
    cwd: str = "/"
    tty: bool = False
    stop_signal: str = ""
    stop_timeout: int | None = None
    life: Life = Life.RUNNING
    init: ProcessIdentity = NOBODY
    created: float = EPOCH
    runtime: str = "runc"
    pod: Pod | None = None
    is_infra: bool = False
    restarts: int = 0
    auto_remove: bool = False
    runnable: bool = False

    @property
    def process(self) -> ProcessIdentity:
        """The process that its files name."""
        return self.init if self.life.has_init else NOBODY

    @property
    def image_id(self) -> str:
        """The id that its image has in every tree, 64 hex digits."""
        return hex_id(f"image {self.image}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Where the files of one container are; those that its life leaves out do not exist.

    `name` is what users of the engine call it. `record` is the engine's own file: Docker's config.v2.json,
    CRI-O's state.json, nerdctl's entry in the name store; for the others the one that all containers share.
    """

    plan: Plan
    name: str
    state_dir: Path
    state_file: Path
    bundle: Path
    record: Path | None = None

    @property
    def spec_file(self) -> Path:
        """The bundle's config.json."""
        return self.bundle / "config.json"


class Placing:
    """What every tree has: its containers, found by id or name."""

    placed: tuple[Placed, ...]

    def __getitem__(self, key: str) -> Placed:
        """Return the container with this id or name; KeyError when there is none."""
        for placed in self.placed:
            if key in (placed.plan.id, placed.name):
                return placed
        raise KeyError(key)

    def __iter__(self) -> Iterator[Placed]:
        return iter(self.placed)

    def __len__(self) -> int:
        return len(self.placed)


@dataclass(frozen=True, slots=True)
class User:
    """The owner of a rootless tree."""

    uid: int
    name: str


@dataclass(frozen=True, slots=True)
class Places:
    """The directories that engines start from, below a root that stands for `/`."""

    root: Path
    user: User | None = None

    @property
    def data(self) -> Path:
        """/var/lib, or the user's XDG_DATA_HOME."""
        return self.root / "var/lib" if self.user is None else self._home / ".local/share"

    @property
    def run(self) -> Path:
        """/run, or the user's XDG_RUNTIME_DIR."""
        return self.root / "run" if self.user is None else self.root / "run/user" / str(self.user.uid)

    @property
    def config(self) -> Path:
        """/etc, or the user's XDG_CONFIG_HOME."""
        return self.root / "etc" if self.user is None else self._home / ".config"

    def hand_over(self) -> None:
        """Give a user what was written for them, where this process may."""
        if self.user is None or os.geteuid() != 0:
            return
        for top in (self._home, self.run):
            for path in [top, *top.rglob("*")]:
                os.chown(path, self.user.uid, self.user.uid, follow_symlinks=False)

    @property
    def _home(self) -> Path:
        return self.root / "home" / (self.user.name if self.user else "")


_DEFAULT_LIVES = (Life.RUNNING, Life.RUNNING, Life.EXITED, Life.RUNNING, Life.CREATED, Life.NEW, Life.PAUSED, Life.LOST)
_USERS = ("", "1000", "app", "app:staff", "1000:2000")


def plans(
    count: int,
    *,
    inits: Sequence[ProcessIdentity] = (),
    lives: Iterable[Life] = _DEFAULT_LIVES,
    prefix: str = "c",
    runtimes: Iterable[str] = ("runc",),
) -> list[Plan]:
    """Return `count` containers that differ in life, user, TTY and the rest, the same ones each time.

    `lives` and `runtimes` are gone through in a circle, and so are `inits` by those that have a process; without
    inits all of these are dead. Names are `<prefix>-<number>`, ids are random to look at.
    """
    life, runtime = itertools.cycle(lives), itertools.cycle(runtimes)
    process = itertools.cycle(inits or [NOBODY])
    result = []
    for number in range(count):
        now = next(life)
        result.append(
            Plan(
                id=hex_id(f"{prefix} {number}"),
                name=f"{prefix}-{number}",
                image=f"docker.io/library/app{number % 7}:1.{number % 3}",
                labels={"com.example.team": f"team-{number % 5}", "com.example.number": str(number)},
                user=_USERS[number % len(_USERS)],
                env=(*_PATH, f"NUMBER={number}", *(f"OPTION_{n}=value {n}" for n in range(number % 9))),
                cwd="/srv" if number % 4 == 0 else "/",
                tty=number % 6 == 0,
                stop_signal="SIGQUIT" if number % 8 == 3 else "",
                stop_timeout=number % 60 if number % 3 == 0 else None,
                life=now,
                init=next(process) if now.has_init else NOBODY,
                created=EPOCH + 60 * number,
                runtime=next(runtime),
                auto_remove=number % 10 == 9,
            )
        )
    return result


def hex_id(seed: str) -> str:
    """Return 64 hex digits that stand for `seed`."""
    return hashlib.sha256(seed.encode()).hexdigest()


def rfc3339(seconds: float, *, offset: str = "Z") -> str:
    """Return a time as Go's RFC3339Nano prints it, which drops zeros at the end; `offset` is only a spelling."""
    text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f").rstrip("0").rstrip(".")
    return text + offset


def write_text(path: Path, text: str, *, mode: int = 0o600) -> Path:
    """Write a file and the directories above it; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def write_json(path: Path, value: Any, *, mode: int = 0o600) -> Path:
    """Write JSON as Go does: no spaces, and no newline at the end."""
    return write_text(path, compact(value), mode=mode)


def compact(value: Any) -> str:
    """Return JSON text without spaces."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
