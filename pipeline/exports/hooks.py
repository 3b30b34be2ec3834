"""How other tools name the places that our sites hook: per layer, by TransformerLens name, or by module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_IN_BLOCK = re.compile(r"blocks\.(\d+)\.([^\[\]]+)")

MLP_IN, MLP_OUT = "mlp.hook_in", "mlp.hook_out"
"""Exactly what the MLP's module is given and gives."""
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


class LayerHooks(NamedTuple):
    """A site whose hooks lie in one block, named without the block."""

    layer: int
    input: str
    output: str


def layer_hooks(site: Mapping[str, Any]) -> LayerHooks | None:
    """Return the hooks of a recorded site within its block; None unless both are whole hooks of one block."""
    found = [_IN_BLOCK.fullmatch(site[side]) for side in ("hook_in", "hook_out")]
    if found[0] is None or found[1] is None or found[0][1] != found[1][1]:
        return None
    return LayerHooks(int(found[0][1]), found[0][2], found[1][2])


def module_of(site: Mapping[str, Any], model: Mapping[str, Any]) -> str | None:
    """Return the name, below the model's base, of the module whose input and output (or output alone, for an
    autoencoder) the site holds; None where it is no module's or the model's module names are not known here.
    """
    hooks, blocks = layer_hooks(site), _BLOCKS_OF.get(str(model.get("architecture")))
    if hooks is None or blocks is None:
        return None
    if (hooks.input, hooks.output) in ((MLP_IN, MLP_OUT), (MLP_OUT, MLP_OUT)):
        return f"{blocks}.{hooks.layer}.mlp"
    return None
