"""Running a command until it is done, or until a signal ends it: then too what it has changed is put back."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any

_ENDING = (signal.SIGTERM, signal.SIGHUP)


def run_until_signalled(command: Coroutine[Any, Any, int]) -> int:
    """Return the command's exit code, or 128 + the signal that cancelled it. KeyboardInterrupt at Ctrl-C."""
    received: list[int] = []

    async def run() -> int:
        task = asyncio.ensure_future(command)

        def end(number: int) -> None:
            received.append(number)
            task.cancel()

        loop = asyncio.get_running_loop()
        for number in _ENDING:
            loop.add_signal_handler(number, end, number)
        try:
            return await task
        except asyncio.CancelledError:
            if received:
                return 128 + received[0]
            raise

    return asyncio.run(run())
