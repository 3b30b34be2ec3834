"""Claim: shuffled batches are read at 0.85 of a raw sequential read from a materialised epoch, warm and cold, and at
0.5 (cold) and 0.35 (warm) of it gathered straight from the cache; a GPU's buckets, whose rows the GPU puts in order, at
0.8 (warm).

Every contender delivers batches of 4,096 pairs and the consumer adds up one column of both sides, so that no page is
left unread. Rows before the clock starts fill the prefetching, as they would in any long run.
"""

from __future__ import annotations

import os
import queue
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import tensorstore
import torch
import zarr
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import Contender, Rates, Work, forget_cached, measure, warm_cache
from benchmarks.made_up_rows import KEYS, cache_format, write_cache
from benchmarks.report import Report, parse_arguments, scratch_folder
from tailrace.storage.activation_cache import CacheSplit
from tailrace.storage.materialise import materialise_epoch
from tailrace.storage.memory import aligned_rows, as_bytes
from tailrace.storage.orders import Piece
from tailrace.training.rows.device_rows import N_READERS, N_SLOTS, SLOT_BYTES

BATCH_ROWS = 4096
BLOCK_ROWS = 8192
_WIDTH = 768
_PAIR_BYTES = 2 * 2 * _WIDTH
Pair = tuple[np.ndarray, np.ndarray]

RAW, MATERIALISED, GATHERED = "raw sequential preadv", "ours, materialised", "ours, gathered"
RAW_UNITS, FOR_A_GPU = "raw, the gathered cache's files", "ours, the host's part for a GPU"


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    bucket_rows, n_buckets, rounds = (32_768, 4, 3) if arguments.quick else (262_144, 5, 5)
    n_rows = bucket_rows * n_buckets
    with scratch_folder(arguments) as folder:
        data = Files(folder, n_rows, bucket_rows)
        warm = measure(contenders(data, skipped_rows=2 * bucket_rows, cold=False), rounds)
        cold = measure(contenders(data, skipped_rows=2 * bucket_rows, cold=True), rounds)
    report = Report(
        "read_batches",
        "Reading shuffled batches",
        f"{n_rows:,} pairs of {_WIDTH} + {_WIDTH} bfloat16 ({n_rows * _PAIR_BYTES / 1e9:.1f} GB), batches of "
        f"{BATCH_ROWS:,}, {rounds} rounds in random order. The materialised epoch lies in shards of {bucket_rows:,} "
        f"rows; the gathered cache in units of {bucket_rows // 32:,}, so that a bucket of {bucket_rows:,} rows gathers "
        f"runs of {bucket_rows // (n_buckets * 32):,} rows, as from 50 million rows in units of 262,144; for a GPU its "
        f"buckets are read run by run into {N_SLOTS} slots of {SLOT_BYTES >> 20} MiB by {N_READERS} threads. "
        f"zarr-python, zarrs and tensorstore read blocks of {BLOCK_ROWS:,} rows of the materialised arrays in random "
        "order and permute each in memory; safetensors copies slices in file order; the DataLoader reads single rows "
        "of the materialised files, memory-mapped. Cold: the files' pages dropped with POSIX_FADV_DONTNEED before "
        "every run.",
        ("files", "reader", "krow/s", "× raw", "range"),
        ("numpy", "zarr", "zarrs", "tensorstore", "safetensors", "torch"),
    )
    for group, rates in (("warm", warm), ("cold", cold)):
        report.add_rates(rates, list(rates.by_name), RAW, 1e3, group)
        report.ratios |= ratios(group, rates)
    report.targets = {
        "materialised_vs_raw_warm": "≥ 0.85",
        "materialised_vs_raw_cold": "≥ 0.85",
        "gathered_vs_raw_warm": "≥ 0.35",
        "for_a_gpu_vs_raw_warm": "≥ 0.8",
        "gathered_vs_raw_cold": "≥ 0.5",
    }
    report.finish(arguments)


def ratios(group: str, rates: Rates) -> dict[str, float]:
    """Return ours against raw, and ours against every other reader."""
    named = {
        f"materialised_vs_raw_{group}": rates.ratio(MATERIALISED, RAW),
        f"gathered_vs_raw_{group}": rates.ratio(GATHERED, RAW),
        f"for_a_gpu_vs_raw_{group}": rates.ratio(FOR_A_GPU, RAW),
        f"for_a_gpu_vs_raw_of_its_files_{group}": rates.ratio(FOR_A_GPU, RAW_UNITS),
    }
    others = [name for name in rates.by_name if name not in (RAW, RAW_UNITS, MATERIALISED, GATHERED, FOR_A_GPU)]
    for name in others:
        short = name.replace(" ", "_").replace(",", "")
        named[f"materialised_vs_{short}_{group}"] = rates.ratio(MATERIALISED, name)
        named[f"gathered_vs_{short}_{group}"] = rates.ratio(GATHERED, name)
    return named


class Files:
    """A materialised epoch in large files, a cache whose runs are as short as a large cache's, and safetensors files.

    The cache that the epoch was made from gives its disk back, so the two come from different caches.
    """

    def __init__(self, folder: Path, n_rows: int, bucket_rows: int) -> None:
        self.n_rows, self.shard_rows = n_rows, bucket_rows
        self.large = write_cache(folder / "large", cache_format(_WIDTH, shard_rows=bucket_rows), n_rows).split("train")
        self.epoch = materialise_epoch(self.large, seed=0, epoch=0, run_tasks=_one_by_one)
        shutil.rmtree(self.large.root / "train/sites")
        layout = cache_format(_WIDTH, shard_rows=bucket_rows // 32, chunk_rows=bucket_rows // 64)
        self.short = write_cache(folder / "short", layout, n_rows, bucket_rows).split("train")
        self.safetensors = [self._save(folder, shard) for shard in range(n_rows // bucket_rows // 2)]

    def _save(self, folder: Path, shard: int) -> Path:
        shape = (self.shard_rows, _WIDTH)
        sides: dict[str, np.ndarray] = {
            side: np.memmap(self.shards(side)[shard], np.uint16, "r", shape=shape) for side in ("in", "out")
        }
        path = folder / f"{shard}.safetensors"
        safetensors.numpy.save_file(sides, path)
        return path

    def shards(self, side: str) -> list[Path]:
        """Return the files of one side of the materialised epoch, in order."""
        return [self.epoch / f"sites/layer8/{side}/c/{shard}/0" for shard in range(self.n_rows // self.shard_rows)]


def _one_by_one(task: Callable[[int], None], indices: Iterable[int]) -> None:
    for index in indices:
        task(index)


def contenders(data: Files, skipped_rows: int, *, cold: bool) -> list[Contender]:
    """Return all readers; cold ones without the DataLoader, whose single rows a cold disk would take minutes for."""
    stored = sorted((data.short.root / "train/sites").glob("*/*/c/*/0"))
    copied = [*data.shards("in"), *data.shards("out")]
    get_ready = forget_cached if cold else warm_cache

    def entry(
        name: str, files: list[Path], batches: Callable[[], Iterator[Pair]], skip: int = 0, stop: int | None = None
    ) -> Contender:
        return Contender(name, lambda: consume(batches(), skip, stop), lambda: get_ready(files))

    found = [
        entry(RAW, copied, lambda: raw_batches(data)),
        entry(MATERIALISED, copied, lambda: our_batches(data.large, "materialised"), skipped_rows),
        entry(GATHERED, stored, lambda: our_batches(data.short, "gathered"), skipped_rows),
        entry(RAW_UNITS, stored, lambda: raw_unit_batches(data)),
        Contender(FOR_A_GPU, lambda: read_buckets(data.short), lambda: get_ready(stored)),
        entry("zarr-python", copied, lambda: zarr_batches(data, "zarr.core.codec_pipeline.BatchedCodecPipeline")),
        entry("zarrs", copied, lambda: zarr_batches(data, "zarrs.ZarrsCodecPipeline")),
        entry("tensorstore", copied, lambda: tensorstore_batches(data)),
        entry("safetensors", data.safetensors, lambda: safetensors_batches(data)),
    ]
    if not cold:
        rows = 8 * BATCH_ROWS
        found += [
            entry("DataLoader", copied, lambda: loader_batches(data, 0, RowPairs), BATCH_ROWS, rows),
            entry("DataLoader, 2 workers", copied, lambda: loader_batches(data, 2, RowPairs), BATCH_ROWS, rows),
            entry(
                "DataLoader, __getitems__", copied, lambda: loader_batches(data, 0, BatchPairs), BATCH_ROWS, 4 * rows
            ),
        ]
    return found


def consume(batches: Iterator[Pair], skip: int, stop: int | None) -> Work:
    """Add up one column of every batch; the clock starts after ``skip`` rows and ends after ``stop``."""
    n_rows, total = 0, 0
    start = time.perf_counter()
    for inputs, outputs in batches:
        total += int(inputs[:, 0].sum(dtype=np.int64)) + int(outputs[:, 0].sum(dtype=np.int64))
        n_rows += len(inputs)
        if n_rows == skip:
            start = time.perf_counter()
        if n_rows == stop:
            break
    seconds = time.perf_counter() - start
    assert total > 0
    return Work(n_rows - skip, seconds)


def raw_batches(data: Files) -> Iterator[Pair]:
    """Read the files of both sides in order, batch by batch, into the same memory."""
    inputs, outputs = (aligned_rows(BATCH_ROWS, _WIDTH, np.dtype(np.uint16)) for _ in range(2))
    for paths in zip(data.shards("in"), data.shards("out"), strict=True):
        descriptors = [os.open(path, os.O_RDONLY) for path in paths]
        for start in range(0, data.shard_rows, BATCH_ROWS):
            for descriptor, rows in zip(descriptors, (inputs, outputs), strict=True):
                n_read = os.preadv(descriptor, [as_bytes(rows)], start * 2 * _WIDTH)
                assert n_read == rows.nbytes
            yield inputs, outputs
        for descriptor in descriptors:
            os.close(descriptor)


def raw_unit_batches(data: Files) -> Iterator[Pair]:
    """Do the same with the units of the gathered cache, whose files are small: pages of theirs are copied slower."""
    inputs, outputs = (aligned_rows(BATCH_ROWS, _WIDTH, np.dtype(np.uint16)) for _ in range(2))
    for unit, n_rows in enumerate(data.short.unit_rows):
        descriptors = [
            os.open(data.short.root / f"train/sites/layer8/{side}/c/{unit}/0", os.O_RDONLY) for side in ("in", "out")
        ]
        for start in range(0, n_rows, BATCH_ROWS):
            n = min(BATCH_ROWS, n_rows - start)
            for descriptor, rows in zip(descriptors, (inputs, outputs), strict=True):
                assert os.preadv(descriptor, [as_bytes(rows[:n])], start * 2 * _WIDTH) == rows[:n].nbytes
            yield inputs[:n], outputs[:n]
        for descriptor in descriptors:
            os.close(descriptor)


def our_batches(split: CacheSplit, order: str) -> Iterator[Pair]:
    """Read through the stream that training uses."""
    with split.stream(KEYS, batch_rows=BATCH_ROWS, seed=0, n_epochs=1, order=order) as stream:
        for batch in stream:
            yield batch.arrays[KEYS[0]], batch.arrays[KEYS[1]]


def read_buckets(split: CacheSplit) -> Work:
    """Read the buckets of an epoch as ``DeviceRows`` does, up to the copy to the device; add up one column."""
    slots: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
    for _ in range(N_SLOTS):
        slot = aligned_rows(SLOT_BYTES, None, np.dtype(np.uint8))
        slot[:] = 1  # as memory is that was pinned
        slots.put(slot)
    with split.stream(KEYS, batch_rows=BATCH_ROWS, seed=0) as stream, ThreadPoolExecutor(N_READERS) as pool:
        order = stream.open_order(0, split.bucket_rows)

        def bring(piece: Piece) -> int:
            slot = slots.get()
            rows = slot[: piece.n_rows * piece.spec.row_bytes].view(np.uint16).reshape(piece.n_rows, -1)
            order.read(piece, rows)
            total = int(rows[:, 0].sum(dtype=np.int64))
            slots.put(slot)
            return total

        start = time.perf_counter()
        for bucket in range(order.n_segments):
            totals = [pool.submit(bring, piece) for piece in order.pieces(bucket, SLOT_BYTES)]
            assert order.served(bucket) is not None
            assert all(total.result() > 0 for total in totals)
        return Work(split.n_rows, time.perf_counter() - start)


def block_batches(data: Files, read: Callable[[int, int], Pair]) -> Iterator[Pair]:
    """Read blocks in random order, permute each in memory, cut it into batches."""
    generator = np.random.Generator(np.random.Philox(1))
    for block in generator.permutation(data.n_rows // BLOCK_ROWS).tolist():
        inputs, outputs = read(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS)
        order = generator.permutation(BLOCK_ROWS)
        for start in range(0, BLOCK_ROWS, BATCH_ROWS):
            rows = order[start : start + BATCH_ROWS]
            yield inputs[rows], outputs[rows]


def zarr_batches(data: Files, pipeline: str) -> Iterator[Pair]:
    """Read blocks through zarr-python with one of its codec pipelines."""
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        group = zarr.open_group(data.epoch / "sites/layer8", mode="r")
        inputs, outputs = group["in"], group["out"]
        assert isinstance(inputs, zarr.Array)
        assert isinstance(outputs, zarr.Array)
        yield from block_batches(data, lambda a, b: (np.asarray(inputs[a:b]), np.asarray(outputs[a:b])))


def tensorstore_batches(data: Files) -> Iterator[Pair]:
    """Read blocks through tensorstore, both sides at once."""

    def open_side(side: str) -> tensorstore.TensorStore:
        path = str(data.epoch / f"sites/layer8/{side}")
        return tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}).result()

    inputs, outputs = open_side("in"), open_side("out")

    def read(start: int, stop: int) -> Pair:
        pending = [array[start:stop].read() for array in (inputs, outputs)]
        first, second = (future.result().view(np.uint16) for future in pending)
        return first, second

    yield from block_batches(data, read)


def safetensors_batches(data: Files) -> Iterator[Pair]:
    """Copy slices, in file order, out of memory-mapped files."""
    for path in data.safetensors:
        with safetensors.safe_open(path, "np") as file:
            inputs, outputs = file.get_slice("in"), file.get_slice("out")
            for start in range(0, inputs.get_shape()[0], BATCH_ROWS):
                yield inputs[start : start + BATCH_ROWS], outputs[start : start + BATCH_ROWS]


class RowPairs(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The textbook map-style dataset: one pair of rows per index, from memory-mapped files."""

    def __init__(self, data: Files) -> None:
        self._n_rows, self._shard_rows = data.n_rows, data.shard_rows
        shape = (data.shard_rows, _WIDTH)
        sides = [data.shards(side) for side in ("in", "out")]
        self._sides = [[np.memmap(path, np.uint16, "c", shape=shape) for path in side] for side in sides]

    def __len__(self) -> int:
        return self._n_rows

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        shard, row = divmod(index, self._shard_rows)
        return torch.from_numpy(self._sides[0][shard][row]), torch.from_numpy(self._sides[1][shard][row])


class BatchPairs(RowPairs):
    """The same with ``__getitems__``, torch's way to fetch a batch in one call."""

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        shard, row = np.divmod(np.asarray(indices), self._shard_rows)
        inputs, outputs = (torch.empty((len(indices), _WIDTH), dtype=torch.uint16) for _ in range(2))
        for present in np.unique(shard).tolist():
            chosen = np.flatnonzero(shard == present)
            inputs.numpy()[chosen] = self._sides[0][present][row[chosen]]
            outputs.numpy()[chosen] = self._sides[1][present][row[chosen]]
        return inputs, outputs


def loader_batches(data: Files, n_workers: int, kind: type[RowPairs]) -> Iterator[Pair]:
    """Read through a shuffling DataLoader."""
    collate = (lambda pair: pair) if kind is BatchPairs else None
    loader = DataLoader(kind(data), BATCH_ROWS, shuffle=True, num_workers=n_workers, collate_fn=collate)
    for inputs, outputs in loader:
        yield inputs.numpy(), outputs.numpy()


if __name__ == "__main__":
    main()
