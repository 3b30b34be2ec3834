"""``documents``: what the dataset says of every document, in the columns that the cache keeps."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from tailrace.analysis.harvest.table import TableDescription, WrittenTables
from tailrace.storage.tables import column, write_table

SCHEMA = pa.schema(
    [
        column("document", pa.int64(), "the document: its place in the dataset's own order, from 0"),
        column("split", pa.string(), "split of the cache that it lies in"),
    ]
)
_KEPT = "column of the dataset, kept by `pipeline cache --keep-columns`"

DESCRIPTION = TableDescription(
    name="documents",
    meaning=(
        "One row per document of the split, or of the rows drawn with `--rows`, where the cache was made with "
        "`--keep-columns`, and a column for each that it keeps, under the dataset's own name. Values of one type have "
        "it; a column of several types holds texts. Sorted by document: `JOIN documents USING (document)`. Absent for "
        "other caches and with `--live`."
    ),
    schema=SCHEMA,
)


def write(documents: pa.Table, split: str, folder: Path) -> WrittenTables:
    """Write the table. ``documents`` has ``document`` and the kept columns."""
    ordered = documents.sort_by("document")
    kept = [column(field.name, field.type, _KEPT, nullable=True) for field in list(ordered.schema)[1:]]
    splits = pa.array([split] * ordered.num_rows, pa.string())
    schema = pa.schema([*SCHEMA, *kept])
    table = ordered.add_column(1, SCHEMA.field("split"), splits).cast(schema)
    file = f"{DESCRIPTION.name}.parquet"
    return WrittenTables({DESCRIPTION.name: write_table(folder / file, schema, table.to_batches())}, [file])
