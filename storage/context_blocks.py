"""Contexts while a cache is being made: committed in blocks, read back when the model runs over them.

Contexts are fixed on disk before any activation is computed, so everything after is a pure function of them.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np

from tailrace.storage.cache_format import (
    CONTEXT_ARRAYS,
    BlockRecord,
    CacheFormat,
    block_record_name,
    split_path,
    superseded_path,
)
from tailrace.storage.cache_writer import write_context_block
from tailrace.storage.layout import ArraySpec
from tailrace.storage.shard import read_rows

_BLOCKS_KEPT = 4


class ContextBlocks:
    """The committed contexts of a split, in blocks of ``layout.block_contexts``; only the last may be short."""

    def __init__(self, root: Path, layout: CacheFormat, generation: int, split: str) -> None:
        self._root, self._layout, self._generation, self._split = root, layout, generation, split
        self._kept: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()

    def write(self, block: int, tokens: np.ndarray, documents: np.ndarray) -> None:
        """Commit one block: int32 tokens and uint32 documents, (n ≤ block_contexts, context_length)."""
        arrays = {"tokens": tokens, "documents": documents}
        write_context_block(self._root, self._layout, self._generation, self._split, block, arrays)
        self._kept.pop(block, None)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and documents of contexts [start, stop), each (stop - start, context_length)."""
        size = self._layout.block_contexts
        blocks = [self._block(block) for block in range(start // size, -(-stop // size))]
        offset = start // size * size
        joined = [
            np.concatenate([block[name] for block in blocks])[start - offset : stop - offset] for name in blocks[0]
        ]
        return joined[0], joined[1]

    def _block(self, block: int) -> dict[str, np.ndarray]:
        if block not in self._kept:
            generation, n_contexts = self._committed(block)
            specs = self._layout.context_specs()
            self._kept[block] = {
                name: read_rows(self._group(spec, block, generation), spec, block, n_contexts)
                for name, spec in zip(CONTEXT_ARRAYS, specs, strict=True)
            }
            if len(self._kept) > _BLOCKS_KEPT:
                self._kept.popitem(last=False)
        return self._kept[block]

    def _group(self, spec: ArraySpec, block: int, generation: int) -> Path:
        """Return the group that holds a block as ``generation`` committed it."""
        # a process killed before its commit may have replaced a published block by a longer one
        aside = superseded_path(self._root, self._generation - 1, self._split)
        is_aside = generation < self._generation and (aside / spec.shard_name(block)).exists()
        return aside if is_aside else split_path(self._root, self._split)

    def _committed(self, block: int) -> tuple[int, int]:
        """Return the newest generation that committed a block, and how many contexts it has there."""
        for generation in range(self._generation, -1, -1):
            record = self._root / block_record_name(generation, self._split, block)
            if record.exists():
                return generation, BlockRecord.read_file(record).n_contexts
        raise AssertionError(f"block {block} of {self._split} contexts was never committed")
