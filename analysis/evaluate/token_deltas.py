"""``tokens``: one row per prediction and set of sites, what splicing in transcoders did to the model's loss there."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from tailrace.analysis.evaluate.evaluation import TokenDeltas
from tailrace.analysis.harvest.table import record_batch
from tailrace.storage.tables import column

SCHEMA = pa.schema(
    [
        column("sites", pa.string(), "the site that is replaced, or 'all sites' for all of them together"),
        column("context", pa.uint32(), "context of the cache's split"),
        column("position", pa.int32(), "position the prediction is made at, within the context", unit="tokens"),
        column("token_id", pa.int32(), "token at that position"),
        column("next_token_id", pa.int32(), "token at the next position, the one to be predicted"),
        column(
            "replaced", pa.bool_(), "whether outputs at this position are replaced; elsewhere only earlier ones are"
        ),
        column("ce_original", pa.float64(), "−log p(next token) of the model itself", unit="nats"),
        column("ce_spliced", pa.float64(), "−log p(next token) with transcoders in place", unit="nats"),
        column("delta", pa.float64(), "ce_spliced − ce_original", unit="nats"),
        column("kl", pa.float64(), "KL(original ‖ spliced) of the distributions of the next token", unit="nats"),
    ]
)


def token_rows(deltas: TokenDeltas) -> pa.RecordBatch:
    """Return the rows of a batch, context by context and position by position."""
    columns = {**deltas._asdict(), "delta": deltas.ce_spliced - deltas.ce_original}
    columns["sites"] = np.full(len(deltas.context), deltas.sites)
    return record_batch(SCHEMA, columns)
