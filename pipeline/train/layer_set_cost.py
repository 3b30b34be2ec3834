"""What transcoders of every layer will cost, found out in seconds: time and disk, before either is spent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from pydantic import BaseModel

from tailrace.pipeline.cache.budget import Budget
from tailrace.pipeline.train.settings import CACHE_DTYPE
from tailrace.training.kernels.adaptive import resolve_precision

_PRODUCTS_PER_STEP = 2.0
"""A whole sparse step takes as long as this many encoder products (benchmarks/train_step)."""
_STATE_BYTES = 12
"""Bytes per parameter in a checkpoint: the weight and two moments."""
_KEPT_CHECKPOINTS = 2
_HELDOUT_SHARE = 1.1
"""Held-out rows come on top of the training rows that were asked for."""


class Sizes(Protocol):
    """The settings that decide the cost of training."""

    @property
    def d_sae(self) -> int:
        """Features of each transcoder."""
        ...

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        ...

    @property
    def batch_rows(self) -> int:
        """Rows per step."""
        ...


class TrainingCost(BaseModel):
    """What training all transcoders costs."""

    seconds: float
    disk_bytes: int
    """While training: weights and two checkpoints of each."""
    kept_bytes: int
    """Afterwards: weights."""


def training_cost(sizes: Sizes, widths: Sequence[tuple[int, int]], *, device: torch.device) -> TrainingCost:
    """Return the cost of one transcoder per (d_in, d_out): one encoder product is timed, the rest is arithmetic."""
    n_parameters = sum((d_in + d_out + 1) * sizes.d_sae + d_out for d_in, d_out in widths)
    seconds = sum(
        _product_seconds(sizes, width, device) * sum(d_in == width for d_in, _ in widths)
        for width in {d_in for d_in, _ in widths}
    )
    return TrainingCost(
        seconds=seconds * _PRODUCTS_PER_STEP * sizes.steps,
        disk_bytes=n_parameters * (4 + _STATE_BYTES * _KEPT_CHECKPOINTS),
        kept_bytes=n_parameters * 4,
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


def _product_seconds(sizes: Sizes, d_in: int, device: torch.device) -> float:
    """Return the seconds of one batch's encoder product in the precision that training would use."""
    dtype = torch.bfloat16 if resolve_precision("auto", device) == "bfloat16" else torch.float32
    rows = torch.zeros(sizes.batch_rows, d_in, dtype=dtype, device=device)
    weights = torch.zeros(sizes.d_sae, d_in, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(3):
        started = time.monotonic()
        product = rows @ weights.T
        product[0, 0].item()  # waits for a GPU
        best = min(best, time.monotonic() - started)
    return best
