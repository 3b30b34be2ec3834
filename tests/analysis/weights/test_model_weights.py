"""The weights read off a language model do what the model does, in every family and processing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tailrace.analysis.weights.model_weights import AttentionWeights, ModelWeights, Norm
from tailrace.pipeline.model.language_model import LanguageModel, load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.model.weights import read_weights
from tailrace.storage.errors import ModelError
from tests.support.tiny_models import FAMILIES, save_tiny_model

N_TOKENS = 7
TOLERANCE = 1e-4  # float32: sums of 16 to 64 products of order one


@pytest.fixture(params=[(family, processing) for family in FAMILIES for processing in ("raw", "compatibility")])
def model(request: Any, tmp_path: Path) -> LanguageModel:
    family, processing = request.param
    folder = save_tiny_model(tmp_path / "model", family)
    return load_language_model(ModelSettings(model=str(folder), processing=processing))


def test_every_linear_part_reproduces_the_hooks(model: LanguageModel) -> None:
    weights = read_weights(model)
    tokens = torch.randint(0, model.d_vocab, (1, N_TOKENS), generator=torch.Generator().manual_seed(0))
    logits, hooks = run(model, tokens)

    embedded = weights.W_E[tokens[0]] + (0 if weights.W_pos is None else weights.W_pos[:N_TOKENS])
    torch.testing.assert_close(embedded, hooks["blocks.0.hook_in"][0], rtol=TOLERANCE, atol=TOLERANCE)
    for number, layer in enumerate(weights.layers):
        stream = hooks[f"blocks.{number}.hook_in"][0]
        attended = attend(layer.attention, normalise(layer.norm_attention, stream), hooks, number)
        attended = normalise(layer.norm_attention_out, attended)
        mlp_input = stream if weights.is_parallel else stream + attended
        shown = hooks[f"blocks.{number}.mlp.hook_in"][0]
        torch.testing.assert_close(normalise(layer.norm_mlp, mlp_input), shown, rtol=TOLERANCE, atol=10 * TOLERANCE)
        mlp_output = normalise(layer.norm_mlp_out, hooks[f"blocks.{number}.mlp.hook_out"][0])
        after = stream + attended + mlp_output
        torch.testing.assert_close(after, hooks[f"blocks.{number}.hook_out"][0], rtol=TOLERANCE, atol=10 * TOLERANCE)
    final = normalise(weights.final_norm, hooks[f"blocks.{weights.n_layers - 1}.hook_out"][0])
    unembedded = final @ weights.W_U + (0 if weights.b_U is None else weights.b_U)
    if weights.logit_cap is not None:
        unembedded = weights.logit_cap * torch.tanh(unembedded / weights.logit_cap)
    torch.testing.assert_close(unembedded, logits[0], rtol=TOLERANCE, atol=10 * TOLERANCE)


def test_pulling_back_is_the_transpose_of_attention_with_grouped_values() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = AttentionWeights(
        W_V=torch.randn(2, 6, 3, generator=generator, dtype=torch.float64),
        W_O=torch.randn(4, 3, 6, generator=generator, dtype=torch.float64),
    )
    x, v = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    forward = [x @ weights.W_V[head // 2] @ weights.W_O[head] for head in range(4)]
    expected = torch.stack([written @ v for written in forward])

    torch.testing.assert_close(weights.pull_back(v) @ x, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_pulling_back_through_a_norm_is_its_transpose_at_a_fixed_scale(kind: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    x, v, gain = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    norm = Norm(kind, gain, eps=1e-6)
    centred = x - x.mean() if kind == "layer" else x
    scale = (centred.square().mean() + norm.eps).sqrt()[None]

    torch.testing.assert_close(norm.pull_back(v, scale) @ x, (centred / scale * gain) @ v, rtol=1e-12, atol=1e-12)


def test_a_norm_that_is_neither_kind_is_refused(tmp_path: Path) -> None:
    model = load_language_model(ModelSettings(model=str(save_tiny_model(tmp_path / "model", "llama"))))
    original = model.bridge.blocks[1].ln2.original_component
    original.forward = lambda x: torch.tanh(x)
    with pytest.raises(ModelError, match="block 1: the norm before the MLP is neither a layer norm nor an RMS norm"):
        read_weights(model)


def run(model: LanguageModel, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits and what every hook held."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def note(value: Any, hook: Any) -> None:
            tensor = value[0] if isinstance(value, tuple) else value
            seen[name] = tensor.detach().clone()

        return note  # by the name asked for: a hook's own differs where names are aliases

    names = [
        f"blocks.{layer}.{hook}"
        for layer in range(model.n_layers)
        for hook in ("hook_in", "hook_out", "mlp.hook_in", "mlp.hook_out", "attn.hook_pattern")
    ]
    with torch.inference_mode():
        logits = model.bridge.run_with_hooks(
            tokens, return_type="logits", fwd_hooks=[(name, keep(name)) for name in names]
        )
    return logits, seen


def attend(attention: AttentionWeights, x: Tensor, hooks: dict[str, Tensor], layer: int) -> Tensor:
    """Return what the heads write: Σ_h pattern_h · (x W_V + b_V) W_O + b_O."""
    pattern = hooks[f"blocks.{layer}.attn.hook_pattern"][0]
    written = torch.zeros_like(x)
    for head in range(attention.n_heads):
        group = attention.kv_head(head)
        value = x @ attention.W_V[group] + (0 if attention.b_V is None else attention.b_V[group])
        written = written + pattern[head] @ value @ attention.W_O[head]
    return written + (0 if attention.b_O is None else attention.b_O)


def normalise(norm: Norm, x: Tensor) -> Tensor:
    """Return the norm of ``x``, written out."""
    if norm.kind == "none":
        return x
    centred = x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x
    out = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    out = out if norm.weight is None else out * norm.weight
    return out if norm.bias is None else out + norm.bias


def test_model_weights_say_their_sizes(model: LanguageModel) -> None:
    weights: ModelWeights = read_weights(model)
    assert (weights.n_layers, weights.d_model, weights.d_vocab) == (model.n_layers, model.d_model, model.d_vocab)
