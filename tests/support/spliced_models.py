"""What tests of splicing share: tiny models with their tokens, and transcoders that were made rather than trained."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailrace.analysis.splice.replacement import Substitute, run_replaced
from tailrace.pipeline.model.language_model import LanguageModel, load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.storage.activation_cache import ActivationCache
from tailrace.storage.cache_format import Site
from tailrace.storage.draft import Draft
from tailrace.training.architectures import TopK
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.manifest import FORMAT_VERSION, KIND, WEIGHTS
from tailrace.training.architectures.transcoder import save_weights
from tests.support.tiny_models import save_tiny_model

WIDTH = 16
D_HEAD = 4
N_LAYERS = 3
TOKENS = torch.arange(2 * 10).view(2, 10) % 70 + 2  # two contexts of ten positions
WHERE = (torch.arange(10) > 0).expand(2, 10)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="spliced-models-")


def tiny_model(family: str = "gpt2") -> LanguageModel:
    """Return a random three-layer model, loaded once per process: a test that changes it breaks the others."""
    return _load(family)


@functools.cache
def _load(family: str) -> LanguageModel:
    folder = Path(_folder().name) / family
    return load_language_model(ModelSettings(model=str(save_tiny_model(folder, family, n_layers=N_LAYERS))))


def mlp_site(layer: int) -> Site:
    return Site(f"layer{layer}", f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.mlp.hook_out", WIDTH, WIDTH, "float32")


def autoencoder_site(hook: str, width: int = WIDTH) -> Site:
    return Site(hook.replace("[", ".head").replace("]", ""), hook, hook, width, width, "float32")


def plain_logits(model: LanguageModel, tokens: Tensor = TOKENS) -> Tensor:
    with torch.inference_mode():
        return model.bridge(tokens, return_type="logits", use_cache=False)


def plain_model(family: str) -> Any:
    """Return the same model as transformers loads it: nothing of TransformerLens or of ours."""
    from transformers import AutoModelForCausalLM

    folder = tiny_model(family).bridge.cfg.model_name
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval().requires_grad_(False)


def logits_with_module_hooks(family: str, hooks: Mapping[str, Callable[..., Any]]) -> Tensor:
    """Return logits of ``plain_model`` with a forward hook on every module whose name ends like a key."""
    plain = plain_model(family)
    for name, module in plain.named_modules():
        for suffix, hook in hooks.items():
            if name.endswith(suffix):
                module.register_forward_hook(hook)
    with torch.inference_mode():
        return plain(TOKENS).logits


def run_with(family: str, substitutes: Mapping[Site, Substitute], where: Tensor | None = None) -> Tensor:
    with torch.inference_mode():
        return run_replaced(tiny_model(family).bridge, TOKENS, substitutes, where)


class Noted(Substitute):
    """Leaves everything as it is and remembers it."""

    def __call__(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        self.inputs, self.outputs = inputs.clone(), outputs.clone()
        return outputs


def random_transcoder(
    d_in: int = WIDTH, d_out: int = WIDTH, *, d_sae: int = 24, k: int = 4, seed: int = 0, skip: bool = False
) -> Transcoder:
    transcoder = TopK(k=k, skip=skip).build(d_in, d_out, d_sae)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return transcoder.eval().requires_grad_(False)


def publish_transcoder(
    path: Path, cache: ActivationCache, site: str, transcoder: Transcoder, changes: Mapping[str, Any] | None = None
) -> Path:
    """Publish a transcoder as if it had been trained on ``site`` of ``cache``."""
    inputs = {"inputs": {"cache": cache.reference}, **(changes or {})}
    return publish_transcoder_of(path, cache.manifest.model, cache.sites[site], transcoder, inputs)


def publish_transcoder_of(
    path: Path, model: Mapping[str, Any], site: Site, transcoder: Transcoder, changes: Mapping[str, Any] | None = None
) -> Path:
    """Publish a transcoder of ``site`` of the language model with that identity."""
    with Draft(path, KIND, {"site": site.name}) as draft:
        save_weights(path / WEIGHTS, transcoder)
        manifest = {
            "format": FORMAT_VERSION,
            "inputs": {},
            "model": dict(model),
            "site": asdict(site),
            "d_sae": transcoder.d_sae,
            "architecture": {"kind": "topk", "k": 4},
            "metrics": {},
        }
        draft.publish({**manifest, **(changes or {})}, [WEIGHTS])
    return path


class MlpItself:
    """A model's own MLP where a transcoder would stand; its activations are its outputs."""

    def __init__(self, family: str, layer: int) -> None:
        modules = dict(plain_model(family).named_modules())
        self._mlp = next(module for name, module in modules.items() if name.endswith(f".{layer}.mlp"))

    def __call__(self, inputs: Tensor) -> Tensor:
        return self._mlp(inputs)

    def encode(self, inputs: Tensor) -> Tensor:
        return self._mlp(inputs)

    def decode(self, activations: Tensor, inputs: Tensor) -> Tensor:
        return activations
