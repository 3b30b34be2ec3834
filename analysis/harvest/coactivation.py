"""Features that are active together: exact counts over pairs of features, in bounded memory.

The counts of all pairs of features would be d_sae² numbers, so a run of features is counted against all others at a
time, in ``COUNT_BYTES``, from the rows' lists of active features: for each feature of the run, its rows' lists are
walked one after the other. Work: Σ L0² over rows, whatever the runs; where that exceeds ``MOST_STEPS`` only the first
rows are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tailrace.analysis.harvest import loops
from tailrace.analysis.harvest.activations import FeatureLists, KeptPairs
from tailrace.training.kernels.loops import over_ranges

N_TOP: Final = 10
"""Others named for each feature."""
FEWEST_ROWS: Final = 10
"""Rows a feature must be active on, whatever the floor: two that fire once each, together, have φ = 1."""
COUNT_BYTES: Final = 256 << 20
MOST_STEPS: Final = 200_000_000_000
"""Steps of counting, at about a nanosecond each."""
PIECE_PAIRS: Final = 8 << 20
"""Active pairs in memory at once."""


class Coactivation(NamedTuple):
    """Pairs of features, sorted by feature and rank."""

    feature: NDArray[np.int64]
    other: NDArray[np.int64]
    n_both: NDArray[np.int64]
    jaccard: NDArray[np.float64]
    phi: NDArray[np.float64]
    rank: NDArray[np.int64]


def rows_counted(kept: KeptPairs, most_steps: int = MOST_STEPS) -> int:
    """Return the number of the rows kept, from the first, over which features are counted together."""
    steps = np.cumsum(np.square(kept.row_counts(), dtype=np.int64))
    return int(np.searchsorted(steps, most_steps, side="right"))


def count_coactivation(
    kept: KeptPairs,
    floor: float,
    *,
    n_rows: int | None = None,
    n_top: int = N_TOP,
    count_bytes: int = COUNT_BYTES,
    piece_pairs: int = PIECE_PAIRS,
) -> Iterator[Coactivation]:
    """Yield for runs of features the ``n_top`` others of largest φ above zero, over the first ``n_rows`` rows kept.

    Counted are features active on a share ``floor`` of these rows and on ``FEWEST_ROWS`` of them.
    """
    n_rows = rows_counted(kept) if n_rows is None else n_rows
    d_sae = len(kept.n_pairs)
    n_active = np.zeros(d_sae, np.int64)
    for piece in kept.feature_lists(piece_pairs, n_rows):
        n_active += np.bincount(piece.features, minlength=d_sae)
    listed = np.flatnonzero(n_active >= max(FEWEST_ROWS, floor * n_rows))
    number = np.full(d_sae, -1, np.int32)
    number[listed] = np.arange(len(listed))
    run = max(1, count_bytes // (4 * max(1, len(listed))))
    for start in range(0, len(listed), run):
        numbers = range(start, min(start + run, len(listed)))
        counts = np.zeros((len(numbers), len(listed)), np.int32)
        for piece in kept.feature_lists(piece_pairs, n_rows):
            _count(piece, number, numbers, counts)
        yield _strongest(counts, numbers, listed, n_active[listed], n_rows, n_top)


def _count(piece: FeatureLists, number: NDArray[np.int32], numbers: range, counts: NDArray[np.int32]) -> None:
    """Add a piece's rows to the counts of the features numbered ``numbers``."""
    features, offsets = np.empty(len(piece.features), np.int32), np.empty(len(piece.offsets), np.int64)
    n = loops.keep_listed(piece.features, piece.offsets, number, features, offsets)
    features = features[:n]
    row_offsets, rows = np.empty(len(numbers) + 1, np.int64), np.empty(n, np.int64)
    loops.list_rows(features, offsets, numbers.start, numbers.stop, row_offsets, rows)
    over_ranges(
        len(numbers),
        lambda start, stop: loops.count_together(features, offsets, row_offsets, rows, counts, start, stop),
    )


def _strongest(
    counts: NDArray[np.int32],
    numbers: range,
    listed: NDArray[np.int64],
    n_active: NDArray[np.int64],
    n_rows: int,
    n_top: int,
) -> Coactivation:
    others, phis = np.empty((len(numbers), n_top), np.int64), np.empty((len(numbers), n_top))
    roots = np.sqrt(n_active * (n_rows - n_active).astype(np.float64))
    over_ranges(
        len(numbers),
        lambda start, stop: loops.largest_phi(
            counts, n_active, roots, float(n_rows), numbers.start, others, phis, start, stop
        ),
    )
    own, rank = np.nonzero(others >= 0)
    other = others[own, rank]
    n_both = counts[own, other].astype(np.int64)
    n_either = n_active[numbers.start + own] + n_active[other] - n_both
    return Coactivation(listed[numbers.start + own], listed[other], n_both, n_both / n_either, phis[own, rank], rank)
