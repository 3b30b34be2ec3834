"""Histograms of many fine bins, drawn with fewer: neighbouring bins joined, on a common axis or each on its own.

Bins of `tailrace.analysis.harvest.histogram` are the same for every feature, so their edges put them on a common axis.

Bands are equal half-open parts (max·b/n, max·(b+1)/n] of a feature's range from zero. Zero is in no band and the
largest activation in the last one, so the shares of the bands add up to the frequency.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tailrace.analysis.harvest.histogram import EDGES, N_BINS

SPARK_BINS = 28
"""Bars of a sparkline at most."""
PAGE_BINS = 40
"""Bars of a page's histogram at most."""
_LEVELS = "0123456789abcdefghijklmnopqrstuvwxyz"


def first_bin(edges: Sequence[float]) -> int:
    """Return the index, among the bins of `tailrace.analysis.harvest.histogram`, of a histogram's first bin."""
    return int(np.searchsorted(EDGES, np.float32(edges[0])))


class Axis:
    """Bins of all features joined in groups of equal size, from the first in use to the last."""

    def __init__(self, first: int, last: int, n_groups: int) -> None:
        """Take the bins from ``first`` to ``last``, both included, in at most ``n_groups`` groups."""
        self.first = first
        self.group = -(-(last - first + 1) // n_groups)
        self.n_groups = -(-(last - first + 1) // self.group)

    @property
    def edges(self) -> NDArray[np.float32]:
        """(groups + 1,) edges; the last may lie beyond the last bin in use."""
        bins = self.first + self.group * np.arange(self.n_groups + 1)
        edges: NDArray[np.float32] = EDGES[np.minimum(bins, N_BINS)]
        return edges

    def counts(self, counts: Sequence[int], start: int) -> NDArray[np.int64]:
        """Return the (groups,) counts of a histogram whose first bin is ``start``."""
        joined = np.zeros(self.n_groups * self.group, np.int64)
        joined[start - self.first : start - self.first + len(counts)] = counts
        sums: NDArray[np.int64] = joined.reshape(self.n_groups, self.group).sum(axis=1)
        return sums


def shared_axis(all_edges: Iterable[Sequence[float]], n_groups: int = SPARK_BINS) -> Axis | None:
    """Return one axis for all histograms with bins; None if none has any."""
    used = [(first_bin(edges), len(edges) - 1) for edges in all_edges if len(edges) > 1]
    if not used:
        return None
    return Axis(min(start for start, _ in used), max(start + length - 1 for start, length in used), n_groups)


def sparkline(counts: NDArray[np.int64]) -> str:
    """Return one character per bar, 0 to z by height over the highest; a bar that is not empty is never 0."""
    heights = np.ceil(counts / max(int(counts.max()), 1) * (len(_LEVELS) - 1)).astype(int)
    return "".join(_LEVELS[height] for height in heights)


def page_histogram(counts: Sequence[int], edges: Sequence[float]) -> dict[str, list[float]] | None:
    """Return the ``counts`` and ``edges`` that a feature's page draws, log-spaced; None without active rows."""
    if len(edges) < 2:
        return None
    start = first_bin(edges)
    axis = Axis(start, start + len(counts) - 1, PAGE_BINS)
    return {
        "counts": axis.counts(counts, start).tolist(),
        "edges": [float(f"{edge:.4g}") for edge in axis.edges.tolist()],
    }


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
