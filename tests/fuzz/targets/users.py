"""/etc/passwd and /etc/group, which the container supplies, and the user that a request names."""

from dataclasses import dataclass

from execgate.model.config import ResolvedUser
from execgate.model.errors import InvalidArgument
from execgate.oci.users import MAX_ID, MAX_LINE, GroupEntry, PasswdEntry, parse_group, parse_passwd, resolve_user
from fuzz.target import Target

_DEFAULTS = (
    ResolvedUser(uid=0, gid=0),
    ResolvedUser(uid=1000, gid=100, additional_gids=(5, 2**32 - 1)),
)


def users(data: bytes) -> None:
    """A user on the first line, then a passwd file, a NUL, a group file: as a plain reading of the rules has it."""
    head, _, files = data.partition(b"\n")
    spec = head.decode(errors="surrogateescape")
    passwd, _, group = files.partition(b"\0")
    for content in (passwd, group, data):
        assert list(parse_passwd(content)) == _read_passwd(content)
        assert list(parse_group(content)) == _read_group(content)
    for default in _DEFAULTS:
        expected = _resolve(spec, _read_passwd(passwd), _read_group(group), default)
        try:
            user = resolve_user(spec, passwd=passwd, group=group, default=default)
        except InvalidArgument as error:
            assert expected is None, spec
            assert len(error.message) < 1500  # 128 characters of the specification, each at most 10 when escaped
            assert error.message.isprintable()
            continue
        assert expected is not None, spec
        assert (user.uid, user.gid, set(user.additional_gids)) == (expected.uid, expected.gid, expected.gids)
        assert list(user.additional_gids) == sorted(set(user.additional_gids))
        assert user.gid in user.additional_gids
        assert user.home.encode()
        assert "\0" not in user.home
        if spec.isascii() and spec.isdigit():
            assert user.uid == int(spec)


@dataclass
class _Expected:
    uid: int
    gid: int
    gids: set[int]


def _fields(data: bytes, max_line: int) -> list[list[str]]:
    """Return the fields of the lines that count."""
    lines = [line.strip() for line in data.split(b"\n")]
    return [
        line.decode(errors="surrogateescape").split(":")
        for line in lines
        if line and len(line) <= max_line and line[0] not in b"#:"
    ]


def _id(text: str) -> int | None:
    """Return an id as a file has it: digits, at most ten, at most 2³¹-1."""
    if not (1 <= len(text) <= 10 and all(digit in "0123456789" for digit in text)):
        return None
    return int(text) if int(text) <= MAX_ID else None


def _read_passwd(data: bytes) -> list[PasswdEntry]:
    found = []
    for name, *rest in _fields(data, MAX_LINE):
        uid, gid = (_id(rest[1]), _id(rest[2])) if len(rest) >= 3 else (None, None)
        if uid is not None and gid is not None:
            found.append(PasswdEntry(name, uid, gid, rest[4] if len(rest) >= 5 else ""))
    return found


def _read_group(data: bytes) -> list[GroupEntry]:
    found = []
    for name, *rest in _fields(data, len(data)):
        gid = _id(rest[1]) if len(rest) >= 2 else None
        if gid is not None:
            members = frozenset(rest[2].split(",")) - {""} if len(rest) >= 3 else frozenset[str]()
            found.append(GroupEntry(name, gid, members))
    return found


def _resolve(spec: str, passwd: list[PasswdEntry], group: list[GroupEntry], default: ResolvedUser) -> _Expected | None:
    """Resolve a user by the rules at the head of `oci.users`; None where they say 400."""
    if spec.count(":") > 1:
        return None
    user, _, wanted_group = spec.partition(":")
    if not user and not wanted_group:
        return _Expected(default.uid, default.gid, {default.gid, *default.additional_gids})
    uid: int | None = default.uid if not user else _given(user)
    if uid == -1:
        return None
    if uid is None:
        entry = next((one for one in passwd if one.name == user), None)
        if entry is None:
            return None
        uid = entry.uid
    else:
        entry = next((one for one in passwd if one.uid == uid), None)
    own_entry = next((one for one in passwd if one.uid == default.uid), None)
    added = set(default.additional_gids) - {default.gid} - _groups_of(own_entry, group)
    if not wanted_group:
        gid = entry.gid if entry else 0
        return _Expected(uid, gid, {gid, *_groups_of(entry, group), *added})
    number = _given(wanted_group)
    if number is None:
        number = next((one.gid for one in group if one.name == wanted_group), -1)
    return None if number == -1 else _Expected(uid, number, {number, *added})


def _given(text: str) -> int | None:
    """Return the number that a request means, -1 for one out of range, None for a name."""
    digits = text[1:] if text[:1] in ("+", "-") and len(text) > 1 else text
    if not digits or any(digit not in "0123456789" for digit in digits):
        return None
    digits = digits.lstrip("0") or "0"
    if len(digits) > 12 or int(digits) > MAX_ID or (text[0] == "-" and digits != "0"):
        return -1
    return int(digits)


def _groups_of(entry: PasswdEntry | None, group: list[GroupEntry]) -> set[int]:
    return {one.gid for one in group if entry is not None and entry.name in one.members}


TARGETS = (
    Target(
        check=users,
        tokens=(
            *(b"root:x:0:0:root:/root:/bin/sh\n", b"app:x:1000:1000::/home/app:/bin/sh\n", b"app\n", b"app:staff\n"),
            *(b"staff:x:50:app,root\n", b"1000\n", b"1000:50\n", b":", b"::", b"+1000", b"-0", b"-1", b"2147483647"),
            *(b"2147483648", b"00000000001", b"#", b"\n", b"\r", b"\0", b"\xff", b",", b"app:staff:x\n", b":staff\n"),
            *(b"\xd9\xa1", b"0:x:5:5::/zero:\n", b"x:::", b"\x0b", b"\x1c", b"\xc2\x85", b" ", b"app:x:1000:1000\n"),
        ),
    ),
)
