"""How a Python program says what an exec shall be: the fields of `ExecConfig` as keyword arguments."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from execgate.model.config import ConsoleSize, ExecConfig, OnDisconnect
from execgate.model.errors import InvalidArgument


class ExecOptions(TypedDict, total=False):
    """The fields of `ExecConfig` but its command. Both outputs are attached unless it is said that they are not."""

    tty: bool
    console_size: ConsoleSize | None
    attach_stdin: bool
    attach_stdout: bool
    attach_stderr: bool
    detach_keys: bytes
    env: Sequence[str]
    privileged: bool
    user: str
    working_dir: str
    timeout: float | None
    idle_timeout: float | None
    labels: Mapping[str, str]
    capture_stdout: bool
    capture_stderr: bool
    on_disconnect: OnDisconnect


def exec_config(args: Sequence[str], options: ExecOptions) -> ExecConfig:
    """Return the configuration that a command and its options come to. TypeError for an option that does not exist."""
    if isinstance(args, str):  # which is a sequence of strings, too
        raise InvalidArgument(f"a command is a list of arguments, and {args!r} is a string")
    fields: dict[str, Any] = {"attach_stdout": True, "attach_stderr": True, **options}
    fields["env"] = tuple(options.get("env", ()))
    return ExecConfig(args=tuple(args), **fields)
