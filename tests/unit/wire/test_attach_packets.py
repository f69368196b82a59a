"""The packets of conmon's attach socket."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from execgate.model.errors import Internal
from execgate.wire.attach import INPUT_MAX, PACKET_READ_SIZE, input_packets, parse_packet
from execgate.wire.stdcopy import STDERR, STDOUT


def test_sizes_are_conmons() -> None:
    assert PACKET_READ_SIZE == 1 + 8192
    assert INPUT_MAX == 32 * 1024


@pytest.mark.parametrize(("prefix", "stream"), [(2, STDOUT), (3, STDERR)])
@pytest.mark.parametrize("payload", [b"", b"\x00", b"\x02\x03", b"x" * 8192])
def test_a_packet_names_its_stream(prefix: int, stream: int, payload: bytes) -> None:
    assert parse_packet(bytes([prefix]) + payload) == (stream, payload)


@given(st.binary(max_size=4))
def test_every_other_packet_is_refused(packet: bytes) -> None:
    if packet[:1] in (b"\x02", b"\x03"):
        packet = b"\x01" + packet
    with pytest.raises(Internal) as caught:
        parse_packet(packet)
    assert packet[:8].hex(" ") in caught.value.hint


@pytest.mark.parametrize(
    ("length", "sizes"),
    [
        (0, []),  # an empty packet would close the process's stdin
        (1, [1]),
        (INPUT_MAX, [INPUT_MAX]),
        (INPUT_MAX + 1, [INPUT_MAX, 1]),
        (2 * INPUT_MAX, [INPUT_MAX, INPUT_MAX]),
        (61_000, [INPUT_MAX, 28_232]),
    ],
)
def test_input_is_cut_into_packets_that_conmon_takes_whole(length: int, sizes: list[int]) -> None:
    data = bytes(index % 251 for index in range(length))
    packets = list(input_packets(data))
    assert [len(packet) for packet in packets] == sizes
    assert b"".join(packets) == data
