"""What training costs on a device: whole steps at four sizes, rows on their way there, a sweep that reads them once."""

from __future__ import annotations

import gc
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from benchmarks.gpu_check.bench import Bench, log_lines
from benchmarks.gpu_check.outcomes import Check, NotHereError, Numbers
from benchmarks.harness import forget_cached, warm_cache
from benchmarks.made_up_rows import KEYS, SITE, RowPool, cache_format, publish_rows
from benchmarks.train_step_ours import statistics_of
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import sweep
from tailrace.storage.activation_cache import ActivationCache
from tailrace.storage.cache_format import Site, split_path
from tailrace.storage.cache_writer import UnitBuffer
from tailrace.storage.errors import OutOfMemoryError
from tailrace.storage.statistics import SiteStatistics
from tailrace.training.architectures.base import Transcoder
from tailrace.training.kernels.adaptive import resolve_precision
from tailrace.training.loop import initialise
from tailrace.training.loop.build import build_run
from tailrace.training.loop.cost import check_memory
from tailrace.training.loop.initialise import FeatureSlice
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows.batches import Batch, CacheBatches


class Size(NamedTuple):
    """A transcoder's sizes, and the seconds that timing its steps is likely to take, making its weights included."""

    name: str
    width: int
    d_sae: int
    seconds: float


SIZES = (
    Size("768 x 24,576", 768, 24_576, 4),
    Size("2304 x 65,536", 2304, 65_536, 5),
    Size("2304 x 131,072", 2304, 131_072, 7),
    Size("4096 x 131,072", 4096, 131_072, 10),
)
"""GPT-2, Gemma-2-2B twice, Llama-3-8B."""
SMALL = (Size("64 x 512", 64, 512, 1),)
BATCH_ROWS, K = 4096, 64
WARM_STEPS = 12
"""Not counted: in the first ones kernels are compiled, put to the proof and chosen."""
SWEEP_KS = (16, 32, 64, 128)


def checks(bench: Bench) -> Iterator[Check]:
    """Yield the checks, what users get and the smallest size first: what time is left decides how far they go."""
    sizes = SMALL if bench.small else SIZES
    for kernel, kinds in (("auto", ("topk", "batch_topk", "jumprelu")), ("dense", ("topk", "batch_topk"))):
        for size, kind in itertools.product(sizes, kinds):
            name = f"step, {kind} {size.name}, {kernel}"
            yield Check(name, "cost", size.seconds, partial(steps, bench, size, kind, kernel))
        if kernel == "auto":
            yield Check("rows to the device", "cost", 15, partial(rows_to_device, bench))
            yield Check("resident sweep", "cost", 25, partial(resident_sweep, bench))


def steps(bench: Bench, size: Size, kind: str, kernel: str) -> Numbers:
    """Return ms of a step on rows that are there, by the device and by the wall, and what it holds at the peak."""
    settings = settings_of(kind, size, kernel)
    device = torch.device(bench.device)
    try:
        check_memory([(settings, [(size.width, size.width)])], device)
    except OutOfMemoryError as error:
        raise NotHereError(str(error)) from error
    gc.collect()
    with log_lines("tailrace.training") as lines:
        run = built(settings, size, device)
        torch.manual_seed(0)
        rows = [torch.randn(BATCH_ROWS, size.width, device=device) for _ in range(4)]
        batches = [{SITE: Batch(rows[i], rows[i - 1])} for i in range(4)]
        state = 0

        def step() -> None:
            nonlocal state
            run.step(batches[state % 4])
            state += 1

        for _ in range(1 if bench.small else WARM_STEPS):
            step()
        n_waits = waits(bench, step)
        bench.forget_peak()
        timing = bench.time(step, 10, 2)
    assert run.latest is not None
    return {
        "device ms": 1e3 * timing.device,
        "wall ms": 1e3 * timing.wall,
        "rows/s": BATCH_ROWS / timing.wall,
        "peak GB": bench.peak_gb(),
        "waits a step": n_waits,
        "active a row": float(run.latest.n_active.sum()) / run.latest_rows,
        "said": lines[:4],
    }


def waits(bench: Bench, step: Callable[[], object], n: int = 4) -> float | None:
    """Return how often the host waits for the device in a step, as torch sees it; None on a CPU.

    That a number of two steps ago has arrived is waited for by an event, which is not counted.
    """
    if not bench.is_cuda:
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(n):
                step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in seen) / n


def settings_of(kind: str, size: Size, kernel: str) -> TrainSettings:
    """Return the settings of a run of one of the checks, all else as users get it."""
    architecture: dict[str, Any] = {"kind": kind}
    if kind != "jumprelu":
        architecture["k"] = K
    values = {"architecture": architecture, "d_sae": size.d_sae, "batch_rows": BATCH_ROWS, "kernel": kernel}
    return TrainSettings.read(values)


def built(settings: TrainSettings, size: Size, device: torch.device) -> TrainingRun:
    """Return a run on the device as ``pipeline train`` builds it, but for where its first weights are drawn.

    NumPy takes seconds for half a billion of them, the device milliseconds.
    """

    def directions(seed: int, purpose: str, own: FeatureSlice, width: int) -> torch.Tensor:  # noqa: ARG001
        torch.manual_seed(seed)
        rows = torch.randn(own.n, width, device=device)
        return rows / rows.norm(dim=1, keepdim=True)

    sample = torch.randn(1, 256, size.width, generator=torch.Generator().manual_seed(1))
    statistics = statistics_of(sample)
    with mock.patch.object(initialise, "random_directions", directions), torch.device(device):
        return build_run(
            settings,
            Site(SITE, "in", "out", size.width, size.width, "bfloat16"),
            {"in": statistics, "out": statistics},
            n_steps=10**6,
            device=device,
            precision=resolve_precision("auto", device),
        )


class SampledStatistics(SiteStatistics):
    """Sums of the first row of each piece: enough to train by, and made in no time where loops are not compiled."""

    def add(self, rows: np.ndarray) -> int | None:
        """Add one row."""
        return super().add(rows[:1])


def made_up_cache(path: Path, width: int, n_rows: int, shard_rows: int) -> ActivationCache:
    """Write a cache of random rows in bfloat16."""
    layout = cache_format(width, shard_rows=shard_rows, chunk_rows=min(4096, shard_rows))
    path.mkdir(parents=True)
    buffer, pool = UnitBuffer(layout), RowPool(layout, n_batches=4)
    for unit, start in enumerate(range(0, n_rows, shard_rows)):
        n = min(shard_rows, n_rows - start)
        buffer.begin(0, "train", unit, n)
        buffer.statistics = {key: SampledStatistics(sums.width) for key, sums in buffer.statistics.items()}
        for provenance, activations in pool.batches(start, n):
            buffer.fill(provenance, activations)
        buffer.commit(path, 0)
    return publish_rows(path, layout, n_rows)


def rows_to_device(bench: Bench) -> Numbers:
    """Return rows/s of bringing a cache's shuffled batches to the device, beside a plain read of its files."""
    width, n_rows, shard_rows = (64, 16_384, 8192) if bench.small else (768, 786_432, 262_144)
    with bench.scratch("rows") as folder:
        cache = made_up_cache(folder / "cache", width, n_rows, shard_rows)
        split, site = cache.split("train"), cache.sites[SITE]
        specs = [spec for key in KEYS for spec in split.source(key).specs]
        home = split_path(split.root, "train")
        files = [home / spec.shard_name(unit) for unit in range(split.n_units) for spec in specs]
        n_bytes = sum(path.stat().st_size for path in files)
        numbers: dict[str, Any] = {"row bytes": site.row_bytes, "cache GB": n_bytes / 1e9}
        for temperature in ("cold", "warm"):
            ready = forget_cached if temperature == "cold" else warm_cache
            ready(files)
            started = time.perf_counter()
            warm_cache(files)  # reads them once, in order
            numbers[f"{temperature} files GB/s"] = n_bytes / (time.perf_counter() - started) / 1e9
            ready(files)
            with CacheBatches(split, [site], batch_rows=BATCH_ROWS, seed=0, device=bench.device) as batches:
                started, total = time.perf_counter(), torch.zeros((), device=bench.device)
                for _ in range(n_rows // BATCH_ROWS):
                    total += batches.next_batch()[SITE].outputs[0, 0]
                total.item()
                seconds = time.perf_counter() - started
            numbers[f"{temperature} rows/s"] = n_rows / seconds
            numbers[f"{temperature} GB/s"] = n_rows * site.row_bytes / seconds / 1e9
    return numbers


def resident_sweep(bench: Bench) -> Numbers:
    """Return the rows/s of a sweep in its first epoch and in later ones, when rows may lie on the device already."""
    width, n_rows, d_sae = (64, 16_384, 256) if bench.small else (768, 262_144, 24_576)
    per_epoch = n_rows // BATCH_ROWS
    epochs = 3
    base = {"d_sae": d_sae, "batch_rows": BATCH_ROWS, "steps": epochs * per_epoch, "log_every": per_epoch}
    runs = {f"k{k}": TrainSettings.read(base, {"architecture": {"kind": "topk", "k": k}}) for k in SWEEP_KS}
    ends: dict[int, float] = {}

    def note(step: int, transcoder: Transcoder) -> None:
        transcoder.b_dec_out[0].item()  # waits for the device
        ends[step] = time.perf_counter()

    with bench.scratch("sweep") as folder, log_lines("tailrace.training") as lines:
        made_up_cache(folder / "cache", width, n_rows, n_rows)
        bench.forget_peak()
        started = time.perf_counter()
        sweep.run(
            runs,
            cache=folder / "cache",
            output=folder / "sweep",
            compute=Compute(device=bench.device, quiet=True),
            hooks=[(per_epoch // 4, note)],
            checkpoint_steps=10**9,
        )
        seconds = time.perf_counter() - started
    marks = sorted(ends)
    rates = [(last - first) * BATCH_ROWS / (ends[last] - ends[first]) for first, last in itertools.pairwise(marks)]
    in_first = [rate for mark, rate in zip(marks[1:], rates, strict=True) if mark <= per_epoch]
    later = [rate for mark, rate in zip(marks[1:], rates, strict=True) if mark > per_epoch]
    return {
        "runs": len(runs),
        "first epoch rows/s": float(np.median(in_first)),
        "later epochs rows/s": float(np.median(later)),
        "command seconds": seconds,
        "peak GB": bench.peak_gb(),
        "said": [line for line in lines if "kernel" in line or "rows" in line][:4],
    }
