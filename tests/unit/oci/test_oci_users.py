"""User specifications against hostile and ordinary passwd and group files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from execgate.model.config import ResolvedUser
from execgate.model.errors import InvalidArgument
from execgate.oci.users import (
    MAX_ID,
    MAX_LINE,
    GroupEntry,
    container_user,
    parse_group,
    parse_passwd,
    resolve_user,
)

PASSWD = b"""\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
alice:x:1000:1001:Alice,,,:/home/alice:/bin/sh
bob:x:1002:1002::/home/bob:/bin/sh
1000:x:4000:4000:a name of digits:/evil:/bin/sh
alice:x:0:0:a second alice:/root:/bin/sh
twin:x:1002:7777::/home/twin:/bin/sh
"""
GROUP = b"""\
root:x:0:root
wheel:x:10:root,alice
staff:x:50:alice,bob
devs:x:60:bob
staff:x:51:
2000:x:5000:
"""
ROOT = ResolvedUser(uid=0, gid=0)


def resolve(spec: str, default: ResolvedUser = ROOT, *, passwd: bytes = PASSWD, group: bytes = GROUP) -> ResolvedUser:
    return resolve_user(spec, passwd=passwd, group=group, default=default)


@pytest.mark.parametrize(
    ("spec", "uid", "gid", "gids", "home"),
    [
        ("alice", 1000, 1001, (10, 50, 1001), "/home/alice"),
        ("1000", 1000, 1001, (10, 50, 1001), "/home/alice"),
        ("alice:", 1000, 1001, (10, 50, 1001), "/home/alice"),
        ("alice:devs", 1000, 60, (60,), "/home/alice"),
        ("alice:2000", 1000, 2000, (2000,), "/home/alice"),
        ("1000:60", 1000, 60, (60,), "/home/alice"),
        ("999", 999, 0, (0,), "/"),
        ("999:12", 999, 12, (12,), "/"),
        ("0", 0, 0, (0, 10), "/root"),
        ("00", 0, 0, (0, 10), "/root"),
        ("+1000", 1000, 1001, (10, 50, 1001), "/home/alice"),
        (f"{MAX_ID}:{MAX_ID}", MAX_ID, MAX_ID, (MAX_ID,), "/"),
    ],
)
def test_explicit_user(spec: str, uid: int, gid: int, gids: tuple[int, ...], home: str) -> None:
    assert resolve(spec) == ResolvedUser(uid=uid, gid=gid, additional_gids=gids, home=home)


def test_the_first_line_wins() -> None:
    assert resolve("alice").uid == 1000  # not the second alice, who is root
    assert resolve("1002").gid == 1002  # bob, not twin
    assert resolve("root:staff").gid == 50


def test_digits_are_never_a_name() -> None:
    """CVE-2026-46680: a passwd line whose name is a number must not redirect that number."""
    assert resolve("1000").uid == 1000
    assert resolve("0:2000").gid == 2000


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nobody", "unable to find user nobody: no matching entries in passwd file"),
        ("nobody:staff", "unable to find user nobody: no matching entries in passwd file"),
        ("alice:nogroup", "unable to find group nogroup: no matching entries in group file"),
        (":nogroup", "unable to find group nogroup: no matching entries in group file"),
        ("2147483648", "uids and gids must be in range 0-2147483647"),
        ("0:4294967296", "uids and gids must be in range 0-2147483647"),
        ("-1", "uids and gids must be in range 0-2147483647"),
        ("9" * 5000, "uids and gids must be in range 0-2147483647"),
        ("a:b:c", "invalid USER value a:b:c"),
        ("a\x1b[2J\0", r"unable to find user a\x1b[2J\x00: no matching entries in passwd file"),
        ("\u0661", "unable to find user \u0661: no matching entries in passwd file"),
    ],
)
def test_refusals_are_dockers(spec: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        resolve(spec)
    assert caught.value.message == message


def test_a_huge_name_does_not_come_back_whole() -> None:
    with pytest.raises(InvalidArgument) as caught:
        resolve("x" * 1_000_000)
    assert len(caught.value.message) < 300


def test_no_spec_keeps_the_containers_user() -> None:
    default = ResolvedUser(uid=1000, gid=33, additional_gids=(99, 7))
    expected = ResolvedUser(uid=1000, gid=33, additional_gids=(7, 33, 99), home="/home/alice")
    assert resolve("", default) == expected
    assert resolve(":", default) == expected


def test_only_a_group_keeps_the_containers_uid() -> None:
    default = ResolvedUser(uid=1002, gid=1002, additional_gids=(50, 60, 1002))
    assert resolve(":wheel", default) == ResolvedUser(uid=1002, gid=10, additional_gids=(10,), home="/home/bob")


def test_groups_added_to_the_container_stay_and_its_users_own_do_not() -> None:
    """--group-add 777 on a container of bob, whose own groups (50, 60) an engine wrote down as well."""
    default = ResolvedUser(uid=1002, gid=1002, additional_gids=(50, 60, 777, 1002))
    assert resolve("alice", default).additional_gids == (10, 50, 777, 1001)
    assert resolve("root:devs", default).additional_gids == (60, 777)
    assert resolve("999", default).additional_gids == (0, 777)


def test_without_files_numbers_still_work() -> None:
    assert resolve("12:34", passwd=b"", group=b"").uid == 12
    assert resolve("", passwd=b"", group=b"") == ResolvedUser(uid=0, gid=0, additional_gids=(0,), home="/")
    with pytest.raises(InvalidArgument, match="unable to find user root"):
        resolve("root", passwd=b"", group=b"")


@pytest.mark.parametrize(
    "line",
    [
        b"mallory:x::0::/:/bin/sh",
        b"mallory:x:zero:0::/:/bin/sh",
        b"mallory:x:4294967296:0::/:/bin/sh",  # 0 in 32 bits
        b"mallory:x:-1:0::/:/bin/sh",
        b"mallory:x:0",
        b"mallory",
        b"#mallory:x:0:0::/:/bin/sh",
        b"mallory:x:" + "\u0660".encode() + b":0::/:/bin/sh",
        b"mallory:x:0:0:" + b"g" * MAX_LINE + b":/:/bin/sh",
    ],
)
def test_a_bad_passwd_line_is_no_line(line: bytes) -> None:
    """moby would read some of these as uid 0."""
    with pytest.raises(InvalidArgument, match="unable to find user mallory"):
        resolve("mallory", passwd=line)
    assert resolve("alice", passwd=line + b"\n" + PASSWD).uid == 1000


def test_short_lines_crlf_and_blanks_are_read() -> None:
    assert resolve("eve", passwd=b"\n  \r\n  eve:x:5:6\r\n", group=b"g:x:8:eve\r\n") == ResolvedUser(
        uid=5, gid=6, additional_gids=(6, 8), home="/"
    )


def test_names_that_are_no_utf8_compare_as_bytes() -> None:
    passwd = b"j\xf6rg:x:5:5::/home/j\xf6rg:/bin/sh\n"
    user = resolve(b"j\xf6rg".decode("utf-8", "surrogateescape"), passwd=passwd)
    assert user.uid == 5
    user.home.encode()  # what cannot be encoded cannot be stored or sent
    assert user.home == "/"


def test_a_long_group_line_is_read() -> None:
    members = b",".join(b"user%d" % n for n in range(40_000))
    assert [len(entry.members) for entry in parse_group(b"big:x:5:" + members)] == [40_000]


def test_group_members() -> None:
    assert list(parse_group(b"a:x:1:x,,y\nb:x:2\n:x:3:x\nc:x:four:x\n")) == [
        GroupEntry("a", 1, frozenset({"x", "y"})),
        GroupEntry("b", 2, frozenset()),
    ]


@given(st.binary(), st.binary(), st.text())
def test_no_content_raises_anything_else(passwd: bytes, group: bytes, spec: str) -> None:
    try:
        user = resolve(spec, passwd=passwd, group=group)
    except InvalidArgument:
        return
    assert user.gid in user.additional_gids
    assert 0 <= user.uid <= MAX_ID


@given(st.lists(st.sampled_from([b"a", b"0", b"1", b":", b",", b"\n", b"#", b"\xff"]), max_size=40))
def test_what_parses_is_in_range(parts: list[bytes]) -> None:
    data = b"".join(parts)
    assert all(0 <= e.uid <= MAX_ID and 0 <= e.gid <= MAX_ID and e.name for e in parse_passwd(data))
    assert all(0 <= e.gid <= MAX_ID and e.name and "" not in e.members for e in parse_group(data))


@pytest.mark.parametrize(
    ("process", "expected"),
    [
        ({}, ROOT),
        ({"user": None}, ROOT),
        ({"user": {"uid": "5", "gid": True, "additionalGids": "123"}}, ROOT),
        (
            {"user": {"uid": 5, "gid": 6, "additionalGids": [7, "8", -1, True, 2**32]}},
            ResolvedUser(uid=5, gid=6, additional_gids=(7,)),
        ),
    ],
)
def test_container_user_tolerates_any_bundle(process: dict[str, object], expected: ResolvedUser) -> None:
    assert container_user(process) == expected
