"""Statistics of each feature over its active rows: counts, sums, maxima, histograms, positions in the context."""

from __future__ import annotations

from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from tailrace.analysis.harvest import loops
from tailrace.analysis.harvest.block import EncodedBlock
from tailrace.analysis.harvest.histogram import BIN_OF_CELL, HIGH_EDGE, N_BINS
from tailrace.analysis.harvest.one_pass import Plan, Subject
from tailrace.analysis.harvest.sums import OrderedSum

N_POSITION_BINS: Final = 16
"""Equal parts of a context in which active rows are counted."""


class FeatureTotals:
    """Accumulator per feature. Counts, maxima and histograms are exact; sums are float64 in unit order.

    Memory: 4.2 KiB per feature, nearly all of it the histogram.
    """

    def __init__(self, d_sae: int, context_length: int, *, first_unit: int) -> None:
        self._d_sae = d_sae
        self._context_length = context_length
        self.n_active = np.zeros(d_sae, np.int64)
        self.maximum = np.zeros(d_sae, np.float32)
        self.histogram = np.zeros((d_sae, N_BINS), np.int64)
        self.n_active_in_bin = np.zeros((d_sae, N_POSITION_BINS), np.int64)
        """Active rows in each part of a context."""
        self.n_rows_in_bin = np.zeros(N_POSITION_BINS, np.int64)
        """Rows in each part of a context."""
        self._sum = OrderedSum((d_sae,), first_unit=first_unit)
        self._sum_of_squares = OrderedSum((d_sae,), first_unit=first_unit)

    @classmethod
    def start(cls, subject: Subject, plan: Plan, first_unit: int) -> Self:  # noqa: ARG003 - an accumulator's signature
        """Return an empty accumulator."""
        return cls(subject.coder.d_sae, subject.context_length, first_unit=first_unit)

    def add(self, block: EncodedBlock) -> None:
        """Count a block."""
        pairs = block.by_feature
        position_bin = block.rows.position * N_POSITION_BINS // self._context_length
        sums, squares = np.zeros(self._d_sae), np.zeros(self._d_sae)
        loops.add_pairs(
            pairs.offsets,
            pairs.row,
            pairs.value,
            pairs.value.view(np.uint32),
            BIN_OF_CELL,
            HIGH_EDGE,
            position_bin,
            self.n_active,
            sums,
            squares,
            self.maximum,
            self.histogram,
            self.n_active_in_bin,
        )
        self._sum.add(sums)
        self._sum_of_squares.add(squares)
        self.n_rows_in_bin += np.bincount(position_bin, minlength=N_POSITION_BINS)

    def end_unit(self) -> None:
        """Close a unit's sums."""
        self._sum.end_unit()
        self._sum_of_squares.end_unit()

    def merge(self, later: Self) -> None:
        """Add the statistics of units that come after all units counted here."""
        self.n_active += later.n_active
        self.histogram += later.histogram
        self.n_active_in_bin += later.n_active_in_bin
        self.n_rows_in_bin += later.n_rows_in_bin
        np.maximum(self.maximum, later.maximum, out=self.maximum)
        self._sum.merge(later._sum)
        self._sum_of_squares.merge(later._sum_of_squares)

    def mean(self) -> NDArray[np.float64]:
        """Return (d_sae,) the mean over active rows, NaN for features that were never active."""
        return self._per_active(self._sum.total())

    def standard_deviation(self) -> NDArray[np.float64]:
        """Return (d_sae,) the population standard deviation over active rows, NaN where there are none.

        From sums of squares: exact to about 1e-8 of the mean, so below that it is noise about zero.
        """
        variance = self._per_active(self._sum_of_squares.total()) - self.mean() ** 2
        return np.sqrt(np.maximum(variance, 0))

    def position_edges(self) -> NDArray[np.float64]:
        """Return (bins + 1,) positions between the parts of a context; a part holds its low edge, not its high one."""
        return np.arange(N_POSITION_BINS + 1) * self._context_length / N_POSITION_BINS

    def position_frequency(self) -> NDArray[np.float64]:
        """Return (d_sae, bins) the share of each part's rows on which a feature is active; NaN for parts without."""
        frequency = np.full(self.n_active_in_bin.shape, np.nan)
        np.divide(self.n_active_in_bin, self.n_rows_in_bin, out=frequency, where=self.n_rows_in_bin > 0)
        return frequency

    def _per_active(self, totals: NDArray[np.float64]) -> NDArray[np.float64]:
        result = np.full(self._d_sae, np.nan)
        np.divide(totals, self.n_active, out=result, where=self.n_active > 0)
        return result
