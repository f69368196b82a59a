"""Bounded reads of the host's small files."""

import errno
import json
import os
from pathlib import Path

import pytest

from execgate.containers.files import key_if_there, parse_json, read_json, read_kernel, read_regular, translate
from execgate.containers.listing import Listing
from execgate.model.errors import ExecgateError, Internal, NotFound, Unavailable


@pytest.mark.parametrize(
    ("code", "category"),
    [
        (errno.ENOENT, NotFound),
        (errno.ESRCH, NotFound),
        (errno.EMFILE, Unavailable),
        (errno.ENOMEM, Unavailable),
        (errno.EACCES, Internal),
        (errno.EIO, Internal),
    ],
)
def test_categories(code: int, category: type[ExecgateError]) -> None:
    error = translate(OSError(code, os.strerror(code)), "/x/y")
    assert type(error) is category
    assert "/x/y" in error.hint
    assert "/x/y" not in error.message


def test_the_key_is_that_of_what_was_read(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"abc")
    assert read_regular(file, limit=3) == (b"abc", key_if_there(file))
    before = key_if_there(file)
    (tmp_path / "g").write_bytes(b"abd")
    (tmp_path / "g").rename(file)
    assert key_if_there(file) != before


def test_what_is_no_small_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "target").write_bytes(b"{}")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 1 << 30)
    for name in ("fifo", "link", "loop", "sparse", "."):
        with pytest.raises(Internal):
            read_regular(tmp_path / name, limit=100)
    assert read_regular(tmp_path / "link", limit=100, follow=True)[0] == b"{}"
    with pytest.raises(Internal):
        read_regular(tmp_path / "loop", limit=100, follow=True)
    with pytest.raises(NotFound):
        read_regular(tmp_path / "none", limit=100)


def test_a_size_that_says_nothing_is_bounded_too() -> None:
    with pytest.raises(Internal, match="cannot be read"):
        read_regular(Path("/proc/self/maps"), limit=100)


@pytest.mark.parametrize(
    "data", [b"", b"{", b'{"a": 1', b"[]", b"5", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_no_json_object(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(Internal) as caught:
        read_json(tmp_path / "f", limit=1 << 20)
    assert str(tmp_path / "f") in caught.value.hint


def test_json(tmp_path: Path) -> None:
    (tmp_path / "f").write_text(json.dumps({"a": [1]}))
    assert read_json(tmp_path / "f", limit=100)[0] == {"a": [1]}


def test_kernel_files() -> None:
    assert read_kernel("/proc/self/stat") is not None
    assert read_kernel("/proc/self/none") is None
    assert read_kernel("/proc/2147483647/stat") is None
    with pytest.raises(Internal):
        read_kernel("/proc/self")


@pytest.mark.parametrize("path", ["/proc/self/limits", "/proc/self/cgroup", "/proc/sys/kernel/random/boot_id"])
def test_one_read_has_all_of_a_single_file(path: str) -> None:
    assert read_kernel(path, single=True) == read_kernel(path)


def test_a_single_file_that_is_long_is_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 200_000)
    assert read_kernel(str(tmp_path / "f"), single=True) == b"x" * 200_000


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    before = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path / "fifo", tmp_path, tmp_path / "none", Path("/proc/self/maps")):
        with pytest.raises(ExecgateError):
            read_regular(path, limit=10)
    with pytest.raises(Internal):
        read_kernel("/proc/self")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
        (b'{"a": "\\ud800"}', {"a": "?"}),
        (b'{"\\uDFFF": ["x\\ud800y"]}', {"?": ["x?y"]}),
        (b'["\xed\xa0\x80", "\xff"]', ["\ufffd\ufffd\ufffd", "\ufffd"]),
        ('"\\ud800"', "?"),
        (b"1e400", float("inf")),
    ],
)
def test_all_text_of_a_foreign_file_can_be_encoded(data: bytes | str, value: object) -> None:
    assert parse_json(data) == value


def test_names_that_are_no_text_are_not_listed(tmp_path: Path) -> None:
    for name in (b"plain", "é".encode(), b"\xff", b"a\xed\xa0\x80"):
        os.mkdir(os.fsencode(tmp_path) + b"/" + name)
    assert Listing(str(tmp_path)).names() == {"plain", "é"}
