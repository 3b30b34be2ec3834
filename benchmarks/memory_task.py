"""What memory.py measures, each in a process of its own that does nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.made_up_rows import KEYS, cache_format, write_cache
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.activation_cache import open_cache


def cache(path: str, n_rows: int, shard_rows: int) -> None:
    """Write and publish a cache of made-up rows."""
    write_cache(Path(path), cache_format(64, shard_rows=shard_rows), n_rows)


def stream(path: str, n_rows: int, shard_rows: int) -> None:  # noqa: ARG001
    """Gather one epoch of the cache that ``cache`` wrote."""
    with open_cache(path).split("train").stream(KEYS, batch_rows=4096, n_epochs=1) as batches:
        n_seen = sum(len(batch.arrays[KEYS[0]]) for batch in batches if batch.arrays[KEYS[1]][:, 0].any())
    assert n_seen == n_rows


def stage(path: str, n_rows: int, text: str) -> None:
    """Run the real stage on the tiny language model."""
    from tailrace.pipeline.cache import stage as cache_stage
    from tailrace.pipeline.cache.settings import CacheSettings
    from tailrace.pipeline.samples.bundled_models import bundled_model

    model = str(bundled_model("tiny-lm"))
    settings = CacheSettings(model=model, dataset=text, tokens=n_rows, layers="2", shard_rows=16_384)
    cache_stage.run(settings, output=Path(path), compute=Compute(quiet=True))


def resident(field: str) -> int:
    """Return a memory figure of this process in bytes: VmHWM is the peak, VmRSS the present.

    Not ``ru_maxrss``, which begins at the size of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def main(arguments: dict[str, Any]) -> None:
    tasks: dict[str, Callable[..., None]] = {"cache": cache, "stream": stream, "stage": stage}
    task = tasks[arguments.pop("task")]
    imported = resident("VmRSS")
    task(**arguments)
    peak = resident("VmHWM")
    print(json.dumps({"peak": peak, "after_imports": peak - imported}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
