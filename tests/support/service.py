"""The real `execgate serve` as a child process, from READY=1 to a clean end on SIGTERM."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from execgate.runtime.directory import longest_state_dir
from execgate.status import read_status
from support.errors import HostError
from support.notify import NotifySocket
from support.processes import children
from support.runtimes import RuntimeHost

READY_TIMEOUT = 20.0
STOP_TIMEOUT = 10.0  # seconds; the promise is "within seconds", and CI machines are slow

_SOCKET_NAME = "execgate.sock"
_STATE_NAME = "state"

POLICY = "policy.toml"
"""A policy, in the directory of a service that shall have one."""

TOKENS = "tokens"
"""The bearer tokens, in the directory of a service."""

# The path of a unix socket has 107 bytes (unix(7)), and conmon makes one below a session's own directory.
_DIRECTORY_MAX = longest_state_dir() - len(f"/{_STATE_NAME}")

# What must never be in the log of a service that did its work.
_SIGNS_OF_A_BUG = (
    "Traceback (most recent call last)",
    "was never retrieved",
    "was never awaited",
    "Task was destroyed",
)


@dataclass(slots=True)
class Service:
    """One running service.

    `directory` holds its socket, its state directory and its log, and can be handed to `start` again: what
    lives on in it is what would live on on a host.
    """

    directory: Path
    process: "subprocess.Popen[bytes]"
    argv: Sequence[str]
    _notify: NotifySocket

    @classmethod
    def start(
        cls,
        directory: Path,
        hosts: Sequence[RuntimeHost],
        *,
        flags: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        event_loop: str = "auto",
        own_session: bool = False,
        wrapper: Sequence[str] = (),
    ) -> "Service":
        """Start the service on `directory/execgate.sock` for the containers of `hosts`; return once ready.

        Its configuration is `directory/execgate.toml`, which `flags` and `env` override; `env` is added to a clean
        environment. `event_loop` is what EXECGATE_EVENT_LOOP takes: auto, asyncio or uvloop. With `own_session` it
        outlives the terminal. `wrapper` is a command that ends in an exec of the command line behind it.

        Raises HostError with the end of its log when it does not come up.
        """
        directory.mkdir(parents=True, exist_ok=True)
        config = write_config(directory, hosts, policy=(directory / POLICY).exists())
        argv = [*wrapper, str(execgate_program()), "serve", "--config", str(config), *flags]
        notify = NotifySocket(directory / "notify")
        with (directory / "service.log").open("ab") as log:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(event_loop, notify.path) | dict(env or {}),
                start_new_session=own_session,
            )
        service = cls(directory, process, argv, notify)
        try:
            notify.wait_for("READY=1", process, timeout=READY_TIMEOUT)
        except HostError as error:
            service.kill()
            raise HostError(f"execgate serve: {error}\n{service.log()[-4000:]}") from error
        except BaseException:
            service.kill()
            raise
        return service

    @property
    def socket(self) -> Path:
        """The unix socket it listens on."""
        return self.directory / _SOCKET_NAME

    @property
    def host(self) -> str:
        """What DOCKER_HOST takes."""
        return f"unix://{self.socket}"

    @property
    def state_dir(self) -> Path:
        """Its --state-dir."""
        return self.directory / _STATE_NAME

    @property
    def pid(self) -> int:
        """The pid of the worker that serves."""
        status = read_status(self.state_dir)
        assert status is not None, "it has never served"
        return status.worker.pid

    @property
    def keeper(self) -> int:
        """The pid of its keeper."""
        return self.process.pid

    def log(self) -> str:
        """Everything it has logged so far, and what earlier services on the same directory logged."""
        return (self.directory / "service.log").read_text(errors="replace")

    def stop(self) -> None:
        """End it with SIGTERM, and hold it to its promises.

        It ends within STOP_TIMEOUT seconds, with exit code 0, leaves no socket file, and has logged no
        traceback; anything else is an AssertionError with the log.
        """
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"did not end within {STOP_TIMEOUT:g} s\n{self.log()}") from None
        finally:
            self._notify.close()
        assert code == 0, f"ended with {code}\n{self.log()}"
        assert not self.socket.exists(), "left its socket file behind"
        self.assert_clean_log()

    def assert_clean_log(self) -> None:
        """Fail with the log when it shows a traceback, or a task or coroutine that nobody awaited."""
        log = self.log()
        for sign in _SIGNS_OF_A_BUG:
            assert sign not in log, f"the service logged {sign!r}:\n{log}"

    def kill(self) -> None:
        """End all of it with SIGKILL, the keeper included, as a crash would; harmless when it has ended.

        The keeper first, or it would replace the worker.
        """
        workers = [os.pidfd_open(pid) for pid in children(self.keeper)] if self.process.poll() is None else []
        self.process.kill()
        self.process.wait()
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(worker, signal.SIGKILL)
            select.select([worker], [], [])
            os.close(worker)
        self._notify.close()

    def crash(self) -> None:
        """End its worker with SIGKILL, and return when another one serves."""
        os.kill(self.pid, signal.SIGKILL)
        self.await_ready()

    def reload(self) -> None:
        """Have it replaced by SIGHUP, and return when the next one serves."""
        self.process.send_signal(signal.SIGHUP)
        self.await_ready()

    def await_ready(self) -> None:
        """Return when the keeper says once more that a worker serves."""
        self._notify.wait_for("READY=1", self.process, timeout=READY_TIMEOUT)


def execgate_program() -> Path:
    """The console script that belongs to this Python."""
    program = Path(sys.executable).with_name("execgate")
    if not program.exists():
        raise HostError(f"no {program}: install the project into this virtual environment (`make .venv`)")
    return program


def fits_sockets(directory: Path) -> bool:
    """Whether the paths of a service's sockets below `directory` are short enough for the kernel."""
    return len(os.fsencode(directory)) <= _DIRECTORY_MAX


def write_config(directory: Path, hosts: Sequence[RuntimeHost], *, policy: bool = False) -> Path:
    """Write the configuration of a service that has all its files in `directory`, and return its path.

    With `policy` it has the one that is in the directory; without, who starts it may do everything.
    """
    if not fits_sockets(directory):
        raise HostError(f"{directory}: longer than the {_DIRECTORY_MAX} bytes that leave room for a unix socket")
    # A JSON string is a TOML string.
    lines = [
        *([f"policy = {json.dumps(str(directory / POLICY))}"] if policy else []),
        f"listen = [{json.dumps(f'unix://{directory / _SOCKET_NAME}')}]",
        f"state_dir = {json.dumps(str(directory / _STATE_NAME))}",
        f"tokens = {json.dumps(str(directory / TOKENS))}",
        f"runtime_roots = {json.dumps([f'{host.name}={host.root}' for host in hosts])}",
        'engines = ["oci"]',
        *("" if policy else "allow_privileged = true\nallow_host_equivalent = true").splitlines(),
        "[runtimes]",
        *(f"{host.name} = {json.dumps(str(host.program))}" for host in hosts),
    ]
    path = directory / "execgate.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def _environment(event_loop: str, notify: Path) -> dict[str, str]:
    """What the service gets: nothing of the caller's but what a unit file would give it."""
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "EXECGATE_EVENT_LOOP": event_loop,
        "NOTIFY_SOCKET": str(notify),
        # A mistake that Python notices (an unclosed file, a coroutine nobody awaited) must reach the log.
        "PYTHONWARNINGS": "default",
        "PYTHONUNBUFFERED": "1",
    }
