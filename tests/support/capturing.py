"""The recording of a pipe and of a terminal's socket, alone, for tests that kill it: `python -m support.capturing`.

For each line on stdin this forks a recorder, says its pid, and says how it ended: 0 if both came to their ends. A fork
takes a millisecond, and what is imported once lives often.
"""

import asyncio
import os
import socket
import sys
from pathlib import Path

from execgate.runtime.readiness import Descriptor
from execgate.runtime.streams import AttachOutput, Output, PipeOutput
from execgate.sessions.backlog import CaptureBacklog


async def record(output: Output, directory: Path, limit: int) -> None:
    """Go on with what is kept in `directory`, to the end."""
    backlog = await CaptureBacklog.load(directory, limit)
    while await output.read({1: backlog.recorder}) is not None:
        pass
    backlog.finish()


async def record_both(directory: Path, limit: int, pipe: int, terminal: int) -> None:
    connection = socket.socket(fileno=terminal)
    connection.setblocking(False)
    await asyncio.gather(
        record(PipeOutput(Descriptor(pipe), 1), directory / "pipe", limit),
        record(AttachOutput(connection), directory / "terminal", limit),
    )


def main() -> None:
    directory, limit, pipe, terminal = Path(sys.argv[1]), *map(int, sys.argv[2:])
    for _line in sys.stdin:
        if not (pid := os.fork()):
            asyncio.run(record_both(directory, limit, pipe, terminal))
            os._exit(0)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
