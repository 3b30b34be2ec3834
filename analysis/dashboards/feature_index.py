"""The list of all features of a dashboard: a value per feature and column, small enough to load at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tailrace.analysis.dashboards.example_lines import top_tokens
from tailrace.analysis.dashboards.feature_tables import FeatureTables
from tailrace.analysis.dashboards.histograms import first_bin, shared_axis, sparkline
from tailrace.analysis.dashboards.values import Vocabulary, rounded_list

TOKENS_SHOWN = 8
"""Distinct tokens listed per feature, and as many that it promotes."""

_COLUMNS = ("feature", "frequency", "max", "mean", "is_dead", "is_dense", "histogram", "histogram_edges")


def feature_index(tables: FeatureTables, features: Sequence[int]) -> dict[str, Any]:
    """Return the columns of the list over ``features`` (sorted), and the axis that all sparklines share.

    ``tokens`` and ``promoted`` are indices into ``vocabulary``; ``promoted`` is None where the tables have none.
    """
    vocabulary = Vocabulary()
    table = tables.read("features", columns=(*_COLUMNS, "promoted_tokens"))
    examples = tables.read("examples", columns=("feature", "kind", "token"))
    assert table is not None, "tables always have the table of features"
    table = _chosen(table, features)
    tokens: list[list[str]] = [[] for _ in features]
    if examples is not None:
        tokens = top_tokens(_chosen(examples, features), features, TOKENS_SHOWN)
    counts, edges = table["histogram"].to_pylist(), table["histogram_edges"].to_pylist()
    axis = shared_axis(edges)
    return {
        "feature": table["feature"].to_pylist(),
        "frequency": rounded_list(table["frequency"].to_numpy()),
        "max": _numbers(table["max"]),
        "mean": _numbers(table["mean"]),
        "is_dense": [int(flag) for flag in table["is_dense"].to_pylist()],
        "sparks": [
            "" if axis is None or not own else sparkline(axis.counts(own, first_bin(limits)))
            for own, limits in zip(counts, edges, strict=True)
        ],
        "spark_range": None if axis is None else rounded_list(axis.edges[[0, -1]]),
        "tokens": [[vocabulary.index_of(token) for token in own] for own in tokens],
        "promoted": _promoted(table, vocabulary),
        "vocabulary": vocabulary.texts,
    }


def _chosen(table: pa.Table, features: Sequence[int]) -> pa.Table:
    if len(features) == 0:
        return table.slice(0, 0)
    return table.filter(pc.is_in(table["feature"], pa.array(features, table.schema.field("feature").type)))


def _numbers(column: pa.ChunkedArray) -> list[float | None]:
    return rounded_list(np.asarray(column.to_numpy(), np.float64))


def _promoted(table: pa.Table, vocabulary: Vocabulary) -> list[list[int]] | None:
    if "promoted_tokens" not in table.column_names or table["promoted_tokens"].null_count == table.num_rows:
        return None
    return [
        [vocabulary.index_of(token) for token in (own or [])[:TOKENS_SHOWN]]
        for own in table["promoted_tokens"].to_pylist()
    ]
