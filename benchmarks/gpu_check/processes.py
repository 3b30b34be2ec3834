"""One transcoder by a process on each GPU, by NCCL, against one process on the CPU.

``python -m benchmarks.gpu_check.processes FOLDER CASE DEVICE``, started by torchrun, is one of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check import bench as benches
from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.outcomes import TOLERANCE, Check, NotHereError, Numbers, agreement

SECONDS = 240
"""After which processes are taken to wait for each other."""
SETTINGS = {
    "architecture": {"kind": "topk", "k": 4},
    "d_sae": 64,
    "steps": 12,
    "batch_rows": 96,
    "lr": 1e-2,
    "evaluation_rows": 64,
    "precision": "float32",
}
BATCH_TOPK = {"kind": "batch_topk", "k": 4}
CASES: Mapping[str, dict[str, Any]] = {
    "rows shared, batch_topk": {"architecture": BATCH_TOPK},
    "features shared, topk": {},
    "features shared, batch_topk": {"architecture": BATCH_TOPK},
    "features shared, layers": {"architecture": BATCH_TOPK, "cross_layer": True},
}
"""What differs, by name."""


def checks(bench: Bench) -> Iterator[Check]:
    """Yield a check for each case and kernel."""
    if not bench.is_cuda:
        return  # tests have processes without a GPU
    for name, kernel in (*((name, "sparse") for name in CASES), ("rows shared, batch_topk", "auto")):
        yield Check(
            f"two GPUs, {name}, {kernel}", "correctness", 30, partial(compared, bench.device, bench, name, kernel)
        )


def compared(device: str, bench: Bench, name: str, kernel: str) -> Numbers:
    """Train on two of a device and in one process on the CPU; raise WrongError where scores differ."""
    if device.startswith("cuda") and torch.cuda.device_count() < 2:
        raise NotHereError("one GPU is here, and two are needed")
    with bench.scratch(f"{name}, {kernel}") as folder:
        together = in_processes(folder, name, kernel, device)
        alone = trained(folder, "alone", settings_of(name, "dense"), "cpu", shard_features=False)
    return {"largest difference": agreement(together, alone, TOLERANCE)}


def in_processes(folder: Path, name: str, kernel: str, device: str, n: int = 2) -> dict[str, float]:
    """Train by ``n`` processes that torchrun starts; return the scores."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    command = [*launch, "-m", "benchmarks.gpu_check.processes", str(folder), name, kernel, device]
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    prepare(folder, settings_of(name, kernel))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as started:
        try:
            said = started.communicate(timeout=SECONDS)[1]
        except subprocess.TimeoutExpired:
            started.terminate()  # torchrun ends its processes, which keep the GPUs if it is killed
            raise
    if started.returncode:
        raise RuntimeError(f"torchrun ended with {started.returncode}: {said[-2000:]}")
    return trained(folder, "together", settings_of(name, kernel), device, shard_features=False)  # published: read


def settings_of(name: str, kernel: str) -> dict[str, Any]:
    """Return what is trained in a case."""
    return {**CASES[name], "kernel": kernel}


def prepare(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the cache that a case reads."""
    from tests.support.training_caches import publish_layers, small_cache

    cache = folder / "cache"
    publish_layers(cache) if settings.get("cross_layer") else small_cache(cache, d_in=16, d_out=12)


def trained(
    folder: Path, output: str, settings: Mapping[str, Any], device: str, *, shard_features: bool
) -> dict[str, float]:
    """Train, or read what is published; return the scores."""
    from tailrace.pipeline.shared.compute import Compute
    from tailrace.pipeline.train import stage as train
    from tailrace.training.loop.settings import TrainSettings

    heldout = train.run(
        TrainSettings.read(SETTINGS, settings),
        cache=folder / "cache",
        output=folder / output,
        compute=Compute(device=device, quiet=True),
        shard_features=shard_features,
    ).metrics["heldout"]
    return {"fvu": heldout["fvu"], "l0": heldout["l0"]}


def main() -> None:
    """Train as one of the processes."""
    folder, name, kernel, device = sys.argv[1:]
    benches.replace_numba()
    benches.leave_pretended_gpu_out()
    settings, shares_features = settings_of(name, kernel), name.startswith("features")
    trained(Path(folder), "together", settings, device, shard_features=shares_features)


if __name__ == "__main__":
    main()
