"""``features``: one row per feature, dead ones included, so that row number and feature agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from tailrace.analysis.harvest import loops
from tailrace.analysis.harvest.activations import KeptPairs, KeptRows
from tailrace.analysis.harvest.examples import Examples, TopExamples
from tailrace.analysis.harvest.features import N_POSITION_BINS, FeatureTotals
from tailrace.analysis.harvest.histogram import (
    BINS_PER_OCTAVE,
    EDGES,
    QUANTILE_RELATIVE_ERROR,
    quantiles,
    wilson_interval,
)
from tailrace.analysis.harvest.one_pass import Harvest, Plan, Subject
from tailrace.analysis.harvest.reconstruction import RowTotals
from tailrace.analysis.harvest.rows import tokens_at
from tailrace.analysis.harvest.table import Table, feature_ranges, list_array, record_batch
from tailrace.analysis.tables.activations import are_kept
from tailrace.analysis.weights.extremes import N_NEAREST, Ends, nearest_decoders
from tailrace.analysis.weights.unembedding import N_BINS, N_TOKENS, TokenEffects
from tailrace.storage.tables import column

DENSE_FREQUENCY = 0.1
"""Above this share of rows a feature is called dense."""

_PERCENTS = (10, 50, 90, 99)
_ACTIVATION = "activation"

_EFFECT = "logit per activation"

_WEIGHT_NOTE = (
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


WEIGHT_COLUMNS: tuple[pa.Field, ...] = (
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

SCHEMA = pa.schema(
    [
        column("feature", pa.int32(), "index of the feature, also the row number"),
        column("frequency", pa.float64(), "share of rows on which it is active"),
        column(
            "frequency_low",
            pa.float64(),
            "low end of the 95 % Wilson interval of frequency, as if rows were independent draws",
        ),
        column("frequency_high", pa.float64(), "high end of the same interval"),
        column("log10_frequency", pa.float64(), "log₁₀ of frequency; null if dead", nullable=True),
        column("n_active", pa.int64(), "rows on which it is active", unit="rows"),
        column("mean", pa.float64(), "mean over active rows", unit=_ACTIVATION, nullable=True),
        column("std", pa.float64(), "population standard deviation, active rows", unit=_ACTIVATION, nullable=True),
        column("max", pa.float32(), "largest activation", unit=_ACTIVATION, nullable=True),
        *(
            column(
                f"p{percent}",
                pa.float64(),
                f"{percent}th percentile (nearest rank) over active rows, within {QUANTILE_RELATIVE_ERROR:.1%} of it",
                unit=_ACTIVATION,
                nullable=True,
            )
            for percent in _PERCENTS
        ),
        column(
            "histogram",
            pa.list_(pa.int64()),
            f"active rows per bin, {BINS_PER_OCTAVE} bins per doubling, from the first bin in use to the last",
            unit="rows",
        ),
        column(
            "histogram_edges",
            pa.list_(pa.float32()),
            "edges of these bins, one more than bins; a bin holds its low edge and not its high one",
            unit=_ACTIVATION,
        ),
        column("decoder_norm", pa.float64(), "L2 norm of the decoder row", unit="output per activation"),
        column("encoder_norm", pa.float64(), "L2 norm of the encoder row", unit="activation per input"),
        column("encoder_bias", pa.float64(), "encoder bias", unit=_ACTIVATION),
        column("is_dead", pa.bool_(), "whether it was active on no row"),
        column("is_dense", pa.bool_(), f"whether frequency is above {DENSE_FREQUENCY:g}"),
        column(
            "top_token_id",
            pa.int32(),
            "token most frequent among its examples (of equally frequent ones, that of the stronger); null if dead",
            nullable=True,
        ),
        column("top_token", pa.string(), "text of that token", nullable=True),
        column("top_token_share", pa.float64(), "share of its examples at that token", nullable=True),
        column(
            "n_token_ids",
            pa.int32(),
            "distinct token ids it fires on, among the rows whose activations are kept; null if none are",
            nullable=True,
        ),
        column(
            "token_id_share", pa.float64(), "n_token_ids over the distinct token ids of all these rows", nullable=True
        ),
        column(
            "position_frequency",
            pa.list_(pa.float64()),
            f"frequency in each of {N_POSITION_BINS} equal parts of a context (`position_edges` in the file's metadata)"
            "; null for parts without rows",
        ),
        *WEIGHT_COLUMNS,
    ]
)


def compute(harvest: Harvest, subject: Subject, plan: Plan) -> Iterator[pa.RecordBatch]:
    """Make the rows, a run of features at a time."""
    totals, n_rows = harvest[FeatureTotals], harvest[RowTotals].n_rows
    statistics = {"mean": totals.mean(), "std": totals.standard_deviation(), **_weights(subject)}
    examples = harvest[TopExamples].kept
    low, high = wilson_interval(totals.n_active, n_rows)
    statistics |= {"frequency_low": low, "frequency_high": high}
    profile = totals.position_frequency()
    diversity = _TokenDiversity(harvest, subject) if are_kept(plan) else None
    from_weights = _WeightColumns(subject.coder.W_dec, subject.effects, subject.vocabulary)
    for features in feature_ranges(subject.coder.d_sae):
        chosen = slice(features.start, features.stop)
        n_active, counts = totals.n_active[chosen], totals.histogram[chosen]
        largest = totals.maximum[chosen]
        is_dead = n_active == 0
        frequency = n_active / n_rows
        percentiles = quantiles(counts, tuple(percent / 100 for percent in _PERCENTS), largest)
        columns = {
            "feature": np.arange(features.start, features.stop),
            "frequency": frequency,
            "log10_frequency": np.log10(frequency, out=np.full(len(frequency), np.nan), where=~is_dead),
            "n_active": n_active,
            "max": np.where(is_dead, np.float32(np.nan), largest),
            **{f"p{percent}": percentiles[:, index] for index, percent in enumerate(_PERCENTS)},
            **_trimmed_histograms(counts),
            **{name: values[chosen] for name, values in statistics.items()},
            "is_dead": is_dead,
            "is_dense": frequency > DENSE_FREQUENCY,
            **_top_tokens(examples, features, subject),
            **(diversity.of(features) if diversity is not None else _TokenDiversity.nulls(len(features))),
            "position_frequency": _profiles(profile[chosen]),
            **from_weights.of(features),
        }
        yield record_batch(SCHEMA, columns)


def _weights(subject: Subject) -> dict[str, NDArray[np.float64]]:
    encoder, decoder, bias = (
        weight.detach().cpu().double().numpy()
        for weight in (subject.coder.W_enc, subject.coder.W_dec, subject.coder.b_enc)
    )
    return {
        "decoder_norm": np.sqrt(np.square(decoder).sum(axis=1)),
        "encoder_norm": np.sqrt(np.square(encoder).sum(axis=1)),
        "encoder_bias": bias,
    }


def _trimmed_histograms(counts: NDArray[np.int64]) -> dict[str, pa.Array]:
    """Cut the empty bins off both ends of each histogram; a dead feature keeps no bin and no edge."""
    used = counts > 0
    is_alive = counts.sum(axis=1) > 0
    first = np.where(is_alive, used.argmax(axis=1), 0)
    last = np.where(is_alive, counts.shape[1] - used[:, ::-1].argmax(axis=1), 0)
    bins = np.arange(counts.shape[1])
    is_kept = (bins >= first[:, None]) & (bins < last[:, None])
    edges = np.arange(counts.shape[1] + 1)
    is_kept_edge = (edges >= first[:, None]) & (edges <= last[:, None]) & is_alive[:, None]
    return {
        "histogram": list_array(pa.array(counts[is_kept]), is_kept.sum(axis=1)),
        "histogram_edges": list_array(
            pa.array(np.broadcast_to(EDGES, is_kept_edge.shape)[is_kept_edge]), is_kept_edge.sum(axis=1)
        ),
    }


def _top_tokens(examples: Examples, features: range, subject: Subject) -> dict[str, Any]:
    """Return the most frequent token among the examples of each feature."""
    tokens = np.full(len(features), np.nan)
    shares = np.full(len(features), np.nan)
    bounds = np.searchsorted(examples.feature, [features.start, features.stop])
    own = examples.take(np.arange(bounds[0], bounds[1]))
    if len(own.feature):
        token = tokens_at(subject.split, own.context, own.position)
        n_tokens = int(token.max()) + 1
        pairs, first, n_seen = np.unique(own.feature * n_tokens + token, return_index=True, return_counts=True)
        feature = pairs // n_tokens
        order = np.lexsort((first, -n_seen, feature))  # examples are in order of strength
        _, best = np.unique(feature[order], return_index=True)
        chosen = order[best]
        where = feature[chosen] - features.start
        tokens[where] = pairs[chosen] % n_tokens
        shares[where] = n_seen[chosen] / np.bincount(own.feature - features.start, minlength=len(features))[where]
    ids = pa.array(tokens, from_pandas=True).cast(pa.int32())
    return {
        "top_token_id": ids,
        "top_token": pa.array(subject.vocabulary, pa.string()).take(ids),
        "top_token_share": shares,
    }


def _profiles(frequency: NDArray[np.float64]) -> pa.ListArray:
    """Return the frequencies (features, parts) as lists, with null for parts that have no rows."""
    values = pa.array(frequency.reshape(-1), from_pandas=True)
    return list_array(values, np.full(len(frequency), frequency.shape[1]))


def _position_edges(harvest: Harvest, subject: Subject, plan: Plan) -> dict[str, str]:  # noqa: ARG001 - as Table.facts
    edges = harvest[FeatureTotals].position_edges()
    return {
        "position_edges": " ".join(f"{edge:g}" for edge in edges),
        "activation_rows": str(harvest[KeptPairs].n_rows),
    }


class _TokenDiversity:
    """The columns ``n_token_ids`` and ``token_id_share``, exact over the rows whose pairs are kept."""

    def __init__(self, harvest: Harvest, subject: Subject) -> None:
        rows = harvest[KeptRows]
        self._kept = harvest[KeptPairs]
        self._token_of_row = tokens_at(subject.split, rows.contexts, rows.positions)
        self._seen = np.full(int(self._token_of_row.max(initial=0)) + 1, -1, np.int64)
        self._n_ids = len(np.unique(self._token_of_row))

    def of(self, features: range) -> dict[str, Any]:
        """Return the values of one of ``feature_ranges``."""
        counts = np.empty(len(features), np.int64)
        for pairs in self._kept.sorted_pairs(features):
            own = counts[pairs.features.start - features.start : pairs.features.stop - features.start]
            loops.count_distinct(pairs.offsets, pairs.row, self._token_of_row, pairs.first_feature, self._seen, own)
        # without rows a share is not defined
        return {
            "n_token_ids": counts,
            "token_id_share": counts / self._n_ids if self._n_ids else np.full(len(counts), np.nan),
        }

    @staticmethod
    def nulls(n: int) -> dict[str, Any]:
        """Return the values of ``n`` features where no pairs were kept."""
        return {"n_token_ids": pa.nulls(n, pa.int32()), "token_id_share": pa.nulls(n, pa.float64())}


class _WeightColumns:
    """The values of ``WEIGHT_COLUMNS`` for every feature of a decoder (d_sae, d_out), to be taken a run at a time."""

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
            return columns | {
                field.name: pa.nulls(len(features), field.type) for field in WEIGHT_COLUMNS if field.nullable
            }
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
    """Return an array (n, width) as n lists."""
    return list_array(pa.array(np.ascontiguousarray(rows).reshape(-1)), np.full(len(rows), rows.shape[1]))


TABLE = Table(
    name="features",
    meaning=(
        "One row per feature, dead ones included. Statistics are over the rows where the feature is active and null "
        "where there are none.\n\n"
        f"Percentiles come from a histogram of {BINS_PER_OCTAVE} bins per doubling between "
        f"{EDGES[0]:.3g} and {EDGES[-1]:.0f}: each is within {QUANTILE_RELATIVE_ERROR:.1%} of the exact nearest-rank "
        "value (`quantile_relative_error` in the file's metadata). Activations outside that range count in the "
        "outermost bins, where the bound does not hold. Bin edges are the same for all features and all "
        f"transcoders, so histograms can be added.\n\n{_WEIGHT_NOTE}"
    ),
    schema=SCHEMA,
    needs=(FeatureTotals, RowTotals, TopExamples, KeptPairs, KeptRows),
    compute=compute,
    facts=_position_edges,
    metadata={
        "quantile_relative_error": f"{QUANTILE_RELATIVE_ERROR:.6f}",
        "histogram_bins_per_octave": str(BINS_PER_OCTAVE),
        "histogram_range": f"{EDGES[0]:.9g} {EDGES[-1]:.9g}",
    },
    row_group_rows=8192,
)
