"""Examples as pages keep them: tokens as indices into a vocabulary, and only the activations that are not zero.

The window is cut to the same number of tokens on both sides of the example. Most activations in a window are zero, so
only the indices of the others are kept, counted through all windows of a feature.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tailrace.analysis.dashboards.feature_tables import FeatureTables, feature_slices
from tailrace.analysis.dashboards.values import Vocabulary, rounded_list, visible_token

COLUMNS = (
    *("feature", "kind", "band", "activation", "document", "context", "position"),
    *("window_start", "window_tokens", "window_activations"),
)
_WINDOW_DIGITS = 3
DOCUMENT_TOKENS = 4096
"""Tokens of a document shown on each side of an example."""
_BYTES = re.compile(r"(?:<0x[0-9A-F]{2}>)+")


def example_lines(
    table: pa.Table,
    features: Sequence[int],
    window: int,
    vocabulary: Vocabulary,
    about: Mapping[int, str] | None = None,
) -> list[dict[str, Any]]:
    """Return the examples of each feature, from rows of the table ``examples`` that are sorted by feature.

    ``window`` is the number of tokens kept on each side. Per feature: ``kind``, ``band``, ``activation``, ``document``,
    ``context`` and ``position`` of each example, ``before`` (tokens of its window before it) and ``length`` (of its
    window), then of all windows together ``tokens`` (indices into ``vocabulary``), ``fires`` (indices of tokens with an
    activation), ``values`` (these) and ``unread`` (indices of tokens of which the cache has no row). ``about`` has a
    line on documents by number, which each example then has under that name.
    """
    cut = _Windows(table, window)
    tokens = vocabulary.indices_of(cut.tokens)
    kinds = table["kind"].to_pylist() if "kind" in table.column_names else ["top"] * table.num_rows
    bands = table["band"].to_pylist() if "band" in table.column_names else [None] * table.num_rows
    documents = [] if about is None else table["document"].to_pylist()
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
                **({} if about is None else {"about": [about.get(one, "") for one in documents[rows]]}),
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


def top_tokens(table: pa.Table, features: Sequence[int]) -> tuple[list[dict[str, float]], list[int]]:
    """Return the tokens of each feature's strongest examples with their shares of these, and the number of these.

    The most frequent comes first; of equally frequent tokens, that of the stronger example. ``table`` has ``feature``,
    ``token`` and, if there are other kinds of examples, ``kind``; rows of a feature are in order of strength.
    """
    if "kind" in table.column_names:
        table = table.filter(pc.equal(table["kind"], "top"))
    tokens = table["token"].to_pylist()
    own = [tokens[rows] for rows in feature_slices(table, features)]
    return [_shares(tokens) for tokens in own], [len(tokens) for tokens in own]


def _shares(tokens: list[str]) -> dict[str, float]:
    counts = Counter(tokens)  # most_common keeps the first seen first among equals: the stronger
    return {token: count / len(tokens) for token, count in counts.most_common()}


def passages(table: pa.Table, features: Sequence[int], n_examples: int) -> list[str]:
    """Return the text of each feature's ``n_examples`` strongest examples, a line each, every character visible."""
    if "kind" in table.column_names:
        table = table.filter(pc.equal(table["kind"], "top"))
    lines = []
    for rows in feature_slices(table, features):
        windows = table["window_tokens"].slice(rows.start, min(n_examples, rows.stop - rows.start)).to_pylist()
        texts = ("".join(token or "" for token in window) for window in windows)
        lines.append("\n".join(dict.fromkeys(visible_token(text).strip() for text in texts if text.strip())))
    return lines


def document_text(
    tables: FeatureTables, feature: int, document: int, context: int, position: int
) -> dict[str, Any] | None:
    """Return the text around an example as far as the tables keep its document; None if they do not keep the example.

    ``tokens`` are texts, ``values`` the feature's activations by index of those on which it is active, ``here`` the
    index of the example, and ``gaps`` the indices before which text is missing: rows that were not cached or not kept,
    and what is beyond ``DOCUMENT_TOKENS``.
    """
    kept = tables.rows_of(document)
    if kept is None:
        return None
    contexts, positions = kept["context"].to_numpy(), kept["position"].to_numpy()
    found = np.flatnonzero((contexts == context) & (positions == position))
    if len(found) == 0:
        return None
    here = int(found[0])
    start, stop = max(0, here - DOCUMENT_TOKENS), min(kept.num_rows, here + DOCUMENT_TOKENS + 1)
    shown = slice(start, stop)
    rows, own = kept["row"].to_numpy()[shown], dict(zip(*tables.activation_of(feature), strict=True))
    is_gap = (np.diff(contexts[shown]) > 1) | ((np.diff(contexts[shown]) == 0) & (np.diff(positions[shown]) > 1))
    gaps = [*([0] if start else []), *(np.flatnonzero(is_gap) + 1).tolist()]
    values = {
        index: rounded_list([own[row]], _WINDOW_DIGITS)[0] for index, row in enumerate(rows.tolist()) if row in own
    }
    return {
        "tokens": [visible_token(text) for text in whole_characters(kept["token"].to_pylist()[shown])],
        "values": values,
        "here": here - start,
        "gaps": [*gaps, *([stop - start] if stop < kept.num_rows else [])],
    }


def whole_characters(tokens: Sequence[str]) -> list[str]:
    """Return texts of consecutive tokens with each character at the token that completes it, those before it empty.

    Tokens that are bytes only, such as ``<0xE6>``, are joined where they make characters, and left as they are where
    they do not.
    """
    texts = list(tokens)
    start = 0
    for index, text in enumerate(texts):
        if not _BYTES.fullmatch(text):
            start = index + 1
            continue
        joined = bytes(int(byte, 16) for part in tokens[start : index + 1] for byte in re.findall(r"0x(..)", part))
        try:
            character = joined.decode()
        except UnicodeDecodeError:
            continue
        texts[start : index + 1] = [""] * (index - start) + [character]
        start = index + 1
    return texts
