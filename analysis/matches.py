"""For each feature of a dictionary the most similar of another: by decoder rows, and by the rows on which both fire.

A large similarity means little by itself: of thousands of features, one is always the most similar. So each is compared
with a null, the same search in another dictionary that has nothing to do with the first: its decoder turned by a random
rotation, or its activations moved to other contexts at the same positions. What a feature of the null reaches by chance
is not counted as a match.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailrace.analysis.harvest import loops
from tailrace.analysis.harvest.coactivation import FEWEST_ROWS
from tailrace.training.kernels.loops import over_ranges

NULL_SHARE = 0.99
"""A match is more similar than this share of the null's: one in a hundred features has a match by chance."""
COUNT_BYTES = 64 << 20
_BLOCK = 1024


class Similar(NamedTuple):
    """The most similar feature of another dictionary, for each of a dictionary's."""

    feature: NDArray[np.int64]
    """(features,) −1 where there is none: a feature of zero decoder, or one that fires on too few rows."""
    similarity: NDArray[np.float64]
    """(features,) cosine or φ; NaN where there is none."""
    jaccard: NDArray[np.float64] | None = None
    """(features,) rows of both over rows of either, of the pair of largest φ."""


class Fires(NamedTuple):
    """The rows on which each feature of a dictionary is active."""

    offsets: NDArray[np.int64]
    """(features + 1,) where each feature's rows begin."""
    rows: NDArray[np.int64]
    """By feature."""
    n_rows: int
    """Rows there are."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """(features,) rows on which each is active."""
        return np.diff(self.offsets)

    @property
    def features(self) -> NDArray[np.int64]:
        """The feature of each entry of ``rows``."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.counts)

    def moved(self, to: NDArray[np.int64], n_rows: int) -> Fires:
        """Return the same with row r called ``to[r]``, of ``n_rows``; rows with −1 are left out."""
        rows = to[self.rows]
        return fires(self.features[rows >= 0], rows[rows >= 0], len(self.offsets) - 1, n_rows)


def fires(features: NDArray[np.int64], rows: NDArray[np.int64], d_sae: int, n_rows: int) -> Fires:
    """Return the rows of each feature, of pairs that are sorted by feature."""
    return Fires(np.concatenate([[0], np.cumsum(np.bincount(features, minlength=d_sae))]), rows, n_rows)


def most_similar_decoders(own: Tensor, other: Tensor) -> Similar:
    """Return by cosine the decoder row of ``other`` (m, d) nearest to each of ``own`` (n, d), in float32."""
    unit = [torch.nn.functional.normalize(rows.float(), dim=1) for rows in (own, other)]
    best = [(block @ unit[1].T).max(dim=1) for block in torch.split(unit[0], _BLOCK)]
    similarity = torch.cat([one.values for one in best]).double().cpu().numpy()
    feature = torch.cat([one.indices for one in best]).cpu().numpy()
    is_zero = (own.norm(dim=1) == 0).cpu().numpy()
    return Similar(np.where(is_zero, -1, feature), np.where(is_zero, np.nan, similarity))


def rotated(decoder: Tensor, seed: int) -> Tensor:
    """Return decoder rows turned by a random rotation, the same for all: their cosines with each other stay."""
    d = decoder.shape[1]
    gaussian = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(gaussian)
    rotation = q * r.diagonal().sign()  # uniform over all rotations only with the signs of r's diagonal
    turned: Tensor = decoder.double() @ rotation.to(decoder.device)
    return turned.float()


def most_similar_rows(own: Fires, other: Fires) -> Similar:
    """Return by φ, the correlation of firing, the feature of ``other`` most like each of ``own``.

    Features that fire on fewer than ``FEWEST_ROWS`` rows are left out on both sides.
    """
    assert own.n_rows == other.n_rows, "both are of the same rows"
    n, n_own, n_other = float(own.n_rows), own.counts.astype(np.float64), other.counts.astype(np.float64)
    order = np.argsort(other.rows, kind="stable")
    by_row = other.features[order].astype(np.int32)
    row_offsets = np.concatenate([[0], np.cumsum(np.bincount(other.rows, minlength=other.n_rows))])
    roots = np.sqrt(n_other * (n - n_other))
    roots[n_other < FEWEST_ROWS] = np.inf  # φ = 0
    best, phis, jaccards = np.full(len(n_own), -1), np.full(len(n_own), np.nan), np.full(len(n_own), np.nan)
    run = max(1, COUNT_BYTES // (4 * max(1, len(n_other))))
    for start in range(0, len(n_own), run):
        stop = min(start + run, len(n_own))
        counts = np.zeros((stop - start, len(n_other)), np.int32)
        offsets = own.offsets[start : stop + 1] - own.offsets[start]
        rows = own.rows[own.offsets[start] : own.offsets[stop]]
        _count(by_row, row_offsets, offsets, rows, counts)
        for feature in range(start, stop):
            together, mine = counts[feature - start], n_own[feature]
            if not FEWEST_ROWS <= mine < n:
                continue
            phi = (n * together - mine * n_other) / (np.sqrt(mine * (n - mine)) * roots)
            best[feature] = winner = int(np.argmax(np.nan_to_num(phi, nan=-1.0)))
            phis[feature] = phi[winner]
            jaccards[feature] = together[winner] / (mine + n_other[winner] - together[winner])
    is_none = ~(phis > 0)
    return Similar(np.where(is_none, -1, best), np.where(is_none, np.nan, phis), np.where(is_none, np.nan, jaccards))


def _count(
    by_row: NDArray[np.int32],
    row_offsets: NDArray[np.int64],
    offsets: NDArray[np.int64],
    rows: NDArray[np.int64],
    counts: NDArray[np.int32],
) -> None:
    over_ranges(
        len(counts), lambda start, stop: loops.count_together(by_row, row_offsets, offsets, rows, counts, start, stop)
    )


def next_context(contexts: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each row the row at the same position of the next context, and −1 where there is none.

    After the last context comes the first. Position is kept because many features fire by position alone.
    """
    named, number = np.unique(contexts, return_inverse=True)
    width = int(positions.max(initial=0)) + 1
    keys = number * width + positions
    wanted = (number + 1) % max(1, len(named)) * width + positions
    order = np.argsort(keys)
    found = np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)
    return np.where(keys[order][found] == wanted, order[found], -1)


class Matches(NamedTuple):
    """The most similar features, beside those of the null."""

    found: Similar
    null: Similar

    @property
    def chance(self) -> float:
        """The similarity that ``NULL_SHARE`` of the null stays below; NaN if the null has none."""
        there = self.null.similarity[~np.isnan(self.null.similarity)]
        return float(np.quantile(there, NULL_SHARE)) if len(there) else np.nan

    @property
    def are_matched(self) -> NDArray[np.bool_]:
        """(features,) whether each is more similar than by chance."""
        chance = self.chance
        return self.found.similarity > (-np.inf if np.isnan(chance) else chance)
