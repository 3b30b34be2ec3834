"""``examples``: the strongest examples of every feature, each with the text around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tailrace.analysis.harvest.activations import KeptPairs, KeptRows
from tailrace.analysis.harvest.examples import Examples, TopExamples, rank_in_group, sample_examples
from tailrace.analysis.harvest.features import FeatureTotals
from tailrace.analysis.harvest.one_pass import Harvest, Plan, Subject
from tailrace.analysis.harvest.rows import documents_at, in_split, tokens_of, units_of
from tailrace.analysis.harvest.table import Table, feature_ranges, list_array, record_batch
from tailrace.analysis.tables.activations import are_kept
from tailrace.storage.tables import column
from tailrace.storage.token_text import has_bytes, join_characters

KINDS = ("top", "band", "random")
"""In the order of a feature's rows."""
TOP, BAND, RANDOM = range(3)

SCHEMA = pa.schema(
    [
        column("feature", pa.int32(), "index of the feature"),
        column("kind", pa.string(), "top (the strongest), band (of a band of activation) or random (of active rows)"),
        column("band", pa.int32(), "band of its activation, from 0 for the weakest; null but for bands", nullable=True),
        column("rank", pa.int32(), "place in its kind and band, from 0, strongest first; ties by row"),
        column("activation", pa.float32(), "the feature's activation on this row", unit="activation"),
        column("row", pa.int64(), "row of the split, in token order"),
        column("unit", pa.int32(), "storage unit that holds the row"),
        column("context", pa.int64(), "context id"),
        column("position", pa.int32(), "position in the context, from 0", unit="tokens"),
        column(
            "document", pa.int64(), "document that the token comes from: its place in the dataset's own order, from 0"
        ),
        column("token_id", pa.int32(), "token at the row"),
        column(
            "token", pa.string(), "its text as in the window; of a token that only begins a character, bytes as <0xE6>"
        ),
        column("window_start", pa.int32(), "position in the context of the window's first token", unit="tokens"),
        column("window_token_ids", pa.list_(pa.int32()), "tokens around the row, within the context"),
        column(
            "window_tokens",
            pa.list_(pa.string()),
            "texts of these tokens, which join to the text that was read: a character split over tokens is at the "
            "token that completes it, and those before it are empty",
        ),
        column(
            "window_activations",
            pa.list_(pa.float32()),
            "the feature's activation on each token of the window; null where the cache left the row out (e.g. BOS)",
            unit="activation",
        ),
    ]
)

MOST_KEPT = 1 << 14
"""Runs that are kept before all are dropped: 50 MB if each fills a window."""


def compute(harvest: Harvest, subject: Subject, plan: Plan) -> Iterator[pa.RecordBatch]:
    """Make the rows, a run of features at a time."""
    strongest = harvest[TopExamples].kept
    texts = WindowTexts(subject.vocabulary)
    for features in feature_ranges(subject.coder.d_sae):
        start, stop = np.searchsorted(strongest.feature, [features.start, features.stop])
        shown = _Shown.of_kind(strongest.take(np.arange(start, stop)), TOP)
        if are_kept(plan):
            for sampled in _sampled(harvest, plan, features):
                shown = shown.joined(sampled)
        if len(shown.kind):
            yield _rows(shown.ordered(), subject, plan, texts)


class _Shown(NamedTuple):
    """Examples with their kind and band."""

    examples: Examples
    kind: NDArray[np.int64]
    """(examples,) index into ``KINDS``."""
    band: NDArray[np.int64]
    """(examples,) -1 for no band."""

    @classmethod
    def of_kind(cls, examples: Examples, kind: int) -> Self:
        n = len(examples.row)
        return cls(examples, np.full(n, kind), np.full(n, -1))

    def joined(self, others: Self) -> Self:
        kinds, bands = np.concatenate([self.kind, others.kind]), np.concatenate([self.band, others.band])
        return type(self)(self.examples.joined(others.examples), kinds, bands)

    def ordered(self) -> Self:
        """Return the examples by feature, kind and band, the strongest first."""
        own = self.examples
        order = np.lexsort((own.row, -own.activation, self.band, self.kind, own.feature))
        return type(self)(own.take(order), self.kind[order], self.band[order])

    def rank(self) -> NDArray[np.int64]:
        """Return the rank of each example among those of its feature, kind and band."""
        n_groups = int(self.band.max(initial=-1)) + 2
        return rank_in_group((self.examples.feature * len(KINDS) + self.kind) * n_groups + self.band + 1)


def _sampled(harvest: Harvest, plan: Plan, features: range) -> Iterator[_Shown]:
    """Yield the examples of bands and of all active rows."""
    maximum = harvest[FeatureTotals].maximum
    for pairs in harvest[KeptPairs].sorted_pairs(features):
        own = maximum[pairs.features.start : pairs.features.stop]
        sampled = sample_examples(pairs, own, harvest[KeptRows], plan)
        yield _Shown(sampled.examples, np.where(sampled.band < 0, RANDOM, BAND), sampled.band)


def _rows(shown: _Shown, subject: Subject, plan: Plan, texts: WindowTexts) -> pa.RecordBatch:
    examples = shown.examples
    tokens = tokens_of(subject.split, examples.context)
    token = tokens[np.arange(len(tokens)), examples.position]
    positions = examples.position[:, None] + np.arange(-plan.window_before, plan.window_after + 1)
    is_inside = (positions >= 0) & (positions < tokens.shape[1])
    lengths = is_inside.sum(axis=1)
    window = np.take_along_axis(tokens, np.clip(positions, 0, tokens.shape[1] - 1), axis=1)[is_inside]
    activations = pa.array(examples.window[is_inside], pa.float32(), from_pandas=True)
    window_start = np.maximum(examples.position - plan.window_before, 0)
    window_texts = texts.of(window, lengths)
    here = window_texts.take(pa.array(np.cumsum(lengths) - lengths + examples.position - window_start))
    columns = {
        "feature": examples.feature,
        "kind": pa.array(KINDS).take(pa.array(shown.kind)),
        "band": pa.array(shown.band, pa.int32(), mask=shown.band < 0),
        "rank": shown.rank(),
        "activation": examples.activation,
        "row": in_split(subject.split, examples.row),
        "unit": units_of(subject.split, examples.row),
        "context": examples.context,
        "position": examples.position,
        "document": documents_at(subject.split, examples.context, examples.position).astype(np.int64),
        "token_id": token,
        "token": pc.if_else(pc.equal(here, ""), texts.vocabulary.take(pa.array(token)), here),
        "window_start": window_start,
        "window_token_ids": list_array(pa.array(window), lengths),
        "window_tokens": list_array(window_texts, lengths),
        "window_activations": list_array(activations, lengths),
    }
    return record_batch(SCHEMA, columns)


TABLE = Table(
    name="examples",
    meaning=(
        "Examples of every feature, of three kinds. *top*: the strongest, at most one from each context, as "
        "neighbouring rows of one passage are the same example again. *band*: from each of five (`--bands`) equal "
        "parts of the range from zero to the feature's maximum, band b of n holding activations in (max·b/n, "
        "max·(b+1)/n]. *random*: from all rows on which it is active. The latter two are uniform samples, those of "
        "smallest hash of (`--seed`, feature, row), from the rows whose activations are kept; there are none with "
        "`--activations none`. One row may be an example of several kinds. The window is cut at the context's edges. "
        "Sorted by feature, kind (top, band, random), band and rank; a dead feature has none."
    ),
    schema=SCHEMA,
    needs=(TopExamples, FeatureTotals, KeptPairs, KeptRows),
    compute=compute,
    row_group_rows=4096,
)


class WindowTexts:
    """Texts of windows of tokens, in which characters that were split over tokens are put together.

    Tokens that are parts of characters are rare in most text and most of it in some (Chinese under GPT-2's tokenizer),
    so each run of such tokens is put together once, and kept for equal runs that come soon after.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = pa.array(vocabulary, pa.string())
        """Texts by token id, each on its own."""
        self._is_partial = np.fromiter(map(has_bytes, vocabulary), bool, len(vocabulary))
        self._joined: dict[tuple[int, ...], list[str]] = {}

    def of(self, tokens: NDArray[np.integer], lengths: NDArray[np.integer]) -> pa.Array:
        """Return the text of each of ``tokens``: windows of the given lengths, end to end.

        A token that only begins a character is the empty string, and the token that completes it has the character;
        what a window's ends cut off stays ``<0xE6>``.
        """
        texts = self.vocabulary.take(pa.array(tokens))
        is_partial = self._is_partial[tokens]
        if not is_partial.any():
            return texts
        window = np.repeat(np.arange(len(lengths)), lengths)
        starts, stops = _runs(is_partial, window)
        joined = [text for start, stop in zip(starts, stops, strict=True) for text in self._run(tokens[start:stop])]
        result = texts.to_numpy(zero_copy_only=False)
        result[np.flatnonzero(is_partial)] = joined
        return pa.array(result, pa.string())

    def _run(self, tokens: NDArray[np.integer]) -> list[str]:
        key = tuple(tokens.tolist())
        if key not in self._joined:
            if len(self._joined) >= MOST_KEPT:
                self._joined.clear()
            self._joined[key] = join_characters([self.vocabulary[token].as_py() for token in key])
        return self._joined[key]


def _runs(is_chosen: NDArray[np.bool_], window: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the starts and stops of runs of chosen tokens, each within one window."""
    group = np.where(is_chosen, window, -1)
    edges = np.concatenate([[0], np.flatnonzero(np.diff(group)) + 1, [len(group)]])
    starts, stops = edges[:-1], edges[1:]
    is_run = is_chosen[starts]
    return starts[is_run], stops[is_run]
