"""Activations made up for measuring bytes: shaped like a transformer's, without running one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tailrace.storage.activation_cache import ActivationCache, open_cache
from tailrace.storage.artifact import REQUEST, canonical_json, write_atomically
from tailrace.storage.bfloat16 import float32_to_bits
from tailrace.storage.cache_format import VOCABULARY, CacheFormat, Site
from tailrace.storage.cache_publish import Generation, SplitSize, publish_generation
from tailrace.storage.cache_writer import UnitBuffer, write_context_block
from tailrace.storage.statistics import SiteStatistics

CONTEXT_LENGTH = 128
SITE = "layer8"
KEYS = (f"{SITE}/in", f"{SITE}/out")


def cache_format(
    width: int = 768, *, shard_rows: int = 262_144, chunk_rows: int = 4096, dtype: str = "bfloat16"
) -> CacheFormat:
    """Return the format of a cache with one site of equal widths on both sides."""
    site = Site(SITE, "blocks.8.mlp.hook_in", "blocks.8.mlp.hook_out", width, width, dtype)
    return CacheFormat((site,), CONTEXT_LENGTH, shard_rows, chunk_rows, "none", block_contexts=1024)


class RowPool:
    """Batches of rows as a language model would hand them over, cycling through a pool made once.

    The pool is larger than what a core keeps close, so filling from it reads memory as filling from fresh
    activations would.
    """

    def __init__(self, layout: CacheFormat, batch_rows: int = 4096, n_batches: int = 8) -> None:
        self.batch_rows, self._layout = batch_rows, layout
        generator = np.random.Generator(np.random.Philox(7))
        self._batches = [
            {key: self._make(generator, encoding.width) for key, encoding in layout.encodings().items()}
            for _ in range(n_batches)
        ]

    def _make(self, generator: np.random.Generator, width: int) -> np.ndarray:
        scales = np.exp(generator.standard_normal(width)).astype(np.float32)
        rows = generator.standard_normal((self.batch_rows, width), np.float32) * scales
        (site,) = self._layout.sites
        return float32_to_bits(rows) if site.dtype == "bfloat16" else rows.astype(site.dtype)

    def batches(self, first_row: int, n_rows: int) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
        """Yield (provenance, activations) of rows [first_row, first_row + n_rows), a batch at a time."""
        for start in range(first_row, first_row + n_rows, self.batch_rows):
            n = min(self.batch_rows, first_row + n_rows - start)
            row = np.arange(start, start + n)
            activations = self._batches[start // self.batch_rows % len(self._batches)]
            yield provenance_of(row), {key: values[:n] for key, values in activations.items()}


def provenance_of(row: np.ndarray) -> dict[str, np.ndarray]:
    """Return where rows of these indices come from, every position of a context being kept."""
    return {
        "token_id": (row % 50_000).astype(np.int32),
        "context": (row // CONTEXT_LENGTH).astype(np.uint32),
        "position": (row % CONTEXT_LENGTH).astype(np.uint16),
        "document": (row // (8 * CONTEXT_LENGTH)).astype(np.uint32),
    }


def fill_unit(buffer: UnitBuffer, pool: RowPool, unit: int, n_rows: int, *, statistics: bool = True) -> None:
    """Fill one unit from the pool; without statistics, rows are shuffled into place and nothing else."""
    buffer.begin(0, "train", unit, n_rows)
    if not statistics:
        buffer.statistics = {key: NoStatistics(sums.width) for key, sums in buffer.statistics.items()}
    for provenance, activations in pool.batches(unit * buffer.layout.shard_rows, n_rows):
        buffer.fill(provenance, activations)


class NoStatistics(SiteStatistics):
    """Counts nothing, to show what statistics cost."""

    def add(self, rows: np.ndarray) -> int | None:  # noqa: ARG002
        """Look at nothing."""
        self.minimum = self.maximum = 0.0
        return None


def write_units(path: Path, buffers: list[UnitBuffer], pool: RowPool, n_rows: int, *, statistics: bool = True) -> None:
    """Fill one of two buffers while the other is checksummed, written, synced and committed, as the stage does."""
    shard_rows = buffers[0].layout.shard_rows
    with ThreadPoolExecutor(1) as committer:
        written: list[Future[Any]] = []
        for unit, start in enumerate(range(0, n_rows, shard_rows)):
            if unit >= 2:
                written[unit - 2].result()
            buffer = buffers[unit % 2]
            fill_unit(buffer, pool, unit, min(shard_rows, n_rows - start), statistics=statistics)
            written.append(committer.submit(buffer.commit, path, 0))
        for commit in written:
            commit.result()


def publish_rows(path: Path, layout: CacheFormat, n_rows: int, bucket_rows: int | None = None) -> ActivationCache:
    """Publish ``n_rows`` committed rows, with contexts to go with them, as a cache."""
    n_contexts = -(-n_rows // CONTEXT_LENGTH)
    for block, start in enumerate(range(0, n_contexts, layout.block_contexts)):
        context = np.arange(start, min(start + layout.block_contexts, n_contexts))
        provenance = provenance_of(context[:, None] * CONTEXT_LENGTH + np.arange(CONTEXT_LENGTH))
        arrays = {"tokens": provenance["token_id"], "documents": provenance["document"]}
        write_context_block(path, layout, 0, "train", block, arrays)
    request = {"made_up": True}
    write_atomically(path / REQUEST, canonical_json(request))
    vocabulary = canonical_json({"tokens": [f" token{i}" for i in range(50)]})
    splits = {"train": SplitSize(n_rows, n_contexts, {"rows": n_rows})}
    generation = Generation(path, 0, "create", layout, 0, bucket_rows, splits, None)
    publish_generation(generation, request, {"model": {"name": "made up"}, "text": {}}, {VOCABULARY: vocabulary})
    return open_cache(path)


def write_cache(path: Path, layout: CacheFormat, n_rows: int, bucket_rows: int | None = None) -> ActivationCache:
    """Write and publish a cache of made-up rows."""
    path.mkdir(parents=True)
    write_units(path, [UnitBuffer(layout), UnitBuffer(layout)], RowPool(layout), n_rows)
    return publish_rows(path, layout, n_rows, bucket_rows)
