"""`pipeline query`: SQL over an artifact's published tables, one view per Parquet file.

A query can read the tables and nothing else: no other file, no network, no extension, and no statement that writes.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import duckdb
import pyarrow as pa

from storage.artifact import MANIFEST, read_manifest, read_sealed, write_atomically
from storage.errors import ActionableError, ArtifactMismatch
from storage.tables import write_table

KINDS = ("tables", "sweep", "evaluation")
"""What has Parquet tables: those of ``pipeline analyze``, ``runs`` of a sweep and ``tokens`` of an evaluation. Spelled
out, because the modules that make them load torch."""

Format = Literal["table", "csv", "json", "parquet"]

MAX_SHOWN_ROWS = 40
MAX_CELL_WIDTH = 48


def run(sql: str, *, tables: Path, format: Format = "table", output: Path | None = None) -> str | pa.Table:
    """Answer one SELECT over the tables at ``tables``, in DuckDB's SQL; write the answer to ``output`` where given.

    ``tables`` is the path of tables, a sweep or an evaluation. Returns text, or for ``parquet`` an Arrow table.
    ``table`` shows the first rows only, unless it goes to a file. Raises ActionableError with DuckDB's own message for
    SQL that it refuses.
    """
    if output is not None:
        _check_output(output, tables)
    answer = select(sql, tables)
    if format == "parquet":
        if output is not None:
            write_table(output, answer.schema, answer.to_batches())
        return answer
    max_rows = None if output is not None else MAX_SHOWN_ROWS
    text = render_table(answer, max_rows) if format == "table" else _TEXT_FORMATS[format](answer)
    if output is not None:
        write_atomically(output, text.encode())
    return text


def _check_output(output: Path, tables: Path) -> None:
    if output.resolve().is_relative_to(tables.resolve()):
        raise ActionableError(f"{output}: lies inside the published tables; write the answer somewhere else")
    if output.is_dir() or not output.parent.is_dir():
        what = "is a directory" if output.is_dir() else "has no directory to lie in"
        raise ActionableError(f"{output}: {what}; give the path of a file in a directory that exists")


def select(sql: str, tables: Path) -> pa.Table:
    """Return the answer to one SELECT as an Arrow table. Raises ActionableError."""
    names = _table_files(tables)
    with duckdb.connect(":memory:") as connection:
        _open_views(connection, names)
        try:
            _refuse_other_statements(connection, sql)
            return connection.sql(sql).to_arrow_table()
        except duckdb.Error as error:
            raise ActionableError(f"{str(error).strip()}\n{_list_tables(names)}") from error


def _table_files(tables: Path) -> dict[str, Path]:
    # where nothing is published, read_manifest says whether nothing lies there or something unfinished does
    kind = str(read_sealed(tables / MANIFEST).get("kind")) if (tables / MANIFEST).exists() else KINDS[0]
    if kind not in KINDS:
        raise ArtifactMismatch(
            f"{tables}: is of kind {kind}, which has no tables; give the path of tables, a sweep or an evaluation"
        )
    files = read_manifest(tables, kind)["files"]
    return {name.removesuffix(".parquet"): tables / name for name in files if name.endswith(".parquet")}


def _open_views(connection: duckdb.DuckDBPyConnection, names: dict[str, Path]) -> None:
    """Make a view of each file, then shut everything else out for good."""
    connection.execute("SET autoinstall_known_extensions = false")
    connection.execute("SET autoload_known_extensions = false")
    connection.execute("SET python_enable_replacements = false")
    connection.execute(f"SET allowed_paths = [{', '.join(_quoted(str(path)) for path in names.values())}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    for name, path in names.items():
        connection.execute(f'CREATE VIEW "{name}" AS SELECT * FROM read_parquet({_quoted(str(path))})')


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _refuse_other_statements(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    statements = connection.extract_statements(sql)
    kinds = [statement.type.name for statement in statements]
    if kinds != ["SELECT"]:
        raise ActionableError(
            f"one SELECT is wanted, got {', '.join(kinds) or 'nothing'}; tables are read-only here "
            "(DESCRIBE, SUMMARIZE and SHOW TABLES count as SELECT)"
        )


def _list_tables(names: dict[str, Path]) -> str:
    return f"Tables: {', '.join(sorted(names))}. Their columns: DESCRIBE {min(names, default='features')}"


def render_table(answer: pa.Table, max_rows: int | None = MAX_SHOWN_ROWS) -> str:
    """Return the answer as aligned text, numbers to the right, with a note of rows left out."""
    shown = answer if max_rows is None else answer.slice(0, max_rows)
    columns = [[_cell(value) for value in column.to_pylist()] for column in shown.itercolumns()]
    widths = [max([len(name), *map(len, cells)]) for name, cells in zip(answer.column_names, columns, strict=True)]
    is_number = [pa.types.is_integer(field.type) or pa.types.is_floating(field.type) for field in answer.schema]
    lines = [_aligned(answer.column_names, widths, is_number), "  ".join("─" * width for width in widths)]
    lines += [_aligned(row, widths, is_number) for row in zip(*columns, strict=True)]
    if shown.num_rows < answer.num_rows:
        lines.append(f"… {answer.num_rows - shown.num_rows} more rows; add a LIMIT, or choose csv, json or parquet")
    return "\n".join(lines) + "\n"


def _aligned(cells: Sequence[str], widths: Sequence[int], is_number: Sequence[bool]) -> str:
    padded = [
        cell.rjust(width) if right else cell.ljust(width)
        for cell, width, right in zip(cells, widths, is_number, strict=True)
    ]
    return "  ".join(padded).rstrip()


def _cell(value: Any) -> str:
    """Return a value on one line: numbers to six digits, text with its white space visible, long values cut."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        text = "[" + ", ".join(_cell(item) for item in value[:MAX_CELL_WIDTH]) + "]"
    else:
        text = str(value).replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
        # Tokens of spaces alone are common in code and would look like nothing at all.
        text = f"'{text}'" if text and not text.strip(" ") else text
    return text if len(text) <= MAX_CELL_WIDTH else text[: MAX_CELL_WIDTH - 1] + "…"


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
