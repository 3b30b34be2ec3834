"""How far a reconstruction is from its target, as one number; sparsity is the architecture's own term.

An objective also fixes the unit in which an architecture's sparsity term counts activations. Without it, an l1 that
suits one model would be far off on a model whose outputs are ten times larger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tailrace.training.choices import ObjectiveKind

EPSILON = 1e-6
"""Keeps the reference's loss finite on a row whose target is zero."""


class Objective(Protocol):
    """A reconstruction loss and the unit of the activations that goes with it."""

    @property
    def activation_unit(self) -> float:
        """Activations are divided by this before a sparsity term counts them."""
        ...

    def reconstruction(
        self, predicted: Float[Tensor, "rows d_out"], target: Float[Tensor, "rows d_out"]
    ) -> Float[Tensor, ""]:
        """Return the loss of ``predicted`` against ``target``."""
        ...

    def elements(
        self, predicted: Float[Tensor, "rows d_out"], target: Float[Tensor, "rows d_out"]
    ) -> Float[Tensor, "rows d_out"]:
        """Return numbers whose mean is ``reconstruction``."""
        ...


@dataclass(frozen=True)
class VarianceObjective:
    """Squared error of a row over the total variance V of the outputs, mean over rows: an estimate of FVU.

    Activations count in units of sqrt(V), so loss and l1 are pure numbers: 1 is what predicting the mean costs,
    whatever the model's width and scale.
    """

    total_variance: float
    """V: variance of the targets, summed over d_out, in the units the loss sees."""

    @property
    def activation_unit(self) -> float:
        """The root of V."""
        return math.sqrt(self.total_variance)

    def reconstruction(
        self, predicted: Float[Tensor, "rows d_out"], target: Float[Tensor, "rows d_out"]
    ) -> Float[Tensor, ""]:
        """Return mean over rows of ‖predicted − target‖² / V."""
        if predicted.device.type != "cpu":  # one kernel instead of four, and one backwards
            return F.mse_loss(predicted, target, reduction="sum") / (len(target) * self.total_variance)
        mean_error: Tensor = (predicted - target).pow(2).sum(-1).mean()
        return mean_error / self.total_variance

    def elements(
        self, predicted: Float[Tensor, "rows d_out"], target: Float[Tensor, "rows d_out"]
    ) -> Float[Tensor, "rows d_out"]:
        """Return each element's squared error, times d_out / V."""
        return (predicted - target).pow(2) * (target.shape[-1] / self.total_variance)


@dataclass(frozen=True)
class ReferenceObjective:
    """The loss of the original transcoder code: squared error over the row's own norm (not squared, not centred).

    Mean over rows and d_out. Its l1 times d_out is, for rows of typical norm, the l1 of ``VarianceObjective``.
    """

    activation_unit: float = 1.0

    def reconstruction(
        self, predicted: Float[Tensor, "rows d_out"], target: Float[Tensor, "rows d_out"]
    ) -> Float[Tensor, ""]:
        """Return mean over all elements of (predicted − target)² / ‖target‖."""
        return self.elements(predicted, target).mean()

    def elements(
        self, predicted: Float[Tensor, "rows d_out"], target: Float[Tensor, "rows d_out"]
    ) -> Float[Tensor, "rows d_out"]:
        """Return (predicted − target)² / ‖target‖ of every element."""
        norms = torch.linalg.vector_norm(target, dim=-1, keepdim=True).clamp_min(EPSILON)
        error: Tensor = (predicted - target).pow(2) / norms
        return error


def build_objective(kind: ObjectiveKind, total_variance: float) -> Objective:
    """Return the objective called ``kind``; ``total_variance`` is that of the targets it will see."""
    if kind == "variance":
        return VarianceObjective(total_variance)
    if kind == "reference":
        return ReferenceObjective()
    assert_never(kind)
