"""Dead features reconstruct what the living ones leave over (Gao et al. 2024, "Scaling and evaluating SAEs", A.2)."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tailrace.training.architectures.base import Trace, Transcoder
from tailrace.training.architectures.objectives import Objective
from tailrace.training.dead_features.auxiliary.settings import AuxK
from tailrace.training.dead_features.auxiliary.term import DeadFeatureTerm, DeadWeights, write_in_blocks
from tailrace.training.dead_features.record import FiringRecord
from tailrace.training.kernels.pairs import Pairs, SparseEntries
from tailrace.training.rows.batches import Batch

PAIRS_ABOVE = 3
"""On a CPU, with more than so many times k dead features, products at the chosen pairs alone beat matrix products over
all: at 4096 rows, width 768 and k = 384 by 1.1 with 3 times, 1.7 with 8 times, 2.9 with 51 times."""


class AuxKLoss(DeadFeatureTerm):
    """``coefficient`` · Σ‖e − ê‖² / Σ‖e − ē‖² over the rows of a batch.

    e = target − output, without gradient, ē its mean over rows; ê is written by the k dead features with the largest
    pre-activations of each row, k of every layer where there are several. No ReLU comes before the choice: a feature
    that is negative on every row would get no gradient through it, and those are the ones that need one. A residual
    that is the same on all rows gives zero.
    """

    name = "auxk"

    def __init__(self, firing: FiringRecord, dead_after_steps: int, *, k: int | None, coefficient: float) -> None:
        super().__init__(firing, dead_after_steps)
        self._k, self._coefficient = k, coefficient

    def write(self, transcoder: Transcoder, dead: Tensor, inputs: Tensor) -> Tensor:
        """Return ê."""
        blocks = transcoder.blocks()
        k = min(max(1, transcoder.d_out // len(blocks) // 2) if self._k is None else self._k, len(dead))
        if inputs.device.type == "cpu" and len(dead) > PAIRS_ABOVE * k and len(blocks) == 1:
            return _write_at_pairs(transcoder, dead, inputs.contiguous(), k)
        return write_in_blocks(partial(_write_largest, k=k), transcoder, dead, inputs)

    def term(self, written: Tensor, residual: Tensor, batch: Batch, trace: Trace) -> Tensor:
        """Return the weighted, normalised squared error."""
        # means over rows, so that slices of a batch that processes share add up to it
        error = (residual - written).square().sum() / len(batch.inputs)
        centre = trace.reductions.mean(residual.mean(0))
        scale = trace.reductions.mean((residual - centre).square().sum() / len(batch.inputs))
        return error * (self._coefficient / scale).nan_to_num(0, 0, 0)


def _write_largest(pre: Tensor, decoder: Tensor, *, k: int) -> Tensor:
    """Return what the k largest pre-activations of each row write."""
    if k < pre.shape[1]:
        largest = pre.topk(k, dim=1, sorted=False)
        pre = pre.new_zeros(pre.shape).scatter(1, largest.indices, largest.values)
    return pre @ decoder


def _write_at_pairs(transcoder: Transcoder, dead: Tensor, inputs: Tensor, k: int) -> Tensor:
    """Return the same on a CPU, where only the choice takes a matrix product over all dead features, block by block."""
    features, values = [], []
    with torch.no_grad():
        read = DeadWeights.of(transcoder, dead)
        for block in read.blocks(inputs):
            largest = F.linear(block, *read).topk(k, dim=1, sorted=False)
            ascending, order = largest.indices.sort(dim=1)
            features.append(dead[ascending].flatten())
            values.append(largest.values.gather(1, order).flatten())
    offsets = np.arange(len(inputs) + 1) * k
    pairs = Pairs(np.arange(len(inputs)).repeat(k), torch.cat(features).numpy(), offsets, transcoder.d_sae)
    for weights in (transcoder.W_enc, transcoder.W_dec):
        if weights.grad is None:  # pairs add to gradients, which the dense step leaves to autograd
            weights.grad = torch.zeros_like(weights)
    entries = SparseEntries(pairs, torch.cat(values), transcoder, inputs)
    return entries.decode(entries.pre, transcoder.W_dec)


def build(settings: AuxK, firing: FiringRecord, objective: Objective, dead_after_steps: int) -> AuxKLoss:  # noqa: ARG001
    """Return the loss, which reads the run's own ``firing``."""
    return AuxKLoss(firing, dead_after_steps, k=settings.aux_k, coefficient=settings.aux_coefficient)
