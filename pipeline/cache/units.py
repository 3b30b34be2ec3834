"""Units of rows: which are missing, and writing them, in this process or in worker processes with the same bytes.

In one process rows pass through two threads, so that the language model is the only thing waited for: one shuffles
them into a unit's memory and sums their statistics, the other writes full units to disk. Two units' memory is all that
is held; a full disk queue holds the model back.

A worker process loads the language model once and needs to see the cache's directory. Its task is one unit. Tasks are
deterministic and idempotent, so a lost worker costs the unit it was on, which another worker writes again.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from tailrace.pipeline.cache.context_packing import PackingProgress
from tailrace.pipeline.cache.rows import RowMaker, Rows, UnitRows, UnitTask
from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.model.language_model import load_language_model
from tailrace.pipeline.shared.compute import Compute, device_of_worker
from tailrace.pipeline.shared.progress import RowProgress
from tailrace.pipeline.shared.worker_processes import completed, open_workers
from tailrace.storage.artifact import sync_directory
from tailrace.storage.cache_format import SPLITS, CacheFormat, UnitRecord, split_path, unit_record_name
from tailrace.storage.cache_writer import ContextBlocks, UnitBuffer, recall_record
from tailrace.storage.names import matching, remove_temporary

_BATCHES_WAITING = 4


@dataclass(frozen=True)
class UnitFiles:
    """Where the units of one generation lie, and what decides their bytes beside their rows."""

    root: Path
    layout: CacheFormat
    generation: int
    seed: int
    with_provenance: bool
    """Without it only activations are written: of sites that are added to rows which are there."""

    def buffer(self) -> UnitBuffer:
        """Return the memory of one unit."""
        return UnitBuffer(self.layout, with_provenance=self.with_provenance)

    def missing(self, planner: UnitPlanner, bar: RowProgress) -> Iterator[UnitTask]:
        """Yield the units that have no commit record of their size; a short unit of a smaller target is written anew.

        So is a unit whose record or shards are no longer as they were written. Waits for packing.
        """
        finished = {split: self._n_finished(split) for split in SPLITS}
        for task in planner.tasks():
            bar.expect(task.n_rows)
            name = unit_record_name(self.generation, task.split, task.unit)
            record = self.root / name
            if record.exists():
                n_finished = finished[task.split]
                written = recall_record(
                    *(self.root, name, UnitRecord, split_path(self.root, task.split)),
                    age=max(0, n_finished - 1 - task.unit),
                    n_finished=n_finished,
                )
                if written is not None and written.n_rows == task.n_rows:
                    bar.skip(task.n_rows)
                    continue
                # it must not vouch for the shards that now take the place of its own
                record.unlink()
                sync_directory(record.parent)
            yield task

    def _n_finished(self, split: str) -> int:
        return len(matching((self.root / unit_record_name(self.generation, split, 0)).parent, f"{split}-unit-*.json"))


@dataclass
class UnitPlanner:
    """Cuts a split into unit tasks as its contexts become available."""

    progress: PackingProgress
    layout: CacheFormat
    contexts_per_batch: int
    targets: Mapping[str, int | None]
    """Rows wanted by split; None: all that are packed."""
    first_units: Mapping[str, int] = field(default_factory=dict)
    """Units before these are there already."""

    def tasks(self) -> Iterator[UnitTask]:
        """Yield every unit still to be written, split by split; waits for packing."""
        for split in self.targets:
            unit = self.first_units.get(split, 0)
            while (task := self._task(split, unit)) is not None:
                yield task
                unit += 1

    def n_rows(self, split: str) -> int:
        """Return the rows of a split in the end; only after packing is done."""
        target, packed = self.targets[split], self.progress.n_rows(split)
        return packed if target is None else min(target, packed)

    def _task(self, split: str, unit: int) -> UnitTask | None:
        size, target = self.layout.shard_rows, self.targets[split]
        start, wanted = unit * size, (unit + 1) * size
        if target is not None:
            wanted = min(wanted, target)
        if start >= wanted:
            return None
        if self.progress.wait_for_batch(split, wanted):
            n_rows = wanted - start
        else:
            n_rows = min(wanted, self.n_rows(split)) - start
        if n_rows <= 0:
            return None
        ends = np.cumsum(self.progress.batch_rows(split))
        batch = int(np.searchsorted(ends, start, side="right"))
        before = int(ends[batch - 1]) if batch else 0
        return UnitTask(split, unit, n_rows, batch, start - before, self._readable_contexts(split))

    def _readable_contexts(self, split: str) -> int:
        """Whole batches only while packing goes on: a batch must hold the same contexts whenever it is run."""
        n_contexts = self.progress.n_contexts(split)
        if self.progress.is_done:
            return n_contexts
        return n_contexts // self.contexts_per_batch * self.contexts_per_batch


class UnitWriter:
    """Takes rows of unit after unit; commits each unit when its last row is there."""

    def __init__(self, files: UnitFiles, bar: RowProgress) -> None:
        self._files, self._bar = files, bar
        self._buffers = [files.buffer() for _ in range(2)]
        self._free: SimpleQueue[UnitBuffer] = SimpleQueue()
        for buffer in self._buffers:
            self._free.put(buffer)
        self._filler, self._committer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._pending: deque[Future[Any]] = deque()
        self._room = threading.Semaphore(_BATCHES_WAITING)
        self._buffer: UnitBuffer | None = None
        self._failed = False

    def write(self, task: UnitTask, rows: Iterator[Rows]) -> None:
        """Hand over one unit; returns when its rows are on their way. Raises what went wrong with earlier ones."""
        self._submit(self._begin, task)
        for piece in rows:
            self._bar.update(len(piece))
            self._submit(self._fill, piece)

    def _submit(self, work: Callable[[Any], None], argument: Any) -> None:
        self._room.acquire()
        self._pending.append(self._filler.submit(self._do, work, argument))
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def _do(self, work: Callable[[Any], None], argument: Any) -> None:
        try:
            if not self._failed:
                work(argument)
        except BaseException:
            # rows after a gap would land where others belong, and a unit that is never full never frees its buffer
            self._failed = True
            raise
        finally:
            self._room.release()

    def _begin(self, task: UnitTask) -> None:
        self._buffer = self._free.get()
        self._buffer.begin(self._files.seed, task.split, task.unit, task.n_rows)

    def _fill(self, piece: Rows) -> None:
        assert self._buffer is not None, "a unit was begun"
        self._buffer.fill(piece.provenance, piece.arrays())
        if self._buffer.is_full:
            self._pending.append(self._committer.submit(self._commit, self._buffer))
            self._buffer = None

    def _commit(self, buffer: UnitBuffer) -> None:
        try:
            self._bar.committed(_n_bytes(buffer.commit(self._files.root, self._files.generation)))
        finally:
            self._free.put(buffer)

    def finish(self) -> None:
        """Wait until everything handed over is on disk; raise what went wrong."""
        self._filler.shutdown()
        self._committer.shutdown()
        while self._pending:
            self._pending.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # on an error, units whose rows were all handed over are still worth keeping
        self._filler.shutdown()
        self._committer.shutdown()
        for buffer in self._buffers:
            buffer.close()


@dataclass(frozen=True)
class WorkerJob:
    """What a worker needs to know to write any unit; hashable, so that it is set up once per process."""

    root: str
    settings: str
    """CacheSettings as JSON."""
    layout: str
    """CacheFormat as JSON text."""
    generation: int
    device: str
    threads: int | None
    compile_model: bool


def write_units(files: UnitFiles, planner: UnitPlanner, rows: UnitRows, bar: RowProgress) -> None:
    """Write every missing unit in this process."""
    with UnitWriter(files, bar) as writer:
        for task in files.missing(planner, bar):
            writer.write(task, rows.pieces(task))
        writer.finish()


def write_units_on_workers(
    files: UnitFiles,
    planner: UnitPlanner,
    bar: RowProgress,
    compute: Compute,
    settings: CacheSettings,
    *,
    compile_model: bool,
) -> None:
    """Write every missing unit in worker processes; raises the first error of a task."""
    job = WorkerJob(
        root=str(files.root.resolve()),
        settings=settings.model_dump_json(),
        layout=json.dumps(files.layout.as_json()),
        generation=files.generation,
        device=compute.device,
        threads=compute.worker_threads,
        compile_model=compile_model,
    )
    tasks = ((job, task) for task in files.missing(planner, bar))
    with open_workers(compute.workers, compute.scheduler) as submit:
        for n_rows, n_bytes in completed(submit, write_unit, tasks):
            bar.update(n_rows)
            bar.committed(n_bytes)
    remove_temporary(files.root)  # of workers that were lost


def write_unit(job: WorkerJob, task: UnitTask) -> tuple[int, int]:
    """Compute and commit one unit in this process; return its rows and bytes."""
    files, rows, buffer = _worker(job)
    buffer.begin(files.seed, task.split, task.unit, task.n_rows)
    for piece in rows.pieces(task):
        buffer.fill(piece.provenance, piece.arrays())
    return task.n_rows, _n_bytes(buffer.commit(files.root, files.generation))


@lru_cache(maxsize=1)
def _worker(job: WorkerJob) -> tuple[UnitFiles, UnitRows, UnitBuffer]:
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    settings = CacheSettings.model_validate_json(job.settings)
    layout = CacheFormat.from_json(job.layout)
    model = load_language_model(settings, device=device_of_worker(job.device), compile_model=job.compile_model)
    model.may_record = True
    files = UnitFiles(Path(job.root), layout, job.generation, settings.seed, with_provenance=True)
    blocks = {split: ContextBlocks(files.root, layout, job.generation, split) for split in SPLITS}
    maker = RowMaker(model, layout.sites, settings.rows_of(model), settings.contexts_per_batch)
    return files, UnitRows(maker, blocks), files.buffer()


def _n_bytes(record: UnitRecord) -> int:
    """Return the bytes of the unit that a commit record stands for."""
    return sum(shard.bytes for shard in record.shards.values())
