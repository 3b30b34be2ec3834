"""Small published caches whose rows the test chooses: what training reads, without a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tailrace.storage.artifact import canonical_json
from tailrace.storage.cache_format import VOCABULARY, CacheFormat, Site
from tailrace.storage.cache_publish import Generation, SplitSize, publish_generation
from tailrace.storage.cache_writer import UnitBuffer

CONTEXT_LENGTH = 8
SHARD_ROWS = 256


def publish_cache(
    path: Path,
    sites: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]],
    *,
    dtype: str = "float32",
    model: str = "tiny",
) -> Path:
    """Publish ``{site: {split: (inputs, outputs)}}``; an SAE site is one whose outputs are the same array object."""
    described = []
    for name, splits in sites.items():
        inputs, outputs = next(iter(splits.values()))
        hook_out = f"{name}.in" if outputs is inputs else f"{name}.out"
        described.append(Site(name, f"{name}.in", hook_out, inputs.shape[1], outputs.shape[1], dtype))
    layout = CacheFormat(tuple(described), CONTEXT_LENGTH, SHARD_ROWS, 64, "none", 64)
    sizes = {}
    for split in next(iter(sites.values())):
        rows = {}
        for name, by_split in sites.items():
            rows[f"{name}/in"], rows[f"{name}/out"] = by_split[split]
        n_rows = len(next(iter(rows.values())))
        _write_rows(path, layout, split, {key: rows[key] for key in layout.encodings()}, n_rows)
        sizes[split] = SplitSize(n_rows, 0, {})
    generation = Generation(path, 0, "create", layout, 0, None, sizes, None)
    vocabulary = canonical_json({"tokens": ["<eos>", "the"]})
    facts = {"model": {"name": model}, "text": {}}
    publish_generation(generation, {"rows": str(sites.keys())}, facts, {VOCABULARY: vocabulary})
    return path


def _write_rows(path: Path, layout: CacheFormat, split: str, rows: dict[str, np.ndarray], n_rows: int) -> None:
    buffer = UnitBuffer(layout)
    for unit, start in enumerate(range(0, n_rows, SHARD_ROWS)):
        stop = min(start + SHARD_ROWS, n_rows)
        index = np.arange(start, stop)
        buffer.begin(0, split, unit, stop - start)
        provenance: dict[str, np.ndarray] = {
            "token_id": np.ones(len(index), np.int32),
            "context": (index // CONTEXT_LENGTH).astype(np.uint32),
            "position": (index % CONTEXT_LENGTH).astype(np.uint16),
            "document": (index // CONTEXT_LENGTH).astype(np.uint32),
        }
        buffer.fill(provenance, {key: values[start:stop] for key, values in rows.items()})
        buffer.commit(path, 0)


def random_rows(seed: int, n_rows: int, d_in: int, d_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Return correlated inputs and outputs: outputs are a fixed nonlinear map of inputs, far from zero mean."""
    fixed = np.random.Generator(np.random.Philox(0)).standard_normal((d_in, d_out))
    inputs = np.random.Generator(np.random.Philox(seed)).standard_normal((n_rows, d_in))
    outputs = 3 * np.maximum(inputs @ fixed, 0) + 5
    return inputs.astype(np.float32), outputs.astype(np.float32)


def small_cache(path: Path, *, n_rows: int = 640, d_in: int = 6, d_out: int = 5) -> Path:
    """Publish one site ``mlp`` of ``n_rows`` training rows and 96 held-out rows."""
    splits = {"train": random_rows(1, n_rows, d_in, d_out), "heldout": random_rows(2, 96, d_in, d_out)}
    return publish_cache(path, {"mlp": splits})


N_TRAIN, N_HELDOUT = 1280, 192
"""Rows of a cache of two layers."""


def hooks(layer: int) -> str:
    return f"blocks.{layer}.mlp"


def rows_of_layers(seed: int, n_rows: int, *, massive: bool = False) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Two layers: the second one's output is half a function of its own input and half of the first one's."""
    first_in, first_out = random_rows(seed, n_rows, 6, 6)
    second_in, own = random_rows(seed + 1000, n_rows, 6, 6)
    second_out = ((own + first_out) * 20).astype(np.float32)
    if massive:
        first_out = first_out.copy()
        first_out[::64] *= 1000
    return {hooks(0): (first_in, first_out), hooks(1): (second_in, second_out)}


def publish_layers(path: Path, **arguments: Any) -> Path:
    train_rows, heldout = rows_of_layers(1, N_TRAIN, **arguments), rows_of_layers(2, N_HELDOUT, **arguments)
    return publish_cache(path, {name: {"train": train_rows[name], "heldout": heldout[name]} for name in train_rows})
