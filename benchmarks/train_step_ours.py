"""This project's side of train_step.py: a run as ``pipeline train`` builds it, stepped as its trainer does.

Modes: auto, what a user gets: kernel and precision chosen by the run; "dense" and "float32" set one or both of them.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.planted_rows import Planted
from benchmarks.step_server import LEARNING_RATE, Task, serve
from tailrace.storage.cache_format import Site
from tailrace.storage.statistics import SiteStatistics
from tailrace.training.kernels.adaptive import resolve_precision
from tailrace.training.loop.build import build_run
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows.batches import Batch

N_STEPS = 10**6
SITE = "planted"


def ours(architecture_kind: str, d_sae: int, mode: str, planted: Planted, l0: int) -> TrainingRun:
    """Return a run on planted rows that starts from the planted weights."""
    architecture: dict[str, Any] = {"kind": architecture_kind}
    if architecture_kind in ("topk", "batch_topk"):
        architecture["k"] = l0
    settings = TrainSettings(
        architecture=architecture,
        d_sae=d_sae,
        lr=LEARNING_RATE,
        warmup_steps=0,
        decay_steps=0,
        normalisation="none",
        kernel="dense" if "dense" in mode else "auto",
        precision="float32" if "float32" in mode else "auto",
    )
    width, device = planted.encoder.shape[1], torch.device("cpu")
    run = build_run(
        settings,
        Site(SITE, "in", "out", width, width, "float32"),
        {"in": statistics_of(planted.inputs), "out": statistics_of(planted.outputs)},
        n_steps=N_STEPS,
        device=device,
        precision=resolve_precision(settings.precision, device),
    )
    set_weights(run, architecture_kind, planted)
    return run


def statistics_of(rows: torch.Tensor) -> SiteStatistics:
    """Return the statistics of (n_batches, batch_rows, width) rows, as a cache keeps them."""
    statistics = SiteStatistics(rows.shape[-1])
    for batch in rows:
        statistics.add(batch.numpy())
    return statistics


@torch.no_grad()
def set_weights(run: TrainingRun, architecture_kind: str, planted: Planted) -> None:
    """Copy the planted weights and the threshold that gives the wanted L0."""
    run.transcoder.W_enc.copy_(planted.encoder)
    run.transcoder.W_dec.copy_(planted.decoder)
    run.transcoder.b_dec_out.zero_()
    if run.transcoder.b_dec is not None:
        run.transcoder.b_dec.zero_()
    if architecture_kind == "relu":
        run.transcoder.b_enc.fill_(-planted.threshold)
    if architecture_kind == "jumprelu":
        log_threshold = run.transcoder.get_parameter("log_threshold")
        log_threshold.copy_(torch.tensor(planted.threshold).log().expand_as(log_threshold))


class OurStep:
    """The run and how many features its last step used."""

    def __init__(self, task: Task) -> None:
        self._run = ours(task.architecture, task.problem.d_sae, task.mode, task.planted, task.problem.l0)

    def step(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Take one step."""
        self._run.step({SITE: Batch(inputs, outputs)})

    def l0(self, inputs: torch.Tensor) -> float:  # noqa: ARG002
        """Return the mean number of features that fired on a row of the last step's batch."""
        assert self._run.latest is not None
        return float(self._run.latest.n_active.sum()) / self._run.latest_rows


if __name__ == "__main__":
    serve(OurStep, ["numpy", "torch"])
