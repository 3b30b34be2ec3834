"""Columns of ``features`` that weights alone decide: what a feature does to the logits, and its nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from tailrace.analysis.harvest.table import list_array
from tailrace.analysis.weights.extremes import Ends
from tailrace.analysis.weights.neighbours import N_NEAREST, nearest_decoders
from tailrace.analysis.weights.unembedding import N_BINS, N_TOKENS, TokenEffects
from tailrace.storage.tables import column

_EFFECT = "logit per activation"

NOTE = (
    "Effects on the logits are those of the decoder row alone, on its direct path to the unembedding: through the gain "
    "of the final norm but not through what the norm divides by, which depends on the text. So they compare within a "
    "feature, and up to a positive factor with what the model's logits move by. They are null where the tables were "
    "made without the model, and for transcoders whose output is not added to the residual stream.\n\n"
    "Of a feature of a cross-layer transcoder, the decoder row is the sum of what it writes to its own and all later "
    "layers, which is what it adds to the residual stream in the end; where a family has a norm behind the MLP, that "
    "of the feature's own layer is taken for all. So `decoder_norm` is not one: it is small where a feature takes back "
    "later what it wrote."
)
"""For the table's page."""


def _tokens(name: str, which: str, order: str) -> tuple[pa.Field, ...]:
    tokens = f"the {N_TOKENS} tokens whose logits it {which} most, {order}"
    return (
        column(f"{name}_token_ids", pa.list_(pa.int32()), tokens, nullable=True),
        column(f"{name}_tokens", pa.list_(pa.string()), "texts of these tokens", nullable=True),
        column(f"{name}_logits", pa.list_(pa.float32()), "what it adds to their logits", unit=_EFFECT, nullable=True),
    )


COLUMNS: tuple[pa.Field, ...] = (
    column(
        "nearest_features",
        pa.list_(pa.int32()),
        f"the {N_NEAREST} other features whose decoder rows have the largest cosine with its own, nearest first",
    ),
    column("nearest_cosines", pa.list_(pa.float32()), "these cosines"),
    *_tokens("promoted", "raises", "highest first"),
    *_tokens("suppressed", "lowers", "lowest first"),
    column(
        "logit_histogram",
        pa.list_(pa.int32()),
        f"tokens of the vocabulary per bin of the effect on their logits, {N_BINS} bins from the least effect to the "
        "largest",
        unit="tokens",
        nullable=True,
    ),
    column(
        "logit_histogram_edges",
        pa.list_(pa.float32()),
        "edges of these bins, one more than bins; a bin holds its low edge, the last one its high edge too",
        unit=_EFFECT,
        nullable=True,
    ),
)


class WeightColumns:
    """The values of ``COLUMNS`` for every feature of a decoder (d_sae, d_out), to be taken a run at a time."""

    def __init__(self, decoder: Tensor, effects: TokenEffects | None, vocabulary: Sequence[str]) -> None:
        self._nearest = nearest_decoders(decoder)
        self._effects = effects
        self._vocabulary = pa.array(vocabulary, pa.string())

    def of(self, features: range) -> dict[str, Any]:
        """Return one Arrow array per column."""
        chosen = slice(features.start, features.stop)
        columns = {
            "nearest_features": _lists(self._nearest.indices[chosen]),
            "nearest_cosines": _lists(self._nearest.values[chosen]),
        }
        if self._effects is None:
            return columns | {field.name: pa.nulls(len(features), field.type) for field in COLUMNS if field.nullable}
        ends: dict[str, Ends] = {"promoted": self._effects.promoted, "suppressed": self._effects.suppressed}
        for name, end in ends.items():
            ids = _lists(end.indices[chosen])
            columns[f"{name}_token_ids"] = ids
            columns[f"{name}_tokens"] = pa.ListArray.from_arrays(ids.offsets, self._vocabulary.take(ids.values))
            columns[f"{name}_logits"] = _lists(end.values[chosen])
        columns["logit_histogram"] = _lists(self._effects.histogram[chosen])
        columns["logit_histogram_edges"] = _lists(self._effects.histogram_edges[chosen])
        return columns


def _lists(rows: NDArray[np.generic]) -> pa.ListArray:
    """Turn an array (n, width) into n lists."""
    return list_array(pa.array(np.ascontiguousarray(rows).reshape(-1)), np.full(len(rows), rows.shape[1]))
