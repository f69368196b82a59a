"""The keys that detach a client from a TTY session: their grammar, and the filter that watches for them."""

from typing import Final

from execgate.model.errors import InvalidArgument

MAX_KEYS: Final = 128
"""The longest sequence. Docker has no bound; this one bounds what is withheld and what one feed costs."""

_DEL = 0x7F
# The value of ctrl-X is its place in this alphabet: ctrl-@ is 0, ctrl-a is 1, ctrl-_ is 31.
_CONTROL_ALPHABET = "@abcdefghijklmnopqrstuvwxyz[\\]^_"


def parse_detach_keys(text: str) -> bytes:
    """Return the bytes of a comma list of keys, such as `ctrl-p,ctrl-q`.

    A key is one ASCII character, `ctrl-` with one of `@ a-z [ \\ ] ^ _`, or `DEL`. The comma itself cannot be
    a key, as in Docker. Raises InvalidArgument for everything else, the empty text included: what that means
    is the caller's decision.
    """
    keys = [_key_code(key) for key in text.split(",", MAX_KEYS)]
    if len(keys) > MAX_KEYS or None in keys:
        raise InvalidArgument(f"Invalid escape keys ({text}) provided")
    return bytes(key for key in keys if key is not None)


def format_detach_keys(keys: bytes) -> str:
    """Return the text that `parse_detach_keys` makes `keys` of; "" for no keys, which it does not take."""
    return ",".join(map(_key_name, keys))


def _key_name(code: int) -> str:
    if code == _DEL:
        return "DEL"
    return f"ctrl-{_CONTROL_ALPHABET[code]}" if code < len(_CONTROL_ALPHABET) else chr(code)


def _key_code(key: str) -> int | None:
    if len(key) == 1 and key.isascii():
        return ord(key)
    if key == "DEL":
        return _DEL
    control = key.removeprefix("ctrl-")
    if len(control) == 1 and control != key and control in _CONTROL_ALPHABET:
        return _CONTROL_ALPHABET.index(control)
    return None


class DetachFilter:
    """Watches a client's input for the detach sequence.

    A beginning of the sequence is withheld until the next bytes decide: always fewer bytes than the sequence
    has. It detaches exactly when the input contains the sequence, and has then passed on exactly what stood
    before it, however the input was cut.

    That differs from Docker's daemon in three places, where the daemon is wrong. There a byte that breaks a
    match is never tried as the start of the next one, so that ctrl-p ctrl-p ctrl-q does not detach (and the
    second ctrl-p is just what a user presses whose first one had no visible effect). There a beginning that
    is withheld at EOF is lost. And there, of a match that spans two reads and breaks in the second (keys
    `abc`, reads `a` and `bx`), bytes are passed on twice.
    """

    def __init__(self, keys: bytes, withheld: bytes = b"") -> None:
        """Watch for `keys`; none of them (`b""`) means that nothing detaches. Go on from what another withheld."""
        self._keys = keys
        self._withheld = withheld
        self._detached = False

    def __repr__(self) -> str:
        return f"<DetachFilter keys={self._keys!r} withheld={len(self._withheld)} detached={self._detached}>"

    @property
    def withheld(self) -> bytes:
        """The beginning of the sequence that waits for its end."""
        return self._withheld

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """Return `(bytes to pass on, whether the sequence was seen)`.

        Input behind the sequence is dropped: nobody is attached any more.
        """
        if self._detached or not self._keys:
            return (b"" if self._detached else data), self._detached
        pending = self._withheld + data
        passed, found, _ = pending.partition(self._keys)
        if found:
            self._withheld, self._detached = b"", True
            return passed, True
        undecided = self._undecided(pending)
        passed, self._withheld = pending[: len(pending) - undecided], pending[len(pending) - undecided :]
        return passed, False

    def flush(self) -> bytes:
        """Return what is withheld: at EOF nothing can complete the sequence, so it is plain input."""
        withheld, self._withheld = self._withheld, b""
        return withheld

    def _undecided(self, pending: bytes) -> int:
        """Return the length of the longest end of `pending` that begins the sequence."""
        longest = min(len(self._keys) - 1, len(pending))
        return next((size for size in range(longest, 0, -1) if pending.endswith(self._keys[:size])), 0)
