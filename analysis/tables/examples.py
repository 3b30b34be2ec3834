"""``examples``: the strongest examples of every feature, each with the text around it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from analysis.contexts import documents_at, tokens_of
from analysis.examples import Examples, TopExamples, rank_in_group
from analysis.harvest import Harvest, Plan, Subject
from analysis.table import Table, feature_ranges, list_array, record_batch
from storage.tables import column

SCHEMA = pa.schema(
    [
        column("feature", pa.int32(), "index of the feature"),
        column("rank", pa.int32(), "place among the feature's examples, from 0, strongest first; ties by row"),
        column("activation", pa.float32(), "the feature's activation on this row", unit="activation"),
        column("row", pa.int64(), "row of the split, in token order"),
        column("unit", pa.int32(), "storage unit that holds the row"),
        column("context", pa.int64(), "context id"),
        column("position", pa.int32(), "position in the context, from 0", unit="tokens"),
        column(
            "document", pa.int64(), "document that the token comes from: its place in the dataset's own order, from 0"
        ),
        column("token_id", pa.int32(), "token at the row"),
        column("token", pa.string(), "text of that token"),
        column("window_start", pa.int32(), "position in the context of the window's first token", unit="tokens"),
        column("window_token_ids", pa.list_(pa.int32()), "tokens around the row, within the context"),
        column("window_tokens", pa.list_(pa.string()), "texts of these tokens"),
        column(
            "window_activations",
            pa.list_(pa.float32()),
            "the feature's activation on each token of the window; null where the cache left the row out (e.g. BOS)",
            unit="activation",
        ),
    ]
)


def compute(harvest: Harvest, subject: Subject, plan: Plan) -> Iterator[pa.RecordBatch]:
    """Make the rows, a run of features at a time."""
    examples = harvest[TopExamples].kept
    vocabulary = pa.array(subject.vocabulary, pa.string())
    unit_starts = np.array([subject.split.first_row(unit) for unit in range(subject.split.n_units)])
    for features in feature_ranges(subject.coder.d_sae):
        start, stop = np.searchsorted(examples.feature, [features.start, features.stop])
        if start < stop:
            yield _rows(examples.take(np.arange(start, stop)), subject, plan, vocabulary, unit_starts)


def _rows(
    examples: Examples, subject: Subject, plan: Plan, vocabulary: pa.Array, unit_starts: np.ndarray
) -> pa.RecordBatch:
    tokens = tokens_of(subject.split, examples.context)
    token = tokens[np.arange(len(tokens)), examples.position]
    positions = examples.position[:, None] + np.arange(-plan.window_before, plan.window_after + 1)
    is_inside = (positions >= 0) & (positions < tokens.shape[1])
    lengths = is_inside.sum(axis=1)
    window = np.take_along_axis(tokens, np.clip(positions, 0, tokens.shape[1] - 1), axis=1)[is_inside]
    activations = pa.array(examples.window[is_inside], pa.float32(), from_pandas=True)
    columns = {
        "feature": examples.feature,
        "rank": rank_in_group(examples.feature),
        "activation": examples.activation,
        "row": examples.row,
        "unit": np.searchsorted(unit_starts, examples.row, side="right") - 1,
        "context": examples.context,
        "position": examples.position,
        "document": documents_at(subject.split, examples.context, examples.position).astype(np.int64),
        "token_id": token,
        "token": vocabulary.take(pa.array(token)),
        "window_start": np.maximum(examples.position - plan.window_before, 0),
        "window_token_ids": list_array(pa.array(window), lengths),
        "window_tokens": list_array(vocabulary.take(pa.array(window)), lengths),
        "window_activations": list_array(activations, lengths),
    }
    return record_batch(SCHEMA, columns)


TABLE = Table(
    name="examples",
    meaning=(
        "The strongest examples of every feature, at most one from each context: neighbouring rows of one passage are "
        "the same example again. The window is cut at the context's edges. Sorted by feature, then rank; a dead "
        "feature has none."
    ),
    schema=SCHEMA,
    needs=(TopExamples,),
    compute=compute,
    row_group_rows=16384,
)
