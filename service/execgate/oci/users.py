"""Who an exec runs as: a user specification, resolved to numbers by the container's own passwd and group
files.

The theory. A runtime takes numbers only, so names are looked up here, in bytes that the *container* supplied
and that are therefore hostile: every line is optional, a malformed one is as if it were not there, and no
content raises. The rules of the lookup are those of Docker (`GetExecUser` of github.com/moby/sys/user):

- all digits are a number, never a name, whatever the files say (CVE-2026-46680);
- the first matching line wins;
- a number without a passwd line is a user with group 0, no other groups, and home `/`;
- an explicit group replaces the user's primary group, and then the user's own groups are not added.

Two rules are stricter than Docker's. There a passwd line with an unreadable uid means uid 0, and a number
above 2³¹-1 may wrap; here such a line is skipped. And `a:b:c` is an error instead of `a:b`.

The groups that the *container* was given (`--group-add`) stay with every user. A bundle does not tell them
from the groups of the container's own user: what that user has by the group file is taken off, the rest was
added.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from execgate.model.config import ResolvedUser
from execgate.model.errors import InvalidArgument
from execgate.oci.text import shown

MAX_ID = 2**31 - 1
"""The largest uid and gid: Docker's and runc's own bound, although the kernel has 32 bits."""

MAX_LINE = 65536
"""A passwd line above this many bytes is skipped; a group line may be as long as its file."""

_NUMBER = re.compile(r"[+-]?[0-9]+")
_UNSIGNED = re.compile(r"[0-9]{1,10}")


@dataclass(frozen=True, slots=True)
class PasswdEntry:
    """One line of /etc/passwd; `home` may be empty."""

    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True, slots=True)
class GroupEntry:
    """One line of /etc/group."""

    name: str
    gid: int
    members: frozenset[str]


def parse_passwd(data: bytes) -> Iterator[PasswdEntry]:
    """Yield the well-formed lines `name:password:uid:gid[:gecos[:home[:shell]]]`, in order; never raises.

    Names are UTF-8 with surrogateescape, so that bytes which are no text still compare.
    """
    for fields in _records(data, max_line=MAX_LINE):
        if len(fields) < 4:
            continue
        uid, gid = _file_id(fields[2]), _file_id(fields[3])
        if uid is not None and gid is not None:
            yield PasswdEntry(fields[0], uid, gid, fields[5] if len(fields) > 5 else "")


def parse_group(data: bytes) -> Iterator[GroupEntry]:
    """Yield the well-formed lines `name:password:gid[:member,member…]`, in order; never raises."""
    for fields in _records(data, max_line=len(data)):
        gid = _file_id(fields[2]) if len(fields) > 2 else None
        if gid is not None:
            members = fields[3].split(",") if len(fields) > 3 else []
            yield GroupEntry(fields[0], gid, frozenset(filter(None, members)))


def container_user(process: Mapping[str, Any]) -> ResolvedUser:
    """Return the user of a container's own `process`; what is missing or no number is 0."""
    user = process.get("user")
    if not isinstance(user, Mapping):
        return ResolvedUser(uid=0, gid=0)
    gids = user.get("additionalGids")
    return ResolvedUser(
        uid=_bundle_id(user.get("uid")),
        gid=_bundle_id(user.get("gid")),
        additional_gids=tuple(g for g in gids if _is_id(g)) if isinstance(gids, Sequence) else (),
    )


def resolve_user(spec: str, *, passwd: bytes, group: bytes, default: ResolvedUser) -> ResolvedUser:
    """Resolve `spec`: `""`, `name`, `uid`, each with an optional `:name` or `:gid`, or only `:group`.

    `passwd` and `group` are the contents of the container's files (`b""` when there is none), `default` is
    the container's own user, see `container_user`. An empty user part is the container's user. `home` of the
    result is never empty.

    Raises InvalidArgument, in Docker's words, for a name that no line has and for a number out of range.
    """
    files = _Files(passwd, group)
    if spec in ("", ":"):
        gids = _gid_set(default.gid, default.additional_gids)
        return replace(default, additional_gids=gids, home=_home(files.by_uid(default.uid)))
    user_part, group_part = _split(spec)
    uid, entry = _find_user(user_part, files, default)
    if group_part:
        gid, own_groups = _find_group(group_part, files), frozenset[int]()
    else:
        gid, own_groups = (entry.gid if entry else 0), files.groups_of(entry)
    added = set(default.additional_gids) - {default.gid} - files.groups_of(files.by_uid(default.uid))
    return ResolvedUser(
        uid=uid, gid=gid, additional_gids=_gid_set(gid, own_groups | added), home=_home(files.by_uid(uid))
    )


class _Files:
    """The two files, read no more often than a question needs."""

    def __init__(self, passwd: bytes, group: bytes) -> None:
        self._passwd = passwd
        self._group = group

    def by_uid(self, uid: int) -> PasswdEntry | None:
        return next((e for e in parse_passwd(self._passwd) if e.uid == uid), None)

    def by_name(self, name: str) -> PasswdEntry | None:
        return next((e for e in parse_passwd(self._passwd) if e.name == name), None)

    def group(self, name: str) -> GroupEntry | None:
        return next((e for e in parse_group(self._group) if e.name == name), None)

    def groups_of(self, user: PasswdEntry | None) -> frozenset[int]:
        if user is None:
            return frozenset()
        return frozenset(e.gid for e in parse_group(self._group) if user.name in e.members)


def _split(spec: str) -> tuple[str, str]:
    user, _, group = spec.partition(":")
    if ":" in group:
        raise InvalidArgument(f"invalid USER value {shown(spec)}")
    return user, group


def _find_user(part: str, files: _Files, default: ResolvedUser) -> tuple[int, PasswdEntry | None]:
    if not part:
        return default.uid, files.by_uid(default.uid)
    uid = _number(part)
    if uid is not None:
        return uid, files.by_uid(uid)
    entry = files.by_name(part)
    if entry is None:
        raise InvalidArgument(f"unable to find user {shown(part)}: no matching entries in passwd file")
    return entry.uid, entry


def _find_group(part: str, files: _Files) -> int:
    gid = _number(part)
    if gid is not None:
        return gid
    entry = files.group(part)
    if entry is None:
        raise InvalidArgument(f"unable to find group {shown(part)}: no matching entries in group file")
    return entry.gid


def _number(part: str) -> int | None:
    """Return a request's number, None for a name. A sign makes no name of it: Go's Atoi takes one."""
    if not _NUMBER.fullmatch(part):
        return None
    digits = part.lstrip("+-").lstrip("0") or "0"
    # The length first: int() refuses thousands of digits, with an error of its own.
    if len(digits) > 10 or (part[0] == "-" and digits != "0") or int(digits) > MAX_ID:
        raise InvalidArgument(f"uids and gids must be in range 0-{MAX_ID}")
    return int(digits)


def _records(data: bytes, *, max_line: int) -> Iterator[list[str]]:
    """Yield each line's fields; blank lines, comments, too long lines and nameless ones are left out."""
    for raw in data.split(b"\n"):
        line = raw.strip()
        if not line or len(line) > max_line or line[:1] in (b"#", b":"):
            continue
        yield line.decode("utf-8", "surrogateescape").split(":")


def _file_id(field: str) -> int | None:
    if not _UNSIGNED.fullmatch(field):
        return None
    value = int(field)
    return value if value <= MAX_ID else None


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32


def _bundle_id(value: object) -> int:
    return value if isinstance(value, int) and _is_id(value) else 0


def _gid_set(gid: int, others: frozenset[int] | tuple[int, ...]) -> tuple[int, ...]:
    """Sorted and unique; the primary gid is always a member (CVE-2022-2989)."""
    return tuple(sorted({gid, *others}))


def _home(entry: PasswdEntry | None) -> str:
    """The home of a passwd line; `/` when there is none, or none that an environment could hold."""
    home = entry.home if entry else ""
    # A lone surrogate is a byte that was no UTF-8: neither JSON nor SQLite would take it.
    usable = home and "\0" not in home and not any("\ud800" <= c <= "\udfff" for c in home)
    return home if usable else "/"
