"""Rows with planted directions, and runs on them whose dead features are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailrace.storage.cache_format import Site
from tailrace.storage.statistics import SiteStatistics
from tailrace.training.dead_features.resampling.settings import RowScorer
from tailrace.training.loop.build import build_run
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows.batches import Batch
from tailrace.training.rows.row_source import RowSource, SampledRows

D_IN, D_OUT, N_PLANTED = 12, 10, 24
SITE = Site("planted", "hook_in", "hook_out", D_IN, D_OUT, "float32")
SAE_SITE = Site("planted", "hook", "hook", D_IN, D_IN, "float32")


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key))


def planted_rows(n: int, index: int, *, offset: float = 0.0) -> Batch:
    """Return rows that are sums of 2 of 24 planted (read, write) pairs of directions; the same for the same index."""
    reads, writes = (_generator(3, side).standard_normal((N_PLANTED, d)) for side, d in enumerate((D_IN, D_OUT)))
    rng = _generator(index, 7)
    chosen = rng.random((n, N_PLANTED)).argsort(axis=1)[:, :2]
    coefficients = np.zeros((n, N_PLANTED))
    np.put_along_axis(coefficients, chosen, rng.uniform(0.5, 1.5, chosen.shape), axis=1)
    inputs, outputs = (coefficients @ (d / np.linalg.norm(d, axis=1, keepdims=True)) for d in (reads, writes))
    return Batch(*(torch.from_numpy((side + offset).astype(np.float32)) for side in (inputs, outputs)))


def autoencoder(batch: Batch) -> Batch:
    """Return a batch whose outputs are its inputs."""
    return Batch(batch.inputs, batch.inputs)


class PlantedSource:
    """A row source that remembers what it was asked for."""

    def __init__(self, site: Site = SITE, *, n_rows: int | None = None, offset: float = 0.0) -> None:
        self.site, self.n_rows, self.offset = site, n_rows, offset
        self.asked: list[tuple[int, int]] = []

    def __call__(self, n_rows: int, step: int) -> SampledRows:
        self.asked.append((n_rows, step))
        n = n_rows if self.n_rows is None else min(n_rows, self.n_rows)
        batch = planted_rows(n, 10_000 + step, offset=self.offset)
        batch = autoencoder(batch) if self.site.hook_in == self.site.hook_out else batch
        return SampledRows(batch, np.arange(n) // 8, np.arange(n) % 8)


def statistics_of(rows: Tensor) -> SiteStatistics:
    statistics = SiteStatistics(rows.shape[1])
    statistics.add(rows.numpy())
    return statistics


def build(
    settings: dict[str, Any],
    *,
    site: Site = SITE,
    n_steps: int = 1000,
    row_source: RowSource | None = None,
    row_scorer: RowScorer | None = None,
    offset: float = 0.0,
) -> TrainingRun:
    """Return a run on planted rows; ``settings`` over a small TopK."""
    sample = planted_rows(4096, 99_999, offset=offset)
    statistics: Any = {"in": statistics_of(sample.inputs)}
    if site.hook_in != site.hook_out:
        statistics["out"] = statistics_of(sample.outputs)
    defaults = {
        "architecture": {"kind": "topk", "k": 4},
        "d_sae": 32,
        "lr": 5e-3,
        "warmup_steps": 0,
        "decay_steps": 0,
        "dead_after_steps": 10,
        "encoder_scale": 1.0,
    }
    return build_run(
        TrainSettings.read(defaults, settings),
        site,
        statistics,
        n_steps=n_steps,
        device=torch.device("cpu"),
        precision="float32",
        row_source=row_source,
        row_scorer=row_scorer,
    )


def take_steps(run: TrainingRun, n: int, *, rows: int = 128, offset: float = 0.0) -> None:
    """Take ``n`` steps on rows that depend on the step alone."""
    for _ in range(n):
        batch = planted_rows(rows, run.n_steps_done, offset=offset)
        run.step({SITE.name: batch if run.transcoder.d_out == D_OUT else autoencoder(batch)})


@torch.no_grad()
def kill(run: TrainingRun, n: int, bias: float = -20.0) -> Tensor:
    """Give the first ``n`` features a bias that no row overcomes; return their indices."""
    run.transcoder.b_enc[:n] = bias
    return torch.arange(n)
