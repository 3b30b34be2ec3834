"""Histograms of many fine bins, drawn with fewer: neighbouring bins joined, on a common axis or each on its own.

Bins of `tailrace.analysis.harvest.histogram` are the same for every feature, so any of them are found on one axis by
their edges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from tailrace.analysis.harvest.histogram import EDGES, N_BINS

SPARK_BINS = 28
"""Bars of a sparkline at most."""
PAGE_BINS = 40
"""Bars of a page's histogram at most."""
_LEVELS = "0123456789abcdefghijklmnopqrstuvwxyz"


def first_bin(edges: Sequence[float]) -> int:
    """Return the place, among the bins of `tailrace.analysis.harvest.histogram`, of a histogram's first bin."""
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
        places = self.first + self.group * np.arange(self.n_groups + 1)
        found: NDArray[np.float32] = EDGES[np.minimum(places, N_BINS)]
        return found

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
