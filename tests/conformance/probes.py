"""The questions: commands whose answers show how a process was started, and the ways to ask them."""

import re
from dataclasses import dataclass, replace
from typing import Any

from support.api import RawApi
from support.engines import Containerd, Docker, Engine, ExecOptions, Reply, plain_newlines

ROWS, COLUMNS = 24, 80
"""The size of every terminal here, as in `ExecOptions.tty`."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a probe.

    `code` is the exit code, that of a start that failed included; None where there is not even that, because the exec
    was refused before it existed. `refusal` is the reason why nothing was started, "" when something was.
    """

    code: int | None
    output: str = ""
    errors: str = ""
    refusal: str = ""


_PLAIN = ExecOptions()


@dataclass(frozen=True, slots=True)
class Probe:
    """One command, and how it is executed.

    With `unordered` the order of the lines that it prints means nothing. `once`: whatever the container is, the answer
    depends on nothing of it, so one container is enough.
    """

    name: str
    command: tuple[str, ...]
    options: ExecOptions = _PLAIN
    unordered: bool = False
    once: bool = False

    def fits(self, engine: type[Engine]) -> bool:
        """Whether the engine's own exec has the options for it."""
        return engine is not Containerd or not (self.options.env or self.options.privileged)


def _shell(name: str, script: str, **options: Any) -> Probe:
    return Probe(name, ("sh", "-c", script), _exec(**options))


def _exec(**options: Any) -> ExecOptions:
    return replace(_PLAIN, **options)


def _status(name: str, fields: str, **options: Any) -> Probe:
    return Probe(name, ("grep", "-E", f"^({fields}):", "/proc/self/status"), _exec(**options))


# Engines, and crun, set the size behind the process; what an engine says of a process that was faster is no answer.
_SIZED = 'for look in $(seq 2000); do [ "$(stty size 2>/dev/null)" ] && break; done'
# proc(5): leads a process group, leads a session, has a controlling terminal.
_SESSION = "{ print $1 == $5, $1 == $6, $7 != 0 }"
_OWNER = f"{_SIZED}; stat -c '%u:%g %a' $(tty)"
_STREAMS = "echo out; echo err >&2; for fd in 0 1 2; do test -t $fd; echo $?; done"
_PRIVILEGES = "Uid|Gid|Groups|Cap...|NoNewPrivs|Seccomp|Seccomp_filters"

_OF_THE_CONTAINER: tuple[Probe, ...] = (
    # who
    Probe("id", ("id",)),
    Probe("id-name", ("id",), _exec(user="app")),
    Probe("id-number", ("id",), _exec(user="1000")),
    Probe("id-unlisted-number", ("id",), _exec(user="1234")),
    Probe("id-name-and-group", ("id",), _exec(user="app:extra")),
    Probe("id-numbers", ("id",), _exec(user="4321:4321")),
    Probe("id-root", ("id",), _exec(user="0")),
    # with what around it
    Probe("env", ("env",), unordered=True),
    Probe("env-of-app", ("env",), _exec(user="app"), unordered=True),
    Probe("env-of-root", ("env",), _exec(user="root"), unordered=True),
    Probe("env-of-unlisted-number", ("env",), _exec(user="1234"), unordered=True),
    Probe("env-given", ("env",), _exec(env=("COLOUR=green", "EMPTY=", "HOSTNAME=other")), unordered=True),
    Probe("env-home-given", ("env",), _exec(user="app", env=("HOME=/srv",)), unordered=True),
    replace(_shell("env-terminal", f"{_SIZED}; exec env", tty=True), unordered=True),
    replace(_shell("env-terminal-given", f"{_SIZED}; exec env", tty=True, env=("TERM=vt100",)), unordered=True),
    Probe("pwd", ("pwd",)),
    Probe("pwd-given", ("pwd",), _exec(workdir="/tmp")),
    Probe("pwd-of-app", ("pwd",), _exec(user="app")),
    Probe("pwd-forbidden", ("pwd",), _exec(user="app", workdir="/root")),
    Probe("hostname", ("hostname",)),
    # with which powers
    _status("privileges", _PRIVILEGES),
    _status("privileges-of-root", _PRIVILEGES, user="0"),
    _status("privileges-of-app", _PRIVILEGES, user="app"),
    _status("privileges-of-unlisted-number", _PRIVILEGES, user="1234"),
    _status("privileges-privileged", _PRIVILEGES, privileged=True),
    _status("privileges-privileged-root", _PRIVILEGES, privileged=True, user="0"),
    _status("privileges-privileged-app", _PRIVILEGES, privileged=True, user="app"),
    _shell("security-module", "cat /proc/self/attr/current 2>&1"),
    # within which bounds
    Probe("limits", ("cat", "/proc/self/limits")),
    Probe("limits-of-app", ("cat", "/proc/self/limits"), _exec(user="app")),
    Probe("cgroup", ("cat", "/proc/self/cgroup")),
    _shell("namespaces", "cd /proc/self/ns; for kind in *; do readlink $kind; done"),
    _status("processors", "Cpus_allowed_list|Mems_allowed_list"),
    _shell("oom-score", "cat /proc/self/oom_score_adj"),
    _shell("umask", "umask"),
    Probe("priority", ("awk", "{ print $18, $19, $40, $41 }", "/proc/self/stat")),
    _status("signals", "SigBlk|SigIgn|SigCgt"),
)

_OF_ANY_CONTAINER: tuple[Probe, ...] = (
    _shell("ulimit", "ulimit -a"),
    _shell("personality", "cat /proc/self/personality /proc/self/timerslack_ns /proc/self/coredump_filter 2>&1"),
    # in which session, on which streams
    Probe("session", ("awk", _SESSION, "/proc/self/stat")),
    _shell("session-terminal", f"{_SIZED}; exec awk '{_SESSION}' /proc/self/stat", tty=True),
    _shell("descriptors", "ls /proc/self/fd; readlink /proc/self/fd/0 | sed s/[0-9]//g"),
    _shell("streams", _STREAMS),
    _shell("streams-terminal", f"{_SIZED}; {_STREAMS}", tty=True),
    _shell("terminal", f"{_SIZED}; tty | sed s/[0-9]*$//; stty -a", tty=True),
    _shell("terminal-owner", _OWNER, tty=True),
    _shell("terminal-owner-app", _OWNER, tty=True, user="app"),
    # and how it ends
    Probe("id-unknown-user", ("id",), _exec(user="nobody-here")),
    Probe("id-unknown-group", ("id",), _exec(user="app:no-such-group")),
    Probe("pwd-missing", ("pwd",), _exec(workdir="/no/such/directory")),
    _shell("exit-0", "exit 0"),
    _shell("exit-42", "exit 42"),
    _shell("exit-255", "exit 255"),
    _shell("exit-terminal", f"{_SIZED}; exit 7", tty=True),
    _shell("killed", "kill -KILL $$"),
    _shell("terminated", "kill -TERM $$"),
    _shell("segmentation-fault", "kill -SEGV $$"),
    Probe("no-such-command", ("no-such-command",)),
    Probe("no-such-path", ("/no/such/command",)),
    Probe("no-program", ("/etc/passwd",)),
    Probe("directory-as-program", ("/tmp",)),
)

PROBES = (*_OF_THE_CONTAINER, *(replace(probe, once=True) for probe in _OF_ANY_CONTAINER))

_NEVER_STARTED = (126, 127, 128)

_REASON = re.compile(
    r"""exec: ".*?": .*?(?=: unknown|: OCI |: permission denied: |$)"""
    r"""|chdir to cwd \(".*?"\) set in config\.json failed: [a-z ]+"""
    r"""|unable to find (?:user|group) [^\s:]+: no matching entries in \w+ file"""
    r"""|unable to apply caps: [a-z ]+"""
    r"""|no users found|no groups found"""
    r"""|(?:chdir `.*?`|executable file `.*?` not found in \$PATH|open executable): [A-Z][a-z]+(?: [a-z]+)*""",
    re.MULTILINE,
)


def refusal(text: str) -> str:
    """Return the reason for which nothing was started, without what each program adds to it; "" for anything else."""
    found = _REASON.search(text)
    return found[0].strip() if found else ""


def ask_engine(engine: Engine, container: str, probe: Probe) -> Answer:
    """Ask through the engine's own exec."""
    reply: Reply = engine.exec(container, *probe.command, options=probe.options)
    reason = refusal(reply.errors or reply.output) if reply.code else ""
    if not reason:
        return _answer(probe, reply.code, reply.output, reply.errors)
    if isinstance(engine, Docker):
        # The docker CLI makes 126 of every error; the engine itself knows better.
        return Answer(ask_api(RawApi(engine.socket), container, probe).code, refusal=reason)
    return Answer(reply.code, refusal=reason)


def ask_api(api: RawApi, container: str, probe: Probe) -> Answer:
    """Ask through Docker's API, execgate's or Docker's own."""
    options = probe.options
    fields = {
        "Cmd": probe.command,
        "User": options.user,
        "Env": list(options.env),
        "WorkingDir": options.workdir,
        "Privileged": options.privileged,
        "Tty": options.tty,
        "AttachStdin": options.tty,
        "AttachStdout": True,
        "AttachStderr": True,
    }
    created = api.call("POST", f"/containers/{container}/exec", fields)
    if created.status != 201:
        return Answer(None, refusal=refusal(created.message) or created.message)
    session = str(created.json["Id"])
    size: dict[str, Any] = {"ConsoleSize": [ROWS, COLUMNS]} if options.tty else {}
    with api.attach(session, Tty=options.tty, Detach=False, **size) as stream:
        assert stream.status < 400, stream.head
        stdout, stderr = stream.output()
    code = api.wait_stopped(session)["ExitCode"]
    output, errors = plain_newlines(stdout.decode()), stderr.decode()
    # Like Docker's, the stream of a process that never was ends with the reason.
    reason = refusal(errors or output) if code in _NEVER_STARTED else ""
    return Answer(code, refusal=reason) if reason else _answer(probe, code, output, errors)


def _answer(probe: Probe, code: int | None, output: str, errors: str) -> Answer:
    if probe.unordered:
        output = "".join(sorted(output.splitlines(keepends=True)))
    return Answer(code, output, errors)
