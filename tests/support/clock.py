"""A time of day that a test can set, for the programs that it starts: the host's own stays as it is."""

import mmap
import struct
from pathlib import Path

from support.programs import find_program, run_program

_SOURCE = Path(__file__).with_name("shifted_clock.c")
_NANO = 1_000_000_000


class ShiftedClock:
    """The time of day of all programs that have `env` in their environment, and of what they start with it.

    Only CLOCK_REALTIME is shifted, as by settimeofday(2); a time namespace could not do that.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        library, shift = directory / "shifted_clock.so", directory / "shift"
        run_program([find_program("gcc"), "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, _SOURCE])
        shift.write_bytes(struct.pack("=q", 0))
        self.env = {"LD_PRELOAD": str(library), "EXECGATE_TEST_CLOCK": str(shift)}
        with shift.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), 8)

    def jump(self, seconds: float) -> None:
        """Have the clock go wrong by so much, or come right again."""
        (before,) = struct.unpack("=q", self._page)
        self._page[:] = struct.pack("=q", before + int(seconds * _NANO))

    def close(self) -> None:
        """Forget the clock; the programs that look at it keep it."""
        self._page.close()
