"""ReLU features held sparse by an l1 or tanh penalty: the architecture of the original transcoders."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.entries import Entries
from tailrace.training.architectures.schedule import warmed_up
from tailrace.training.architectures.settings import ReLU


class ReLUTranscoder(Transcoder):
    """``max(0, W_enc (x − b_dec) + b_enc)``; loss term ``sparsity``: l1 · mean over rows of the summed penalty.

    The penalty of an activation a, in units of ``activation_unit``, is a itself, or tanh(s·a)/s, which stops growing
    for activations far above 1/s (Anthropic, "Circuits Updates", tanh penalty).
    """

    def __init__(self, d_in: int, d_out: int, d_sae: int, *, settings: ReLU) -> None:
        own_bias = settings.input_bias and not settings.tied_bias
        super().__init__(d_in, d_out, d_sae, input_bias=own_bias, skip=settings.skip)
        self.tied_bias = settings.tied_bias
        self._settings = settings
        self.l1 = settings.l1

    def begin_step(self, step: int) -> None:
        """Raise l1 linearly from zero over its warm-up."""
        self.l1 = self._settings.l1 * warmed_up(step, self._settings.l1_warmup_steps)

    def activate(self, pre_activations: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_sae"]:
        """Return the positive part."""
        return pre_activations.relu()

    def activation(self, entries: Entries) -> Float[Tensor, "*pairs"]:
        """Return the positive part."""
        return entries.pre.relu()

    def penalties(self, entries: Entries, activations: Float[Tensor, "*pairs"]) -> dict[str, Float[Tensor, ""]]:
        """Return the sparsity term. Summed over features only, so it does not depend on how many rows there are."""
        penalty = entries.reductions.over_features(total(self._penalty(activations)))
        return {"sparsity": penalty * (self.l1 / entries.n_rows)}

    def _penalty(self, activations: Tensor) -> Tensor:
        exact = activations.float() if activations.dtype == torch.bfloat16 else activations
        in_units = exact / self.activation_unit
        steepness = self._settings.tanh_scale
        return in_units if steepness is None else torch.tanh(in_units * steepness) / steepness


def total(values: Tensor) -> Tensor:
    """Return the sum of all values; row by row first where there are rows, which rounds less."""
    return values.sum(-1).sum() if values.ndim > 1 else values.sum()


def build(settings: ReLU, d_in: int, d_out: int, d_sae: int) -> ReLUTranscoder:
    """Return the module with all weights zero."""
    return ReLUTranscoder(d_in, d_out, d_sae, settings=settings)
