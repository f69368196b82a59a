r"""conmon's lines on the sync pipe and the attach pipe: `{"data": N}` or `{"data": N, "message": "…"}`.

conmon prints them by hand. Up to 2.1.6 it leaves 0x1f and bytes that are no UTF-8 as they are, the message
(up to 8191 bytes of the runtime's stderr) can grow sixfold by escapes, and a conmon that is killed stops
anywhere. The number comes first, so a line that is cut or broken behind it still says what matters; a number
that may itself be cut says nothing.
"""

import json
import re
from dataclasses import dataclass
from typing import Final

MAX_LINE: Final = 16 * 1024
"""How much of one line is kept, in bytes; the rest of it is read and dropped."""

_DECODER: Final = json.JSONDecoder(strict=False)  # made once: json.loads makes one at each call that is not plain
_INT32 = range(-(2**31), 2**31)  # conmon's `int`

# The start of a line whose number is whole: something follows it.
_NUMBER = re.compile(r'\s*\{\s*"data"\s*:\s*(-?[0-9]{1,10})\s*(?=[,}])')
# As much of a message as is a valid JSON string. Nothing follows that could make it give back, so the time is linear;
# `*+` would say so, but takes too much before Python 3.11.5 (gh-106052).
_MESSAGE = re.compile(r'\s*,\s*"message"\s*:\s*"((?:[^"\\]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*)')


@dataclass(frozen=True, slots=True)
class SyncMessage:
    """One line.

    `data` is a pid, an exit code or -1 (a failure, told in `message`), as its place in the conversation says.
    It is None for a line that is not conmon's; `message` is then that line. `message` is always encodable
    text.
    """

    data: int | None
    message: str = ""


class SyncLines:
    """Turns the bytes of a pipe into messages, holding at most `MAX_LINE` of them."""

    def __init__(self) -> None:
        self._line = bytearray()

    def __repr__(self) -> str:
        return f"<SyncLines pending={bytes(self._line[:80])!r}>"

    def feed(self, data: bytes) -> list[SyncMessage]:
        """Return the messages that `data` completes: several lines can come in one read. Skips empty ones."""
        messages: list[SyncMessage] = []
        *ends, rest = data.split(b"\n")
        for end in ends:
            self._keep(end)
            messages += self.finish()
        self._keep(rest)
        return messages

    def finish(self) -> list[SyncMessage]:
        """Return the message of the line that EOF has left without its end, or none."""
        line = bytes(self._line)
        self._line.clear()
        return [_parse(line)] if line.strip() else []

    def _keep(self, part: bytes) -> None:
        self._line += part[: MAX_LINE - len(self._line)]


def _parse(line: bytes) -> SyncMessage:
    text = line.decode(errors="replace")
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError):  # RecursionError: a line of 16,000 "["
        return _salvage(text)
    match value:
        case {"data": bool()}:
            return SyncMessage(None, text)
        case {"data": int(number), **fields} if number in _INT32:
            message = fields.get("message")
            return SyncMessage(number, _encodable(message) if isinstance(message, str) else "")
        case _:
            return SyncMessage(None, text)


def _salvage(text: str) -> SyncMessage:
    """Read what can be read of a line that is not JSON, or not all of it."""
    number = _NUMBER.match(text)
    if number is None or int(number[1]) not in _INT32:
        return SyncMessage(None, text)
    message = _MESSAGE.match(text, number.end())
    return SyncMessage(int(number[1]), _encodable(_DECODER.decode(f'"{message[1]}"')) if message else "")


def _encodable(text: str) -> str:
    """Replace lone surrogates, which JSON can express and UTF-8 cannot."""
    return text.encode(errors="replace").decode()
