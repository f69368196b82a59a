"""Bearer tokens: made by an administrator, shown once, kept as hashes.

The file is a JSON object a line: name, SHA-256 of the secret, when it was made and until when it holds, in seconds
since the epoch. A secret has 256 random bits, so a fast hash is enough: nobody can guess his way to it. The service
looks at the file's stat for each request, so what is revoked is void at once, without a reload.
"""

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from execgate.model.errors import Conflict, InvalidArgument, NotFound, Unavailable
from execgate.model.principal import Method, Principal

log = logging.getLogger(__name__)

PREFIX = "execgate_"
"""Begins every token, so that scanners for secrets find one that was published."""

MAX_TOKEN = 256
"""Bytes of what is looked at as a token."""

_UNKNOWN = ()
"""In place of what a stat has told: that of no file."""

_MAX_FILE = 4 * 1024 * 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Token:
    """One token as it is kept. `expires` is 0 for one that does not."""

    name: str
    sha256: str
    created: float
    expires: float = 0.0

    def is_expired(self, now: float) -> bool:
        """Return whether its time is over at `now`, in seconds since the epoch."""
        return bool(self.expires) and now >= self.expires


class Tokens:
    """The tokens that a service accepts: those in a file, which need not exist."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._key: tuple[int, ...] | None = None
        self._by_hash: dict[str, Token] = {}

    def principal(self, secret: str) -> Principal | None:
        """Return who a token stands for; None for one that is unknown, revoked or expired."""
        if len(secret) > MAX_TOKEN:
            return None
        self._refresh()
        digest = _hash(secret)
        token = self._by_hash.get(digest)
        if token is None or not hmac.compare_digest(token.sha256, digest) or token.is_expired(time.time()):
            return None
        return Principal(method=Method.TOKEN, name=token.name, names=frozenset({token.name}))

    def _refresh(self) -> None:
        key: tuple[int, ...] | None
        try:
            status = self._path.stat()
        except OSError:
            key = None
        else:
            key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if key == self._key:
            return
        try:
            self._by_hash = {token.sha256: token for token in read_tokens(self._path)}
        except (InvalidArgument, Unavailable) as error:
            # Nobody is let in by a file that somebody else may have written.
            log.error("no token is accepted: %s (%s)", error, error.hint)
            self._by_hash = {}
            if isinstance(error, Unavailable):  # the host may be out of descriptors: the same file can be read later
                key = _UNKNOWN
        self._key = key


def read_tokens(path: Path) -> list[Token]:
    """Return the tokens of a file, none when there is none. InvalidArgument when it is not to be trusted."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Unavailable("the tokens cannot be read", hint=f"{path}: {error.strerror}") from error
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o077:
            raise InvalidArgument(
                f"{path} is not to be trusted", hint="it must be a file of root or of the service, with mode 0600"
            )
        text = file.read(_MAX_FILE + 1)
    if len(text) > _MAX_FILE:
        raise InvalidArgument(f"{path} is too large", hint=f"{_MAX_FILE} bytes are read at most")
    return [_parsed(path, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def create_token(path: Path, name: str, lifetime: float | None = None) -> str:
    """Make a token that holds for `lifetime` seconds, None: until it is revoked; return the secret.

    Conflict when the name is taken by one that holds; InvalidArgument, Unavailable.
    """
    if not _NAME.fullmatch(name):
        raise InvalidArgument(f"{name!r} cannot be a token's name", hint="letters, digits, '.', '_' and '-', up to 64")
    now = time.time()
    secret = PREFIX + secrets.token_urlsafe(32)
    with _changing(path) as tokens:
        tokens[:] = [token for token in tokens if not (token.name == name and token.is_expired(now))]
        if any(token.name == name for token in tokens):
            raise Conflict(f"there is a token {name!r} already", hint=f"execgate token revoke {name}")
        tokens.append(Token(name, _hash(secret), now, 0.0 if lifetime is None else float(round(now + lifetime))))
    return secret


def revoke_token(path: Path, name: str) -> None:
    """Make a token void. NotFound."""
    with _changing(path) as tokens:
        left = [token for token in tokens if token.name != name]
        if len(left) == len(tokens):
            raise NotFound(f"there is no token {name!r}")
        tokens[:] = left


@contextmanager
def _changing(path: Path) -> Iterator[list[Token]]:
    """Give out the tokens of a file to be changed; what they are afterwards replaces it, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        lock = os.open(path.with_name(path.name + ".lock"), flags, 0o600)
    except OSError as error:
        raise Unavailable("the tokens cannot be changed", hint=f"{path}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tokens = read_tokens(path)
        yield tokens
        _replace(path, tokens)
    finally:
        os.close(lock)


def _replace(path: Path, tokens: Sequence[Token]) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "w", encoding="ascii") as file:
            os.fchmod(fd, 0o600)
            file.writelines(json.dumps(asdict(token)) + "\n" for token in tokens)
            file.flush()
            os.fsync(fd)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise Unavailable("the tokens cannot be changed", hint=f"{path}: {error.strerror}") from error


def _parsed(path: Path, number: int, line: bytes) -> Token:
    try:
        fields = json.loads(line)
        token = Token(
            str(fields["name"]), str(fields["sha256"]), float(fields["created"]), float(fields.get("expires", 0.0))
        )
        if not _NAME.fullmatch(token.name) or not re.fullmatch(r"[0-9a-f]{64}", token.sha256):
            raise ValueError("neither a name nor a hash")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InvalidArgument(f"{path} cannot be read", hint=f"line {number}: {error!r}") from error
    return token


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()
