"""Our side of saelens_cache.py, in processes of its own as well: float16 rows of one hook, written and read."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import warm_cache
from benchmarks.made_up_rows import CONTEXT_LENGTH, RowPool, fill_unit, publish_rows, write_units
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.cache_format import CacheFormat, Site
from tailrace.storage.cache_writer import UnitBuffer
from tailrace.storage.materialise import materialise_epoch

KEY = "layer8/in"


def one_hook(width: int, shard_rows: int) -> CacheFormat:
    """Return the format of a cache of one hook in float16, which is all that SAELens can hold."""
    site = Site("layer8", "blocks.8.mlp.hook_out", "blocks.8.mlp.hook_out", width, width, "float16")
    return CacheFormat((site,), CONTEXT_LENGTH, shard_rows, min(4096, shard_rows), "none", block_contexts=8192)


def write(path: str, n_rows: int, width: int, shard_rows: int, bucket_rows: int | None = None) -> float:
    """Return the seconds to the published cache: shuffled, checksummed and synced. Memory is touched beforehand."""
    layout, root = one_hook(width, shard_rows), Path(path)
    pool = RowPool(layout)
    root.mkdir(parents=True)
    buffers = [UnitBuffer(layout), UnitBuffer(layout)]
    for buffer in buffers:
        fill_unit(buffer, pool, 0, shard_rows, statistics=False)
    fill_unit(buffers[0], pool, 0, min(shard_rows, 4096))  # compiles the sums
    start = time.perf_counter()
    write_units(root, buffers, pool, n_rows)
    publish_rows(root, layout, n_rows, bucket_rows)
    return time.perf_counter() - start


def materialise(path: str) -> float:
    """Write the order of epochs 0 and 1; return the seconds."""
    start = time.perf_counter()
    for epoch in (0, 1):
        materialise_epoch(open_cache(path).split("train"), seed=0, epoch=epoch, run_tasks=_one_by_one)
    return time.perf_counter() - start


def _one_by_one(task: Any, indices: Any) -> None:
    for index in indices:
        task(index)


def read(path: str, order: str, batch_rows: int, skipped_rows: int, n_rows: int) -> float:
    """Return the seconds to take ``n_rows`` rows as torch tensors; the clock starts after ``skipped_rows``."""
    split = open_cache(path).split("train")
    warm_cache(file for file in Path(path).glob("**/in/c/*/0") if ("epochs" in file.parts) == (order == "materialised"))
    taken, start = 0, time.perf_counter()
    with split.stream([KEY], batch_rows=batch_rows, seed=0, order=order) as stream:
        while taken < skipped_rows + n_rows:
            rows = torch.from_numpy(next(stream).arrays[KEY])
            rows[:, 0].sum()
            taken += len(rows)
            if taken <= skipped_rows:
                start = time.perf_counter()
        return time.perf_counter() - start


def main(arguments: dict[str, Any]) -> None:
    task = arguments.pop("task")
    tasks: dict[str, Callable[..., float]] = {"write": write, "materialise": materialise, "read": read}
    seconds = tasks[task](**arguments)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
