"""A program for what a hostile container does where a shell is not enough, and the host's programs that it is after."""

import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from support.programs import find_program, run_program
from support.runtimes import TestContainer

_SOURCE = Path(__file__).with_name("hostile.c")

_FLAGS = ("-static", "-O1", "-Wall", "-Wextra", "-Werror")

INSIDE = "/tmp/hostile"
"""Where a container has it."""


def build(directory: Path) -> Path:
    """Compile it, static, and return where it is; `hostile.c` says what it can do."""
    program = directory / "hostile"
    run_program([find_program("gcc"), *_FLAGS, "-o", program, _SOURCE])
    return program


def install(program: Path, container: TestContainer) -> str:
    """Put it into a container, and return its path there."""
    path = container.rootfs / INSIDE.lstrip("/")
    if not path.exists():
        shutil.copy2(program, path)
    return INSIDE


def install_libraries(container: TestContainer, of: Path) -> None:
    """Give a container what a program of the host needs to run in it; nothing for a static one."""
    listed = subprocess.run([find_program("ldd"), of], capture_output=True, text=True, check=False).stdout
    for library in map(Path, re.findall(r"(/\S+) \(0x", listed)):
        path = container.rootfs / library.relative_to("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            shutil.copy2(library, path)


def fingerprints(programs: Iterable[Path]) -> dict[Path, tuple[str, int, int]]:
    """Return what tells whether a program of the host was written to or replaced: contents, inode, time of change."""
    found = {}
    for program in programs:
        status = program.stat()
        found[program] = (hashlib.sha256(program.read_bytes()).hexdigest(), status.st_ino, status.st_ctime_ns)
    return found
