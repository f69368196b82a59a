"""What the figures were taken on."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import execgate
from bench.places import memory_file_system
from support.errors import HostError
from support.programs import find_program

_PROGRAMS = ("runc", "crun", "conmon", "dockerd", "podman")
_PACKAGES = ("aiohttp", "uvloop")


def describe() -> dict[str, str]:
    """Return the machine's properties by name, in the order to show them."""
    return {
        "processors": f"{os.cpu_count()} x {_line_of('/proc/cpuinfo', 'model name')}",
        "memory": f"{int(_line_of('/proc/meminfo', 'MemTotal').split()[0]) // 1024} MiB",
        "kernel": platform.release(),
        "cgroups": "version 2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "version 1 or hybrid",
        "state of the services": f"tmpfs below {where}" if (where := memory_file_system()) else "on disk",
        "load before": load(),
    }


def versions() -> dict[str, str]:
    """Return the versions of everything that takes part, as its own words or "none"."""
    found = {"execgate": execgate.__version__, "python": platform.python_version()}
    found |= {name: _package(name) for name in _PACKAGES}
    return found | {name: _program(name) for name in _PROGRAMS}


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
        program = find_program(name)
    except HostError:
        return "none"
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0].strip()
