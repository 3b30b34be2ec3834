"""Cross-layer transcoders with weights the test chooses, published as training would; no language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tailrace.storage.cache_format import Site
from tailrace.storage.draft import Draft
from tailrace.storage.formats import ARTIFACT_FORMATS, CROSS_LAYER_KIND
from tailrace.training.architectures import JumpReLU, ReLU
from tailrace.training.architectures.manifest import WEIGHTS
from tailrace.training.architectures.transcoder import save_weights
from tailrace.training.cross_layer.stack import CrossLayerTranscoder
from tests.support.layered_transcoders import MODEL, WIDTH, mlp_site

N_LAYERS, D_SAE = 3, 24
INPUTS = torch.randn(200, N_LAYERS * WIDTH, generator=torch.Generator().manual_seed(5))


def random_cross_layer(
    *, width: int = WIDTH, n_layers: int = N_LAYERS, seed: int = 0, relu: bool = False
) -> CrossLayerTranscoder:
    """Return one with random weights everywhere and decoder rows of unit norm; ``relu`` has thresholds of zero."""
    module = CrossLayerTranscoder(n_layers, width, width, D_SAE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        if relu:
            module.log_threshold.fill_(-torch.inf)
        module.constrain_parameters()
    return module.eval().requires_grad_(False)


def publish_cross_layer(
    path: Path,
    module: CrossLayerTranscoder,
    sites: Sequence[Site] | None = None,
    *,
    model: dict[str, Any] | None = None,
) -> Path:
    """Publish it at ``sites``, by default the MLPs of layers from 0 on, of a model that has no more layers."""
    chosen = [mlp_site(layer) for layer in range(module.n_layers)] if sites is None else sites
    with Draft(path, CROSS_LAYER_KIND, {"test": str(path)}) as draft:
        save_weights(path / WEIGHTS, module)
        draft.publish(
            {
                "format": ARTIFACT_FORMATS[CROSS_LAYER_KIND],
                "inputs": {},
                "model": {**MODEL, "n_layers": module.n_layers} if model is None else model,
                "sites": [asdict(site) for site in chosen],
                "d_sae": module.features_per_layer,
                "architecture": (JumpReLU() if bool(module.thresholds().any()) else ReLU()).model_dump(mode="json"),
                "metrics": {"steps": 1, "rows": 1},
                "layers": [],
            },
            [WEIGHTS],
        )
    return path


def by_their_formula(folder: Path, inputs: Tensor) -> Tensor:
    """Return outputs (rows, layers · width) of inputs (rows, layers · width), layer after layer as circuit-tracer."""
    n_layers = len(list(folder.glob("W_enc_*.safetensors")))
    parts = inputs.unflatten(1, (n_layers, -1))
    outputs = torch.zeros_like(parts)
    for layer in range(n_layers):
        encoder = load_file(folder / f"W_enc_{layer}.safetensors")
        decoder = load_file(folder / f"W_dec_{layer}.safetensors")[f"W_dec_{layer}"]
        pre = parts[:, layer] @ encoder[f"W_enc_{layer}"].T + encoder[f"b_enc_{layer}"]
        threshold = encoder.get(f"threshold_{layer}")
        acts = pre.relu() if threshold is None else pre * (pre > threshold)
        outputs[:, layer] += encoder[f"b_dec_{layer}"]
        outputs[:, layer:] += torch.einsum("rf,fld->rld", acts, decoder)
    return outputs.flatten(1)
