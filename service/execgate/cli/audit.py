"""`execgate audit`: whether an audit log is whole, and what it says."""

import argparse
import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from execgate.config import load
from execgate.gate.audit_chain import MAX_LINE, Entry, Finding, Verifier, escape, parse
from execgate.model.errors import InvalidArgument

_STDIN = "-"
_BROKEN = 1
_MAX_TEXT = 300

Line = tuple[str, bytes, bool]
"""A place (`FILE:LINE`), a line without its newline, and whether it had one."""


def add_command(commands: Any) -> None:
    """Add `audit` to a parser's commands."""
    parser = commands.add_parser(
        "audit", help="check and show the audit log", description="Check and show the audit log."
    )
    kinds = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    verify = _command(kinds, "verify", _verify, "check that nothing of an audit log was changed")
    verify.add_argument("--expect-seq", type=int, metavar="N", help="fail without the entry of this number")
    verify.add_argument(
        "--expect-hash", metavar="SHA256", help="fail without the entry of this hash (with that number)"
    )
    show = _command(kinds, "show", _show, "show an audit log, or what of it is asked for")
    show.add_argument("--json", action="store_true", help="print the entries as they are, one a line")
    show.add_argument("--who", metavar="ID", help="only what this principal did: unix:1000, cert:NAME, token:NAME")
    show.add_argument("--container", metavar="NAME", help="only what was done in this container, by name or id")
    show.add_argument("--session", metavar="ID", help="only this session; the beginning of its id will do")
    show.add_argument("--event", dest="events", action="append", metavar="EVENT", help="only these: exit, denied, …")


def _command(kinds: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=text, description=text.capitalize() + ".")
    parser.set_defaults(command=run)
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="one: with the files that were rotated away beside it (FILE.1 …); more: these, the oldest first; "
        "-: standard input (default: the configured `audit_file`)",
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file (default /etc/execgate/execgate.toml if it exists)")
    return parser


def _verify(arguments: argparse.Namespace) -> int:
    """Check the chain; 1 when it is broken, or lacks what is expected."""
    expected = arguments.expect_hash
    if expected is not None and not re.fullmatch(r"[0-9a-f]{64}", expected.lower()):
        raise InvalidArgument("--expect-hash takes 64 hexadecimal digits")
    verifier = Verifier(expected_seq=arguments.expect_seq, expected_hash=expected and expected.lower())
    for place, line, whole in _lines(arguments):
        verifier.feed(line, place, whole=whole)
    verifier.finish()
    for kind, findings in (("BROKEN", verifier.breaks), ("note", verifier.notes)):
        for finding in findings:
            print(f"{kind}  {_told(finding)}")
    if (more := verifier.findings - len(verifier.breaks) - len(verifier.notes)) > 0:
        print(f"… and {more} more")
    _print_end(verifier)
    return 0 if verifier.whole else _BROKEN


def _print_end(verifier: Verifier) -> None:
    if verifier.last is None:
        print("no entries")
    else:
        print(f"{verifier.entries} entries, seq {verifier.first} to {verifier.last.seq}")
        print(f"last   --expect-seq {verifier.last.seq} --expect-hash {verifier.last.digest}")
    expects = verifier.expected_seq is not None or verifier.expected_hash is not None
    if verifier.breaks:
        print("the chain is BROKEN")
    elif expects and not verifier.met:
        print("the chain is whole, but the entry that is expected is MISSING: the log was cut off or written anew")
    else:
        print("the chain is whole")


def _show(arguments: argparse.Namespace) -> int:
    """Print the entries that are asked for; 1 when lines are no entries."""
    strange = 0
    for place, line, _ in _lines(arguments):
        entry = parse(line)
        if entry is None:
            strange += 1
            print(f"execgate: {escaped(place)} is no entry of an audit log", file=sys.stderr)
        elif _is_wanted(entry, arguments):
            # Made anew: what stands in the file may not be ours.
            print(escape(dict(entry.fields)) if arguments.json else _text(entry))
    return _BROKEN if strange else 0


def _is_wanted(entry: Entry, arguments: argparse.Namespace) -> bool:
    fields = entry.fields
    return (
        arguments.who in (None, fields.get("who"))
        and (arguments.container in (None, fields.get("container_id"), fields.get("container_name")))
        and (arguments.session is None or str(fields.get("session", "")).startswith(arguments.session))
        and (not arguments.events or entry.event in arguments.events)
    )


_COLUMNS = ("time", "event", "who", "container_name", "session")
_CHAIN = {"seq", "prev", "container_id", "start_time", *_COLUMNS}


def _text(entry: Entry) -> str:
    """Return an entry as a line for people: when, what, who, where, which session; then the rest of it."""
    fields = entry.fields
    time, event, who, container, session = (escaped(str(fields.get(name) or "-")) for name in _COLUMNS)
    rest = [f"{escaped(name)}={_value(value)}" for name, value in fields.items() if name not in _CHAIN and value != ""]
    return f"{time}  {event:<8}  {who:<12}  {container:<16}  {session[:12]:<12}  {' '.join(rest)}".rstrip()


def _value(value: object) -> str:
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        text = shlex.join(value)
        text = f"[{text}]"
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    text = escaped(text)
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"


def escaped(text: str) -> str:
    """Return text with everything in it spelt out that a terminal might obey, or not show."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _told(finding: Finding) -> str:
    return f"{escaped(finding.place)}: {finding.text}"


# -- reading -----------------------------------------------------------------------------------------------------------


def _lines(arguments: argparse.Namespace) -> Iterator[Line]:
    """Yield every line, the oldest first. InvalidArgument for what cannot be read."""
    with contextlib.ExitStack() as opened:
        for name, file in _files(arguments, opened):
            number = 0
            try:
                while line := file.readline(MAX_LINE):  # a longer one is none of ours, in whatever pieces
                    number += 1
                    yield f"{name}:{number}", line.removesuffix(b"\n"), line.endswith(b"\n")
            except OSError as error:
                raise InvalidArgument(f"{name}: {error.strerror}") from error


def _files(arguments: argparse.Namespace, opened: contextlib.ExitStack) -> Sequence[tuple[str, BinaryIO]]:
    names = arguments.files
    if not names:
        configured = load(vars(arguments), os.environ).audit_file
        if configured is None:
            raise InvalidArgument("no audit log is configured (audit_file): name a file")
        names = [str(configured)]
    if len(names) > 1:
        return [_opened(name, opened) for name in names]
    if names == [_STDIN]:
        return [(_STDIN, sys.stdin.buffer)]
    return _rotated(names[0], opened)


def _rotated(name: str, opened: contextlib.ExitStack) -> Sequence[tuple[str, BinaryIO]]:
    """Open a file and those that it was before, the oldest first.

    The newest is opened first: if the log is rotated meanwhile, one of them is found twice, and none is missed.
    """
    numbers = [path.name.rpartition(".")[2] for path in Path(name).parent.glob(f"{_literal(Path(name).name)}.*")]
    older = sorted(int(one) for one in numbers if one.isascii() and one.isdigit())
    found: list[tuple[str, BinaryIO]] = []
    seen = set()
    for one in (name, *(f"{name}.{number}" for number in older)):
        told, file = _opened(one, opened)
        status = os.fstat(file.fileno())
        if (status.st_dev, status.st_ino) not in seen:
            found.insert(0, (told, file))
        seen.add((status.st_dev, status.st_ino))
    return found


def _opened(name: str, opened: contextlib.ExitStack) -> tuple[str, BinaryIO]:
    try:
        return name, opened.enter_context(open(name, "rb"))  # noqa: PTH123  (the name is told as it was typed)
    except OSError as error:
        raise InvalidArgument(f"{name}: {error.strerror}") from error


def _literal(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)
