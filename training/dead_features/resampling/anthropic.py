"""Resampling by loss: rows that are reconstructed badly, or that the language model needs, become new features.

Bricken et al. 2023, "Towards monosemanticity", appendix on training, with rows of the cache in place of a pass of the
language model. ``model_loss`` is the original transcoder code's variant.
"""

from __future__ import annotations

import numpy as np

from tailrace.storage.errors import SettingsError
from tailrace.training.dead_features.resampling.resampler import PeriodicResampler, draw_distinct, squared_losses
from tailrace.training.dead_features.resampling.settings import (
    Anthropic,
    PeriodicResampling,
    ResampledRun,
    Resampler,
    RowScorer,
    Surroundings,
)
from tailrace.training.rows.batches import Batch
from tailrace.training.rows.row_source import SampledRows

_ROWS_BY_LOSS = 32_768
_ROWS_BY_MODEL_LOSS = 2048
"""Each is in another context, which the language model has to run twice."""


class _ByLoss(PeriodicResampler):
    """Different rows, with probability proportional to the square of their loss."""

    def weights(self, run: ResampledRun, rows: SampledRows, batch: Batch) -> np.ndarray:  # noqa: ARG002
        """Return the squared losses."""
        return squared_losses(run, batch)

    def choose(self, generator: np.random.Generator, weights: np.ndarray, n: int) -> np.ndarray:
        """Draw without replacement."""
        return draw_distinct(generator, weights, n)


class _ByModelLoss(_ByLoss):
    """Different rows, with probability proportional to the rise of the language model's loss there."""

    def __init__(
        self, settings: PeriodicResampling, surroundings: Surroundings, scorer: RowScorer, *, n_rows: int
    ) -> None:
        super().__init__(settings, surroundings, n_rows=n_rows)
        self._scorer = scorer

    def weights(self, run: ResampledRun, rows: SampledRows, batch: Batch) -> np.ndarray:  # noqa: ARG002
        """Return the scorer's rises; a loss that falls counts as none."""
        if rows.context is None or rows.position is None:
            raise SettingsError(
                "resample_by: model_loss needs to know the context and position of every row, and these rows have "
                "none; train from a cache, or use loss"
            )
        scores = self._scorer(run.transcoder.folded(run.normalisation), rows.context, rows.position)
        assert scores.shape == rows.context.shape, "a scorer gives one number per row"
        # not np.maximum alone on what is not finite: the caller refuses NaN
        return np.asarray(np.maximum(scores, 0), np.float64)


def build(settings: Anthropic, surroundings: Surroundings) -> Resampler:
    """Return what resamples; raise SettingsError if the run has no source, or no scorer, of rows."""
    if settings.resample_by == "loss":
        return _ByLoss(settings, surroundings, n_rows=settings.resample_rows or _ROWS_BY_LOSS)
    if surroundings.row_scorer is None:
        raise SettingsError(
            "resample_by: model_loss needs the language model, and this run has none; use resample_by: loss, or "
            "give a row_scorer in Python"
        )
    n_rows = settings.resample_rows or _ROWS_BY_MODEL_LOSS
    return _ByModelLoss(settings, surroundings, surroundings.row_scorer, n_rows=n_rows)
