"""How many rows lie in each band: equal half-open parts (max·b/n, max·(b+1)/n] of a feature's range from zero.

Zero is in no band and the largest activation in the last one, so the shares of the bands add up to the frequency.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Bands(NamedTuple):
    """Bands of one feature, weakest first."""

    edges: NDArray[np.float64]
    """(bands + 1,) from zero to the largest activation."""
    counts: NDArray[np.float64]
    """(bands,) active rows in each; whole numbers where ``is_exact``."""
    is_exact: bool


def band_edges(largest: float, n_bands: int) -> NDArray[np.float64]:
    """Return the (bands + 1,) edges of equal bands from zero to ``largest``."""
    return largest * np.arange(n_bands + 1) / n_bands


def count_in_bands(activations: NDArray[np.floating], largest: float, n_bands: int) -> NDArray[np.int64]:
    """Return how many of a feature's ``activations`` lie in each band; zeros lie in none."""
    edges = band_edges(largest, n_bands)
    edges[-1] = np.inf  # the largest activation is in the last band, however its edge was rounded
    above = [(activations > edge).sum() for edge in edges]
    return np.subtract(above[:-1], above[1:]).astype(np.int64)


def estimate_bands(counts: Sequence[int], edges: Sequence[float], largest: float, n_bands: int) -> NDArray[np.float64]:
    """Return the rows in each band, from a histogram whose bins are taken to be evenly filled.

    ``edges`` has one entry more than ``counts``. The last bin ends at ``largest``, as nothing lies beyond.
    """
    filled = np.concatenate([[0.0], np.cumsum(np.asarray(counts, np.float64))])
    bounds = np.asarray(edges, np.float64).copy()
    bounds[-1] = max(largest, bounds[-2])
    below = np.interp(band_edges(largest, n_bands), bounds, filled)
    below[0], below[-1] = 0.0, filled[-1]
    return np.diff(below)


def bands_of(
    largest: float,
    histogram: tuple[Sequence[int], Sequence[float]],
    activations: NDArray[np.floating] | None,
    n_bands: int,
) -> Bands:
    """Return a live feature's bands: exact if every one of its activations is stored, else from its histogram.

    ``histogram`` is (counts, edges); the number of active rows is the sum of its counts.
    """
    counts, edges = histogram
    limits = band_edges(largest, n_bands)
    if activations is not None and len(activations) == sum(counts):
        return Bands(limits, count_in_bands(activations, largest, n_bands).astype(np.float64), is_exact=True)
    return Bands(limits, estimate_bands(counts, edges, largest, n_bands), is_exact=False)
