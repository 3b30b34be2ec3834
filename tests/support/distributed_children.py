"""What each of the processes of ``test_training_distributed`` runs: steps and whole runs on its slice of the rows."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tailrace.training.architectures import Architecture, BatchTopK, JumpReLU, Matryoshka
from tailrace.training.architectures.objectives import VarianceObjective
from tailrace.training.dead_features.auxiliary import AuxK, Ghost
from tailrace.training.dead_features.record import FiringRecord
from tailrace.training.kernels.adaptive import AdaptiveStep
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.kernels.kernel import ExtraLoss, StepKernel
from tailrace.training.kernels.sparse import SparseStep
from tailrace.training.loop.distributed import (
    DistributedStep,
    Group,
    SharedRows,
    broadcast_run,
    open_group,
    rows_of_rank,
)
from tailrace.training.loop.optim import BlockedAdam
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.weight_average import WeightAverage
from tailrace.training.rows.batches import Batch, BatchStream, SiteBatches
from tests.support.planted_runs import SITE, PlantedRows, build
from tests.support.random_steps import ARCHITECTURES, cast, random_batch, random_transcoder

N_ROWS = 601
"""Odd, so that slices differ."""
OBJECTIVE = VarianceObjective(20.0)
STEPS_BEFORE, STEPS_AFTER = 5, 5

KERNELS: dict[str, tuple[StepKernel, StepKernel]] = {
    "dense": (DenseStep(), DenseStep()),
    "sparse": (SparseStep(), SparseStep()),
    "dense and sparse": (DenseStep(), SparseStep()),
    "screened": (SparseStep("bfloat16"), SparseStep("bfloat16")),
}
"""What the first process computes with, and what the others do."""

WHOLE_RUNS: dict[str, Architecture] = {
    "batch_topk": BatchTopK(k=2),
    "jumprelu": JumpReLU(l0=0.1, target_l0=2.0, bandwidth=0.3),
    "matryoshka": Matryoshka(k=2, levels=2),
}


def rows_of(case: str) -> Batch:
    """Return a batch in float64; ``lopsided``: nothing fires in its second half."""
    whole = random_batch()
    batch = Batch(whole.inputs[:N_ROWS].clone(), whole.outputs[:N_ROWS].clone())
    if case == "lopsided":
        batch.inputs[N_ROWS // 2 :] *= 1e-3
    return batch


def extra_losses(name: str, d_sae: int) -> list[ExtraLoss]:
    """Return the auxiliary loss called ``name``; every third feature is dead."""
    if name == "none":
        return []
    firing = FiringRecord(d_sae)
    firing.steps_since_fired[::3] = 10
    loss = {"auxk": AuxK(), "ghost": Ghost(), "ghost-elementwise": Ghost(ghost_rescale="elementwise")}[name]
    term = loss.build(firing, OBJECTIVE, dead_after_steps=5)
    assert term is not None
    return [term]


def cases() -> list[tuple[str, str, str, str, torch.dtype]]:
    """Return (architecture, rows, kernel, auxiliary, dtype) of every single step."""
    found = [
        (name, "plain", kernel, "none", dtype)
        for name in ARCHITECTURES
        for kernel, dtype in [("dense", torch.float64), ("sparse", torch.float64), ("sparse", torch.float32)]
    ]
    found += [(name, "plain", "dense and sparse", "none", torch.float64) for name in ("batch_topk", "matryoshka")]
    found += [("batch_topk", "lopsided", kernel, "none", torch.float64) for kernel in ("dense", "sparse")]
    found += [("batch_topk", "plain", "screened", "none", torch.float32)]
    found += [("topk", "plain", "dense", name, torch.float64) for name in ("auxk", "ghost", "ghost-elementwise")]
    return found


def take_step(
    case: tuple[str, str, str, str, torch.dtype], kernel: StepKernel, group: Group | None = None
) -> dict[str, Tensor]:
    """Return gradients, losses, counts, what each row gave, and buffers, by name, of two steps on the same rows."""
    architecture, rows, _, auxiliary, dtype = case
    transcoder = random_transcoder(ARCHITECTURES[architecture]).to(dtype)
    batch = cast(rows_of(rows), dtype)
    if group is not None:
        own = rows_of_rank(len(batch.inputs), group.rank, group.size)
        batch = Batch(batch.inputs[own], batch.outputs[own])
    for _ in range(2):  # the second begins from the first one's guesses and memory
        # asked for by the first process alone, as in training, where it keeps the log
        asks = group is None or group.is_first
        result = kernel(transcoder, batch, OBJECTIVE, extra_losses(auxiliary, transcoder.d_sae), per_row=asks)
    assert result.per_row is not None
    found = {f"gradient.{name}": value.grad for name, value in transcoder.named_parameters() if value.grad is not None}
    found |= {f"loss.{name}": value for name, value in result.losses.items()}
    found |= {f"buffer.{name}": value for name, value in transcoder.named_buffers()}
    found |= {f"row.{name}": value for name, value in result.per_row._asdict().items()}
    return found | {"n_active": result.n_active, "n_rows": torch.tensor(result.n_rows)}


def build_planted(architecture: Architecture) -> TrainingRun:
    """Return a run in float64 on ``PlantedRows`` with an average of its weights."""
    return build(PlantedRows(), architecture, STEPS_BEFORE + STEPS_AFTER, d_sae=64, lr=5e-3, ema=0.9)


class Doubled:
    """``PlantedRows`` of 201 rows, in float64."""

    def __init__(self) -> None:
        self._rows = PlantedRows(batch_rows=201)

    def next_batch(self) -> SiteBatches:
        rows = self._rows.next_batch()[SITE.name].inputs.double()
        return {SITE.name: Batch(rows, rows)}

    def state_dict(self) -> dict[str, Any]:
        return self._rows.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rows.load_state_dict(state)


def doubled(run: TrainingRun, kernel: StepKernel) -> TrainingRun:
    """Return ``run`` made anew in float64 with ``kernel``."""
    transcoder = run.transcoder.double()
    return TrainingRun(
        transcoder,
        run.objective,
        run.rows,
        kernel,
        BlockedAdam(transcoder),
        run.schedule,
        lr=run.lr,
        average=WeightAverage(transcoder, 0.9),
    )


def train_planted(architecture: Architecture, group: Group | None) -> dict[str, Tensor]:
    """Train in one process or as one of a group; half-way, the others of the group forget all they have."""

    def begin() -> tuple[TrainingRun, BatchStream]:
        kernel: StepKernel = AdaptiveStep("float32")
        if group is None:
            return doubled(build_planted(architecture), kernel), Doubled()
        rows = SharedRows(Doubled(), group)
        return doubled(build_planted(architecture), DistributedStep(kernel, group)), rows

    run, stream = begin()
    for _ in range(STEPS_BEFORE):
        run.step(stream.next_batch())
    if group is not None:
        if not group.is_first:
            run, stream = begin()
        broadcast_run(group, run, stream)
    for _ in range(STEPS_AFTER):
        run.step(stream.next_batch())
    tensors = {name: value.detach().clone() for name, value in run.state_tensors().items()}
    assert run.latest is not None
    return tensors | {
        "loss": run.latest.losses["loss"],
        "n_active": run.latest.n_active,
        "n_rows_done": torch.tensor(run.n_rows_done),
    }


def main(directory: Path) -> None:
    """Run every case as one of the processes and save what it gave."""
    torch.set_num_threads(1)
    with open_group(meeting=f"file://{directory / 'meeting'}") or sys.exit("not a group") as group:
        results: dict[str, Tensor] = {}
        for index, case in enumerate(cases()):
            own = DistributedStep(KERNELS[case[2]][min(1, group.rank)], group)
            results |= {f"step.{index}.{name}": value for name, value in take_step(case, own, group).items()}
        for kind, architecture in WHOLE_RUNS.items():
            found = train_planted(architecture, group)
            results |= {f"run.{kind}.{name}": value for name, value in found.items()}
        save_file({name: value.detach().contiguous() for name, value in results.items()}, directory / f"{group.rank}")


def load_results(directory: Path, rank: int, prefix: str) -> dict[str, Tensor]:
    """Return what process ``rank`` saved below ``prefix``."""
    tensors = load_file(directory / f"{rank}")
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
