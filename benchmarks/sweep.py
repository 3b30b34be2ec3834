"""What a sweep of eight runs costs beside the same runs one after another, and beside their steps alone.

Separate runs are processes, as a user starts them, on a cache that lies in memory. Steps alone are taken on batches in
memory, without a cache, logs or checkpoints.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import warm_cache
from benchmarks.made_up_rows import cache_format, write_cache
from benchmarks.report import Report, parse_arguments, scratch_folder
from tailrace.training.loop.settings import TrainSettings

N_RUNS = 8
K = (16, 32, 64, 128)
LR = (2e-4, 4e-4)
BUCKET_BATCHES = 4
"""Batches shuffled together in memory, and read at once."""


@dataclass(frozen=True)
class Size:
    width: int
    d_sae: int
    batch_rows: int
    n_steps: int
    threads: int
    rounds: int


FULL = Size(width=768, d_sae=6144, batch_rows=4096, n_steps=48, threads=1, rounds=3)
QUICK = Size(width=32, d_sae=256, batch_rows=256, n_steps=24, threads=1, rounds=1)


@dataclass(frozen=True)
class Cost:
    """Seconds as the caller sees them (the start of Python included) and as the task does; bytes of rows read."""

    seconds: float
    inside: float
    bytes_read: int


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    size = QUICK if arguments.quick else FULL
    report = Report(
        "sweep",
        "A sweep of eight runs",
        f"TopK, d = {size.width}, d_sae = {size.d_sae:,}, batches of {size.batch_rows:,}, {size.n_steps} steps, k of "
        f"{', '.join(map(str, K))} and two learning rates, {size.threads} thread, warm cache, no held-out rows. "
        f"Whole processes; steps alone are eight runs' steps on batches in memory. Medians of {size.rounds} rounds, "
        "each in an order drawn anew. Cache bytes: rows that a process read, over the rows trained on; a stream reads "
        f"up to two buckets ahead, {2 * BUCKET_BATCHES / size.n_steps:.2f} of them.",
        ("contender", "seconds", "cache bytes read"),
        ("torch", "numpy"),
        targets={
            "sweep_over_separate_runs": "≤ 1.05",
            "sweep_steps_over_steps_alone": "≤ 1.15",
            "cache_bytes_read_by_sweep_over_one_run": "1",
        },
    )
    with scratch_folder(arguments) as folder:
        cache = folder / "cache"
        n_rows = size.batch_rows * size.n_steps
        layout = cache_format(size.width, shard_rows=min(262_144, n_rows), chunk_rows=min(4096, size.batch_rows))
        write_cache(cache, layout, n_rows, bucket_rows=BUCKET_BATCHES * size.batch_rows)
        files = [file for file in cache.rglob("*") if file.is_file()]
        warm_cache(files)
        cache_bytes = n_rows * 2 * size.width * 2  # two sides of two-byte numbers
        found = [measure(folder / f"round-{index}", cache, size, index) for index in range(size.rounds)]
    sweep = [one["sweep"] for one in found]
    separate = [one["separate"] for one in found]
    alone = [one["steps"] for one in found]
    loops = [one["loop"] for one in found]
    reads = {"sweep": sweep[-1].bytes_read, "one run": found[-1]["one"].bytes_read}
    report.rows += [
        ("sweep of 8", f"{statistics.median(one.seconds for one in sweep):.1f}", f"{reads['sweep'] / cache_bytes:.3f}"),
        ("8 processes", f"{statistics.median(separate):.1f}", f"8 × {reads['one run'] / cache_bytes:.3f}"),
        ("training loop of the sweep", f"{statistics.median(loops):.1f}", ""),
        ("its steps alone", f"{statistics.median(alone):.1f}", ""),
    ]
    pairs = list(zip(sweep, separate, loops, alone, strict=True))
    report.ratios = {
        "sweep_over_separate_runs": statistics.median(one.seconds / other for one, other, _, _ in pairs),
        "sweep_steps_over_steps_alone": statistics.median(loop / steps for _, _, loop, steps in pairs),
        "cache_bytes_read_by_sweep": reads["sweep"] / cache_bytes,
        "cache_bytes_read_by_sweep_over_one_run": reads["sweep"] / reads["one run"],
    }
    report.finish(arguments)


def measure(place: Path, cache: Path, size: Size, seed: int) -> dict[str, Any]:
    """Run all contenders once, in an order drawn anew."""
    found: dict[str, Any] = {}
    contenders = ["sweep", "separate", "steps"]
    for index in np.random.Generator(np.random.Philox(seed)).permutation(len(contenders)).tolist():
        name = contenders[index]
        if name == "sweep":
            swept = ["--sweep", f"k={','.join(map(str, K))}", "--sweep", f"lr={','.join(map(str, LR))}"]
            found["sweep"] = train(cache, place / "sweep", size, swept)
            found["loop"] = loop_seconds(place / "sweep")
        elif name == "separate":
            costs = [
                train(cache, place / f"k{k}-lr{lr}", size, ["--k", str(k), "--lr", str(lr)]) for k in K for lr in LR
            ]
            found["separate"], found["one"] = sum(one.seconds for one in costs), costs[0]
        else:
            found["steps"] = sum(steps_alone(cache, size, k, lr) for k in K for lr in LR)
    return found


def train(cache: Path, output: Path, size: Size, further: Sequence[str]) -> Cost:
    settings = {
        "--architecture": "topk",
        "--d-sae": size.d_sae,
        "--batch-rows": size.batch_rows,
        "--steps": size.n_steps,
        "--threads": size.threads,
        "--out": output,
    }
    flags = [str(part) for pair in settings.items() for part in pair]
    return task("command", "train", str(cache), *flags, "--quiet", *further)


def loop_seconds(sweep: Path) -> float:
    """Return the time from the first step to the last of the runs of a sweep, which take their steps in turn."""
    logs = [path.read_text().splitlines()[-1] for path in sweep.glob("runs/*/timing.jsonl")]
    assert len(logs) == N_RUNS, f"{sweep}: {len(logs)} runs, wanted {N_RUNS}"
    return max(float(json.loads(line)["seconds"]) for line in logs)


def steps_alone(cache: Path, size: Size, k: int, lr: float) -> float:
    settings = TrainSettings.model_validate(
        {"architecture": {"kind": "topk", "k": k}, "d_sae": size.d_sae, "batch_rows": size.batch_rows, "lr": lr}
    )
    cost = task("steps", str(cache), str(size.threads), str(size.n_steps), settings.model_dump_json(exclude_unset=True))
    return cost.inside


def task(*arguments: str) -> Cost:
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.sweep_task", *arguments]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    seconds = time.perf_counter() - start
    inside = json.loads(printed)
    return Cost(seconds, inside["seconds"], inside["bytes_read"])


if __name__ == "__main__":
    main()
