"""Examples as pages keep them: tokens as indices into a vocabulary, and only the activations that are not zero.

The window is cut to the same number of tokens on both sides of the example. Most activations in a window are zero, so
only the indices of the others are kept, counted through all windows of a feature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tailrace.analysis.dashboards.feature_tables import feature_slices
from tailrace.analysis.dashboards.values import Vocabulary, rounded_list

COLUMNS = (
    *("feature", "kind", "band", "activation", "document", "context", "position"),
    *("window_start", "window_tokens", "window_activations"),
)
_WINDOW_DIGITS = 3


def example_lines(
    table: pa.Table, features: Sequence[int], window: int, vocabulary: Vocabulary
) -> list[dict[str, Any]]:
    """Return the examples of each feature, from rows of the table ``examples`` that are sorted by feature.

    ``window`` is the number of tokens kept on each side. Per feature: ``kind``, ``band``, ``activation``, ``document``,
    ``context`` and ``position`` of each example, ``before`` (tokens of its window before it) and ``length`` (of its
    window), then of all windows together ``tokens`` (indices into ``vocabulary``), ``fires`` (indices of tokens with an
    activation), ``values`` (these) and ``unread`` (indices of tokens of which the cache has no row).
    """
    cut = _Windows(table, window)
    tokens = vocabulary.indices_of(cut.tokens)
    kinds = table["kind"].to_pylist() if "kind" in table.column_names else ["top"] * table.num_rows
    bands = table["band"].to_pylist() if "band" in table.column_names else [None] * table.num_rows
    lines = []
    for rows in feature_slices(table, features):
        start, stop = cut.starts[rows.start], cut.starts[rows.stop]
        values = cut.activations[start:stop]
        fires = np.flatnonzero(values > 0)
        lines.append(
            {
                "kind": kinds[rows],
                "band": bands[rows],
                "activation": rounded_list(table["activation"].to_numpy()[rows]),
                **{name: table[name].to_numpy()[rows].tolist() for name in ("document", "context", "position")},
                "before": cut.before[rows].tolist(),
                "length": np.diff(cut.starts[rows.start : rows.stop + 1]).tolist(),
                "tokens": tokens[start:stop].tolist(),
                "fires": fires.tolist(),
                "values": rounded_list(values[fires], _WINDOW_DIGITS),
                "unread": np.flatnonzero(np.isnan(values)).tolist(),
            }
        )
    return lines


class _Windows:
    """The windows of all rows of a table, cut to ``window`` tokens on each side and laid end to end."""

    def __init__(self, table: pa.Table, window: int) -> None:
        texts, activations = _flat(table["window_tokens"]), _flat(table["window_activations"])
        lengths = np.diff(_offsets(table["window_tokens"]))
        here = table["position"].to_numpy() - table["window_start"].to_numpy()
        distance = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths + here, lengths)
        is_kept = np.abs(distance) <= window
        owners = np.repeat(np.arange(len(lengths)), lengths)
        kept_lengths = np.bincount(owners[is_kept], minlength=len(lengths))
        self.starts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(kept_lengths)])
        """(rows + 1,) offset of the window of each row."""
        self.before: NDArray[np.int64] = np.minimum(here, window)
        """(rows,) tokens of each window before its example."""
        self.tokens: pa.Array = texts.filter(pa.array(is_kept))
        self.activations: NDArray[np.float32] = np.asarray(
            activations.to_numpy(zero_copy_only=False)[is_kept], np.float32
        )
        """NaN where the cache has no row."""


def _flat(lists: pa.ChunkedArray) -> pa.Array:
    """Return the values of all lists, end to end."""
    return lists.combine_chunks().flatten() if lists.num_chunks else pa.array([], lists.type.value_type)


def _offsets(lists: pa.ChunkedArray) -> NDArray[np.int64]:
    lengths = np.asarray(lists.combine_chunks().value_lengths()) if lists.num_chunks else np.empty(0, np.int64)
    return np.concatenate([[0], np.cumsum(lengths)])


def top_tokens(table: pa.Table, features: Sequence[int], n_tokens: int) -> list[list[str]]:
    """Return up to ``n_tokens`` distinct tokens of each feature's strongest examples, the most frequent first.

    Of equally frequent tokens, that of the stronger example comes first. ``table`` has ``feature``, ``token`` and, if
    there are other kinds of examples, ``kind``; rows of a feature are in order of strength.
    """
    if "kind" in table.column_names:
        table = table.filter(pc.equal(table["kind"], "top"))
    tokens = table["token"].to_pylist()
    return [list(_most_frequent(tokens[rows]))[:n_tokens] for rows in feature_slices(table, features)]


def _most_frequent(tokens: list[str]) -> Iterator[str]:
    counts: dict[str, int] = {}
    for token in tokens:
        counts[token] = counts.get(token, 0) + 1
    yield from sorted(counts, key=lambda token: -counts[token])  # stable: the stronger stays first
