"""The packets of conmon's attach socket (SOCK_SEQPACKET).

Out of conmon: one byte that names the stream, then at most 8192 bytes. Into conmon: bare bytes. An *empty*
packet is EOF in either direction, so none is ever made here.
"""

from collections.abc import Iterator
from typing import Final

from execgate.model.errors import Internal
from execgate.wire.stdcopy import STDERR, STDOUT

PACKET_READ_SIZE: Final = 8193
"""How much to ask for in one read: conmon's STDIO_BUF_SIZE (8192, src/config.h) and the prefix byte.

A shorter buffer makes the kernel drop the rest of the packet without a word.
"""

INPUT_MAX: Final = 32768
"""The longest packet that conmon reads whole (CONN_SOCK_BUF_SIZE); the excess of a longer one is lost."""

# stdpipe_t in src/utils.h: NO_PIPE, STDIN_PIPE, STDOUT_PIPE, STDERR_PIPE from 0. With a TTY all output is 2.
_STREAM_OF_PREFIX = {2: STDOUT, 3: STDERR}


def parse_packet(packet: bytes) -> tuple[int, bytes]:
    """Return `(stream, payload)` of a packet from conmon; `stream` is `stdcopy.STDOUT` or `STDERR`.

    The caller has dealt with EOF, the empty packet. Raises Internal when the packet is not conmon's.
    """
    stream = _STREAM_OF_PREFIX.get(packet[0]) if packet else None
    if stream is None:
        raise Internal("the monitor sent a packet of no known stream", hint=f"it begins with {packet[:8].hex(' ')!r}")
    return stream, packet[1:]


def input_packets(data: bytes) -> Iterator[memoryview]:
    """Cut input for the process into packets that conmon takes whole; none for no data: empty is EOF."""
    view = memoryview(data)
    for start in range(0, len(view), INPUT_MAX):
        yield view[start : start + INPUT_MAX]
