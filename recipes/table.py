"""A table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align rows of text under a header: the first column to the left, numbers to the right.

    >>> print(table(["method", "steps"], [["AdamW", "50"], ["GapAware", "7"]]))
    method    steps
    ---------------
    AdamW        50
    GapAware      7
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(w) for cell, w in others)])

    top = line(header)
    return "\n".join([top, "-" * len(top), *map(line, rows)])
