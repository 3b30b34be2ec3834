"""`pipeline query`: SQL over the published tables of artifacts, one view per table.

A query can read the tables and nothing else: no other file, no network, no extension, and no statement that writes.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import duckdb
import pyarrow as pa

from tailrace.pipeline.query.render import MAX_SHOWN_ROWS, render
from tailrace.pipeline.query.saved import MADE_BY
from tailrace.pipeline.query.views import Tables, View, find_views, open_views
from tailrace.storage.artifact import write_atomically
from tailrace.storage.errors import ActionableError
from tailrace.storage.tables import write_table

Format = Literal["table", "csv", "json", "parquet"]

Parameters = Mapping[str, Any]
"""Values of ``$name`` in the SQL."""

_LIST_WIDTH = 110


def run(
    sql: str,
    *,
    tables: Tables,
    format: Format = "table",
    output: Path | None = None,
    parameters: Parameters | None = None,
) -> str | pa.Table:
    """Answer one SELECT over ``tables``, in DuckDB's SQL; write the answer to ``output`` where given.

    ``tables`` is the path of tables, a sweep or an evaluation; or several paths, whose views are then seen side by
    side; or paths by name, whose views are then ``name.features`` and so on. Returns text, or for ``parquet`` an Arrow
    table. ``table`` shows the first rows only, unless it goes to a file. Raises ActionableError with DuckDB's own
    message for SQL that it refuses.
    """
    views = find_views(tables)
    if output is not None:
        _check_output(output, views)
    answer = _select(sql, views, parameters)
    if format == "parquet":
        if output is not None:
            write_table(output, answer.schema, answer.to_batches())
        return answer
    text = render(answer, format, None if output is not None else MAX_SHOWN_ROWS)
    if output is not None:
        write_atomically(output, text.encode())
    return text


def select(sql: str, tables: Tables, parameters: Parameters | None = None) -> pa.Table:
    """Return the answer to one SELECT as an Arrow table. Raises ActionableError."""
    return _select(sql, find_views(tables), parameters)


def list_tables(tables: Tables) -> pa.Table:
    """Return a row for every column of every table: table, column, type, unit, meaning."""
    columns = [(view.sql_name, column) for view in find_views(tables) for column in view.columns()]
    return pa.table(
        {
            "table": [table for table, _ in columns],
            "column": [column.name for _, column in columns],
            "type": [column.type for _, column in columns],
            "unit": [column.unit for _, column in columns],
            "nullable": [column.is_nullable for _, column in columns],
            "meaning": [column.meaning for _, column in columns],
        }
    )


def show_tables(listed: pa.Table) -> str:
    """Return ``list_tables`` as text to read: a heading for each table, a line or two for each column."""
    rows = listed.to_pylist()
    width = max((len(row["column"]) for row in rows), default=0)
    parts = []
    for table, columns in groupby(rows, key=itemgetter("table")):
        parts.append("\n".join([table, *(_column_lines(column, width) for column in columns)]) + "\n")
    return "\n".join(parts)


def _column_lines(column: Mapping[str, Any], width: int) -> str:
    facts = [column["type"], column["unit"], "may be null" if column["nullable"] else ""]
    first = f"  {column['column']:{width}}  "
    text = f"{column['meaning']} ({', '.join(filter(None, facts))})"
    return textwrap.fill(
        text, _LIST_WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False
    )


def _check_output(output: Path, views: Sequence[View]) -> None:
    published = {path.parent.resolve() for view in views for path in view.files}
    if any(output.resolve().is_relative_to(folder) for folder in published):
        raise ActionableError(f"{output}: lies inside the published tables; write the answer somewhere else")
    if output.is_dir() or not output.parent.is_dir():
        what = "is a directory" if output.is_dir() else "has no directory to lie in"
        raise ActionableError(f"{output}: {what}; give the path of a file in a directory that exists")


def _select(sql: str, views: Sequence[View], parameters: Parameters | None) -> pa.Table:
    with duckdb.connect(":memory:") as connection:
        try:
            open_views(connection, views)
            _refuse_other_statements(connection, sql)
            return connection.sql(sql, params=dict(parameters) if parameters else None).to_arrow_table()
        except duckdb.Error as error:
            raise ActionableError(f"{_explained(error, views)}\n{_name_tables(views)}") from error


def _explained(error: duckdb.Error, views: Sequence[View]) -> str:
    """Return DuckDB's message; where it misses a table that these artifacts lack, which command makes it."""
    message = str(error).strip()
    missed = re.match(r"Catalog Error: Table with name (\w+) does not exist", message)
    if missed and missed[1] in MADE_BY:
        holders = [view.sql_name for view in views if view.name == missed[1]]
        asked = f"write {' or '.join(holders)}" if holders else f"it is made by {MADE_BY[missed[1]]}"
        return f"there is no table {missed[1]} here; {asked}"
    if "Values were not provided" in message:
        return f"{message}; give each with --set NAME=VALUE"
    return message


def _refuse_other_statements(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    statements = connection.extract_statements(sql)
    kinds = [statement.type.name for statement in statements]
    if kinds != ["SELECT"]:
        raise ActionableError(
            f"one SELECT is wanted, got {', '.join(kinds) or 'nothing'}; tables are read-only here "
            "(DESCRIBE, SUMMARIZE and SHOW TABLES count as SELECT)"
        )


def _name_tables(views: Sequence[View]) -> str:
    names = sorted(view.sql_name for view in views)
    return f"Tables: {', '.join(names)}. Their columns: --list, or DESCRIBE {min(names, default='features')}"
