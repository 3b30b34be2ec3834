"""The numbers of one training step: our own short names, and every name of the original transcoder code.

The batch is the one the step learnt from, seen with the weights before the step. Quality is measured against the
targets (the MLP's outputs), about their mean: shares of the variance of the batch. The same in normalised and in raw
units, because normalisation multiplies all outputs by one number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tailrace.training.dead_features.record import FiringRecord
from tailrace.training.kernels.kernel import PerRow, StepResult
from tailrace.training.loop.evaluate import l0_quantiles
from tailrace.training.loop.firing_frequency import FiringWindow

RARE = {"sparsity/below_1e-5": 1e-5, "sparsity/below_1e-6": 1e-6}
"""Frequencies below which features are counted, by the metric's name."""


class Quality(NamedTuple):
    """How well the outputs of a batch were predicted; None where the targets do not vary."""

    fvu: float | None
    """Σ‖y − ŷ‖² / Σ‖y − ȳ‖², ȳ the mean of the batch."""
    explained_variance: float | None
    """Mean over rows of 1 − ‖y − ŷ‖² / ‖y − ȳ‖²."""
    explained_variance_std: float | None
    """Sample standard deviation of the same; None for fewer than two rows."""


@torch.no_grad()
def quality(outputs: Tensor, targets: Tensor) -> Quality:
    """Compare ``outputs`` with ``targets``, both (rows, d_out). Row sums are added in float64 on the host.

    A row that equals the mean has no variance to explain and is left out of the mean over rows.
    """
    error = (targets - outputs).square().sum(1).cpu().double()
    spread = (targets - targets.mean(0)).square().sum(1).cpu().double()
    total = float(spread.sum())
    varies = spread > 0
    explained = 1 - error[varies] / spread[varies]
    return Quality(
        float(error.sum()) / total if total > 0 else None,
        float(explained.mean()) if len(explained) else None,
        float(explained.std()) if len(explained) > 1 else None,
    )


def native_metrics(
    result: StepResult, firing: FiringRecord, *, lr: float, dead_after_steps: int, extras: Mapping[str, float]
) -> dict[str, float | None]:
    """Return the loss terms, L0 and its quantiles, FVU of the batch, the share of dead features, the learning rate."""
    rows = _rows(result)
    return {
        **{name: float(value) for name, value in result.losses.items()},
        "fvu": quality(rows.outputs, rows.targets).fvu,
        "l0": int(result.n_active.sum()) / result.n_rows,
        **l0_quantiles(rows.l0),
        "dead_fraction": float(firing.dead(dead_after_steps).double().mean()),
        "lr": lr,
        **extras,
    }


def reference_metrics(
    result: StepResult,
    firing: FiringRecord,
    window: FiringWindow,
    *,
    lr: float,
    n_rows_done: int,
    n_resampled: int,
    dead_after_steps: int,
    dead_feature_threshold: float,
) -> dict[str, float | None]:
    """Return the metrics of the original transcoder code by its names; docs/guides/metrics.md has units and windows."""
    rows = _rows(result)
    scores = quality(rows.outputs, rows.targets)
    frequency = window.frequency()
    since_fired = firing.steps_since_fired
    return {
        "losses/mse_loss": float(result.losses["reconstruction"]),
        "losses/l1_loss": float(rows.l1.double().mean()),
        "losses/ghost_grad_loss": float(result.losses.get("ghost", 0.0)),
        "losses/overall_loss": float(result.losses["loss"]),
        "metrics/explained_variance": scores.explained_variance,
        "metrics/explained_variance_std": scores.explained_variance_std,
        "metrics/l0": float(rows.l0.double().mean()),
        "metrics/n_resampled_neurons": n_resampled,
        "sparsity/mean_passes_since_fired": float(since_fired.double().mean()),
        "sparsity/n_passes_since_fired_over_threshold": int(firing.dead(dead_after_steps).sum()),
        **{name: float((frequency < below).double().mean()) for name, below in RARE.items()},
        "sparsity/dead_features": float((frequency < dead_feature_threshold).double().mean()),
        "details/n_training_tokens": n_rows_done,
        "details/current_learning_rate": lr,
    }


def _rows(result: StepResult) -> PerRow:
    assert result.per_row is not None, "the step was not asked for its rows"
    return result.per_row
