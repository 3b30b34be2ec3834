"""Writing units in worker processes: the same tasks as in one process, and the same bytes.

A task is one unit. Tasks are deterministic and idempotent, so a lost worker costs the unit it was on, which another
one redoes. Each worker process loads the language model once and needs to see the cache's directory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from tailrace.pipeline.cache.draft import UnitPlanner, missing_tasks
from tailrace.pipeline.cache.plan import CachePlan
from tailrace.pipeline.cache.rows import RowProducer, UnitTask
from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.model.language_model import load_language_model
from tailrace.pipeline.shared.progress import RowProgress
from tailrace.pipeline.shared.worker_processes import completed, open_workers
from tailrace.storage.cache_format import SPLITS
from tailrace.storage.cache_writer import UnitBuffer, remove_temporary_files
from tailrace.storage.context_blocks import ContextBlocks


@dataclass(frozen=True)
class Workers:
    """Where unit tasks run: ``n`` processes of this machine, or a Dask scheduler by its address."""

    n: int = 0
    scheduler: str | None = None
    threads: int | None = None
    """Threads of each worker's language model; None divides this process's. Bytes are the same for equal threads."""

    @property
    def model_threads(self) -> int | None:
        """Threads to set in each worker; None leaves a scheduler's workers as they are."""
        if self.threads is not None or self.scheduler is not None:
            return self.threads
        return max(1, torch.get_num_threads() // self.n)


@dataclass(frozen=True)
class WorkerJob:
    """What a worker needs to know to write any unit; hashable, so that it is set up once per process."""

    root: str
    settings: str
    """CacheSettings as JSON."""
    plan: str
    """CachePlan as JSON text."""
    generation: int
    seed: int
    with_provenance: bool
    device: str
    threads: int | None
    compile_model: bool


def write_units_on_workers(
    workers: Workers, job: WorkerJob, planner: UnitPlanner, bar: RowProgress, root: Path
) -> None:
    """Write every missing unit in workers; raises the first error of a task."""
    tasks = ((job, task) for task in missing_tasks(root, planner, bar, job.generation))
    with open_workers(workers.n, workers.scheduler) as submit:
        for n_rows, n_bytes in completed(submit, write_unit, tasks):
            bar.passed(n_rows)
            bar.committed(n_bytes)
    remove_temporary_files(root)  # of workers that were lost


def write_unit(job: WorkerJob, task: UnitTask) -> tuple[int, int]:
    """Compute and commit one unit in this process; return its rows and bytes."""
    producer, buffer = _worker(job)
    buffer.begin(job.seed, task.split, task.unit, task.n_rows)
    for piece in producer.unit_rows(task):
        buffer.fill(piece.provenance, piece.activations)
    record = buffer.commit(Path(job.root), job.generation)
    return task.n_rows, sum(shard["bytes"] for shard in record["shards"].values())


@lru_cache(maxsize=1)
def _worker(job: WorkerJob) -> tuple[RowProducer, UnitBuffer]:
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    settings = CacheSettings.model_validate_json(job.settings)
    plan = CachePlan.from_json(json.loads(job.plan))
    model = load_language_model(settings, device=job.device, compile_model=job.compile_model)
    root = Path(job.root)
    blocks = {split: ContextBlocks(root, plan.layout, job.generation, split) for split in SPLITS}
    mask = settings.rows_of(model)
    producer = RowProducer(model, plan.hooks, plan.layout, blocks, mask, settings.contexts_per_batch)
    return producer, UnitBuffer(plan.layout, with_provenance=job.with_provenance)
