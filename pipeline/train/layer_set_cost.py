"""What transcoders of every layer will cost, known in seconds: time and disk, before either is spent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel

from tailrace.pipeline.cache.budget import Budget
from tailrace.pipeline.train.settings import CACHE_DTYPE
from tailrace.training.kernels.adaptive import resolve_precision
from tailrace.training.loop.cost import CHECKPOINT_BYTES, n_parameters, step_seconds
from tailrace.training.loop.settings import TrainSettings

_KEPT_CHECKPOINTS = 2
_HELDOUT_SHARE = 1.1
"""Held-out rows come on top of the training rows that were asked for."""


class TrainingCost(BaseModel):
    """What training all transcoders costs."""

    seconds: float
    disk_bytes: int
    """While training: weights and two checkpoints of each."""
    kept_bytes: int
    """Afterwards: weights."""


def training_cost(
    settings: TrainSettings, widths: Sequence[tuple[int, int]], *, device: torch.device, steps: int
) -> TrainingCost:
    """Return the cost of ``steps`` of one transcoder per (d_in, d_out): steps of each shape are timed."""
    precision = resolve_precision(settings.precision, device)
    seconds, parameters = 0.0, 0
    for (d_in, d_out), n in Counter(widths).items():
        seconds += n * step_seconds(settings, d_in, d_out, device=device, precision=precision)
        parameters += n * n_parameters(settings, [(d_in, d_out)])
    return TrainingCost(
        seconds=seconds * steps,
        disk_bytes=parameters * (4 + CHECKPOINT_BYTES * _KEPT_CHECKPOINTS),
        kept_bytes=parameters * 4,
    )


def disk_problem(budget: Budget, cost: TrainingCost, folder: Path) -> str | None:
    """Return a sentence if cache and transcoders do not fit on the disk beside what lies in ``folder`` already."""
    cache_bytes = int((budget.total_bytes(CACHE_DTYPE) or 0) * _HELDOUT_SHARE)
    written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    wanted = cache_bytes + cost.disk_bytes - written
    if wanted <= budget.free_bytes:
        return None
    left = budget.free_bytes + written - cost.disk_bytes
    rows = int(left / (budget.row_bytes[CACHE_DTYPE] * _HELDOUT_SHARE)) // 1000 * 1000
    advice = f"use --tokens {rows}, free some space" if rows > 0 else "free some space"
    return (
        f"{folder}: needs {wanted / 1e9:.1f} GB more ({cache_bytes / 1e9:.1f} GB of cache, {cost.disk_bytes / 1e9:.1f} "
        f"GB of transcoders and their checkpoints), and {budget.free_bytes / 1e9:.1f} GB are free; {advice}, or choose "
        "another --out"
    )
