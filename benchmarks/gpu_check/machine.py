"""The machine itself: what ``pipeline doctor`` says of it, and the ceilings that no step can pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.outcomes import Check, NotHereError, Numbers
from tailrace.pipeline.doctor import stage as doctor
from tailrace.pipeline.shared.compute import Compute

BATCH_BYTES = 4096 * 768 * 2 * 2
"""Of a batch of a GPT-2-sized cache in bfloat16, inputs and outputs."""


def checks(bench: Bench) -> Iterator[Check]:
    """Yield the checks."""
    yield Check("machine", "cost", 15, partial(described, bench))
    yield Check("ceilings", "cost", 8, partial(ceilings, bench))
    yield Check("torch.topk", "cost", 5, partial(largest, bench))
    yield Check("GPUDirect reads", "cost", 8, partial(direct_reads, bench))


def described(bench: Bench) -> Numbers:
    """Return what ``pipeline doctor`` finds."""
    device = bench.device if bench.is_cuda else "cpu"  # a pretended one has nothing to measure
    report = doctor.run(folder=bench.folder, compute=Compute(device=device, quiet=True))
    rates = {name: rate for name, rate in report.rates.model_dump().items() if rate is not None}
    return {
        "versions": {name: version for name, version in report.versions.items() if version is not None},
        "python": report.python,
        "cuda": report.cuda,
        "driver": report.driver,
        "gpus": {str(gpu.index): f"{gpu.name}, {gpu.total_bytes / 1e9:.0f} GB" for gpu in report.gpus},
        "cores": report.cores,
        "memory GB": report.memory_bytes / 1e9,
        "rates": rates,
        "notes": report.notes,
    }


def ceilings(bench: Bench) -> Numbers:
    """Return rates of products, copies and launches; products of whole matrices, copies of one batch's bytes."""
    size = 256 if bench.small else 8192
    device = bench.device
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    half_left, half_right = left.bfloat16(), right.bfloat16()
    products: dict[str, Callable[[], object]] = {
        "bfloat16": lambda: half_left @ half_right,
        "tf32": lambda: left @ right,
        "float32": lambda: left @ right,
    }
    numbers: dict[str, float] = {}
    allowed = torch.backends.cuda.matmul.allow_tf32
    for name, product in products.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        numbers[f"{name} TFLOP/s"] = 2 * size**3 / bench.time(product, 8, 3).device / 1e12
    torch.backends.cuda.matmul.allow_tf32 = allowed
    n_bytes = 1 << 20 if bench.small else 1 << 31
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    numbers["copy on the device GB/s, read and written"] = (
        2 * n_bytes / bench.time(lambda: target.copy_(source), 10, 3).device / 1e9
    )
    numbers |= host_copies(bench)
    one = torch.zeros(1, device=device)
    numbers["launch us"] = bench.time(lambda: one.add_(1), 2000, 50).wall * 1e6
    return numbers


def host_copies(bench: Bench) -> dict[str, float]:
    """Return GB/s between host and device, one batch at a time."""
    n_bytes = 1 << 20 if bench.small else BATCH_BYTES
    pageable = torch.zeros(n_bytes, dtype=torch.uint8)
    pinned = pageable.pin_memory() if bench.is_cuda else pageable
    there = torch.empty(n_bytes, dtype=torch.uint8, device=bench.device)
    ways: dict[str, Callable[[], object]] = {
        "to the device, pageable": lambda: there.copy_(pageable),
        "to the device, pinned": lambda: there.copy_(pinned, non_blocking=True),
        "to the host, pageable": lambda: pageable.copy_(there),
        "to the host, pinned": lambda: pinned.copy_(there, non_blocking=True),
    }
    return {f"{name} GB/s": n_bytes / bench.time(way, 20, 5).wall / 1e9 for name, way in ways.items()}


def largest(bench: Bench) -> Numbers:
    """Return ms of ``torch.topk``, k 64 of 4,096 rows, which a selection has to be faster than."""
    numbers = {}
    for n_features in (512,) if bench.small else (24_576, 65_536, 131_072):
        for dtype in (torch.bfloat16, torch.float32):
            rows = torch.randn(4096, n_features, device=bench.device, dtype=dtype)
            seconds = bench.time(partial(rows.topk, 64, sorted=False), 5, 2).device
            numbers[f"{n_features} {str(dtype).removeprefix('torch.')} ms"] = 1e3 * seconds
    return numbers


def direct_reads(bench: Bench) -> Numbers:
    """Return GB/s of reading a file into the device's memory past the host's, by kvikio."""
    if not bench.is_cuda:
        raise NotHereError("reads into a GPU's memory, and this is a CPU")
    import kvikio  # type: ignore[import-not-found]

    n_bytes = 1 << 30
    with bench.scratch("direct") as folder:
        path = folder / "file"
        with path.open("wb") as file:
            for _ in range(n_bytes >> 26):
                file.write(b"\x5a" * (1 << 26))
        target = torch.empty(n_bytes, dtype=torch.uint8, device=bench.device)
        with kvikio.CuFile(path, "r") as opened:
            seconds = bench.time(lambda: opened.read(target), 3, 1).wall
        mode = str(kvikio.defaults.get("compat_mode"))
        if not bool((target == 0x5A).all()):
            raise ValueError("kvikio read other bytes than the file has")
    return {"GB/s": n_bytes / seconds / 1e9, "compatibility mode (not direct)": mode}
