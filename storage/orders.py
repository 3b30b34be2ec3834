"""The order of an epoch, segment by segment: gathered from every unit, kept on a device, or read from a copy on disk.

``GatheredOrder`` reads a segment from every unit, straight to its shuffled positions, or as it lies in files for a
reader that puts rows in their places itself. ``MaterialisedOrder`` reads it in sequence from a copy of the epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from tailrace.storage.artifact import MANIFEST, SMALL
from tailrace.storage.cache_format import EpochManifest, epoch_path, epoch_request
from tailrace.storage.compared import refuse_damaged
from tailrace.storage.layout import ArraySpec
from tailrace.storage.memory import read_sequential
from tailrace.storage.shard import open_shard, read_part_of_shard, read_run_of_shard, read_zarr, shard_errors
from tailrace.storage.shuffle import EpochPlan, Run, Span, philox

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

    def compare_sample(self, specs: Sequence[ArraySpec], seed: int, epoch: int) -> None:
        """Compare some shards of arrays with their records."""

    def read_shard(self, spec: ArraySpec, unit: int, read: Callable[[Path], Read]) -> Read:
        """Return ``read(group)`` for the Zarr group that holds a shard."""


class Piece(NamedTuple):
    """Rows of one array that lie one after the other in a segment, and the runs of its shards that they are."""

    spec: ArraySpec
    first: int
    """Where they begin in the segment."""
    spans: tuple[Span, ...]

    @property
    def n_rows(self) -> int:
        """Rows of all runs."""
        return sum(span.stop - span.start for span in self.spans)


def cut_pieces(spans: Sequence[Span], specs: Sequence[ArraySpec], most_bytes: int) -> Iterator[Piece]:
    """Yield runs, laid end to end, of every array, in pieces of as many rows as ``most_bytes`` hold."""
    for spec in specs:
        most_rows = max(1, most_bytes // spec.row_bytes)
        first, rows, gathered = 0, 0, list[Span]()
        for shard, start, stop in spans:
            while start < stop:
                end = min(stop, start + most_rows - rows)
                gathered.append(Span(shard, start, end))
                rows, start = rows + end - start, end
                if rows == most_rows:
                    yield Piece(spec, first, tuple(gathered))
                    first, rows, gathered = first + rows, 0, []
        if gathered:
            yield Piece(spec, first, tuple(gathered))


class _Compared:
    """Some shards of an epoch are compared with their records, in a thread, while its first segment is read."""

    n_segments: int

    def __init__(self, compare: Callable[[], None]) -> None:
        self._compare = compare
        self._comparison: Future[None] | None = None
        self._executor = ThreadPoolExecutor(1, "compared")

    def _compared(self, segment: int) -> None:
        """Begin to compare at the first call; raise ArtifactCorrupt at the next, or the last, if a shard is damaged."""
        is_first = self._comparison is None
        if self._comparison is None:
            self._comparison = self._executor.submit(self._compare)
        if not is_first or segment == self.n_segments - 1:
            self._comparison.result()

    def confirm(self) -> None:
        """Wait for the comparison, if it has begun. Raises ArtifactCorrupt."""
        if self._comparison is not None:
            self._comparison.result()

    def close(self) -> None:
        """Wait for the comparison and its thread. Raises ArtifactCorrupt."""
        self._executor.shutdown()
        if self._comparison is not None:
            self._comparison.result()


class GatheredOrder(_Compared):
    """The order of an epoch, bucket by bucket: threads read a run of rows per unit straight to shuffled positions."""

    n_buffers = 2

    def __init__(
        self,
        split: OrderedSplit,
        plan: EpochPlan,
        specs: Sequence[ArraySpec],
        pool: ThreadPoolExecutor,
        *,
        reads: bool = True,
    ) -> None:
        super().__init__(partial(split.compare_sample, specs, plan.seed, plan.epoch) if reads else lambda: None)
        self._split, self._plan, self._specs, self._pool = split, plan, specs, pool
        self._unit_rows = split.unit_rows
        self.segment_rows = plan.bucket_rows
        self.n_segments = plan.n_buckets

    def n_rows(self, segment: int) -> int:
        """Return the rows of one segment."""
        return self._plan.rows_in_bucket(segment)

    def load(self, segment: int, stored: dict[str, np.ndarray]) -> None:
        """Fill the first rows of ``stored`` with one segment of the order. Raises ArtifactCorrupt."""
        self._compared(segment)
        runs = self._plan.runs(segment)
        tasks = [self._pool.submit(self._read, spec, run, stored[spec.name]) for run in runs for spec in self._specs]
        for task in tasks:
            task.result()

    def served(self, segment: int) -> np.ndarray | None:
        """Return int64 (rows,): which row of the segment, as its pieces fill it, is served i-th; None: the i-th."""
        return self._plan.bucket_order(segment)

    def pieces(self, segment: int, most_bytes: int) -> Iterator[Piece]:
        """Yield what fills a segment without a scatter: its runs one after the other. Raises ArtifactCorrupt."""
        self._compared(segment)
        return cut_pieces(self._plan.spans(segment), self._specs, most_bytes)

    def read(self, piece: Piece, rows: np.ndarray) -> None:
        """Fill ``rows`` with a piece; threads may read at once."""
        filled = 0
        for shard, start, stop in piece.spans:
            part = rows[filled : filled + stop - start]
            self._read_part(piece.spec, shard, start, part)
            filled += len(part)

    def _read_part(self, spec: ArraySpec, shard: int, start: int, rows: np.ndarray) -> None:
        n_rows = self._unit_rows[shard]
        self._split.read_shard(spec, shard, lambda group: read_part_of_shard(group, spec, shard, n_rows, start, rows))

    def _read(self, spec: ArraySpec, run: Run, rows: np.ndarray) -> None:
        n_rows = self._unit_rows[run.unit]
        self._split.read_shard(spec, run.unit, lambda group: read_run_of_shard(group, spec, n_rows, run, rows))


class KeptOrder(GatheredOrder):
    """The same for a reader that keeps all rows, unit after unit, as one segment: nothing is read twice.

    ``kept``, bool (rows,), says which rows were asked for; it is shared by the orders of all epochs.
    """

    def __init__(
        self,
        split: OrderedSplit,
        plan: EpochPlan,
        specs: Sequence[ArraySpec],
        pool: ThreadPoolExecutor,
        kept: np.ndarray,
    ) -> None:
        super().__init__(split, plan, specs, pool, reads=not kept.all())
        self._kept, self._first_rows = kept, np.cumsum(plan.unit_rows) - plan.unit_rows

    def served(self, segment: int) -> np.ndarray:
        """Return int64 (rows,): which of all rows is served i-th."""
        spans = self._plan.spans(segment)
        rows = np.concatenate([np.arange(*self._where(span), dtype=np.int64) for span in spans])
        return np.asarray(rows[self._plan.bucket_order(segment)])

    def pieces(self, segment: int, most_bytes: int) -> Iterator[Piece]:
        """Yield the runs that were not asked for before. Raises ArtifactCorrupt."""
        self._compared(segment)
        for span in self._plan.spans(segment):
            first, stop = self._where(span)
            if not self._kept[first:stop].all():
                self._kept[first:stop] = True
                for piece in cut_pieces([span], self._specs, most_bytes):
                    yield piece._replace(first=first + piece.first)

    def _where(self, span: Span) -> tuple[int, int]:
        first = int(self._first_rows[span.unit])
        return first + span.start, first + span.stop


class MaterialisedOrder(_Compared):
    """The order of an epoch read batch by batch from a copy on disk in that order."""

    n_buffers = 2
    """For the batch served and the batch filled: a third only pushes them out of the cache (0.82 of the speed)."""

    def __init__(self, group: Path, plan: EpochPlan, specs: Sequence[ArraySpec], batch_rows: int) -> None:
        super().__init__(partial(_compare_copied, group, plan, specs))
        self._group, self._plan, self._specs = group, plan, specs
        self.segment_rows = min(batch_rows, plan.n_rows)
        self.n_segments = -(-plan.n_rows // self.segment_rows)
        self._open: dict[str, tuple[int, FileIO]] = {}

    def n_rows(self, segment: int) -> int:
        """Return the rows of one segment."""
        return min(self.segment_rows, self._plan.n_rows - segment * self.segment_rows)

    def load(self, segment: int, stored: dict[str, np.ndarray]) -> None:
        """Fill the first rows of ``stored`` with one segment of the order. Raises ArtifactCorrupt."""
        self._compared(segment)
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

    def served(self, segment: int) -> np.ndarray | None:  # noqa: ARG002
        """Return None: a segment is filled in the order in which it is served."""
        return None

    def pieces(self, segment: int, most_bytes: int) -> Iterator[Piece]:
        """Yield what fills a segment. Raises ArtifactCorrupt."""
        self._compared(segment)
        row, shard_rows = segment * self.segment_rows, self._specs[0].shard_rows
        stop, spans = row + self.n_rows(segment), []
        while row < stop:
            shard, start = divmod(row, shard_rows)
            end = min(shard_rows, start + stop - row)
            spans.append(Span(shard, start, end))
            row += end - start
        return cut_pieces(spans, self._specs, most_bytes)

    def read(self, piece: Piece, rows: np.ndarray) -> None:
        """Fill ``rows`` with a piece; threads may read at once."""
        spec, filled = piece.spec, 0
        for shard, start, stop in piece.spans:
            n_rows = min(spec.shard_rows, self._plan.n_rows - shard * spec.shard_rows)
            part = rows[filled : filled + stop - start]
            read_part_of_shard(self._group, spec, shard, n_rows, start, part)
            filled += len(part)

    def close(self) -> None:
        """Close the files that are open; wait for the comparison. Raises ArtifactCorrupt."""
        for _, file in self._open.values():
            file.close()
        self._open.clear()
        super().close()


_MANY = 64
"""More shards than are compared each time."""


def _compare_copied(group: Path, plan: EpochPlan, specs: Sequence[ArraySpec]) -> None:
    """Do for a copy what ``compare_sample`` does for a split."""
    shards = EpochManifest.read(group).shards
    generator = np.random.Generator(philox(plan.seed, f"{plan.split}/compared/{plan.epoch}"))
    n_shards = -(-plan.n_rows // specs[0].shard_rows)
    chosen = [spec.shard_name(shard) for spec in specs for shard in range(n_shards)]
    if len(chosen) > _MANY or sum(spec.row_bytes for spec in specs) * plan.n_rows > SMALL:
        chosen = [chosen[generator.integers(len(chosen))]]
    for name in chosen:
        refuse_damaged(group, name, shards[name])


def find_materialised(split: OrderedSplit, plan: EpochPlan) -> Path | None:
    """Return the published copy of exactly this order, or None."""
    path = epoch_path(split.root, plan, int(split.identity["generation"]))
    if plan.unit_rows != tuple(split.unit_rows) or not (path / MANIFEST).exists():
        return None
    return path if EpochManifest.read(path).request == epoch_request(split.identity, plan) else None
