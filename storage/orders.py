"""The two ways to read an epoch's order: gathered from the units, or in sequence from a materialised copy."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from tailrace.storage.artifact import MANIFEST, FileRecord, Manifest
from tailrace.storage.cache_format import EPOCHS
from tailrace.storage.layout import ArraySpec
from tailrace.storage.memory import read_run, read_sequential
from tailrace.storage.shard import open_shard, read_zarr, shard_errors
from tailrace.storage.shuffle import EpochPlan, Run

EPOCH_KIND = "shuffled-epoch"


class EpochManifest(Manifest):
    """The manifest of a materialised epoch."""

    of_kind = EPOCH_KIND

    shards: dict[str, FileRecord]


Read = TypeVar("Read")
"""The result of reading a shard."""


class OrderedSplit(Protocol):
    """A split, as far as reading an order needs it."""

    @property
    def name(self) -> str:
        """``train`` or ``heldout``."""

    @property
    def unit_rows(self) -> list[int]:
        """Rows of each unit."""

    @property
    def root(self) -> Path:
        """The cache's directory."""

    @property
    def identity(self) -> dict[str, Any]:
        """The cache's id, generation and digest."""

    def read_shard(self, spec: ArraySpec, unit: int, read: Callable[[Path], Read]) -> Read:
        """Return ``read(group)`` for the Zarr group that holds a shard."""


class GatheredOrder:
    """The order of an epoch, bucket by bucket: threads read a run of rows per unit straight to shuffled positions."""

    n_buffers = 2

    def __init__(
        self, split: OrderedSplit, plan: EpochPlan, specs: Sequence[ArraySpec], pool: ThreadPoolExecutor
    ) -> None:
        self._split, self._plan, self._specs, self._pool = split, plan, specs, pool
        self._unit_rows = split.unit_rows
        self.segment_rows = plan.bucket_rows
        self.n_segments = plan.n_buckets

    def n_rows(self, segment: int) -> int:
        """Return the rows of one segment."""
        return self._plan.rows_in_bucket(segment)

    def load(self, segment: int, stored: dict[str, np.ndarray]) -> None:
        """Fill the first rows of ``stored`` with one segment of the order."""
        runs = self._plan.runs(segment)
        tasks = [self._pool.submit(self._read, spec, run, stored[spec.name]) for run in runs for spec in self._specs]
        for task in tasks:
            task.result()

    def close(self) -> None:
        """Nothing stays open between segments."""

    def _read(self, spec: ArraySpec, run: Run, rows: np.ndarray) -> None:
        self._split.read_shard(spec, run.unit, lambda group: self._read_run(group, spec, run, rows))

    def _read_run(self, group: Path, spec: ArraySpec, run: Run, rows: np.ndarray) -> None:
        if spec.compression != "none":
            first = run.unit * spec.shard_rows
            rows[run.destinations] = read_zarr(group, spec, first + run.start, first + run.stop)
            return
        path = group / spec.shard_name(run.unit)
        with shard_errors(path), open_shard(path, self._unit_rows[run.unit], spec) as file:
            # read-ahead would fetch the neighbours of every run, which belong to other buckets
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            read_run(file.fileno(), run.start, rows, run.destinations)


class MaterialisedOrder:
    """The order of an epoch read batch by batch from a copy on disk in that order."""

    n_buffers = 2
    """For the batch served and the batch filled: a third only pushes them out of the cache (0.82 of the speed)."""

    def __init__(self, group: Path, plan: EpochPlan, specs: Sequence[ArraySpec], batch_rows: int) -> None:
        self._group, self._plan, self._specs = group, plan, specs
        self.segment_rows = min(batch_rows, plan.n_rows)
        self.n_segments = -(-plan.n_rows // self.segment_rows)
        self._open: dict[str, tuple[int, FileIO]] = {}

    def n_rows(self, segment: int) -> int:
        """Return the rows of one segment."""
        return min(self.segment_rows, self._plan.n_rows - segment * self.segment_rows)

    def load(self, segment: int, stored: dict[str, np.ndarray]) -> None:
        """Fill the first rows of ``stored`` with one segment of the order."""
        start = segment * self.segment_rows
        for spec in self._specs:
            self._read(spec, start, start + self.n_rows(segment), stored[spec.name])

    def _read(self, spec: ArraySpec, start: int, stop: int, rows: np.ndarray) -> None:
        filled = 0
        while start + filled < stop:
            shard, inside = divmod(start + filled, spec.shard_rows)
            n = min(stop - start - filled, spec.shard_rows - inside)
            self._read_shard(spec, shard, inside, rows[filled : filled + n])
            filled += n

    def _read_shard(self, spec: ArraySpec, shard: int, inside: int, rows: np.ndarray) -> None:
        if spec.compression != "none":
            first = shard * spec.shard_rows + inside
            rows[...] = read_zarr(self._group, spec, first, first + len(rows))
            return
        with shard_errors(self._group / spec.shard_name(shard)):
            read_sequential(self._descriptor(spec, shard), inside, rows)

    def _descriptor(self, spec: ArraySpec, shard: int) -> int:
        """Return the descriptor of the shard that is being read of this array; it stays open until the next shard."""
        held, file = self._open.get(spec.name, (None, None))
        if file is None or held != shard:
            if file is not None:
                del self._open[spec.name]
                file.close()
            n_rows = min(spec.shard_rows, self._plan.n_rows - shard * spec.shard_rows)
            file = open_shard(self._group / spec.shard_name(shard), n_rows, spec)
            self._open[spec.name] = (shard, file)
        return file.fileno()

    def close(self) -> None:
        """Close the files that are open."""
        for _, file in self._open.values():
            file.close()
        self._open.clear()


def epoch_path(root: Path, plan: EpochPlan, generation: int) -> Path:
    """Return the directory of one epoch's materialised order."""
    return root / EPOCHS / f"{plan.split}-generation{generation}-seed{plan.seed}-epoch{plan.epoch}"


def epoch_request(identity: dict[str, Any], plan: EpochPlan) -> dict[str, Any]:
    """Return the request of a materialised epoch that serves ``plan``."""
    return {
        "cache": identity,
        "split": plan.split,
        "seed": plan.seed,
        "epoch": plan.epoch,
        "n_rows": plan.n_rows,
        "bucket_rows": plan.bucket_rows,
    }


def find_materialised(split: OrderedSplit, plan: EpochPlan) -> Path | None:
    """Return the published copy of exactly this order, or None."""
    path = epoch_path(split.root, plan, int(split.identity["generation"]))
    if plan.unit_rows != tuple(split.unit_rows) or not (path / MANIFEST).exists():
        return None
    return path if EpochManifest.read(path).request == epoch_request(split.identity, plan) else None
