"""Checks of a loaded model by what it computes, because the name of a family, or of a hook, does not tell that.

TransformerLens gives every family the same names. BLOOM's and MPT's ``mlp.hook_out`` holds the MLP's output plus the
residual stream, and in a mixture of experts ``mlp.hook_post`` is ``mlp.hook_out`` under another name. Some families
load and fail in their first pass. So a few tokens are run, and what does not fit is refused with the hook to use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tailrace.pipeline.model.sites import SiteHooks
from tailrace.storage.cache_format import HookName
from tailrace.storage.errors import ModelError

_MLP_HOOK = re.compile(r"blocks\.(\d+)\.mlp\.(hook_in|hook_out|hook_pre|hook_pre_linear|hook_post)")
_HIDDEN = ("hook_pre", "hook_pre_linear", "hook_post")
_LARGEST_ERROR = 1e-2
"""Of an MLP computed again from its input, in any dtype; what is added to it in some families is far larger."""
_LARGEST_LOOKAHEAD = {torch.bfloat16: 5e-2, torch.float16: 5e-2, torch.float32: 1e-3, torch.float64: 1e-3}
"""Share of the largest logit by which the last token may change earlier ones: rounding, where experts get other batches
of tokens."""

Capture = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Hook names → the activation (1, positions, d) that each holds in a pass over a few tokens."""


def check_passes(bridge: Any, tokens: Tensor, name: str) -> None:
    """Raise ModelError unless logits depend on the tokens before them alone; ``tokens`` are (1, positions).

    What the pass itself raises goes through.
    """
    if tokens.shape[1] < 2:
        return
    changed = tokens.clone()
    changed[0, -1] = tokens[0, 0] if tokens[0, -1] != tokens[0, 0] else tokens[0, -2]
    with torch.inference_mode():
        logits, others = (
            bridge(each, return_type="logits", use_cache=False)[0, :-1].float() for each in (tokens, changed)
        )
    largest = _LARGEST_LOOKAHEAD.get(next(bridge.original_model.parameters()).dtype, 1e-3)
    if (logits - others).abs().max() > largest * logits.abs().max():
        raise ModelError(
            f"model {name}: its predictions change with tokens that come later, so it is no language model that "
            "predicts each token from those before it; only these are supported (a BERT that is to be one has "
            "is_decoder in its config.json)"
        )


def mlps_of_more_than_their_input(bridge: Any, capture: Capture) -> dict[int, str]:
    """Return why an MLP's output is no function of its input alone, by layer, for those where it is not."""
    points: Mapping[str, Any] = bridge.hook_dict
    modules = {}
    for layer, block in enumerate(getattr(bridge, "blocks", ())):
        module = getattr(block, "mlp", None)
        # Some families keep the MLP's matrices directly in the block: hooks exist, but no module to call.
        if getattr(module, "name", None) is not None and all(hook in points for hook in _ends(layer)):
            modules[layer] = module
    captured = capture([hook for layer in modules for hook in _ends(layer)]) if modules else {}
    compared = {
        layer: _difference(module, *(captured[hook] for hook in _ends(layer))) for layer, module in modules.items()
    }
    return {layer: reason for layer, reason in compared.items() if reason is not None}


def misnamed_hooks(points: Mapping[str, Any], sites: Sequence[SiteHooks], of_more: Mapping[int, str]) -> list[str]:
    """Return a sentence for every hook of ``sites`` that holds something else than its name says, with what to do.

    ``of_more`` is what ``mlps_of_more_than_their_input`` says. Layers with the same fault have one sentence.
    """
    problems: list[str] = []
    wrong: dict[str, dict[int, SiteHooks]] = {}
    for site in sites:
        for hook in dict.fromkeys(HookName.parse(name).point for name in (site.hook_in, site.hook_out)):
            match = _MLP_HOOK.fullmatch(hook)
            if match is None:
                continue
            layer = int(match[1])
            if match[2] in _HIDDEN and (same := _same_as_end(hook, layer, points)) is not None:
                problems.append(
                    f"site {site.name}: {hook} is {same} under another name in this model, whose MLP shows no hidden "
                    "activations (a mixture of experts has them in each expert); give that hook, or leave it out"
                )
            elif match[2] == "hook_out" and layer in of_more:
                wrong.setdefault(of_more[layer], {}).setdefault(layer, site)
    return problems + [_of_more(reason, layers, points) for reason, layers in wrong.items()]


def _of_more(reason: str, layers: Mapping[int, SiteHooks], points: Mapping[str, Any]) -> str:
    first = min(layers)
    hook_in, hook_out = _ends(first)
    alone, name = f"blocks.{first}.hook_mlp_out", layers[first].name
    others = f" and {len(layers) - 1} more like it" if len(layers) > 1 else ""
    is_elsewhere = alone in points and points[alone] is not points[hook_out]
    advice = (
        f"what the MLP itself adds to the stream is at {alone}, so give --hooks {name}={hook_in}:{alone}"
        if is_elsewhere
        else "give other layers, or other hooks"
    )
    return f"site {name}{others}: {hook_out} is no function of {hook_in} alone in this family ({reason}); {advice}"


def has_neurons(hook: str, points: Mapping[str, Any]) -> bool:
    """Whether ``hook``, such as ``blocks.1.mlp.hook_post``, holds hidden activations of an MLP in this model."""
    match = _MLP_HOOK.fullmatch(hook)
    return hook in points and match is not None and _same_as_end(hook, int(match[1]), points) is None


def _same_as_end(hook: str, layer: int, points: Mapping[str, Any]) -> str | None:
    """Return the MLP's input or output hook if ``hook`` is the same hook point."""
    return next((end for end in _ends(layer) if points.get(end) is points[hook]), None)


def _ends(layer: int) -> tuple[str, str]:
    return f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.mlp.hook_out"


def _difference(mlp: Any, inputs: Tensor, outputs: Tensor) -> str | None:
    """Return how ``mlp(inputs)`` is not ``outputs``; None if it is."""
    try:
        computed = computed_output(mlp, inputs, outputs)
    except Exception as error:  # the module wants more than its input, and says so in its own way
        return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    size = outputs.double().norm().clamp_min(1e-30)
    if (error_share := float((computed.double() - outputs.double()).norm() / size)) > _LARGEST_ERROR:
        return f"the module applied to that differs by {error_share:.2g} of its norm"
    return None


def computed_output(mlp: Callable[[Tensor], Any], inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return ``mlp(inputs)`` in the shape of ``outputs``."""
    with torch.inference_mode():
        computed = mlp(inputs)
        if isinstance(computed, tuple):  # an MLP with experts also returns its router's scores
            computed = computed[0]
        return computed.reshape(outputs.shape)  # type: ignore[no-any-return]  # some flatten contexts
