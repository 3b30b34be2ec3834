"""What a machine has, what it reaches when measured, and which part of it limits training from a cache."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from pydantic import BaseModel

from tailrace.pipeline.shared.compute import Compute, gpus_seen, require_linux
from tailrace.storage.activation_cache import CacheSplit, open_cache
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import SettingsError
from tailrace.storage.generations import CachePath
from tailrace.training.kernels.adaptive import resolve_precision
from tailrace.training.loop.cost import check_memory, step_seconds, training_bytes
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows.batches import CacheBatches, keys_of

_PACKAGES = ("torch", "triton", "transformer_lens", "transformers", "datasets", "zarr", "numpy", "pyarrow")
_SECONDS = 1.5
"""Spent on each rate at most, after a first try that is not counted."""
_FILE_BYTES = 256 << 20
"""Size of the file that is written to time a disk where no cache is given."""
_DRIVER = Path("/proc/driver/nvidia/version")


class Gpu(BaseModel):
    """A GPU that torch can use."""

    name: str
    index: int
    total_bytes: int
    free_bytes: int
    capability: str
    """Compute capability, such as 9.0."""


class Rates(BaseModel):
    """What was measured. Bytes and products (a multiplication and an addition are two) in a second."""

    disk: float
    """Reading files that lie in no memory."""
    float32: float
    bfloat16: float
    copy_pinned: float | None = None
    """From pinned host memory to the GPU; None on a CPU."""
    copy_pageable: float | None = None


class RowRates(BaseModel):
    """Rows a second that each part can give a training run of ``d_sae`` features; the smallest one decides."""

    cache: str
    site: str
    row_bytes: int
    d_sae: int
    kernel: str
    needed_bytes: int
    """Least memory that training takes on the device."""
    disk: float
    """What the disk delivers, by its rate."""
    reader: float
    """Measured with files in memory, batches on the device."""
    copy_to_device: float | None
    step: float
    """Measured: steps on random rows."""

    def slowest(self) -> str:
        """Return the part that decides."""
        parts = {"disk": self.disk, "reader": self.reader, "step": self.step}
        if self.copy_to_device is not None:
            parts["copy"] = self.copy_to_device
        return min(parts, key=lambda name: parts[name])

    def sentence(self) -> str:
        """Return what limits training, and by how much."""
        slowest = self.slowest()
        others = min(self.disk, self.reader, self.copy_to_device or self.reader)
        if slowest == "step":
            return f"the step limits: {_count(self.step)} rows/s; reading could give {_count(others)}"
        rates = {"disk": self.disk, "reader": self.reader, "copy": self.copy_to_device or 0.0}
        what = {"disk": "the disk", "reader": "the reader", "copy": "the copy to the GPU"}[slowest]
        advice = (
            "a sweep trains several transcoders from one read"
            if slowest != "copy"
            else "int8 caches halve what is copied"
        )
        return f"{what} limits: {_count(rates[slowest])} rows/s; steps could take {_count(self.step)}: {advice}"


class Report(BaseModel):
    """Everything ``pipeline doctor`` says."""

    versions: dict[str, str | None]
    """By package; None where it is not installed."""
    python: str
    system: str
    cores: int
    threads: int
    memory_bytes: int
    free_memory_bytes: int
    disk_free_bytes: int
    cuda: str | None
    """Version of CUDA that torch was built for."""
    driver: str | None
    gpus: list[Gpu]
    device: str
    precision: str
    """What ``precision: auto`` is there."""
    rates: Rates
    limits: RowRates | None
    notes: list[str]
    """What could be better, each with what to do."""


def run(
    *,
    cache: CachePath | None = None,
    settings: TrainSettings | None = None,
    folder: Path = Path(),
    compute: Compute = Compute(),
) -> Report:
    """Look at the machine and measure it for a few seconds; with a ``cache``, also what limits training from it.

    ``settings`` are those of the training, by default its defaults; without a cache the disk of ``folder`` is measured,
    where 256 MB are written and deleted. Raises SettingsError if the cache has several sites and ``settings`` names
    none, and the errors of opening a cache.
    """
    require_linux("doctor")
    chosen = settings or TrainSettings()
    opened = None if cache is None else open_cache(cache)
    site = None if opened is None else _site(opened.sites, chosen, str(cache))
    with compute.opened() as device:
        split = None if opened is None else opened.split("train")
        precision = resolve_precision(chosen.precision, device)
        rates = _rates(device, folder, None if split is None or site is None else list(_files(split, site)))
        limits = None
        if split is not None and site is not None:
            limits = _limits(split, site, chosen, rates, device)
        pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return Report(
            versions={"tailrace": version("tailrace"), **{name: _version(name) for name in _PACKAGES}},
            python=platform.python_version(),
            system=platform.platform(),
            cores=len(os.sched_getaffinity(0)),
            threads=torch.get_num_threads(),
            memory_bytes=pages * page,
            free_memory_bytes=os.sysconf("SC_AVPHYS_PAGES") * page,
            disk_free_bytes=shutil.disk_usage(folder if opened is None else opened.path).free,
            cuda=torch.version.cuda,
            driver=_DRIVER.read_text().splitlines()[0] if _DRIVER.exists() else None,
            gpus=_gpus(),
            device=str(device),
            precision=precision,
            rates=rates,
            limits=limits,
            notes=list(_notes(device)),
        )


def _site(sites: dict[str, Site], settings: TrainSettings, cache: str) -> Site:
    names = [settings.site] if settings.site is not None else list(sites)
    if len(names) != 1 or names[0] not in sites:
        raise SettingsError(f"{cache}: --site must be one of {', '.join(sites)}")
    return sites[names[0]]


def _gpus() -> list[Gpu]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        gpus.append(Gpu(name=name, index=index, total_bytes=total, free_bytes=free, capability=f"{major}.{minor}"))
    return gpus


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _notes(device: torch.device) -> Iterator[str]:
    if device.type != "cuda" and (_DRIVER.exists() or shutil.which("nvidia-smi")):
        yield f"there is an NVIDIA driver, but torch sees no GPU ({gpus_seen()}); see docs/gpu.md, Installing"
    if device.type == "cuda" and _version("triton") is None:
        yield "triton is not installed, which the exact step on a GPU needs: pip install triton"


def _rates(device: torch.device, folder: Path, files: list[Path] | None) -> Rates:
    size = 4096 if device.type == "cuda" else 1024
    rates = Rates(
        disk=_disk_rate(folder, files),
        float32=_product_rate(size, torch.float32, device),
        bfloat16=_product_rate(size, torch.bfloat16, device),
    )
    if device.type == "cuda":
        rates.copy_pinned, rates.copy_pageable = (_copy_rate(device, pinned) for pinned in (True, False))
    return rates


def _product_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)

    def multiply() -> None:
        torch.mm(left, right, out=out)
        out[0, 0].item()  # waits for a GPU

    return 2.0 * size**3 / _seconds(multiply)


def _copy_rate(device: torch.device, pinned: bool) -> float:
    source = torch.empty(_FILE_BYTES, dtype=torch.uint8, pin_memory=pinned)
    out = torch.empty_like(source, device=device)

    def copy() -> None:
        out.copy_(source, non_blocking=pinned)
        out[0].item()

    return len(source) / _seconds(copy)


def _seconds(work: Callable[[], object]) -> float:
    """Return the median seconds of some work, repeated for ``_SECONDS``."""
    work()
    seconds: list[float] = []
    while sum(seconds) < _SECONDS and len(seconds) < 20:
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def sustained_rate(read: Callable[[], int], bucket_rows: int) -> float:
    """Return rows a second of a reader whose calls return how many rows they gave.

    It loads buckets of rows ahead, so only whole buckets, with the wait before each, say how fast it is: one is taken
    uncounted, then two are counted, or one if it takes ``5 · _SECONDS``; more of small ones.
    """
    n_rows, n_buckets, seconds = 0, 0, 0.0
    while n_rows < bucket_rows:
        n_rows += read()
    n_rows, started = 0, time.perf_counter()
    while seconds < (_SECONDS if n_buckets >= 2 else 5 * _SECONDS):
        n_buckets += 1
        while n_rows < n_buckets * bucket_rows:
            n_rows += read()
        seconds = time.perf_counter() - started
    return n_rows / seconds


def _disk_rate(folder: Path, files: list[Path] | None) -> float:
    """Return bytes a second of reading ``files``, or one written for it, that the system keeps in no memory."""
    if files:
        return _read_rate(files)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as written:
        written.write(os.urandom(_FILE_BYTES))
        written.flush()
        os.fsync(written.fileno())
        return _read_rate([Path(written.name)])


def _read_rate(files: list[Path]) -> float:
    buffer = bytearray(16 << 20)
    n_bytes, seconds = 0, 0.0
    for path in files:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            while n_read := file.readinto(buffer):
                n_bytes += n_read
            seconds += time.perf_counter() - started
        if seconds > _SECONDS:
            break
    return n_bytes / seconds


def _files(split: CacheSplit, site: Site) -> Iterator[Path]:
    """Yield the shard files of a site."""
    for unit in range(split.n_units):
        for key in keys_of(site):
            for spec in split.source(key).specs:
                yield split.read_shard(spec, unit, lambda group: group) / spec.shard_name(unit)


def _limits(split: CacheSplit, site: Site, settings: TrainSettings, rates: Rates, device: torch.device) -> RowRates:
    widths = [(site.d_in, site.d_out)]
    check_memory([(settings, widths)], device)
    precision = resolve_precision(settings.precision, device)
    with CacheBatches(split, [site], batch_rows=settings.batch_rows, seed=0, device=device) as batches:

        def read() -> int:
            inputs = batches.next_batch()[site.name].inputs
            inputs[0, 0].item()  # waits for a GPU
            return len(inputs)

        reader = sustained_rate(read, min(split.bucket_rows, split.n_rows))
    step = step_seconds(settings, site.d_in, site.d_out, device=device, precision=precision)
    return RowRates(
        cache=str(split.cache.path),
        site=site.name,
        row_bytes=site.row_bytes,
        d_sae=settings.n_features(site.d_in),
        kernel=settings.kernel,
        needed_bytes=training_bytes(settings, widths, device),
        disk=rates.disk / site.row_bytes,
        reader=reader,
        copy_to_device=None if rates.copy_pinned is None else rates.copy_pinned / site.row_bytes,
        step=settings.batch_rows / step,
    )


def _count(rate: float) -> str:
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if rate >= unit:
            return f"{rate / unit:.3g}{name}"
    return f"{rate:.0f}"
