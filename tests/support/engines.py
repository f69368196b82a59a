"""The real dockerd, podman and containerd, each with all its files in a place of its own.

They are configured for what a machine without systemd, without iptables and with few capabilities can give: no
network, the plainest storage, cgroupfs, no limit above their own. Everything else is as the engine has it when
nobody configures it, the seccomp filter above all.

What stays outside of an engine's place, because its programs have the paths compiled in: a container's state of
podman (/run/runc, /run/crun), sockets and fifos of containerd's shims (/run/containerd). Both go with the container,
and `stop` removes every container.
"""

import contextlib
import hashlib
import io
import json
import os
import resource
import secrets
import signal
import subprocess
import tarfile
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from support.api import RawApi
from support.bundle import SLEEP_FOREVER
from support.errors import HostError
from support.processes import kill_all, processes_of
from support.programs import find_program, run_program
from support.rootfs import build_rootfs
from support.tty import Terminal

IMAGE = "localhost/busybox:1"
"""The image that every engine has; it names no user, no directory and no command."""

IMAGE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_READY_TIMEOUT = 30.0
_STOP_TIMEOUT = 20.0
_COMMAND_TIMEOUT = 60.0
_POLL = 0.05


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a container is to be. `ulimits` are `name=soft:hard`; `runtime` is a name that the engine was given."""

    name: str = ""
    user: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = ""
    hostname: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    ulimits: Sequence[str] = ()
    cap_add: Sequence[str] = ()
    cap_drop: Sequence[str] = ()
    group_add: Sequence[str] = ()
    security_opt: Sequence[str] = ()
    stop_timeout: int | None = None
    tty: bool = False
    privileged: bool = False
    read_only: bool = False
    runtime: str = ""
    command: Sequence[str] = SLEEP_FOREVER


@dataclass(frozen=True, slots=True)
class ExecOptions:
    """How a command is to be executed. With `tty` it gets a terminal of 24 rows and 80 columns."""

    user: str = ""
    env: Sequence[str] = ()
    workdir: str = ""
    tty: bool = False
    privileged: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of an exec: the exit code of the engine's program, and what that wrote.

    `output` has the newlines of a pipe, also where there was a terminal, which then has `errors` as well.
    """

    code: int
    output: str
    errors: str


class Engine(ABC):
    """One engine, running.

    `disk` holds its images and what survives a reboot, `memory` its sockets and what does not; both must exist, may
    be the same, and are the caller's to remove after `stop`.
    """

    name: str

    def __init__(self, disk: Path, memory: Path | None = None) -> None:
        self.disk = disk
        self.memory = memory or disk
        self._made: list[str] = []
        self._daemon: subprocess.Popen[bytes] | None = None

    # -- what differs between engines

    @abstractmethod
    def start(self) -> None:
        """Start it and import `IMAGE`; HostError with the end of its log when it does not come up."""

    @abstractmethod
    def argv(self, *arguments: str) -> list[str]:
        """Return the command line of the engine's own program."""

    @property
    @abstractmethod
    def environment(self) -> dict[str, str]:
        """What the engine's own program needs in its environment."""

    @abstractmethod
    def run(self, options: RunOptions = RunOptions()) -> str:
        """Start a container and return its full id. HostError in the engine's words; what it made is gone then."""

    @abstractmethod
    def exec_argv(self, container: str, command: Sequence[str], options: ExecOptions) -> list[str]:
        """Return the command line of an exec; HostError for an option that the engine does not have."""

    @abstractmethod
    def remove(self, container: str) -> None:
        """End and remove a container; harmless when it is gone."""

    # -- what does not

    def command(self, *arguments: str) -> str:
        """Run the engine's own program and return what it writes, stripped; HostError with its words."""
        done = subprocess.run(
            self.argv(*arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=self.environment,
            timeout=_COMMAND_TIMEOUT,
            check=False,
            text=True,
        )
        if done.returncode != 0:
            said = " ".join(done.stderr.split())
            raise HostError(f"{self.name} {arguments[0]}: exit code {done.returncode}: {said}")
        return done.stdout.strip()

    def exec(self, container: str, *command: str, options: ExecOptions = ExecOptions()) -> Reply:
        """Execute a command through the engine, to its end; its stdin is empty, or the terminal."""
        argv = self.exec_argv(container, command, options)
        if options.tty:
            with Terminal(argv, self.environment) as terminal:
                code = terminal.wait(timeout=_COMMAND_TIMEOUT)
                return Reply(code, plain_newlines(terminal.shown), "")
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=self.environment,
            timeout=_COMMAND_TIMEOUT,
            check=False,
            text=True,
        )
        return Reply(done.returncode, done.stdout, done.stderr)

    def stop(self) -> None:
        """End everything of it, whatever state it is in: containers, processes, mounts."""
        for container in self._made:
            with contextlib.suppress(HostError, subprocess.TimeoutExpired):
                self.remove(container)
        self._made.clear()
        if self._daemon is not None:
            self._daemon.send_signal(signal.SIGTERM)
            try:
                self._daemon.wait(_STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._daemon.kill()
                self._daemon.wait()
        for directory in {self.disk, self.memory}:
            kill_all(processes_of(f"{directory}/"))
            unmount_below(directory)

    def _serve(self, argv: Sequence[str], answers: Callable[[], bool]) -> None:
        """Start the engine's daemon and wait until `answers`; end it, and raise HostError, when that does not come."""
        log = self.disk / "log"
        with log.open("wb") as output:
            self._daemon = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment
            )
        deadline = time.monotonic() + _READY_TIMEOUT
        while not answers():
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                code = self._daemon.poll()
                raise HostError(
                    f"{self.name} does not come up (exit code {code}): "
                    + log.read_text(errors="replace").strip()[-500:]
                )
            time.sleep(_POLL)  # engines differ in how they say that they are ready, if they do

    @property
    def pid(self) -> int:
        """The pid of its daemon. HostError without one."""
        if self._daemon is None:
            raise HostError(f"{self.name} has no daemon")
        return self._daemon.pid

    def _remember(self, container: str) -> str:
        self._made.append(container)
        return container

    def _program_answers(self, *arguments: str) -> bool:
        """Whether the engine's own program succeeds with these arguments."""
        try:
            self.command(*arguments)
        except HostError:
            return False
        return True


class _DockerLike(Engine):
    """The command line that docker and podman share."""

    def run(self, options: RunOptions = RunOptions()) -> str:
        """See Engine."""
        name = options.name or f"eg-{secrets.token_hex(6)}"
        try:
            self.command("run", "--detach", "--network=none", f"--name={name}", *self._run_flags(options), IMAGE,
                         *options.command)  # fmt: skip
            return self._remember(self.command("container", "inspect", "--format={{.Id}}", name))
        except HostError:
            self.remove(name)
            raise

    def exec_argv(self, container: str, command: Sequence[str], options: ExecOptions) -> list[str]:
        """See Engine."""
        flags = [f"--env={entry}" for entry in options.env]
        flags += _given(user=options.user, workdir=options.workdir)
        flags += ["--privileged"] if options.privileged else []
        flags += ["--interactive", "--tty"] if options.tty else []
        return self.argv("exec", *flags, container, *command)

    def pause(self, container: str) -> None:
        """Freeze every process of a container."""
        self.command("pause", container)

    def unpause(self, container: str) -> None:
        """Undo `pause`."""
        self.command("unpause", container)

    def rename(self, container: str, name: str) -> None:
        """Give a container another name."""
        self.command("rename", container, name)

    def restart(self, container: str) -> None:
        """End a container and start it again: the same id, another init process."""
        self.command("restart", "--time=10", container)

    def end(self, container: str) -> None:
        """End a container, and return once it has ended; it can be started again."""
        self.command("stop", "--time=10", container)

    def remove(self, container: str) -> None:
        """See Engine."""
        with contextlib.suppress(HostError):  # it is gone
            self.command("rm", "--force", container)

    def _run_flags(self, options: RunOptions) -> list[str]:
        flags = [f"--env={name}={value}" for name, value in options.env.items()]
        flags += [f"--label={name}={value}" for name, value in options.labels.items()]
        lists = {
            "ulimit": options.ulimits,
            "cap-add": options.cap_add,
            "cap-drop": options.cap_drop,
            "group-add": options.group_add,
            "security-opt": options.security_opt,
        }
        flags += [f"--{name}={value}" for name, values in lists.items() for value in values]
        flags += _given(user=options.user, workdir=options.workdir, hostname=options.hostname, runtime=options.runtime)
        flags += [] if options.stop_timeout is None else [f"--stop-timeout={options.stop_timeout}"]
        switches = {"tty": options.tty, "privileged": options.privileged, "read-only": options.read_only}
        return flags + [f"--{name}" for name, on in switches.items() if on]


class Docker(_DockerLike):
    """dockerd, with the containerd that it starts itself; `runtimes` are programs by name, beside its runc.

    `program` is another dockerd than the host's; it takes the docker, the containerd and the shim of its own
    directory, where there are any.
    """

    name = "docker"

    def __init__(
        self,
        disk: Path,
        memory: Path | None = None,
        runtimes: Mapping[str, Path] | None = None,
        program: Path | None = None,
    ) -> None:
        super().__init__(disk, memory)
        self._program = program
        # "runc" is dockerd's own name for the runc on the PATH, and cannot be given away.
        self._runtimes = {name: path for name, path in (runtimes or {}).items() if name != "runc"}

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self.memory / "sock"

    @property
    def data_root(self) -> Path:
        """Its --data-root: containers/ID/config.v2.json."""
        return self.disk / "data"

    @property
    def exec_root(self) -> Path:
        """Its --exec-root: the runtimes' states, and its containerd's bundles."""
        return self.memory / "exec"

    @property
    def environment(self) -> dict[str, str]:
        """See Engine."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")}
        kept |= {"DOCKER_HOST": f"unix://{self.socket}", "DOCKER_CONFIG": str(self.disk / "client")}
        # Version 29.0 refuses what Debian 12's clients speak, unless it is told otherwise (moby/moby#51186).
        kept["DOCKER_MIN_API_VERSION"] = "1.41"
        if self._program is not None:
            kept["PATH"] = f"{self._program.parent}:{kept.get('PATH', os.defpath)}"
        return kept

    def argv(self, *arguments: str) -> list[str]:
        """See Engine."""
        own = self._program.with_name("docker") if self._program is not None else None
        return [str(own if own is not None and own.exists() else find_program("docker")), *arguments]

    def start(self) -> None:
        """See Engine."""
        configuration = self.disk / "daemon.json"
        configuration.write_text("{}\n")
        program = self._program or find_program("dockerd")
        argv = [str(program), f"--host=unix://{self.socket}", f"--config-file={configuration}"]
        argv += [f"--data-root={self.data_root}", f"--exec-root={self.exec_root}", f"--pidfile={self.memory / 'pid'}"]
        argv += ["--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=vfs"]
        argv += [f"--add-runtime={name}={path}" for name, path in self._runtimes.items()]
        self._serve(argv, lambda: _pings(self.socket))
        with root_archive(self.disk) as archive:
            self.command("import", str(archive), IMAGE)


class Podman(_DockerLike):
    """podman: no daemon. `runtimes` are programs by name, the first one is the default.

    With `cgroups` off its containers get none of their own: crun in a cgroup2 view can set no device filter.
    `program` is another podman than the host's.
    """

    name = "podman"

    def __init__(
        self,
        disk: Path,
        memory: Path | None = None,
        runtimes: Mapping[str, Path] | None = None,
        *,
        cgroups: bool = True,
        serve: bool = False,
        program: Path | None = None,
    ) -> None:
        """With `serve`, `podman system service` listens on `socket` as well."""
        super().__init__(disk, memory)
        self.runtimes = dict(runtimes or {"runc": find_program("runc")})
        """The programs of the runtimes by name."""
        self._cgroups = cgroups
        self._with_service = serve
        self._program = program

    @property
    def socket(self) -> Path:
        """Where its service listens, if there is one."""
        return self.memory / "sock"

    @property
    def containers_conf(self) -> Path:
        """Its containers.conf."""
        return self.disk / "containers.conf"

    @property
    def storage_conf(self) -> Path:
        """Its storage.conf."""
        return self.disk / "storage.conf"

    @property
    def graph_root(self) -> Path:
        """Where images, layers and bundles are: DRIVER-containers/containers.json."""
        return self.disk / "graph"

    @property
    def run_root(self) -> Path:
        """Where running containers have their files."""
        return self.memory / "run"

    @property
    def environment(self) -> dict[str, str]:
        """See Engine."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("CONTAINER", "XDG_"))}
        own = {"CONTAINERS_CONF": self.containers_conf, "CONTAINERS_STORAGE_CONF": self.storage_conf}
        return kept | {name: str(path) for name, path in own.items()}

    def argv(self, *arguments: str) -> list[str]:
        """See Engine."""
        return [str(self._program or find_program("podman")), *arguments]

    def start(self) -> None:
        """See Engine."""
        self.containers_conf.write_text(self._configuration())
        self.storage_conf.write_text(
            f'[storage]\ndriver = "vfs"\ngraphroot = "{self.graph_root}"\nrunroot = "{self.run_root}"\n'
        )
        if self._with_service:
            argv = self.argv("system", "service", "--time=0", f"unix://{self.socket}")
            self._serve(argv, lambda: _pings(self.socket))
        with root_archive(self.disk) as archive:
            self.command("import", "--quiet", str(archive), IMAGE)

    def _run_flags(self, options: RunOptions) -> list[str]:
        flags = super()._run_flags(options)
        given = {limit.partition("=")[0] for limit in options.ulimits}
        # One limit of the user's, and podman takes its own default for the others instead of the configured one
        # (pkg/specgen/generate/oci_linux.go, addRlimits).
        return flags + [f"--ulimit={n}={v}" for n, v in _podman_limits().items() if given and n not in given]

    def _configuration(self) -> str:
        limits = json.dumps([f"{name}={value}" for name, value in _podman_limits().items()])
        programs = "\n".join(f'{name} = ["{path}"]' for name, path in self.runtimes.items())
        return f"""\
[containers]
# Podman's own limits are higher than a process without CAP_SYS_RESOURCE can give.
default_ulimits = {limits}
{"" if self._cgroups else 'cgroups = "disabled"'}
[engine]
runtime = "{next(iter(self.runtimes))}"
cgroup_manager = "cgroupfs"
events_logger = "none"
# The default, shared memory, is one for all of the machine's podman, and a fresh tmp_dir resets it.
lock_type = "file"
tmp_dir = "{self.memory / "tmp"}"
[engine.runtimes]
{programs}
"""


class Containerd(Engine):
    """containerd with `ctr`, in a namespace of its own choice."""

    name = "containerd"
    namespace = "default"

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self.memory / "sock"

    @property
    def root(self) -> Path:
        """Its `root`: images, snapshots, metadata."""
        return self.disk / "root"

    @property
    def state(self) -> Path:
        """Its `state`: io.containerd.runtime.v2.task/NAMESPACE/ID are the bundles."""
        return self.memory / "state"

    @property
    def runc_root(self) -> Path:
        """Where runc keeps its states, NAMESPACE/ID/state.json."""
        return self.memory / "runc"

    @property
    def environment(self) -> dict[str, str]:
        """See Engine."""
        return os.environ | {"TMPDIR": str(self._temporary), "CONTAINERD_NAMESPACE": self.namespace}

    def argv(self, *arguments: str) -> list[str]:
        """See Engine."""
        return [str(find_program("ctr")), f"--address={self.socket}", *arguments]

    def start(self) -> None:
        """See Engine."""
        self._temporary.mkdir()
        configuration = self.disk / "config.toml"
        configuration.write_text(f"""\
version = 2
root = "{self.root}"
state = "{self.state}"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = "{self.socket}"
[ttrpc]
address = "{self.socket}.ttrpc"
""")
        argv = [str(find_program("containerd")), f"--config={configuration}"]
        self._serve(argv, lambda: self._program_answers("version"))
        self._import(IMAGE, user="")

    def run(self, options: RunOptions = RunOptions()) -> str:
        """See Engine. ctr knows no name but the id, and no ulimits, groups or stop timeout."""
        name = options.name or f"eg-{secrets.token_hex(6)}"
        image = IMAGE
        if options.user:  # ctr takes the user from the image alone
            image = f"localhost/{secrets.token_hex(6)}:1"
            self._import(image, user=options.user)
        try:
            argv = self.argv("run", "--detach", *self._run_flags(options), image, name, *options.command)
            self._start_task(argv, options)
        except HostError:
            self.remove(name)
            raise
        return self._remember(name)

    def exec_argv(self, container: str, command: Sequence[str], options: ExecOptions) -> list[str]:
        """See Engine."""
        if options.env or options.privileged:
            raise HostError("ctr task exec has no option for the environment and none for privileges")
        flags = [f"--exec-id={secrets.token_hex(8)}", f"--fifo-dir={self._temporary}"]
        flags += _given(user=options.user, cwd=options.workdir)
        flags += ["--tty"] if options.tty else []
        return self.argv("task", "exec", *flags, container, *command)

    def pause(self, container: str) -> None:
        """Freeze every process of a container."""
        self.command("task", "pause", container)

    def unpause(self, container: str) -> None:
        """Undo `pause`."""
        self.command("task", "resume", container)

    def end(self, container: str) -> None:
        """End a container's task, which is then stopped and still there, and return once it has ended."""
        self.command("task", "kill", "--signal=SIGKILL", container)
        deadline = time.monotonic() + _STOP_TIMEOUT
        while "RUNNING" in next(line for line in self.command("task", "ls").splitlines() if container in line):
            if time.monotonic() > deadline:
                raise HostError(f"the task {container} does not end")
            time.sleep(_POLL)

    def restart(self, container: str) -> None:
        """End a container's task and start another one: the same id, another init process."""
        self.command("task", "delete", "--force", container)
        self.command("task", "start", "--detach", f"--fifo-dir={self._temporary}", container)

    def remove(self, container: str) -> None:
        """See Engine."""
        for words in (("task", "delete", "--force"), ("container", "delete")):
            with contextlib.suppress(HostError):
                self.command(*words, container)

    @property
    def _temporary(self) -> Path:
        return self.disk / "tmp"

    def _start_task(self, argv: Sequence[str], options: RunOptions) -> None:
        if not options.tty:
            self.command(*argv[2:])
            return
        # For a terminal in the container, ctr must have one itself.
        with Terminal(argv, self.environment) as terminal:
            if code := terminal.wait(timeout=_COMMAND_TIMEOUT):
                raise HostError(f"ctr run: exit code {code}: {terminal.shown}")

    def _run_flags(self, options: RunOptions) -> list[str]:
        if options.ulimits or options.group_add or options.hostname or options.runtime:
            raise HostError("ctr run has no option for ulimits, groups, the host name or another runtime's name")
        flags = [f"--runc-root={self.runc_root}", f"--fifo-dir={self._temporary}", "--snapshotter=native"]
        flags += [f"--env={name}={value}" for name, value in options.env.items()]
        flags += [f"--label={name}={value}" for name, value in options.labels.items()]
        flags += [f"--cap-add=CAP_{name}" for name in options.cap_add]
        flags += [f"--cap-drop=CAP_{name}" for name in options.cap_drop]
        flags += _given(cwd=options.workdir)
        switches = {
            "seccomp": "seccomp=unconfined" not in options.security_opt and not options.privileged,
            "allow-new-privs": "no-new-privileges" not in options.security_opt and not options.privileged,
            "tty": options.tty,
            "privileged": options.privileged,
            "read-only": options.read_only,
        }
        return flags + [f"--{name}" for name, on in switches.items() if on]

    def _import(self, image: str, *, user: str) -> None:
        archive = self._temporary / "image.tar"
        with root_archive(self.disk) as layer:
            write_oci_archive(archive, layer.read_bytes(), image, {"User": user, "Env": [f"PATH={IMAGE_PATH}"]})
        self.command("images", "import", "--snapshotter=native", str(archive))
        archive.unlink()


@contextlib.contextmanager
def docker_engine(directory: Path, *, runtimes: Mapping[str, Path] | None = None) -> Iterator[Docker]:
    """Run dockerd below `directory`, which is created; takes what `Docker` takes."""
    with running(Docker(_made(directory), runtimes=runtimes)) as engine:
        yield engine


@contextlib.contextmanager
def podman_engine(
    directory: Path, *, runtimes: Mapping[str, Path] | None = None, cgroups: bool = True
) -> Iterator[Podman]:
    """Have podman below `directory`, which is created; takes what `Podman` takes."""
    with running(Podman(_made(directory), runtimes=runtimes, cgroups=cgroups)) as engine:
        yield engine


@contextlib.contextmanager
def containerd_engine(directory: Path) -> Iterator[Containerd]:
    """Run containerd below `directory`, which is created."""
    with running(Containerd(_made(directory))) as engine:
        yield engine


@contextlib.contextmanager
def root_archive(directory: Path) -> Iterator[Path]:
    """Yield a tar file of the root file system of `support.rootfs`, in a temporary directory below `directory`."""
    with tempfile.TemporaryDirectory(dir=directory) as name:
        rootfs, archive = build_rootfs(Path(name) / "rootfs"), Path(name) / "root.tar"
        with tarfile.open(archive, mode="w") as tar:
            tar.add(rootfs, arcname=".")
        yield archive


def write_oci_archive(path: Path, layer: bytes, name: str, config: Mapping[str, object]) -> None:
    """Write an image of one layer, a tar, as an OCI archive (image-layout.md); `config` is the image's own."""
    with tarfile.open(path, mode="w") as archive:

        def add(member: str, data: bytes) -> None:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

        def add_blob(kind: str, data: bytes) -> dict[str, object]:
            digest = hashlib.sha256(data).hexdigest()
            add(f"blobs/sha256/{digest}", data)
            return {
                "mediaType": f"application/vnd.oci.image.{kind}",
                "digest": f"sha256:{digest}",
                "size": len(data),
            }

        root = add_blob("layer.v1.tar", layer)
        image = {
            "architecture": _architecture(),
            "os": "linux",
            "config": dict(config),
            "rootfs": {"type": "layers", "diff_ids": [root["digest"]]},
        }
        configuration = add_blob("config.v1+json", _json(image))
        manifest = add_blob("manifest.v1+json", _json({"schemaVersion": 2, "config": configuration, "layers": [root]}))
        manifest["annotations"] = {"io.containerd.image.name": name}
        add("index.json", _json({"schemaVersion": 2, "manifests": [manifest]}))
        add("oci-layout", _json({"imageLayoutVersion": "1.0.0"}))


def unmount_below(directory: Path) -> None:
    """Unmount whatever an engine left mounted, the innermost first."""
    prefix = os.fspath(directory.resolve()) + "/"
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in sorted((point for point in points if point.startswith(prefix)), reverse=True):
        run_program(["umount", "--lazy", point])


def plain_newlines(text: str) -> str:
    """Undo what one terminal, or two, make of a newline."""
    return text.replace("\r", "")


_E = TypeVar("_E", bound=Engine)


@contextlib.contextmanager
def running(engine: _E) -> Iterator[_E]:
    """Start an engine, and stop it at the end, or when it does not come up."""
    try:
        engine.start()
        yield engine
    finally:
        engine.stop()


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory


def _given(**flags: str) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items() if value]


def _pings(socket: Path) -> bool:
    try:
        return RawApi(socket).call("GET", "/_ping").status == 200
    except (OSError, AssertionError):
        return False


def _podman_limits() -> dict[str, str]:
    # podman lowers its own limit to pid_max first.
    most = int(Path("/proc/sys/kernel/pid_max").read_text())
    own = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    processes = most if own == resource.RLIM_INFINITY else min(own, most)
    return {"nofile": "1024:1024", "nproc": f"{processes}:{processes}"}


def _architecture() -> str:
    """Return this machine as images name it."""
    machine = os.uname().machine
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
