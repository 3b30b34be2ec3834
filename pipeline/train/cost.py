"""What training will cost, known in seconds: time, memory and disk, before any is spent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel

from tailrace.pipeline.cache.budget import Budget
from tailrace.pipeline.shared.units import duration, size
from tailrace.pipeline.train.settings import CACHE_DTYPE
from tailrace.storage.names import files_below
from tailrace.training.kernels.adaptive import resolve_precision
from tailrace.training.loop.cost import CHECKPOINT_BYTES, n_parameters, step_seconds, training_bytes
from tailrace.training.loop.settings import TrainSettings

_KEPT_CHECKPOINTS = 2
_TIMED_STEPS, _TIMED_BYTES = 100, 2 << 30
"""Runs of so many steps, and of no more memory, have a step timed before they begin: two in a hundred."""
_HELDOUT_SHARE = 1.1
"""Held-out rows come on top of the training rows that were asked for."""


class Planned(NamedTuple):
    """A run that is about to be trained."""

    settings: TrainSettings
    widths: Sequence[tuple[int, int]]
    """(d_in, d_out) of each layer it reads."""
    n_steps: int


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


def cost_line(runs: Sequence[Planned], device: torch.device, *, n_shards: int = 1, shares_rows: bool = False) -> str:
    """Return what runs side by side cost, in a line.

    ``n_shards`` and ``shares_rows`` are those of ``training_bytes``: memory is that of one device. Time is judged by
    one step of each, where that is little of what is to come and of what memory there is; never on a GPU, which is not
    given a second dictionary to hold.
    """
    parameters = [n_parameters(run.settings, run.widths) for run in runs]
    memory = sum(
        training_bytes(run.settings, run.widths, device, n_shards=n_shards, shares_rows=shares_rows) for run in runs
    )
    running = sum(
        n * (4 * (1 + run.settings.snapshots) + CHECKPOINT_BYTES * _KEPT_CHECKPOINTS)
        for n, run in zip(parameters, runs, strict=True)
    )
    kept = sum(n * 4 * (1 + run.settings.snapshots) for n, run in zip(parameters, runs, strict=True))
    n_steps = max(run.n_steps for run in runs)
    side_by_side = f"{len(runs)} runs, " if len(runs) > 1 else ""
    is_timed = device.type == "cpu" and n_steps >= _TIMED_STEPS and memory <= _TIMED_BYTES
    is_timed = is_timed and not any(run.settings.cross_layer for run in runs)
    seconds = sum(run.n_steps * _step_seconds(run, device) for run in runs) if is_timed else 0.0
    each = " on each device" if n_shards > 1 else ""
    about = f", about {duration(seconds)} by a step just timed" if seconds else ""
    return (
        f"cost: {side_by_side}{n_steps:,} steps of {runs[0].settings.batch_rows:,} rows{about}; at least "
        f"{size(memory)} of memory{each}; {size(running)} on disk while it runs, {size(kept)} afterwards"
    )


def _step_seconds(run: Planned, device: torch.device) -> float:
    ((d_in, d_out),) = run.widths
    precision = resolve_precision(run.settings.precision, device)
    return step_seconds(run.settings, d_in, d_out, device=device, precision=precision, n_steps=1)


def disk_problem(budget: Budget, cost: TrainingCost, folder: Path) -> str | None:
    """Return a sentence if cache and transcoders do not fit on the disk beside what lies in ``folder`` already."""
    cache_bytes = int((budget.total_bytes(CACHE_DTYPE) or 0) * _HELDOUT_SHARE)
    written = sum(file.lstat().st_size for file in files_below(folder))
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
