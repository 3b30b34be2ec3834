"""``rows``: the token of each row whose activations are kept."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from tailrace.analysis.harvest.activations import KeptRows
from tailrace.analysis.harvest.one_pass import Harvest, Plan, Subject
from tailrace.analysis.harvest.rows import documents_at, in_split, tokens_at
from tailrace.analysis.harvest.table import Rows, Table, record_batch
from tailrace.analysis.tables.activations import are_kept
from tailrace.storage.tables import column

ROWS_PER_BATCH = 1 << 18

SCHEMA = pa.schema(
    [
        column("row", pa.int64(), "row of the split, in token order, from 0"),
        column("token_id", pa.int32(), "token at the row"),
        column("token", pa.string(), "text of that token"),
        column("context", pa.int64(), "context id"),
        column("position", pa.int32(), "position in the context, from 0", unit="tokens"),
        column(
            "document", pa.int64(), "document that the token comes from: its place in the dataset's own order, from 0"
        ),
    ]
)


def compute(harvest: Harvest, subject: Subject, plan: Plan) -> Rows:  # noqa: ARG001 - a table's signature
    """Make the rows, in their own order."""
    kept = harvest[KeptRows]
    contexts, positions = kept.contexts, kept.positions
    vocabulary = pa.array(subject.vocabulary, pa.string())
    for start in range(0, len(contexts), ROWS_PER_BATCH):
        chosen = slice(start, start + ROWS_PER_BATCH)
        where = (subject.split, contexts[chosen], positions[chosen])
        tokens = tokens_at(*where)
        columns = {
            "row": in_split(subject.split, np.arange(start, start + len(tokens))),
            "token_id": tokens,
            "token": vocabulary.take(pa.array(tokens)),
            "context": contexts[chosen],
            "position": positions[chosen],
            "document": documents_at(*where).astype(np.int64),
        }
        yield record_batch(SCHEMA, columns)


TABLE = Table(
    name="rows",
    meaning=(
        "One row per row of the split whose activations are kept: where it stands and which token it is. Absent with "
        "`--activations none`."
    ),
    schema=SCHEMA,
    needs=(KeptRows,),
    compute=compute,
    is_made=are_kept,
)
