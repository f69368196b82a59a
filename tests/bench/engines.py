"""dockerd and podman as child processes, each with all its files in a place of its own.

They are configured for what a machine without systemd, without iptables and with few capabilities can give, and
so that they do the same work as the others: the same root file system, no network, no seccomp filter, because
the containers of the bare runtimes have none either and compiling one is part of every exec.
"""

import contextlib
import io
import os
import resource
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.client import API, ApiError, DockerClient
from bench.contestants import DOCKERD, PODMAN, Served
from bench.places import Place
from bench.processes import kill_all
from support.bundle import SLEEP_FOREVER
from support.errors import HostError
from support.programs import find_program, run_program
from support.rootfs import build_rootfs
from support.runtimes import RuntimeHost

_READY_TIMEOUT = 30.0
_STOP_TIMEOUT = 20.0
_POLL = 0.05


class Engine:
    """One running engine, from its start to the last of its mounts."""

    def __init__(self, place: Place, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it on `socket_in(place)` and wait until it answers; HostError with the end of its log otherwise."""
        self.place = place
        self.socket = socket_in(place)
        self._log = place.disk / "log"
        self._container = ""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | dict(environment)
            )
        self._client = DockerClient(self.socket)
        try:
            self._wait_ready()
            self._image = self._import_image()
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """The pid of its first process."""
        return self._process.pid

    def run_container(self, runtime: str = "") -> str:
        """Start a container that only waits and return its id; `runtime` as the engine knows it."""
        limits = {"NetworkMode": "none", "SecurityOpt": ["seccomp=unconfined"]}
        body = {"Image": self._image, "Cmd": list(SLEEP_FOREVER), "HostConfig": limits | _present(Runtime=runtime)}
        created = self._client.request("POST", f"{API}/containers/create", body, expect=[201]).json()
        self._container = str(created["Id"])
        self._client.request("POST", f"{API}/containers/{self._container}/start", expect=[204])
        return self._container

    def remove_container(self) -> None:
        """End and remove the container; harmless without one."""
        if self._container:
            container, self._container = self._container, ""
            self._client.request("DELETE", f"{API}/containers/{container}?force=1", expect=[200, 204])

    def stop(self) -> None:
        """End everything of it, whatever state it is in."""
        with contextlib.suppress(ApiError, OSError):
            self.remove_container()
        self._client.close()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        kill_all(self.place.processes())
        for directory in (self.place.disk, self.place.memory):
            _unmount_below(directory)

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + _READY_TIMEOUT
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                log = self._log.read_text(errors="replace").strip()
                raise HostError(f"does not come up (exit code {self._process.poll()}): {log[-500:]}")
            time.sleep(_POLL)  # engines differ in how they say that they are ready, if they do

    def _answers(self) -> bool:
        try:
            return self._client.request("GET", "/_ping").status == 200
        except (OSError, ApiError):
            return False

    def _import_image(self) -> str:
        answer = self._client.request("POST", f"{API}/images/create?fromSrc=-", raw=_root_archive(), expect=[200])
        return str(answer.json()["status"])


def socket_in(place: Place) -> Path:
    """Return where an engine listens."""
    return place.memory / "sock"


def start_dockerd(place: Place, host: RuntimeHost) -> tuple[Served, Engine]:
    """Start dockerd, with a containerd of its own, and a container under the runtime of `host`."""
    argv = [str(find_program("dockerd")), "--host", f"unix://{socket_in(place)}"]
    argv += ["--data-root", str(place.disk / "data"), "--exec-root", str(place.memory / "exec")]
    argv += ["--pidfile", str(place.memory / "pid"), "--config-file", str(place.disk / "daemon.json")]
    argv += ["--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=vfs"]
    # "runc" is dockerd's own name for the runc on the PATH, which is the host's, and cannot be given away.
    runtime = "" if host.name == "runc" else host.name
    argv += ["--add-runtime", f"{runtime}={host.program}"] if runtime else []
    (place.disk / "daemon.json").write_text("{}\n")
    engine = Engine(place, argv, {})
    with _stopping_on_error(engine):
        container = engine.run_container(runtime)
    return Served(DOCKERD, host.name, place, engine.socket, container), engine


def start_podman(place: Place, host: RuntimeHost) -> tuple[Served, Engine]:
    """Start `podman system service` and a container under the runtime of `host`."""
    configuration, storage = place.disk / "containers.conf", place.disk / "storage.conf"
    configuration.write_text(_containers_conf(place, host))
    storage.write_text(
        f'[storage]\ndriver = "vfs"\ngraphroot = "{place.disk / "graph"}"\nrunroot = "{place.memory / "run"}"\n'
    )
    environment = {"CONTAINERS_CONF": str(configuration), "CONTAINERS_STORAGE_CONF": str(storage)}
    argv = [str(find_program("podman")), "system", "service", "--time=0", f"unix://{socket_in(place)}"]
    engine = Engine(place, argv, environment)
    with _stopping_on_error(engine):
        container = engine.run_container()

    def replace() -> str:
        # A session's record stays with the container for five minutes, its conmon as well, and every further exec
        # gets slower by them (60 ms became 95 ms with 200). Without this podman would look worse in each round.
        engine.remove_container()
        kill_all(place.processes() - {engine.pid})
        return engine.run_container()

    return Served(PODMAN, host.name, place, engine.socket, container, replace), engine


def _containers_conf(place: Place, host: RuntimeHost) -> str:
    # podman lowers its own limit to pid_max first.
    most = int(Path("/proc/sys/kernel/pid_max").read_text())
    own = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    processes = most if own == resource.RLIM_INFINITY else min(own, most)
    # crun in its cgroup2 view can set no device filter; without cgroups none is asked of it.
    cgroups = 'cgroups = "disabled"' if host.view is not None else ""
    return f"""\
[containers]
# Podman's own limits are higher than a process without CAP_SYS_RESOURCE can give.
default_ulimits = ["nofile=1024:1024", "nproc={processes}:{processes}"]
{cgroups}
[engine]
runtime = "{host.name}"
cgroup_manager = "cgroupfs"
events_logger = "none"
# The default, shared memory, is one for all of the machine's podman, and a fresh tmp_dir resets it.
lock_type = "file"
tmp_dir = "{place.memory / "tmp"}"
[engine.runtimes]
{host.name} = ["{host.program}"]
"""


def _root_archive() -> bytes:
    with tempfile.TemporaryDirectory() as name, io.BytesIO() as archive:
        rootfs = build_rootfs(Path(name) / "rootfs")
        with tarfile.open(fileobj=archive, mode="w") as tar:
            tar.add(rootfs, arcname=".")
        return archive.getvalue()


def _unmount_below(directory: Path) -> None:
    """Unmount whatever an engine left mounted, the innermost first."""
    prefix = os.fspath(directory.resolve()) + "/"
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in sorted((point for point in points if point.startswith(prefix)), reverse=True):
        run_program(["umount", "--lazy", point])


@contextlib.contextmanager
def _stopping_on_error(engine: Engine) -> Iterator[None]:
    try:
        yield
    except BaseException:
        engine.stop()
        raise


def _present(**fields: str) -> dict[str, str]:
    return {name: value for name, value in fields.items() if value}
