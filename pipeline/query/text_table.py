"""An answer as text to read: columns that fit the terminal, or a single row with a line for every column."""

from __future__ import annotations

import re
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

MAX_SHOWN_ROWS = 40
_WIDTH = 150
"""Of a line where no terminal says how wide it is."""
_LEAST_CELL = 12
"""A column is cut no further than this, and its name never: lines are then longer than the terminal."""
_MOST_ITEMS = 200
_MOST_LINES = 6
"""Of a value in a row that is shown one line a column."""


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""What a terminal would obey."""


def render_table(answer: pa.Table, max_rows: int | None = MAX_SHOWN_ROWS, width: int | None = None) -> str:
    """Return the answer as aligned text, numbers to the right, with a note of rows left out.

    A single row that is wider than ``width`` (the terminal's, if not given) is shown with a line for every column.
    """
    width = _terminal_width() if width is None else width
    shown = answer if max_rows is None else answer.slice(0, max_rows)
    names = answer.column_names
    columns = [_cells(values_of(column)) for column in shown.itercolumns()]
    natural = [max([_length(name), *map(_length, own)]) for name, own in zip(names, columns, strict=True)]
    if shown.num_rows == 1 and sum(natural) + 2 * (len(natural) - 1) > width:
        return _one_row(names, [own[0] for own in columns], width)
    widths = _fitted(natural, [_length(name) for name in names], width)
    columns = [[_cut(cell, size) for cell in own] for own, size in zip(columns, widths, strict=True)]
    is_number = [pa.types.is_integer(field.type) or pa.types.is_floating(field.type) for field in answer.schema]
    lines = [_aligned(names, widths, is_number), "  ".join("─" * size for size in widths)]
    lines += [_aligned(row, widths, is_number) for row in zip(*columns, strict=True)]
    if not answer.num_rows:
        lines.append("(no rows)")
    if shown.num_rows < answer.num_rows:
        lines.append(f"… {answer.num_rows - shown.num_rows} more rows; add a LIMIT, or choose csv, json or parquet")
    return "\n".join(lines) + "\n"


def values_of(column: pa.ChunkedArray) -> list[Any]:
    """Return the values of a column; dates beyond those that Python has, such as infinity, as texts."""
    try:
        return list(column.to_pylist())
    except (OverflowError, ValueError):
        return [_readable(scalar) for scalar in column]


def _readable(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (OverflowError, ValueError):
        if isinstance(scalar, pa.StructScalar):
            return {name: _readable(part) for name, part in scalar.items()}
        if isinstance(scalar, pa.ListScalar):
            return [_readable(part) for part in scalar.values]
        limits = np.iinfo(f"int{scalar.type.bit_width}")
        infinities = {limits.max: "infinity", -limits.max: "-infinity"}  # as DuckDB hands them over
        return infinities.get(scalar.value, f"{scalar.type} {scalar.value}")


def _terminal_width() -> int:
    return shutil.get_terminal_size((_WIDTH, 0)).columns if sys.stdout.isatty() else _WIDTH


def _fitted(natural: Sequence[int], least: Sequence[int], width: int) -> list[int]:
    """Return widths of columns that fit on a line, if they can: the widest are cut first, and all to the same width."""
    room = width - 2 * (len(natural) - 1)
    limit = max(natural, default=0)
    while (
        limit > _LEAST_CELL and sum(max(own, min(wide, limit)) for own, wide in zip(least, natural, strict=True)) > room
    ):
        limit -= 1
    return [max(own, min(wide, limit)) for own, wide in zip(least, natural, strict=True)]


def _one_row(names: Sequence[str], cells: Sequence[str], width: int) -> str:
    indent = max(map(_length, names)) + 2
    lines = []
    for name, cell in zip(names, cells, strict=True):
        parts = _wrapped(cell, max(width - indent, _LEAST_CELL))
        if len(parts) > _MOST_LINES:
            parts = [*parts[: _MOST_LINES - 1], "…"]
        lines += [
            f"{first}{' ' * (indent - _length(first))}{part}".rstrip()
            for first, part in zip([name, *[""] * (len(parts) - 1)], parts, strict=True)
        ]
    return "\n".join(lines) + "\n"


def _wrapped(text: str, width: int) -> list[str]:
    """Return a text in lines, which end behind a comma of a list where there is one."""
    lines = []
    while len(text) > width:
        end = text.rfind(", ", 0, width + 1) + 1
        lines.append(text[: end or width])
        text = text[end + 1 if end else width :]
    return [*lines, text]


def _aligned(cells: Sequence[str], widths: Sequence[int], is_number: Sequence[bool]) -> str:
    padded = []
    for cell, width, right in zip(cells, widths, is_number, strict=True):
        space = " " * (width - _length(cell))
        padded.append(space + cell if right else cell + space)
    return "  ".join(padded).rstrip()


def _cells(values: Sequence[Any]) -> list[str]:
    """Return a column's values on one line each; its texts are all in quotes if one begins or ends with a space."""
    is_quoted = any(isinstance(value, str) and value != value.strip(" ") for value in values)
    return [_cell(value, is_quoted=is_quoted) for value in values]


def _cell(value: Any, *, is_quoted: bool) -> str:
    """Return a value on one line: numbers to six digits, text with its white space visible, in quotes inside a list."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        items = [_cell(item, is_quoted=True) or "null" for item in value[:_MOST_ITEMS]]
        return "[" + ", ".join([*items, *(["…"] if len(value) > _MOST_ITEMS else [])]) + "]"
    text = _CONTROL.sub(lambda found: repr(found[0])[1:-1], str(value))
    if not (is_quoted and isinstance(value, str)):
        return text
    return f'"{text}"' if "'" in text else f"'{text}'"


def _length(text: str) -> int:
    """Return how many columns of a terminal a text takes: two for Chinese and the like, none for an accent."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(one) else 2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in text
    )


def _cut(text: str, width: int) -> str:
    if _length(text) <= width:
        return text
    while _length(text) >= width:
        text = text[:-1]
    return text + "…"
