"""Globs: how a policy speaks of names, images, paths and arguments.

The theory. A text is its parts, between the slashes; so is a glob, and part matches part::

    *        any text within a part             ?     one character of it
    [ab-d]   one of these characters            [!a]  one that is not
    **       as a whole part: any number of parts, none too

Everything else is itself, in its own case. A star does not cross a slash, because whoever writes `/var/log/*` does not
think of what is further down. And a text with a part `..` is matched only by the same text, never by a wildcard: where
it leads is not in the text.

What always holds: a match takes time linear in the text, whatever the glob (times its length at worst). Greed would
make `*a*a*a*b` take for ever, so what stands between two stars is taken where it is found first, for good: `(?>…)`. A
later place can be no better, since the next star would swallow the difference. For the last star of a part it is the
end of the part that counts, and for `**` the same is true of parts instead of characters.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_WILD = re.compile(r"[*?\[]")
_FIRST_PARTS = "(?:.*?/)??"  # any number of parts, as few as will do
_ALL_PARTS = "(?:.*/)?"  # as many


@dataclass(frozen=True, slots=True)
class Globs:
    """Some globs, any of which may match. ValueError, in plain words, for one that cannot be meant."""

    texts: tuple[str, ...]
    _exact: frozenset[str] = field(init=False, repr=False, compare=False)
    _wild: re.Pattern[str] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        wild = [text for text in self.texts if _WILD.search(text)]
        pattern = re.compile("|".join(f"(?:{_expression(text)})" for text in wild), re.DOTALL) if wild else None
        object.__setattr__(self, "_exact", frozenset(self.texts).difference(wild))
        object.__setattr__(self, "_wild", pattern)

    def match(self, text: str) -> bool:
        """Return whether one of the globs matches all of `text`."""
        if text in self._exact:
            return True
        return self._wild is not None and self._wild.fullmatch(text + "/") is not None and not _goes_up(text)

    def __str__(self) -> str:
        return ", ".join(self.texts)


NO_GLOBS = Globs(())
"""Matches nothing."""


def _goes_up(text: str) -> bool:
    return ".." in text and ".." in text.split("/")


def _expression(glob: str) -> str:
    """Return the regular expression of a glob. It is for a text with a slash behind it: so each part ends with one."""
    segments: list[list[str]] = [[]]  # what is between one `**` and the next, in parts
    for part in _parts(glob):
        if part == "**":
            segments.append([])
        else:
            segments[-1].append(_part(part, glob))
    first, *rest = ["".join(f"{part}/" for part in segment) for segment in segments]
    if not rest:
        return first
    middle = "".join(f"(?>{_FIRST_PARTS}{segment})" for segment in rest[:-1])
    return first + middle + (f"{_ALL_PARTS}{rest[-1]}" if rest[-1] else ".*")


def _parts(glob: str) -> Iterator[str]:
    for part in glob.split("/"):
        if part == "..":
            raise ValueError(f"{glob!r}: `..` and a wildcard match nothing together")
        yield part


def _part(part: str, glob: str) -> str:
    """Return the regular expression of one part of a glob."""
    chunks = [""]
    at = 0
    while at < len(part):
        expression, at = _character(part, at, glob)
        if expression:
            chunks[-1] += expression
        else:
            chunks.append("")
    if len(chunks) == 1:
        return chunks[0]
    first, *middle, last = chunks
    return first + "".join(f"(?>[^/]*?{chunk})" for chunk in middle) + (f"[^/]*{last}" if last else "[^/]*+")


def _character(part: str, at: int, glob: str) -> tuple[str, int]:
    """Return the regular expression of what begins at `at`, nothing for a star, and where the next begins."""
    if part.startswith("**", at):
        raise ValueError(f"{glob!r}: `**` stands for whole parts between slashes, and here it is within one")
    if part[at] == "*":
        return "", at + 1
    if part[at] == "?":
        return "[^/]", at + 1
    if part[at] == "[":
        return _choice(part, at, glob)
    return re.escape(part[at]), at + 1


def _choice(part: str, at: int, glob: str) -> tuple[str, int]:
    """Return the regular expression of a `[…]`. A `]` right at the beginning is one of its characters."""
    begin = at + 2 if part.startswith("[!", at) else at + 1
    end = part.find("]", begin + 1)
    if end < 0:
        raise ValueError(f"{glob!r}: a `[` without its `]` (the character itself is `[[]`)")
    negated = begin == at + 2
    try:
        inside = "".join(_ranges(part[begin:end]))
    except ValueError as error:
        raise ValueError(f"{glob!r}: {error}") from error
    return f"[{'^/' if negated else ''}{inside}]", end + 1


def _ranges(text: str) -> Iterator[str]:
    at = 0
    while at < len(text):
        if text[at + 1 : at + 2] == "-" and at + 2 < len(text):
            low, high = text[at], text[at + 2]
            if low > high:
                raise ValueError(f"the range {low}-{high} is empty")
            if low <= "/" <= high:  # a slash is no character of a part, and `[+-9]` means no path either
                raise ValueError(f"the range {low}-{high} has a slash in it")
            yield f"{re.escape(low)}-{re.escape(high)}"
            at += 3
        else:
            yield re.escape(text[at])
            at += 1
