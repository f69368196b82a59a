"""Capability names against the kernel's own numbers."""

import re
from pathlib import Path

import pytest

from execgate.oci.capabilities import CAPABILITIES, names


def test_names_by_bit() -> None:
    assert names(0) == []
    assert names(1 | 1 << 21 | 1 << 40) == ["CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_CHECKPOINT_RESTORE"]
    assert names(2**41 - 1) == list(CAPABILITIES)
    assert names(2**64 - 1) == list(CAPABILITIES)  # a newer kernel


def test_numbers_are_the_kernels() -> None:
    header = Path("/usr/include/linux/capability.h")
    if not header.exists():
        pytest.skip("the kernel's headers are not installed")
    numbers = dict(re.findall(r"^#define (CAP_[A-Z_]+)\s+(\d+)$", header.read_text(), re.MULTILINE))
    assert {name: number for number, name in enumerate(CAPABILITIES)}.items() <= {
        name: int(number) for name, number in numbers.items()
    }.items()
