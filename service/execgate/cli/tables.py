"""Text for people: tables, ages, times."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their titles, in columns."""
    widths = [max(len(row[column]) for row in (titles, *rows)) for column in range(len(titles))]
    for row in (titles, *rows):
        print("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def ago(seconds: float) -> str:
    """Return how long ago a time was (seconds since the epoch)."""
    age = max(0, int(time.time() - seconds))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if age >= length:
            return f"{age // length}{unit} ago"
    return f"{age}s ago"


def rfc3339(seconds: float | None) -> str | None:
    """Return a time (seconds since the epoch) in UTC."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def shown(text: str, limit: int = 60) -> str:
    """Return text with nothing in it that a terminal would obey, and no longer than `limit` characters."""
    printable = "".join(character if character.isprintable() else "?" for character in text)
    return printable if len(printable) <= limit else printable[: limit - 1] + "…"
