"""What an exec was asked to be: `ExecConfig` and its parts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class ConsoleSize:
    """Rows and columns of a terminal, in characters; `0` means the runtime's default."""

    height: int
    width: int


class OnDisconnect(StrEnum):
    """What becomes of a process when the last of its clients is gone without having detached.

    DOCKER is what every engine does: it goes on, and its stdin ends. With KEEP its stdin stays open too, for whoever
    attaches next; HUP sends it a SIGHUP, as a terminal that is closed; KILL ends its whole tree.
    """

    DOCKER = ""
    KEEP = "keep"
    HUP = "hup"
    KILL = "kill"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecConfig:
    """One exec as its creator asked for it, validated and with nothing resolved yet.

    `env` holds `NAME=value` pairs, or a bare `NAME`, which removes the container's value as in Docker.
    `detach_keys` is the sequence of bytes that detaches, already parsed; empty disables it. `user` is the
    caller's own text (`""`: the container's user). `working_dir` is absolute or `""`. `timeout` is seconds from the
    start of the process until it gets SIGTERM, `idle_timeout` the same from the last byte in either direction. What is
    captured can be read while the session is known, whether or not a client was attached.
    """

    args: tuple[str, ...]
    tty: bool = False
    console_size: ConsoleSize | None = None
    attach_stdin: bool = False
    attach_stdout: bool = False
    attach_stderr: bool = False
    detach_keys: bytes = b"\x10\x11"
    env: tuple[str, ...] = ()
    privileged: bool = False
    user: str = ""
    working_dir: str = ""
    timeout: float | None = None
    idle_timeout: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    capture_stdout: bool = False
    capture_stderr: bool = False
    on_disconnect: OnDisconnect = OnDisconnect.DOCKER

    @property
    def captured(self) -> bool:
        """Whether any output is captured."""
        return self.capture_stdout or self.capture_stderr


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedUser:
    """A user as numbers, resolved once at create from the container's own files.

    `additional_gids` is sorted, unique, and contains `gid` (CVE-2022-2989). `home` is `""` when the
    environment of the container decides.
    """

    uid: int
    gid: int
    additional_gids: tuple[int, ...] = ()
    home: str = ""
