"""Decisions that need the model and a first look at its activations: storage dtype, shard size, what to expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.pipeline.model.same_model import list_model_differences
from tailrace.pipeline.model.sites import SiteHooks
from tailrace.storage.cache_format import PROVENANCE, CacheFormat, Site
from tailrace.storage.differences import list_differences
from tailrace.storage.encodings import column_scale_of
from tailrace.storage.errors import ArtifactMismatch, NonFiniteActivation

CHUNK_ROWS = 4096
LARGEST_SHARD_ROWS = 262_144
SMALLEST_UNITS = 8
UNIT_MEMORY_BYTES = 1 << 30
"""A unit's memory; two are held while caching."""
BLOCK_TOKENS = 1 << 19
PROBE_BATCHES = 16
PROBE_SHARE = 0.02
FLOAT16_SAFE = 8192.0
"""Largest probed magnitude at which float16 is chosen: an eighth of what it can hold."""


@dataclass(frozen=True)
class CachePlan:
    """Everything fixed before the first unit, kept in the draft so that a later run continues with the same."""

    layout: CacheFormat
    hooks: tuple[SiteHooks, ...]
    facts: dict[str, Any]
    """Goes into the manifest: model, text, packing, grid."""

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON."""
        return {"layout": self.layout.as_json(), "hooks": [list(hook) for hook in self.hooks], "facts": self.facts}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Return the plan written by ``as_json``."""
        hooks = tuple(SiteHooks(*hook) for hook in value["hooks"])
        return cls(CacheFormat.from_json(value["layout"]), hooks, value["facts"])


def context_format(settings: CacheSettings) -> CacheFormat:
    """Return the part of the format that contexts need, known before any activation is seen."""
    block = max(BLOCK_TOKENS // settings.context_length, settings.contexts_per_batch)
    return CacheFormat((), settings.context_length, 1, 1, "none", block)


def complete_format(
    settings: CacheSettings,
    contexts: CacheFormat,
    hooks: Sequence[SiteHooks],
    widths: Mapping[str, tuple[int, int]],
    dtypes: Mapping[str, str],
    scales: Mapping[str, list[float]],
    n_rows: int,
) -> CacheFormat:
    """Return the format of the whole cache, shard and chunk sizes chosen where they are ``auto``."""
    sites = tuple(Site(hook.name, hook.hook_in, hook.hook_out, *widths[hook.name], dtypes[hook.name]) for hook in hooks)
    shard_rows, chunk_rows = choose_rows(settings, sites, n_rows)
    return CacheFormat(
        sites,
        contexts.context_length,
        shard_rows,
        chunk_rows,
        settings.compression,
        contexts.block_contexts,
        dict(scales),
    )


def choose_rows(settings: CacheSettings, sites: Sequence[Site], n_rows: int) -> tuple[int, int]:
    """Return (shard_rows, chunk_rows): a power of two that fits the unit's memory and gives small caches 8 units."""
    chunk = settings.chunk_rows
    shard = settings.shard_rows
    if shard == "auto":
        smallest = CHUNK_ROWS if chunk == "auto" else chunk
        row_bytes = sum(site.row_bytes for site in sites)
        wanted = min(LARGEST_SHARD_ROWS, n_rows // SMALLEST_UNITS, UNIT_MEMORY_BYTES // row_bytes)
        shard = smallest
        while shard * 2 <= wanted:
            shard *= 2
    if chunk == "auto":
        chunk = shard if shard < CHUNK_ROWS or shard % CHUNK_ROWS else CHUNK_ROWS
    return shard, chunk


def fixed_dtype(storage_dtype: str, model_dtype: torch.dtype) -> str | None:
    """Return the storage dtype that a setting means, or None where a probe of the activations has to decide."""
    if storage_dtype != "auto":
        return storage_dtype
    return {torch.bfloat16: "bfloat16", torch.float16: "float16"}.get(model_dtype)


@dataclass
class Probe:
    """What the first batches showed of each hook."""

    largest: dict[str, float]
    total_squares: dict[str, np.ndarray]
    n_rows: int = 0


def probe_batches(settings: CacheSettings, n_contexts: int) -> int:
    """Return how many batches to probe: 16, fewer where that would be more than 2 % of the contexts."""
    n_batches = -(-n_contexts // settings.contexts_per_batch)
    return max(1, min(PROBE_BATCHES, int(n_batches * PROBE_SHARE)))


def probe(model: LanguageModel, hooks: Sequence[SiteHooks], batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> Probe:
    """Return magnitudes at every hook over batches of (tokens, kept positions), both (contexts, context_length).

    Raises NonFiniteActivation: a model that overflows in its own dtype cannot be cached in any.
    """
    seen = Probe({}, {})
    for tokens, kept in batches:
        captured = model.capture(torch.from_numpy(tokens.astype(np.int64)), hooks)
        mask = torch.from_numpy(kept).to(model.device)
        seen.n_rows += int(kept.sum())
        for name, values in captured.items():
            rows = values[mask].to(torch.float64)
            largest = float(rows.abs().max())
            if not np.isfinite(largest):
                raise NonFiniteActivation(
                    f"{name}: NaN or infinity in the first batches; the model overflows in {model.dtype}. "
                    "Run it with --model-dtype float32, or leave this site out"
                )
            seen.largest[name] = max(seen.largest.get(name, 0.0), largest)
            squares = (rows**2).sum(0).cpu().numpy()
            seen.total_squares[name] = seen.total_squares.get(name, 0.0) + squares
    return seen


def choose_dtypes(hooks: Sequence[SiteHooks], fixed: str | None, seen: Probe | None) -> dict[str, str]:
    """Return the storage dtype of each site: as fixed, else float16 where the probe stayed small, else bfloat16."""
    if fixed is not None:
        return {hook.name: fixed for hook in hooks}
    assert seen is not None, "auto storage dtype of a float32 model is decided by a probe"
    largest = {hook.name: max(seen.largest[hook.hook_in], seen.largest[hook.hook_out]) for hook in hooks}
    return {name: "float16" if value < FLOAT16_SAFE else "bfloat16" for name, value in largest.items()}


def choose_scales(hooks: Sequence[SiteHooks], dtypes: Mapping[str, str], seen: Probe | None) -> dict[str, list[float]]:
    """Return the int8 column scales by ``site/side``."""
    scales = {}
    for hook in hooks:
        if dtypes[hook.name] == "int8":
            assert seen is not None, "int8 needs a probe for its column scales"
            for side, name in hook.sides.items():
                scale = column_scale_of(seen.total_squares[name], seen.n_rows)
                scales[f"{hook.name}/{side}"] = [float(value) for value in scale]
    return scales


def refuse_other_inputs(path: str, recorded: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise ArtifactMismatch where the model or the text is not the one the cache was begun with."""
    differences = list_differences(*({k: v for k, v in side.items() if k != "model"} for side in (recorded, found)))
    if "model" in found:
        differences += [f"model.{line}" for line in list_model_differences(recorded["model"], found["model"])]
    if differences:
        raise ArtifactMismatch(
            f"{path}: was made from another model or text; use the recorded one, or another --out:\n"
            + "\n".join(f"  {line}" for line in differences)
        )


def row_bytes_of(sites: Sequence[Site]) -> int:
    """Return the bytes of one row over all arrays, provenance included."""
    provenance = {"int32": 4, "uint32": 4, "uint16": 2}
    return sum(site.row_bytes for site in sites) + sum(provenance[dtype] for dtype in PROVENANCE.values())
