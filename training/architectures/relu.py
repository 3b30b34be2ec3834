"""ReLU features held sparse by an l1 penalty: the architecture of the original transcoders."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from training.architectures.base import Architecture, Transcoder


class ReLUTranscoder(Transcoder):
    """``max(0, W_enc (x − b_dec) + b_enc)``; loss term ``sparsity``: l1 · mean over rows of the sum of activations."""

    def __init__(self, d_in: int, d_out: int, d_sae: int, *, l1: float, input_bias: bool) -> None:
        super().__init__(d_in, d_out, d_sae, input_bias=input_bias)
        self.l1 = l1

    def activate(self, pre_activations: Tensor) -> Tensor:
        """Return the positive part."""
        return pre_activations.relu()

    def penalties(self, activations: Tensor, activation_unit: float) -> dict[str, Tensor]:
        """Return the l1 term. Summed over features only, so it does not depend on how many rows there are."""
        exact = activations.float() if activations.dtype == torch.bfloat16 else activations
        return {"sparsity": exact.sum(-1).mean() * (self.l1 / activation_unit)}


class ReLU(Architecture):
    """ReLU with an l1 penalty."""

    kind: Literal["relu"] = "relu"
    l1: float = Field(default=0.05, ge=0)
    """Weight of the summed activations in the loss; higher gives fewer active features."""
    input_bias: bool = True
    """Subtract a learnt bias from the inputs (it is folded into the encoder when the transcoder is saved)."""

    def build(self, d_in: int, d_out: int, d_sae: int) -> ReLUTranscoder:
        """Return the module with all weights zero."""
        return ReLUTranscoder(d_in, d_out, d_sae, l1=self.l1, input_bias=self.input_bias)
