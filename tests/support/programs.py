"""Programs of the host: found by name, run to their end, their failures told in their own words."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from support.errors import HostError

_ADMIN_DIRECTORIES = "/usr/local/sbin:/usr/sbin:/sbin"


def find_program(name: str) -> Path:
    """Return the path of a program; raise HostError when this host has none of that name.

    The directories for root are searched as well: runc is in one, and the PATH of a plain `su` names none.
    """
    found = shutil.which(name) or shutil.which(name, path=_ADMIN_DIRECTORIES)
    if found is None:
        raise HostError(f"no {name} on this host; `sudo scripts/setup-host` installs what is missing")
    return Path(found)


def find_every_program(name: str) -> list[Path]:
    """Return all programs of a name, what `find_program` finds first; one that has two paths is there once."""
    directories = f"{os.environ.get('PATH', os.defpath)}:{_ADMIN_DIRECTORIES}".split(":")
    found: dict[str, Path] = {}
    for directory in directories:
        if path := shutil.which(name, path=directory):
            found.setdefault(os.path.realpath(path), Path(path))
    return list(found.values())


def run_program(argv: Sequence[str | Path], *, timeout: float = 30) -> str:
    """Run a program without input and return its output; raise HostError with its own words when it fails.

    `timeout` is in seconds. Where a program leaves a child behind that keeps its output open, use
    `run_launcher`: this would wait for the child.
    """
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode != 0:
        raise HostError(f"{_shown(argv)}: exit code {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def version_of(program: Path) -> str:
    """Return the first line of what a program says to --version, "" when it says nothing."""
    try:
        done = subprocess.run([program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=30, check=False)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].strip()


def run_launcher(argv: Sequence[str | Path], log: Path, *, timeout: float = 30) -> None:
    """Run a program that leaves a child behind with the same output; both write to the file `log`.

    Raises HostError with the end of the log when the launcher itself fails.
    """
    with log.open("ab") as output:
        code = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=timeout, check=False
        ).returncode
    if code != 0:
        raise HostError(f"{_shown(argv)}: exit code {code}: {log.read_text()[-2000:].strip()}")


def _shown(argv: Sequence[str | Path]) -> str:
    return " ".join(map(str, argv))
