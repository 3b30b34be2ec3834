"""Small live streams on a tiny real language model, and their batches as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tailrace.pipeline.live.batches import LiveBatches, Opening
from tailrace.pipeline.live.settings import LiveSettings
from tailrace.training.rows.batches import Batch
from tests.support.cache_jobs import CONTEXT_LENGTH, model_folder, text_file

BATCH_ROWS = 32


def live_settings(**changes: Any) -> LiveSettings:
    """Return settings of blocks of 192 rows: a pass over three of four speeches is five blocks exactly."""
    chosen = {
        "model": str(model_folder()),
        "dataset": str(text_file()),
        "layers": "0",
        "context_length": CONTEXT_LENGTH,
        "contexts_per_batch": 4,
        "storage_dtype": "float32",
        "holdout": "3",
        "heldout_rows": 1000,
        "buffer_rows": 384,
        **changes,
    }
    return LiveSettings.read(chosen)


def open_live(*, batch_rows: int = BATCH_ROWS, opening: Opening | None = None, **changes: Any) -> LiveBatches:
    torch.set_num_threads(1)
    return LiveBatches(live_settings(**changes), batch_rows=batch_rows, opening=opening)


Arrays = dict[str, tuple[np.ndarray, np.ndarray]]


def copied(batches: Mapping[str, Batch]) -> Arrays:
    """Return a batch as arrays of its own: what is served is valid until the next one only."""
    return {site: (batch.inputs.numpy().copy(), batch.outputs.numpy().copy()) for site, batch in batches.items()}


def take(live: LiveBatches, n: int) -> list[Arrays]:
    return [copied(live.next_batch()) for _ in range(n)]


def assert_equal(found: list[Arrays], expected: list[Arrays], where: str) -> None:
    assert len(found) == len(expected)
    for n, (one, other) in enumerate(zip(found, expected, strict=True)):
        for site in other:
            for side in (0, 1):
                assert np.array_equal(one[site][side], other[site][side]), f"{where}, batch {n}, {site}"
