"""Containers of bare runc and crun, made and ended the way an engine does it."""

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.bundle import bundle_config, write_bundle
from support.cgroups import Cgroup2View, is_pure_cgroup2
from support.errors import HostError
from support.programs import find_program, run_launcher, run_program
from support.rootfs import build_rootfs


@dataclass(slots=True)
class RuntimeHost:
    """One OCI runtime with a state root of its own, and the containers made through it.

    `program` is what runs it: the runtime, or a script around it. `directory` holds the states, the bundles
    and the logs, and is the caller's to remove after `close`.
    """

    name: str
    program: Path
    directory: Path
    view: Cgroup2View | None = None

    @property
    def root(self) -> Path:
        """What `--root` takes: the directory of the states."""
        return self.directory / "state"

    def run(
        self,
        container_id: str = "",
        *,
        start: bool = True,
        config: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> "TestContainer":
        """Make a container and, with `start`, run its init; each has a root file system of its own.

        `config` replaces the whole config.json; `changes` go to `bundle_config`. Without an id, one is
        invented.
        """
        container_id = container_id or f"{self.name}-{secrets.token_hex(6)}"
        bundle = self.directory / "bundles" / container_id
        bundle.mkdir(parents=True)
        build_rootfs(bundle / "rootfs")
        # An id is unique in one state root only, a cgroup on the whole host: two clones may run their demos.
        cgroup = f"/execgate-{container_id}-{secrets.token_hex(4)}"
        write_bundle(bundle, config or bundle_config(hostname=container_id[:63], cgroup=cgroup, **changes))
        self.root.mkdir(exist_ok=True)
        container = TestContainer(id=container_id, host=self, bundle=bundle)
        run_launcher(self._argv("create", "--bundle", bundle, container_id), self.directory / "init.log")
        if start:
            container.start()
        return container

    def command(self, *arguments: str | Path) -> str:
        """Run the runtime with these arguments on this host's root and return its output."""
        return run_program(self._argv(*arguments))

    def close(self) -> None:
        """Delete every container in the state root, whoever made it there, and the view with them."""
        for state in sorted(self.root.glob("*")):
            self.command("delete", "--force", state.name)
        if self.view is not None:
            self.view.remove()

    def _argv(self, *arguments: str | Path) -> list[str | Path]:
        return [self.program, "--root", self.root, *arguments]


@dataclass(slots=True)
class TestContainer:
    """A container of one of the hosts above."""

    __test__ = False  # pytest: not a test class

    id: str
    host: RuntimeHost
    bundle: Path

    @property
    def rootfs(self) -> Path:
        """The container's root, as a directory of the host."""
        return self.bundle / "rootfs"

    def state(self) -> dict[str, Any]:
        """What the runtime says of it: `{id, pid, status, bundle, …}`; raises HostError once deleted."""
        state: dict[str, Any] = json.loads(self.host.command("state", self.id))
        return state

    @property
    def init_pid(self) -> int:
        """The pid of its init process on the host, 0 once that has ended."""
        return int(self.state()["pid"])

    def start(self) -> None:
        """Let the init of a created container run."""
        self.host.command("start", self.id)

    def pause(self) -> None:
        """Freeze every process of it."""
        self.host.command("pause", self.id)

    def resume(self) -> None:
        """Undo `pause`."""
        self.host.command("resume", self.id)

    def kill(self, signal: str = "KILL") -> None:
        """Send its init a signal; KILL ends every process of the container."""
        self.host.command("kill", self.id, signal)

    def processes(self) -> dict[int, list[str]]:
        """The command lines of all its processes as the kernel shows them, by their pids on the host."""
        return processes_within(pid_namespace(self.init_pid))

    def wait_for_process(self, *argv: str, timeout: float = 30.0) -> int:
        """Wait until a process has this command line, and return its pid on the host.

        A start is over once the pid is known; the pid's execve may still be to come.
        """
        deadline = time.monotonic() + timeout
        while True:
            for pid, found in self.processes().items():
                if found == list(argv):
                    return pid
            if time.monotonic() > deadline:
                raise AssertionError(f"no process {argv} in {self.id}: {self.processes()}")
            time.sleep(0.01)

    def delete(self) -> None:
        """End it and remove its state, if it has one; its bundle stays until the host's directory goes."""
        self.host.command("delete", "--force", self.id)


def runc_host(directory: Path) -> RuntimeHost:
    """Return runc with its states below `directory`, which is created, or taken over as it is."""
    directory.mkdir(parents=True, exist_ok=True)
    return RuntimeHost("runc", find_program("runc"), directory)


def crun_host(directory: Path) -> RuntimeHost:
    """Return crun with its states below `directory`, inside a cgroup2 view where the host needs one.

    A directory that is there already is taken over with its containers; the view is made anew.

    Raises HostError with the reason where crun cannot run: a hybrid cgroup host on which this process may not
    mount, for one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    program = find_program("crun")
    if is_pure_cgroup2():
        return RuntimeHost("crun", program, directory)
    try:
        view = Cgroup2View.create(directory / "view")
    except HostError as error:
        raise HostError(f"crun needs a pure cgroup2 host, or the right to mount one for it: {error}") from error
    return RuntimeHost("crun", view.wrap(program, directory / "crun"), directory, view)


def pid_namespace(pid: int) -> Path:
    """Return what tells the pid namespace of a process from all others, for as long as it exists."""
    return Path(f"/proc/{pid}/ns/pid").readlink()


def processes_within(namespace: Path) -> dict[int, list[str]]:
    """Return the command line of each process in a pid namespace by its pid on the host; a zombie's is `[""]`."""
    found = ((int(entry.name), _argv_within(entry, namespace)) for entry in Path("/proc").glob("[0-9]*"))
    return {pid: argv for pid, argv in found if argv}


def _argv_within(entry: Path, namespace: Path) -> list[str]:
    try:
        if (entry / "ns/pid").readlink() != namespace:
            return []
        return (entry / "cmdline").read_text().rstrip("\0").split("\0")
    except OSError:  # it ended meanwhile
        return []
