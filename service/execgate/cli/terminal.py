"""The user's side of a stream: standard streams, the terminal in raw mode, its size.

Reading a terminal, or writing to a pipe that nobody empties, can take for ever, and no event loop can watch every
kind of file. Threads do it, one for each direction; they are daemons, because nobody could wait for them at the end.
"""

import asyncio
import contextlib
import fcntl
import functools
import os
import queue
import select
import signal
import struct
import sys
import termios
import threading
import tty as terminals
from collections.abc import Callable, Iterator
from typing import Any

from execgate.client import Output, Stream
from execgate.model.config import ConsoleSize
from execgate.model.errors import ExecgateError
from execgate.wire.stdcopy import STDOUT

_STDIN, _STDOUT, _STDERR = 0, 1, 2
_READ_SIZE = 64 * 1024


async def interact(stream: Stream, *, tty: bool, stdin: bool) -> None:
    """Connect the user with a session until the stream ends: output, input if wanted, and with a TTY keys and size."""
    helpers: list[asyncio.Task[None]] = []
    with _raw_mode() if tty and stdin else contextlib.nullcontext():
        if tty and window_size() is not None:
            helpers.append(asyncio.create_task(_follow_size(stream)))
        if stdin:
            helpers.append(asyncio.create_task(_copy_input(stream)))
        try:
            await copy_output(stream)
        finally:
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)


async def copy_output(output: Output) -> None:
    """Write what a session writes to where it belongs, in order. BrokenPipeError when nobody wants it any more."""
    writer = _BlockingThread("stdout")
    async for stream, data in output:
        descriptor = _STDOUT if stream == STDOUT else _STDERR
        await writer.call(functools.partial(_write_all, descriptor, data))


def window_size() -> ConsoleSize | None:
    """Return the size of the user's terminal; None when there is none."""
    for descriptor in (_STDOUT, _STDIN, _STDERR):
        with contextlib.suppress(OSError):
            answer = fcntl.ioctl(descriptor, termios.TIOCGWINSZ, b"\0" * 8)
            rows, columns, _, _ = struct.unpack("HHHH", answer)
            return ConsoleSize(rows, columns) if rows and columns else None
    return None


async def _copy_input(stream: Stream) -> None:
    reader = _BlockingThread("stdin")
    while data := await reader.call(_read):
        await stream.write(data)
    await stream.write_eof()


async def _follow_size(stream: Stream) -> None:
    """Tell the session every new size of the window, the newest one if they come faster than they can be told."""
    changed = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, changed.set)
    changed.set()  # it may have changed since the start was asked for
    try:
        while True:
            await changed.wait()
            changed.clear()
            if (size := window_size()) is not None:
                with contextlib.suppress(ExecgateError):  # it is over, and the stream says so
                    await stream.resize(size.height, size.width)
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)


@contextlib.contextmanager
def _raw_mode() -> Iterator[None]:
    """Let every key through as it is, for the length of a `with`, when stdin is a terminal."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(_STDIN)
    try:
        terminals.setraw(_STDIN, termios.TCSANOW)
        yield
    finally:
        with contextlib.suppress(termios.error):  # it may have been closed
            termios.tcsetattr(_STDIN, termios.TCSANOW, before)


def _read() -> bytes:
    """Return the next input; b"" at its end, and when the terminal is gone."""
    while True:
        try:
            return os.read(_STDIN, _READ_SIZE)
        except BlockingIOError:  # somebody who shares it made it so
            select.select([_STDIN], [], [])
        except OSError:
            return b""


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            select.select([], [descriptor], [])


class _BlockingThread:
    """Makes calls that may block, one after the other."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    async def call(self, function: Callable[[], Any]) -> Any:
        """Return, or raise, what `function` does."""
        outcome: asyncio.Future[Any] = self._loop.create_future()
        self._calls.put((function, outcome))
        return await outcome

    def _work(self) -> None:
        while True:
            function, outcome = self._calls.get()
            value, error = None, None
            try:
                value = function()
            except OSError as failure:
                error = failure
            try:
                self._loop.call_soon_threadsafe(_settle, outcome, value, error)
            except RuntimeError:  # the loop is closed: nobody waits
                return


def _settle(outcome: "asyncio.Future[Any]", value: Any, error: OSError | None) -> None:
    if outcome.cancelled():
        return
    if error is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(value)
