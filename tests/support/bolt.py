"""Bolt database files, written from nested dicts.

The bytes have bbolt's own form, its struct layouts and its checksum, but this is no second bbolt: a state is
written whole, each bucket as the smallest tree of full pages.
"""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Union

Tree = Mapping[bytes, Union[bytes, "Tree"]]
"""A bucket: each key has a value or a bucket of its own."""

_META, _FREELIST, _BRANCH, _LEAF = 0x04, 0x10, 0x01, 0x02
_HEADER = 16
_ELEMENT = 16


class _Element(NamedTuple):
    key: bytes
    value: bytes | int
    """A value; on a branch page the page that begins with the key."""
    is_bucket: bool = False


class BoltPages:
    """Pages that follow each other, from `first` on."""

    def __init__(self, *, first: int = 3, page_size: int = 4096, inline: bool = True) -> None:
        """`inline` keeps small buckets within their parent's page, as bbolt does whenever it can."""
        self.page_size = page_size
        self._first = first
        self._inline = inline
        self._data = bytearray()

    @property
    def data(self) -> bytes:
        """The pages, for the offset `first * page_size`."""
        return bytes(self._data)

    def add(self, tree: Tree) -> int:
        """Write a bucket with all below it; return the id of its root page."""
        level = [self._element(key, value) for key, value in sorted(tree.items())]
        flags = _LEAF
        while True:
            pages = self._split(level)
            ids = [self._write(page, flags) for page in pages]
            if len(ids) == 1:
                return ids[0]
            level = [_Element(page[0].key, page_id) for page, page_id in zip(pages, ids, strict=True)]
            flags = _BRANCH

    def _element(self, key: bytes, value: "bytes | Tree") -> _Element:
        if isinstance(value, bytes):
            return _Element(key, value)
        plain = [_Element(k, v) for k, v in sorted(value.items()) if isinstance(v, bytes)]
        body = _contents(plain)
        if self._inline and len(plain) == len(value) and _HEADER + len(body) <= self.page_size // 4:
            page = struct.pack("=QHHI", 0, _LEAF, len(plain), 0) + body
            return _Element(key, struct.pack("=QQ", 0, 0) + page, is_bucket=True)
        return _Element(key, struct.pack("=QQ", self.add(value), 0), is_bucket=True)

    def _split(self, elements: Sequence[_Element]) -> list[list[_Element]]:
        """Fill pages; each has two elements at least, and overflows rather than to have fewer."""
        pages: list[list[_Element]] = [[]]
        size = _HEADER
        for element in elements:
            added = _ELEMENT + len(element.key) + (len(element.value) if isinstance(element.value, bytes) else 0)
            if len(pages[-1]) >= 2 and size + added > self.page_size:
                pages.append([])
                size = _HEADER
            pages[-1].append(element)
            size += added
        return pages

    def _write(self, elements: Sequence[_Element], flags: int) -> int:
        page_id = self._first + len(self._data) // self.page_size
        self._data += _page(page_id, flags, len(elements), _contents(elements), self.page_size)
        return page_id


def meta_page(root: int, txid: int, *, page_size: int = 4096, magic: int = 0xED0CDAED, version: int = 2) -> bytes:
    """Return the meta page that names the root page of state `txid`; it belongs to page `txid % 2`."""
    end = 1 << 20  # the high water mark, which only a writer needs
    meta = struct.pack("=IIIIQQQQQ", magic, version, page_size, 0, root, 0, 2, end, txid)
    return _page(txid % 2, _META, 0, meta + struct.pack("=Q", checksum(meta)), page_size)


def bolt_file(tree: Tree, *, page_size: int = 4096, inline: bool = True, txid: int = 7) -> bytes:
    """Return a database whose newest state, `txid`, is `tree`; the state before it is empty."""
    pages = BoltPages(page_size=page_size, inline=inline)
    roots = {txid - 1: pages.add({}), txid: pages.add(tree)}
    metas = {number % 2: meta_page(root, number, page_size=page_size) for number, root in roots.items()}
    return metas[0] + metas[1] + _page(2, _FREELIST, 0, b"", page_size) + pages.data


def write_bolt(path: Path, tree: Tree, *, page_size: int = 4096, inline: bool = True, txid: int = 7) -> Path:
    """Write `bolt_file` to `path` and return that."""
    path.write_bytes(bolt_file(tree, page_size=page_size, inline=inline, txid=txid))
    return path


def _page(page_id: int, flags: int, count: int, body: bytes, page_size: int) -> bytes:
    pages = -(-(_HEADER + len(body)) // page_size)
    return (struct.pack("=QHHI", page_id, flags, count, pages - 1) + body).ljust(pages * page_size, b"\0")


def _contents(elements: Sequence[_Element]) -> bytes:
    """Return what follows a page's header: the elements, then their keys and values."""
    heads, data = bytearray(), bytearray()
    for index, element in enumerate(elements):
        position = (len(elements) - index) * _ELEMENT + len(data)
        if isinstance(element.value, int):
            heads += struct.pack("=IIQ", position, len(element.key), element.value)
            data += element.key
        else:
            heads += struct.pack("=IIII", element.is_bucket, position, len(element.key), len(element.value))
            data += element.key + element.value
    return bytes(heads + data)


def checksum(data: bytes) -> int:
    """Return the checksum of a meta page, 64-bit FNV-1a."""
    value = 14695981039346656037
    for byte in data:
        value = ((value ^ byte) * 1099511628211) & 0xFFFF_FFFF_FFFF_FFFF
    return value
