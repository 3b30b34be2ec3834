"""Claim: shuffled shards, with checksum and sync, are written at 0.8 of a raw O_DIRECT write or more.

Ours permutes the rows of every unit, checksums, writes and syncs; the filling of one unit runs beside the writing of
the one before, as in the cache stage. The cache stage also sums statistics of every row as it fills a unit; what that
costs is shown on a line of its own. The others are given rows that already lie in their final order and only write and
sync them.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.numpy
import tensorstore
import torch
import zarr

from benchmarks.harness import Contender, Work, measure
from benchmarks.made_up_rows import RowPool, cache_format, fill_unit, write_units
from benchmarks.report import Report, parse_arguments, scratch_folder
from tailrace.storage.cache_format import CacheFormat
from tailrace.storage.cache_writer import UnitBuffer
from tailrace.storage.memory import aligned_rows, as_bytes

_BLOCK_BYTES = 8 << 20


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    n_units, n_peer_units, rounds = (3, 1, 3) if arguments.quick else (10, 2, 5)
    layout = cache_format(shard_rows=32_768 if arguments.quick else 262_144)
    with scratch_folder(arguments) as folder:
        rates = measure(contenders(folder, layout, n_units, n_peer_units), rounds)
    report = Report(
        "write_shards",
        "Writing shuffled shards",
        f"Pairs of 768 + 768 bfloat16, units of {layout.shard_rows:,} rows, {n_units} units a run "
        f"({n_peer_units} for other libraries), {rounds} rounds in random order; every file synced inside the timing. "
        "Ours permutes rows in memory and checksums; the others get rows in final order and do neither.",
        ("writer", "GB/s", "× raw", "range"),
        ("numpy", "zarr", "zarrs", "tensorstore", "safetensors", "torch"),
    )
    report.add_rates(rates, list(rates.by_name), "raw O_DIRECT", 1e9)
    ours = "ours: permute, checksum, sync"
    report.ratios = {
        "write_vs_raw": rates.ratio(ours, "raw O_DIRECT"),
        "write_with_statistics_vs_raw": rates.ratio("ours with statistics of every row", "raw O_DIRECT"),
        **{f"write_vs_{name.split()[0].replace('.', '_')}": rates.ratio(ours, name) for name in PEERS},
    }
    report.targets = {"write_vs_raw": "≥ 0.8"}
    report.finish(arguments)


def contenders(folder: Path, layout: CacheFormat, n_units: int, n_peer_units: int) -> list[Contender]:
    """Return raw writing, ours, and the other libraries, each with its own folder and its memory already touched."""
    pool = RowPool(layout)
    buffers = [UnitBuffer(layout), UnitBuffer(layout)]
    for buffer in buffers:
        fill_unit(buffer, pool, 0, layout.shard_rows, statistics=False)
    (width,) = {site.d_in for site in layout.sites}
    rows = aligned_rows(layout.shard_rows, width, np.dtype(np.uint16))
    rows[...] = np.resize(next(pool.batches(0, pool.batch_rows))[1]["layer8/in"], rows.shape)

    def entry(name: str, work: Callable[[Path], None], units: int) -> Contender:
        target = folder / "target"

        def run() -> Work:
            work(target)
            return Work(2 * units * rows.nbytes)

        return Contender(name, run, target.mkdir, lambda: shutil.rmtree(target))

    def ours(path: Path, *, statistics: bool) -> None:
        write_units(path, buffers, pool, n_units * layout.shard_rows, statistics=statistics)

    return [
        entry("raw O_DIRECT", lambda path: write_raw(path, rows, 2 * n_units), n_units),
        entry("ours: permute, checksum, sync", lambda path: ours(path, statistics=False), n_units),
        entry("ours with statistics of every row", lambda path: ours(path, statistics=True), n_units),
        *(
            entry(name, functools.partial(write, rows=rows, n_units=n_peer_units), n_peer_units)
            for name, write in PEERS.items()
        ),
    ]


def write_raw(path: Path, rows: np.ndarray, n_files: int) -> None:
    """Write the same bytes with nothing done to them: whole files past the page cache, synced."""
    body = as_bytes(rows)
    for index in range(n_files):
        descriptor = os.open(path / str(index), os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o644)
        os.posix_fallocate(descriptor, 0, len(body))
        for start in range(0, len(body), _BLOCK_BYTES):
            os.pwrite(descriptor, body[start : start + _BLOCK_BYTES], start)
        os.fdatasync(descriptor)
        os.close(descriptor)


def write_zarr(path: Path, rows: np.ndarray, n_units: int, pipeline: str) -> None:
    """Write both sides as Zarr arrays sharded like ours, one whole shard at a time."""
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        for side in ("in", "out"):
            array = zarr.create_array(
                path / side,
                shape=(n_units * len(rows), rows.shape[1]),
                shards=rows.shape,
                chunks=(4096, rows.shape[1]),
                dtype="uint16",
                compressors=None,
                filters=[],
                config={"write_empty_chunks": True},
            )
            for unit in range(n_units):
                array[unit * len(rows) : (unit + 1) * len(rows)] = rows
    sync_files(path)


def write_tensorstore(path: Path, rows: np.ndarray, n_units: int) -> None:
    """Write both sides as Zarr arrays sharded like ours through tensorstore, which syncs by itself."""
    inner = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {"chunk_shape": [4096, rows.shape[1]], "codecs": [inner]}
    for side in ("in", "out"):
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(path / side)},
            "metadata": {
                "shape": [n_units * len(rows), rows.shape[1]],
                "data_type": "uint16",
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(rows.shape)}},
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            },
            "create": True,
        }
        array = tensorstore.open(spec).result()
        for unit in range(n_units):
            array[unit * len(rows) : (unit + 1) * len(rows)].write(rows).result()


def write_safetensors(path: Path, rows: np.ndarray, n_units: int) -> None:
    """Write both sides of a unit as one safetensors file."""
    for unit in range(n_units):
        safetensors.numpy.save_file({"in": rows, "out": rows.view()}, path / f"{unit}.safetensors")
    sync_files(path)


def write_torch(path: Path, rows: np.ndarray, n_units: int) -> None:
    """Write both sides of a unit as files of torch.save."""
    tensor = torch.from_numpy(rows).view(torch.bfloat16)
    for unit in range(n_units):
        for side in ("in", "out"):
            torch.save(tensor, path / f"{unit}-{side}.pt")
    sync_files(path)


def sync_files(path: Path) -> None:
    """Bring every file below ``path`` to the disk."""
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


PEERS: dict[str, Callable[..., None]] = {
    "zarr-python": functools.partial(write_zarr, pipeline="zarr.core.codec_pipeline.BatchedCodecPipeline"),
    "zarrs": functools.partial(write_zarr, pipeline="zarrs.ZarrsCodecPipeline"),
    "tensorstore": write_tensorstore,
    "safetensors": write_safetensors,
    "torch.save": write_torch,
}

if __name__ == "__main__":
    main()
