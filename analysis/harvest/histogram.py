"""Log-spaced histograms of activations, and quantiles from them with a known error.

Sixteen bins per octave from 2⁻¹⁶ to 2¹⁶, the same for every feature of every transcoder, so that histograms of
different passes can be added. A bin is [low, high). Values below the range count in the first bin and values above
it in the last; there the error bound does not hold.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

BINS_PER_OCTAVE: Final = 16
LOWEST_EXPONENT: Final = -16
HIGHEST_EXPONENT: Final = 16
N_BINS: Final = BINS_PER_OCTAVE * (HIGHEST_EXPONENT - LOWEST_EXPONENT)

QUANTILE_RELATIVE_ERROR: Final = 2 ** (0.5 / BINS_PER_OCTAVE) - 1 + 1e-6
"""A quantile is off by at most this share of itself, 2.2 %: half a bin, and the rounding of edges to float32."""

EDGES: Final[NDArray[np.float32]] = np.exp2(
    LOWEST_EXPONENT + np.arange(N_BINS + 1, dtype=np.float64) / BINS_PER_OCTAVE
).astype(np.float32)
"""(bins + 1,) edges. float32, as activations are, so that no value is ever on the wrong side of an edge."""

_INNER = EDGES[1:-1]
_CELL_STARTS = (np.arange(1 << 15, dtype=np.uint32) << np.uint32(16)).view(np.float32)
BIN_OF_CELL: Final = np.searchsorted(_INNER, np.nan_to_num(_CELL_STARTS, nan=np.inf), side="right")
"""The bin of the smallest value of each cell; a cell is the values that share their upper 16 bits, 128 to an octave."""
HIGH_EDGE: Final[NDArray[np.float32]] = np.append(_INNER, np.float32(np.inf))
"""(bins,) the high edge of each bin, infinity for the last, which values beyond the range count in."""

_Z_95: Final = 1.959963984540054
"""The standard normal's 97.5th percentile."""


def find_bins(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the bin of every (positive, finite) value.

    A cell is narrower than a bin, so its values lie in the bin of its smallest or in the next one: a look-up and a
    comparison, several times faster than a binary search of the edges and equal to it; ``loops.add_pairs`` does so too.
    """
    bins: NDArray[np.int64] = BIN_OF_CELL[np.ascontiguousarray(values).view(np.uint32) >> np.uint32(16)]
    return np.add(bins, values >= HIGH_EDGE[bins], dtype=np.int64)


def quantiles(
    counts: NDArray[np.int64], shares: tuple[float, ...], largest: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Estimate nearest-rank quantiles of each histogram of ``counts`` (features, bins).

    The quantile at share q of n values is the ⌈q·n⌉-th smallest; it is estimated by the geometric middle of its bin,
    though never above the ``largest`` value (features,). Returns (features, shares), NaN for empty histograms.
    """
    totals = counts.sum(axis=1)
    cumulative = np.cumsum(counts, axis=1)
    edges = EDGES.astype(np.float64)
    middles = np.sqrt(edges[:-1] * edges[1:])
    estimates = np.full((len(counts), len(shares)), np.nan)
    for index, share in enumerate(shares):
        ranks = np.maximum(np.ceil(share * totals), 1)
        bins = (cumulative < ranks[:, None]).sum(axis=1)
        alive = totals > 0
        estimates[alive, index] = np.minimum(middles[bins[alive]], largest[alive])
    return estimates


def wilson_interval(
    n_hits: NDArray[np.int64], n_trials: int, z: float = _Z_95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both ends (n,) of the Wilson score interval of shares ``n_hits`` (n,) / ``n_trials``.

    (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n), from Wilson 1927; unlike the normal interval it is sensible
    for shares near 0. Trials are taken as independent, which neighbouring tokens are not: so it is too narrow.
    """
    share = n_hits / n_trials
    center = share + z * z / (2 * n_trials)
    spread = z * np.sqrt(share * (1 - share) / n_trials + (z / (2 * n_trials)) ** 2)
    scale = 1 + z * z / n_trials
    low = np.where(n_hits == 0, 0.0, (center - spread) / scale)
    high = np.where(n_hits == n_trials, 1.0, (center + spread) / scale)
    return low, high
