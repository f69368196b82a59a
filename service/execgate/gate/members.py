"""The gzip members that a recording consists of: each a piece of it, whole by itself (RFC 1952).

gzip files may be concatenated, and every reader takes that for one file. So a piece is appended by one write, and a
kill in the midst of it leaves the pieces before it as they were. To go on with such a file one has to know where its
last whole piece ends. That a reader learns by inflating everything; here each member tells its own length in the
header's extra field (RFC 1952, 2.3.1.1), so that one can go from head to head, as bgzip does.
"""

import struct
import zlib
from enum import IntEnum
from typing import NamedTuple

_MAGIC = b"\x1f\x8b\x08\x04"
"""gzip, deflate, and as the only flag that there is an extra field."""

_HEAD = struct.Struct("<4sIBBH")
"""Magic, time (none), how it was compressed (not told), the system (3: Unix), the size of the extra field."""

_FIELD = struct.Struct("<2sHIBBB")
"""Our subfield: its id, the size of what follows; the member's length, its kind, the sizes of the two remainders."""

_ID = b"EG"
_TRAILER = struct.Struct("<II")
_FIELD_HEAD = 4
_BRISK_ABOVE = 64 * 1024
_REST_MAX = 3
"""Bytes that can be left of an unfinished character (RFC 3629)."""

HEAD_MAX = _HEAD.size + _FIELD.size + 2 * _REST_MAX


class Kind(IntEnum):
    """What a member is: a piece; the last one of a service that left in order; the end; the end before its time."""

    PIECE = 0
    LEFT = 1
    END = 2
    LOST = 3


class Head(NamedTuple):
    """What a member tells of itself. `rest` are the beginnings of characters of output and of input, in a LEFT one."""

    length: int
    kind: Kind
    rest: tuple[bytes, bytes]


def pack(data: bytes, kind: Kind = Kind.PIECE, rest: tuple[bytes, bytes] = (b"", b"")) -> bytes:
    """Return a member. Much data at once is compressed less well, in a fifth of the time."""
    level = 1 if len(data) > _BRISK_ABOVE else 6
    deflate = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = deflate.compress(data) + deflate.flush()
    rests = b"".join(rest)
    size = _FIELD.size + len(rests)
    length = _HEAD.size + size + len(body) + _TRAILER.size
    head = _HEAD.pack(_MAGIC, 0, 0, 3, size)
    field = _FIELD.pack(_ID, size - _FIELD_HEAD, length, kind, *map(len, rest))
    return b"".join((head, field, rests, body, _TRAILER.pack(zlib.crc32(data), len(data) & 0xFFFFFFFF)))


def parse_head(data: bytes) -> Head | None:
    """Return the head of the member that `data`, which may end anywhere, begins with; None when it is none of ours."""
    if len(data) < _HEAD.size + _FIELD.size:
        return None
    magic, _, _, _, size = _HEAD.unpack_from(data)
    identity, told, length, kind, output, given = _FIELD.unpack_from(data, _HEAD.size)
    begin = _HEAD.size + _FIELD.size
    end = begin + output + given
    if magic != _MAGIC or identity != _ID or told != size - _FIELD_HEAD or size != _FIELD.size + output + given:
        return None
    if len(data) < end or length <= end or kind not in tuple(Kind):
        return None
    return Head(length, Kind(kind), (data[begin : begin + output], data[begin + output : end]))
