"""Where contestants keep their files.

Services keep what lives as long as a session in memory (/run is a tmpfs on every common distribution), and images
on a disk. The benchmark gives both to all of them: a file system costs milliseconds an exec where it is a disk's.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.processes import processes_of

_IN_MEMORY = ("/run", "/dev/shm")
_ON_DISK = "/tmp"


@dataclass(frozen=True, slots=True)
class Place:
    """Two directories with the same name, `disk` and `memory`, for one contestant alone.

    Every process of the contestant names one of them on its command line: the service its configuration, a monitor
    its session, an engine its data root. That finds them whoever their parent is, and leaves out the processes in
    the container, which name nothing of the host.
    """

    disk: Path
    memory: Path

    def make(self, name: str) -> "Place":
        """Make a place below this one."""
        made = Place(self.disk / name, self.memory / name)
        made.disk.mkdir(exist_ok=True)
        made.memory.mkdir(exist_ok=True)
        return made

    def processes(self) -> frozenset[int]:
        """Return the pids of the processes that belong here."""
        return processes_of(f"/{self.disk.parent.name}/{self.disk.name}/")


@contextlib.contextmanager
def temporary_place() -> Iterator[Place]:
    """Make a place, and remove it at the end with all that is in it."""
    # The path of a unix socket ends at 107 bytes, so the name is short.
    disk = Path(tempfile.mkdtemp(prefix="eb-", dir=_ON_DISK))
    place = Place(disk, Path(memory_file_system() or _ON_DISK) / disk.name)
    try:
        place.memory.mkdir(mode=0o700, exist_ok=True)
        yield place
    finally:
        for directory in (place.memory, place.disk):
            shutil.rmtree(directory, ignore_errors=True)


def memory_file_system() -> str | None:
    """Return the mount point of a tmpfs, None when there is none where one usually is."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    in_memory = {fields[1] for fields in mounts if fields[2] == "tmpfs"}
    return next((path for path in _IN_MEMORY if path in in_memory), None)
