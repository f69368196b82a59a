"""Ways in which state breaks. Each damages one container of a tree, and the others must not notice.

`FILE_BREAKERS` put something else in the place of a file; `CONTAINER_BREAKERS` damage a container, whose state
file they hit where there is one to choose. What Docker and Podman keep in one file for all containers
(containers.json, db.sql) is hit with the former, and then it is the whole engine that must not notice.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from support.trees.plan import NOBODY, Placed

_HUGE = 1 << 30
_DEPTH = 200_000


def half_written(path: Path) -> None:
    """Cut a file in the middle, as a full disk or a crash does."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    """Leave nothing of a file but its name: what is left of one that was renamed but not yet on the disk."""
    os.truncate(path, 0)


def not_an_object(path: Path) -> None:
    """Write JSON that is no object."""
    path.write_text('["not", "an", "object"]')


def not_text(path: Path) -> None:
    """Write bytes that are neither JSON nor UTF-8."""
    path.write_bytes(b"\xff\xfe\x00\x80" * 64)


def wrong_types(path: Path) -> None:
    """Give every value of the document another type, on every level."""
    path.write_text(json.dumps(_retyped(json.loads(path.read_bytes()), top=True)))


def too_deep(path: Path) -> None:
    """Write JSON that is nested deeper than any parser follows."""
    path.write_text('{"id":' * _DEPTH)


def huge(path: Path) -> None:
    """Make a file a gigabyte long, most of it a hole."""
    os.truncate(path, _HUGE)


def fifo(path: Path) -> None:
    """Put a FIFO in a file's place: to open it as a file is to wait for ever."""
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    """Put a directory in a file's place."""
    path.unlink()
    path.mkdir()


def missing(path: Path) -> None:
    """Remove a file."""
    path.unlink()


def loop(path: Path) -> None:
    """Put a symlink to itself in the place of a file, or of a directory with all that is in it."""
    _remove(path)
    path.symlink_to(path.name)


def device(path: Path) -> None:
    """Put a symlink to a file that never ends in a file's place."""
    path.unlink()
    path.symlink_to("/dev/zero")


def forbidden(path: Path) -> None:
    """Take all permissions from a file or a directory. To root, and with CAP_DAC_OVERRIDE, this means nothing."""
    path.chmod(0)


FILE_BREAKERS: Mapping[str, Callable[[Path], None]] = {
    breaker.__name__: breaker
    for breaker in (
        half_written,
        empty,
        not_an_object,
        not_text,
        wrong_types,
        too_deep,
        huge,
        fifo,
        directory,
        missing,
        loop,
        device,
    )
}


def missing_bundle(placed: Placed) -> None:
    """Remove a container's bundle with everything in it."""
    shutil.rmtree(placed.bundle)


def missing_state(placed: Placed) -> None:
    """Remove a container from the runtime's root."""
    shutil.rmtree(placed.state_dir)


def looping_state(placed: Placed) -> None:
    """Make a container's directory in the runtime's root a symlink to itself."""
    loop(placed.state_dir)


def looping_bundle(placed: Placed) -> None:
    """Make a container's bundle a symlink to itself."""
    loop(placed.bundle)


def dead_pid(placed: Placed) -> None:
    """Let the init process be one that cannot be."""
    _set_process(placed.state_file, NOBODY.pid, None)


def reused_pid(placed: Placed) -> None:
    """Let the pid be somebody else's by now: the start time is another."""
    _set_process(placed.state_file, None, 1)


def foreign_id(placed: Placed) -> None:
    """Let a directory be named after another container than its files (crun's name none)."""
    placed.state_dir.rename(placed.state_dir.with_name("f" * 64))


def bundle_elsewhere(placed: Placed) -> None:
    """Let the state name a bundle that nobody knows."""
    text = placed.state_file.read_text()
    placed.state_file.write_text(text.replace(str(placed.bundle), "/nonexistent/bundle"))


def _on(which: Callable[[Placed], Path], breaker: Callable[[Path], None]) -> Callable[[Placed], None]:
    return lambda placed: breaker(which(placed))


CONTAINER_BREAKERS: Mapping[str, Callable[[Placed], None]] = {
    **{f"{name}_state": _on(lambda placed: placed.state_file, breaker) for name, breaker in FILE_BREAKERS.items()},
    **{f"{name}_spec": _on(lambda placed: placed.spec_file, breaker) for name, breaker in FILE_BREAKERS.items()},
    **{
        breaker.__name__: breaker
        for breaker in (
            missing_bundle,
            missing_state,
            looping_state,
            looping_bundle,
            dead_pid,
            reused_pid,
            foreign_id,
            bundle_elsewhere,
        )
    },
}


def _set_process(state: Path, pid: int | None, start_time: int | None) -> None:
    document = json.loads(state.read_text())
    fields = (
        ("init_process_pid", "init_process_start") if "init_process_pid" in document else ("pid", "process-start-time")
    )
    for field, value in zip(fields, (pid, start_time), strict=True):
        document[field] = document[field] if value is None else value
    state.write_text(json.dumps(document))


def _retyped(value: Any, *, top: bool = False) -> Any:
    """Return a value of another type; objects stay objects, or nothing below them would be reached."""
    match value:
        case dict():
            return {name: _retyped(inner) for name, inner in value.items()} or ["was", "an", "object"]
        case list():
            return [_retyped(inner) for inner in value] if top else {"was": "a list"}
        case str():
            return len(value)
        case bool():
            return "true" if value else ""
        case int() | float():
            return [value]
        case _:
            return "null"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
