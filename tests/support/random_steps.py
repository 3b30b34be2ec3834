"""One step of every architecture: random transcoders and rows for it."""

from __future__ import annotations

import torch

from tailrace.training.architectures import Architecture, BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK
from tailrace.training.architectures.base import Transcoder
from tailrace.training.rows.batches import Batch

D_IN, D_OUT, D_SAE, ROWS = 24, 20, 300, 700

ARCHITECTURES: dict[str, Architecture] = {
    "relu": ReLU(l1=0.3),
    "relu-tanh-skip": ReLU(l1=0.3, tanh_scale=2.0, skip=True, input_bias=False),
    "topk": TopK(k=5),
    "topk-wide-skip": TopK(k=60, skip=True),
    "batch_topk": BatchTopK(k=5),
    "jumprelu": JumpReLU(l0=0.1, bandwidth=0.4),
    "jumprelu-target": JumpReLU(l0=0.1, target_l0=5.0, bandwidth=0.4, skip=True),
    "gated": Gated(l1=0.2, input_bias=True),
    "matryoshka": Matryoshka(k=5, levels=3),
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_transcoder(architecture: Architecture, d_sae: int = D_SAE) -> Transcoder:
    """Return a float64 module whose features are a mixture of frequent, rare and silent ones."""
    transcoder = architecture.build(D_IN, D_OUT, d_sae).double()
    with torch.no_grad():
        for index, parameter in enumerate(transcoder.parameters()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator(index)))
        transcoder.W_enc.mul_(3 * torch.rand(d_sae, 1, dtype=torch.float64, generator=generator(50)))
        transcoder.b_enc.sub_(1.5)
    transcoder.constrain_parameters()
    return transcoder


def random_batch(scale: float = 1.0) -> Batch:
    inputs = torch.randn(ROWS, D_IN, dtype=torch.float64, generator=generator(60)) * scale
    return Batch(inputs, torch.randn(ROWS, D_OUT, dtype=torch.float64, generator=generator(61)))


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    return Batch(batch.inputs.to(dtype), batch.outputs.to(dtype))
