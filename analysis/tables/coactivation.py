"""``coactivation``: for every feature that fires often enough, the features that fire with it."""

from __future__ import annotations

import pyarrow as pa

from tailrace.analysis.harvest.activations import KeptPairs
from tailrace.analysis.harvest.coactivation import FEWEST_ROWS, N_TOP, count_coactivation, rows_counted
from tailrace.analysis.harvest.one_pass import Harvest, Plan, Subject
from tailrace.analysis.harvest.table import Rows, Table, record_batch
from tailrace.analysis.tables.activations import are_kept
from tailrace.storage.tables import column

SCHEMA = pa.schema(
    [
        column("feature", pa.int32(), "index of the feature"),
        column("other", pa.int32(), "index of a feature that fires with it"),
        column("n_both", pa.int64(), "rows on which both are active, exactly", unit="rows"),
        column("jaccard", pa.float64(), "rows on which both are active over rows on which either is"),
        column(
            "phi",
            pa.float64(),
            "(n·n₁₁ − n₁·n₂) / √(n₁(n − n₁)·n₂(n − n₂)) of n rows, n₁ and n₂ active, n₁₁ both: correlation of firing",
        ),
        column("rank", pa.int32(), "place among the feature's others, from 0, largest phi first; ties by other"),
    ]
)


def compute(harvest: Harvest, subject: Subject, plan: Plan) -> Rows:  # noqa: ARG001 - a table's signature
    """Make the rows, a run of features at a time."""
    for together in count_coactivation(harvest[KeptPairs], plan.coactivation_floor):
        yield record_batch(SCHEMA, together._asdict())


def facts(harvest: Harvest, subject: Subject, plan: Plan) -> dict[str, str]:  # noqa: ARG001 - as Table.facts
    """Return the number of rows counted, and the fewest active rows of a feature counted."""
    n_rows = rows_counted(harvest[KeptPairs])
    fewest = max(FEWEST_ROWS, plan.coactivation_floor * n_rows)
    return {"coactivation_rows": str(n_rows), "fewest_active_rows": f"{fewest:g}"}


TABLE = Table(
    name="coactivation",
    meaning=(
        f"The {N_TOP} features that fire with a feature more than chance would have them, by φ. Counted over the rows "
        "whose activations are kept, or the first of them where so many features fire that counting would take "
        "minutes (`coactivation_rows` in the file's metadata), for features active on enough of these rows: "
        f"`--coactivation-floor` of them and at least {FEWEST_ROWS} (`fewest_active_rows`). Sorted by feature, then "
        "rank. Absent with `--activations none`."
    ),
    schema=SCHEMA,
    needs=(KeptPairs,),
    compute=compute,
    facts=facts,
    row_group_rows=16_384,
    is_made=are_kept,
)
