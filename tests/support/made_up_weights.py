"""A language model's weights out of thin air, and its linear parts computed forwards, without any code of ours.

Norm gains are random, heads share values, and norms stand behind attention and MLP too: whatever a family may have is
there, so that leaving a part out changes every number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailrace.analysis.weights.model_weights import AttentionWeights, LayerWeights, ModelWeights, Norm, NormKind

D_MODEL = 6
D_HEAD = 3
N_HEADS = 4
N_KV_HEADS = 2
D_VOCAB = 31


def made_up_weights(kind: NormKind = "layer", n_layers: int = 3, *, parallel: bool = False) -> ModelWeights:
    draw = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    def norm() -> Norm:
        return Norm(kind, 1 + 0.5 * random(D_MODEL), random(D_MODEL), 1e-5)

    def layer() -> LayerWeights:
        attention = AttentionWeights(random(N_KV_HEADS, D_MODEL, D_HEAD), random(N_HEADS, D_HEAD, D_MODEL))
        return LayerWeights(attention, norm(), norm(), norm(), norm())

    return ModelWeights(
        random(D_VOCAB, D_MODEL),
        random(D_MODEL, D_VOCAB),
        norm(),
        tuple(layer() for _ in range(n_layers)),
        is_parallel=parallel,
    )


def normalised(norm: Norm, x: Tensor) -> Tensor:
    """What a norm makes of something added to the stream where it divides by one."""
    assert norm.weight is not None
    return norm.weight.to(x.dtype) * (x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x)


def through_head(layer: LayerWeights, head: int, x: Tensor) -> Tensor:
    """What one head adds at its destination for the stream ``x`` at its source."""
    value = normalised(layer.norm_attention, x) @ layer.attention.W_V[head // (N_HEADS // N_KV_HEADS)].to(x.dtype)
    return normalised(layer.norm_attention_out, value @ layer.attention.W_O[head].to(x.dtype))


def gradient(function, width: int = D_MODEL) -> Tensor:
    """The direction that a linear function of the stream reads, in float64."""
    at = torch.zeros(width, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(function(at), at)[0]
