"""Docker's multiplexed stream: stdout and stderr in one connection, each piece behind an 8-byte header.

A frame is `[stream, 0, 0, 0, length as big-endian uint32]` and then `length` bytes.
"""

import struct
from typing import Final

from execgate.model.errors import InvalidArgument

STDIN: Final = 0
STDOUT: Final = 1
STDERR: Final = 2
SYSTEMERR: Final = 3
"""An error of the server itself, not of the process; podman sends it, Docker's exec does not."""

HEADER_SIZE: Final = 8
MAX_PAYLOAD: Final = 2**32 - 1

_HEADER = struct.Struct(">B3sL")
_PADDING = b"\0\0\0"


def frame_header(stream: int, length: int) -> bytes:
    """Return the 8 bytes that go before `length` (0…`MAX_PAYLOAD`) bytes of `stream`."""
    return _HEADER.pack(stream, _PADDING, length)


def parse_header(data: bytes, position: int = 0) -> tuple[int, int]:
    """Return stream and length of the header at `position`, of frames that we wrote ourselves."""
    stream, _, length = _HEADER.unpack_from(data, position)
    return stream, length


class Demultiplexer:
    """The reading side of the stream.

    Payload is handed out as it arrives, a frame possibly in several pieces, so what is held back is never
    more than an unfinished header, whatever length a frame claims.
    """

    def __init__(self) -> None:
        self._header = b""
        self._stream = STDIN
        self._left = 0

    def __repr__(self) -> str:
        return f"<Demultiplexer stream={self._stream} left={self._left} header={len(self._header)}>"

    @property
    def at_boundary(self) -> bool:
        """Whether the stream may end here: EOF anywhere else means that bytes are missing."""
        return not self._left and not self._header

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Return the pieces `(stream, payload)` that `data` completes, in order; no payload is empty.

        Raises InvalidArgument at a header that is none, such as the bytes of a TTY, which has no frames. The
        stream cannot be picked up again after that.
        """
        pieces: list[tuple[int, bytes]] = []
        position = 0
        while position < len(data):
            if self._left:
                payload = data[position : position + self._left]
                self._left -= len(payload)
                position += len(payload)
                pieces.append((self._stream, payload))
            else:
                position += self._take_header(data, position)
        return pieces

    def _take_header(self, data: bytes, position: int) -> int:
        """Add to the header what it still lacks, and return how many bytes of `data` that took."""
        part = data[position : position + HEADER_SIZE - len(self._header)]
        self._header += part
        if len(self._header) == HEADER_SIZE:
            stream, padding, length = _HEADER.unpack(self._header)
            if stream > SYSTEMERR or padding != _PADDING:
                raise InvalidArgument(f"not a frame of a multiplexed stream: {self._header.hex(' ')}")
            self._header, self._stream, self._left = b"", stream, length
        return len(part)
