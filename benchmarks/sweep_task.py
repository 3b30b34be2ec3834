"""One process of sweep.py: a command of this project, or steps on rows in memory; prints what it cost as JSON.

Rows read from the cache are counted where the stream asks the kernel for them, in bytes.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.made_up_rows import SITE
from tailrace.pipeline.cli import main
from tailrace.pipeline.train.sources import CacheSource
from tailrace.storage import shard
from tailrace.storage.activation_cache import open_cache
from tailrace.training.kernels.adaptive import resolve_precision
from tailrace.training.loop.build import build_run
from tailrace.training.loop.settings import TrainSettings


class ReadCount:
    """Counts the bytes of rows that shuffled streams read; they come through one function."""

    def __init__(self) -> None:
        self.n_bytes = 0
        self._lock = threading.Lock()
        self._read = shard.read_run

    def __call__(self, descriptor: int, start: int, rows: np.ndarray, destinations: np.ndarray) -> None:
        self._read(descriptor, start, rows, destinations)
        with self._lock:
            self.n_bytes += len(destinations) * rows[:1].nbytes


def isolated_steps(cache: Path, settings: TrainSettings, n_steps: int) -> float:
    """Return the seconds of ``n_steps`` steps of one run on batches in memory, after as many to get warm."""
    device = torch.device("cpu")
    source = CacheSource(open_cache(cache), batch_rows=settings.batch_rows, order_seed=0, device=device)
    with source.open([source.sites[SITE]], cache) as rows:
        run = build_run(
            settings,
            source.sites[SITE],
            rows.statistics(source.sites[SITE]),
            n_steps=10**6,
            device=device,
            precision=resolve_precision(settings.precision, device),
        )
        batches = []
        for _ in range(4):
            batch = rows.stream.next_batch()[SITE]
            batches.append({SITE: type(batch)(batch.inputs.clone(), batch.outputs.clone())})
    seconds = 0.0
    for step in range(2 * n_steps):
        start = time.perf_counter()
        run.step(batches[step % len(batches)])
        seconds += (time.perf_counter() - start) if step >= n_steps else 0.0
    return seconds


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    count = ReadCount()
    shard.read_run = count
    if what == "command":
        start = time.perf_counter()
        main(arguments)
        seconds = time.perf_counter() - start
    else:
        cache, threads, n_steps, text = arguments
        torch.set_num_threads(int(threads))
        seconds = isolated_steps(Path(cache), TrainSettings.model_validate_json(text), int(n_steps))
    print(json.dumps({"seconds": seconds, "bytes_read": count.n_bytes}))
