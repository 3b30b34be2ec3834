"""How often each feature fires: counts over windows of steps, and their distribution on a log scale.

A frequency is a count of rows over a number of rows. The counts of a window are kept when the next begins, so a number
that is read just after the change of windows still stands on a whole window of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LOWEST = 1e-10
"""Added to a frequency before its logarithm is taken, so that a feature which never fired has -10."""
LOWEST_LOG10, HIGHEST_LOG10, N_BINS = -10.0, 0.0, 40
"""Bins of the log10 histogram: equally wide, the same for every run, so that histograms can be compared and added."""
EDGES: tuple[float, ...] = tuple(
    LOWEST_LOG10 + (HIGHEST_LOG10 - LOWEST_LOG10) * index / N_BINS for index in range(N_BINS + 1)
)
"""The bins' edges; a bin is [low, high), the last one holds its upper edge too."""
LOG_SPARSITY = "log_feature_sparsity"
"""The tensor's name in a saved file."""


def log10_frequency(n_active: Tensor, n_rows: int) -> Tensor:
    """Return log10(n_active / n_rows + 1e-10), float64 (d_sae,), on the CPU."""
    return (n_active.cpu().double() / n_rows + LOWEST).log10()


def histogram(log10: Tensor) -> dict[str, Any]:
    """Return the counts of ``log10`` in the fixed bins as JSON, with the range that the bins divide equally."""
    inside = log10.clamp(LOWEST_LOG10, HIGHEST_LOG10)
    counts = torch.histc(inside, N_BINS, LOWEST_LOG10, HIGHEST_LOG10).to(torch.int64)
    return {"low": LOWEST_LOG10, "high": HIGHEST_LOG10, "counts": counts.tolist()}


class FiringWindow:
    """Counts firings over windows of ``n_steps`` steps; remembers the last window that was completed."""

    def __init__(self, d_sae: int, n_steps: int, device: torch.device | str = "cpu") -> None:
        self._n_steps = n_steps
        self._current = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self._completed = torch.zeros_like(self._current)
        self._steps = 0
        self._rows = 0
        self._completed_rows = 0

    def update(self, n_active: Tensor, n_rows: int) -> bool:
        """Count one step in which feature f fired on ``n_active[f]`` of ``n_rows`` rows; return whether a window ends.

        No synchronisation with the host.
        """
        self._current += n_active
        self._steps += 1
        self._rows += n_rows
        if self._steps < self._n_steps:
            return False
        self._completed.copy_(self._current)
        self._completed_rows = self._rows
        self._current.zero_()
        self._steps = self._rows = 0
        return True

    @property
    def n_rows(self) -> int:
        """Rows that ``frequency`` stands on."""
        return self._completed_rows or self._rows

    @property
    def n_active(self) -> Tensor:
        """int64 (d_sae,): firings in the last completed window; before there is one, in all steps so far."""
        return self._completed if self._completed_rows else self._current

    def frequency(self) -> Tensor:
        """Return the share of rows on which each feature fired, float64 (d_sae,), on the CPU; there must be a row."""
        return self.n_active.cpu().double() / self.n_rows

    def log10(self) -> Tensor:
        """Return log10(frequency + 1e-10), float64 (d_sae,), on the CPU; there must be a row."""
        return log10_frequency(self.n_active, self.n_rows)

    def record(self) -> dict[str, Any]:
        """Return mean and histogram of the log frequencies as JSON, under the names of the original transcoder code."""
        log10 = self.log10()
        return {
            "window_rows": self.n_rows,
            "metrics/mean_log10_feature_sparsity": float(log10.mean()),
            "plots/feature_density_line_chart": histogram(log10),
        }

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the counts by name."""
        numbers = torch.tensor([self._steps, self._rows, self._completed_rows])
        return {
            "window.current": self._current,
            "window.completed": self._completed,
            "window.numbers": numbers,
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from ``state_tensors``."""
        self._current.copy_(tensors["window.current"])
        self._completed.copy_(tensors["window.completed"])
        self._steps, self._rows, self._completed_rows = tensors["window.numbers"].tolist()
