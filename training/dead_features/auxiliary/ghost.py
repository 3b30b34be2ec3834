"""Ghost gradients: dead features get a gradient as if they were exponential and not rectified.

Jermyn & Templeton 2024, "Ghost grads" (Anthropic's January update), as the original transcoder code has it, with the
residual that a transcoder needs.
"""

from __future__ import annotations

from torch import Tensor

from tailrace.training.architectures.base import Trace, Transcoder, exact
from tailrace.training.architectures.objectives import EPSILON, Objective
from tailrace.training.dead_features.auxiliary.settings import Ghost, Rescale
from tailrace.training.dead_features.auxiliary.term import DeadFeatureTerm, row_norms, write_in_blocks
from tailrace.training.dead_features.record import FiringRecord
from tailrace.training.rows.batches import Batch

_LARGEST_EXPONENT = 30.0
"""exp of a pre-activation above this could overflow float32 once squared; only the direction of a row's sum counts."""


class GhostLoss(DeadFeatureTerm):
    """Mean over elements of (g − r)² / ‖r‖, rescaled to the size of the reconstruction loss.

    g = Σ exp(pre) · decoder row over dead features, per row scaled to half of ‖r‖; r = target − output. Scales carry no
    gradient, so only dead features (and an input bias) get one. ``scalar`` multiplies the whole term by one number;
    ``elementwise``, the original code's way, gives each element its own, and so its gradient another weight.
    """

    name = "ghost"

    def __init__(self, firing: FiringRecord, dead_after_steps: int, objective: Objective, rescale: Rescale) -> None:
        super().__init__(firing, dead_after_steps)
        self._objective, self._rescale = objective, rescale

    def write(self, transcoder: Transcoder, dead: Tensor, inputs: Tensor) -> Tensor:
        """Return g before it is scaled."""
        return write_in_blocks(_write_exponentials, transcoder, dead, inputs)

    def term(self, written: Tensor, residual: Tensor, batch: Batch, trace: Trace) -> Tensor:
        """Return the rescaled term."""
        norms = row_norms(residual)
        ghosts = written * (norms / (EPSILON + 2 * row_norms(written.detach())))
        errors = (ghosts - residual).square() / norms.clamp_min(EPSILON)
        if self._rescale == "scalar":
            ghost = errors.mean()
            ghost, reconstruction = trace.reductions.mean(ghost), trace.reductions.mean(trace.terms["reconstruction"])
            return ghost * (reconstruction / (ghost + EPSILON)).detach()
        elements = self._objective.elements(exact(trace.outputs, batch.outputs), batch.outputs)
        return (errors * (elements / (errors + EPSILON)).detach()).mean()


def _write_exponentials(pre: Tensor, decoder: Tensor) -> Tensor:
    """Return exp(pre) @ decoder, a row of which is divided by a number of its own where it could overflow."""
    excess = pre.detach().amax(1, keepdim=True).sub(_LARGEST_EXPONENT).clamp_min(0)
    return (pre - excess).exp() @ decoder


def build(settings: Ghost, firing: FiringRecord, objective: Objective, dead_after_steps: int) -> GhostLoss:
    """Return the loss, which reads the run's own ``firing``."""
    return GhostLoss(firing, dead_after_steps, objective, settings.ghost_rescale)
