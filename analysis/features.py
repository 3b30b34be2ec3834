"""Statistics of each feature over its active rows: counts, sums, maxima and histograms."""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray

from analysis.block import Block
from analysis.harvest import Plan, Subject
from analysis.histogram import N_BINS, find_bins
from analysis.sums import OrderedSum


class FeatureTotals:
    """Accumulator per feature. Counts, maxima and histograms are exact; sums are float64 in unit order.

    Memory: 4 KiB per feature, nearly all of it the histogram.
    """

    def __init__(self, d_sae: int, *, first_unit: int) -> None:
        self._d_sae = d_sae
        self.n_active = np.zeros(d_sae, np.int64)
        self.maximum = np.zeros(d_sae, np.float32)
        self.histogram = np.zeros((d_sae, N_BINS), np.int64)
        self._sum = OrderedSum((d_sae,), first_unit=first_unit)
        self._sum_of_squares = OrderedSum((d_sae,), first_unit=first_unit)

    @classmethod
    def start(cls, subject: Subject, plan: Plan, first_unit: int) -> Self:  # noqa: ARG003 - an accumulator's signature
        """Return an empty accumulator."""
        return cls(subject.coder.d_sae, first_unit=first_unit)

    def add(self, block: Block) -> None:
        """Count a block."""
        _, feature, value = block.active
        exact = value.astype(np.float64)
        self.n_active += np.bincount(feature, minlength=self._d_sae)
        self._sum.add(np.bincount(feature, exact, self._d_sae))
        self._sum_of_squares.add(np.bincount(feature, exact * exact, self._d_sae))
        np.maximum.at(self.maximum, feature, value)
        np.add.at(self.histogram.reshape(-1), feature * N_BINS + find_bins(value), 1)

    def end_unit(self) -> None:
        """Close a unit's sums."""
        self._sum.end_unit()
        self._sum_of_squares.end_unit()

    def merge(self, later: Self) -> None:
        """Add the statistics of units that come after all of ours."""
        self.n_active += later.n_active
        self.histogram += later.histogram
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

    def _per_active(self, totals: NDArray[np.float64]) -> NDArray[np.float64]:
        result = np.full(self._d_sae, np.nan)
        np.divide(totals, self.n_active, out=result, where=self.n_active > 0)
        return result
