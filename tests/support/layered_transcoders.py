"""Caches and published transcoders at the MLPs of named layers, with weights the test chooses; no language model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tailrace.storage.artifact import canonical_json
from tailrace.storage.cache_format import VOCABULARY, CacheFormat, Site
from tailrace.storage.cache_publish import Generation, SplitSize, publish_generation
from tailrace.storage.cache_writer import UnitBuffer
from tailrace.storage.draft import Draft
from tailrace.training.architectures import Architecture
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.manifest import FORMAT_VERSION, KIND, WEIGHTS
from tailrace.training.architectures.transcoder import save_weights
from tests.support.training_caches import random_rows

WIDTH = 8
CONTEXT_LENGTH = 8
SHARD_ROWS = 256
MODEL: dict[str, Any] = {
    "name": "tiny-gpt2", "architecture": "GPT2LMHeadModel", "processing": "raw", "n_layers": 2, "d_model": WIDTH,
}  # fmt: skip


def mlp_site(layer: int, d_in: int = WIDTH, d_out: int = WIDTH) -> Site:
    block = f"blocks.{layer}.mlp"
    return Site(f"layer{layer}", f"{block}.hook_in", f"{block}.hook_out", d_in, d_out, "float32")


def sae_site(layer: int, width: int = WIDTH) -> Site:
    hook = f"blocks.{layer}.mlp.hook_out"
    return Site(hook, hook, hook, width, width, "float32")


def publish_site_cache(path: Path, sites: list[Site], *, model: dict[str, Any] = MODEL, n_rows: int = 512) -> Path:
    """Publish rows of every site: ``n_rows`` to train on, half as many held out."""
    layout = CacheFormat(tuple(sites), CONTEXT_LENGTH, SHARD_ROWS, 64, "none", 64)
    sizes = {}
    for seed, (split, size) in enumerate({"train": n_rows, "heldout": n_rows // 2}.items()):
        rows: dict[str, np.ndarray] = {}
        for number, site in enumerate(sites):
            inputs, outputs = random_rows(10 * seed + number, size, site.d_in, site.d_out)
            rows |= {f"{site.name}/in": inputs, f"{site.name}/out": outputs}
        _write(path, layout, split, {key: rows[key] for key in layout.encodings()}, size)
        sizes[split] = SplitSize(size, 0, {})
    generation = Generation(path, 0, "create", layout, 0, None, sizes, None)
    vocabulary = canonical_json({"tokens": ["<eos>", "the"]})
    request = {"sites": [site.name for site in sites], "model": model}
    publish_generation(generation, request, {"model": model, "text": {}}, {VOCABULARY: vocabulary})
    return path


def _write(path: Path, layout: CacheFormat, split: str, rows: dict[str, np.ndarray], n_rows: int) -> None:
    buffer = UnitBuffer(layout)
    for unit, start in enumerate(range(0, n_rows, SHARD_ROWS)):
        index = np.arange(start, min(start + SHARD_ROWS, n_rows))
        buffer.begin(0, split, unit, len(index))
        provenance: dict[str, np.ndarray] = {
            "token_id": np.ones(len(index), np.int32),
            "context": (index // CONTEXT_LENGTH).astype(np.uint32),
            "position": (index % CONTEXT_LENGTH).astype(np.uint16),
            "document": (index // CONTEXT_LENGTH).astype(np.uint32),
        }
        buffer.fill(provenance, {key: values[index] for key, values in rows.items()})
        buffer.commit(path, 0)


def random_transcoder(architecture: Architecture, site: Site, d_sae: int = 24, seed: int = 0) -> Transcoder:
    """Return a folded transcoder with random weights in every parameter; decoder rows have unit norm."""
    module = architecture.build(site.d_in, site.d_out, d_sae)
    module.b_dec = None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        module.W_dec.div_(module.W_dec.norm(dim=1, keepdim=True))
        for name, buffer in module.named_buffers():
            assert name == "threshold"
            buffer.fill_(0.8)
    return module.eval().requires_grad_(False)


def publish_transcoder(
    path: Path,
    module: Transcoder,
    architecture: Architecture,
    site: Site,
    *,
    model: dict[str, Any] = MODEL,
    inputs: dict[str, Any] | None = None,
) -> Path:
    """Publish a transcoder as training would."""
    recorded = {"architecture": architecture.model_dump(mode="json"), "site": asdict(site)}
    with Draft(path, KIND, {"test": str(path), **recorded}) as draft:
        save_weights(path / WEIGHTS, module)
        draft.publish(
            {
                "format": FORMAT_VERSION,
                "model": model,
                "inputs": inputs or {},
                **recorded,
                "d_sae": module.d_sae,
                "metrics": {"steps": 1, "rows": 1},
            },
            [WEIGHTS],
        )
    return path
