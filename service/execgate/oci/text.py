"""How text from outside is shown in a message: short, printable, on one line."""


def shown(text: str, limit: int = 128) -> str:
    """Return `text` safe for a message or a log line: escapes instead of control characters, bounded length.

    Ordinary text of at most `limit` characters comes back as it is. Terminal escapes, line ends, NUL and lone
    surrogates become backslash sequences; what is longer ends in `...`.
    """
    clipped = text[:limit]
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in clipped)
    return safe if len(text) <= limit else safe + "..."
