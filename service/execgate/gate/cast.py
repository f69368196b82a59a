"""The text of recordings, and how it is read: asciicast v2 for a terminal, JSON lines for all else.

asciicast v2 (docs.asciinema.org/manual/asciicast/v2) is a line with a header, then a line for each event: its time in
seconds since the beginning, its code, its data, which is text. So a terminal's bytes become text: a character whose
bytes came in two pieces is in the later one, and what is no UTF-8 becomes U+FFFD. Our own words about the recording
are markers, and an object `execgate` in the header, which other readers ignore.

The lines of a session without a terminal keep every byte, and say of which stream it is: `data` is text where the
bytes are UTF-8, else there is `base64`. Pieces that end within a character are told in two lines, in both forms.

Both are gzip files, of many members (`gate.members`). A file that ends where it should not, since its writer or the
disk failed, is read up to there.
"""

import base64
import codecs
import json
import math
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, BinaryIO, NamedTuple, Protocol

from execgate.model.config import ConsoleSize
from execgate.model.errors import InvalidArgument

USUAL_SIZE = ConsoleSize(height=24, width=80)
"""What a terminal's size is taken for that nobody has told."""

_UTF8_MAX = 4
_READ_SIZE = 256 * 1024
_LINE_MAX = 64 * 1024 * 1024
_GZIP = b"\x1f\x8b"


class What(Enum):
    """What an event is about. SIZE has `COLUMNSxROWS` as its data, NOTE words of ours."""

    STDOUT = "stdout"
    STDERR = "stderr"
    STDIN = "stdin"
    SIZE = "size"
    NOTE = "note"


class Event(NamedTuple):
    """Something that happened at `time`: on the monotonic clock while it is recorded, since the beginning when read.

    `more` are fields that the line of a NOTE gets beside its words, where it has room for any.
    """

    time: float
    what: What
    data: bytes
    more: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What the head of a recording says. It never holds a value of the environment but those of TERM and SHELL.

    `begun_at` is when it was begun, in seconds since the epoch, and `since` the same on the monotonic clock, for a
    service that goes on with it.
    """

    session_id: str
    container_id: str
    container_name: str
    owner: str
    rule: str
    args: Sequence[str]
    tty: bool
    begun_at: float
    since: float
    size: ConsoleSize = USUAL_SIZE
    environment: Mapping[str, str] = field(default_factory=dict)


class Encoder(Protocol):
    """Makes the text of one recording."""

    def head(self, about: About) -> bytes:
        """Return its first line."""

    def encode(self, events: Iterable[Event]) -> bytes:
        """Return the lines of events."""

    def rest(self) -> tuple[bytes, bytes]:
        """Return the beginnings of characters that were not told yet: of output and of input."""


def encoder(*, tty: bool, since: float, rest: tuple[bytes, bytes] = (b"", b"")) -> Encoder:
    """Return what makes a recording that was begun at `since`, and goes on behind `rest`."""
    return Cast(since, rest) if tty else Lines(since)


class Cast:
    """Makes asciicast v2."""

    def __init__(self, since: float, rest: tuple[bytes, bytes] = (b"", b"")) -> None:
        self._clock = _Clock(since)
        self._decoders = {what: codecs.getincrementaldecoder("utf-8")("replace") for what in (What.STDOUT, What.STDIN)}
        for decoder, begun in zip(self._decoders.values(), rest, strict=True):
            decoder.decode(begun)

    def head(self, about: About) -> bytes:
        """See `Encoder`."""
        return _line(
            {
                "version": 2,
                "width": about.size.width,
                "height": about.size.height,
                "timestamp": int(about.begun_at),
                "title": f"{about.container_name}: {' '.join(about.args)}",
                "command": " ".join(about.args),
                "env": dict(about.environment),
                "execgate": _about(about),
            }
        )

    def encode(self, events: Iterable[Event]) -> bytes:
        """See `Encoder`."""
        return b"".join(line for event in events for line in self._lines(event))

    def _lines(self, event: Event) -> Iterator[bytes]:
        time = self._clock.time_of(event)
        if event.what is What.SIZE:
            yield _line([time, "r", event.data.decode()])
        elif event.what is What.NOTE:
            for what, decoder in self._decoders.items():  # what never became a character
                if text := decoder.decode(b"", final=True):
                    yield _line([time, _CODES[what], text])
            yield _line([time, "m", event.data.decode(errors="replace")])
        else:
            what = What.STDIN if event.what is What.STDIN else What.STDOUT
            if text := self._decoders[what].decode(event.data):
                yield _line([time, _CODES[what], text])

    def rest(self) -> tuple[bytes, bytes]:
        """See `Encoder`."""
        output, given = (decoder.getstate()[0] for decoder in self._decoders.values())
        return output, given


class Lines:
    """Makes JSON lines."""

    def __init__(self, since: float) -> None:
        self._clock = _Clock(since)

    def head(self, about: About) -> bytes:
        """See `Encoder`."""
        return _line({"execgate": _about(about)})

    def encode(self, events: Iterable[Event]) -> bytes:
        """See `Encoder`."""
        return b"".join(line for event in events for line in self._lines(event))

    def _lines(self, event: Event) -> Iterator[bytes]:
        time = self._clock.time_of(event)
        if event.what in (What.NOTE, What.SIZE):
            yield _line({"time": time, event.what.value: event.data.decode(errors="replace"), **event.more})
            return
        for piece, text in _texts(event.data):
            form = {"base64": base64.b64encode(piece).decode()} if text is None else {"data": text}
            yield _line({"time": time, "stream": event.what.value, **form})

    def rest(self) -> tuple[bytes, bytes]:
        """See `Encoder`."""
        return b"", b""


_CODES = {What.STDOUT: "o", What.STDIN: "i"}


def _texts(data: bytes) -> Iterator[tuple[bytes, str | None]]:
    """Yield pieces of `data` with the text that they are; None for what is none.

    Of a piece of text of which only the ends are not whole, they alone are none.
    """
    begin = next((at for at, byte in enumerate(data[:_UTF8_MAX]) if byte & 0xC0 != 0x80), 0)
    end = len(data)
    try:
        text = data[begin:].decode()
    except UnicodeDecodeError as error:
        end = begin + error.start
        if len(data) - end >= _UTF8_MAX or "unexpected end" not in error.reason:
            yield data, None
            return
        text = data[begin:end].decode()
    if begin:
        yield data[:begin], None
    if text:
        yield data[begin:end], text
    if end < len(data):
        yield data[end:], None


def _about(about: About) -> dict[str, Any]:
    return {
        "session": about.session_id,
        "container": about.container_id,
        "name": about.container_name,
        "owner": about.owner,
        "rule": about.rule,
        "args": list(about.args),
        "begun": round(about.begun_at, 6),
        "since": about.since,
    }


class _Clock:
    """Tells when events happened, in seconds since the beginning.

    None before another that is told already: what a thread notes while a file is opened is told first, and may have
    happened last.
    """

    def __init__(self, since: float) -> None:
        self._since = since
        self._last = 0.0

    def time_of(self, event: Event) -> float:
        self._last = max(self._last, round(event.time - self._since, 6))
        return self._last


def _line(value: object) -> bytes:
    """Return a line of JSON. What is no Unicode, in an argument for example, is a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace") + b"\n"


# -- reading -----------------------------------------------------------------------------------------------------------


class Torn(Exception):
    """The file ends where it should not, or is damaged: there is no more that could be read."""


class Played:
    """A recording that is read: `tty`, and `head`, the object of its first line; then its events, once.

    InvalidArgument when it is none.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._lines = _lines(file)
        try:
            self.head = json.loads(next(self._lines, b""))
        except (ValueError, RecursionError, Torn) as error:
            raise InvalidArgument("this is no recording") from error
        self.tty = isinstance(self.head, dict) and "version" in self.head
        if self.tty and self.head["version"] != 2:
            raise InvalidArgument("this is an asciicast of another version: only version 2 can be played")
        if not self.tty and not (isinstance(self.head, dict) and "execgate" in self.head):
            raise InvalidArgument("this is no recording")

    def __iter__(self) -> Iterator[Event]:
        """Yield the events, in order; kinds that are not known are left out. Torn, behind what there is."""
        parse = _parse_cast if self.tty else _parse_line
        for line in self._lines:
            try:
                event = parse(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise Torn from error
            if event is not None:
                yield event


def read_about(file: BinaryIO) -> About | None:
    """Return what the head of a recording of ours says; None when it is none."""
    try:
        played = Played(file)
        told = played.head["execgate"]
        return About(
            session_id=told["session"],
            container_id=told["container"],
            container_name=told["name"],
            owner=told["owner"],
            rule=told["rule"],
            args=told["args"],
            tty=played.tty,
            begun_at=_seconds(told["begun"]),
            since=_seconds(told["since"]),
        )
    except (InvalidArgument, KeyError, TypeError, ValueError):
        return None


def _seconds(value: Any) -> float:
    """Return a time that can be reckoned with. ValueError, TypeError."""
    try:
        seconds = float(value)
    except OverflowError as error:
        raise ValueError("no time") from error
    if not math.isfinite(seconds):
        raise ValueError("no time")
    return seconds


def _parse_cast(value: Any) -> Event | None:
    time, code, data = value
    what = {"o": What.STDOUT, "i": What.STDIN, "r": What.SIZE, "m": What.NOTE}.get(code)
    return None if what is None else Event(_seconds(time), what, str(data).encode(errors="replace"))


def _parse_line(value: Any) -> Event | None:
    time = _seconds(value["time"])
    if "stream" in value:
        data = base64.b64decode(value["base64"]) if "base64" in value else value["data"].encode(errors="replace")
        return Event(time, What(value["stream"]), data)
    return Event(time, What.NOTE, value["note"].encode(errors="replace")) if "note" in value else None


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the whole lines of a file, gzip or not. Torn when it does not end with one, or is damaged."""
    rest = b""
    for data in _inflated(file):
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
        if len(rest) > _LINE_MAX:
            raise Torn
    if rest:
        raise Torn


def _inflated(file: BinaryIO) -> Iterator[bytes]:
    """Yield what a file holds, in bounded pieces; of a torn member, what it had before the tear. Torn."""
    data = file.read(_READ_SIZE)
    if not data.startswith(_GZIP):
        while data:
            yield data
            data = file.read(_READ_SIZE)
    while data:
        data = (yield from _member(file, data)) or file.read(_READ_SIZE)


def _member(file: BinaryIO, data: bytes) -> Generator[bytes, None, bytes]:
    """Yield what a gzip member holds that begins with `data`; return what was read behind it. Torn."""
    inflate = zlib.decompressobj(zlib.MAX_WBITS | 16)
    while data:
        try:
            piece = inflate.decompress(data, _READ_SIZE)
        except zlib.error as error:
            raise Torn from error
        if piece:
            yield piece
        if inflate.eof:
            return inflate.unused_data
        data = inflate.unconsumed_tail or file.read(_READ_SIZE)
    raise Torn
