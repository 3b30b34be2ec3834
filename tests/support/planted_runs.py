"""Training on rows whose directions the test planted, without a cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailrace.storage.cache_format import Site
from tailrace.storage.statistics import SiteStatistics
from tailrace.training.architectures import Architecture
from tailrace.training.loop.build import build_run
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows.batches import Batch

WIDTH = 16
N_PLANTED = 32
SITE = Site("planted", "hook", "hook", WIDTH, WIDTH, "float32")


class PlantedRows:
    """An endless stream of sparse sums of planted directions: 2 of 32 per row, inputs and outputs alike."""

    def __init__(self, *, batch_rows: int = 256, offset: float = 0.0) -> None:
        directions = np.random.Generator(np.random.Philox(100)).standard_normal((N_PLANTED, WIDTH))
        self.directions = (directions / np.linalg.norm(directions, axis=1, keepdims=True)).astype(np.float32)
        self.batch_rows = batch_rows
        self.offset = offset
        self.n_served = 0

    def next_batch(self) -> dict[str, Batch]:
        rng = np.random.Generator(np.random.Philox([self.n_served, 7]))
        self.n_served += 1
        chosen = rng.random((self.batch_rows, N_PLANTED)).argsort(axis=1)[:, :2]
        coefficients = np.zeros((self.batch_rows, N_PLANTED), np.float32)
        np.put_along_axis(coefficients, chosen, rng.uniform(0.5, 1.5, chosen.shape).astype(np.float32), axis=1)
        rows = torch.from_numpy(coefficients @ self.directions + self.offset)
        return {SITE.name: Batch(rows, rows)}

    def state_dict(self) -> dict[str, Any]:
        return {"n_served": self.n_served}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.n_served = state["n_served"]


def statistics_of(rows: Tensor) -> SiteStatistics:
    statistics = SiteStatistics(rows.shape[1])
    statistics.add(rows.numpy())
    return statistics


def build(stream: PlantedRows, architecture: Architecture, n_steps: int, **settings: Any) -> TrainingRun:
    sample = stream.next_batch()[SITE.name].inputs
    return build_run(
        TrainSettings(architecture=architecture, **settings),
        SITE,
        {"in": statistics_of(sample)},
        n_steps=n_steps,
        device=torch.device("cpu"),
        precision="float32",
    )
