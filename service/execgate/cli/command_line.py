"""What there is to type, and what becomes of errors."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from execgate import __version__
from execgate.cli import execute, local, remote, token
from execgate.model.errors import ExecgateError, InvalidArgument, StartFailed

EXIT_FAILURE = 1
EXIT_USAGE = 2
_INTERRUPTED = 130  # 128 + SIGINT


class _Parser(argparse.ArgumentParser):
    """A parser whose command decides which exit code means that it was typed wrongly."""

    usage_exit = EXIT_USAGE

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Let the parser that meets what it does not know say so, not the one above it."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """See argparse."""
        self.print_usage(sys.stderr)
        self.exit(self.usage_exit, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except ExecgateError as error:
        print(f"execgate: {error}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)
        return _exit_code(error, arguments.failure_exit)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # `execgate sessions | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE


def _exit_code(error: ExecgateError, failure: int) -> int:
    if isinstance(error, StartFailed):
        return error.exit_code
    return EXIT_USAGE if isinstance(error, InvalidArgument) and failure == EXIT_FAILURE else failure


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="execgate",
        description="The Docker exec API for the OCI containers of this host.",
        epilog="Every option of the service has a key in the TOML file and a variable EXECGATE_NAME; flags win over "
        "variables, variables over the file.",
    )
    parser.add_argument("--version", action="version", version=f"execgate {__version__}")
    parser.set_defaults(failure_exit=EXIT_FAILURE)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)
    local.add_commands(commands)
    execute.add_commands(commands)
    remote.add_commands(commands)
    token.add_commands(commands)
    return parser
