"""Policies, tokens, and clients that are somebody: what a service with more than one user is tested with."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from execgate.gate.tokens import create_token
from execgate.model.access import Verb
from support.api import RawApi
from support.raw import TIMEOUT, Connection, Target
from support.service import POLICY, TOKENS

EVERYTHING: Mapping[str, Any] = {"privileged": True, "host_equivalent": True, "others": sorted(set(Verb) - {Verb.TOP})}
"""The keys of a rule whose principals may do all."""


def rule(rule_id: str, who: Sequence[str], **keys: Any) -> str:
    """Return a rule as a policy has it. `keys` are those of its table."""
    lines = [
        "[[rule]]",
        *(f"{key} = {json.dumps(value)}" for key, value in {"id": rule_id, "who": who, **keys}.items()),
    ]
    return "\n".join(lines) + "\n"


def write_policy(directory: Path, *rules: str) -> Path:
    """Give the service of `directory` a policy, from its next start or reload on."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / POLICY
    aside = path.with_suffix(".new")
    aside.write_text("\n".join(rules))
    aside.chmod(0o600)
    aside.replace(path)
    return path


def bearer(directory: Path, name: str, lifetime: float | None = None) -> dict[str, str]:
    """Make a token for the service of `directory`, and return the header that shows it."""
    return {"Authorization": f"Bearer {create_token(directory / TOKENS, name, lifetime)}"}


def allow(directory: Path, token: str, who: Sequence[str]) -> dict[str, str]:
    """Let `who` do everything with the service of `directory`; return the header of the token `token`."""
    write_policy(directory, rule("all", who, **EVERYTHING))
    return bearer(directory, token)


@dataclass(frozen=True, slots=True)
class User:
    """A user of the host, by numbers, with its supplementary groups."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    @contextlib.contextmanager
    def being(self) -> Iterator[None]:
        """Be this user for a moment, all of this process: for a connect(2), which is when the kernel looks."""
        groups, gid, uid = os.getgroups(), os.getegid(), os.geteuid()
        os.setgroups(self.groups)
        os.setegid(self.gid)
        os.seteuid(self.uid)
        try:
            yield
        finally:
            os.seteuid(uid)
            os.setegid(gid)
            os.setgroups(groups)


class UserApi(RawApi):
    """One service, as a user of the host finds it at its unix socket."""

    def __init__(self, target: Target, user: User) -> None:
        super().__init__(target)
        self.user = user

    def connect(self, *, timeout: float = TIMEOUT) -> Connection:
        """See `RawApi`."""
        with self.user.being():
            return super().connect(timeout=timeout)
