"""Columns of a dataset: which holds the documents, and what a row says there.

Columns are judged by their Arrow type, never by the first value alone: a first row that is empty or missing says
nothing about the rest, and a column called ``tokens`` often holds words rather than ids.
"""

from __future__ import annotations

import difflib
import logging
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from tailrace.storage.errors import TextError

logger = logging.getLogger(__name__)

TOKEN_COLUMNS = ("tokens", "input_ids")
TEXT_COLUMNS = ("text", "content", "document", "raw_content", "article", "passage", "sentence")

Kind = Literal["text", "tokens"]


class BadRow(NamedTuple):
    """A row that is no document."""

    reason: str
    """What is wrong, to be read after the row's name."""


Row = dict[str, Any] | BadRow
"""Values by column, or why there are none."""


class Column(NamedTuple):
    """The column that documents are taken from, and what it holds."""

    name: str
    kind: Kind


def choose_column(schema: pa.Schema, wanted: str | None, dataset: str) -> Column:
    """Return the column named ``wanted``, or else the first usable one of the customary names; token ids win.

    Raises TextError that lists every column with its type when ``wanted`` is absent or of another type, or when no
    customary name is usable.
    """
    kinds: dict[str, Kind] = {field.name: kind for field in schema if (kind := kind_of(field.type)) is not None}
    if wanted is not None:
        if wanted in kinds:
            return Column(wanted, kinds[wanted])
        raise TextError(_refusal(schema, kinds, wanted, dataset))
    usable = [name for name in TOKEN_COLUMNS if kinds.get(name) == "tokens"]
    usable += [name for name in TEXT_COLUMNS if kinds.get(name) == "text"]
    if not usable:
        raise TextError(_refusal(schema, kinds, None, dataset))
    if len(usable) > 1:
        logger.info("%s: reading column %r; pass --column to read %s", dataset, usable[0], " or ".join(usable[1:]))
    return Column(usable[0], kinds[usable[0]])


def kind_of(column_type: pa.DataType) -> Kind | None:
    """Tell what a column of this Arrow type can be read as: text, token ids, or neither."""
    if pa.types.is_string(column_type) or pa.types.is_large_string(column_type):
        return "text"
    is_list = pa.types.is_list(column_type) or pa.types.is_large_list(column_type)
    if (is_list or pa.types.is_fixed_size_list(column_type)) and pa.types.is_integer(column_type.value_type):
        return "tokens"
    return None


def infer_schema(rows: list[dict[str, Any]]) -> pa.Schema:
    """Return the Arrow types of the first rows of a dataset that declares none, each column judged by itself."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.schema([(name, _infer_type([row.get(name) for row in rows])) for name in names])


def _infer_type(values: list[Any]) -> pa.DataType:
    """Return the type that all values share; where they share none, that of the first text or list of token ids.

    The row that differs is then named when its turn comes.
    """
    unreadable = (pa.ArrowException, OverflowError, UnicodeEncodeError)
    try:
        return pa.array(values).type
    except unreadable:
        if any(isinstance(value, str) for value in values):
            return pa.string()
        usable = (
            value for value in values if isinstance(value, list) and value and all(type(item) is int for item in value)
        )
        try:
            return pa.array([next(usable, None)]).type
        except unreadable:
            return pa.null()


def _refusal(schema: pa.Schema, kinds: dict[str, Kind], wanted: str | None, dataset: str) -> str:
    if wanted is None:
        problem = f"has no column named {', '.join(TOKEN_COLUMNS + TEXT_COLUMNS)} that holds text or token ids"
    elif wanted in schema.names:
        problem = f"column {wanted!r} holds {schema.field(wanted).type}, wanted text or lists of token ids"
    else:
        problem = f"has no column {wanted!r}"
    near = difflib.get_close_matches(wanted, schema.names, n=2, cutoff=0.5) if wanted else []
    offers = [name for name in near if name in kinds] or list(kinds)
    step = f"pass --column {' or --column '.join(offers)}" if offers else "choose another dataset"
    lines = [f"  {field.name}: {field.type}" for field in schema]
    return "\n".join([f"{dataset}: {problem}. Its columns are:", *lines, f"To go on, {step}"])


def read_row(row: Row, column: Column) -> str | list[int] | BadRow:
    """Return the text or the token ids that a row holds, or why it holds none."""
    if isinstance(row, BadRow):
        return row
    value = row.get(column.name)
    if column.kind == "text" and isinstance(value, str):
        return value if value.isascii() else _check_text(value)
    if column.kind == "tokens" and isinstance(value, list) and all(type(token) is int for token in value):
        return value
    wanted = "text" if column.kind == "text" else "a list of whole numbers"
    return BadRow(f"holds {_show(value)} in column {column.name!r}, wanted {wanted}")


def _check_text(text: str) -> str | BadRow:
    """Return the text, or say that it holds half of a UTF-16 pair, which JSON can spell and which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return BadRow(f"holds half a character ({text[error.start]!a} at {error.start}), wanted text")
    return text


def _show(value: object) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, list) and any(type(item) is not int for item in value):
        wrong = next(item for item in value if type(item) is not int)
        return f"a list with {wrong!r:.60}"
    return f"{value!r:.60}"
