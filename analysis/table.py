"""What a table is: a schema that explains itself, what it must count in the pass, and how its rows are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from analysis.harvest import Accumulator, Harvest, Plan, Subject
from storage.tables import ROW_GROUP_ROWS, describe

FEATURES_PER_BATCH = 1024
"""Features whose rows are made at once: the memory of making a table."""


@dataclasses.dataclass(frozen=True)
class TableDescription:
    """One Parquet file of the ``tables`` artifact, as its reader knows it."""

    name: str
    meaning: str
    """What one row is, and what a reader should know; Markdown."""
    schema: pa.Schema


@dataclasses.dataclass(frozen=True)
class Table(TableDescription):
    """A table that is made in the pass over the rows."""

    needs: tuple[type[Accumulator], ...]
    """What the pass must count for it."""
    compute: Callable[[Harvest, Subject, Plan], Iterator[pa.RecordBatch]]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Facts about every file of this table, kept in the file."""
    row_group_rows: int = ROW_GROUP_ROWS


def accumulators(tables: Sequence[Table]) -> tuple[type[Accumulator], ...]:
    """Return every accumulator that some table needs, once, in the order first named."""
    return tuple(dict.fromkeys(kind for table in tables for kind in table.needs))


def record_batch(schema: pa.Schema, columns: Mapping[str, Any]) -> pa.RecordBatch:
    """Build a batch from one array per column; NaN becomes null where the column may be null."""
    assert set(columns) == set(schema.names), "columns and schema agree"
    arrays = [_arrow_array(columns[field.name], field) for field in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _arrow_array(values: Any, field: pa.Field) -> pa.Array:
    if isinstance(values, pa.Array):
        return values.cast(field.type)
    return pa.array(values, type=field.type, from_pandas=field.nullable)


def list_array(values: pa.Array, lengths: NDArray[np.integer]) -> pa.Array:
    """Cut ``values`` into consecutive lists of the given lengths."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def feature_ranges(d_sae: int) -> Iterator[range]:
    """Cut the features into runs of ``FEATURES_PER_BATCH``."""
    for start in range(0, d_sae, FEATURES_PER_BATCH):
        yield range(start, min(start + FEATURES_PER_BATCH, d_sae))


def tables_page(tables: Sequence[TableDescription]) -> str:
    """Return ``docs/tables.md``: every column of every table, from the schemas."""
    parts = [_INTRODUCTION]
    for table in tables:
        lines = [f"## {table.name}", "", table.meaning, "", "| column | type | unit | meaning |", "|---|---|---|---|"]
        for column in describe(table.schema):
            kind = f"{column.type}, may be null" if column.is_nullable else column.type
            lines.append(f"| `{column.name}` | {kind} | {column.unit} | {column.meaning} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """\
# Tables

`pipeline analyze` reads a split of a cache once and writes these Parquet files as one artifact. This page is made from
their schemas by `python -m analysis.tables docs/tables.md`, and a test compares the two; the same sentences lie in the
files themselves (`storage.tables.describe`). `pipeline query "SELECT …"` runs SQL over them, one view per file.

A feature is *active* on a row if its activation there is above zero. Rows are numbered from 0 in the split's token
order (by context, then position), so `row` means the same row in every table made from the same cache, generation and
split. Counts, maxima and histograms are exact; means and deviations are summed in float64, unit by unit, and do not
depend on the number of workers."""
