"""The GPU's sparse step on a pretended GPU, interpreted, and the CPU's: whole runs, and what steps wait for.

Interpreted programs are slow: rows and features are few.
"""

from __future__ import annotations

from tests.support import interpreted  # isort: skip  (before anything that imports the programs)

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_step import FREE
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.training.architectures import Architecture, BatchTopK, JumpReLU, ReLU, TopK
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.objectives import VarianceObjective
from tailrace.training.kernels.adaptive import build_kernel
from tailrace.training.loop.distributed import DistributedStep, Group, rows_of_rank
from tailrace.training.loop.optim import build_optimiser
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.loop.shards import FeatureShards, ShardedStep
from tailrace.training.rows.batches import Batch
from tests.support.gpu_training import Case, Killed
from tests.support.pretended_gpu import record
from tests.support.sharded_runs import cut, in_threads
from tests.support.training_caches import publish_layers, small_cache

assert interpreted.__doc__

BASE = {
    "architecture": {"kind": "topk", "k": 2},
    "d_sae": 20,
    "steps": 3,
    "batch_rows": 8,
    "lr": 1e-2,
    "log_every": 2,
    "evaluate_every": 3,
    "evaluation_rows": 64,
    "kernel": "sparse",
}

N_STEPS = 8
"""By the last of which every architecture's step is a graph."""
LARGEST_LAUNCHES = 25
"""Of operators in a step, one of which may be a graph."""


def run(folder: Path, device: str, cache: Path, name: str = "out", **changes: Any) -> train.TrainResult:
    """Train by sparse steps."""
    settings, hooks = TrainSettings.read(BASE, changes.pop("settings", {})), changes.pop("hooks", [])
    compute = Compute(device=device, quiet=True)
    return train.run(settings, cache=cache, output=folder / name, compute=compute, checkpoint_steps=2, hooks=hooks)


def training(folder: Path, device: str, **settings: Any) -> dict[str, float]:
    """Return the scores of a run."""
    layers = settings.get("cross_layer", False)
    cache = publish_layers(folder / "cache") if layers else small_cache(folder / "cache", d_in=9, d_out=7)
    metrics = run(folder, device, cache, settings=settings).metrics
    return {"fvu": metrics["heldout"]["fvu"], "l0": metrics["heldout"]["l0"], "loss": metrics["train"]["loss"]}


def resuming(folder: Path, device: str) -> dict[str, float]:
    """End a run after 3 steps of 4 and continue it, beside a run that nothing ended."""
    cache = small_cache(folder / "cache", d_in=9, d_out=7)
    settings = {"steps": 4, "architecture": {"kind": "batch_topk", "k": 2}}

    def kill(step: int, _: Transcoder) -> None:
        if step == 3:
            raise Killed

    uninterrupted = run(folder, device, cache, "uninterrupted", settings=settings)
    try:
        run(folder, device, cache, settings=settings, hooks=[(1, kill)])
    except Killed:
        resumed = run(folder, device, cache, settings=settings)
    files = [result.path / "weights.safetensors" for result in (uninterrupted, resumed)]
    same = files[0].read_bytes() == files[1].read_bytes()
    return {"fvu": resumed.metrics["heldout"]["fvu"], "same bytes as uninterrupted": float(same)}


def n_launched() -> int:
    """Return how many operators were asked for that start something on a device."""
    return sum(n for name, n in record.operators.items() if name not in FREE)


def waiting(folder: Path, device: str, architecture: Architecture) -> dict[str, float]:
    """Take steps until they are one graph; on the GPU they wait only, two steps late, for a number that has arrived.

    What is launched in one, of the step and of Adam, must be few enough.
    """
    generator = torch.Generator().manual_seed(0)
    transcoder = architecture.build(6, 6, 18)
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) - 0.5)
    transcoder.constrain_parameters()
    transcoder = transcoder.to(device)
    kernel = build_kernel("sparse", "float32", torch.device(device), name="run", fused=True)
    gradients = getattr(kernel, "gradients", None)
    optimiser = build_optimiser("adam", transcoder, lr=0.01, clip=None, gradients=gradients)
    batch = Batch(*(torch.randn(7, 6, generator=generator).to(device) for _ in range(2)))
    losses = []
    before = 0
    for step in range(N_STEPS):
        if step == 1:
            record.clear()
        before = n_launched()
        losses.append(kernel(transcoder, batch, VarianceObjective(6.0)).losses["loss"])
        optimiser.step(0.01)
    # once, what was recorded is compared with the step it was recorded of
    waits = {line for name, line in record.waits if name != "event" and "device/graph.py" not in line}
    copies = {line for way, line in record.copies if not way.endswith("without a wait")}
    late = sum(n for (name, _), n in record.waits.items() if name == "event")
    launched = n_launched() - before
    if device == "cuda" and (waits or copies or not N_STEPS - 2 <= late <= 2 * (N_STEPS - 2)):
        raise AssertionError(f"steps wait: {record.waits}, {record.copies}")
    if device == "cuda" and not 1 <= launched <= LARGEST_LAUNCHES:
        raise AssertionError(f"a step launches {launched}: {record.operators}")
    # later ones drift apart: the two devices' Adam differs by rounding, which Adam amplifies where gradients vanish
    return {"loss": float(losses[3])}


def sharing(folder: Path, device: str, architecture: Architecture, *, features: bool) -> dict[str, float]:
    """Take steps in two processes, which share the features or the rows; on the GPU no step waits for it."""
    generator = torch.Generator().manual_seed(0)
    whole, part = (architecture.build(6, 6, n) for n in (18, 9))
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) - 0.5)
    whole.constrain_parameters()
    rows = [torch.randn(7, 6, generator=generator) for _ in range(2)]

    def work(group: Group) -> list[float]:
        fused = features and device == "cuda"
        own = cut(whole, part, FeatureShards(group)) if features else whole
        own = copy.deepcopy(own).to(device)
        kernel = build_kernel("sparse", "float32", torch.device(device), name="run", fused=fused)
        gradients = getattr(kernel, "gradients", None)
        optimiser = build_optimiser("adam", own, lr=0.01, clip=None, gradients=gradients)
        mine = slice(None) if features else rows_of_rank(7, group.rank, 2)
        batch = Batch(*(values[mine].to(device) for values in rows))
        step = ShardedStep(kernel, FeatureShards(group)) if features else DistributedStep(kernel, group)
        losses = []
        for _ in range(4):
            losses.append(step(own, batch, VarianceObjective(6.0)).losses["loss"])
            optimiser.step(0.01)
        waits = {line for name, line in record.waits if name != "event"}
        copies = {line for way, line in record.copies if not way.endswith("without a wait")}
        if device == "cuda" and any("training/" in line for line in (*waits, *copies)):
            raise AssertionError(f"steps wait: {record.waits}, {record.copies}")
        return [float(loss) for loss in losses]

    first, second = in_threads(2, work, torch.device(device, 0) if device == "cuda" else torch.device("cpu"))
    if first != second:
        raise AssertionError(f"two processes have other losses: {first}, {second}")
    return {"loss": first[3]}


SPARSE: dict[str, Case] = {
    "sparse topk": training,
    "sparse gated, clipped": partial(training, architecture={"kind": "gated"}, gradient_clip=1.0),
    "sparse auxk": partial(training, auxiliary={"kind": "auxk", "aux_k": 2}, dead_after_steps=1),
    "sparse across layers": partial(training, cross_layer=True, architecture={"kind": "batch_topk", "k": 2}, steps=2),
    "sparse resumed": resuming,
    **{
        f"sparse {architecture.kind} waits": partial(waiting, architecture=architecture)
        for architecture in (TopK(k=2), BatchTopK(k=2), JumpReLU(), ReLU())
    },
    **{
        f"sparse {architecture.kind}, {what} shared": partial(sharing, architecture=architecture, features=features)
        for architecture in (TopK(k=2), BatchTopK(k=2), JumpReLU())
        for what, features in (("features", True), ("rows", False))
    },
}
"""By name."""
