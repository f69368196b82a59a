"""The process.json of an exec: the container's own `process`, with named overrides.

The theory. An exec must not be freer than the container. So nothing is built from scratch: the result starts
as a copy of the container's `process`, and everything that has no override here is inherited, known or
unknown to us: noNewPrivileges, rlimits, apparmorProfile, selinuxLabel, oomScoreAdj, scheduler, ioPriority.
(seccomp is part of the container's own configuration, where the runtime finds it.) Overridden are the
arguments, the directory, the terminal, the environment, the user, and, only when that user is another than
the container's or when Privileged was asked for, the capabilities.
"""

import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from execgate.model.config import ConsoleSize, ExecConfig, ResolvedUser
from execgate.model.container import PLAIN, ExecManner
from execgate.model.errors import Internal, InvalidArgument
from execgate.oci.text import shown
from execgate.oci.users import container_user

MAX_STRING = 131071
"""Bytes of one argument or environment entry: the kernel's MAX_ARG_STRLEN (32 pages) less the final NUL."""

MAX_TOTAL = 2 * 1024 * 1024
"""Bytes of all arguments and entries, pointers included: ARG_MAX under the usual 8 MiB stack, execve(2)."""

_SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")
_PROCESS = r"/proc/[^/]+(?:/task/[^/]+)?"
# /dev/fd is a link to /proc/self/fd in every container; root, of one of its own processes, leads to where it began.
_FD_DIRECTORY = re.compile(rf"(?:{_PROCESS}/root)*(?:{_PROCESS}|/dev)/fd(?:/.*)?", re.DOTALL)


def validate_config(config: ExecConfig) -> None:
    """Check at create what the kernel would refuse at start anyway.

    Raises InvalidArgument: no command, a NUL or a lone surrogate anywhere, a string or all of them above the
    kernel's bounds, an environment entry without a name, a working directory that is relative or leads
    through file descriptors (CVE-2024-21626). No message repeats an environment value.
    """
    if not config.args:
        raise InvalidArgument("No exec command specified")
    total = sum(_checked_size(text, "an argument of the command") for text in config.args)
    total += sum(_checked_size(text, "an environment variable") for text in config.env)
    if total > MAX_TOTAL:
        raise InvalidArgument(f"command and environment are longer than {MAX_TOTAL} bytes")
    if any(entry.startswith("=") for entry in config.env):
        raise InvalidArgument("invalid environment variable: its name is empty")
    _checked_size(config.user, "the user")
    for text in (text for label in config.labels.items() for text in label):
        _checked_text(text, "a label")
    _check_working_dir(config.working_dir)


def process_of(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `process` of a container's config.json.

    Raises Internal when there is none, or when a part of it that an exec builds upon is of a wrong type. The runtime
    read the file when it made the container, so this one was changed since; to do without that part might make an exec
    freer than the container.
    """
    process = spec.get("process")
    if not isinstance(process, Mapping):
        raise _unreadable("process")
    for name, fits in _SHAPES.items():
        if process.get(name) is not None and not fits(process[name]):
            raise _unreadable(f"process.{name}")
    return process


def build_process(
    container_process: Mapping[str, Any],
    config: ExecConfig,
    user: ResolvedUser,
    *,
    console_size: ConsoleSize | None,
    all_capabilities: Sequence[str],
    manner: ExecManner = PLAIN,
    default_limits: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, Any]:
    """Return the process.json of an exec, ready for `json.dumps`.

    `container_process` is what `process_of` returns, any part of which may be missing. It is not changed, and the
    result shares its parts. `console_size` counts only with a TTY; `all_capabilities` are what
    Privileged means; `manner` is how the container's engine departs from all this; `default_limits` are the soft and
    hard limits that count where the container names none.
    """
    process = dict(container_process)  # what is inside is shared, and replaced where it differs
    # The container's terminal is not ours, and commandLine is the arguments in the Windows form.
    for name in ("consoleSize", "commandLine"):
        process.pop(name, None)
    process["args"] = list(config.args)
    process["cwd"] = config.working_dir or process.get("cwd") or "/"
    process["terminal"] = config.tty
    if config.tty and console_size is not None and (console_size.height or console_size.width):
        process["consoleSize"] = {"height": console_size.height, "width": console_size.width}
    inherited = process.get("env") or () if manner.env is None else manner.env
    if manner.own_terminal:
        inherited = [entry for entry in inherited if not entry.startswith("TERM=")]
    process["env"] = _environment(inherited, config, user.home)
    process["user"] = _user(process.get("user"), user)
    if default_limits:
        process["rlimits"] = _limits(process.get("rlimits") or (), default_limits)
    capabilities = _capabilities(container_process, config, user, all_capabilities, manner)
    if capabilities is not None:
        process["capabilities"] = capabilities
    return process


def _unreadable(what: str) -> Internal:
    hint = f"config.json: {what} is not what it must be"
    return Internal("the configuration of the container cannot be read", hint=hint)


def _is_texts(value: object) -> bool:
    # Of a long environment, at every exec. What JSON calls a text is a str and nothing derived from it.
    return isinstance(value, list) and {str}.issuperset(map(type, value))


def _is_capabilities(value: object) -> bool:
    return isinstance(value, Mapping) and all(value.get(name) is None or _is_texts(value[name]) for name in _SETS)


def _is_limits(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, Mapping) and isinstance(item.get("type"), str) for item in value
    )


def _is_user(value: object) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("additionalGids") or [], list)


_SHAPES: Mapping[str, Callable[[object], bool]] = {
    "cwd": lambda value: isinstance(value, str),
    "env": _is_texts,
    "user": _is_user,
    "capabilities": _is_capabilities,
    "rlimits": _is_limits,
}


def _checked_size(text: str, what: str) -> int:
    """Return what `text` costs in execve(2): its bytes, a NUL, a pointer."""
    if "\0" in text:
        raise InvalidArgument(f"{what} contains a NUL character")
    size = len(_checked_text(text, what))
    if size > MAX_STRING:
        raise InvalidArgument(f"{what} is longer than {MAX_STRING} bytes")
    return size + 1 + 8


def _checked_text(text: str, what: str) -> bytes:
    """Return `text` in UTF-8, if that is possible."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"{what} contains a lone surrogate") from error


def _check_working_dir(path: str) -> None:
    if not path:
        return
    _checked_size(path, "the working directory")
    if not path.startswith("/"):
        raise InvalidArgument(f"the working directory '{shown(path)}' is invalid, it needs to be an absolute path")
    # normpath keeps a leading "//"; the kernel does not care for it.
    if _FD_DIRECTORY.fullmatch("/" + posixpath.normpath(path).lstrip("/")):
        raise InvalidArgument(f"the working directory '{shown(path)}' is invalid, it leads through a file descriptor")


def _environment(inherited: Iterable[str], config: ExecConfig, home: str) -> list[str]:
    """The container's entries, then the request's, each name once, at the place where it came first.

    The order is Docker's: TERM is a default below the request, so that a bare `TERM` removes it; HOME comes
    last, because the runtime would add it again.
    """
    # An inherited entry without "=" is no environment variable; runc refuses it.
    variables = dict(_pair(entry) for entry in inherited if "=" in entry)
    if config.tty:
        variables.setdefault("TERM", "xterm")
    for entry in config.env:
        name, value = _pair(entry)
        if "=" in entry:
            variables[name] = value
        else:
            variables.pop(name, None)
    if home:
        variables.setdefault("HOME", home)
    return [f"{name}={value}" for name, value in variables.items()]


def _pair(entry: str) -> tuple[str, str]:
    name, _, value = entry.partition("=")
    return name, value


def _user(inherited: object, user: ResolvedUser) -> dict[str, Any]:
    """Numbers only. The umask is the container's; `username` (Windows) would name somebody else."""
    numbers: dict[str, Any] = {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.additional_gids)}
    if isinstance(inherited, Mapping) and inherited.get("umask") is not None:
        numbers["umask"] = inherited["umask"]
    return numbers


def _limits(named: Iterable[Mapping[str, Any]], default: Mapping[str, tuple[int, int]]) -> list[Mapping[str, Any]]:
    """Return the container's limits, and for those that it does not name the default ones.

    Without these an exec would have the service's own, a great many open files among them.
    """
    limits = {limit.get("type", ""): limit for limit in named}
    for name, (soft, hard) in default.items():
        limits.setdefault(name, {"type": name, "soft": soft, "hard": hard})
    return list(limits.values())


def _capabilities(
    container_process: Mapping[str, Any],
    config: ExecConfig,
    user: ResolvedUser,
    everything: Sequence[str],
    manner: ExecManner,
) -> dict[str, Any] | None:
    """Return the capabilities of the exec; None keeps the container's as they are.

    Privileged sets the three sets whatever the uid, as Docker does. For a user other than root that still
    gives the *program* none: execve(2) clears permitted without ambient ones. It only lifts the bound, for
    set-uid programs. (Podman lets the container's own user keep what it has by ambient ones.)

    Inheritable and ambient are empty for another user (CVE-2022-27649): ambient ones would make a plain user
    strong.
    """
    own = container_process.get("capabilities") or {}
    is_own_user = not config.user or user.uid == container_user(container_process).uid
    if config.privileged:
        if manner.ambient_when_privileged and is_own_user and user.uid != 0:
            usable = own.get("effective") or ()
            return _sets(bounding=everything, usable=usable) | {"inheritable": [*usable], "ambient": [*usable]}
        return _sets(bounding=everything, usable=everything)
    if is_own_user:
        return None
    if manner.fixed_capabilities:
        return dict(own) | {"inheritable": [], "ambient": []}
    bounding = own.get("bounding") or ()
    return _sets(bounding=bounding, usable=bounding if user.uid == 0 else ())


def _sets(*, bounding: Iterable[str], usable: Iterable[str]) -> dict[str, list[str]]:
    return {
        "bounding": list(bounding),
        "effective": list(usable),
        "permitted": list(usable),
        "inheritable": [],
        "ambient": [],
    }
