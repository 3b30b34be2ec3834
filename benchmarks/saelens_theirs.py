"""SAELens' side of saelens_cache.py; runs in SAELens' own environment and imports nothing of this project.

Its CacheActivationsRunner writes and its ActivationsStore reads, by their own calls. Only the language model is
replaced: the store's ``get_raw_llm_batch`` returns activations that are ready, in the dtype that is stored.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch

CONTEXT_LENGTH = 128
PROMPTS = 32
HOOK = "blocks.8.mlp.hook_out"


def write(path: str, n_rows: int, width: int, shard_rows: int, *, sync: bool = False) -> float:
    """Cache ``n_rows`` rows; return the seconds of ``CacheActivationsRunner.run``, and of syncing its files if told."""
    import sae_lens.cache_activations_runner as module  # type: ignore[import-not-found]
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    module.load_model = lambda **_: torch.nn.Identity()
    settings = CacheActivationsRunnerConfig(
        dataset_path="made-up",
        model_name="none",
        model_batch_size=PROMPTS,
        hook_name=HOOK,
        d_in=width,
        training_tokens=n_rows,
        context_size=CONTEXT_LENGTH,
        new_cached_activations_path=path,
        dtype="float16",
        device="cpu",
        buffer_size_gb=shard_rows * width * 2 / 1e9,
        streaming=False,
    )
    assert settings.n_tokens_in_buffer == shard_rows
    tokens = datasets.Dataset.from_dict({"tokens": [list(range(CONTEXT_LENGTH))] * 2})
    runner = CacheActivationsRunner(settings, override_dataset=tokens)
    ready = ready_batches(width)
    runner.activations_store.get_raw_llm_batch = lambda: next(ready)
    start = time.perf_counter()
    written = runner.run()
    for file in Path(path).glob("*") if sync else ():
        with file.open("rb") as synced:
            os.fsync(synced.fileno())
    seconds = time.perf_counter() - start
    assert len(written) * CONTEXT_LENGTH == n_rows
    return seconds


def ready_batches(width: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield float16 activations and token ids of 32 prompts, cycling through eight batches made once."""
    generator = torch.Generator().manual_seed(7)
    n = PROMPTS * CONTEXT_LENGTH
    pool = [torch.randn(n, width, generator=generator).half() for _ in range(8)]
    tokens = torch.arange(n) % 50_000
    return itertools.cycle([(activations, tokens) for activations in pool])


def read_store(path: str, width: int, batch_rows: int, skipped_rows: int, n_rows: int) -> float:
    """Return the seconds to take ``n_rows`` rows from the cached reader through its mixing buffer."""
    from sae_lens.training.activations_store import ActivationsStore  # type: ignore[import-not-found]

    store = ActivationsStore(
        model=torch.nn.Identity(),
        dataset=None,
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=CONTEXT_LENGTH,
        d_in=width,
        n_batches_in_buffer=64,
        total_training_tokens=n_rows,
        store_batch_size_prompts=PROMPTS,
        train_batch_size_tokens=batch_rows,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float16",
        cached_activations_path=path,
    )
    return consume(iter(store), skipped_rows, n_rows)


def read_slices(path: str, width: int, batch_rows: int, skipped_rows: int, n_rows: int) -> float:
    """Return the seconds to take ``n_rows`` rows as consecutive slices of the Arrow dataset, in stored order."""
    dataset = datasets.load_from_disk(path)
    dataset.set_format(type="torch", columns=[HOOK], dtype=torch.float16)
    n = batch_rows // CONTEXT_LENGTH

    def slices() -> Iterator[torch.Tensor]:
        for start in itertools.cycle(range(0, len(dataset) - n + 1, n)):
            yield dataset[start : start + n][HOOK].reshape(-1, width)

    return consume(slices(), skipped_rows, n_rows)


def consume(batches: Iterator[torch.Tensor], skipped_rows: int, n_rows: int) -> float:
    """Add up one column of every batch; the clock starts after ``skipped_rows``."""
    taken, start = 0, time.perf_counter()
    for batch in batches:
        batch[:, 0].sum()
        taken += len(batch)
        if taken <= skipped_rows:
            start = time.perf_counter()
        if taken >= skipped_rows + n_rows:
            break
    return time.perf_counter() - start


def main(arguments: dict[str, Any]) -> None:
    task = arguments.pop("task")
    if task != "write":
        for file in Path(arguments["path"]).glob("*.arrow"):
            file.read_bytes()
    tasks: dict[str, Callable[..., float]] = {"write": write, "read_store": read_store, "read_slices": read_slices}
    seconds = tasks[task](**arguments)
    versions = {name: importlib.metadata.version(name) for name in ("sae-lens", "datasets", "pyarrow", "torch")}
    print(json.dumps({"seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
