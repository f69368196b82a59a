"""Figures to text. Pure."""

from collections.abc import Sequence

NOTHING = "-"


def number(value: float | None, digits: int = 1) -> str:
    """Show a figure with so many digits after the point, or a dash when it is missing."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def ratio(value: float | None) -> str:
    """Show a ratio: 1.53x."""
    return NOTHING if value is None else f"{value:.2f}x"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a Markdown table that is also legible as it is: the first column to the left, figures to the right.

    Raises ValueError when a row has not as many cells as the header.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(_line(row, widths) for row in (header, rule, *rows))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell.rjust(width) if column else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return f"| {' | '.join(padded)} |"
