"""A language model's matrices as plain tensors, for weight-space analysis and circuits without the model.

Vectors are rows. ``x`` (…, d_model) is a vector of the residual stream, ``v`` (…, d_model) a direction in it whose
product with the stream is the quantity of interest. What a part of the model does to ``x``, its transpose does to
``v``: ``pull_back`` methods return the direction that reads *before* a part what ``v`` reads after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

NormKind = Literal["layer", "rms", "none"]


@dataclass(frozen=True)
class Norm:
    """A norm of the residual stream: normalised · weight + bias."""

    kind: NormKind
    """layer: centred, divided by the standard deviation; rms: divided by the root mean square; none: the identity."""
    weight: Tensor | None = None
    """(d_model,) gain; None for ones."""
    bias: Tensor | None = None
    """(d_model,); None for zeros."""
    eps: float = 0.0
    """Added to the mean square before the root is taken."""

    def pull_back_gain(self, v: Tensor) -> Tensor:
        """Return (…, d_model) the direction in the *normalised* stream that reads ``v`` after the gain."""
        return v if self.weight is None else v * self.weight.to(v.dtype)

    def pull_back(self, v: Tensor, scale: Tensor) -> Tensor:
        """Return (…, d_model) the direction in the stream that reads ``v`` after the norm, its scale held fixed.

        ``scale`` (…, 1) is what the norm divided by, as TransformerLens's ``hook_scale`` gives it. A layer norm also
        takes the mean off, whose transpose takes the mean off ``v``.
        """
        v = self.pull_back_gain(v)
        if self.kind == "none":
            return v
        if self.kind == "layer":
            v = v - v.mean(dim=-1, keepdim=True)
        return v / scale.to(v.dtype)


IDENTITY = Norm("none")


@dataclass(frozen=True)
class AttentionWeights:
    """The value and output matrices of a layer's heads. Query heads may share value heads (grouped queries)."""

    W_V: Tensor
    """(n_kv_heads, d_model, d_head)."""
    W_O: Tensor
    """(n_heads, d_head, d_model)."""
    b_V: Tensor | None = None
    """(n_kv_heads, d_head); None for zeros."""
    b_O: Tensor | None = None
    """(d_model,); None for zeros."""

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return int(self.W_O.shape[0])

    @property
    def n_kv_heads(self) -> int:
        """Number of value heads."""
        return int(self.W_V.shape[0])

    def kv_head(self, head: int) -> int:
        """Return the value head that query head ``head`` reads: consecutive query heads share one."""
        return head // (self.n_heads // self.n_kv_heads)

    def pull_back_output(self, v: Tensor) -> Tensor:
        """Return (…, n_heads, d_head) W_O[h] v: the direction in each head's mixed values that reads ``v``."""
        return torch.einsum("hed,...d->...he", self.W_O.to(v.dtype), v)

    def pull_back_value(self, z: Tensor) -> Tensor:
        """Return (…, n_heads, d_model) W_V[h] z_h for ``z`` (…, n_heads, d_head): the direction at the source."""
        grouped = rearrange(z, "... (kv_head query) d_head -> ... kv_head query d_head", kv_head=self.n_kv_heads)
        read = torch.einsum("gde,...gqe->...gqd", self.W_V.to(z.dtype), grouped)
        return rearrange(read, "... kv_head query d_model -> ... (kv_head query) d_model")

    def pull_back(self, v: Tensor) -> Tensor:
        """Return (…, n_heads, d_model) W_V[h] (W_O[h] v): the direction that each head reads at its source."""
        return self.pull_back_value(self.pull_back_output(v))


@dataclass(frozen=True)
class LayerWeights:
    """One block. Norms that a family does not have are the identity."""

    attention: AttentionWeights
    norm_attention: Norm
    """Between the stream and attention."""
    norm_mlp: Norm
    """Between the stream and the MLP."""
    norm_attention_out: Norm = IDENTITY
    """Between attention's output and the stream (Gemma 2, OLMo 2)."""
    norm_mlp_out: Norm = IDENTITY
    """Between the MLP's output and the stream (Gemma 2, OLMo 2)."""


@dataclass(frozen=True)
class ModelWeights:
    """The linear parts of a decoder-only language model, in the model's own dtype and on its device."""

    W_E: Tensor
    """(d_vocab, d_model) what a token adds to the stream before layer 0, any scaling by the model included."""
    W_U: Tensor
    """(d_model, d_vocab)."""
    final_norm: Norm
    layers: tuple[LayerWeights, ...]
    W_pos: Tensor | None = None
    """(n_ctx, d_model) learned positions that are added to the stream; None where positions act inside attention."""
    b_U: Tensor | None = None
    """(d_vocab,); None for zeros."""
    is_parallel: bool = False
    """Whether a block's MLP reads the stream from before its attention (Pythia)."""
    logit_cap: float | None = None
    """Logits are cap·tanh(logits / cap) (Gemma 2); None for no cap."""

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    @property
    def d_model(self) -> int:
        """Width of the stream."""
        return int(self.W_E.shape[1])

    @property
    def d_vocab(self) -> int:
        """Number of tokens."""
        return int(self.W_E.shape[0])
