"""A fresh user of this host, with a rootless Podman and a rootless execgate of their own.

Everything of the user lies in one directory that goes with them: home, storage, runtime directory. What has to be on
the host is what any rootless Podman needs, podman and newuidmap, and root to make the user.

crun refuses a host of mixed cgroup versions. There the user's first podman command runs where a cgroup2 is all there
is (`support.cgroups`); its idle process keeps that mount namespace, and every later command, and execgate, join it.
"""

import contextlib
import os
import pwd
import re
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import execgate
from support.access import write_policy
from support.bundle import SLEEP_FOREVER
from support.cgroups import Cgroup2View, is_pure_cgroup2
from support.errors import HostError
from support.notify import NotifySocket
from support.programs import run_program
from support.rootfs import build_rootfs
from support.service import POLICY, READY_TIMEOUT, Service

IMAGE = "localhost/execgate-test:1"
_PROGRAMS = {"podman": "podman", "newuidmap": "uidmap", "newgidmap": "uidmap", "setpriv": "util-linux"}
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_USER_NAME = re.compile(r"execgate-t(\d+)")

_PAUSE_PID = "libpod/tmp/pause.pid"
_KILL_PASSES = 10
_KILL_TIME = 10.0

# Podman's locks are in shared memory by default, in a file that would outlive the user.
_CONTAINERS_CONF = '[engine]\nlock_type = "file"\n'


@dataclass(slots=True)
class RootlessUser:
    """The user. `close` ends whatever they run and removes them."""

    name: str
    directory: Path
    view: Cgroup2View | None = None
    _services: list[Service] = field(default_factory=list)

    @classmethod
    def create(cls) -> "RootlessUser":
        """Make the user and their image. HostError says what this host lacks for it."""
        for program, package in _PROGRAMS.items():
            if shutil.which(program, path=_PATH) is None:
                raise HostError(f"no {program} on this host: apt-get install {package}")
        _remove_forgotten()
        user = cls(f"execgate-t{os.getpid()}", Path(tempfile.mkdtemp(prefix="eg-", dir="/tmp")))
        try:
            user._set_up()
        except BaseException:
            user.close()
            raise
        return user

    @property
    def uid(self) -> int:
        """The user's uid on the host."""
        return pwd.getpwnam(self.name).pw_uid

    @property
    def home(self) -> Path:
        """The user's home."""
        return self.directory / "home"

    @property
    def runtime_dir(self) -> Path:
        """What XDG_RUNTIME_DIR says."""
        return self.directory / "run"

    @property
    def _configuration(self) -> Path:
        return self.home / ".config/execgate"

    @property
    def environment(self) -> dict[str, str]:
        """What a login would give them."""
        return {
            "PATH": _PATH,
            "LANG": "C.UTF-8",
            "USER": self.name,
            "HOME": str(self.home),
            "XDG_RUNTIME_DIR": str(self.runtime_dir),
        }

    def run(self, *argv: str | Path, in_view: bool = False) -> str:
        """Run a program as the user and return its output; HostError with its own words when it fails."""
        return run_program(self._argv(argv, in_view=in_view))

    def podman(self, *arguments: str | Path) -> str:
        """Run podman as the user and return its output."""
        return self.run("podman", "--log-level=error", *arguments)

    def podman_exec(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run `podman exec` with these arguments, as the user, to its end, whatever that is."""
        argv = self._argv(["podman", "--log-level=error", "exec", *arguments])
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)

    def run_container(self, runtime: str, *options: str) -> str:
        """Start a container that only waits, under `runtime`, and return its id. HostError in podman's words."""
        arguments = ("--runtime", runtime, "run", "--detach", "--network=none", *options, IMAGE, *SLEEP_FOREVER)
        return self.podman(*arguments).strip()

    def start_service(self, runtimes: Sequence[str], *, name: str = "execgate") -> Service:
        """Start execgate as the user, outside of Podman's namespaces, for the containers of these runtimes.

        Its files are in a directory `name` of the runtime directory; a later one of that name takes over its sessions.
        """
        directory = self.runtime_dir / name
        if not directory.exists():
            directory.mkdir(mode=0o700)
            self._give(directory)
        flags = [f"--runtime-root={runtime}={self.runtime_dir / runtime}" for runtime in runtimes]
        flags += [f"--listen=unix://{directory}/execgate.sock", f"--state-dir={directory}/state"]
        python = self._python()
        notify = NotifySocket(directory / "notify")
        notify.path.chmod(0o666)
        argv = [str(one) for one in self._argv([*python, "-m", "execgate", "serve", *flags], NOTIFY_SOCKET=notify.path)]
        with (directory / "service.log").open("ab") as log:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        service = Service(directory, process, argv, notify)
        self._services.append(service)
        try:
            notify.wait_for("READY=1", process, timeout=READY_TIMEOUT)
        except HostError as error:
            service.kill()
            raise HostError(f"execgate serve, rootless: {error}\n{service.log()[-4000:]}") from error
        return service

    def execgate(self, *arguments: str | Path) -> str:
        """Run execgate's own command as the user, outside of Podman's namespaces, and return its output."""
        return self.run(*self._python(), "-m", "execgate", *arguments)

    def allow(self, *rules: str) -> None:
        """Give the user a policy of these rules, where their services look for it."""
        path = write_policy(self._configuration, *rules)
        for one in (path.parent, path):
            self._give(one)

    @contextlib.contextmanager
    def without_policy(self) -> Iterator[None]:
        """Have the services that are started in here find no policy."""
        path = self._configuration / POLICY
        aside = path.rename(path.with_suffix(".aside"))
        try:
            yield
        finally:
            aside.rename(path)

    def end_pause_process(self) -> None:
        """End the process by which Podman, up to version 5, finds its namespaces, as a rough clean-up would."""
        with contextlib.closing(os.fdopen(os.pidfd_open(int((self.runtime_dir / _PAUSE_PID).read_text())))) as fd:
            signal.pidfd_send_signal(fd.fileno(), signal.SIGKILL)
            select.select([fd], [], [], _KILL_TIME)

    def close(self) -> None:
        """Remove the user, their processes, containers and files."""
        for service in self._services:
            service.kill()
        with contextlib.suppress(HostError, subprocess.TimeoutExpired):
            self.podman("rm", "--all", "--force", "--time=0")
        if self.view is not None:
            self.view.remove()
        _remove_user(self.name, self.directory)

    def _set_up(self) -> None:
        self.directory.chmod(0o755)
        run_program(["useradd", "--create-home", "--home-dir", self.home, "--shell", "/bin/sh", self.name])
        self.runtime_dir.mkdir(mode=0o700)
        self._give(self.runtime_dir)
        for name in ("subuid", "subgid"):
            if not any(line.startswith(f"{self.name}:") for line in Path("/etc", name).read_text().splitlines()):
                raise HostError(f"useradd gives a new user no range in /etc/{name}: see SUB_UID_COUNT in login.defs(5)")
        configuration = self.home / ".config/containers/containers.conf"
        configuration.parent.mkdir(parents=True)
        configuration.write_text(_CONTAINERS_CONF)
        for path in (self.home / ".config", configuration.parent, configuration):
            self._give(path)
        if not is_pure_cgroup2():
            # Where it cannot be had runc does without it, and crun says why it does not.
            with contextlib.suppress(HostError):
                self.view = Cgroup2View.create(self.directory / "view")
        self.run("podman", "unshare", "true", in_view=True)
        self._import_image()

    def _import_image(self) -> None:
        archive = self.home / "rootfs.tar"
        with tarfile.open(archive, mode="w") as tar:
            tar.add(build_rootfs(self.directory / "rootfs"), arcname=".")
        self._give(archive)
        self.podman("import", "--quiet", archive, IMAGE)

    def _give(self, path: Path) -> None:
        shutil.chown(path, self.name, self.name)

    def _argv(self, argv: Sequence[str | Path], *, in_view: bool = False, **variables: str | Path) -> list[str | Path]:
        """Return how root runs a program as the user, in the user's home and with nothing else of root's."""
        enter = ["nsenter", f"--mount={self.view.namespace}"] if in_view and self.view is not None else []
        become = ["setpriv", f"--reuid={self.name}", f"--regid={self.name}", "--init-groups"]
        given = [f"{name}={value}" for name, value in {**self.environment, **variables}.items()]
        return [*enter, *become, "env", f"--chdir={self.home}", "--ignore-environment", *given, *argv]

    def _python(self) -> list[str]:
        """Return how the user runs a Python that has the project; HostError when there is none that they may run.

        The virtual environment's own may lead into root's home. Then the system's is as good, if it has the version.
        """
        paths = [str(Path(execgate.__file__).parents[1]), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        candidates = [sys.executable, f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"]
        reasons = []
        for candidate in candidates:
            python = ["env", f"PYTHONPATH={os.pathsep.join(paths)}", "PYTHONDONTWRITEBYTECODE=1", candidate]
            try:
                self.run(*python, "-c", "import execgate.app")
            except HostError as error:
                reasons.append(f"{candidate}: {str(error).splitlines()[-1]}")
            else:
                return python
        raise HostError(f"no Python and no checkout that another user may read: {'; '.join(reasons)}")


def _remove_forgotten() -> None:
    """Remove the users of test runs that were killed."""
    for user in pwd.getpwall():
        found = _USER_NAME.fullmatch(user.pw_name)
        if found and not Path("/proc", found[1]).exists():
            _remove_user(user.pw_name, Path(user.pw_dir).parent)


def _remove_user(name: str, directory: Path) -> None:
    """Remove a user of ours, who may be half made, with all they own."""
    with contextlib.suppress(KeyError):
        _kill_all(pwd.getpwnam(name).pw_uid)
        # A zombie that nobody reaps yet would count as a user who is still there.
        run_program(["userdel", "--force", name])
    shutil.rmtree(directory, ignore_errors=True)


def _kill_all(uid: int) -> None:
    """End all processes of a user, those of their containers too: the inits of these are the user's."""
    for _ in range(_KILL_PASSES):
        with contextlib.ExitStack() as held:
            found = []
            for pid in _living(uid):
                with contextlib.suppress(ProcessLookupError):
                    fd = os.pidfd_open(pid)
                    held.callback(os.close, fd)
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                    found.append(fd)
            if not found:
                return
            for fd in found:
                select.select([fd], [], [], _KILL_TIME)


def _living(uid: int) -> list[int]:
    """The pids of a user's processes that have not ended."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status = (entry / "status").read_text()
            if f"\nUid:\t{uid}\t" in status and "\nState:\tZ" not in status:
                found.append(int(entry.name))
    return found
