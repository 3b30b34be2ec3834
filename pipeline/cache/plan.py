"""Decisions that need the model and a first look at its activations: storage dtype, shard size, what to expect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from tailrace.pipeline.cache.rows import RowMaker
from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.pipeline.model.sites import SiteHooks
from tailrace.pipeline.text.settings import CapturedContexts
from tailrace.storage.cache_format import CHUNK_CONTEXTS, PROVENANCE, CacheFormat, Site
from tailrace.storage.layout import FLOAT16_NORMAL, column_scale_of

CHUNK_ROWS = 4096
LARGEST_SHARD_ROWS = 262_144
SMALLEST_UNITS = 8
UNIT_MEMORY_BYTES = 1 << 30
"""A unit's memory; two are held while caching."""
BLOCK_TOKENS = 1 << 19
PROBE_BATCHES = 16
PROBE_SHARE = 0.02
FLOAT16_SAFE = 8192.0
"""Largest probed magnitude at which float16 is chosen: an eighth of what it can hold. At the other end, no probed row
may be so small that float16 rounds it to few digits (``FLOAT16_NORMAL``)."""

FirstBatch = tuple[np.ndarray, np.ndarray, int]
"""Tokens and documents (contexts, context_length), and the number of the first context."""


def context_format(settings: CacheSettings) -> CacheFormat:
    """Return the part of the format that contexts need, known before any activation is seen."""
    block = max(BLOCK_TOKENS // settings.context_length, settings.contexts_per_batch)
    if block > CHUNK_CONTEXTS:
        block = -(-block // CHUNK_CONTEXTS) * CHUNK_CONTEXTS  # Zarr cuts a shard into equal chunks
    return CacheFormat((), settings.context_length, 1, 1, "none", block)


def complete_format(
    settings: CacheSettings, contexts: CacheFormat, sites: tuple[Site, ...], scales: dict[str, list[float]], n_rows: int
) -> CacheFormat:
    """Return the format of the whole cache, shard and chunk sizes chosen where they are ``auto``."""
    shard_rows, chunk_rows = choose_rows(settings, sites, n_rows)
    return replace(
        contexts,
        sites=sites,
        shard_rows=shard_rows,
        chunk_rows=chunk_rows,
        compression=settings.compression,
        column_scales=scales,
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


def probe_batches(settings: CacheSettings, n_contexts: int) -> int:
    """Return how many batches to probe: 16, fewer where that would be more than 2 % of the contexts."""
    n_batches = -(-n_contexts // settings.contexts_per_batch)
    return max(1, min(PROBE_BATCHES, int(n_batches * PROBE_SHARE)))


def choose_sites(
    settings: CapturedContexts,
    storage_dtype: str,
    model: LanguageModel,
    hooks: Sequence[SiteHooks],
    first_batches: Callable[[], Iterable[FirstBatch]],
) -> tuple[tuple[Site, ...], dict[str, list[float]]]:
    """Return the sites of ``hooks`` with their storage dtypes, and the int8 column scales by ``site/side``.

    The dtype is as asked for or as the model computes; else float16 where the first batches stay between its limits,
    bfloat16 where a value is large, or a row so small that float16 would round it to few digits. Raises
    NonFiniteActivation: a model that overflows in its own dtype cannot be stored in any.
    """
    widths = model.widths(hooks)
    wide = [Site(*hook, *widths[hook.name], "float32") for hook in hooks]
    fixed = fixed_dtype(storage_dtype, model.dtype)
    if fixed not in (None, "int8"):
        return tuple(replace(site, dtype=fixed) for site in wide), {}
    maker = RowMaker(model, wide, settings.rows_of(model), settings.contexts_per_batch)
    largest, smallest = dict.fromkeys(widths, 0.0), dict.fromkeys(widths, float("inf"))
    squares, n_rows = dict[str, np.ndarray](), 0
    for batch in first_batches():
        rows = maker.rows(*batch)
        n_rows += len(rows)
        for key, values in rows.activations.items():
            exact, name = values.to(torch.float64), key.rpartition("/")[0]
            largest[name] = max(largest[name], float(exact.abs().max()) if len(exact) else 0.0)
            sizes = (exact**2).mean(1)
            smallest[name] = min([smallest[name], *sizes[sizes > 0].sqrt().tolist()])
            squares[key] = squares.get(key, 0.0) + (exact**2).sum(0).numpy()
    if fixed:
        scales = {key: column_scale_of(total, n_rows).tolist() for key, total in squares.items()}
        return tuple(replace(site, dtype=fixed) for site in wide), scales
    is_safe = {name: largest[name] < FLOAT16_SAFE and smallest[name] >= FLOAT16_NORMAL for name in widths}
    dtypes = {name: "float16" if safe else "bfloat16" for name, safe in is_safe.items()}
    return tuple(replace(site, dtype=dtypes[site.name]) for site in wide), {}


def row_bytes_of(sites: Sequence[Site]) -> int:
    """Return the bytes of one row over all arrays, provenance included."""
    provenance = {"int32": 4, "uint32": 4, "uint16": 2}
    return sum(site.row_bytes for site in sites) + sum(provenance[dtype] for dtype in PROVENANCE.values())
