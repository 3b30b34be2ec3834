"""What attention heads carry to a feature: the norms of heads, and the directions of the stream that they read.

Head h of layer l adds, at its destination, W_O[h]ᵀ W_V[h]ᵀ norm(x) for the stream x at its source. So a direction v
that is read later reads W_V[h] (W_O[h] v) behind the source's norm, and that carried before the norm (its gain, its
centring, not its division) in the stream itself. The matrices OV[l, h] of a whole model would be 340 MB for GPT-2 and
are never made.

Of ‖A z‖ with A (d_model, d_head) only A's factor R of A = QR is needed, since Q keeps lengths: ‖A z‖ = ‖R z‖. R is
d_head × d_head, which makes norms of all heads cheaper by d_model / d_head, and loses no digits as AᵀA would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from tailrace.analysis.weights.extremes import Ends, blocks, largest
from tailrace.analysis.weights.model_weights import AttentionWeights, LayerWeights, ModelWeights
from tailrace.analysis.weights.stream import carry_back


@dataclass(frozen=True)
class HeadReader:
    """The heads of some layers, ready for norms and directions of many features."""

    layers: Sequence[int]
    weights: ModelWeights
    factors: Sequence[Tensor]
    """Per layer, (n_kv_heads, ≤ d_head, d_head): R of the value matrices carried before the norm."""

    @classmethod
    def prepare(cls, layers: Sequence[int], weights: ModelWeights) -> Self:
        """Factor the value matrices of ``layers``."""
        return cls(layers, weights, [_value_factors(weights.layers[layer]) for layer in layers])

    @property
    def n_heads(self) -> int:
        """Heads of all layers together."""
        return sum(self.weights.layers[layer].attention.n_heads for layer in self.layers)

    def names(self) -> np.ndarray:
        """Return (n_heads, 2) the layer and the head in it of every column of ``norms``."""
        return np.array(
            [(layer, head) for layer in self.layers for head in range(self.weights.layers[layer].attention.n_heads)],
            np.int32,
        ).reshape(-1, 2)

    def norms(self, vectors: Tensor) -> Tensor:
        """Return (n, n_heads) ‖OV[l, h] v‖ of directions v (n, d_model) in the stream."""
        columns = [
            _norms(self.weights.layers[layer], factor, vectors)
            for layer, factor in zip(self.layers, self.factors, strict=True)
        ]
        return torch.cat(columns, dim=1) if columns else vectors.new_zeros(len(vectors), 0)

    def strongest(self, vectors: Tensor, n: int) -> Ends:
        """Return the ``n`` heads of largest norm for each of ``vectors`` (rows, d_model): columns of ``norms``."""
        attentions = [self.weights.layers[layer].attention for layer in self.layers]
        mixed = max((attention.n_heads * attention.W_O.shape[1] for attention in attentions), default=1)
        return Ends.joined([largest(self.norms(vectors[block]), n) for block in blocks(len(vectors), mixed)])

    def sources(self, vectors: Tensor, columns: np.ndarray) -> Tensor:
        """Return (n, d_model) each direction seen through its own head, ``columns`` (n,) counting as ``norms`` does."""
        names = self.names()
        result = torch.empty_like(vectors)
        for column in np.unique(columns):
            layer, head = (int(number) for number in names[column])
            own = torch.from_numpy(np.flatnonzero(columns == column)).to(vectors.device)
            result[own] = through_head(self.weights.layers[layer], head, vectors[own])
        return result


def through_head(layer: LayerWeights, head: int, vectors: Tensor) -> Tensor:
    """Return (n, d_model) OV[l, h] v for directions v (n, d_model): what the stream at the source must hold."""
    attention = layer.attention
    W_O = attention.W_O[head].to(vectors.dtype)
    W_V = attention.W_V[attention.kv_head(head)].to(vectors.dtype)
    mixed = carry_back(layer.norm_attention_out, vectors) @ W_O.T
    return carry_back(layer.norm_attention, mixed @ W_V.T)


def _value_factors(layer: LayerWeights) -> Tensor:
    values = layer.attention.W_V.double()
    carried = carry_back(layer.norm_attention, rearrange(values, "head d_model d_head -> head d_head d_model"))
    factors: Tensor = torch.linalg.qr(rearrange(carried, "head d_head d_model -> head d_model d_head"), mode="r").R
    return factors.float()


def _norms(layer: LayerWeights, factors: Tensor, vectors: Tensor) -> Tensor:
    attention: AttentionWeights = layer.attention
    mixed = attention.pull_back_output(carry_back(layer.norm_attention_out, vectors))
    per_value_head = rearrange(
        mixed, "n (kv_head query) d_head -> n kv_head query d_head", kv_head=attention.n_kv_heads
    )
    carried = torch.einsum("gre,ngqe->ngqr", factors.to(vectors.dtype), per_value_head)
    norms: Tensor = torch.linalg.vector_norm(carried, dim=-1)
    return rearrange(norms, "n kv_head query -> n (kv_head query)")
