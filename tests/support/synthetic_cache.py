"""Caches of made-up activations, written by the real writer without a language model."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tailrace.storage.activation_cache import ActivationCache, open_cache
from tailrace.storage.artifact import REQUEST, canonical_json, write_atomically
from tailrace.storage.bfloat16 import float32_to_bits
from tailrace.storage.cache_format import SPLITS, VOCABULARY, CacheFormat, Site, pieces
from tailrace.storage.cache_publish import Change, Generation, SplitSize, keep_superseded, publish_generation
from tailrace.storage.cache_writer import UnitBuffer, write_context_block
from tailrace.storage.formats import Compression
from tailrace.storage.layout import column_scale_of

Rows = Callable[[np.ndarray, str], np.ndarray]
"""(row identity (n, 3) = split, context, position; key) → float32 rows (n, width)."""

VOCABULARY_SIZE = 50


def hashed_rows(width: int) -> Rows:
    """Return activations that are a fixed function of where a row comes from, so any mix-up shows."""

    def rows(identity: np.ndarray, key: str) -> np.ndarray:
        code = identity[:, 0] * 7919 + identity[:, 1] * 131 + identity[:, 2]
        phase = code[:, None] * 0.37 + np.arange(width)[None, :] * (1.0 if key.endswith("/in") else 1.7)
        return (np.sin(phase) * 3 + 0.25).astype(np.float32)

    return rows


def write_synthetic_cache(
    path: Path,
    *,
    n_contexts: int = 40,
    n_heldout_contexts: int = 8,
    context_length: int = 16,
    widths: Sequence[tuple[str, int, int]] = (("layer0", 8, 8),),
    dtype: str = "float32",
    shard_rows: int = 128,
    chunk_rows: int = 32,
    bucket_rows: int | None = None,
    compression: Compression = "none",
    rows: Rows | None = None,
    seed: int = 0,
    contexts_per_document: int = 2,
    sae: bool = False,
) -> ActivationCache:
    """Write and publish a cache with the first position of every context left out, as BOS is."""
    sites = tuple(
        Site(name, f"{name}.in", f"{name}.in" if sae else f"{name}.out", d_in, d_out, dtype)
        for name, d_in, d_out in widths
    )
    layout = CacheFormat(sites, context_length, shard_rows, chunk_rows, compression, block_contexts=16)
    if dtype == "int8":
        layout = _with_column_scales(layout, rows)
    path.mkdir(parents=True, exist_ok=True)
    request = {"synthetic": True, "seed": seed}
    write_atomically(path / REQUEST, canonical_json(request))
    contexts = {"train": n_contexts, "heldout": n_heldout_contexts}
    splits = {split: _size(layout, n) for split, n in contexts.items() if n}
    for split in splits:
        text = _Text(split, contexts[split], context_length, contexts_per_document)
        _run(_write_contexts(path, layout, 0, text, 0))
        _run(_write_units(path, layout, 0, text, rows, seed, 0))
    vocabulary = canonical_json({"tokens": [f" token{i}" for i in range(VOCABULARY_SIZE)]})
    generation = Generation(path, 0, "create", layout, seed, bucket_rows, splits, None)
    facts = {"model": {"name": "synthetic"}, "text": {"dataset": "synthetic"}}
    publish_generation(generation, request, facts, {VOCABULARY: vocabulary})
    return open_cache(path)


def extend_in_steps(
    path: Path, *, n_contexts: int, rows: Rows | None = None, contexts_per_document: int = 2
) -> Iterator[str]:
    """Publish a generation with more training contexts; stop after every write, naming it."""
    cache = open_cache(path)
    number, layout, train = cache.generation + 1, cache.layout, cache.split("train")
    keep_superseded(cache)
    yield "kept what will be replaced"
    text = _Text("train", n_contexts, layout.context_length, contexts_per_document)
    yield from _write_contexts(path, layout, number, text, train.n_contexts // layout.block_contexts)
    yield from _write_units(path, layout, number, text, rows, cache.seed, train.n_rows // layout.shard_rows)
    splits = {**_sizes(cache), "train": _size(layout, n_contexts)}
    _publish_growth(cache, "extend", layout, splits)
    yield "published"


def widen_in_steps(
    path: Path, *, widths: Sequence[tuple[str, int, int]], dtype: str = "float32", rows: Rows | None = None
) -> Iterator[str]:
    """Publish a generation with more sites for the same rows; stop after every write, naming it."""
    cache = open_cache(path)
    number = cache.generation + 1
    sites = tuple(Site(name, f"{name}.in", f"{name}.out", d_in, d_out, dtype) for name, d_in, d_out in widths)
    added = replace(cache.layout, sites=sites, column_scales={})
    for split, size in _sizes(cache).items():
        text = _Text(split, size.n_contexts, added.context_length, 2)
        yield from _write_units(path, added, number, text, rows, cache.seed, 0, with_provenance=False)
    _publish_growth(cache, "widen", replace(cache.layout, sites=(*cache.layout.sites, *sites)), _sizes(cache))
    yield "published"


def expected_rows(cache: ActivationCache, identity: np.ndarray, key: str, rows: Rows | None = None) -> np.ndarray:
    """Return the float32 activations that rows of this identity were given before storing."""
    width = cache.layout.encodings()[key].width
    return (rows or hashed_rows(width))(identity, key)


def memory_directory() -> tempfile.TemporaryDirectory[str]:
    """Return a new directory in memory where the system has one: syncing costs nothing there."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


def _run(steps: Iterator[str]) -> None:
    for _ in steps:
        pass


def _size(layout: CacheFormat, n_contexts: int) -> SplitSize:
    n_rows = n_contexts * (layout.context_length - 1)
    return SplitSize(n_rows, n_contexts, {"rows": n_rows, "contexts": n_contexts})


def _sizes(cache: ActivationCache) -> dict[str, SplitSize]:
    return {split: _size(cache.layout, cache.split(split).n_contexts) for split in cache.manifest.splits}


def _publish_growth(
    cache: ActivationCache, change: Change, layout: CacheFormat, splits: Mapping[str, SplitSize]
) -> None:
    generation = Generation(cache.path, cache.generation + 1, change, layout, cache.seed, None, splits, cache.manifest)
    facts = cache.manifest.model_dump(include={"model", "text"})
    publish_generation(generation, cache.manifest.request, facts, {})


class _Text:
    """The contexts of one split, a function of their number alone, without the first position."""

    def __init__(self, split: str, n_contexts: int, length: int, contexts_per_document: int) -> None:
        self.split = split
        number = SPLITS.index(split)
        contexts = np.arange(n_contexts)
        tokens = (contexts[:, None] * 7 + np.arange(length)[None, :] * 3) % VOCABULARY_SIZE
        self.tokens = tokens.astype(np.int32)
        documents = np.repeat((contexts // contexts_per_document)[:, None], length, 1).astype(np.uint32)
        self.documents = documents + np.uint32(number * 1000)
        context, position = (part.ravel() for part in np.meshgrid(contexts, np.arange(1, length), indexing="ij"))
        self.identity = np.stack([np.full_like(context, number), context, position], 1)
        self.provenance: dict[str, np.ndarray] = {
            "token_id": self.tokens[context, position],
            "context": context.astype(np.uint32),
            "position": position.astype(np.uint16),
            "document": self.documents[context, position],
        }


def _write_contexts(path: Path, layout: CacheFormat, generation: int, text: _Text, first: int) -> Iterator[str]:
    n_blocks = len(pieces(len(text.tokens), layout.block_contexts))
    for block in range(first, n_blocks):
        piece = slice(block * layout.block_contexts, (block + 1) * layout.block_contexts)
        arrays = {"tokens": text.tokens[piece], "documents": text.documents[piece]}
        write_context_block(path, layout, generation, text.split, block, arrays)
        yield f"wrote block {block}"


def _write_units(
    path: Path,
    layout: CacheFormat,
    generation: int,
    text: _Text,
    rows: Rows | None,
    seed: int,
    first: int,
    *,
    with_provenance: bool = True,
) -> Iterator[str]:
    buffer = UnitBuffer(layout, with_provenance=with_provenance)
    for unit in range(first, len(pieces(len(text.identity), layout.shard_rows))):
        start = unit * layout.shard_rows
        stop = min(start + layout.shard_rows, len(text.identity))
        buffer.begin(seed, text.split, unit, stop - start)
        # in two pieces, as batches of a language model would come
        for piece in (slice(start, (start + stop) // 2), slice((start + stop) // 2, stop)):
            activations = {
                key: store_as((rows or hashed_rows(encoding.width))(text.identity[piece], key), encoding.dtype)
                for key, encoding in layout.encodings().items()
            }
            buffer.fill({name: values[piece] for name, values in text.provenance.items()}, activations)
        buffer.commit(path, generation)
        yield f"wrote unit {unit}"


def store_as(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return float32 values as the writer wants them for a storage dtype."""
    if dtype == "bfloat16":
        return float32_to_bits(values)
    return values.astype(np.float16) if dtype == "float16" else values


def _with_column_scales(layout: CacheFormat, rows: Rows | None) -> CacheFormat:
    identity = np.stack([np.zeros(64, int), np.arange(64), np.arange(64)], 1)
    scales = {}
    for key, encoding in layout.encodings().items():
        sample = (rows or hashed_rows(encoding.width))(identity, key).astype(np.float64)
        scales[key] = column_scale_of((sample**2).sum(0), len(sample)).tolist()
    return replace(layout, column_scales=scales)


def running_threads() -> set[threading.Thread]:
    """Return what runs, but for the threads that zarr starts when it first reads and keeps for the process."""
    return {thread for thread in threading.enumerate() if not thread.name.startswith(("asyncio", "zarr"))}
