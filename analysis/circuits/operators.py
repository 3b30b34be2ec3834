"""The linear maps that a forward pass becomes once attention patterns and norm scales are held fixed.

Each has two forms: ``push`` maps a change of what a part reads to the change of what it writes, ``pull`` is its
transpose and maps a direction in what the part writes to the direction in what it reads, so that
⟨push x, v⟩ = ⟨x, pull v⟩. Constants (biases) belong to neither. Attention mixes tokens, so its maps act on full
sequences; nothing is ever as large as heads × tokens² × d.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from tailrace.analysis.weights.model_weights import AttentionWeights, Norm


def norm_scale(norm: Norm, x: Tensor) -> Tensor:
    """Return (…, 1) what ``norm`` divides ``x`` (…, d_model) by; summed in float64."""
    exact = x.double()
    if norm.kind == "none":
        return torch.ones_like(x[..., :1])
    if norm.kind == "layer":
        exact = exact - exact.mean(dim=-1, keepdim=True)
    return (exact.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt().to(x.dtype)


def apply_norm(norm: Norm, x: Tensor, scale: Tensor) -> Tensor:
    """Return norm(x) (…, d_model) with its scale (…, 1) given: the linear part and the bias."""
    out = push_norm(norm, x, scale)
    return out if norm.bias is None else out + norm.bias


def push_norm(norm: Norm, x: Tensor, scale: Tensor) -> Tensor:
    """Return what a change ``x`` (…, d_model) becomes: centred for a layer norm, over the scale, times the gain."""
    if norm.kind == "none":
        return x
    if norm.kind == "layer":
        x = x - x.mean(dim=-1, keepdim=True)
    x = x / scale
    return x if norm.weight is None else x * norm.weight


def pull_norm(norm: Norm, v: Tensor, scale: Tensor) -> Tensor:
    """Return the transpose of ``push_norm``: gain, centring, scale."""
    return norm.pull_back(v, scale)


def push_attention(attention: AttentionWeights, pattern: Tensor, n: Tensor) -> Tensor:
    """Return Σ_h A_h (n W_V[h]) W_O[h] for ``n`` (…, T, d_model) and patterns A (n_heads, T_target, T_source)."""
    values = torch.einsum("...sd,gde->...sge", n, attention.W_V)
    return write_heads(attention, mix(attention, pattern, values))


def pull_attention(attention: AttentionWeights, pattern: Tensor, v: Tensor) -> Tensor:
    """Return the transpose of ``push_attention`` for ``v`` (…, T, d_model)."""
    mixed = unmix(attention, pattern, read_heads(attention, v))
    return torch.einsum("...sge,gde->...sd", mixed, attention.W_V)


def mix(attention: AttentionWeights, pattern: Tensor, values: Tensor) -> Tensor:
    """Return (…, T_target, n_heads, d_head): each head's values (…, T_source, n_kv_heads, d_head) by its pattern."""
    mixed = torch.einsum("gqts,...sge->...tgqe", _grouped(attention, pattern), values)
    return rearrange(mixed, "... kv_head query d_head -> ... (kv_head query) d_head")


def unmix(attention: AttentionWeights, pattern: Tensor, z: Tensor) -> Tensor:
    """Return the transpose of ``mix`` for ``z`` (…, T_target, n_heads, d_head): heads that share values are summed."""
    heads = rearrange(z, "... (kv_head query) d_head -> ... kv_head query d_head", kv_head=attention.n_kv_heads)
    return torch.einsum("gqts,...tgqe->...sge", _grouped(attention, pattern), heads)


def write_heads(attention: AttentionWeights, z: Tensor) -> Tensor:
    """Return Σ_h z_h W_O[h] (…, d_model) for ``z`` (…, n_heads, d_head)."""
    return torch.einsum("...he,hed->...d", z, attention.W_O)


def read_heads(attention: AttentionWeights, v: Tensor) -> Tensor:
    """Return (…, n_heads, d_head) W_O[h] v, the transpose of ``write_heads``."""
    return torch.einsum("hed,...d->...he", attention.W_O, v)


def head_contributions(attention: AttentionWeights, pattern: Tensor, values: Tensor, v: Tensor) -> Tensor:
    """Return (n_heads, T_source): what each head brings from each source to one target token along ``v`` (d_model,).

    C[h, s] = A[h, s] · (values[s] · W_O[h] v), for the target's row of the patterns (n_heads, T_source) and values
    (T_source, n_kv_heads, d_head) that include b_V. Equal to dotting each head's written vector with ``v``, without
    making those vectors.
    """
    directions = _grouped(attention, read_heads(attention, v))
    read = torch.einsum("sge,gqe->gqs", values, directions)
    return pattern * rearrange(read, "kv_head query source -> (kv_head query) source")


def _grouped(attention: AttentionWeights, heads: Tensor) -> Tensor:
    """Return (n_kv_heads, heads of each, …): query heads that share a value head are consecutive."""
    return rearrange(heads, "(kv_head query) ... -> kv_head query ...", kv_head=attention.n_kv_heads)
