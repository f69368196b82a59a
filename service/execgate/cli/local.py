"""The commands that need no running service.

`serve`, `containers`, `sessions`, `check-config`, `doctor`, `policy`, `audit`.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import ssl
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from execgate import logs
from execgate.cli import audit, doctor, policy
from execgate.cli.tables import ago, print_table, rfc3339, shown
from execgate.config import Config, load
from execgate.engine import DATABASE, catalog_of, default_policy_of
from execgate.gate.audit_log import check as check_audit
from execgate.gate.policy import policy_in_force
from execgate.http.certificates import server_context
from execgate.model.container import Container, EngineName
from execgate.model.errors import InvalidArgument, Unavailable
from execgate.model.session import ExecSession, SessionState
from execgate.rootless import enter_podman
from execgate.runtime import pidfd
from execgate.sessions.store import read_sessions
from execgate.status import read_status

_log = logging.getLogger(__name__)

_RELOAD_TIMEOUT = 90.0
_RELOAD_POLL = 0.02  # a file has no event without inotify, which Python does not have
_SEE_LOG = "the service's log has the details; `execgate check-config` checks the configuration"

_STATES = {
    "created": (SessionState.CREATED,),
    "running": (SessionState.STARTING, SessionState.RUNNING),
    "stopped": (SessionState.STOPPED,),
}


def add_commands(commands: Any) -> None:
    """Add the commands of this module to a parser's."""
    serve = _command(commands, "serve", _serve, "run the service")
    serve.add_argument(
        "--listen",
        action="append",
        metavar="ADDRESS",
        help="unix:///PATH, tls://HOST:PORT or tcp://127.0.0.1:PORT; repeatable (default unix:///run/execgate.sock)",
    )
    serve.add_argument("--conmon", metavar="PATH", help="the monitor program (default: the one on the PATH)")
    serve.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="default info")
    serve.add_argument("--log-format", choices=("text", "json"), help="default text")
    serve.add_argument(
        "--event-loop",
        choices=("auto", "asyncio", "uvloop"),
        help="default auto: uvloop where it is installed",
    )
    serve.add_argument("--socket-mode", metavar="MODE", help="permissions of the unix sockets (default 0660)")
    serve.add_argument("--policy", metavar="FILE", help=policy.POLICY_HELP)
    serve.add_argument("--socket-group", metavar="GROUP", help="group of the unix sockets (default: the service's)")

    _command(commands, "reload", _reload, "replace the running service: new code, new configuration, no client notices")

    containers = _command(commands, "containers", _containers, "show the containers that can be reached")
    sessions = _command(commands, "sessions", _sessions, "show the exec sessions that are known")
    sessions.add_argument("--container", metavar="NAME", help="only those of this container, by name or id")
    sessions.add_argument("--state", choices=tuple(_STATES), help="only those in this state")
    sessions.add_argument(
        "--label",
        dest="labels",
        action="append",
        default=[],
        metavar="K[=V]",
        help="only those so labelled; repeatable",
    )
    for table in (containers, sessions):
        table.add_argument("--json", action="store_true", help="print JSON instead of a table")
    doctor.add_command(partial(_command, commands))
    policy.add_commands(commands, _command)
    audit.add_command(commands)
    _command(commands, "check-config", _check_config, "check the configuration and print what it comes to")


def _command(
    commands: Any, name: str, run: Callable[[Config, argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text.capitalize() + ".")
    parser.set_defaults(command=lambda arguments: run(load(vars(arguments), os.environ), arguments))
    parser.add_argument("--config", metavar="FILE", help="TOML file (default /etc/execgate/execgate.toml if it exists)")
    parser.add_argument("--state-dir", metavar="DIR", help="where sessions are kept (default /run/execgate)")
    parser.add_argument(
        "--runtime-root",
        dest="runtime_roots",
        action="append",
        metavar="[RUNTIME=]DIR",
        help="where a runtime keeps its container states; repeatable (default: the usual places of runc and crun)",
    )
    parser.add_argument(
        "--engine",
        dest="engines",
        action="extend",
        type=_list,
        metavar="NAME[,NAME…]",
        help=f"whose containers are shown: {', '.join(EngineName)}; repeatable (default: all that are found)",
    )
    parser.add_argument(
        "--container-label",
        dest="container_labels",
        action="append",
        metavar="K[=V]",
        help="show only containers with this label; repeatable, all must match",
    )
    parser.add_argument(
        "--runtime",
        dest="runtimes",
        action="append",
        metavar="NAME=PATH",
        help="the program of a runtime; repeatable (default: the one on the PATH)",
    )
    return parser


def _serve(config: Config, _arguments: argparse.Namespace) -> int:
    """Be a worker: everything is prepared before the keeper is told, so that a new version can fail unnoticed."""
    from execgate import app  # noqa: PLC0415  (the other commands need not wait for it)
    from execgate.worker import KeeperLink  # noqa: PLC0415

    link = KeeperLink.from_environment(os.environ)
    if link is None:
        raise InvalidArgument("this is the part of `execgate serve` that its keeper starts")
    logs.set_up(config.log_level, config.log_format)
    if config.rootless == "auto":
        enter_podman(os.environ)
    check_audit(config.audit())
    factory = _loop_factory(config.event_loop)
    in_force = policy_in_force(config.policy_path(), config.state_dir, restarted=link.restarted)
    tls = _tls(config, restarted=link.restarted)
    policy = in_force.policy or default_policy_of(config, os.geteuid())
    if link.wait_for_turn():
        in_force.keep(config.state_dir)
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(app.serve(config, link, policy, tls))
    return 0


def _tls(config: Config, *, restarted: bool) -> ssl.SSLContext | None:
    """Read what TLS is spoken with; None where it is not. InvalidArgument.

    Files that cannot be used keep a service from starting, and a reload from happening. But a worker in the place of
    one that has crashed serves all who need no TLS, and the others when the files are mended and reloaded.
    """
    if config.tls is None:
        return None
    try:
        return server_context(config.tls)
    except InvalidArgument as error:
        if not restarted:
            raise
        _log.error("TLS is not spoken until the next reload: %s", error)
        return None


def _reload(config: Config, _arguments: argparse.Namespace) -> int:
    """Ask the keeper for another worker, and say what became of it."""
    before = read_status(config.state_dir)
    keeper = None if before is None else pidfd.open_pidfd(before.keeper)
    if before is None or keeper is None:
        raise Unavailable(f"no service runs on {config.state_dir}", hint="give its --state-dir or --config")
    with contextlib.closing(keeper):
        signal.pidfd_send_signal(keeper.fileno(), signal.SIGHUP)
        deadline = time.monotonic() + _RELOAD_TIMEOUT
        while time.monotonic() < deadline:
            now = read_status(config.state_dir)
            if now is not None and now.worker != before.worker:
                print(f"execgate {now.version} serves, as process {now.worker.pid}")
                return 0
            if now is not None and now.failures > before.failures:
                raise Unavailable(f"the reload failed: {now.failure}; the service goes on as it was", hint=_SEE_LOG)
            time.sleep(_RELOAD_POLL)
    raise Unavailable("the service was not replaced in time", hint=_SEE_LOG)


def _loop_factory(choice: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the event loop: uvloop's where it is installed, unless told otherwise."""
    if choice == "asyncio":
        return None
    try:
        import uvloop  # noqa: PLC0415  (optional)
    except ImportError as error:
        if choice == "uvloop":
            raise InvalidArgument("uvloop is not installed", hint="pip install 'execgate[uvloop]'") from error
        return None
    return uvloop.new_event_loop


def _containers(config: Config, arguments: argparse.Namespace) -> int:
    catalog = catalog_of(config)
    found = catalog.list()
    if arguments.json:
        print(json.dumps([_container(container) for container in found], indent=2))
    else:
        table = [
            (
                shown(c.name),
                c.engine,
                c.runtime.name,
                c.status,
                ago(c.created) if c.created else "",
                shown(c.image),
                c.id[:12] if len(c.id) == 64 else c.id,
            )
            for c in found
        ]
        print_table(("NAME", "ENGINE", "RUNTIME", "STATUS", "CREATED", "IMAGE", "ID"), table)
    for place, reason in catalog.problems():
        print(f"execgate: left out: {shown(place, 512)}: {shown(reason, 512)}", file=sys.stderr)
    return 0


def _container(container: Container) -> dict[str, Any]:
    return {
        "Id": container.id,
        "Name": container.name,
        "Aliases": list(container.aliases),
        "Engine": container.engine,
        "Runtime": container.runtime.name,
        "RuntimePath": str(container.runtime.path),
        "RuntimeRoot": str(container.runtime.root),
        "Status": container.status,
        "Pid": container.init.pid if container.init else 0,
        "Created": rfc3339(container.created or None),
        "Image": container.image,
        "User": container.user,
        "Tty": container.tty,
        "StopTimeout": container.stop_timeout,
        "Labels": dict(container.labels),
        "Bundle": str(container.bundle),
    }


def _list(value: str) -> list[str]:
    return value.replace(",", " ").split()


def _sessions(config: Config, arguments: argparse.Namespace) -> int:
    found = [one for one in read_sessions(config.state_dir / DATABASE) if _is_wanted(one, arguments)]
    if arguments.json:
        print(json.dumps([_session(session) for session in found], indent=2))
    else:
        rows = [
            (
                session.id[:12],
                session.container.name,
                session.state,
                "" if session.exit is None else f"{session.exit.code} ({session.exit.source})",
                ago(session.created_at),
                shown(" ".join(session.config.args)),
            )
            for session in found
        ]
        print_table(("SESSION", "CONTAINER", "STATE", "EXIT", "CREATED", "COMMAND"), rows)
    return 0


def _is_wanted(session: ExecSession, arguments: argparse.Namespace) -> bool:
    wanted = [label.partition("=") for label in arguments.labels]
    labels = session.config.labels
    return (
        arguments.container in (None, session.container.name, session.container.container_id)
        and (arguments.state is None or session.state in _STATES[arguments.state])
        and all(name in labels and (not equals or labels[name] == value) for name, equals, value in wanted)
    )


def _session(session: ExecSession) -> dict[str, Any]:
    return {
        "Id": session.id,
        "ContainerId": session.container.container_id,
        "Container": session.container.name,
        "State": session.state,
        "ExitCode": session.exit.code if session.exit else None,
        "ExitCodeSource": session.exit.source if session.exit else None,
        "TimedOut": session.timed_out,
        "Error": session.error,
        "CreatedAt": rfc3339(session.created_at),
        "StartedAt": rfc3339(session.started_at),
        "FinishedAt": rfc3339(session.finished_at),
        "Pid": session.process.pid if session.process and session.running else 0,
        "Cmd": list(session.config.args),
        "Tty": session.config.tty,
        "User": session.config.user,
        "Labels": dict(session.config.labels),
    }


def _check_config(config: Config, _arguments: argparse.Namespace) -> int:
    """Print the configuration as it would be used, and what of it the host cannot serve."""
    found = config.model_dump(mode="json") | {
        "runtime_roots": [
            f"{root.runtime_name}={root.dir}" if root.runtime_name else str(root.dir) for root in config.roots()
        ],
        "runtimes": {name: str(path) for name, path in config.runtime_paths().items()},
        "conmon": str(config.conmon_path() or ""),
        "policy": str(config.policy_path() or ""),
    }
    places = asdict(config.places())
    found |= {name: str(places[name]) for name in found if name in places and name != "runtimes"}
    print(json.dumps(found, indent=2))
    problems = [
        f"runtime {name}: no program at {path}"
        for name, path in config.runtime_paths().items()
        if not os.access(path, os.X_OK)
    ]
    problems += policy.problems(config)
    problems += [] if config.runtime_paths() else ["neither runc nor crun is installed"]
    conmon = config.conmon_path()
    if conmon is None or not os.access(conmon, os.X_OK):
        problems.append(f"no conmon at {conmon}" if conmon else "conmon is not installed")
    try:
        if config.tls is not None:
            server_context(config.tls)
    except InvalidArgument as error:
        problems.append(str(error))
    for problem in problems:
        print(f"execgate: {problem}", file=sys.stderr)
    return 1 if problems else 0
