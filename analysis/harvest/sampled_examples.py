"""Examples that are not the strongest: some of every band of activation, and some of all active rows.

Chosen by the smallest hash of (seed, feature, row), which is a uniform sample without replacement that no worker, block
or order can change. Bands are equal parts of the range from zero to the feature's maximum, exact because all
activations are at hand: band b of n holds those in (max · b / n, max · (b + 1) / n].
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tailrace.analysis.harvest import loops
from tailrace.analysis.harvest.activations import RowPlaces
from tailrace.analysis.harvest.block import FeaturePairs
from tailrace.analysis.harvest.examples import Examples
from tailrace.analysis.harvest.one_pass import Plan

_GAMMA: Final = np.uint64(0x9E3779B97F4A7C15)


class SampledExamples(NamedTuple):
    """Examples of bands and of all active rows, sorted by feature."""

    examples: Examples
    band: NDArray[np.int64]
    """(examples,) the band, from 0 for the weakest; -1 for those of all active rows."""


def sample_examples(
    pairs: FeaturePairs, maximum: NDArray[np.float32], places: RowPlaces, plan: Plan
) -> SampledExamples:
    """Return the examples of the features of ``pairs``, whose rows are those of the split.

    ``maximum`` (features,) is each one's largest activation.
    """
    n_of_bands = plan.n_bands * plan.n_band_examples
    picks = np.empty((len(pairs.features), n_of_bands + plan.n_random_examples), np.int64)
    keys = feature_keys(plan.seed, pairs.features)
    sizes = (plan.n_bands, plan.n_band_examples, plan.n_random_examples)
    hashes = np.empty(picks.shape[1], np.uint64)
    loops.pick_by_hash(pairs.offsets, pairs.row, pairs.value, keys, maximum, *sizes, hashes, picks)
    feature, slot = np.nonzero(picks >= 0)
    pair = picks[feature, slot]
    row = pairs.row[pair]
    windows = np.empty((len(pair), plan.window_before + 1 + plan.window_after), np.float32)
    contexts, positions = places.contexts, places.positions
    around = (pair, feature, np.arange(len(pair)), plan.window_before, windows)
    loops.fill_windows(pairs.offsets, pairs.row, pairs.value, contexts, positions, *around)
    examples = Examples(pairs.first_feature + feature, pairs.value[pair], row, contexts[row], positions[row], windows)
    is_random = slot >= n_of_bands
    return SampledExamples(examples, np.where(is_random, -1, slot // max(plan.n_band_examples, 1)))


def feature_keys(seed: int, features: range) -> NDArray[np.uint64]:
    """Return a number for each feature, from which and a row ``mixed`` makes the hash of a pair."""
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
