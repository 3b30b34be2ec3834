"""Points of the residual stream at which a site reads and writes, and the directions of its features there.

Encoder rows belong to the site's input hook, which for an MLP is behind a norm and the norm's gain. A token's
embedding, a head or an earlier feature adds to the stream before that. So directions are carried there first:
the gain is multiplied in, and for a layer norm the mean is taken off, since no mean passes a layer norm. Decoder rows
are carried the other way, through a norm behind the site's output where a family has one. What a norm *divides* by
depends on the text and is left out: weights of one feature compare with each other, those of different positions would
differ by a positive factor.

Time in the stream is counted in half blocks, so that writes and reads can be ordered: block L reads
at 2L, its attention has written by 2L + 1 and its MLP by 2L + 2; where both run side by side, both by 2L + 2.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from tailrace.analysis.weights.model_weights import IDENTITY, LayerWeights, ModelWeights, Norm
from tailrace.storage.cache_format import HookName

_BLOCK_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")

Carry = Callable[[Tensor], Tensor]


class StreamPoint(NamedTuple):
    """A hook that reads or writes the residual stream, and the map from its vectors to vectors of the stream."""

    layer: int
    """The block it belongs to."""
    time: int
    """In half blocks: a read sees all writes up to its own time."""
    carry: Carry
    """From (…, width of the hook) to (…, d_model)."""


@dataclass(frozen=True)
class _Block:
    """A block, and the times at which its parts read and write."""

    layer: int
    weights: LayerWeights
    is_parallel: bool

    @property
    def before(self) -> int:
        return 2 * self.layer

    @property
    def middle(self) -> int:
        """When the MLP reads, and attention has written where it comes first."""
        return self.before if self.is_parallel else self.before + 1

    @property
    def attention_written(self) -> int:
        return self.after if self.is_parallel else self.middle

    @property
    def after(self) -> int:
        return self.before + 2


def read_point(hook: str, weights: ModelWeights) -> StreamPoint | None:
    """Return how a site with this input hook reads the stream; None if it reads something else, such as a head."""
    if (parsed := _block_of(hook, weights)) is None:
        return None
    block, name = parsed
    norm_attention, norm_mlp = block.weights.norm_attention, block.weights.norm_mlp
    times_and_carries: dict[str, tuple[int, Carry]] = {
        "hook_in": (block.before, _as_it_is),
        "hook_resid_pre": (block.before, _as_it_is),
        "ln1.hook_in": (block.before, _as_it_is),
        "ln1.hook_normalized": (block.before, _behind_norm(norm_attention, with_gain=False)),
        "ln1.hook_out": (block.before, _behind_norm(norm_attention)),
        "hook_resid_mid": (block.middle, _as_it_is),
        "hook_mlp_in": (block.middle, _as_it_is),
        "ln2.hook_in": (block.middle, _as_it_is),
        "ln2.hook_normalized": (block.middle, _behind_norm(norm_mlp, with_gain=False)),
        "ln2.hook_out": (block.middle, _behind_norm(norm_mlp)),
        "mlp.hook_in": (block.middle, _behind_norm(norm_mlp)),
        "hook_resid_post": (block.after, _as_it_is),
        "hook_out": (block.after, _as_it_is),
    }
    known = times_and_carries.get(name.point)
    return None if known is None or name.head is not None else StreamPoint(block.layer, *known)


def write_point(hook: str, weights: ModelWeights) -> StreamPoint | None:
    """Return how a site with this output hook writes to the stream; None if its output does not go to the stream."""
    if (parsed := _block_of(hook, weights)) is None:
        return None
    block, name = parsed
    if name.point == "attn.hook_z":
        return StreamPoint(block.layer, block.attention_written, _through_heads(block.weights, name.head))
    times_and_carries: dict[str, tuple[int, Carry]] = {
        "hook_in": (block.before, _as_it_is),
        "hook_resid_pre": (block.before, _as_it_is),
        "attn.hook_out": (block.attention_written, _through_norm(block.weights.norm_attention_out)),
        "hook_attn_out": (block.attention_written, _as_it_is),
        "hook_resid_mid": (block.middle, _as_it_is),
        "mlp.hook_out": (block.after, _through_norm(block.weights.norm_mlp_out)),
        "hook_mlp_out": (block.after, _as_it_is),
        "hook_resid_post": (block.after, _as_it_is),
        "hook_out": (block.after, _as_it_is),
    }
    known = times_and_carries.get(name.point)
    return None if known is None or name.head is not None else StreamPoint(block.layer, *known)


def layers_attending_before(time: int, weights: ModelWeights) -> range:
    """Return the layers whose heads have written to the stream by ``time``."""
    blocks = (_Block(layer, weights.layers[layer], weights.is_parallel) for layer in range(weights.n_layers))
    return range(sum(block.attention_written <= time for block in blocks))


def carry_back(norm: Norm, vectors: Tensor) -> Tensor:
    """Return (…, d_model) the directions that read before a norm what ``vectors`` read after it; nothing is divided."""
    return norm.pull_back(vectors, torch.ones(1, device=vectors.device))


def carry_forth(norm: Norm, vectors: Tensor) -> Tensor:
    """Return (…, d_model) what a norm makes of vectors added before it; nothing is divided."""
    if norm.kind == "layer":
        vectors = vectors - vectors.mean(dim=-1, keepdim=True)
    return norm.pull_back_gain(vectors)


def _block_of(hook: str, weights: ModelWeights) -> tuple[_Block, HookName] | None:
    match = _BLOCK_HOOK.fullmatch(hook)
    if match is None or int(match[1]) >= weights.n_layers:
        return None
    layer = int(match[1])
    return _Block(layer, weights.layers[layer], weights.is_parallel), HookName.parse(match[2])


def _as_it_is(vectors: Tensor) -> Tensor:
    return vectors


def _behind_norm(norm: Norm, *, with_gain: bool = True) -> Carry:
    """Return the map of directions behind a norm to the stream before it."""
    seen = norm if with_gain else Norm(norm.kind)
    return lambda vectors: carry_back(seen, vectors)


def _through_norm(norm: Norm) -> Carry:
    """Return the map of vectors before a norm to what comes out of it; the identity in most families."""
    return _as_it_is if norm is IDENTITY else lambda vectors: carry_forth(norm, vectors)


def _through_heads(layer: LayerWeights, head: int | None) -> Carry:
    """Return the map from the values that heads mixed, of one head or of all side by side, to what attention adds."""
    W_O = layer.attention.W_O if head is None else layer.attention.W_O[head]
    side_by_side = rearrange(W_O, "... d_head d_model -> (... d_head) d_model")

    def carry(vectors: Tensor) -> Tensor:
        return carry_forth(layer.norm_attention_out, vectors @ side_by_side.to(vectors.dtype))

    return carry
