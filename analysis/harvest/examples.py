"""The strongest examples of every feature, kept in bounded memory while rows stream past.

**At most one example comes from a context**: the strongest row there, because neighbouring rows of one passage are
the same example again. Equal activations are ordered by row, the earlier first, so the kept set is a function of the
rows alone and not of how they were cut into blocks or workers.

Each example keeps the feature's activation at every row of its window when it is seen, since the context's rows are
at hand then; nothing is encoded a second time, and the numbers shown agree with the statistics to the bit.

Beside the strongest, some of every band of activation and some of all active rows are chosen by the smallest hash of
(seed, feature, row): a uniform sample without replacement that no worker, block or order can change. Bands are equal
parts of the range from zero to the feature's maximum, exact because all activations are at hand: band b of n holds
those in (max · b / n, max · (b + 1) / n].
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from tailrace.analysis.harvest import loops
from tailrace.analysis.harvest.activations import KeptRows
from tailrace.analysis.harvest.block import EncodedBlock, FeaturePairs
from tailrace.analysis.harvest.one_pass import Plan, Subject

_GAMMA: Final = np.uint64(0x9E3779B97F4A7C15)


class Examples(NamedTuple):
    """Examples as parallel arrays, one entry each."""

    feature: NDArray[np.int64]
    activation: NDArray[np.float32]
    row: NDArray[np.int64]
    """Index of the row in the split's token order."""
    context: NDArray[np.int64]
    position: NDArray[np.int64]
    window: NDArray[np.float32]
    """(examples, before + 1 + after) the feature's activations around the example; NaN where the cache has no row."""

    @classmethod
    def empty(cls, window: int) -> Self:
        """Return no examples."""
        integers = np.empty(0, np.int64)
        return cls(integers, np.empty(0, np.float32), integers, integers, integers, np.empty((0, window), np.float32))

    def take(self, chosen: NDArray[np.integer]) -> Self:
        """Return the chosen entries, in the order given."""
        return type(self)._make(array[chosen] for array in self)

    def joined(self, others: Self) -> Self:
        """Return these examples followed by others."""
        columns: Any = zip(self, others, strict=True)
        return type(self)._make(np.concatenate(pair) for pair in columns)


class TopExamples:
    """Accumulator of the ``n`` strongest examples per feature.

    Memory: n examples per feature, each 32 bytes and 4 per row of its window.
    """

    def __init__(self, d_sae: int, n: int, before: int, after: int) -> None:
        self.n = n
        self.before = before
        self._n_kept = np.zeros(d_sae, np.int64)
        self._activation = np.zeros((d_sae, n), np.float32)
        """By rank, as are the slots; everything else of an example is at its slot."""
        self._slot = np.zeros((d_sae, n), np.int64)
        self._row = np.zeros((d_sae, n), np.int64)
        self._context = np.zeros((d_sae, n), np.int64)
        self._position = np.zeros((d_sae, n), np.int32)
        self._window = np.zeros((d_sae, n, before + 1 + after), np.float32)

    @classmethod
    def start(cls, subject: Subject, plan: Plan, first_unit: int) -> Self:  # noqa: ARG003 - an accumulator's signature
        """Return an empty accumulator."""
        return cls(subject.coder.d_sae, plan.n_examples, plan.window_before, plan.window_after)

    @property
    def kept(self) -> Examples:
        """The examples so far, sorted by feature, then by falling activation."""
        is_kept = np.arange(self.n) < self._n_kept[:, None]
        feature, rank = np.nonzero(is_kept)
        slot = self._slot[feature, rank]
        return Examples(
            feature=feature,
            activation=self._activation[feature, rank],
            row=self._row[feature, slot],
            context=self._context[feature, slot],
            position=self._position[feature, slot].astype(np.int64),
            window=self._window[feature, slot],
        )

    def add(self, block: EncodedBlock) -> None:
        """Add the examples of a block."""
        pairs, rows = block.by_feature, block.rows
        pair, feature, slot = self._keep(pairs.offsets, pairs.row, pairs.value, rows.context)
        row = pairs.row[pair]
        self._row[feature, slot] = rows.first_row + row  # of two for one slot, the later one stays
        self._context[feature, slot] = rows.context[row]
        self._position[feature, slot] = rows.position[row]
        windows = self._window.reshape(-1, self._window.shape[2])
        slots = feature * self.n + slot
        loops.fill_windows(*pairs[1:], rows.context, rows.position, pair, feature, slots, self.before, windows)

    def end_unit(self) -> None:
        """Do nothing: the kept set does not depend on where units end."""

    def merge(self, later: Self) -> None:
        """Add the examples of rows that come after all rows counted here."""
        theirs = later.kept
        offsets = np.searchsorted(theirs.feature, np.arange(len(self._n_kept) + 1))
        # they are by rank, earlier rows first among equals; each in a "context" of its own, so that none hides another
        each = np.arange(len(theirs.row))
        pair, feature, slot = self._keep(offsets, each, theirs.activation, each)
        self._row[feature, slot] = theirs.row[pair]
        self._context[feature, slot] = theirs.context[pair]
        self._position[feature, slot] = theirs.position[pair]
        self._window[feature, slot] = theirs.window[pair]

    def _keep(
        self,
        offsets: NDArray[np.int64],
        rows: NDArray[np.int64],
        values: NDArray[np.float32],
        contexts: NDArray[np.int64],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return which pairs were kept, with their features and slots."""
        chosen = np.empty((3, len(values)), np.int64)
        n = loops.keep_strongest(offsets, rows, values, contexts, self._n_kept, self._slot, self._activation, *chosen)
        pair, feature, slot = chosen[:, :n]
        return pair, feature, slot


def rank_in_group(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each entry's rank, from 0, within its run of equal values."""
    starts = np.flatnonzero(np.concatenate([[True], groups[1:] != groups[:-1]])) if len(groups) else groups
    lengths = np.diff(np.append(starts, len(groups)))
    return np.arange(len(groups)) - np.repeat(starts, lengths)


class SampledExamples(NamedTuple):
    """Examples of bands and of all active rows, sorted by feature."""

    examples: Examples
    band: NDArray[np.int64]
    """(examples,) the band, from 0 for the weakest; -1 for an example of all active rows."""


def sample_examples(pairs: FeaturePairs, maximum: NDArray[np.float32], rows: KeptRows, plan: Plan) -> SampledExamples:
    """Return the examples of the features of ``pairs``, whose rows count from the start of the split.

    ``maximum`` (features,) is each feature's largest activation.
    """
    n_of_bands = plan.n_bands * plan.n_band_examples
    picks = np.empty((len(pairs.features), n_of_bands + plan.n_random_examples), np.int64)
    keys = _feature_keys(plan.seed, pairs.features)
    sizes = (plan.n_bands, plan.n_band_examples, plan.n_random_examples)
    hashes = np.empty(picks.shape[1], np.uint64)
    loops.pick_by_hash(pairs.offsets, pairs.row, pairs.value, keys, maximum, *sizes, hashes, picks)
    feature, slot = np.nonzero(picks >= 0)
    pair = picks[feature, slot]
    row = pairs.row[pair]
    windows = np.empty((len(pair), plan.window_before + 1 + plan.window_after), np.float32)
    contexts, positions = rows.contexts, rows.positions
    around = (pair, feature, np.arange(len(pair)), plan.window_before, windows)
    loops.fill_windows(pairs.offsets, pairs.row, pairs.value, contexts, positions, *around)
    examples = Examples(pairs.first_feature + feature, pairs.value[pair], row, contexts[row], positions[row], windows)
    is_random = slot >= n_of_bands
    return SampledExamples(examples, np.where(is_random, -1, slot // max(plan.n_band_examples, 1)))


def _feature_keys(seed: int, features: range) -> NDArray[np.uint64]:
    """Return a key for each feature; ``mixed(key + row)`` is the hash of a pair."""
    seeded = mixed(np.array([seed % 2**64], np.uint64))
    return mixed(seeded + np.arange(features.start, features.stop, dtype=np.uint64) * _GAMMA)


def mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return numbers whose every bit depends on every bit: the finaliser of splitmix64.

    From Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 16 (variant 13 of
    Stafford's).
    """
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
