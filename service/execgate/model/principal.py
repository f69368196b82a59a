"""Who asks: the identity that a request or a program has proven."""

import re
from dataclasses import dataclass
from enum import StrEnum

_TYPED = re.compile(r"(?:email|dns|uri|ip):")
_ADDRESS = re.compile(r"[0-9.*?]+|[0-9A-Fa-f:.*?]*:[0-9A-Fa-f:.*?]*")


class Method(StrEnum):
    """How an identity is proven: by the kernel, by a certificate, by a secret; a program that embeds us is trusted."""

    UNIX = "unix"
    CERTIFICATE = "cert"
    TOKEN = "token"  # noqa: S105  (the name of a method)
    PROGRAM = "program"


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """One identity.

    `name` is what tells it from the others of its method: a uid in decimal, a certificate's first subject alternative
    name (`certificate_name`), a token's name. `names` are all that a rule may call it by, `name` among them: further
    alternative names of a certificate. `uid` and `gids` are those of a unix peer, its primary group among them; `pid`
    is its process, as far as we can see it (0: not), and good for a log only.
    """

    method: Method
    name: str
    names: frozenset[str] = frozenset()
    uid: int | None = None
    gids: frozenset[int] = frozenset()
    pid: int = 0

    @property
    def id(self) -> str:
        """What sessions belong to, and logs say: `unix:1000`, `cert:email:alice@example.org`, `token:ci`."""
        return f"{self.method}:{self.name}"


def certificate_name(text: str) -> str:
    """Return a subject alternative name, or a glob of some, as certificates' names are compared: with its type.

    `email:alice@example.org`, `dns:ci.example.org`, `uri:spiffe://example.org/ci`, `ip:192.0.2.7`. So no type can pass
    for another, and no glob that is meant for one matches another. A text without a type is of the one that it looks
    like. `*` and `**`, alone, are every name.
    """
    if text in ("*", "**"):
        return text
    if _TYPED.match(text):
        kind, _, name = text.partition(":")
    elif _ADDRESS.fullmatch(text):
        kind, name = "ip", text
    elif ":" in text:
        kind, name = "uri", text
    else:
        kind, name = "email" if "@" in text else "dns", text
    if kind == "dns":
        name = name.lower()
    elif kind == "email":  # its local part is that host's to compare (RFC 5321, 2.4)
        local, at, host = name.rpartition("@")
        name = f"{local}{at}{host.lower()}"
    return f"{kind}:{name}"


PROGRAM = Principal(method=Method.PROGRAM, name="self")
"""A program that embeds the engine: it has the rights of its process, and needs none of us."""
