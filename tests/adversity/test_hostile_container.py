"""What a container can do to those who execute in it: files that lie, programs that look for a way out, floods, swarms.

Each is the real attack, by the real runtimes. Where a defence is all there is to see, the test shows beside it that the
attack works on who does not have that defence: on a program of its own, or with a runtime that is called without care.
"""

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from execgate.runtime.streams import buffered
from execgate.runtime.versions import runtime_version
from execgate.wire.stdcopy import Demultiplexer
from support import hostile
from support.api import OUTPUT, RawApi, Stream, meanwhile
from support.bundle import bundle_config
from support.errors import HostError
from support.faults import faulty_runtime, fifo
from support.leaks import monitors, resident_bytes
from support.programs import find_program
from support.runtimes import RuntimeHost, TestContainer
from support.service import Service

NewService = Callable[..., Service]
NewContainer = Callable[..., TestContainer]

PROMPT = 5.0
"""Seconds: far more than any of this takes, far less than a timeout of the service's own."""
MIB = 1 << 20


@pytest.fixture(scope="module")
def program(host_dir: Path) -> Path:
    """The program that is hostile where a shell is not enough."""
    return hostile.build(host_dir)


@pytest.fixture(scope="module")
def hostile_container(runtime_host: RuntimeHost, program: Path) -> Iterator[TestContainer]:
    """A container of these tests' own, under each runtime in turn, in which they may leave what they like."""
    container = runtime_host.run()
    hostile.install(program, container)
    yield container
    container.delete()


def shell(api: RawApi, container: TestContainer, script: str, **fields: Any) -> str:
    """Run a script to its end and return what it wrote, both outputs, stripped; it must not fail."""
    done = api.pipe(container.id, "sh", "-c", script, **fields)
    assert done.exit_code == 0, done
    return (done.stdout + done.stderr).decode().strip()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Return once it holds; there is no event for what goes on in a container."""
    deadline = time.monotonic() + 4 * PROMPT
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def inner_pid(api: RawApi, session_id: str) -> int:
    """Return the pid that the process of a session has within its container (`NSpid` of proc(5))."""
    pid = api.inspect(session_id)["Pid"]
    fields = Path(f"/proc/{pid}/status").read_text().split()
    return int(fields[fields.index("NSpid:") + 2])


def begin(api: RawApi, container: TestContainer, script: str, **fields: Any) -> str:
    """Start a script that nobody is attached to, and return its session."""
    session_id = api.create(container.id, "sh", "-c", script, **fields)
    answer = api.start_detached(session_id)
    assert answer.status == 200, answer
    return session_id


def remove(api: RawApi, *session_ids: str) -> None:
    """End sessions, all that they have begun included, soon."""
    begun = time.monotonic()
    for session_id in session_ids:
        assert api.call("DELETE", f"/exec/{session_id}?force=1").status == 204
    assert time.monotonic() - begun < PROMPT * len(session_ids)


# -- who one is: the files of the accounts


_LIARS = """\
1000:x:0:0::/root:/bin/sh
01000:x:0:0::/root:/bin/sh
+1000:x:0:0::/root:/bin/sh
0:0:x:0:0::/root:/bin/sh
boss:x:0:0::/root:/bin/sh
app:x:1000:1000::/home/app:/bin/sh
"""


def test_a_number_that_names_somebody_else(api: RawApi, new_container: NewContainer) -> None:
    """CVE-2026-46680: digits are a number, whatever the files say; and they are read: `boss` is root by them."""
    container = new_container()
    (container.rootfs / "etc/passwd").write_text(_LIARS)
    (container.rootfs / "etc/group").write_text("staff:x:50:\nboss:x:0:\n")
    expected = {
        "1000": ("1000", "1000"),
        "01000": ("1000", "1000"),
        "+1000": ("1000", "1000"),
        "1000:5": ("1000", "5"),
        "1000:staff": ("1000", "50"),
        "boss": ("0", "0"),
        "1000:boss": ("1000", "0"),
    }
    script = "grep -E '^(Uid|Groups)' /proc/self/status"
    found = {user: shell(api, container, script, User=user).split() for user in expected}
    assert found == {user: ["Uid:", *[uid] * 4, "Groups:", groups] for user, (uid, groups) in expected.items()}


def test_a_group_that_names_another(api: RawApi, new_container: NewContainer) -> None:
    """A number of the request stays what it is; what a runtime makes of it is in `runtime.versions`."""
    container = new_container()
    (container.rootfs / "etc/group").write_text("5:x:0:\n")
    told = shell(api, container, "grep -E '^(Gid|Groups)' /proc/self/status", User="1000:5").split()
    assert told[:5] == ["Gid:", *["5"] * 4]
    if any("runc#3999" in warning for warning in runtime_version(container.host.program).warnings):
        assert told[5:] == ["Groups:", "0"], "runc before 1.3 has been mended: its hole is none any more"
        pytest.xfail("this runc looks for names in the container's group file")
    assert told[5:] == ["Groups:", "5"]


def test_a_name_that_becomes_root_after_it_was_looked_up(api: RawApi, new_container: NewContainer) -> None:
    """Who was allowed at the create is who runs at the start."""
    container = new_container()
    session_id = api.create(container.id, "id", "-u", User="app", **OUTPUT)
    passwd = container.rootfs / "etc/passwd"
    passwd.write_text(passwd.read_text().replace("app:x:1000:1000", "app:x:0:0"))
    with api.attach(session_id) as stream:
        assert stream.output() == (b"1000\n", b"")
    assert shell(api, container, "id -u", User="app") == "0"


def test_a_passwd_that_nobody_can_read_to_its_end(
    new_service: NewService, new_container: NewContainer, runc_container: TestContainer
) -> None:
    """The runtimes open it themselves, and hang in a FIFO: the starts elsewhere go on."""
    service = new_service(env={"EXECGATE_PARALLEL_STARTS": "4", "EXECGATE_START_TIMEOUT_SECONDS": "8"})
    api, container = RawApi(service.socket), new_container()
    passwd = container.rootfs / "etc/passwd"
    passwd.unlink()
    os.mkfifo(passwd)
    sessions = [api.create(container.id, "true") for _ in range(5)]
    statuses: list[int] = []
    starts = [
        threading.Thread(target=lambda one=one: statuses.append(api.start_detached(one).status)) for one in sessions
    ]
    idle = len(container.processes())
    for start in starts:
        start.start()
    wait_until(lambda: len(container.processes()) > idle, "no runtime comes: the test shows nothing")
    begun = time.monotonic()
    assert shell(api, runc_container, "echo here") == "here"
    assert time.monotonic() - begun < PROMPT
    assert not statuses, "none of them hangs"
    while any(start.is_alive() for start in starts):  # to each that comes it is an empty file now
        with contextlib.suppress(OSError):  # ENXIO: nobody waits
            os.close(os.open(passwd, os.O_WRONLY | os.O_NONBLOCK))
        time.sleep(0.01)
    assert statuses == [200] * 5


# -- the way out by the runtime's own program, its descriptors, its directory


def _host_programs() -> list[Path]:
    return [find_program(name).resolve() for name in ("runc", "crun", "conmon", "nsenter")]


@contextlib.contextmanager
def _overwriting(api: RawApi, container: TestContainer) -> Iterator[dict[str, int]]:
    """Have a program in the container write to every program of the host that shows up; say at the end how it went."""
    told: dict[str, int] = {}
    with api.open(container.id, hostile.INSIDE, "overwrite") as stream:
        stream.output_until(b"looking\n")
        yield told
        assert api.call("POST", f"/exec/{stream.id}/kill?signal=TERM").status == 204
        words = stream.output()[0].split()
    told |= {"seen": int(words[1]), "written": int(words[3])}


def test_the_runtime_is_not_overwritten(
    api: RawApi, hostile_container: TestContainer, program: Path, host_dir: Path
) -> None:
    """CVE-2019-5736: what is executed is the runtime's own program, in a container that waits for just that."""
    container = hostile_container
    for one in _host_programs():
        hostile.install_libraries(container, one)
    evil, script = container.rootfs / "evil", container.rootfs / "script"
    if not script.exists():
        evil.symlink_to("/proc/self/exe")
        script.write_text("#!/proc/self/exe\n")
        script.chmod(0o755)

    victim = Path(shutil.copy2(program, host_dir / f"victim-of-{container.host.name}"))
    before = hostile.fingerprints([victim])
    with _overwriting(api, container) as told:
        subprocess.run([victim, "undefended", str(container.init_pid)], check=True, timeout=30)
    assert told["written"] >= 1, "the attack does not work on who has no defence"
    assert hostile.fingerprints([victim]) != before

    before = hostile.fingerprints(_host_programs())
    with _overwriting(api, container) as told:
        for argv in (["/proc/self/exe", "--version"], ["/evil", "--version"], ["/script"]) * 3:
            done = api.pipe(container.id, *argv)
            assert done.exit_code is not None
            if argv[-1] == "--version":
                assert container.host.name.encode() in done.stdout, "the runtime did not run in the container"
    assert told["seen"] >= 1, "the runtime was not seen"
    assert hostile.fingerprints(_host_programs()) == before


_ESCAPE = "pwd; ls -a; cat {name} ../{name} ../../../../../../../../..{path} 2>/dev/null; exit 0"


def test_a_directory_that_is_a_descriptor(
    api: RawApi, hostile_container: TestContainer, host_secret: Path, unharmed: None
) -> None:
    """CVE-2024-21626: by its own name it is refused; by a name of the container's it leads nowhere."""
    container = hostile_container
    for number in range(31):
        for path in (f"/proc/self/fd/{number}", f"//tmp/../proc/1/root/proc/1/fd/{number}/..", f"/dev/fd/{number}"):
            fields = {"Cmd": ["pwd"], "WorkingDir": path}
            assert api.call("POST", f"/containers/{container.id}/exec", fields).status == 400, path
    escape = _ESCAPE.format(name=host_secret.name, path=host_secret)
    for number in range(31):
        link = container.rootfs / f"cwd{number}"
        if not link.is_symlink():
            link.symlink_to(f"/proc/self/fd/{number}")
        done = api.pipe(container.id, "sh", "-c", escape, WorkingDir=f"/cwd{number}")
        assert host_secret.read_bytes() not in done.stdout
        assert done.exit_code in (126, 127, 128), f"it starts in descriptor {number}: {done}"


def test_it_would_be_a_way_out(
    new_service: NewService, crun: RuntimeHost, crun_container: TestContainer, host_dir: Path, host_secret: Path
) -> None:
    """The same with one descriptor that a careless service leaves open: crun 1.8 relies on its caller."""
    careless = faulty_runtime(crun, host_dir / "careless", "crun", f'exec 9< {host_secret.parent}; exec "$REAL" "$@"')
    api = RawApi(new_service(flags=[f"--runtime=crun={careless.program}"]).socket)
    link = crun_container.rootfs / "cwd9"
    if not link.is_symlink():
        link.symlink_to("/proc/self/fd/9")
    escape = _ESCAPE.format(name=host_secret.name, path=host_secret)
    done = api.pipe(crun_container.id, "sh", "-c", escape, WorkingDir="/cwd9")
    if done.exit_code in (126, 127, 128):
        pytest.skip("this crun looks at the directory itself")
    assert host_secret.read_bytes() in done.stdout


@pytest.fixture
def host_secret(tmp_path: Path) -> Path:
    path = tmp_path / f"secret-{secrets.token_hex(4)}"
    path.write_text(f"{secrets.token_hex(16)}\n")
    return path


def test_descriptors_that_a_service_was_given(new_service: NewService, crun_container: TestContainer) -> None:
    """crun hands on as many as LISTEN_FDS says: to it, nobody says so."""
    container = crun_container
    inside = ["sh", "-c", "ls /proc/self/fd; env"]
    argv = [str(one) for one in (container.host.program, "--root", container.host.root, "exec", container.id)]
    careless = subprocess.run(
        ["sh", "-c", 'exec 3</; LISTEN_FDS=1 exec "$@"', "sh", *argv, *inside],
        capture_output=True,
        text=True,
        check=True,
    )
    assert careless.stdout.split()[:5] == ["0", "1", "2", "3", "4"], "4 is the directory that ls reads"
    api = RawApi(new_service(env={"LISTEN_FDS": "1", "LISTEN_FDNAMES": "x"}).socket)
    told = shell(api, container, inside[-1])
    assert told.split()[:4] == ["0", "1", "2", "3"]
    assert not told.split()[4].isdigit()
    assert "LISTEN_" not in told


# -- who else has the streams


def test_a_process_that_has_the_streams_of_another(
    api: RawApi, hostile_container: TestContainer, unharmed: None
) -> None:
    """The same uid in the same container can read and write them (proc(5)): that session's, and nobody else's.

    What holds is that it can be ended and that its end is told, whoever holds its pipes.
    """
    container = hostile_container
    with (
        api.open(container.id, "cat", stdin=True) as victim,
        api.open(container.id, "cat", stdin=True) as other,
        fifo(container, "take") as take,
    ):
        assert victim.echo(b"mine\n") == b"mine\n"
        pid = inner_pid(api, victim.id)
        thief = begin(
            api,
            container,
            f"exec 3<>/proc/{pid}/fd/0 4<>/proc/{pid}/fd/1 5<>/proc/{pid}/fd/2; kill -STOP {pid}; echo injected >&4;"
            " read x < /tmp/take; read line <&3; echo stolen $line >&5; sleep 1000",
        )
        assert victim.output_until(b"\n") == b"injected\n"
        victim.send(b"password\n")
        take()
        assert victim.output_until(b"\n") == b"stolen password\n"
        victim.half_close()  # which is no end: the thief has the other end open, too
        assert other.echo(b"theirs\n") == b"theirs\n"
        assert api.call("POST", f"/exec/{victim.id}/kill").status == 204
        victim.connection.socket.settimeout(PROMPT)
        assert victim.finish() == (b"", b"")
        assert victim.exit_code() == 137
        remove(api, thief)
        other.half_close()
        assert other.finish() == (b"", b"")


def test_a_process_that_reads_the_output_of_another(
    api: RawApi, hostile_container: TestContainer, unharmed: None
) -> None:
    """What is gone when it is to be sent ends the stream; what is delivered is in whole frames, of that session."""
    container = hostile_container
    with api.open(container.id, "yes", "0123456789abcdef") as victim:
        wait_until(lambda: api.inspect(victim.id)["Pid"] > 0, "it does not start")
        thief = api.create(container.id, "sh", "-c", f"cat /proc/{inner_pid(api, victim.id)}/fd/1 | wc -c", **OUTPUT)
        with api.attach(thief) as stolen:
            _read_frames(victim, seconds=1.5)
            # The client may be gone by now: then the process goes on, and the thief has all of it.
            assert api.call("POST", f"/exec/{victim.id}/kill").status == 204
            assert int(stolen.output()[0]) > 0, "nothing was stolen: the test shows nothing"
    assert api.wait_stopped(victim.id)["ExitCode"] == 137


def _read_frames(stream: Stream, *, seconds: float) -> None:
    """Read for a while, or up to the end: every frame must be stdout's, and hold what that `yes` writes."""
    demultiplexer, deadline = Demultiplexer(), time.monotonic() + seconds
    while time.monotonic() < deadline and select.select([stream.connection.socket], [], [], seconds)[0]:
        for number, data in demultiplexer.feed(stream.connection.read()):
            assert number == 1
            assert not data.strip(b"0123456789abcdef\n")


def test_the_last_output_is_read_by_another(new_service: NewService, runc_container: TestContainer) -> None:
    """Its client was slow, and the thief keeps the pipe open: the session ends all the same."""
    api = RawApi(new_service(env={"EXECGATE_DRAIN_SECONDS": "0.3"}).socket)
    # Small pieces: what is promised to the client already is another matter, see above.
    script = "while :; do head -c 16000 /dev/zero; usleep 2000; done"
    with fifo(runc_container, "take") as take, api.open(runc_container.id, "sh", "-c", script) as victim:
        _wait_until_stuck(api, victim.id)
        pid = api.inspect(victim.id)["Pid"]
        steal = f"exec 3<>/proc/{inner_pid(api, victim.id)}/fd/1; echo; read x < /tmp/take; cat <&3 | wc -c"
        with api.open(runc_container.id, "sh", "-c", steal) as thief:
            thief.output_until(b"\n")
            end = os.pidfd_open(pid)
            signal.pidfd_send_signal(end, signal.SIGKILL)
            os.close(end)
            time.sleep(1)  # three times the drain: what is in the pipe now is the last of it
            take()
            wait_until(lambda: _is_empty(f"/proc/{api.inspect(thief.id)['Pid']}/fd/3"), "nobody steals")
            victim.connection.socket.settimeout(PROMPT)
            victim.connection.read_until_closed()
            assert victim.exit_code() == 137
            remove(api, thief.id)


def _wait_until_stuck(api: RawApi, session_id: str) -> None:
    """Return once a session's output stands still: its client does not read, and its pipe is full."""
    seen, since = -1, time.monotonic()
    while time.monotonic() - since < 0.5:
        if (now := api.inspect(session_id)["StdoutBytes"]) != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.02)
    assert seen > 0


def _is_empty(pipe: str) -> bool:
    fd = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return buffered(fd) == 0
    finally:
        os.close(fd)


# -- floods and swarms


def test_floods_that_nobody_reads(
    api: RawApi, service: Service, hostile_container: TestContainer, runc_container: TestContainer, unharmed: None
) -> None:
    """Both outputs at full speed: unread, thrown away and captured, by a terminal. Nothing grows, nobody waits."""
    container, script = hostile_container, "yes out & exec yes err >&2"
    before, answered = resident_bytes(service), []
    with contextlib.ExitStack() as streams:
        ids = [streams.enter_context(api.open(container.id, "sh", "-c", script, tty=one)).id for one in (False, True)]
        with api.open(container.id, "sh", "-c", script) as gone:
            ids.append(gone.id)
        ids.append(begin(api, container, script, CaptureStdout=True, CaptureStderr=True))
        with api.open(runc_container.id, "cat", stdin=True) as bystander:
            ends = time.monotonic() + 1.5
            while time.monotonic() < ends:
                begun = time.monotonic()
                assert api.call("GET", "/_ping").status == 200
                assert bystander.echo(b"still here\n") == b"still here\n"
                answered.append(time.monotonic() - begun)
                time.sleep(0.05)
        grown = resident_bytes(service) - before
        written = [inspected["StdoutBytes"] + inspected["StderrBytes"] for inspected in map(api.inspect, ids)]
    remove(api, *ids)
    assert max(answered) < PROMPT, answered
    assert grown < 24 * MIB, f"{grown >> 20} MiB"
    assert max(written[:2]) < 8 * MIB, f"without a reader: {written}"
    assert min(written[2:]) > 16 * MIB, f"no flood at all: {written}"


def test_a_fork_bomb(api: RawApi, runtime_host: RuntimeHost, unharmed: None) -> None:
    """It fills what its container may have, and is gone after one kill."""
    container = runtime_host.run(config=_limited(runtime_host.name))
    try:
        (container.rootfs / "bomb").write_text("while :; do sh /bomb & sh /bomb & usleep 20000; done\n")
        bomb = begin(api, container, "sh /bomb & exec sleep 1000", User=_BOMBER)
        wait_until(lambda: len(container.processes()) > _MOST - 8, "it does not grow")
        assert api.call("GET", "/_ping").status == 200
        assert len(container.processes()) <= _MOST + 4
        begun = time.monotonic()
        assert api.call("POST", f"/exec/{bomb}/kill").status == 204
        assert time.monotonic() - begun < 2 * PROMPT
        assert api.inspect(bomb)["ExitCode"] == 137
        wait_until(lambda: not any("bomb" in " ".join(argv) for argv in container.processes().values()), "it lives on")
        assert shell(api, container, "echo whole", User=_BOMBER) == "whole"
    finally:
        container.delete()


_BOMBER = "47474:47474"
"""Nobody else on the host has this uid: the processes of one are counted together, whatever container they are in."""
_MOST = 48


def _limited(runtime: str) -> dict[str, Any]:
    """A container that may have so many processes: by its cgroup, under crun (see `bundle_config`) by the uid."""
    config = bundle_config(hostname="limited", cgroup=f"/execgate-limited-{secrets.token_hex(6)}")
    if runtime == "crun":
        config["process"]["rlimits"].append({"type": "RLIMIT_NPROC", "soft": _MOST, "hard": _MOST})
    else:
        config["linux"]["resources"] = {"pids": {"limit": _MOST}}
    return config


def test_a_process_that_is_never_the_same(api: RawApi, hostile_container: TestContainer, unharmed: None) -> None:
    """Each begins a session of its own, starts the next and ends, for ever: the end of its time is the end of all."""
    container = hostile_container
    (container.rootfs / "hop").write_text("setsid sh /hop < /dev/null > /dev/null 2>&1 &\nusleep 5000\n")

    def hops() -> int:
        return sum(argv[:2] == ["sh", "/hop"] for argv in container.processes().values())

    runaway = begin(api, container, "sh /hop; exec sleep 1000", Timeout=1)
    wait_until(lambda: hops() > 0, "it does not run")
    ended = api.wait_stopped(runaway)
    assert (ended["TimedOut"], ended["ExitCode"]) == (True, 143)
    wait_until(lambda: hops() == 0, "it lives on")
    for _ in range(10):  # between two of them there may be none for a moment
        assert hops() == 0
        time.sleep(0.02)


def test_processes_that_are_stopped(api: RawApi, hostile_container: TestContainer, unharmed: None) -> None:
    """One stops all others of its container, and itself: they can be ended, and those that it thaws go on."""
    container = hostile_container
    with api.open(container.id, "cat", stdin=True) as victim:
        assert victim.echo(b"before\n") == b"before\n"
        stopper = begin(api, container, "kill -STOP -1; kill -STOP $$; sleep 1000")
        wait_until(lambda: _state(api, victim.id) == _state(api, stopper) == "T", "nothing is stopped")
        begun = time.monotonic()
        assert api.call("POST", f"/exec/{stopper}/stop?t=1").status == 204
        assert 0.9 < time.monotonic() - begun < PROMPT
        assert api.inspect(stopper)["ExitCode"] == 137
        victim.send(b"meanwhile\n")
        assert _state(api, victim.id) == "T"
        shell(api, container, "kill -CONT -1")
        assert victim.output_until(b"\n") == b"meanwhile\n"
        victim.half_close()
        assert victim.finish() == (b"", b"")


def _state(api: RawApi, session_id: str) -> str:
    """Return how the process of a session is, in one letter (proc(5))."""
    return Path(f"/proc/{api.inspect(session_id)['Pid']}/stat").read_text().rpartition(")")[2].split()[0]


# -- what it may do, and what becomes of the service when memory is short


@pytest.fixture(scope="module")
def strong_container(runtime_host: RuntimeHost, program: Path) -> Iterator[TestContainer]:
    """One whose own user, 1000, has inheritable and ambient capabilities, and in which set-id programs work."""
    config = bundle_config(
        hostname="strong", cgroup=f"/execgate-strong-{secrets.token_hex(6)}", no_new_privileges=False
    )
    strong = ["CAP_NET_BIND_SERVICE", "CAP_KILL", "CAP_DAC_OVERRIDE"]
    config["process"]["user"] = {"uid": 1000, "gid": 1000}
    config["process"]["capabilities"] |= {"inheritable": strong, "ambient": strong}
    container = runtime_host.run(config=config)
    hostile.install(program, container)
    yield container
    container.delete()


def test_nobody_inherits_the_strength_of_another(api: RawApi, strong_container: TestContainer) -> None:
    """CVE-2022-27649: the container's user is strong by ambient capabilities; whoever else comes is not."""
    found = {user: _capabilities(api, strong_container, user) for user in ("", "1000", "4242", "4242:1000", "0")}
    for own in ("", "1000"):
        assert found[own]["Inh"] == found[own]["Amb"] == found[own]["Eff"] != 0, "nothing is there to be inherited"
    for other in ("4242", "4242:1000"):
        assert found[other] == {"Inh": 0, "Prm": 0, "Eff": 0, "Amb": 0, "Bnd": found[""]["Bnd"]}
    assert found["0"]["Inh"] == found["0"]["Amb"] == 0
    assert found["0"]["Eff"] == found["0"]["Prm"] == found["0"]["Bnd"] == found[""]["Bnd"]


def _capabilities(api: RawApi, container: TestContainer, user: str) -> dict[str, int]:
    lines = shell(api, container, "grep ^Cap /proc/self/status", User=user).splitlines()
    return {name.strip()[3:]: int(mask, 16) for name, mask in (line.split(":") for line in lines)}


def test_a_service_that_cannot_take_capabilities_away(new_service: NewService, container: TestContainer) -> None:
    """Without CAP_SETPCAP it does not start: runc would leave another user the bounding set of the host."""
    without = [str(find_program("setpriv")), "--inh-caps=-setpcap", "--bounding-set=-setpcap"]
    process = container.bundle / "without-setpcap.json"
    process.write_text(json.dumps(_as_other_user(container, "grep", "CapBnd", "/proc/self/status")))
    host = container.host
    careless = subprocess.run(
        [*without, host.program, "--root", host.root, "exec", "--process", process, container.id],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if careless.returncode == 0:  # else this runtime refuses by itself
        usual = host.command("exec", "--process", str(process), container.id)
        assert int(careless.stdout.split()[1], 16) & ~int(usual.split()[1], 16), "nothing was handed out"
    with pytest.raises(HostError, match="CAP_SETPCAP is missing"):
        new_service(wrapper=without)


def _as_other_user(container: TestContainer, *argv: str) -> dict[str, Any]:
    """Return a process.json for another user of a container: without capabilities, and bounded as the container is."""
    process: dict[str, Any] = json.loads((container.bundle / "config.json").read_text())["process"]
    bounding = process["capabilities"]["bounding"]
    return process | {"args": argv, "user": {"uid": 4242, "gid": 4242}, "capabilities": {"bounding": bounding}}


def test_a_group_that_shuts_one_out(api: RawApi, strong_container: TestContainer) -> None:
    """CVE-2022-2989: a set-gid program must not take off the group for which a file is closed."""
    container = strong_container
    closed, reader = container.rootfs / "tmp/closed", container.rootfs / "tmp/reader"
    closed.write_text("not for 4343\n")
    os.chown(closed, 0, 4343)
    closed.chmod(0o604)
    if not reader.exists():
        shutil.copy2(container.rootfs / hostile.INSIDE.lstrip("/"), reader)
        os.chown(reader, 0, 5)
        reader.chmod(0o2755)
    argv = ["/tmp/reader", "cat", "/tmp/closed"]
    careless = container.host.command("exec", "--user", "4242:4343", container.id, *argv)
    assert careless == "not for 4343\n", "the attack does not work on who has only the primary gid"
    done = api.pipe(container.id, *argv, User="4242:4343")
    assert (done.stdout, done.exit_code) == (b"", 1)
    assert api.pipe(container.id, *argv, User="4242:4344").stdout == b"not for 4343\n"
    for user, groups in {"4242:4343": "4343", "4242": "0", "app": "1000 2000", "app:5": "5", "0": "0"}.items():
        assert shell(api, container, "grep ^Groups /proc/self/status", User=user).split()[1:] == groups.split()


def test_who_is_killed_when_memory_is_short(api: RawApi, service: Service, hostile_container: TestContainer) -> None:
    """A process has its container's score, whatever conmon made of its own, and cannot make itself safer."""
    container = hostile_container
    init = Path(f"/proc/{container.init_pid}/oom_score_adj").read_text().strip()
    scores = {pid: _oom_score(pid) for pid in (service.pid, service.keeper)}
    script = (
        "cat /proc/self/oom_score_adj; echo -1000 2>&1 > /proc/self/oom_score_adj; echo 1000 > /proc/$$/oom_score_adj"
    )
    told = shell(api, container, f"{script}; cat /proc/$$/oom_score_adj").split()
    assert (told[0], told[-1]) == (init, "1000")
    assert "-1000" not in told
    session = begin(api, container, "sleep 1000")
    pid = api.inspect(session)["Pid"]
    assert _oom_score(pid) == init
    remove(api, session)
    assert {pid: _oom_score(pid) for pid in scores} == scores


def _oom_score(pid: int) -> str:
    return Path(f"/proc/{pid}/oom_score_adj").read_text().strip()


# -- terminals, and what speaks to them


def test_a_terminal_is_the_containers_own(api: RawApi, hostile_container: TestContainer, unharmed: None) -> None:
    """None of the host's is opened for it, and nobody types into another session's."""
    container = hostile_container
    hosts = set(os.listdir("/dev/pts"))
    with (
        api.open(container.id, "sh", "-c", "stty -echo; tty; cat", stdin=True, tty=True) as other,
        api.open(container.id, "sh", "-c", "stty -echo; tty; exec cat", stdin=True, tty=True) as own,
    ):
        names = [stream.connection.read_until(b"\n").decode().strip() for stream in (other, own)]
        assert names[0] != names[1]
        for name, stream in zip(names, (other, own), strict=True):
            open_now = Path(f"/proc/{api.inspect(stream.id)['Pid']}/fd/0")
            inside = container.rootfs  # the mount is the container's: seen by way of its init
            assert open_now.stat().st_dev == Path(f"/proc/{container.init_pid}/root{name}").stat().st_dev
            assert open_now.stat().st_dev not in (Path("/dev/pts").stat().st_dev, inside.stat().st_dev)
        assert set(os.listdir("/dev/pts")) <= hosts
        typed = shell(api, container, f"{hostile.INSIDE} push pushed < {names[0]} 2>&1; echo $?").split()
        assert typed[-1] == "1", typed  # EPERM: it is not one's own; EIO: the kernel allows it to nobody
        other.send(b"typed\n")
        assert other.connection.read_until(b"\n") == b"typed\r\n"
        own.send(b"mine\n")
        assert own.connection.read_until(b"\n") == b"mine\r\n"
        remove(api, other.id, own.id)


_NAUGHTY = "\x1b]0;owned\x07\x1b[2J\r\nFORGED \x9b31m"


def test_names_that_speak_to_a_terminal(
    new_service: NewService, hosts: list[RuntimeHost], runc_container: TestContainer, request: pytest.FixtureRequest
) -> None:
    """What a runtime says about them is shown on one line, without anything that a terminal would obey."""
    service = new_service(flags=["--log-level=debug"])
    api = RawApi(service.socket)
    for host in hosts:
        container = request.getfixturevalue(f"{host.name}_container")
        refused: list[dict[str, Any]] = [{"User": _NAUGHTY}, {"User": f"app:{_NAUGHTY}"}, {"WorkingDir": _NAUGHTY}]
        refused += [{"DetachKeys": _NAUGHTY}, {"WorkingDir": f"/proc/self/fd/{_NAUGHTY}"}]
        for fields in refused:
            answer = api.call("POST", f"/containers/{container.id}/exec", {"Cmd": ["true"], **fields})
            assert answer.status == 400, fields
            assert answer.message.isprintable(), fields
        failing: list[tuple[list[str], dict[str, Any]]] = [([f"/no/{_NAUGHTY}"], {}), ([_NAUGHTY], {})]
        failing += [(["true"], {"WorkingDir": f"/no/{_NAUGHTY}"})]
        for argv, fields in failing:
            session_id = api.create(container.id, *argv, **fields)
            answer = api.start_detached(session_id)
            assert answer.status == 400
            assert answer.message.isprintable()
            assert api.inspect(session_id)["Error"].isprintable()
            told = api.pipe(container.id, *argv, **fields).stdout.decode()
            assert told.startswith("OCI runtime exec failed")
            assert told.removesuffix("\r\n").isprintable()
    lines = service.log().split("\n")
    assert all(line.isprintable() for line in lines)
    assert not [line for line in lines if line.startswith("FORGED")]


# -- secrets


def test_secrets_in_the_environment(
    new_service: NewService, runc_container: TestContainer, hosts: list[RuntimeHost], request: pytest.FixtureRequest
) -> None:
    """They are in the process, and in files that are root's alone until it runs; nowhere else, and never in words."""
    service = new_service(flags=["--log-level=debug"])
    api, secret = RawApi(service.socket), f"secret-{secrets.token_hex(16)}"
    env = [f"TOKEN={secret}"]
    with api.events() as events, _watched_command_lines(secret) as seen:
        for host in hosts:
            container = request.getfixturevalue(f"{host.name}_container")
            for tty in (False, True):
                with api.open(container.id, "sh", "-c", "echo up; read x", stdin=True, tty=tty, Env=env) as stream:
                    stream.output_until(b"up")
                    pid = api.inspect(stream.id)["Pid"]
                    assert f"TOKEN={secret}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
                    assert _holders_of(secret, service.state_dir / "sessions") == []
                    stream.send(b"\n")
                    stream.finish()
            failed = api.create(container.id, "/no/such/program", Env=env)
            assert secret not in api.start_detached(failed).message
            refused = {"Cmd": ["true"], "Env": [*env, f"={secret}", f"{secret}=\0"]}
            assert secret not in api.call("POST", f"/containers/{container.id}/exec", refused).message
            waiting = api.create(container.id, "true", Env=env)
            assert secret not in str(api.inspect(waiting)), "inspect shows it"
            assert secret not in str(api.call("GET", "/exec/json").json)
        last = api.create(runc_container.id, "true")
        told = []
        for event in events:
            told.append(str(event))
            if event["Actor"]["Attributes"]["execID"] == last:
                break
    assert len(told) > 8
    assert secret not in "".join(told)
    assert seen == []
    assert secret not in service.log()
    holders = _holders_of(secret, service.state_dir)
    assert holders, "what waits for its start is kept: else the test shows nothing"
    for path in [*holders, service.state_dir, service.state_dir / "sessions"]:
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path


def test_secrets_while_a_start_is_under_way(
    new_service: NewService, runc: RuntimeHost, runc_container: TestContainer, host_dir: Path
) -> None:
    """In a file that is root's alone, for the runtime: on nobody's command line, and in no environment on the host."""
    slow = faulty_runtime(runc, host_dir / "slow", "runc", 'sleep 1; exec "$REAL" "$@"')
    service = new_service(flags=[f"--runtime=runc={slow.program}"])
    api, secret = RawApi(service.socket), f"secret-{secrets.token_hex(16)}"
    session = api.create(runc_container.id, "sleep", "1000", Env=[f"TOKEN={secret}"])
    with _watched_command_lines(secret) as seen, meanwhile(lambda: [api.start_detached(session)].clear()):
        wait_until(lambda: _holders_of(secret, service.state_dir / "sessions") != [], "process.json is nowhere")
        (path,) = _holders_of(secret, service.state_dir / "sessions")
        modes = [stat.S_IMODE(one.stat().st_mode) for one in (path, path.parent, path.parent.parent)]
        assert modes == [0o600, 0o700, 0o700]
        found = monitors(service.state_dir)
        assert found
        assert not [pid for pid in found if secret.encode() in Path(f"/proc/{pid}/environ").read_bytes()]
    assert seen == []
    assert _holders_of(secret, service.state_dir / "sessions") == []
    remove(api, session)


@contextlib.contextmanager
def _watched_command_lines(text: str) -> Iterator[list[str]]:
    """Look at every command line of the host, again and again; say at the end which ones had it in them."""
    seen: list[str] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            for entry in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    if text.encode() in (data := entry.read_bytes()):
                        seen.append(data.decode(errors="replace"))

    with meanwhile(watch):
        try:
            yield seen
        finally:
            over.set()


def _holders_of(text: str, directory: Path) -> list[Path]:
    """Return the files below a directory that have it in them."""
    found = []
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and text.encode() in path.read_bytes():
                found.append(path)
    return found
