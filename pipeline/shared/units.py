"""Sizes, times and tables as people read them in a terminal."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence

import click

WIDEST = 110
"""Columns of a terminal that text fills at most; lines that are longer are hard to read."""
_MINUTE, _HOUR, _DAY = 60, 3600, 86_400


def size(n_bytes: float) -> str:
    """Return bytes in the unit that leaves one to three digits before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.3g} TB" if n_bytes < 999.5 else f"{n_bytes:,.0f} TB"


def duration(seconds: float) -> str:
    """Return a time in the unit that leaves one or two digits before the point: ``50 s``, ``4.5 min``, ``21 h``."""
    for length, unit in ((_DAY, "days"), (_HOUR, "h"), (_MINUTE, "min")):
        if (n := seconds / length) >= 1.5:
            return f"{n:.1f} {unit}" if n < 9.95 else f"{n:.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"


def age(moment: float, now: float | None = None) -> str:
    """Return how long ago a moment was, in its largest unit; the day of what is older than two months."""
    seconds = max(0.0, (time.time() if now is None else now) - moment)
    if seconds < _MINUTE:
        return "now"
    if seconds < _HOUR:
        return f"{seconds // _MINUTE:.0f} min"
    if seconds < 2 * _DAY:
        return f"{seconds // _HOUR:.0f} h"
    if seconds < 60 * _DAY:
        return f"{seconds // _DAY:.0f} days"
    return time.strftime("%Y-%m-%d", time.localtime(moment))


def width() -> int:
    """Return how many columns text has."""
    return min(WIDEST, shutil.get_terminal_size().columns)


def cut(line: str, columns: int) -> str:
    """Return a line that is cut off where it is longer than a terminal is wide."""
    plain = click.unstyle(line)
    return line if len(plain) <= columns else plain[: columns - 1] + "…"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Return rows as lines of aligned columns, the columns ``right`` to the right; the first row is the header.

    Cells may hold colours, which take no room.
    """
    lengths = [max(len(click.unstyle(row[column])) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = []
        for column, (cell, length) in enumerate(zip(row, lengths, strict=True)):
            space = " " * (length - len(click.unstyle(cell)))
            cells.append(space + cell if column in right else cell + space)
        lines.append("  ".join(cells).rstrip())
    return [click.style(lines[0], dim=True), *lines[1:]]
