"""Resampling by squared error, with replacement: what the original transcoder code meant by ``l2`` and never ran."""

from __future__ import annotations

import numpy as np

from tailrace.training.dead_features.resampling.resampler import PeriodicResampler, draw_repeated, squared_losses
from tailrace.training.dead_features.resampling.settings import (
    L2,
    ResampledRun,
    Resampler,
    Surroundings,
)
from tailrace.training.rows.batches import Batch
from tailrace.training.rows.row_source import SampledRows

_SMALLEST_LOSS = 1e-6
"""Squared error of the worst row below which nothing is left for a new feature to learn."""


class _ByError(PeriodicResampler):
    """Rows with probability proportional to the square of their squared error; one row may give several features."""

    def weights(self, run: ResampledRun, rows: SampledRows, batch: Batch) -> np.ndarray:  # noqa: ARG002
        """Return the squared losses."""
        return squared_losses(run, batch)

    def choose(self, generator: np.random.Generator, weights: np.ndarray, n: int) -> np.ndarray:
        """Draw with replacement; nothing if every row is reconstructed already."""
        if weights.max(initial=0.0) < _SMALLEST_LOSS**2:
            return np.zeros(0, np.int64)
        return draw_repeated(generator, weights, n)


def build(settings: L2, surroundings: Surroundings) -> Resampler:
    """Return what resamples; raise SettingsError if the run has no source of rows."""
    return _ByError(settings, surroundings, n_rows=settings.resample_rows)
