"""The demo: a container under each runtime, a running service, and one exec through each client.

`demo.py start` builds everything below .demo, ending what an earlier start left; `demo.py stop` ends it all.
"""

import argparse
import contextlib
import hashlib
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from support.errors import HostError
from support.runtimes import RuntimeHost, crun_host, runc_host
from support.service import Service, execgate_program, fits_sockets

PROJECT = Path(__file__).resolve().parent.parent
HOME = PROJECT / ".demo"
HOSTS = {"demo": ("runc", runc_host), "demo-crun": ("crun", crun_host)}
STOP_TIMEOUT = 10.0

DOCKER_PY = """\
import docker
client = docker.DockerClient(base_url="{host}")
for container in client.containers.list():
    print(container.name, container.status, container.exec_run(["id", "-un"], user="app"))
"""


def main() -> int:
    """Run `start` or `stop`; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("start", "stop"))
    action = parser.parse_args().action
    if os.geteuid() != 0:
        print("demo: containers of runc and crun need root: run 'sudo make demo'", file=sys.stderr)
        return 1
    try:
        start() if action == "start" else stop()
    except HostError as error:
        print(f"demo: {error}\n'make demo-stop' removes what is there so far.", file=sys.stderr)
        return 1
    return 0


def start() -> None:
    """Build, start and show everything."""
    stop()
    hosts = start_containers()
    service = start_service(hosts)
    show_curl(service)
    show_docker_py(service)
    show_docker_cli(service, [name for name, (runtime, _) in HOSTS.items() if runtime in hosts])
    say_farewell(service)


def stop() -> None:
    """End the service, delete the containers, remove the files; silent when there is nothing."""
    stop_service()
    for runtime, make in HOSTS.values():
        if (HOME / runtime).exists():
            make(HOME / runtime).close()
    for directory in (service_directory(), HOME):
        if directory.exists():
            shutil.rmtree(directory)


def start_containers() -> dict[str, RuntimeHost]:
    """Start a container under each runtime that runs here; return the runtimes by name."""
    hosts = {}
    for name, (runtime, make) in HOSTS.items():
        try:
            hosts[runtime] = make(HOME / runtime)
        except HostError as error:
            if runtime == "runc":
                raise
            heading(f"no container {name}: {error}")
            continue
        hosts[runtime].run(name, annotations={"org.example.purpose": "execgate demo"})
        heading(f"container {name} runs under {runtime}")
    return hosts


def start_service(hosts: dict[str, RuntimeHost]) -> Service:
    """Start the service in the background and leave its pid behind."""
    directory = service_directory()
    if directory != HOME:
        heading(f"the path of this clone is too long for a unix socket; the service works in {directory}")
    service = Service.start(directory, list(hosts.values()), own_session=True)
    pid_file().write_text(f"{service.pid}\n")
    heading(f"the service runs: pid {service.pid}, log {shown(directory / 'service.log')}")
    print(f"$ {shlex.join(shown(part) for part in service.argv)}")
    return service


def stop_service() -> None:
    """End the service that the pid file names, if that process still is ours."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
        pid = int(pid_file().read_text())
        pidfd = os.pidfd_open(pid)
        try:
            # The file may be older than the last reboot: ask who has that pid today.
            if os.fsencode(service_directory()) in Path(f"/proc/{pid}/cmdline").read_bytes():
                end(pidfd)
        finally:
            os.close(pidfd)


def end(pidfd: int) -> None:
    """SIGTERM, and SIGKILL to what does not hear it."""
    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    if not select.select([pidfd], [], [], STOP_TIMEOUT)[0]:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [])


def show_curl(service: Service) -> None:
    """Create and start an exec with two requests."""
    heading("curl")
    create = {"Tty": True, "AttachStdout": True, "Cmd": ["echo", "hello from curl"]}
    answer = show(curl(service, "/containers/demo/exec", create))
    show(curl(service, f"/exec/{json.loads(answer)['Id']}/start", {"Tty": True}))


def curl(service: Service, path: str, body: dict[str, object]) -> list[str]:
    """The command line of one POST."""
    header = ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    return ["curl", "-sS", "--unix-socket", str(service.socket), *header, f"http://localhost{path}"]


def show_docker_py(service: Service) -> None:
    """Run a command as another user in every container."""
    heading("docker-py")
    show([sys.executable, "-c", DOCKER_PY.format(host=service.host)])


def show_docker_cli(service: Service, containers: Sequence[str]) -> None:
    """Run a command in every container."""
    heading("the docker CLI")
    for name in containers:
        show(["docker", "-H", service.host, "exec", name, "sh", "-c", "echo hello from $(hostname)"])


def say_farewell(service: Service) -> None:
    """Say what to type next."""
    heading("now you")
    config = f"--config {shown(service.directory / 'execgate.toml')}"
    lines = {
        f"docker -H {service.host} exec -it demo sh": "a shell in the container",
        f"{shown(execgate_program())} containers {config}": "what the service sees",
        f"{shown(execgate_program())} sessions {config}": "what ran",
        "make demo-stop": "end it all",
    }
    width = max(map(len, lines))
    for line, meaning in lines.items():
        print(f"  {line:<{width}}   # {meaning}")


def show(argv: Sequence[str]) -> str:
    """Print a command as one would type it, run it, print and return its output; HostError when it fails."""
    print(f"$ {shlex.join(shown(part) for part in argv)}", flush=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")}
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=env, check=False)
    print(done.stdout.rstrip(), flush=True)
    if done.returncode != 0:
        raise HostError(f"{argv[0]} ended with {done.returncode}; {service_directory()}/service.log may say why")
    return done.stdout


def heading(text: str) -> None:
    """Print a line that stands out on a terminal."""
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n{bold}# {text}{plain}")


def shown(path: object) -> str:
    """A path of this clone as one types it from its top."""
    return str(path).removeprefix(f"{PROJECT}/")


def service_directory() -> Path:
    """Where the service works: .demo, or a short path when this clone lies too deep for a unix socket."""
    if fits_sockets(HOME):
        return HOME
    return Path("/run") / f"execgate-demo-{hashlib.sha256(os.fsencode(HOME)).hexdigest()[:8]}"


def pid_file() -> Path:
    """Where the service's pid is kept."""
    return service_directory() / "service.pid"


if __name__ == "__main__":
    sys.exit(main())
