"""The contents of the pages of features, one record each, ready to be written as JSON.

A part that the tables do not have is None in the record, and its section is left out of the page.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tailrace.analysis.dashboards.example_lines import COLUMNS, example_lines
from tailrace.analysis.dashboards.feature_tables import FeatureTables, feature_slices
from tailrace.analysis.dashboards.histograms import bands_of, page_histogram
from tailrace.analysis.dashboards.values import Vocabulary, rounded, rounded_list

STATISTICS = (
    *("frequency", "frequency_low", "frequency_high", "n_active", "mean", "std", "max", "p10", "p50", "p90", "p99"),
    *("decoder_norm", "encoder_norm", "encoder_bias", "is_dead", "is_dense", "n_token_ids", "token_id_share"),
)
"""Numbers that a page shows as they are, where the table has them."""

_LISTS = (
    *("histogram", "histogram_edges", "position_frequency", "nearest_features", "nearest_cosines"),
    *("promoted_tokens", "promoted_logits", "suppressed_tokens", "suppressed_logits"),
    *("logit_histogram", "logit_histogram_edges"),
)

Row = Mapping[str, Any]


class FeaturePages:
    """The rows of every table that belong to a run of features, read at once."""

    def __init__(self, tables: FeatureTables, within: range, *, window: int, n_bands: int) -> None:
        self._window, self._n_bands = window, n_bands
        features = tables.read("features", within, ("feature", *STATISTICS, *_LISTS))
        assert features is not None, "tables always have the table of features"
        self._features: dict[int, Row] = {row["feature"]: row for row in features.to_pylist()}
        facts = tables.schema("features").metadata or {}
        self._position_edges = [float(edge) for edge in facts.get(b"position_edges", b"").decode().split()]
        self._examples = tables.read("examples", within, COLUMNS)
        self._about = None
        if self._examples is not None and "document" in self._examples.column_names:
            self._about = tables.about_documents(self._examples["document"])
        self._coactivation = tables.read("coactivation", within)
        self._connections = tables.read("connections", within)
        self._activations = tables.activations(within)
        self._token_ids_read = None if self._connections is None else tables.token_ids_read

    def records(self, features: Sequence[int], vocabulary: Vocabulary) -> list[dict[str, Any]]:
        """Return one record per feature; their tokens are indices into ``vocabulary``. ``features`` is sorted."""
        examples = self._examples
        lines: Sequence[dict[str, Any] | None] = [None] * len(features)
        if examples is not None:
            lines = example_lines(_only(examples, features), features, self._window, vocabulary, self._about)
        coactive = _rows_of(self._coactivation, features)
        connections = _rows_of(self._connections, features)
        return [
            {
                "feature": feature,
                **self._own(self._features[feature], vocabulary),
                "examples": lines[index],
                "bands": self._bands(self._features[feature], lines[index]),
                "coactive": None if coactive is None else _coactive(coactive[index]),
                "connections": None
                if connections is None
                else connection_lists(connections[index], vocabulary, self._token_ids_read),
            }
            for index, feature in enumerate(features)
        ]

    def _own(self, row: Row, vocabulary: Vocabulary) -> dict[str, Any]:
        """Return the parts of a record that come from the feature's row of the table ``features``."""
        return {
            "statistics": {name: rounded(row[name]) for name in STATISTICS if name in row},
            "histogram": page_histogram(row["histogram"], row["histogram_edges"]),
            "positions": self._positions(row),
            "nearest": _pairs(row, "nearest_features", "nearest_cosines"),
            "logits": _logits(row, vocabulary),
        }

    def _positions(self, row: Row) -> dict[str, Sequence[float | None]] | None:
        """Return the frequency in equal parts of the context, with the positions between them."""
        if row.get("position_frequency") is None or not self._position_edges:
            return None
        shares = [np.nan if share is None else share for share in row["position_frequency"]]
        return {"edges": self._position_edges, "shares": rounded_list(shares)}

    def _bands(self, row: Row, lines: dict[str, Any] | None) -> list[dict[str, Any]] | None:
        """Return low, high, rows and exactness of each band, strongest first; None if no example is of a band."""
        if row["max"] is None or lines is None or "band" not in lines["kind"]:
            return None
        bands = bands_of(
            row["max"],
            (row["histogram"], row["histogram_edges"]),
            self._stored(row["feature"]),
            self._n_bands,
        )
        edges = rounded_list(bands.edges)
        return [
            {
                "band": band,
                "low": edges[band],
                "high": edges[band + 1],
                "rows": rounded(float(bands.counts[band])),
                "is_exact": bands.is_exact,
            }
            for band in reversed(range(self._n_bands))
        ]

    def _stored(self, feature: int) -> NDArray[np.float32] | None:
        if self._activations is None:
            return None
        owners, values = self._activations
        start, stop = np.searchsorted(owners, [feature, feature + 1])
        return values[start:stop]


def _only(table: pa.Table, features: Sequence[int]) -> pa.Table:
    """Return the rows from the first to the last feature; the table is sorted by feature."""
    owners = table["feature"].to_numpy()
    start, stop = np.searchsorted(owners, [features[0], features[-1] + 1])
    return table.slice(start, stop - start).combine_chunks()


def _rows_of(table: pa.Table | None, features: Sequence[int]) -> list[list[dict[str, Any]]] | None:
    if table is None:
        return None
    own = _only(table, features)
    rows = own.to_pylist()
    return [rows[where] for where in feature_slices(own, features)]


def _pairs(row: Row, keys: str, values: str) -> list[list[Any]] | None:
    if row.get(keys) is None or row.get(values) is None:
        return None
    return [[key, value] for key, value in zip(row[keys], rounded_list(row[values]), strict=True)]


def _coactive(rows: Sequence[Row]) -> list[list[Any]]:
    """Return [feature, φ, Jaccard, rows of both] of each, the most correlated first."""
    ordered = sorted(rows, key=lambda row: row["rank"])
    return [[row["other"], rounded(row["phi"]), rounded(row["jaccard"]), row["n_both"]] for row in ordered]


def _logits(row: Row, vocabulary: Vocabulary) -> dict[str, Any] | None:
    """Return the tokens that the feature's output promotes and suppresses, and the histogram over all tokens."""
    if row.get("promoted_tokens") is None:
        return None
    ends = {}
    for name, kind in (("top", "promoted"), ("bottom", "suppressed")):
        tokens = [vocabulary.index_of(token) for token in row[f"{kind}_tokens"]]
        ends[name] = [list(pair) for pair in zip(tokens, rounded_list(row[f"{kind}_logits"]), strict=True)]
    histogram = None
    if row.get("logit_histogram") is not None:
        histogram = {"counts": row["logit_histogram"], "edges": rounded_list(row["logit_histogram_edges"])}
    return {**ends, "histogram": histogram}


def connection_lists(
    rows: Sequence[Row], vocabulary: Vocabulary, token_ids_read: Collection[int] | None = None
) -> dict[str, Any]:
    """Return the lists of one feature, from its rows of the table ``connections``.

    ``tokens``: ``top`` and ``bottom`` de-embeddings, each [token, weight], and ``n_absent``, how many are left out as
    they are not among ``token_ids_read``; ``heads``: [layer, head, norm], the
    strongest first; ``head_tokens``: ``top`` de-embeddings through a ``layer`` and ``head``; ``later``: by ``layer``
    and ``site``, ``top`` and ``bottom`` features that it writes to, each [feature, weight].
    """
    heads = sorted(_of(rows, "head"), key=_rank)
    strength = {(row["layer"], row["head"]): row["rank"] for row in heads}
    through = _grouped(_of(rows, "head_token"), "layer", "head")
    later = _grouped(_of(rows, "feature"), "layer", "site")
    tokens = _of(rows, "token")
    occurring = [row for row in tokens if token_ids_read is None or row["token_id"] in token_ids_read]
    return {
        "tokens": {
            **_ends(occurring, lambda row: _token_index(row, vocabulary)),
            "n_absent": len(tokens) - len(occurring),
        },
        "heads": [[row["layer"], row["head"], rounded(row["weight"])] for row in heads],
        "head_tokens": [
            {"layer": layer, "head": head, "top": _ends(own, lambda row: _token_index(row, vocabulary))["top"]}
            for (layer, head), own in sorted(through.items(), key=lambda entry: strength[entry[0]])
        ],
        "later": [
            {"layer": layer, "site": site, **_ends(own, lambda row: row["other"])}
            for (layer, site), own in sorted(later.items())
        ],
    }


def _of(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def _grouped(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in keys), []).append(row)
    return groups


def _rank(row: Row) -> int:
    return int(row["rank"])


def _token_index(row: Row, vocabulary: Vocabulary) -> int:
    return vocabulary.index_of(row["token"] or "")


def _ends(rows: Sequence[Row], name: Callable[[Row], int]) -> dict[str, list[list[Any]]]:
    """Split rows by rank: those from 0 on fall from the largest weight, those from -1 down rise from the least."""
    top = sorted((row for row in rows if row["rank"] >= 0), key=_rank)
    bottom = sorted((row for row in rows if row["rank"] < 0), key=_rank, reverse=True)
    return {
        end: [[name(row), rounded(row["weight"])] for row in own] for end, own in (("top", top), ("bottom", bottom))
    }
