"""How other tools name the places that our sites hook: per layer, by TransformerLens name, or by module.

Our hooks are those of TransformerLens' bridge. ``HookedTransformer``, the class that most tools load, has fewer, some
under another name; ``HookedSAETransformer`` is that class with ``mlp.hook_in`` added.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from tailrace.storage.cache_format import HookName, Site

_IN_BLOCK = re.compile(r"blocks\.(\d+)\.([^\[\]]+)")

MLP_IN, MLP_OUT = "mlp.hook_in", "mlp.hook_out"
"""Exactly what the MLP's module is given and gives."""
RESID_POST = "hook_resid_post"
"""The residual stream behind a block, which is what the block's module gives."""
NORMALISED_IN, STREAM_OUT = "ln2.hook_normalized", "hook_mlp_out"
"""The MLP's input before the norm's gain and bias, and what is added to the stream, as ``HookedTransformer`` says."""

_BLOCKS = {
    "h": ("GPT2LMHeadModel", "GPTNeoForCausalLM", "GPTJForCausalLM"),
    "layers": (
        "GPTNeoXForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
        "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "OlmoForCausalLM", "Olmo2ForCausalLM",
        "PhiForCausalLM", "Phi3ForCausalLM",
    ),
}  # fmt: skip
_BLOCKS_OF = {architecture: blocks for blocks, architectures in _BLOCKS.items() for architecture in architectures}

_NORM_AFTER = ("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Olmo2ForCausalLM")
"""Of those, the ones that have a norm between the output of an MLP, or of attention, and the residual stream."""
_LAYER_NORMS = (
    "GPT2LMHeadModel", "GPTNeoForCausalLM", "GPTJForCausalLM", "GPTNeoXForCausalLM", "PhiForCausalLM",
)  # fmt: skip
"""… and the ones whose norms are LayerNorms with a gain and a bias."""
_SAME_NAME = frozenset({
    "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out",
    "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "attn.hook_pattern", "attn.hook_attn_scores",
    "attn.hook_rot_q", "attn.hook_rot_k", "mlp.hook_in", "mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post",
    *(f"{norm}.hook_{what}" for norm in ("ln1", "ln1_post", "ln2", "ln2_post") for what in ("scale", "normalized")),
})  # fmt: skip
"""Hooks of a block that are the same in ``HookedSAETransformer``."""
_OTHER_NAME = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "attn.q.hook_out": "attn.hook_q",
    "attn.k.hook_out": "attn.hook_k",
    "attn.v.hook_out": "attn.hook_v",
    "attn.o.hook_in": "attn.hook_z",
    "mlp.in.hook_in": "mlp.hook_in",
    "mlp.gate.hook_in": "mlp.hook_in",
    "mlp.gate.hook_out": "mlp.hook_pre",
    "mlp.out.hook_in": "mlp.hook_post",
}
"""Hooks of a block → what ``HookedSAETransformer`` calls the same vectors."""
_BEFORE_ANY_NORM = {
    MLP_OUT: STREAM_OUT,
    "mlp.out.hook_out": STREAM_OUT,
    "attn.hook_out": "hook_attn_out",
    "attn.o.hook_out": "hook_attn_out",
}
"""… only where no norm comes between; elsewhere there is no such hook."""
_OUTSIDE = {
    **{name: name for name in ("hook_embed", "hook_pos_embed", "ln_final.hook_scale", "ln_final.hook_normalized")},
    "embed.hook_out": "hook_embed",
    "pos_embed.hook_out": "hook_pos_embed",
}
"""Hooks outside the blocks → the same."""


class LayerHooks(NamedTuple):
    """A site whose hooks lie in one block, named without the block."""

    layer: int
    input: str
    output: str


def layer_hooks(site: Site) -> LayerHooks | None:
    """Return the hooks of a site within its block; None unless both are whole hooks of one block."""
    found = [_IN_BLOCK.fullmatch(hook) for hook in (site.hook_in, site.hook_out)]
    if found[0] is None or found[1] is None or found[0][1] != found[1][1]:
        return None
    return LayerHooks(int(found[0][1]), found[0][2], found[1][2])


def module_of(site: Site, model: Mapping[str, Any]) -> str | None:
    """Return the name, below the model's base, of the module whose input and output (or output alone, for an
    autoencoder) the site holds; None where it is no module's or the model's module names are not known here.
    """
    hooks, blocks = layer_hooks(site), _BLOCKS_OF.get(str(model.get("architecture")))
    if hooks is None or blocks is None:
        return None
    if (hooks.input, hooks.output) in ((MLP_IN, MLP_OUT), (MLP_OUT, MLP_OUT)):
        return f"{blocks}.{hooks.layer}.mlp"
    if hooks.input == hooks.output and hooks.input in (RESID_POST, "hook_out"):
        return f"{blocks}.{hooks.layer}"
    return None


def hooked_transformer_name(hook: str, model: Mapping[str, Any]) -> str | None:
    """Return what ``HookedSAETransformer`` calls the vectors of ``hook``; None where it has none that is known here."""
    point, head = HookName.parse(hook)
    match = _IN_BLOCK.fullmatch(point)
    if match is None:
        name = _OUTSIDE.get(point)
    elif match[2] in _SAME_NAME:
        name = point
    else:
        others = _OTHER_NAME if _may_have_norm_after(model) else {**_OTHER_NAME, **_BEFORE_ANY_NORM}
        name = f"blocks.{match[1]}.{others[match[2]]}" if match[2] in others else None
    return None if name is None else str(HookName(name, head))


def _may_have_norm_after(model: Mapping[str, Any]) -> bool:
    architecture = str(model.get("architecture"))
    return architecture in _NORM_AFTER or architecture not in _BLOCKS_OF


def why_unnamed(hook: str, model: Mapping[str, Any]) -> str:
    """Return why ``hooked_transformer_name`` has no name for a hook, as the end of a sentence."""
    match, architecture = _IN_BLOCK.fullmatch(HookName.parse(hook).point), model.get("architecture")
    if match is None or match[2] not in _BEFORE_ANY_NORM:
        return "has none that is known to hold the same vectors"
    other = f"blocks.{match[1]}.{_BEFORE_ANY_NORM[match[2]]}"
    if architecture in _NORM_AFTER:
        return f"has none: in {architecture} a norm follows, and {other} comes after it"
    unknown = architecture or "this model"
    return f"may have none: whether a norm follows in {unknown} is not known here; if none does, {other} is the same"


def is_normalised_otherwise(hook: str, model: Mapping[str, Any]) -> bool:
    """Tell whether a hook of a model as published is, or may be, another to older releases of TransformerLens.

    They have ``hook_normalized`` of a LayerNorm behind its gain and bias, release 3 and later before them.
    """
    architecture = model.get("architecture")
    return hook.endswith("hook_normalized") and (architecture not in _BLOCKS_OF or architecture in _LAYER_NORMS)
