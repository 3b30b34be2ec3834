"""The stage ``pipeline shuffle``: write one epoch's order as sequential shards, where gathering it costs too much."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tailrace.pipeline.cache.plan import row_bytes_of
from tailrace.pipeline.shared.compute import Compute, require_linux
from tailrace.pipeline.shared.progress import Progress
from tailrace.pipeline.shared.worker_processes import completed, open_workers
from tailrace.storage.activation_cache import CacheSplit, open_cache
from tailrace.storage.cache_format import epoch_path
from tailrace.storage.errors import StorageFull
from tailrace.storage.generations import CachePath
from tailrace.storage.materialise import materialise_epoch, plan_epoch
from tailrace.storage.names import files_below
from tailrace.storage.orders import find_materialised


def run(
    cache: CachePath,
    *,
    epoch: int = 0,
    seed: int | None = None,
    split: str = "train",
    compute: Compute = Compute(),
) -> Path:
    """Write the order of one epoch into the cache and return where it lies; does nothing if it is there.

    Streams use it by themselves when they come to that epoch. Raises StorageFull before writing if it does not fit.
    """
    require_linux("shuffling")
    with open_cache(cache) as opened:
        rows = opened.split(split)
        plan = plan_epoch(rows, opened.seed if seed is None else seed, epoch)
        if find_materialised(rows, plan) is None:
            _check_room(epoch_path(opened.path, plan, opened.generation), rows)

        def run_tasks(task: Callable[[int], None], buckets: Iterable[int]) -> None:
            waiting = list(buckets)
            with Progress(len(waiting), "shuffling", "buckets", quiet=compute.quiet) as bar:
                for _ in _completed(task, waiting, compute.workers):
                    bar.update()

        return materialise_epoch(rows, seed=plan.seed, epoch=epoch, run_tasks=run_tasks)


def _check_room(path: Path, rows: CacheSplit) -> None:
    """Raise StorageFull if what is still missing of an epoch's copy does not fit."""
    n_bytes = rows.n_rows * row_bytes_of(rows.layout.sites)
    there = sum(file.lstat().st_size for file in files_below(path))
    free = shutil.disk_usage(rows.root).free
    if free < n_bytes - there:
        raise StorageFull(
            f"{rows.root}: {(n_bytes - there) / 1e9:.1f} GB are needed for one epoch's order, {free / 1e9:.1f} GB are "
            "free; free some space, or train without it: the order is gathered while reading"
        )


def _completed(task: Callable[[int], None], ids: list[int], workers: int) -> Iterable[Any]:
    """Run a task for every id, here or in worker processes; yield as they finish."""
    if not workers:
        for identity in ids:
            task(identity)
            yield identity
        return
    with open_workers(workers) as submit:
        yield from completed(submit, task, zip(ids, strict=True))
