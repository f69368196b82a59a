"""A view of the host in which crun runs.

crun refuses a host whose /sys/fs/cgroup mixes version 1 and version 2 ("hybrid"), and runc is at home on
either. So that one service drives both side by side, crun alone is put into a mount namespace where a cgroup2
file system is all there is on /sys/fs/cgroup. The namespace is held by a bind mount of itself, not by a
process, and `crun` becomes a two-line script that enters it, for about 2 ms. Everything else, the paths of
bundles, states and sockets above all, is the same inside and outside, as long as it lies on file systems
mounted before.

On a pure cgroup2 host nothing of this is needed, and nothing of it happens.
"""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from support.errors import HostError
from support.programs import find_program, run_program

_CGROUP_ROOT = Path("/sys/fs/cgroup")

_ENTER_VIEW = """\
umount -R /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup
"""

_WRAPPER = """\
#!/bin/sh
exec {nsenter} --mount={namespace} {program} "$@"
"""


def is_pure_cgroup2() -> bool:
    """Whether /sys/fs/cgroup is itself a cgroup2 file system."""
    return (_CGROUP_ROOT / "cgroup.controllers").exists()


@dataclass(frozen=True, slots=True)
class Cgroup2View:
    """A mount namespace with nothing but cgroup2 on /sys/fs/cgroup.

    `directory` becomes a private mount that holds the namespace's file; `remove` gives both back.
    """

    directory: Path

    @property
    def namespace(self) -> Path:
        """What `nsenter --mount=` takes."""
        return self.directory / "mnt"

    @classmethod
    def create(cls, directory: Path) -> "Cgroup2View":
        """Make the view in `directory`, which is created; a view left there by a killed run is replaced."""
        view = cls(directory)
        view.remove()
        directory.mkdir(parents=True, exist_ok=True)
        # A mount namespace can be pinned only below a private mount: the pin must not propagate into itself.
        run_program(["mount", "--bind", directory, directory])
        try:
            run_program(["mount", "--make-private", directory])
            view.namespace.touch()
            run_program(["unshare", f"--mount={view.namespace}", "sh", "-ec", _ENTER_VIEW])
        except HostError:
            view.remove()
            raise
        return view

    def wrap(self, program: Path, script: Path) -> Path:
        """Write a script that runs `program` inside the view with its own arguments, and return it."""
        script.write_text(
            _WRAPPER.format(
                nsenter=find_program("nsenter"),
                namespace=shlex.quote(str(self.namespace)),
                program=shlex.quote(str(program)),
            )
        )
        script.chmod(0o755)
        return script

    def remove(self) -> None:
        """Unmount what `create` mounted; harmless when there is nothing. Containers made inside live on."""
        for mount_point in (self.namespace, self.directory):
            while _is_mount_point(mount_point):
                run_program(["umount", mount_point])


def _is_mount_point(path: Path) -> bool:
    # os.path.ismount misses bind mounts within one file system; the kernel's own list does not.
    mounted = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    return os.fspath(path.resolve()).replace(" ", r"\040") in mounted
