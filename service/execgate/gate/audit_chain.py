"""The chain of an audit log: what an entry looks like, and whether a log is whole. No I/O.

The theory. An entry is one line, a JSON object in ASCII, whose `prev` is the SHA-256 of the exact bytes of the line
before it, without the newline::

    {"seq":7,"time":"2026-01-31T12:00:00.000123Z","event":"start", … ,"prev":"5f1a…"}

So whoever knows the hash of one line knows every line before it: none can be changed, taken out, put in or moved
without the next one telling. What comes behind the last line that somebody knows is proven by nothing: the end can be
cut off, and whoever may write the file may write all of it anew. Therefore `verify` says the last hash, to be noted
elsewhere.

A line that was being written when its writer died has no newline. It stays, and the entry behind it, `recovered`, says
how long it is and what it hashes to, and follows the entry before it: the chain goes around it.
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

RECOVERED, LOST = "recovered", "lost"
"""Entries that tell of the log itself: of a torn line, and of entries that could not be written."""

MAX_LINE = 16 * 1024
"""Bytes that no entry reaches, whatever is asked for: its fields are bounded (`gate.audit`). journald cuts at 48 KB."""

MAX_FINDINGS = 100
"""Breaks and notes that a verification keeps; it counts the others."""

_NOTHING = "0" * 64
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ENCODER = json.JSONEncoder(separators=(",", ":"))  # escapes whatever is not ASCII


@dataclass(frozen=True, slots=True)
class Link:
    """An entry as the next one knows it: its number, and the hash of its line in hexadecimal."""

    seq: int
    digest: str

    def after(self, line: bytes) -> "Link":
        """Return the link that a line makes which follows this one."""
        return Link(self.seq + 1, digest_of(line))


BEGINNING = Link(0, _NOTHING)
"""What the first entry of all follows."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A line that was read: `fields` is all of it."""

    seq: int
    event: str
    prev: str
    fields: Mapping[str, Any]

    def follows(self, link: Link) -> bool:
        """Whether it is the next one."""
        return self.seq == link.seq + 1 and self.prev == link.digest

    def tells_of(self, size: int, digest: str) -> bool:
        """Whether it says that a line of `size` bytes was torn."""
        told = (self.fields.get("torn_bytes"), self.fields.get("torn_sha256"))
        return self.event == RECOVERED and told == (size, digest)


def digest_of(line: bytes) -> str:
    """Return the hash of a line."""
    return hashlib.sha256(line).hexdigest()


def encode(link: Link, time_ns: int, event: str, fields: Mapping[str, Any]) -> bytes:
    """Return the line of the entry that follows `link`, without its newline; `time_ns` is since the epoch."""
    entry = {"seq": link.seq + 1, "time": _rfc3339(time_ns), "event": event, **fields, "prev": link.digest}
    return escape(entry).encode("ascii")


def escape(value: object) -> str:
    """Return a value as JSON in printable ASCII."""
    return _ENCODER.encode(value).replace("\x7f", "\\u007f")  # DEL is ASCII, and terminals obey it


def parse(line: bytes) -> Entry | None:
    """Return the entry that a line is, or None."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    seq, event, prev = fields.get("seq"), fields.get("event"), fields.get("prev")
    if type(seq) is not int or seq < 1 or not isinstance(event, str):
        return None
    return Entry(seq, event, prev, fields) if isinstance(prev, str) and _DIGEST.fullmatch(prev) else None


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to say of a line: `place` is `FILE:LINE`."""

    place: str
    text: str


@dataclass(slots=True)
class _Doubtful:
    """A line that does not follow: the next one says whether it was torn."""

    place: str
    size: int
    digest: str
    entry: Entry | None
    whole: bool
    reason: str


@dataclass(slots=True)
class Verifier:
    """Checks a log line by line, the oldest first.

    `breaks` are the places where the chain does not hold, the first one first; `notes` are those where it holds and
    something is to be said: torn lines, and lines that could not be written. `first` and `last` are the numbers at its
    ends; `last.digest` is worth keeping. With `expected_seq` or `expected_hash` one entry must have these (`met`).
    """

    expected_seq: int | None = None
    expected_hash: str | None = None
    entries: int = 0
    first: int = 0
    last: Link | None = None
    breaks: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    findings: int = 0
    met: bool = False
    _before: Link = BEGINNING  # what `last` follows
    _last_line: tuple[str, int] = ("", 0)  # where that is, and how long
    _doubtful: _Doubtful | None = None

    def feed(self, line: bytes, place: str, *, whole: bool = True) -> None:
        """Look at the next line, without its newline; it has none if it is not `whole`."""
        entry = parse(line)
        expected = self._settle_doubt(entry)
        reason = "is no entry of an audit log" if entry is None else self._objection(entry, expected=expected)
        if entry is not None and reason is None:
            self._accept(entry, line, place)
        elif entry is not None and self._unmakes_last(entry):
            self._note(self._last_line[0], _torn(self._last_line[1]))
            self.entries -= 1
            self.last = self._before
            self._accept(entry, line, place)
        else:
            self._doubtful = _Doubtful(place, len(line), digest_of(line), entry, whole, reason or "")

    def finish(self) -> None:
        """There are no more lines."""
        doubtful = self._doubtful
        if doubtful is not None and not doubtful.whole:
            self._note(doubtful.place, f"the log ends in {doubtful.size} bytes of a line that is not whole")
        elif doubtful is not None:
            self._break(doubtful)
        self._doubtful = None

    @property
    def whole(self) -> bool:
        """Whether the chain holds, and has what was expected."""
        return not self.breaks and (self.met or (self.expected_seq is None and self.expected_hash is None))

    # -- inside ------------------------------------------------------------------------------------------------------

    def _settle_doubt(self, entry: Entry | None) -> bool:
        """Judge the line before `entry`, if it did not follow; return whether it is the torn one that it tells of."""
        doubtful, self._doubtful = self._doubtful, None
        if doubtful is None:
            return False
        follows = entry is not None and self.last is not None and entry.follows(self.last)
        if entry is not None and follows and entry.tells_of(doubtful.size, doubtful.digest):
            self._note(doubtful.place, _torn(doubtful.size))
            return True
        self._break(doubtful, go_on=not follows)
        return False

    def _break(self, doubtful: _Doubtful, *, go_on: bool = True) -> None:
        """Say that the chain does not hold; go on behind that line, unless it was only put in."""
        self._find(self.breaks, doubtful.place, doubtful.reason)
        if doubtful.entry is not None and go_on:
            self.entries += 1
            self.first = self.first or doubtful.entry.seq
            self.last = Link(doubtful.entry.seq, doubtful.digest)
            self._before, self._last_line = BEGINNING, (doubtful.place, doubtful.size)

    def _objection(self, entry: Entry, *, expected: bool) -> str | None:
        """Return why an entry cannot come next; None when it does. `expected`: the line that it tells of is there."""
        last = self.last
        if last is None:
            is_wrong = (entry.seq == 1) is not (entry.prev == _NOTHING)
            return "its number and what it follows do not fit each other" if is_wrong else None
        if entry.follows(last):
            return "the torn line that it tells of is missing" if entry.event == RECOVERED and not expected else None
        if entry.seq == 1 and entry.prev == _NOTHING:
            return f"a new chain begins behind seq {last.seq}"
        if entry.seq == last.seq + 1:
            return f"seq {entry.seq} does not follow seq {last.seq} as that is here: one of the two was changed"
        if entry.seq > last.seq + 1:
            missing = entry.seq - last.seq - 1
            return f"seq {last.seq + 1} is missing" + ("" if missing == 1 else f", and the {missing - 1} behind it")
        return f"seq {entry.seq} stands behind seq {last.seq}: it was put in, moved or repeated"

    def _unmakes_last(self, entry: Entry) -> bool:
        """Whether an entry says that the last line, which lacks nothing but its newline, was torn."""
        if self.last is None:
            return False
        return entry.follows(self._before) and entry.tells_of(self._last_line[1], self.last.digest)

    def _accept(self, entry: Entry, line: bytes, place: str) -> None:
        self._before = self.last or Link(entry.seq - 1, entry.prev)
        self.last = Link(entry.seq, digest_of(line))
        self._last_line = (place, len(line))
        self.entries += 1
        self.first = self.first or entry.seq
        if entry.event == LOST:
            self._note(place, f"{entry.fields.get('lines')} entries before it could not be written")
        self.met = self.met or (
            self.expected_seq in (None, entry.seq) and self.expected_hash in (None, self.last.digest)
        )

    def _note(self, place: str, text: str) -> None:
        self._find(self.notes, place, text)

    def _find(self, among: list[Finding], place: str, text: str) -> None:
        self.findings += 1
        if len(among) < MAX_FINDINGS:
            among.append(Finding(place, text))


def _torn(size: int) -> str:
    return f"{size} bytes of an entry whose writing was cut short; the next one says so"


def _rfc3339(time_ns: int) -> str:
    seconds, rest = divmod(time_ns, 1_000_000_000)
    return f"{_second(seconds)}.{rest // 1000:06}Z"


@functools.lru_cache(1)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None).isoformat()
