"""Answers of ``pipeline query`` as text: an aligned table, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

MAX_SHOWN_ROWS = 40
MAX_CELL_WIDTH = 48
MAX_LINE_WIDTH = 150
"""The last column may be wider than others, as long as lines are not longer than this."""


def render(answer: pa.Table, form: str, max_rows: int | None = MAX_SHOWN_ROWS) -> str:
    """Return the answer as ``table`` (at most ``max_rows`` rows), ``csv`` or ``json``."""
    return render_table(answer, max_rows) if form == "table" else _TEXT_FORMATS[form](answer)


def render_table(answer: pa.Table, max_rows: int | None = MAX_SHOWN_ROWS) -> str:
    """Return the answer as aligned text, numbers to the right, with a note of rows left out."""
    shown = answer if max_rows is None else answer.slice(0, max_rows)
    columns: list[list[str]] = []
    widths: list[int] = []
    for place, (name, column) in enumerate(zip(answer.column_names, shown.itercolumns(), strict=True), start=1):
        rest = MAX_LINE_WIDTH - sum(widths) - 2 * len(widths)
        limit = max(MAX_CELL_WIDTH, rest) if place == len(answer.column_names) else MAX_CELL_WIDTH
        columns.append([_cell(value, limit) for value in column.to_pylist()])
        widths.append(max([len(name), *map(len, columns[-1])]))
    is_number = [pa.types.is_integer(field.type) or pa.types.is_floating(field.type) for field in answer.schema]
    lines = [_aligned(answer.column_names, widths, is_number), "  ".join("─" * width for width in widths)]
    lines += [_aligned(row, widths, is_number) for row in zip(*columns, strict=True)]
    if not answer.num_rows:
        lines.append("(no rows)")
    if shown.num_rows < answer.num_rows:
        lines.append(f"… {answer.num_rows - shown.num_rows} more rows; add a LIMIT, or choose csv, json or parquet")
    return "\n".join(lines) + "\n"


def _aligned(cells: Sequence[str], widths: Sequence[int], is_number: Sequence[bool]) -> str:
    padded = [
        cell.rjust(width) if right else cell.ljust(width)
        for cell, width, right in zip(cells, widths, is_number, strict=True)
    ]
    return "  ".join(padded).rstrip()


def _cell(value: Any, limit: int = MAX_CELL_WIDTH) -> str:
    """Return a value on one line: numbers to six digits, text with its white space visible, cut at ``limit``."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        text = "[" + ", ".join(_cell(item) for item in value[:limit]) + "]"
    else:
        text = str(value).replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
        # Tokens of spaces alone are common in code and would look like nothing at all.
        text = f"'{text}'" if text and not text.strip(" ") else text
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _render_csv(answer: pa.Table) -> str:
    """Return CSV; lists and structures are written as JSON, null as nothing."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(answer.column_names)
    for row in zip(*(column.to_pylist() for column in answer.itercolumns()), strict=True):
        writer.writerow([_to_json(value) if isinstance(value, list | dict) else value for value in row])
    return text.getvalue()


def _render_json(answer: pa.Table) -> str:
    """Return a JSON list of one object per row; NaN and infinity, which JSON lacks, become null."""
    lines = ",\n".join(_to_json(row) for row in answer.to_pylist())
    return f"[\n{lines}\n]\n" if lines else "[]\n"


def _to_json(value: Any) -> str:
    return json.dumps(_without_nan(value), ensure_ascii=False, default=str)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return value


_TEXT_FORMATS = {"csv": _render_csv, "json": _render_json}
