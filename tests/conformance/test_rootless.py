"""Rootless: execgate as an ordinary user, beside the `podman exec` of that user, in the same container.

Each test has the containers of both runtimes, if this machine runs them; pytest prints why one is skipped.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from execgate import Client, Conflict, ConsoleSize, NotFound, OnDisconnect, Output, SessionState
from execgate.model.options import ExecOptions
from support.access import EVERYTHING, rule
from support.errors import HostError
from support.leaks import assert_no_leaks, footprint
from support.rootless import RootlessUser
from support.runtimes import pid_namespace, processes_within
from support.service import Service

RUNTIMES = ("runc", "crun")


@dataclass(frozen=True, slots=True)
class RootlessContainer:
    """A container of the user's Podman. `init` is the pid of its first process on the host."""

    id: str
    init: int


@pytest.fixture(scope="module")
def user() -> Iterator[RootlessUser]:
    try:
        user = RootlessUser.create()
    except HostError as error:
        pytest.skip(f"no rootless Podman here: {error}")
    yield user
    user.close()


@pytest.fixture(scope="module")
def token(user: RootlessUser) -> str:
    """What the tests show a service of the user: root, who runs them, is nobody in the user's namespace."""
    user.allow(rule("all", ["token:tests"], **EVERYTHING))
    return user.execgate("token", "create", "tests").strip()


@pytest.fixture(scope="module")
def service(user: RootlessUser, token: str) -> Iterator[Service]:
    """The service of the user: it must stop as promised, with a clean log."""
    service = user.start_service(RUNTIMES)
    yield service
    service.stop()


@pytest.fixture(scope="module", params=RUNTIMES)
def container(request: pytest.FixtureRequest, user: RootlessUser) -> RootlessContainer:
    try:
        container_id = user.run_container(request.param)
    except HostError as error:
        pytest.skip(f"{request.param} cannot run rootless here: {error}")
    return RootlessContainer(container_id, int(user.podman("inspect", "--format={{.State.Pid}}", container_id)))


@pytest.fixture
async def client(service: Service, token: str) -> AsyncIterator[Client]:
    async with Client(service.host, token=token) as client:
        before = footprint(service)
        yield client
    await asyncio.to_thread(assert_no_leaks, service, before)


def namespace(pid: int | str, kind: str) -> Path:
    return Path(f"/proc/{pid}/ns/{kind}").readlink()


async def test_the_service_lives_where_podman_does(
    client: Client, service: Service, user: RootlessUser, container: RootlessContainer
) -> None:
    for kind in ("user", "mnt"):
        theirs = Path(user.podman("unshare", "readlink", f"/proc/self/ns/{kind}").strip())
        assert namespace(service.pid, kind) == theirs != namespace("self", kind)
    assert namespace(service.pid, "user") == namespace(container.init, "user")
    assert os.stat(f"/proc/{service.pid}").st_uid == user.uid
    assert Path(f"/proc/{service.pid}/cwd").readlink() == user.home
    assert service.socket.stat().st_uid == user.uid
    (found,) = [one for one in await client.containers() if one.id == container.id]
    assert (found.state, found.pid) == ("running", container.init)


async def test_without_a_policy_the_service_is_the_users_alone(
    user: RootlessUser, container: RootlessContainer, token: str
) -> None:
    """Root can connect, and in the user's namespace is one of those who have no number there: it sees nothing."""
    with user.without_policy():
        async with running(user) as service, Client(service.host) as roots, Client(service.host, token=token) as known:
            assert user.execgate("exec", "--host", service.host, container.id, "id", "-u") == "0\n"
            for client in (roots, known):
                assert await client.containers() == []
                with pytest.raises(NotFound):
                    await client.create(container.id, ["true"])
            service.stop()


PROBES = {
    "who": "id -u; id -g; id -un",
    "where": "pwd",
    "privileges": "grep -E '^(Uid|Gid|Cap...|NoNewPrivs|Seccomp|Seccomp_filters):' /proc/self/status",
    "label": "cat /proc/self/attr/current 2>/dev/null",
    "maps": "cat /proc/self/uid_map /proc/self/gid_map /proc/self/setgroups",
    "limits": "ulimit -a; umask; cat /proc/self/oom_score_adj",
    "cgroup": "cat /proc/self/cgroup",
    "namespaces": "for kind in cgroup ipc mnt net pid user uts; do readlink /proc/self/ns/$kind; done",
    "files": "cd /tmp && touch written && stat -c '%u %g %a' written && rm written; ls /dev | sort",
}
SCRIPT = "\n".join(f"echo == {name}; {script}" for name, script in PROBES.items()) + "\nexit 3"
USERS: dict[str, tuple[list[str], ExecOptions]] = {
    "of the container": ([], {}),
    "root": (["--user=0"], {"user": "0"}),
    "name": (["--user=app"], {"user": "app"}),
    "group": (["--user=app:extra"], {"user": "app:extra"}),
    "number": (["--user=4321:4321"], {"user": "4321:4321"}),
    "privileged": (["--privileged"], {"privileged": True}),
    "privileged app": (["--privileged", "--user=app"], {"privileged": True, "user": "app"}),
    "elsewhere": (["--workdir=/var/tmp"], {"working_dir": "/var/tmp"}),
}


@pytest.mark.parametrize("who", USERS)
async def test_what_podman_exec_gives(
    client: Client, user: RootlessUser, container: RootlessContainer, who: str
) -> None:
    flags, options = USERS[who]
    theirs = user.podman_exec(*flags, container.id, "sh", "-c", SCRIPT)
    ours = await client.run(container.id, ["sh", "-c", SCRIPT], **options)
    assert ours.stdout.decode().splitlines() == theirs.stdout.splitlines()
    assert ours.exit_code == theirs.returncode == 3, theirs.stderr


@pytest.mark.parametrize("who", USERS)
async def test_groups(client: Client, user: RootlessUser, container: RootlessContainer, who: str) -> None:
    """As podman's, and the primary group in any case; podman 4.3 leaves it out (CVE-2022-2989)."""
    flags, options = USERS[who]
    script = "grep -E '^(Gid|Groups):' /proc/self/status"
    theirs = user.podman_exec(*flags, container.id, "sh", "-c", script).stdout.split()
    ours = (await client.run(container.id, ["sh", "-c", script], **options)).stdout.decode().split()
    primary, given = theirs[1], set(theirs[6:])
    assert (ours[:6], set(ours[6:]) | {primary}) == (theirs[:6], given | {primary})
    assert primary in ours[6:] or not options.get("user")


@pytest.mark.parametrize("who", USERS)
async def test_environment(client: Client, user: RootlessUser, container: RootlessContainer, who: str) -> None:
    flags, options = USERS[who]
    theirs = user.podman_exec(*flags, "--env=GIVEN=1", container.id, "env").stdout
    given: ExecOptions = {**options, "env": ["GIVEN=1"]}
    ours = (await client.run(container.id, ["env"], **given)).stdout.decode()
    # An empty HOME, which podman gives a number without a passwd line, becomes `/` under runc, and stays under crun.
    assert set(ours.splitlines()) == set(theirs.replace("HOME=\n", "HOME=/\n").splitlines())


@pytest.mark.parametrize(("argv", "code"), [(["sh", "-c", "exit 7"], 7), (["nosuch"], 127), (["/etc/passwd"], 126)])
async def test_exit_codes(
    client: Client, user: RootlessUser, container: RootlessContainer, argv: list[str], code: int
) -> None:
    answer = await client.run(container.id, argv)
    assert answer.exit_code == code == user.podman_exec(container.id, *argv).returncode
    assert bool(answer.error) == (code > 7)


async def test_streams(client: Client, container: RootlessContainer) -> None:
    stdin = bytes(range(256)) * 1024
    answer = await client.run(container.id, ["sh", "-c", "cat; echo err >&2"], stdin=stdin)
    assert (answer.exit_code, answer.stdout, answer.stderr) == (0, stdin, b"err\n")


async def test_terminal(client: Client, user: RootlessUser, container: RootlessContainer) -> None:
    """A terminal of the size that was asked for, that belongs to whom podman's does, and that can be resized."""
    until_size = 'until [ "$(stty size 2>/dev/null)" = "{0}" ]; do :; done; echo {0}'.format  # crun sets it late
    owner_of = "stat -c '%u %g %a' $(tty)"
    script = f'tty; {owner_of}; {until_size("31 97")}; {until_size("40 120")}; read line; echo "<$line>"; exit 5'
    session = await client.create(
        container.id, ["sh", "-c", script], tty=True, attach_stdin=True, console_size=ConsoleSize(31, 97), user="app"
    )
    async with asyncio.timeout(60), await client.start(session) as stream:
        seen = await until(stream, b"31 97\r\n")
        await client.resize(session, 40, 120)
        seen += await until(stream, b"40 120\r\n")
        await stream.write(b"typed\n")
        seen += await until(stream, b"<typed>\r\n")
    name, owner, *rest = seen.decode().split("\r\n")
    assert name.startswith("/dev/pts/")
    assert owner == user.podman_exec("--tty", "--user=app", container.id, "sh", "-c", owner_of).stdout.strip()
    assert rest == ["31 97", "40 120", "typed", "<typed>", ""]
    assert (await client.wait(session)).exit_code == 5


async def until(stream: Output, text: bytes) -> bytes:
    """What comes up to the piece that completes `text`."""
    seen = b""
    async for _, data in stream:
        seen += data
        if text in seen:
            return seen
    raise AssertionError(f"no {text!r} in {seen!r}")


async def test_signals(client: Client, container: RootlessContainer) -> None:
    script = "trap 'echo usr1; exit 9' USR1; echo ready; while :; do sleep 0.05; done"
    session = await client.create(container.id, ["sh", "-c", script], user="app")
    async with asyncio.timeout(60), await client.start(session) as stream:
        await until(stream, b"ready\n")
        await client.kill(session, "USR1")
        await until(stream, b"usr1\n")
    assert (await client.wait(session)).exit_code == 9


async def test_kill_ends_the_whole_tree(client: Client, container: RootlessContainer) -> None:
    """Other users' processes included: the service is root over all of the user's subordinate ids."""
    script = "setsid sleep 2149 & sleep 2150 & echo $(readlink /proc/self/ns/pid); wait"
    session = await client.create(container.id, ["sh", "-c", script], user="app")
    async with asyncio.timeout(60), await client.start(session) as stream:
        await until(stream, b"\n")
        while not {"2149", "2150"} <= sleepers(container):
            await asyncio.sleep(0.01)  # a fork is over before its execve
        await client.kill(session)
        assert (await client.wait(session)).exit_code == 137
    assert not {"2149", "2150"} & sleepers(container)


def sleepers(container: RootlessContainer) -> set[str]:
    """How long the sleeps in the container take that run there now."""
    running = processes_within(pid_namespace(container.init)).values()
    return {argv[1] for argv in running if argv[0] == "sleep"}


async def test_sessions_outlive_the_service(user: RootlessUser, container: RootlessContainer, token: str) -> None:
    """After SIGKILL the next service has the terminal's process, the pipe of another, and the exit code of a third."""
    echo = ["sh", "-c", 'while read line; do echo "got $line"; done; exit 6']
    late = ["sh", "-c", "until [ -e /tmp/go ]; do sleep 0.02; done; echo late; exit 7"]
    async with running(user) as first, Client(first.host, token=token) as client, asyncio.timeout(60):
        terminal = await client.create(
            container.id, echo, tty=True, attach_stdin=True, on_disconnect=OnDisconnect.KEEP, user="app"
        )
        pipe = await client.create(container.id, late, capture_stdout=True, user="app")
        brief = await client.create(container.id, ["sh", "-c", "exit 8"])
        async with await client.start(terminal) as stream:
            await stream.write(b"one\n")
            await until(stream, b"got one\r\n")
        for session in (pipe, brief):
            await client.start_detached(session)
        first.kill()
    async with running(user) as second, Client(second.host, token=token) as client, asyncio.timeout(60):
        assert (await client.inspect(terminal)).state is SessionState.RUNNING
        await client.kill(terminal)
        assert (await client.wait(terminal)).exit_code == 137
        assert (await client.wait(brief)).exit_code == 8
        await client.run(container.id, ["touch", "/tmp/go"])
        assert (await client.wait(pipe)).exit_code == 7
        async with await client.logs(pipe) as output:
            assert [piece async for piece in output] == [(1, b"late\n")]
        second.stop()


@contextlib.asynccontextmanager
async def running(user: RootlessUser) -> AsyncIterator[Service]:
    """A service of the test's own, the next one on the files of the last."""
    service = user.start_service(RUNTIMES, name="own")
    try:
        yield service
    finally:
        service.kill()


async def test_the_namespaces_are_found_without_podmans_process(
    user: RootlessUser, container: RootlessContainer, token: str
) -> None:
    """Its end ends no container. The next podman command, which the service runs, finds them by their monitors."""
    user.end_pause_process()
    async with running(user) as service, Client(service.host, token=token) as client:
        answer = await client.run(container.id, ["id", "-u"])
        assert (answer.stdout, answer.exit_code) == (b"0\n", 0)
        assert namespace(service.pid, "user") == namespace(container.init, "user")
        service.stop()


async def test_podman_and_execgate_side_by_side(
    client: Client, user: RootlessUser, container: RootlessContainer
) -> None:
    """What each does to a container the other sees."""
    user.podman("exec", "--detach", container.id, "touch", "/tmp/theirs")
    await client.run(container.id, ["touch", "/tmp/ours"])
    assert user.podman("exec", container.id, "ls", "/tmp/ours").strip() == "/tmp/ours"
    user.podman("stop", "--time=0", container.id)
    with pytest.raises((Conflict, NotFound)):  # podman has its runtime forget a container that stopped
        await client.create(container.id, ["true"])
    user.podman("start", container.id)
    assert (await client.run(container.id, ["ls", "/tmp/ours"])).exit_code == 0
