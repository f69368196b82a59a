"""Where the policy comes from: its file, the rule that holds without one, and the last one that was good.

The theory. A file that cannot be read or understood is refused as a whole, with all that is wrong in it at once, and
no service starts with it. A reload fails: the worker that runs goes on with what it has. But a worker that has crashed
must be replaced, whatever somebody has meanwhile done to the file. So the text of the policy in force is kept in the
state directory, and such a worker takes that, and says so where the file is another one by now. It never takes the rule
of a service without a policy instead: that a file is gone permits nothing.
"""

import contextlib
import grp
import logging
import os
import pwd
import re
import stat
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from execgate.containers.files import read_bounded
from execgate.gate.rules import ALL_VERBS, Policy, Rule, Who
from execgate.gate.tables import Ids, RuleTable, in_words
from execgate.model.access import Verb
from execgate.model.errors import InvalidArgument
from execgate.oci.text import shown

log = logging.getLogger(__name__)

MAX_FILE = 1024 * 1024
"""Bytes of a policy."""

MAX_RULES = 10_000

COPY = "policy.toml"
"""The policy in force, in the state directory; empty when there is none."""

_MAX_MISTAKES = 50


def load_policy(path: Path) -> Policy:
    """Read a policy. InvalidArgument: it cannot be read, others could write it, or it has mistakes; all are named."""
    return parse_policy(_read(path), str(path))


def default_policy(owner_uid: int, *, allow_privileged: bool, allow_host_equivalent: bool) -> Policy:
    """Return the policy of a service without one: its own user may do all, but what gives the host only if told so."""
    owner = Who(text=f"uid:{owner_uid}", uids=frozenset({owner_uid}))
    rule = Rule(
        id="owner",
        who=owner,
        privileged=allow_privileged,
        host_equivalent=allow_host_equivalent,
        others=ALL_VERBS - {Verb.TOP},
    )
    return Policy((rule,))


@dataclass(frozen=True, slots=True)
class PolicyInForce:
    """What a service goes by: `policy`, None for that of a service without one; `text` is what it was read from."""

    policy: Policy | None
    text: bytes

    def keep(self, state_dir: Path) -> None:
        """Keep it for a worker that takes the place of this one; to be called when its time has come, not before."""
        _keep(state_dir / COPY, self.text)


def policy_in_force(path: Path | None, state_dir: Path, *, restarted: bool) -> PolicyInForce:
    """Return the policy that a worker goes by. InvalidArgument when there is none that it could go by.

    `path` is None when there is no file. `restarted`: this worker takes the place of one that crashes, and goes by what
    that one had, whatever has become of the file: a change comes into force when somebody says so, and not by accident.
    """
    if restarted and (kept := _kept(state_dir / COPY)) is not None:
        if difference := _difference(path, kept.text):
            log.error("the policy that was in force stays so: %s", difference)
        return kept
    if path is None and restarted and (state_dir / COPY).exists():
        raise InvalidArgument("the policy that was in force is lost, and it has no file", hint=f"{state_dir / COPY}")
    text = _read(path) if path is not None else b""
    return PolicyInForce(parse_policy(text, str(path)) if path is not None else None, text)


def _kept(copy: Path) -> PolicyInForce | None:
    """Return what an earlier worker went by; None when that is not known, or not to be trusted."""
    try:
        text = _read(copy) if copy.exists() else None
        if text is None:
            return None
        return PolicyInForce(parse_policy(text, str(copy), _id_or_nobody) if text else None, text)
    except InvalidArgument as error:
        log.error("the policy that was in force is lost: %s", error)
        return None


def _difference(path: Path | None, kept: bytes) -> str:
    """Return what a reload would say, or do, to a policy that was read before; nothing when it is the same."""
    try:
        now = _read(path) if path is not None else b""
    except InvalidArgument as error:
        return str(error)
    if now == kept:
        return ""
    return (
        f"{path} was changed, and not reloaded" if path is not None else "its file is gone, and that was not reloaded"
    )


def parse_policy(text: bytes, source: str, ids: Ids | None = None) -> Policy:
    """Return the policy in a file's contents; `source` is its name for messages. InvalidArgument names all mistakes."""
    mistakes: list[str] = []
    rules: list[Rule] = []
    tables = _tables(text, source)
    lines = _Lines(text.decode(), len(tables))
    look_up = cache(ids or _id_of)
    for index, table in enumerate(tables):
        try:
            rules.append(RuleTable.model_validate(table, context=look_up).rule())
        except ValidationError as error:
            mistakes += [lines.place(index, table, one) for one in error.errors()]
    known = Counter(table["id"] for table in tables if isinstance(table.get("id"), str))
    mistakes += [f"{count} rules have the id {shown(one)}" for one, count in known.items() if count > 1]
    if mistakes:
        left_out = len(mistakes[_MAX_MISTAKES:])
        mistakes[_MAX_MISTAKES:] = [f"and {left_out} more"] if left_out else []
        raise InvalidArgument("\n".join(f"{source}: {one}" for one in mistakes))
    return Policy(tuple(rules))


def _tables(text: bytes, source: str) -> Sequence[Mapping[str, Any]]:
    """Return what stands below each `[[rule]]`. InvalidArgument when the file has anything else, or nothing."""
    try:
        document = tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8
        raise InvalidArgument(f"{source}: {error}") from error
    tables = document.pop("rule", [])
    if document:
        raise InvalidArgument(f"{source}: {shown(next(iter(document)))}: there is nothing but [[rule]] in a policy")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InvalidArgument(f"{source}: rule: write [[rule]] above each rule")
    if not tables:
        raise InvalidArgument(f"{source}: no [[rule]] in it: nobody could do anything")
    if len(tables) > MAX_RULES:
        raise InvalidArgument(f"{source}: {len(tables)} rules, {MAX_RULES} at most")
    return tables


# -- the file ----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> bytes:
    """Return what is in the file of a policy, if nobody but root and the service's user can write it. InvalidArgument.

    The one that is examined is the one that is read; links to it are followed, as they are how files are mounted
    into a container.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            flaw = _flaw(os.fstat(fd))
            data = b"" if flaw else read_bounded(fd, MAX_FILE + 1)
        finally:
            os.close(fd)
    except OSError as error:
        raise InvalidArgument(f"{path}: {error.strerror}") from error
    except ValueError as error:  # a NUL in the path
        raise InvalidArgument(f"{str(path)!r} cannot be the name of a file") from error
    if flaw:
        raise InvalidArgument(f"{path}: {flaw[0]}", hint=flaw[1].format(path=path))
    if len(data) > MAX_FILE:
        raise InvalidArgument(f"{path}: larger than {MAX_FILE} bytes")
    return data


def _flaw(status: os.stat_result) -> tuple[str, str] | None:
    """Return what is wrong with a file, and what to do about it."""
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file", ""
    if status.st_uid not in (0, os.geteuid()):
        return f"it belongs to uid {status.st_uid}, who could change it", "chown root:root {path}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"its mode {stat.S_IMODE(status.st_mode):04o} lets others write it", "chmod go-w {path}"
    return None


def _keep(copy: Path, text: bytes) -> None:
    """Keep the policy in force for a worker that comes after a crash."""
    new = copy.with_name(f"{COPY}.new")
    try:
        copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            new.unlink()
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:  # noqa: PTH123  (a descriptor)
            file.write(text)
        new.replace(copy)
    except OSError as error:
        log.warning("the policy cannot be kept in %s: %s", copy, error.strerror)
        with contextlib.suppress(OSError):  # an older one must not come into force again
            copy.unlink()


class _Lines:
    """Where the rules are in a file: TOML's parser does not tell, so the lines are looked at, for messages only."""

    _HEADER = re.compile(r"\s*\[\[\s*(?:rule|\"rule\"|'rule')\s*\]\]\s*(?:#.*)?")

    def __init__(self, text: str, rules: int) -> None:
        self._lines = text.split("\n")
        found = [number for number, line in enumerate(self._lines) if self._HEADER.fullmatch(line)]
        self._headers = found if len(found) == rules else []  # rules can be written in other ways, too

    def place(self, index: int, table: Mapping[str, Any], problem: Any) -> str:
        """Return what is wrong with a rule, and where."""
        key = str(problem["loc"][0]) if problem["loc"] else ""
        inner = "".join(f"[{part}]" for part in problem["loc"][1:] if isinstance(part, int))
        name = table.get("id")
        rule = f"rule {shown(name, 64)}" if isinstance(name, str) else f"rule number {index + 1}"
        line = self._line_of(index, key)
        return f"{rule}{f' (line {line})' if line else ''}: {shown(key)}{inner}: {in_words(problem)}"

    def _line_of(self, index: int, key: str) -> int:
        """Return the line of a key of a rule, of the rule's beginning without it; 0 if that is not known."""
        if not self._headers:
            return 0
        begin = self._headers[index]
        end = self._headers[index + 1] if index + 1 < len(self._headers) else len(self._lines)
        is_key = re.compile(rf"\s*{re.escape(key)}\s*[=.]")
        return next((n for n in range(begin, end) if key and is_key.match(self._lines[n])), begin) + 1


# -- the names ---------------------------------------------------------------------------------------------------------


def _id_of(kind: str, name: str) -> int:
    """Return the number of a user or group of this host."""
    try:
        return pwd.getpwnam(name).pw_uid if kind == "user" else grp.getgrnam(name).gr_gid
    except (KeyError, ValueError) as error:
        raise ValueError(f"this host has no {kind} {shown(name)!r}") from error


def _id_or_nobody(kind: str, name: str) -> int | None:
    """Return the number of a user or group; one that is gone since the policy was read means nobody."""
    try:
        return _id_of(kind, name)
    except ValueError as error:
        log.error("the policy speaks of nobody: %s", error)
        return None
