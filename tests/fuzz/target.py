"""What a target is, and what several of them share."""

import atexit
import functools
import os
import random
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

FEW = 2048
"""Input of at most this many bytes is also given byte by byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One parser and what must hold of it.

    `check` takes any bytes and returns; whatever it raises is a finding. It is a pure function of its input, so that
    each finding can be repeated. `tokens` are what input of this kind is made of: libFuzzer's dictionary, and
    hypothesis's vocabulary. `is_json` says that input is JSON, behind a first line if `has_first_line`, so that
    mutations can keep its form. `max_length` is the longest input that is tried, in bytes.
    """

    check: Callable[[bytes], None]
    tokens: Sequence[bytes] = ()
    is_json: bool = False
    has_first_line: bool = False
    max_length: int = 4096


@functools.cache
def scratch() -> Path:
    """Return a directory for this process's files, below $TMPDIR, else on a tmpfs: each input is written to a file."""
    memory = "/dev/shm" if "TMPDIR" not in os.environ and os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def cuttings(data: bytes) -> Iterator[list[bytes]]:
    """Yield ways in which `data` can arrive in pieces: at random places, which depend on `data` only, and in bytes."""
    chance = random.Random(zlib.crc32(data))
    places = sorted(chance.randrange(len(data) + 1) for _ in range(chance.randrange(1, 8)))
    yield [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]
    if len(data) <= FEW:
        yield [data[place : place + 1] for place in range(len(data))]
