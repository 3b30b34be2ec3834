"""The pass of `pipeline analyze` over a split's units: in this process, or shared among worker processes.

A task is one unit. What workers counted is merged in unit order, which gives the bits of one process whose threads
are as many as a worker's. A lost worker costs the unit it was on, which another one does again.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from tailrace.analysis.harvest.activations import SCRATCH_BYTES
from tailrace.analysis.harvest.one_pass import (
    Harvest,
    Plan,
    Subject,
    find_density,
    gather,
    measure_density,
    refuse_empty,
)
from tailrace.analysis.harvest.rows import ShownRows, cached_rows
from tailrace.analysis.harvest.table import accumulators
from tailrace.analysis.tables import TABLES
from tailrace.analysis.weights.unembedding import TokenEffects
from tailrace.pipeline.artifacts.transcoders import TranscoderLayer
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.progress import Progress
from tailrace.pipeline.shared.units import duration, size
from tailrace.pipeline.shared.worker_processes import open_workers
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import make_directory
from tailrace.storage.errors import SettingsError
from tailrace.training.architectures.transcoder import Transcoder

logger = logging.getLogger(__name__)

KEPT_BYTES = 8
"""Of a pair in ``activations/``, about."""
_FEATURE_BYTES, _EXAMPLE_BYTES, _ROW_BYTES = 1200, 60, 8
"""In tables: of a feature with its connections, of an example with its window, of a kept row; of the demo's, about."""
_TIMED_ROWS = 1024
_TIMED_FROM = 100 * _TIMED_ROWS
"""Rows from which on two small blocks are timed before the pass: two in a hundred."""
_SCRATCH = "spool"


@dataclass(frozen=True)
class AnalysisPass:
    """Which rows are shown to which transcoder, and what is counted."""

    rows: ShownRows
    analysed: TranscoderLayer
    plan: Plan
    device: torch.device

    def open_subject(
        self,
        coder: Transcoder,
        *,
        effects: TokenEffects | None = None,
        scratch: Path | None = None,
        density: float | None = None,
    ) -> Subject:
        """Return what is analysed. Raises ActionableError for a split without rows."""
        rows = self.rows
        subject = Subject(
            coder=coder,
            split=rows.split,
            split_name=rows.split_name,
            site=rows.site,
            output_mean=rows.output_mean,
            vocabulary=rows.vocabulary,
            device=self.device,
            effects=effects,
            density=density,
            scratch=scratch,
            predicts_outputs=self.analysed.is_whole,
        )
        refuse_empty(subject)
        return subject

    @property
    def n_rows(self) -> int:
        """Rows that are read."""
        n_rows = self.rows.split.n_rows
        return min(self.plan.n_rows or n_rows, n_rows)

    def run(self, subject: Subject, compute: Compute) -> Harvest:
        """Count over all units."""
        logger.info("reading %d %s rows of %s", self.n_rows, self.rows.split_name, self.rows.site)
        with Progress(self.n_rows, "analyze", "rows", quiet=compute.quiet) as bar:
            if not compute.has_workers:
                return gather(subject, self.plan, accumulators(TABLES), progress=bar.update)
            job = self._job(subject, compute.worker_threads)
            return _gather_on_workers(compute.workers, job, self._units(subject), bar.update)

    def _job(self, subject: Subject, threads: int | None) -> Job:
        cache = self.rows.cache
        assert cache is not None, "rows that only this process has are not shared"
        return Job(
            cache=str(cache.path),
            generation=cache.generation,
            split_name=self.rows.split_name,
            site=self.rows.site,
            analysed=self.analysed,
            plan=self.plan,
            density=subject.density,
            scratch=None if subject.scratch is None else str(subject.scratch),
            threads=threads,
        )

    def _units(self, subject: Subject) -> list[int]:
        """Return the rows of each unit that is read."""
        starts = [subject.split.first_row(unit) for unit in range(subject.split.n_units)]
        ends = [min(end, self.n_rows) for end in [*starts[1:], self.n_rows]]
        return [end - start for start, end in zip(starts, ends, strict=True) if end > start]


@dataclass(frozen=True)
class Job:
    """What a worker needs to know to count any unit; hashable, so that it is set up once per process."""

    cache: str
    generation: int
    split_name: str
    site: str
    analysed: TranscoderLayer
    plan: Plan
    density: float | None
    scratch: str | None
    threads: int | None


def count_unit(job: Job, unit: int) -> Harvest:
    """Return what one unit holds, counted in this process."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    return gather(_open_job(job), job.plan, accumulators(TABLES), units=range(unit, unit + 1))


@lru_cache(maxsize=1)
def _open_job(job: Job) -> Subject:
    whole = AnalysisPass(
        rows=cached_rows(
            open_cache(job.cache, job.generation), job.split_name, job.site, job.plan.n_rows, job.plan.seed
        ),
        analysed=job.analysed,
        plan=job.plan,
        device=torch.device("cpu"),
    )
    scratch = None if job.scratch is None else Path(job.scratch)
    return whole.open_subject(job.analysed.load(), density=job.density, scratch=scratch)


def _gather_on_workers(n_workers: int, job: Job, units: list[int], progress: Callable[[int], object]) -> Harvest:
    """Merge the units in their order, at most a few of which wait to be merged."""
    whole: Harvest | None = None
    with open_workers(min(n_workers, len(units))) as submit:
        waiting: deque[Any] = deque()
        for unit, n_rows in enumerate(units):
            waiting.append((submit(count_unit, job, unit), n_rows))
            if len(waiting) > n_workers:
                whole = _merged(whole, waiting.popleft(), progress)
        while waiting:
            whole = _merged(whole, waiting.popleft(), progress)
    assert whole is not None, "a split that is read has units"
    return whole


def _merged(whole: Harvest | None, counted: tuple[Any, int], progress: Callable[[int], object]) -> Harvest:
    future, n_rows = counted
    harvest: Harvest = future.result()
    progress(n_rows)
    if whole is None:
        return harvest
    whole.merge(harvest)
    return whole


def check_workers(compute: Compute, *, is_live: bool = False) -> None:
    """Raise SettingsError if the pass cannot be shared like this."""
    if not compute.has_workers:
        return
    if is_live:
        raise SettingsError(
            f"--workers {compute.workers}: not with --live, whose rows only one process has; use --threads"
        )
    if compute.device_name != "cpu":
        raise SettingsError(
            f"--workers {compute.workers}: workers share the cores of a CPU; "
            f"with --device {compute.device_name} leave it out"
        )


def with_density(subject: Subject, plan: Plan) -> Subject:
    """Return the subject with the share of active pairs, measured where anything depends on it."""
    density = find_density(subject)
    if density is None and plan.activation_rows:
        density = measure_density(subject)
    return replace(subject, density=density)


def estimated_pairs(subject: Subject, n_rows: int, plan: Plan) -> int:
    """Return about how many activations are kept, by the subject's density."""
    return round((subject.density or 0.0) * subject.coder.d_sae * min(plan.activation_rows, n_rows))


def cost_line(subject: Subject, whole: AnalysisPass, n_pairs: int, compute: Compute) -> str:
    """Return what tables cost, in a line; they keep ``n_pairs`` activations.

    Time is judged by two blocks, where that is little of what is to come; not of workers, nor of rows that the language
    model still has to make.
    """
    coder, plan, n_rows = subject.coder, whole.plan, whole.n_rows
    seconds = None
    if whole.rows.cache is not None and not compute.has_workers and n_rows >= _TIMED_FROM:
        seconds = _seconds_per_row(subject, plan)
    about = f", about {duration(seconds * n_rows)} by rows just timed" if seconds else ""
    unit_rows = subject.split.first_row(1) if subject.split.n_units > 1 else subject.split.n_rows
    memory = 4 * coder.d_sae * (coder.d_in + coder.d_out) + unit_rows * whole.analysed.site.row_bytes
    disk, kept = coder.d_sae * (_FEATURE_BYTES + _EXAMPLE_BYTES * plan.n_examples), ""
    if n_pairs:
        n_kept = min(plan.activation_rows, n_rows)
        disk += coder.d_sae * _EXAMPLE_BYTES * (plan.n_bands * plan.n_band_examples + plan.n_random_examples)
        disk += n_pairs * KEPT_BYTES + n_kept * _ROW_BYTES
        kept = (
            f", of which {size(n_pairs * KEPT_BYTES)} hold about {n_pairs:,} activations of {n_kept:,} rows, and "
            f"{size(n_pairs * SCRATCH_BYTES)} more while they are sorted"
        )
    return (
        f"cost: {coder.d_sae:,} features over {n_rows:,} rows{about}; at least {size(memory)} of memory; up to about "
        f"{size(disk)} on disk{kept}"
    )


def _seconds_per_row(subject: Subject, plan: Plan) -> float | None:
    """Return the seconds that a row takes, by small blocks after the first; None if there is only one."""
    blocks: list[tuple[float, int]] = []
    block_rows = max(_TIMED_ROWS, subject.context_length)
    gather(
        replace(subject, scratch=None),
        replace(plan, block_rows=block_rows, n_rows=2 * block_rows),
        accumulators(TABLES),
        progress=lambda n_rows: blocks.append((time.perf_counter(), n_rows)),
    )
    if len(blocks) == 1:
        return None
    return (blocks[-1][0] - blocks[0][0]) / sum(n_rows for _, n_rows in blocks[1:])


def refuse_too_much(n_pairs: int, output: Path) -> None:
    """Raise SettingsError if the activations kept would not fit on the disk of ``output``."""
    needed, free = n_pairs * (KEPT_BYTES + SCRATCH_BYTES), shutil.disk_usage(output).free
    if needed > free:
        raise SettingsError(
            f"{output}: keeping about {n_pairs:,} activations takes {needed / 1e9:.1f} GB while they are sorted, and "
            f"{free / 1e9:.1f} GB are free; free some space, choose another --out, or keep fewer with --activations N"
        )


@contextmanager
def scratch_folder(draft: Path) -> Iterator[Path]:
    """Yield an empty folder inside a draft, which is deleted at the end, and of a killed run at the start."""
    folder = draft / _SCRATCH
    shutil.rmtree(folder, ignore_errors=True)
    make_directory(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
