"""Float64 sums that are equal to the bit however units are shared among workers.

Floating-point addition is not associative, so a worker's partial sums are kept one per unit and folded in unit order.
A pass that starts at unit 0 folds as it goes; only later partitions keep one array per unit.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


class OrderedSum:
    """The sum of arrays of one ``shape``, added within a unit as they come and over units in unit order."""

    def __init__(self, shape: tuple[int, ...], *, first_unit: int) -> None:
        self._folds = first_unit == 0
        self._open = np.zeros(shape, np.float64)
        self._closed: list[NDArray[np.float64]] = []

    def add(self, value: NDArray[Any] | np.float64) -> None:
        """Add to the open unit."""
        self._open += value

    def end_unit(self) -> None:
        """Close the open unit."""
        self._close(self._open)
        self._open = np.zeros_like(self._open)

    def merge(self, later: Self) -> None:
        """Append the units of ``later``, which begins where this sum ends."""
        for unit in later._closed:
            self._close(unit)

    def _close(self, unit: NDArray[np.float64]) -> None:
        if self._folds and self._closed:
            self._closed[0] = self._closed[0] + unit
        else:
            self._closed.append(unit)

    def total(self) -> NDArray[np.float64]:
        """Return the sum over the closed units."""
        total = np.zeros_like(self._open)
        for unit in self._closed:
            total = total + unit
        return total
