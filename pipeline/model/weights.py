"""Read a language model's linear parts off TransformerLens, and check each against what the model computes.

Families differ in ways that no name tells (Gemma's norms multiply by 1 + weight and its embeddings by √d_model,
Cohere's logits are divided by 16), so everything that is read, from the embedding to the logits, is compared with a
short run of the model. A constant factor is folded into the weights; a family that does not fit otherwise is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tailrace.analysis.circuits.record import part_problems
from tailrace.analysis.splice.hook_points import observed
from tailrace.analysis.weights.model_weights import (
    IDENTITY,
    AttentionWeights,
    LayerWeights,
    ModelWeights,
    Norm,
    NormKind,
)
from tailrace.pipeline.model.language_model import LanguageModel, explained_failures, without_padding_advice
from tailrace.storage.errors import ActionableError, ModelError

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Of the largest entry: room for the rounding of one norm or one product in the model's dtype."""


def read_weights(model: LanguageModel) -> ModelWeights:
    """Return the weights of ``model``; tensors are views of the model's where it keeps them in that shape.

    Raises ModelError, naming the part, where a family computes something else than its weights say.
    """
    try:
        with torch.inference_mode():
            return _read(model)
    except ActionableError:
        raise
    except Exception as error:  # TransformerLens' properties raise whatever the shapes of a family lead them to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(
            f"model {model.name}: its weights are not of a shape that can be read: {reason}; this family is not "
            "supported by what needs them (`pipeline --debug …` shows where)"
        ) from error


def _read(model: LanguageModel) -> ModelWeights:
    bridge = model.bridge
    reader = _Reader(bridge)
    weights = ModelWeights(
        W_E=bridge.W_E,
        W_U=bridge.W_U,
        final_norm=reader.norm(bridge, "ln_final", "the final norm"),
        layers=tuple(reader.layer(block, number) for number, block in enumerate(bridge.blocks)),
        W_pos=_optional(bridge, "W_pos"),
        b_U=_unless(0, _optional(bridge, "b_U")),
        is_parallel=reader.is_parallel,
        logit_cap=_logit_cap(bridge),
    )
    tokens = model.short_context()
    first, last = "blocks.0.hook_in", f"blocks.{model.n_layers - 1}.hook_out"
    seen, logits = _run(model, tokens, [first, last])
    weights = _with_embedding_scale(weights, tokens[0], seen[first], model.name)
    if problems := part_problems(bridge, weights, tokens[0]):
        raise ModelError(
            f"model {model.name}: its pass does not split into the parts that circuits and tables of weights are made "
            "of:\n" + "\n".join(f"  {line}" for line in problems)
        )
    return _with_logit_scale(weights, seen[last], logits, model.name)


class _Reader:
    """Reads blocks and remembers what every block shares."""

    def __init__(self, bridge: Any) -> None:
        self._eps = float(getattr(bridge.cfg, "eps", 0.0))
        self.is_parallel = bool(getattr(bridge.cfg, "parallel_attn_mlp", False))

    def layer(self, block: Any, number: int) -> LayerWeights:
        attention = getattr(block, "attn", None)
        if attention is None:
            raise ModelError(f"block {number} has no attention; circuits and OV norms need a transformer of one kind")
        here = f"block {number}: "
        # GPT-J and Phi have one norm for both: without a name of its own, the MLP's is attention's.
        shares_norm = self.is_parallel and getattr(block, "ln2", None) is None
        return LayerWeights(
            attention=self._attention(attention, here),
            norm_attention=self.norm(block, "ln1", here + "the norm before attention"),
            norm_mlp=self.norm(block, "ln1" if shares_norm else "ln2", here + "the norm before the MLP"),
            norm_attention_out=self.norm(block, "ln1_post", here + "the norm after attention"),
            norm_mlp_out=self.norm(block, "ln2_post", here + "the norm after the MLP"),
        )

    def norm(self, owner: Any, name: str, what: str) -> Norm:
        """Return the norm of that name, the identity if there is none; checked on a made-up vector."""
        module = getattr(owner, name, None)
        if module is None:
            return IDENTITY
        original = getattr(module, "original_component", module)
        weight, bias = getattr(original, "weight", None), getattr(original, "bias", None)
        eps = float(getattr(original, "eps", getattr(original, "variance_epsilon", self._eps)))
        like = weight if weight is not None else next(owner.parameters())
        probe = _probe(like, int(weight.shape[0]) if weight is not None else None)
        shown = original(probe)
        kinds: tuple[NormKind, ...] = ("layer", "rms")
        for kind in kinds:
            for gain in (weight, None if weight is None else 1 + weight):
                if _agree(_apply(Norm(kind, gain, bias, eps), probe), shown):
                    return Norm(kind, _unless(1, gain), _unless(0, bias), eps)
        if torch.equal(probe, shown):
            return IDENTITY
        raise ModelError(f"{what} is neither a layer norm nor an RMS norm with a gain; circuits cannot pass through it")

    def _attention(self, attention: Any, here: str) -> AttentionWeights:
        W_V, W_O = _optional(attention, "W_V"), _optional(attention, "W_O")
        if W_V is None or W_O is None or W_V.ndim != 3 or W_O.ndim != 3 or W_O.shape[0] % W_V.shape[0]:
            held = {name: None if w is None else tuple(w.shape) for name, w in (("W_V", W_V), ("W_O", W_O))}
            raise ModelError(
                f"{here}attention has {held}, wanted W_V (value heads, d_model, d_head) and W_O (heads, d_head, "
                "d_model); this family's attention is not supported"
            )
        b_V = _optional(attention, "b_V")
        return AttentionWeights(W_V, W_O, _unless(0, b_V), _unless(0, _optional(attention, "b_O")))


def _run(model: LanguageModel, tokens: Tensor, hooks: list[str]) -> tuple[Mapping[str, Tensor], Tensor]:
    """Return what each of ``hooks`` holds, and the logits, of the one context ``tokens`` (1, n): (n, d) each."""
    missing = [hook for hook in hooks if hook not in model.bridge.hook_dict]
    if not missing:
        with observed(model.bridge.hook_dict, hooks) as fired, explained_failures(1), without_padding_advice():
            logits = model.bridge(tokens, return_type="logits", use_cache=False)
        seen: dict[str, Any] = dict(fired)  # some families hold a tuple that begins with the activation
        missing = [hook for hook in hooks if hook not in seen]
    if missing:
        raise ModelError(
            f"model {model.name}: shows nothing at {', '.join(missing)}, and so its stream cannot be compared with its "
            "weights; this family is not supported by what needs them"
        )
    return {name: (value[0] if isinstance(value, tuple) else value)[0] for name, value in seen.items()}, logits[0]


def _with_embedding_scale(weights: ModelWeights, tokens: Tensor, stream: Tensor, name: str) -> ModelWeights:
    """Return the weights with W_E as ``stream``, what enters block 0, shows it."""
    token = weights.W_E[tokens].to(stream.dtype)
    position = 0 if weights.W_pos is None else weights.W_pos[: len(tokens)].to(stream.dtype)
    if token.shape == stream.shape:
        if _agree(token + position, stream):
            return weights
        fitted = _factor(token, stream - position)
        for scale in (weights.d_model**0.5, fitted):  # the first as Gemma rounds it, in the model's dtype
            factor = torch.tensor(scale, dtype=stream.dtype, device=stream.device)
            if _agree(token * factor + position, stream):
                return replace(weights, W_E=weights.W_E * factor)
    raise ModelError(
        f"model {name}: what enters block 0 is not the token's embedding plus its position's; "
        "this family's embedding is not supported"
    )


def _with_logit_scale(weights: ModelWeights, stream: Tensor, logits: Tensor, name: str) -> ModelWeights:
    """Return the weights with W_U and b_U as ``logits`` show them, ``stream`` being what leaves the last block.

    Some families multiply logits by a constant after the unembedding, others cap them.
    """
    normalised = _apply(weights.final_norm, stream)
    if (cap := weights.logit_cap) is not None:
        within = logits.double().clamp(-cap * (1 - 1e-12), cap * (1 - 1e-12))
        logits_before = cap * torch.atanh(within / cap)
    else:
        logits_before = logits.double()
    if weights.W_U.shape == (normalised.shape[-1], logits.shape[-1]):
        made = normalised @ weights.W_U.double()
        made = made if weights.b_U is None else made + weights.b_U.double()
        reliable = torch.ones_like(made, dtype=torch.bool) if cap is None else logits.double().abs() < 0.9 * cap
        for factor in (1.0, _factor(made[reliable], logits_before[reliable])):
            scaled = made * factor
            if _agree(scaled if cap is None else cap * torch.tanh(scaled / cap), logits):
                b_U = weights.b_U
                return (
                    weights
                    if factor == 1
                    else replace(weights, W_U=weights.W_U * factor, b_U=None if b_U is None else b_U * factor)
                )
    raise ModelError(
        f"model {name}: its logits are not the final norm of the stream times the unembedding, nor a multiple of that; "
        "what this family does to logits is not supported"
    )


def _factor(made: Tensor, wanted: Tensor) -> float:
    """Return the factor that brings ``made`` nearest to ``wanted``."""
    x, y = made.double().flatten(), wanted.double().flatten()
    return float((x @ y) / (x @ x).clamp_min(1e-300))


def _apply(norm: Norm, x: Tensor) -> Tensor:
    exact = x.double()
    if norm.kind == "none":
        return exact
    centred = exact - exact.mean(-1, keepdim=True) if norm.kind == "layer" else exact
    out = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    out = out if norm.weight is None else out * norm.weight.double()
    return out if norm.bias is None else out + norm.bias.double()


def _probe(like: Tensor, width: int | None) -> Tensor:
    """Return (1, 1, width) a vector with a mean, of the weights' dtype and device."""
    width = width if width is not None else int(like.shape[-1])
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(1, 1, width, generator=generator) + 0.5).to(like.device, like.dtype)


def _agree(one: Tensor, other: Tensor) -> bool:
    tolerance = _TOLERANCES.get(other.dtype, 1e-4)
    largest = float(other.abs().max().double())
    return bool((one.double() - other.double()).abs().max() <= tolerance * max(largest, 1e-30))


def _optional(owner: Any, name: str) -> Tensor | None:
    """Return a parameter that a family may not have."""
    try:
        value = getattr(owner, name)
    except (AttributeError, ValueError):
        return None
    return value.detach() if isinstance(value, Tensor) else None


def _unless(nothing: float, value: Tensor | None) -> Tensor | None:
    """Return None for a parameter that changes nothing: a gain of ones, a bias of zeros."""
    return None if value is None or bool((value == nothing).all()) else value


def _logit_cap(bridge: Any) -> float | None:
    cap = getattr(bridge.cfg, "output_logits_soft_cap", None)
    return float(cap) if cap is not None and cap > 0 else None
