"""``activations/``: every activation above zero of the rows kept, feature by feature."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from tailrace.analysis.harvest.activations import KeptPairs
from tailrace.analysis.harvest.one_pass import Harvest, Plan, Subject
from tailrace.analysis.harvest.rows import in_split
from tailrace.analysis.harvest.table import Rows, Table, feature_ranges, record_batch
from tailrace.storage.tables import column

ROW_GROUP_ROWS = 16_384
"""About 200 KB before compression, the least that is read for a feature."""

SCHEMA = pa.schema(
    [
        column("feature", pa.int32(), "index of the feature"),
        column("row", pa.int64(), "row of the split, in token order; `rows` says which token it is"),
        column("activation", pa.float32(), "the feature's activation on this row, above zero", unit="activation"),
    ]
)


def files(harvest: Harvest, subject: Subject, plan: Plan) -> Iterator[tuple[str, Rows]]:  # noqa: ARG001 - as Table.parts
    """Yield the name and the rows of each file: a run of features."""
    for features in feature_ranges(subject.coder.d_sae):
        yield f"features-{features.start:06}-{features.stop - 1:06}", _rows(harvest[KeptPairs], features, subject)


def compute(harvest: Harvest, subject: Subject, plan: Plan) -> Rows:
    """Make the rows of all files, one after the other."""
    for _, rows in files(harvest, subject, plan):
        yield from rows


def _rows(kept: KeptPairs, features: range, subject: Subject) -> Rows:
    for pairs in kept.sorted_pairs(features):
        columns = {"feature": pairs.feature, "row": in_split(subject.split, pairs.row), "activation": pairs.value}
        yield record_batch(SCHEMA, columns)


def are_kept(plan: Plan) -> bool:
    """Return whether any row's activations are kept."""
    return plan.activation_rows > 0


def rows_kept(harvest: Harvest, subject: Subject, plan: Plan) -> dict[str, str]:  # noqa: ARG001 - as Table.facts
    """Return how many rows, from the first of the split, have their activations kept."""
    return {"activation_rows": str(harvest[KeptPairs].n_rows)}


TABLE = Table(
    name="activations",
    meaning=(
        "Every activation above zero of the first rows of the split: of all rows analysed, unless `--activations` asks "
        "for fewer (`activation_rows` in the files' metadata). Sorted by feature, then row, in files "
        "`features-AAAAAA-BBBBBB.parquet` that hold features AAAAAA to BBBBBB, both included, and in row groups so "
        "small that one feature is read in milliseconds. Absent with `--activations none`."
    ),
    schema=SCHEMA,
    needs=(KeptPairs,),
    compute=compute,
    facts=rows_kept,
    row_group_rows=ROW_GROUP_ROWS,
    is_made=are_kept,
    parts=files,
)
