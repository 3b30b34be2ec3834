"""Dead features reconstruct what the living ones leave over (Gao et al. 2024, "Scaling and evaluating SAEs", A.2)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from training.architectures.base import Trace
from training.auxiliary.term import Auxiliary, DeadFeatureTerm
from training.batches import Batch
from training.dead_features import FiringRecord
from training.kernels.kernel import ExtraLoss
from training.objectives import Objective


class AuxKLoss(DeadFeatureTerm):
    """``coefficient`` · Σ‖e − ê‖² / Σ‖e − ē‖² over the rows of a batch.

    e = target − output, without gradient, ē its mean over rows; ê is written by the k dead features with the largest
    pre-activations of each row. No ReLU comes before the choice: a feature that is negative on every row would get no
    gradient through it, and those are the ones that need one. A residual that is the same on all rows gives zero.
    """

    name = "auxk"

    def __init__(self, firing: FiringRecord, dead_after_steps: int, *, k: int | None, coefficient: float) -> None:
        super().__init__(firing, dead_after_steps)
        self._k, self._coefficient = k, coefficient

    def term(self, pre: Tensor, decoder: Tensor, residual: Tensor, batch: Batch, trace: Trace) -> Tensor:
        """Return the weighted, normalised squared error."""
        k = min(max(1, decoder.shape[1] // 2) if self._k is None else self._k, pre.shape[1])
        if k < pre.shape[1]:
            largest = pre.topk(k, dim=1, sorted=False)
            pre = pre.new_zeros(pre.shape).scatter(1, largest.indices, largest.values)
        # means over rows, so that slices of a batch that processes share add up to it
        error = (residual - pre @ decoder).square().sum() / len(batch.inputs)
        centre = trace.whole.mean(residual.mean(0))
        scale = trace.whole.mean((residual - centre).square().sum() / len(batch.inputs))
        return error * (self._coefficient / scale).nan_to_num(0, 0, 0)


class AuxK(Auxiliary):
    """The k most active dead features reconstruct the residual."""

    kind: Literal["auxk"] = "auxk"
    aux_k: PositiveInt | None = None
    """Dead features that reconstruct one row's residual; by default half of d_out, fewer if fewer are dead."""
    aux_coefficient: NonNegativeFloat = Field(default=1 / 32)
    """Weight of that reconstruction's share of unexplained variance in the loss."""

    def build(self, firing: FiringRecord, objective: Objective, *, dead_after_steps: int) -> ExtraLoss:  # noqa: ARG002
        """Return the loss, which reads the run's own ``firing``."""
        return AuxKLoss(firing, dead_after_steps, k=self.aux_k, coefficient=self.aux_coefficient)
