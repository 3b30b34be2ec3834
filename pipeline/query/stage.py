"""`pipeline query`: SQL over the published tables of artifacts, one view per table.

A query can read the tables and nothing else: no other file, no network, no extension, and no statement that writes.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import duckdb
import pyarrow as pa

from tailrace.pipeline.query.saved import MADE_BY
from tailrace.pipeline.query.text_table import MAX_SHOWN_ROWS, render_table, values_of
from tailrace.pipeline.query.views import (
    FOLDER,
    Tables,
    View,
    each_folder,
    find_views,
    open_views,
    refuse_changed_tables,
)
from tailrace.storage.artifact import write_output
from tailrace.storage.errors import ActionableError
from tailrace.storage.tables import write_table

Format = Literal["table", "csv", "json", "parquet"]

Parameters = Mapping[str, Any]
"""Values of ``$name`` in the SQL."""

logger = logging.getLogger(__name__)

_LIST_WIDTH = 110


def run(
    sql: str,
    *,
    tables: Tables,
    format: Format = "table",
    output: Path | None = None,
    parameters: Parameters | None = None,
    attached: Mapping[str, Path] | None = None,
    each: bool = False,
    empty: str = "",
) -> str | pa.Table:
    """Answer one SELECT over ``tables``, in DuckDB's SQL; write the answer to ``output`` where given.

    ``tables`` is the path of tables, a sweep or an evaluation; or several paths, whose views are then seen side by
    side; or paths by name, whose views are then ``name.features`` and so on. ``attached`` are files of the user's own,
    seen as views by name. Returns text, or for ``parquet`` an Arrow table. ``table`` shows the first rows only, unless
    it goes to a file. ``each`` asks the tables inside a folder one after the other, and says in the column ``folder``
    whose an answer is. ``empty`` is logged as a warning where the answer has no row. Raises ActionableError with
    DuckDB's own message for SQL that it refuses.
    """
    views = find_views(tables, attached)
    if output is not None:
        _check_output(output, views)
    folders = each_folder(tables) if each else []
    answer = _select_each(sql, folders, views, parameters) if folders else _select(sql, views, parameters)
    if format in ("json", "parquet"):
        _refuse_namesakes(answer, format)
    if empty and not answer.num_rows:
        logger.warning("no rows: %s", empty)
    if output is not None:
        write_answer(output, answer, format)
    return answer if format == "parquet" else render(answer, format, None if output is not None else MAX_SHOWN_ROWS)


def format_of(output: Path | None) -> Format:
    """Return the format that a file's ending stands for; a table for any other, and without a file."""
    by_suffix: dict[str, Format] = {".parquet": "parquet", ".csv": "csv", ".json": "json"}
    return by_suffix.get(output.suffix, "table") if output is not None else "table"


def write_answer(output: Path, answer: pa.Table, format: Format) -> None:
    """Write all rows of an answer to a file, which holds its old bytes or all the new ones."""
    if format == "parquet":
        write_table(output, answer.schema, answer.to_batches())
    else:
        write_output(output, render(answer, format, None).encode())


def select(
    sql: str,
    tables: Tables,
    parameters: Parameters | None = None,
    attached: Mapping[str, Path] | None = None,
) -> pa.Table:
    """Return the answer to one SELECT as an Arrow table. Raises ActionableError."""
    return _select(sql, find_views(tables, attached), parameters)


def list_tables(tables: Tables, attached: Mapping[str, Path] | None = None) -> pa.Table:
    """Return a row for every column of every table: table, column, type, unit, meaning."""
    columns = [(view.sql_name, column) for view in find_views(tables, attached) for column in view.columns()]
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
    text = f"{column['meaning']} ({', '.join(filter(None, facts))})".strip()
    return textwrap.fill(
        text, _LIST_WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False
    )


def _refuse_namesakes(answer: pa.Table, format: Format) -> None:
    names = answer.column_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ActionableError(
            f"--format {format} has a column by its name, and {', '.join(twice)} is the name of several; give each its "
            "own with AS"
        )


def _check_output(output: Path, views: Sequence[View]) -> None:
    published = {path.parent.resolve() for view in views if not view.is_attached for path in view.files}
    if any(output.resolve().is_relative_to(folder) for folder in published):
        raise ActionableError(f"{output}: lies inside the published tables; write the answer somewhere else")
    check_folder(output)


def check_folder(output: Path) -> None:
    """Raise ActionableError unless a file can be written at ``output``."""
    if output.is_dir() or not output.parent.is_dir():
        what = "is a directory" if output.is_dir() else "has no directory to lie in"
        raise ActionableError(f"{output}: {what}; give the path of a file in a directory that exists")


def _select(sql: str, views: Sequence[View], parameters: Parameters | None) -> pa.Table:
    with duckdb.connect(":memory:") as connection:
        try:
            open_views(connection, views)
            _refuse_other_statements(connection, sql)
            refuse_changed_tables(connection, sql, views)
            return connection.sql(sql, params=dict(parameters) if parameters else None).to_arrow_table()
        except duckdb.Error as error:
            raise ActionableError(f"{_explained(error, views)}\n{_name_tables(views)}") from error
        except RuntimeError as error:
            if str(error) == _INTERRUPTED:
                raise KeyboardInterrupt from error
            raise


_INTERRUPTED = "Query interrupted"
"""What DuckDB makes of Ctrl-C."""


def _select_each(
    sql: str, folders: Sequence[tuple[str, Tables]], views: Sequence[View], parameters: Parameters | None
) -> pa.Table:
    """Ask the tables of one folder after the other, with the attached files of ``views``."""
    own = [view for view in views if view.is_attached]
    answers = []
    for folder, tables in folders:
        answer = _select(sql, [*find_views(tables), *own], parameters)
        answers.append(answer.add_column(0, FOLDER.name, pa.array([folder] * len(answer), pa.string())))
    return pa.concat_tables(answers, promote_options="default")


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


def render(answer: pa.Table, form: str, max_rows: int | None = MAX_SHOWN_ROWS) -> str:
    """Return the answer as ``table`` (at most ``max_rows`` rows), ``csv`` or ``json``."""
    return render_table(answer, max_rows) if form == "table" else _TEXT_FORMATS[form](answer)


def _render_csv(answer: pa.Table) -> str:
    """Return CSV; lists and structures are written as JSON, null as nothing."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(answer.column_names)
    for row in zip(*map(values_of, answer.itercolumns()), strict=True):
        writer.writerow([_to_json(value) if isinstance(value, list | dict) else value for value in row])
    return text.getvalue()


def _render_json(answer: pa.Table) -> str:
    """Return a JSON list of one object per row; NaN and infinity, which JSON lacks, become null."""
    rows = zip(*map(values_of, answer.itercolumns()), strict=True)
    lines = ",\n".join(_to_json(dict(zip(answer.column_names, row, strict=True))) for row in rows)
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
