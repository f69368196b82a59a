"""What the figures were taken on."""

import os
import platform
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import execgate
from bench.contestants import with_conmon
from bench.engines import EngineProgram
from bench.places import memory_file_system
from support.errors import HostError
from support.programs import find_program, run_program, version_of

_PROGRAMS = ("runc", "crun", "conmon")
_PACKAGES = ("aiohttp", "uvloop")


def describe() -> dict[str, str]:
    """Return the machine's properties by name, in the order to show them."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "processors": f"{os.cpu_count()} x {_line_of('/proc/cpuinfo', 'model name')}",
        "memory": f"{int(_line_of('/proc/meminfo', 'MemTotal').split()[0]) // 1024} MiB",
        "kernel": platform.release(),
        "cgroups": "version 2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "version 1 or hybrid",
        "state of the services": f"tmpfs below {where}" if (where := memory_file_system()) else "on disk",
        "load before": load(),
    }


def versions(engines: Iterable[EngineProgram], conmons: Iterable[Path] = ()) -> dict[str, str]:
    """Return the versions of everything that takes part, as its own words or "none"."""
    found = {
        "execgate": f"{execgate.__version__}{_commit()}",
        "python": f"{platform.python_version()}, {Path(sys.executable).resolve()}",
    }
    found |= {name: _package(name) for name in _PACKAGES}
    found |= {name: _program(name) for name in _PROGRAMS}
    found |= {with_conmon(path): version_of(path) for path in conmons}
    return found | {
        one.name: f"{version_of(one.path)}, {one.path}" if one.path else _program(one.kind) for one in engines
    }


def load() -> str:
    """Return the load averages of 1, 5 and 15 minutes."""
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def _line_of(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"


def _package(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def _program(name: str) -> str:
    try:
        return version_of(find_program(name))
    except HostError:
        return "none"


def _commit() -> str:
    """Return the commit that is measured, in parentheses; nothing where git knows of none."""
    argv = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return f" ({run_program(argv).strip()})"
    except (HostError, OSError):
        return ""
