"""Tables: a schema that explains itself, the accumulators it needs from the pass, and how its rows are made."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tailrace.analysis.harvest.one_pass import Accumulator, Harvest, Plan, Subject
from tailrace.storage.artifact import make_directory
from tailrace.storage.tables import ROW_GROUP_ROWS, describe, write_table

logger = logging.getLogger(__name__)

FEATURES_PER_BATCH = 1024
"""Features whose rows are made at once: the memory of making a table."""


Rows = Iterator[pa.RecordBatch]
"""A table's rows, in batches of its schema."""


def _always(plan: Plan) -> bool:  # noqa: ARG001 - the signature of Table.is_made
    return True


def _no_facts(harvest: Harvest, subject: Subject, plan: Plan) -> Mapping[str, str]:  # noqa: ARG001 - as Table.facts
    return {}


@dataclasses.dataclass(frozen=True)
class TableDescription:
    """A Parquet file of the ``tables`` artifact, or a folder of them, as its reader knows it."""

    name: str
    meaning: str
    """Meaning of a row, and what a reader should know; Markdown."""
    schema: pa.Schema

    @property
    def is_folder(self) -> bool:
        """Whether it is cut into several files."""
        return False


@dataclasses.dataclass(frozen=True)
class Table(TableDescription):
    """A table that is made in the pass over the rows."""

    needs: tuple[type[Accumulator], ...]
    """Accumulators of the pass that it is made from."""
    compute: Callable[[Harvest, Subject, Plan], Rows]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Facts about every file of this table, kept in the file."""
    facts: Callable[[Harvest, Subject, Plan], Mapping[str, str]] = _no_facts
    """Facts that only this pass has, kept in the file too."""
    row_group_rows: int = ROW_GROUP_ROWS
    is_made: Callable[[Plan], bool] = _always
    """Whether this plan makes the table."""
    parts: Callable[[Harvest, Subject, Plan], Iterator[tuple[str, Rows]]] | None = None
    """For a folder: the name of each file without ``.parquet``, and its rows; together those of ``compute``."""

    @property
    def is_folder(self) -> bool:
        """Whether it is cut into several files."""
        return self.parts is not None


def accumulators(tables: Sequence[Table]) -> tuple[type[Accumulator], ...]:
    """Return every accumulator that some table needs, once, in the order first named."""
    return tuple(dict.fromkeys(kind for table in tables for kind in table.needs))


def write_tables(
    tables: Sequence[Table], harvest: Harvest, subject: Subject, plan: Plan, folder: Path
) -> WrittenTables:
    """Write every table that this plan makes into ``folder``. Raises StorageFull if the disk refuses."""
    n_rows: dict[str, int] = {}
    files: list[str] = []
    for table in tables:
        if not table.is_made(plan):
            continue
        parts = table.parts or (lambda *pass_, table=table: iter([("", table.compute(*pass_))]))
        metadata = {**table.metadata, **table.facts(harvest, subject, plan)}
        n_rows[table.name] = 0
        for name, batches in parts(harvest, subject, plan):
            files.append(f"{table.name}/{name}.parquet" if name else f"{table.name}.parquet")
            make_directory((folder / files[-1]).parent)
            n_rows[table.name] += write_table(
                folder / files[-1], table.schema, batches, row_group_rows=table.row_group_rows, metadata=metadata
            )
        logger.info("wrote %s, %d rows", table.name, n_rows[table.name])
    return WrittenTables(n_rows, files)


class WrittenTables(NamedTuple):
    """Row counts and files of the tables that were written."""

    n_rows: dict[str, int]
    """By table."""
    files: list[str]
    """Paths below the folder."""

    def joined(self, others: WrittenTables) -> WrittenTables:
        """Return these tables and others."""
        return WrittenTables({**self.n_rows, **others.n_rows}, [*self.files, *others.files])


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
        title = f"{table.name}/" if table.is_folder else table.name
        lines = [f"## {title}", "", table.meaning, "", "| column | type | unit | meaning |", "|---|---|---|---|"]
        for column in describe(table.schema):
            kind = f"{column.type}, may be null" if column.is_nullable else column.type
            lines.append(f"| `{column.name}` | {kind} | {column.unit} | {column.meaning} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """\
# Tables

`pipeline analyze` reads a split of a cache once ([how](guides/analyze.md)) and writes these Parquet files as one
artifact. This page is made from their schemas by `python -m tailrace.analysis.tables docs/tables.md`, and a test
compares the two; the same sentences lie in the files themselves (`tailrace.storage.tables.describe`). `pipeline query
"SELECT …"` runs SQL over them, one view per table.

A feature is *active* on a row if its activation there is above zero. Rows are numbered from 0 in the split's token
order (by context, then position), so `row` means the same row in every table made from the same cache, generation and
split. Counts, maxima and histograms are exact; means and deviations are summed in float64, unit by unit, and do not
depend on the number of workers."""
