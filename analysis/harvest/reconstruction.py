"""FVU and L0 of a transcoder, pooled over all rows of a split."""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray

from tailrace.analysis.harvest import loops
from tailrace.analysis.harvest.block import EncodedBlock
from tailrace.analysis.harvest.one_pass import Plan, Subject
from tailrace.analysis.harvest.sums import OrderedSum
from tailrace.storage.errors import NonFiniteActivation


class RowTotals:
    """Accumulator over rows: the exact distribution of L0, and both sums of the FVU in float64.

    The variance is summed about ``center`` (d_out,), any point near the mean output, and corrected at the end;
    about zero, large means would eat the digits.
    """

    def __init__(self, d_sae: int, center: NDArray[np.float64], *, first_unit: int) -> None:
        self._center = center
        self.n_rows = 0
        self.l0_counts = np.zeros(d_sae + 1, np.int64)
        """(d_sae + 1,) rows with each number of active features."""
        self._error = OrderedSum((), first_unit=first_unit)
        self._deviation = OrderedSum(center.shape, first_unit=first_unit)
        self._squared_deviation = OrderedSum((), first_unit=first_unit)

    @classmethod
    def start(cls, subject: Subject, plan: Plan, first_unit: int) -> Self:  # noqa: ARG003 - an accumulator's signature
        """Return an empty accumulator."""
        return cls(subject.coder.d_sae, subject.output_mean, first_unit=first_unit)

    def add(self, block: EncodedBlock) -> None:
        """Count a block. Raises NonFiniteActivation if the transcoder yields one."""
        deviation, sums = np.zeros_like(self._center), np.zeros(2)
        loops.add_rows(block.outputs.numpy(), block.predicted, self._center, deviation, sums)
        error, squared_deviation = sums
        if not np.isfinite(error):
            first, last = block.rows.first_row, block.rows.first_row + block.rows.n_rows - 1
            raise NonFiniteActivation(
                f"rows {first}..{last} (contexts {block.rows.context[0]}..{block.rows.context[-1]}): the transcoder's "
                "output or the cached one is not finite; run `pipeline verify` on the cache, and if it is sound, "
                "train the transcoder again with a lower learning rate"
            )
        self._error.add(error)
        self._deviation.add(deviation)
        self._squared_deviation.add(squared_deviation)
        self.l0_counts += np.bincount(np.diff(block.pairs.offsets), minlength=len(self.l0_counts))
        self.n_rows += block.rows.n_rows

    def end_unit(self) -> None:
        """Close a unit's sums."""
        for total in (self._error, self._deviation, self._squared_deviation):
            total.end_unit()

    def merge(self, later: Self) -> None:
        """Add the totals of units that come after all units counted here."""
        self.n_rows += later.n_rows
        self.l0_counts += later.l0_counts
        self._error.merge(later._error)
        self._deviation.merge(later._deviation)
        self._squared_deviation.merge(later._squared_deviation)

    def squared_error(self) -> float:
        """Return Σ‖y − ŷ‖²."""
        return float(self._error.total())

    def variation(self) -> float:
        """Return Σ‖y − ȳ‖², ȳ the mean over the rows counted."""
        shift = self._deviation.total()
        return float(self._squared_deviation.total() - (shift @ shift) / self.n_rows)

    def fraction_of_variance_unexplained(self) -> float:
        """Return the FVU: 0 is perfect, 1 is no better than the mean; NaN if the outputs do not vary."""
        variation = self.variation()
        return self.squared_error() / variation if variation > 0 else float("nan")

    def l0_mean(self) -> float:
        """Return the mean number of active features per row."""
        return float(np.arange(len(self.l0_counts)) @ self.l0_counts / self.n_rows)

    def l0_quantile(self, share: float) -> int:
        """Return the ⌈share·rows⌉-th smallest L0, exactly."""
        rank = max(int(np.ceil(share * self.n_rows)), 1)
        return int(np.searchsorted(np.cumsum(self.l0_counts), rank))
