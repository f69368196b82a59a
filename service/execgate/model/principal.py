"""Who asks: the identity that a request or a program has proven."""

from dataclasses import dataclass
from enum import StrEnum


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
    name, a token's name. `names` are all that a rule may call it by, `name` among them: further alternative names of a
    certificate. `uid` and `gids` are those of a unix peer, its primary group among them; `pid` is its process, as far
    as we can see it (0: not), and good for a log only.
    """

    method: Method
    name: str
    names: frozenset[str] = frozenset()
    uid: int | None = None
    gids: frozenset[int] = frozenset()
    pid: int = 0

    @property
    def id(self) -> str:
        """What sessions belong to, and logs say: `unix:1000`, `cert:alice@example.org`, `token:ci`."""
        return f"{self.method}:{self.name}"


PROGRAM = Principal(method=Method.PROGRAM, name="self")
"""A program that embeds the engine: it has the rights of its process, and needs none of us."""
