"""What making, extending and widening a cache have in common: contexts ready, units written, a generation published."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tailrace.pipeline.cache.context_packing import CHECKPOINT, ContextPacker, PackingProgress
from tailrace.pipeline.cache.plan import CachePlan, refuse_other_inputs
from tailrace.pipeline.cache.rows import RowProducer, UnitTask
from tailrace.pipeline.cache.unit_writer import UnitWriter
from tailrace.pipeline.model.sites import SiteHooks
from tailrace.pipeline.shared.progress import RowProgress
from tailrace.pipeline.text.packing import ContextSource
from tailrace.storage.artifact import REQUEST, canonical_json, read_json, sync_directory
from tailrace.storage.cache_format import CacheFormat, unit_record_name
from tailrace.storage.cache_publish import write_file
from tailrace.storage.draft import LOCK
from tailrace.storage.errors import ArtifactMismatch

logger = logging.getLogger(__name__)

DRAFT = "draft"
BEGUN = "draft/begun.json"
PLAN = "draft/plan.json"
LOG = "log.jsonl"


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


class PackingThread:
    """Runs a ContextPacker beside everything else; a context manager that stops it."""

    def __init__(
        self, packer: ContextPacker, source: ContextSource, progress: PackingProgress, check: Callable[[], None]
    ) -> None:
        self._packer, self._source, self._progress, self._check = packer, source, progress, check
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self._packer.pack(self._source, self._progress, self._stopped)
            if not self._stopped.is_set():
                self._check()
        except BaseException as error:
            # raised by whoever waits for rows
            self._progress.finish(error)
        else:
            self._progress.finish()

    def __enter__(self) -> PackingThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()


def write_units(
    root: Path,
    plan: CachePlan,
    planner: UnitPlanner,
    producer: RowProducer,
    bar: RowProgress,
    *,
    generation: int,
    seed: int,
    with_provenance: bool = True,
) -> None:
    """Write every unit that has no commit record yet, in this process."""

    def note(record: dict[str, Any]) -> None:
        bar.committed(sum(shard["bytes"] for shard in record["shards"].values()))

    writer = UnitWriter(
        root, plan.layout, generation=generation, seed=seed, with_provenance=with_provenance, on_commit=note
    )
    with writer:
        for task in missing_tasks(root, planner, bar, generation):
            writer.write(task, bar.watch(producer.unit_rows(task)))
        writer.finish()


def missing_tasks(root: Path, planner: UnitPlanner, bar: RowProgress, generation: int) -> Iterator[UnitTask]:
    """Yield the units that have no commit record of this size; a short unit of a smaller target is written anew."""
    for task in planner.tasks():
        bar.expect(task.n_rows)
        record = root / unit_record_name(generation, task.split, task.unit)
        if record.exists() and read_json(record)["n_rows"] == task.n_rows:
            bar.skipped(task.n_rows)
            continue
        if record.exists():
            # it must not vouch for the shards that now take the place of its own
            record.unlink()
            sync_directory(record.parent)
        yield task


def begin_draft(root: Path, change: str, generation: int, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Note what is being made from which inputs, before anything else is; return the inputs first noted.

    Raises ArtifactMismatch if another change was interrupted here, or this one was begun with other inputs.
    """
    forget_finished_draft(root, generation - 1)
    if not (root / BEGUN).exists():
        write_file(root / BEGUN, canonical_json({"change": change, "generation": generation, "inputs": dict(inputs)}))
    begun = read_json(root / BEGUN)
    if begun["change"] != change:
        raise ArtifactMismatch(
            f"{root}: an unfinished `{begun['change']}` lies here; finish it first, with {_finishing(root, begun)}"
        )
    refuse_other_inputs(str(root), begun["inputs"], inputs)
    return dict(begun["inputs"])


def _finishing(root: Path, begun: Mapping[str, Any]) -> str:
    """Return the command that finishes what was begun. An extension may end at other rows than it was begun for."""
    if begun["change"] == "extend":
        return f"`pipeline extend {root} --tokens N`, N as large as its dataset allows (`all` always works)"
    if begun["change"] == "widen" and (plan := recall_plan(root)) is not None:
        return f"`pipeline widen {root} {hook_options(plan.hooks)}`"
    return "the command that began it"


def hook_options(hooks: Sequence[SiteHooks]) -> str:
    """Return the options of the command line that ask for these sites."""
    return " ".join(f"--hooks '{hook.name}={':'.join(hook.sides.values())}'" for hook in hooks)


def forget_finished_draft(root: Path, published: int) -> None:
    """Remove the draft of a generation that was published, which a kill right after publishing leaves behind."""
    if not (root / BEGUN).exists() or read_json(root / BEGUN)["generation"] <= published:
        forget_draft(root)


def keep_plan(root: Path, plan: CachePlan) -> None:
    """Remember in the draft what was decided before the first unit."""
    write_file(root / PLAN, canonical_json(plan.as_json()))


def recall_plan(root: Path) -> CachePlan | None:
    """Return the plan of an interrupted draft."""
    return CachePlan.from_json(read_json(root / PLAN)) if (root / PLAN).exists() else None


def forget_draft(root: Path) -> None:
    """Remove what only an unfinished draft needs."""
    shutil.rmtree(root / DRAFT, ignore_errors=True)


@contextmanager
def nothing_left_behind(root: Path) -> Iterator[None]:
    """On an error before anything was packed, take the request back: corrected settings may use the same path."""
    try:
        yield
    except BaseException:
        left = {entry.name for entry in root.iterdir()}
        if left <= {LOCK, REQUEST, DRAFT, LOG} and not (root / CHECKPOINT).exists():
            forget_draft(root)
            with suppress(OSError):
                (root / REQUEST).unlink(missing_ok=True)
        raise


def log_event(root: Path, event: str, **numbers: Any) -> None:
    """Append to the log beside the artifact; times and rates belong here and in no published file."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "event": event, **numbers}
    try:
        with (root / LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:  # no reason to fail: the log is no part of the result
        logger.warning("%s: cannot be written (%s)", root / LOG, error)
