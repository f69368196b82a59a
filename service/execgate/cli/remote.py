"""The commands that ask a running service about sessions: `attach`, `logs`, `kill`, `stop`, `wait`, `rm`.

A session is named by its id or by the beginning of it, as long as that is the beginning of one only.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from execgate.cli.signals import run_until_signalled
from execgate.cli.terminal import copy_output, interact
from execgate.client import DEFAULT_HOST, Client, Stream
from execgate.config import load
from execgate.http.certificates import TlsFiles
from execgate.model.errors import Conflict, InvalidArgument, NotFound, Unavailable
from execgate.model.ids import SessionId, parse_session_id
from execgate.model.session import ExitSource

HOST_VARIABLE = "EXECGATE_HOST"
TOKEN_VARIABLE = "EXECGATE_TOKEN"  # noqa: S105  (the name of a variable)
CERTIFICATES_VARIABLE = "DOCKER_CERT_PATH"
EXIT_LOST = 125
"""The service, or the request to it, failed: no exit code of a process is known."""

Ask = Callable[[Client, argparse.Namespace], Awaitable[int]]


def add_commands(commands: Any) -> None:
    """Add the commands of this module to a parser's."""
    attach = service_command(
        commands, "attach", _attach, "attach to a running session: its output, its input, its keys"
    )
    attach.set_defaults(failure_exit=EXIT_LOST)
    attach.add_argument("--after", type=_offset, metavar="BYTES", help="replay what was captured, from this offset on")
    attach.add_argument("--no-stdin", action="store_true", help="only look")
    attach.add_argument("session", metavar="SESSION")

    logs = service_command(commands, "logs", _logs, "print the captured output of a session")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the session is over")
    logs.add_argument("--after", type=_offset, default=0, metavar="BYTES", help="begin at this offset (default 0)")
    logs.add_argument("session", metavar="SESSION")

    kill = service_command(commands, "kill", _each(_kill), "send a signal to sessions; KILL ends the whole tree")
    kill.add_argument("-s", "--signal", default="KILL", metavar="SIGNAL", help="a name or a number (default KILL)")
    stop = service_command(commands, "stop", _each(_stop), "end sessions: TERM, then KILL what is left")
    stop.add_argument(
        "-t", "--time", type=seconds_of, metavar="SECONDS", help="between TERM and KILL (default: the service's, 10)"
    )
    wait = service_command(commands, "wait", _each(_wait), "wait for the end of sessions and print their exit codes")
    remove = service_command(commands, "rm", _each(_remove), "forget sessions that are over")
    remove.add_argument("-f", "--force", action="store_true", help="kill those that run")
    for parser in (kill, stop, wait, remove):
        parser.add_argument("sessions", nargs="+", metavar="SESSION")


def service_command(commands: Any, name: str, ask: Ask, text: str) -> Any:
    """Add a command that asks a service, and return its parser."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=lambda arguments: run_until_signalled(_asked(ask, arguments)))
    parser.add_argument(
        "-H",
        "--host",
        metavar="ADDRESS",
        help="the service: unix:///PATH, tls://HOST:PORT or tcp://HOST:PORT "
        f"(default ${HOST_VARIABLE}, else the first of the configuration's `listen`)",
    )
    for flag, file, what in (
        ("--tlscacert", "ca.pem", "the authority that the service's certificate is from"),
        ("--tlscert", "cert.pem", "your certificate"),
        ("--tlskey", "key.pem", "its key"),
    ):
        default = f"${CERTIFICATES_VARIABLE}/{file}"
        parser.add_argument(flag, metavar="FILE", help=f"for tls://: {what} (default {default})")
    parser.add_argument("--token-file", metavar="FILE", help=f"your bearer token (default: ${TOKEN_VARIABLE})")
    parser.add_argument("--config", metavar="FILE", help="TOML file (default /etc/execgate/execgate.toml if it exists)")
    return parser


async def _asked(ask: Ask, arguments: argparse.Namespace) -> int:
    # Who says where the service is need not be allowed to read its configuration.
    host = arguments.host or os.environ.get(HOST_VARIABLE) or _configured_host(arguments)
    async with Client(host, tls=_tls_files(arguments), token=_token(arguments)) as client:
        return await ask(client, arguments)


def _tls_files(arguments: argparse.Namespace) -> TlsFiles:
    """Return the files that were named; those that were not, from where Docker's clients look."""
    directory = os.environ.get(CERTIFICATES_VARIABLE)
    found = TlsFiles.in_directory(Path(directory)) if directory else TlsFiles()
    named = {"ca": arguments.tlscacert, "certificate": arguments.tlscert, "key": arguments.tlskey}
    return replace(found, **{field: Path(name) for field, name in named.items() if name})


def _token(arguments: argparse.Namespace) -> str:
    """Return the bearer token, "" without one. InvalidArgument for a file that cannot be read."""
    if not arguments.token_file:
        return os.environ.get(TOKEN_VARIABLE, "")
    try:
        return Path(arguments.token_file).read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        text = getattr(error, "strerror", None) or "it is no text"
        raise InvalidArgument(f"{arguments.token_file}: {text}") from error


def _configured_host(arguments: argparse.Namespace) -> str:
    listen = load(vars(arguments), os.environ).listen
    return listen[0] if listen else DEFAULT_HOST


async def find_session(client: Client, text: str) -> SessionId:
    """Return the id that `text` is, or is the only beginning of. NotFound; InvalidArgument when it is of several."""
    if known := parse_session_id(text):
        return known
    found = [one.id for one in await client.sessions() if text and one.id.startswith(text)]
    if not found:
        raise NotFound(f"no exec session's id begins with {text[:64]!r}")
    if len(found) > 1:
        raise InvalidArgument(f"the ids of {len(found)} exec sessions begin with {text[:64]!r}")
    return found[0]


def _each(do: Callable[[Client, SessionId, argparse.Namespace], Awaitable[str]]) -> Ask:
    """Return a command that does the same with several sessions, and prints a line for each."""

    async def ask(client: Client, arguments: argparse.Namespace) -> int:
        for text in arguments.sessions:
            line = await do(client, await find_session(client, text), arguments)
            print(line or text, flush=True)
        return 0

    return ask


async def _kill(client: Client, session_id: SessionId, arguments: argparse.Namespace) -> str:
    await client.kill(session_id, arguments.signal)
    return ""


async def _stop(client: Client, session_id: SessionId, arguments: argparse.Namespace) -> str:
    await client.stop(session_id, arguments.time)
    return ""


async def _wait(client: Client, session_id: SessionId, _arguments: argparse.Namespace) -> str:
    return str((await client.wait(session_id)).exit_code)


async def _remove(client: Client, session_id: SessionId, arguments: argparse.Namespace) -> str:
    await client.remove(session_id, force=arguments.force)
    return ""


async def _logs(client: Client, arguments: argparse.Namespace) -> int:
    session_id = await find_session(client, arguments.session)
    async with await client.logs(session_id, after=arguments.after, follow=arguments.follow) as output:
        _tell_gap(arguments.after, output.offset)
        await copy_output(output)
    return 0


async def _attach(client: Client, arguments: argparse.Namespace) -> int:
    session_id = await find_session(client, arguments.session)
    session = await client.inspect(session_id)
    stdin = session.running and session.attach_stdin and not arguments.no_stdin
    stream = await client.attach(session_id, after=arguments.after, stdin=stdin)
    _tell_gap(arguments.after or 0, stream.offset)
    return await attend(client, session_id, stream, tty=session.tty, stdin=stdin)


async def attend(client: Client, session_id: SessionId, stream: Stream, *, tty: bool, stdin: bool) -> int:
    """Connect the user with a session until it is over, and return its exit code; 0 when the user has detached.

    When the connection breaks because the service has crashed, a user without input is attached again. Of input nobody
    knows how much the process has got, so there that is left to the user. Unavailable.
    """
    while True:
        broken: Unavailable | None = None
        async with stream:
            try:
                await interact(stream, tty=tty, stdin=stdin)
            except Unavailable as error:
                broken = error
        session = await client.inspect(session_id)
        captured = session.capture_stdout and session.capture_stderr
        if session.exit is not None:
            if captured and session.exit.source is not ExitSource.START_FAILURE:
                await _copy_rest(client, session_id, stream.position)
            return session.exit.code
        hint = f"`execgate attach {session_id[:12]}` comes back to it"
        if broken is None and tty and stdin:
            print(f"execgate: detached; {hint}", file=sys.stderr)
            return 0
        if stdin:
            raise Unavailable("the connection to the service broke; the session goes on", hint=hint)
        try:
            stream = await client.attach(session_id, after=stream.position if captured else None, stdin=False)
        except Conflict:  # it is over meanwhile, and the next look tells how
            continue
        if not captured:
            print("execgate: the connection to the service broke; some output may be missing", file=sys.stderr)


async def _copy_rest(client: Client, session_id: SessionId, position: int) -> None:
    """Print what is captured behind `position`: the stream of a session that is over may have been cut before."""
    with contextlib.suppress(InvalidArgument, NotFound):  # there is less, or nothing any more
        async with await client.logs(session_id, after=position) as output:
            await copy_output(output)


def _tell_gap(after: int, offset: int) -> None:
    if offset > after:
        print(f"execgate: output from {after} to {offset} was dropped", file=sys.stderr)


def _offset(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes")
    return int(text)


def seconds_of(text: str) -> float:
    """Parse an option that is a time in seconds."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds
