"""What an exec was asked to be: `ExecConfig` and its parts."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ConsoleSize:
    """Rows and columns of a terminal, in characters; `0` means the runtime's default."""

    height: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecConfig:
    """One exec as its creator asked for it, validated and with nothing resolved yet.

    `env` holds `NAME=value` pairs, or a bare `NAME`, which removes the container's value as in Docker.
    `detach_keys` is the sequence of bytes that detaches, already parsed; empty disables it. `user` is the
    caller's own text (`""`: the container's user). `working_dir` is absolute or `""`.
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
