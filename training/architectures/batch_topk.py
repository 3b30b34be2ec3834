"""The k · rows largest pre-activations of a batch survive: rows take as many features as they need, k on average.

A batch is a matter of training. In use a threshold stands in for it: the running mean of the smallest activation that
survived in training (Bussmann et al. 2024, "BatchTopK sparse autoencoders", section 3).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.entries import Above, Entries, LargestOfBatch
from tailrace.training.architectures.settings import BatchTopK, SelectsLargest
from tailrace.training.rows.batch_reductions import ALONE, BatchReductions

THRESHOLD_RATE = 0.1
"""Share of the newest batch in the running mean of the threshold.

A batch's smallest survivor is an extreme quantile of rows · d_sae values and hardly varies, while activations grow as
training goes on: at 0.01 the mean lags behind (after 150 steps 44 features in use for k = 32; at 0.1, 31)."""


class BatchTopKTranscoder(Transcoder):
    """``BatchTopK(max(0, W_enc x + b_enc))`` in training; in use, activations above ``threshold``."""

    threshold: Tensor
    """Scalar, float32; 0 until the first step."""

    def __init__(self, d_in: int, d_out: int, d_sae: int, *, settings: SelectsLargest) -> None:
        super().__init__(d_in, d_out, d_sae, input_bias=settings.input_bias, skip=settings.skip)
        self._settings = settings
        self.k = settings.k
        self.register_buffer("threshold", torch.zeros(()))

    def begin_step(self, step: int) -> None:
        """Take k towards its final value."""
        self.k = self._settings.k_in(step)

    def activate(self, pre_activations: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_sae"]:
        """Return the pre-activations above the threshold, zero elsewhere."""
        return pre_activations.relu() * (pre_activations > self.threshold)

    def selection_in_use(self) -> Above:
        """Return what exceeds the threshold."""
        return Above(self.threshold.expand(self.d_sae))

    def selection(self) -> LargestOfBatch:
        """Return the k · rows largest of the batch."""
        return LargestOfBatch(self.k)

    def activation(self, entries: Entries) -> Float[Tensor, "*pairs"]:
        """Return the positive part of what was selected."""
        return entries.pre.relu()

    @torch.no_grad()
    def end_step(self, activations: Tensor, reductions: BatchReductions = ALONE) -> None:
        """Move the threshold towards the smallest activation of the batch; no synchronisation with the host."""
        infinity = activations.new_full((), torch.inf)
        firing = torch.where(activations > 0, activations, infinity)
        smallest = reductions.least((firing.amin() if len(firing) else infinity).to(self.threshold.dtype))
        moved = torch.lerp(self.threshold, smallest, THRESHOLD_RATE)
        fresh = torch.where(self.threshold > 0, moved, smallest)
        self.threshold.copy_(torch.where(torch.isfinite(smallest), fresh, self.threshold))

    def scale_activations(self, factor: float) -> None:
        """Scale the threshold with the activations."""
        self.threshold.mul_(factor)


def build(settings: BatchTopK, d_in: int, d_out: int, d_sae: int) -> BatchTopKTranscoder:
    """Return the module with all weights zero."""
    return BatchTopKTranscoder(d_in, d_out, d_sae, settings=settings)
