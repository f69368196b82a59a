"""`execgate token`: make, list and revoke the bearer tokens that a service accepts."""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from execgate.cli.tables import ago, print_table, rfc3339
from execgate.config import load
from execgate.gate.tokens import create_token, read_tokens, revoke_token
from execgate.model.durations import parse_duration
from execgate.model.errors import InvalidArgument


def add_commands(commands: Any) -> None:
    """Add the command to a parser's."""
    text = "make, list and revoke bearer tokens"
    token = commands.add_parser("token", help=text, description=f"{text.capitalize()}. A policy says what each may do.")
    actions = token.add_subparsers(title="actions", required=True, metavar="ACTION")
    create = _action(actions, "create", _create, "make a token, and print its secret, which is not kept anywhere")
    create.add_argument("name", metavar="NAME", help="what rules and logs call it: token:NAME")
    create.add_argument("--expires", metavar="TIME", help="how long it holds: 90s, 15m, 12h, 30d (default: for ever)")
    listing = _action(actions, "list", _list, "show the tokens, without their secrets")
    listing.add_argument("--json", action="store_true", help="print JSON instead of a table")
    revoke = _action(actions, "revoke", _revoke, "make a token void, at once")
    revoke.add_argument("name", metavar="NAME")


def _action(
    actions: Any, name: str, run: Callable[[Path, argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text.capitalize() + ".")
    parser.set_defaults(command=lambda arguments: run(load(vars(arguments), os.environ).tokens, arguments))
    parser.add_argument("--config", metavar="FILE", help="TOML file (default /etc/execgate/execgate.toml if it exists)")
    parser.add_argument("--tokens", metavar="FILE", help="where tokens are kept (default /etc/execgate/tokens)")
    return parser


def _create(path: Path, arguments: argparse.Namespace) -> int:
    try:
        lifetime = parse_duration(arguments.expires) if arguments.expires is not None else None
    except ValueError as error:
        raise InvalidArgument(f"--expires: {error}") from error
    if lifetime == 0:
        raise InvalidArgument("--expires: a token that has expired already is of no use")
    print(create_token(path, arguments.name, lifetime))
    return 0


def _list(path: Path, arguments: argparse.Namespace) -> int:
    tokens = sorted(read_tokens(path), key=lambda token: token.name)
    if arguments.json:
        shown = [
            {**asdict(token), "created": rfc3339(token.created), "expires": rfc3339(token.expires or None)}
            for token in tokens
        ]
        print(json.dumps(shown, indent=2))
        return 0
    now = time.time()
    rows = [
        [
            token.name,
            ago(token.created),
            "never" if not token.expires else "expired" if token.is_expired(now) else rfc3339(token.expires) or "",
        ]
        for token in tokens
    ]
    print_table(["NAME", "CREATED", "EXPIRES"], rows)
    return 0


def _revoke(path: Path, arguments: argparse.Namespace) -> int:
    revoke_token(path, arguments.name)
    return 0
