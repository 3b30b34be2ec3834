"""``layers``: one row per transcoder, how sparse and how faithful it is on the rows analysed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from tailrace.analysis.harvest.features import FeatureTotals
from tailrace.analysis.harvest.one_pass import Harvest, Plan, Subject
from tailrace.analysis.harvest.reconstruction import RowTotals
from tailrace.analysis.harvest.table import Table, record_batch
from tailrace.analysis.tables.features import DENSE_FREQUENCY
from tailrace.storage.tables import column

SCHEMA = pa.schema(
    [
        column("site", pa.string(), "site of the cache that the transcoder replaces"),
        column("split", pa.string(), "split of the cache that was read"),
        column("n_rows", pa.int64(), "rows analysed", unit="rows"),
        column("d_in", pa.int32(), "width of the input"),
        column("d_out", pa.int32(), "width of the output"),
        column("d_sae", pa.int32(), "number of features"),
        column("l0_mean", pa.float64(), "mean number of active features per row", unit="features"),
        *(
            column(f"l0_p{percent}", pa.int32(), f"{percent}th percentile of L0 over rows, exact", unit="features")
            for percent in (10, 50, 90, 99)
        ),
        column("l0_max", pa.int32(), "largest L0 of a row", unit="features"),
        column(
            "fvu",
            pa.float64(),
            "Σ‖y − ŷ‖² / Σ‖y − ȳ‖² pooled over the rows, ȳ their mean; null if the outputs do not vary",
            nullable=True,
        ),
        column("mean_squared_error", pa.float64(), "mean of ‖y − ŷ‖² over rows", unit="output²"),
        column("n_dead", pa.int32(), "features active on none of the rows", unit="features"),
        column("dead_fraction", pa.float64(), "n_dead / d_sae"),
        column("n_dense", pa.int32(), f"features active on more than {DENSE_FREQUENCY:g} of the rows", unit="features"),
    ]
)


def compute(harvest: Harvest, subject: Subject, plan: Plan) -> Iterator[pa.RecordBatch]:  # noqa: ARG001 - a table's signature
    """Make the row."""
    rows, features = harvest[RowTotals], harvest[FeatureTotals]
    coder = subject.coder
    n_dead = int((features.n_active == 0).sum())
    values = {
        "site": subject.site,
        "split": subject.split_name,
        "n_rows": rows.n_rows,
        "d_in": coder.d_in,
        "d_out": coder.d_out,
        "d_sae": coder.d_sae,
        "l0_mean": rows.l0_mean(),
        **{f"l0_p{percent}": rows.l0_quantile(percent / 100) for percent in (10, 50, 90, 99)},
        "l0_max": rows.l0_quantile(1.0),
        "fvu": rows.fraction_of_variance_unexplained() if subject.predicts_outputs else np.nan,
        "mean_squared_error": rows.squared_error() / rows.n_rows if subject.predicts_outputs else np.nan,
        "n_dead": n_dead,
        "dead_fraction": n_dead / coder.d_sae,
        "n_dense": int((features.n_active / rows.n_rows > DENSE_FREQUENCY).sum()),
    }
    yield record_batch(SCHEMA, {name: np.array([value]) for name, value in values.items()})


TABLE = Table(
    name="layers",
    meaning=(
        "One row per transcoder: sparsity and faithfulness on the rows analysed. A layer of a cross-layer transcoder "
        "has no faithfulness of its own, since earlier layers' features write to the same output: its `fvu` is null "
        "and its `mean_squared_error` NaN. The transcoder's manifest has the held-out FVU of each layer's output."
    ),
    schema=SCHEMA,
    needs=(RowTotals, FeatureTotals),
    compute=compute,
)
