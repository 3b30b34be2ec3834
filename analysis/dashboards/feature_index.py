"""The list of all features of a dashboard: a value per feature and column, small enough to load at once.

The texts that are searched as well are a list of their own, which a page loads when something is searched for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tailrace.analysis.dashboards.example_lines import passages, top_tokens
from tailrace.analysis.dashboards.feature_tables import FeatureTables, feature_slices
from tailrace.analysis.dashboards.histograms import first_bin, shared_axis, sparkline
from tailrace.analysis.dashboards.values import Vocabulary, rounded_list

TOKENS_SHOWN = 8
"""Distinct tokens listed per feature, and as many that it promotes."""
PASSAGES_SEARCHED = 3
"""Strongest examples of a feature whose text is searched."""

FEW_TOKENS, FEW_DOCUMENTS, WIDE = 100, 3, 8
"""Active tokens, documents of examples, and largest over median activation from which on more of them does not count
for a feature's interest."""

_BLOCK = 1024
"""Features whose examples are read at once."""
_COLUMNS = (
    *("feature", "frequency", "n_active", "max", "mean", "p50", "is_dead", "is_dense"),
    *("histogram", "histogram_edges"),
)


def feature_index(tables: FeatureTables, features: Sequence[int]) -> dict[str, Any]:
    """Return the columns of the list over ``features`` (sorted), and the axis that all sparklines share.

    ``tokens`` and ``promoted`` are indices into ``vocabulary``; ``promoted`` is None where the tables have none.
    ``shares`` are their percentages of the strongest ``examples``. ``interest`` is None for features that come
    last.
    """
    vocabulary = Vocabulary()
    table = tables.read("features", columns=(*_COLUMNS, "promoted_tokens"))
    examples = tables.read("examples", columns=("feature", "kind", "token", "document"))
    assert table is not None, "tables always have the table of features"
    table = _chosen(table, features)
    tokens: list[dict[str, float]] = [{} for _ in features]
    n_documents = n_examples = [0] * len(features)
    if examples is not None:
        examples = _chosen(examples, features)
        tokens, n_examples = top_tokens(examples, features)
        documents = examples["document"].to_numpy()
        n_documents = [len(np.unique(documents[rows])) for rows in feature_slices(examples, features)]
    shown = [dict(list(own.items())[:TOKENS_SHOWN]) for own in tokens]
    counts, edges = table["histogram"].to_pylist(), table["histogram_edges"].to_pylist()
    axis = shared_axis(edges)
    return {
        "feature": table["feature"].to_pylist(),
        "interest": interests(table, tokens, n_documents),
        "frequency": rounded_list(table["frequency"].to_numpy()),
        "max": _numbers(table["max"]),
        "mean": _numbers(table["mean"]),
        "is_dense": [int(flag) for flag in table["is_dense"].to_pylist()],
        "sparks": [
            "" if axis is None or not own else sparkline(axis.counts(own, first_bin(limits)))
            for own, limits in zip(counts, edges, strict=True)
        ],
        "spark_range": None if axis is None else rounded_list(axis.edges[[0, -1]]),
        "examples": n_examples,
        "tokens": [[vocabulary.index_of(token) for token in own] for own in shown],
        "shares": [[round(100 * share) for share in own.values()] for own in shown],
        "promoted": _promoted(table, vocabulary),
        "vocabulary": vocabulary.texts,
    }


def feature_passages(tables: FeatureTables, features: Sequence[int]) -> dict[str, Any]:
    """Return the text of the strongest examples of each of ``features`` (sorted), in their order."""
    return {"passages": list(_passages(tables, features))}


def _passages(tables: FeatureTables, features: Sequence[int]) -> Iterator[str]:
    for start in range(0, tables.n_features, _BLOCK):
        within = range(start, start + _BLOCK)
        own = [feature for feature in features if feature in within]
        if not own:
            continue
        examples = tables.read("examples", range(own[0], own[-1] + 1), ("feature", "kind", "window_tokens"))
        yield from [""] * len(own) if examples is None else passages(examples, own, PASSAGES_SEARCHED)


def interests(table: pa.Table, tokens: Sequence[Mapping[str, float]], n_documents: Sequence[int]) -> list[float | None]:
    """Return how much each feature of ``table`` promises to a reader, from 0 to 1: *interest* in the glossary.

    ``tokens`` are those of ``top_tokens``, ``n_documents`` the documents of the examples. None for features that are
    dead or dense, or whose examples are all of one document.
    """
    words = [_most_frequent_word(own) for own in tokens]
    n_features = Counter(word for word, _ in words)
    return [
        None
        if row["is_dead"] or row["is_dense"] or documents < 2
        else round(
            share
            * min(1.0, math.log(row["max"] / row["p50"], WIDE))
            * min(1.0, row["n_active"] / FEW_TOKENS)
            * min(1.0, documents / FEW_DOCUMENTS)
            / math.sqrt(n_features[word]),
            4,
        )
        for row, (word, share), documents in zip(
            table.select(["is_dead", "is_dense", "max", "p50", "n_active"]).to_pylist(), words, n_documents, strict=True
        )
    ]


def _most_frequent_word(tokens: Mapping[str, float]) -> tuple[str, float]:
    """Return the word at most of the examples, without spaces and in lower case, and its share of them."""
    shares: dict[str, float] = {}
    for token, share in tokens.items():
        word = token.strip().lower()
        shares[word] = shares.get(word, 0.0) + share
    return max(shares.items(), key=lambda entry: entry[1], default=("", 0.0))


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
