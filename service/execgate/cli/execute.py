"""`execgate exec`: run a command in a container, like `docker exec`, and what Docker's has no flag for.

Its exit code is the process's; 126 and 127 when the process could not be started; 125 when the service could not be
reached or refused.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from execgate.cli.remote import EXIT_LOST, attend, seconds_of, service_command
from execgate.cli.terminal import window_size
from execgate.client import Client
from execgate.model.config import OnDisconnect
from execgate.model.errors import InvalidArgument
from execgate.model.options import ExecOptions
from execgate.wire.detach_keys import parse_detach_keys

_EPILOG = """\
The exit code is the command's; 126 or 127 when it could not be started, 125 when the service could not be reached or
refused. ctrl-p ctrl-q leaves a terminal session running. With -d the session's id is printed."""


def add_commands(commands: Any) -> None:
    """Add the command of this module to a parser's."""
    parser = service_command(commands, "exec", _exec, "run a command in a running container")
    parser.usage_exit = EXIT_LOST
    parser.set_defaults(failure_exit=EXIT_LOST)
    parser.epilog = _EPILOG
    parser.add_argument("-i", "--interactive", action="store_true", help="attach stdin")
    parser.add_argument("-t", "--tty", action="store_true", help="give the command a terminal")
    parser.add_argument("-d", "--detach", action="store_true", help="do not attach: print the session's id")
    parser.add_argument(
        "-e",
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="set a variable, by default to the value that it has here; repeatable",
    )
    parser.add_argument("--env-file", action="append", default=[], metavar="FILE", help="set the variables of a file")
    parser.add_argument("-w", "--workdir", default="", metavar="DIR", help="where the command runs")
    parser.add_argument("-u", "--user", default="", metavar="USER[:GROUP]", help="as whom it runs")
    parser.add_argument("--privileged", action="store_true", help="give it all capabilities")
    parser.add_argument("--detach-keys", default="", metavar="KEYS", help="default ctrl-p,ctrl-q")
    parser.add_argument(
        "--timeout", type=seconds_of, metavar="SECONDS", help="end it with TERM, and soon KILL, after this time"
    )
    parser.add_argument(
        "--idle-timeout",
        type=seconds_of,
        metavar="SECONDS",
        help="end it in the same way when no byte has moved, in either direction, for this time",
    )
    parser.add_argument(
        "-l", "--label", dest="labels", action="append", default=[], metavar="K=V", help="label the session; repeatable"
    )
    parser.add_argument(
        "--capture", action="store_true", help="keep the output for `execgate logs` and `attach --after`"
    )
    parser.add_argument(
        "--on-disconnect",
        choices=[choice.value for choice in OnDisconnect if choice.value],
        default="",
        help="what to do when this command goes before the process: keep its stdin open, hang up, or kill "
        "(default: end its stdin)",
    )
    parser.add_argument("container", metavar="CONTAINER")
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="COMMAND …")


async def _exec(client: Client, arguments: argparse.Namespace) -> int:
    args, options = arguments.args, _options(arguments)
    if args[:1] == ["--"]:
        args = args[1:]
    if not args:
        raise InvalidArgument(
            "exec needs a container and a command", hint="execgate exec [OPTIONS] CONTAINER COMMAND …"
        )
    attached = not arguments.detach
    if attached and arguments.tty and arguments.interactive and not sys.stdin.isatty():
        raise InvalidArgument("the input device is not a TTY")
    session_id = await client.create(arguments.container, args, **options)
    if not attached:
        await client.start_detached(session_id)
        print(session_id)
        return 0
    stream = await client.start(session_id, size=options["console_size"])
    return await attend(client, session_id, stream, tty=arguments.tty, stdin=arguments.interactive)


def _options(arguments: argparse.Namespace) -> ExecOptions:
    labels = dict(label.partition("=")[::2] for label in arguments.labels)
    options = ExecOptions(
        tty=arguments.tty,
        console_size=window_size() if arguments.tty else None,
        attach_stdin=arguments.interactive,
        env=environment(arguments.env, arguments.env_file, os.environ),
        privileged=arguments.privileged,
        user=arguments.user,
        working_dir=arguments.workdir,
        timeout=arguments.timeout or None,
        idle_timeout=arguments.idle_timeout or None,
        labels=labels,
        capture_stdout=arguments.capture,
        capture_stderr=arguments.capture,
        on_disconnect=OnDisconnect(arguments.on_disconnect),
    )
    if arguments.detach_keys:
        options["detach_keys"] = parse_detach_keys(arguments.detach_keys)
    return options


def environment(flags: Sequence[str], files: Sequence[str], own: Mapping[str, str]) -> list[str]:
    """Return `NAME=VALUE` entries, files first; a bare name takes its value from `own`, and is left out without one.

    InvalidArgument for a file that cannot be read.
    """
    lines = [line for file in files for line in _env_lines(Path(file))]
    entries = []
    for entry in (*lines, *flags):
        name, equals, _ = entry.partition("=")
        if equals:
            entries.append(entry)
        elif name in own:
            entries.append(f"{name}={own[name]}")
    return entries


def _env_lines(path: Path) -> list[str]:
    """Return the entries of a file: one a line; empty lines and those that begin with # are none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    return [line.lstrip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
