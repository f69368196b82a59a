"""Reading bbolt databases that a live engine holds open: Podman's bolt_state.db, containerd's meta.db.

The theory. A database is one file of pages. Pages 0 and 1 are meta pages; each commit has a number, the txid, and
writes page `txid % 2`, so the valid one with the higher txid is the newest state, and the other the one before. A
meta page names the root bucket. A bucket is a B+ tree: branch pages lead to leaf pages, leaf pages hold keys with
values, and a value may be another bucket (the id of its root page, or a small leaf page "inline"). A page whose
elements need more room runs on into the pages after it, its overflow.

The writer keeps the file locked for as long as it has it open; containerd, for as long as it runs. So this reader
takes no lock, and trusts the order of a commit instead (bbolt: `Tx.Commit`, `DB.beginRWTx`, `freelist`):

1. Transaction T+1 never writes to a page that state T uses; it only marks those that it replaces as pending.
2. Its pages are in the file before its meta page is written.
3. What it marked is given out again when T+2 begins, thus after the meta page of T+1 was written. (A writer that
   opens the file anew takes pending pages as free, but it begins with the newest state as well.)

Hence: *while both meta pages are still what they were, nothing of the newest state was overwritten.* `read` runs a
question on the newest state, then looks at the meta pages again: only if they are the same, byte for byte, the
outcome counts. Otherwise it asks again, whatever the question said or raised, and after some rounds gives up with
Unavailable. A meta page met half-written has a wrong checksum; it is always the older of the two, so the other is
still the newest, and that it changes afterwards shows in the comparison.

What it refuses to know: only meta pages have checksums. Damage elsewhere is found where it breaks the form: an
offset outside of its page, a page that is not what it is taken for, a tree too deep. What one question may cost is
bounded, so cycles end too. And it never maps the file: a mapping answers a truncated file with SIGBUS.
"""

import os
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from execgate.containers.files import translate
from execgate.model.errors import Internal, Unavailable

T = TypeVar("T")

Version = tuple[int, int, int]
"""Device, inode and txid: while they are the same, so is all that the database says."""

MAX_BYTES = 1 << 27
"""What one question may read from the file and take from its pages, in bytes; some seconds of work at worst."""

_ATTEMPTS = 16
_MAX_DEPTH = 32  # of a tree, and of buckets in buckets
_ELEMENT_COST = 64  # bytes: a look at an element costs time, be it empty
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | os.O_NOFOLLOW

# bbolt writes its structs as they lie in memory, so in the byte order of the machine.
_PAGE = struct.Struct("=QHHI")  # id, flags, count of elements, count of overflow pages
_META = struct.Struct("=IIIIQQQQQQ")  # magic, version, page size, flags, root, sequence, freelist, end, txid, checksum
_LEAF_ELEMENT = struct.Struct("=IIII")  # flags, position (from the element's own start), key size, value size
_BRANCH_ELEMENT = struct.Struct("=IIQ")  # position, key size, page id
_BUCKET = struct.Struct("=QQ")  # root page id (0: an inline page follows), sequence

_BRANCH, _LEAF = 0x01, 0x02
_IS_BUCKET = 0x01
_MAGIC, _VERSION = 0xED0CDAED, 2
_PAGE_SIZES = tuple(1024 << shift for shift in range(15))  # those that bbolt itself tries


def read(path: Path, question: Callable[["Bucket"], T]) -> T:
    """Return what `question` answers about the newest state of a database; it is given the root bucket.

    The question may be asked several times, so it must have no effects; what it raises passes through. Its buckets
    and iterators are void when it returns. The less it reads, the better its chance against a busy writer.

    Raises NotFound, Internal when the file is damaged or no database, Unavailable when it changes too fast.
    """
    try:
        with open(path, "rb", buffering=0, opener=lambda name, _: os.open(name, _FLAGS)) as file:
            for _ in range(_ATTEMPTS):
                metas = _read_metas(file.fileno())
                try:
                    answer = question(Bucket(_State(path, file.fileno, metas)))
                except Exception:
                    # What was read of pages that were overwritten meanwhile is no reason to fail.
                    if _read_metas(file.fileno()) == metas:
                        raise
                    continue
                if _read_metas(file.fileno()) == metas:
                    return answer
    except OSError as error:
        raise translate(error, str(path)) from error
    raise Unavailable("the records of an engine are changing", hint=f"{path}: changed in each of {_ATTEMPTS} rounds")


class Bucket:
    """Keys in the order of their bytes, each with a value or a bucket of its own.

    Every method raises Internal when it meets damage.
    """

    def __init__(self, state: "_State", header: bytes | None = None, depth: int = 0) -> None:
        """Read nothing yet. `header` is the value that the parent has for it; None is the root bucket."""
        if depth > _MAX_DEPTH:
            raise state.damage("its buckets lie too deep in each other")
        self._state = state
        self._header = header
        self._depth = depth

    @property
    def version(self) -> Version:
        """The version of the whole database that this is a part of."""
        return self._state.version

    def get(self, *path: bytes) -> bytes | None:
        """Return the value of the last part of `path`, a key, in the bucket that the other parts lead to.

        None when there is none, or a bucket in its place.
        """
        *names, key = path
        bucket = self.bucket(*names)
        is_bucket, value = bucket._find(key) if bucket is not None else (False, None)
        return None if is_bucket else value

    def bucket(self, *path: bytes) -> "Bucket | None":
        """Return the bucket that the names lead to, beginning in this one; None when there is none."""
        bucket = self
        for name in path:
            is_bucket, header = bucket._find(name)
            if not is_bucket:
                return None
            bucket = Bucket(self._state, header, bucket._depth + 1)
        return bucket

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the keys that have values, with these."""
        for page, index in self._elements():
            is_bucket, value = page.value(index)
            if not is_bucket:
                yield page.key(index), value

    def buckets(self) -> Iterator[tuple[bytes, "Bucket"]]:
        """Yield the names of the buckets in this one, with these."""
        for page, index in self._elements():
            is_bucket, header = page.value(index)
            if is_bucket:
                yield page.key(index), Bucket(self._state, header, self._depth + 1)

    @cached_property
    def _root(self) -> "_Page":
        if self._header is None:
            return self._state.page(self._state.root)
        if len(self._header) < _BUCKET.size:
            raise self._state.damage("a bucket has no header")
        root, _ = _BUCKET.unpack_from(self._header)
        return self._state.page(root) if root else _Page(self._state, self._header[_BUCKET.size :])

    def _find(self, key: bytes) -> tuple[bool, bytes | None]:
        """Return whether `key` is a bucket's name, and its value."""
        page = self._root
        for _ in range(_MAX_DEPTH):
            if page.is_leaf:
                index = bisect_left(range(page.count), key, key=page.key)
                return page.value(index) if index < page.count and page.key(index) == key else (False, None)
            # A branch has the first key of each page below it; what is before the first belongs to the first.
            index = bisect_right(range(page.count), key, key=page.key) - 1
            page = page.child(max(index, 0))
        raise self._state.damage("a tree is too deep")

    def _elements(self) -> Iterator[tuple["_Page", int]]:
        return ((page, index) for page in self._leaves(self._root, 1) for index in range(page.count))

    def _leaves(self, page: "_Page", depth: int) -> Iterator["_Page"]:
        if page.is_leaf:
            yield page
            return
        if depth == _MAX_DEPTH:
            raise self._state.damage("a tree is too deep")
        for index in range(page.count):
            yield from self._leaves(page.child(index), depth + 1)


class _Page:
    """A branch or leaf page with its overflow: elements in the order of their keys, unpacked when looked at."""

    def __init__(self, state: "_State", data: bytes) -> None:
        self._state = state
        self._data = data
        if len(data) < _PAGE.size:
            raise state.damage("a page has no header")
        self._id, flags, self.count, _ = _PAGE.unpack_from(data)
        self.is_leaf = flags == _LEAF
        if flags not in (_BRANCH, _LEAF) or (flags == _BRANCH and self.count == 0):
            raise state.damage(f"page {self._id} is neither a branch nor a leaf")
        if self._start(self.count) > len(data):
            raise state.damage(f"page {self._id} has too many elements")

    def key(self, index: int) -> bytes:
        start = self._start(index)
        if self.is_leaf:
            _, position, size, _ = _LEAF_ELEMENT.unpack_from(self._data, start)
        else:
            position, size, _ = _BRANCH_ELEMENT.unpack_from(self._data, start)
        return self._cut(start + position, size)

    def value(self, index: int) -> tuple[bool, bytes]:
        """Return whether an element of a leaf page is a bucket, and its value."""
        start = self._start(index)
        flags, position, key_size, size = _LEAF_ELEMENT.unpack_from(self._data, start)
        return bool(flags & _IS_BUCKET), self._cut(start + position + key_size, size)

    def child(self, index: int) -> "_Page":
        """Return the page that an element of a branch page leads to."""
        _, _, page_id = _BRANCH_ELEMENT.unpack_from(self._data, self._start(index))
        return self._state.page(page_id)

    def _start(self, index: int) -> int:
        return _PAGE.size + index * _LEAF_ELEMENT.size  # both kinds have the same size

    def _cut(self, start: int, size: int) -> bytes:
        if start + size > len(self._data):
            raise self._state.damage(f"an element of page {self._id} ends outside of it")
        self._state.charge(_ELEMENT_COST + size)
        return self._data[start : start + size]


class _State:
    """One state of a file, and what a question may still take from it."""

    def __init__(self, path: Path, fileno: Callable[[], int], metas: tuple[bytes, bytes]) -> None:
        """`fileno` raises ValueError once the file is closed: a number that was kept might be another file's."""
        self._path = path
        self._fileno = fileno
        self._left = MAX_BYTES
        newest = max(filter(None, map(_parse_meta, metas)), key=lambda meta: meta.txid, default=None)
        if newest is None:
            raise self.damage("it has no meta page of a known version")
        self.root = newest.root
        self._page_size = newest.page_size
        # Asked after the meta pages were read: the file grows before a meta page speaks of what is new in it.
        status = os.fstat(fileno())
        self._size = status.st_size
        self.version = (status.st_dev, status.st_ino, newest.txid)

    def page(self, page_id: int) -> _Page:
        """Return a page with its overflow."""
        data = self._pread(page_id, 1)
        header_id, _, _, overflow = _PAGE.unpack_from(data)
        if header_id != page_id:
            raise self.damage(f"page {page_id} says that it is page {header_id}")
        return _Page(self, self._pread(page_id, 1 + overflow) if overflow else data)

    def charge(self, size: int) -> None:
        """Take `size` bytes from what is left."""
        self._left -= size
        if self._left < 0:
            raise self.damage(f"a question takes more than {MAX_BYTES} bytes")

    def damage(self, reason: str) -> Internal:
        return Internal("a file of the host cannot be read", hint=f"{self._path}: as a bolt database: {reason}")

    def _pread(self, page_id: int, count: int) -> bytes:
        start, size = page_id * self._page_size, count * self._page_size
        if page_id < 2 or start + size > self._size:
            raise self.damage(f"page {page_id} is outside of it")
        self.charge(size)
        data = os.pread(self._fileno(), size, start)
        if len(data) < size:
            raise self.damage(f"page {page_id} is cut off")
        return data


class _Meta(NamedTuple):
    page_size: int
    root: int
    txid: int


def _read_metas(fd: int) -> tuple[bytes, bytes]:
    """Return the beginnings of both meta pages, valid or not. Raises OSError."""
    size = _PAGE.size + _META.size
    first = os.pread(fd, size, 0)
    meta = _parse_meta(first)
    # The second begins where the first says; without a word from it, at the first place where there is one.
    for offset in (meta.page_size,) if meta is not None else _PAGE_SIZES:
        second = os.pread(fd, size, offset)
        if (other := _parse_meta(second)) is not None and other.page_size == offset:
            return first, second
    return first, b""


@lru_cache(maxsize=16)  # each read sees the same few several times
def _parse_meta(page: bytes) -> _Meta | None:
    """Return what the beginning of a meta page says, None when it is not valid."""
    if len(page) < _PAGE.size + _META.size:
        return None
    magic, version, page_size, _, root, _, _, _, txid, checksum = _META.unpack_from(page, _PAGE.size)
    if magic != _MAGIC or version != _VERSION or page_size not in _PAGE_SIZES:
        return None
    return _Meta(page_size, root, txid) if checksum == _fnv1a(page[_PAGE.size : -8]) else None


def _fnv1a(data: bytes) -> int:
    """Return the 64-bit FNV-1a hash."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % (1 << 64)
    return value
