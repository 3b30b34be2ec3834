"""What tests of circuits share: tiny models in float64 and float32 with random transcoders, and their frozen passes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailrace.analysis.circuits.nodes import Kind, Node
from tailrace.analysis.circuits.operators import apply_norm, norm_scale
from tailrace.analysis.circuits.paths import Path as CircuitPath
from tailrace.analysis.circuits.paths import Step
from tailrace.analysis.circuits.record import record_run
from tailrace.analysis.circuits.run import LinearisedRun, Part, Probe
from tailrace.analysis.splice.hook_points import hooked, observed
from tailrace.analysis.weights.model_weights import ModelWeights, Norm
from tailrace.pipeline.model.language_model import LanguageModel, load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.model.weights import read_weights
from tailrace.storage.cache_format import Site
from tailrace.training.architectures import Architecture, Gated, JumpReLU, ReLU, TopK
from tailrace.training.architectures.base import Transcoder
from tests.support.tiny_models import save_tiny_model

WIDTH = 16
D_SAE = 24
TOKENS = torch.tensor([1, 5, 40, 17, 8, 63])
CASES = [
    ("gpt2", "raw"), ("gpt2", "compatibility"), ("neox", "raw"), ("llama", "raw"), ("llama", "compatibility"),
    ("gemma2", "raw"), ("olmo2", "raw"),
]  # fmt: skip
"""Layer norm with biases and learned positions; parallel blocks; RMS norm, grouped values, rotary positions; norms
behind sublayers."""


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="circuit-runs-")


@functools.cache
def tiny_model(
    family: str = "gpt2", processing: Any = "raw", n_layers: int = 3, double: bool = False
) -> tuple[LanguageModel, ModelWeights]:
    """Return a model and its weights, loaded once per process: a test that changes it breaks the others."""
    folder = Path(_folder().name) / f"{family}{n_layers}"
    if not folder.exists():
        save_tiny_model(folder, family, n_layers=n_layers)
    model = load_language_model(ModelSettings(model=str(folder), processing=processing))
    weights = read_weights(model)  # before the change: some families compute norms in float32 whatever they are given
    if double:
        model.bridge.double()
    return model, weights


def mlp_site(layer: int) -> Site:
    return Site(f"layer{layer}", f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.mlp.hook_out", WIDTH, WIDTH, "float32")


def random_transcoder(
    seed: int = 0, *, settings: Architecture | None = None, width: int = WIDTH, d_sae: int = D_SAE
) -> Transcoder:
    transcoder = (settings or TopK(k=4)).build(width, width, d_sae)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in transcoder.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            if name == "log_threshold":
                parameter.sub_(1.5)
    return transcoder.eval().requires_grad_(False)


def mixed_transcoders(layers: Sequence[int] = range(3)) -> dict[Site, Transcoder]:
    """Return a transcoder of another architecture for every layer, some with skip paths."""
    kinds: list[Architecture] = [TopK(k=4, skip=True), Gated(input_bias=True), JumpReLU(skip=True), ReLU()]
    return {mlp_site(layer): random_transcoder(layer, settings=kinds[layer % len(kinds)]) for layer in layers}


@functools.cache
def tiny_run(
    family: str = "gpt2", processing: str = "raw", double: bool = True, layers: tuple[int, ...] = (0, 1, 2)
) -> LinearisedRun:
    """Return the frozen pass of ``TOKENS``, exact in float64 or as the model computes it in float32."""
    model, weights = tiny_model(family, processing, double=double)
    with exact_norms(model.bridge, weights) if double else contextlib.nullcontext():
        return record_run(model.bridge, weights, mixed_transcoders(layers), TOKENS, allow_opaque=len(layers) < 3)


def norms_of(weights: ModelWeights) -> dict[str, Norm]:
    """Return every norm by the name of its module."""
    found = {"ln_final": weights.final_norm}
    for number, layer in enumerate(weights.layers):
        found |= {
            f"blocks.{number}.ln1": layer.norm_attention,
            f"blocks.{number}.ln2": layer.norm_mlp,
            f"blocks.{number}.ln1_post": layer.norm_attention_out,
            f"blocks.{number}.ln2_post": layer.norm_mlp_out,
        }
    return {name: norm for name, norm in found.items() if norm.kind != "none"}


@contextlib.contextmanager
def exact_norms(bridge: Any, weights: ModelWeights) -> Iterator[None]:
    """Let the model compute its norms in float64 inside; transformers rounds to float32 within some."""
    with _norms_replaced(bridge, norms_of(weights), {}):
        yield


def recorded_pass(bridge: Any, weights: ModelWeights) -> dict[str, Tensor]:
    """Return what every hook around a block's parts holds on ``TOKENS``, norms computed exactly."""
    names = [name for name in bridge.hook_dict if name.endswith(("hook_in", "hook_pattern", "hook_out"))]
    with torch.inference_mode(), exact_norms(bridge, weights), observed(bridge.hook_dict, names) as recorded:
        bridge(TOKENS[None], return_type=None, use_cache=False)
    return dict(recorded)


@contextlib.contextmanager
def frozen_pass(bridge: Any, weights: ModelWeights, recorded: Mapping[str, Tensor]) -> Iterator[None]:
    """Hold attention patterns, norm scales and MLP outputs at recorded values, by hook name, while the model runs."""

    def hold(name: str) -> Any:
        return lambda value, *, hook: recorded[name].to(value.dtype)

    names = [name for name in recorded if name.endswith((".attn.hook_pattern", ".mlp.hook_out"))]
    held = [(bridge.hook_dict[name], hold(name)) for name in names]
    with _norms_replaced(bridge, norms_of(weights), recorded), hooked(held):
        yield


@contextlib.contextmanager
def _norms_replaced(bridge: Any, norms: Mapping[str, Norm], recorded: Mapping[str, Tensor]) -> Iterator[None]:
    inputs: dict[str, Tensor] = {}

    def remember(name: str) -> Any:
        return lambda value, *, hook: inputs.__setitem__(name, value)

    def compute(name: str, norm: Norm) -> Any:
        def replace(value: Tensor, *, hook: Any) -> Tensor:
            x = inputs[name]
            gain, bias = (None if one is None else one.to(x.dtype) for one in (norm.weight, norm.bias))
            as_run = dataclasses.replace(norm, weight=gain, bias=bias)
            return apply_norm(as_run, x, norm_scale(norm, recorded.get(f"{name}.hook_in", x)))

        return replace

    functions = []
    for name, norm in norms.items():
        functions.append((bridge.hook_dict[f"{name}.hook_in"], remember(name)))
        functions.append((bridge.hook_dict[f"{name}.hook_out"], compute(name, norm)))
    with hooked(functions):
        yield


def first_active(run: LinearisedRun, layer: int, token: int = 5) -> int:
    active = run.transcoders[layer]
    return int(active.feature[active.at(token)][0])


def feature(layer: int, index: int, token: int = 5) -> Node:
    return Node(Kind.FEATURE, layer, token, index)


def path(*steps: tuple[Node, float]) -> CircuitPath:
    """Return a path of given nodes and values; what its steps read is made up."""
    probes = {Kind.FEATURE: Part.MID, Kind.HEAD: Part.PRE}
    return tuple(
        Step(node, Probe(node.layer or 0, probes.get(node.kind, Part.PRE), node.token or 0, torch.ones(2)), value)
        for node, value in steps
    )


ROOT, A, B, H = feature(2, 7), feature(1, 4), feature(0, 1), Node(Kind.HEAD, 1, 3, 2)
