"""Batches in uniformly shuffled order, prefetched, resumable from two numbers.

A ``RowStream`` serves the order of an ``EpochPlan`` in segments. ``GatheredOrder`` reads a segment from every unit,
straight to its shuffled positions; ``MaterialisedOrder`` reads it in sequence from a copy of the epoch. A background
thread fills the next segment while batches are served from the current one as views. Memory is two segments.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np

from tailrace.storage.artifact import MANIFEST
from tailrace.storage.cache_format import EpochManifest, epoch_path, epoch_request
from tailrace.storage.errors import SettingsError
from tailrace.storage.layout import ArraySpec, Encoding
from tailrace.storage.memory import aligned_rows, read_sequential
from tailrace.storage.shard import open_shard, read_part_of_shard, read_run_of_shard, read_zarr, shard_errors
from tailrace.storage.shuffle import EpochPlan, Run, Span, sample_prefix

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

    def served(self, segment: int) -> np.ndarray | None:
        """Return int64 (rows,): which row of the segment, as its pieces fill it, is served i-th; None: the i-th."""
        return self._plan.bucket_order(segment)

    def pieces(self, segment: int, most_bytes: int) -> Iterator[Piece]:
        """Yield what fills a segment without a scatter: its runs one after the other."""
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

    def close(self) -> None:
        """Nothing stays open between segments."""

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
        super().__init__(split, plan, specs, pool)
        self._kept, self._first_rows = kept, np.cumsum(plan.unit_rows) - plan.unit_rows

    def served(self, segment: int) -> np.ndarray:
        """Return int64 (rows,): which of all rows is served i-th."""
        spans = self._plan.spans(segment)
        rows = np.concatenate([np.arange(*self._where(span), dtype=np.int64) for span in spans])
        return np.asarray(rows[self._plan.bucket_order(segment)])

    def pieces(self, segment: int, most_bytes: int) -> Iterator[Piece]:
        """Yield the runs that were not asked for before."""
        for span in self._plan.spans(segment):
            first, stop = self._where(span)
            if not self._kept[first:stop].all():
                self._kept[first:stop] = True
                for piece in cut_pieces([span], self._specs, most_bytes):
                    yield piece._replace(first=first + piece.first)

    def _where(self, span: Span) -> tuple[int, int]:
        first = int(self._first_rows[span.unit])
        return first + span.start, first + span.stop


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

    def served(self, segment: int) -> np.ndarray | None:  # noqa: ARG002
        """Return None: a segment is filled in the order in which it is served."""
        return None

    def pieces(self, segment: int, most_bytes: int) -> Iterator[Piece]:
        """Yield what fills a segment."""
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
        """Close the files that are open."""
        for _, file in self._open.values():
            file.close()
        self._open.clear()


def find_materialised(split: OrderedSplit, plan: EpochPlan) -> Path | None:
    """Return the published copy of exactly this order, or None."""
    path = epoch_path(split.root, plan, int(split.identity["generation"]))
    if plan.unit_rows != tuple(split.unit_rows) or not (path / MANIFEST).exists():
        return None
    return path if EpochManifest.read(path).request == epoch_request(split.identity, plan) else None


ORDERS = ("auto", "gathered", "materialised")


@dataclass(frozen=True)
class StreamSource:
    """The arrays behind one key, and how their stored rows become the rows that are served."""

    key: str
    encoding: Encoding | None
    specs: tuple[ArraySpec, ...]

    @property
    def dtype(self) -> str:
        """The dtype in which rows are served: bfloat16 comes as uint16 bits, int8 already as float32."""
        stored = self.specs[0].dtype
        return "float32" if self.encoding is not None and self.encoding.dtype == "int8" else stored

    def decode(self, stored: Mapping[str, np.ndarray], out: np.ndarray | None = None) -> np.ndarray:
        """Return served rows from stored rows by array name."""
        return stored[self.specs[0].name] if self.encoding is None else self.encoding.decode(stored, out)


class StreamedSplit(OrderedSplit, Protocol):
    """A split, as far as a stream needs it."""

    @property
    def bucket_rows(self) -> int:
        """Rows shuffled together in memory."""

    def source(self, key: str) -> StreamSource:
        """Return the arrays behind a key."""


@dataclass(frozen=True)
class StreamState:
    """The batch that a stream serves next."""

    epoch: int
    step: int


class BatchSpan(NamedTuple):
    """Which rows of an epoch's order a batch holds."""

    epoch: int
    start: int
    stop: int


@dataclass
class Position:
    """Which batch comes next, epoch after epoch."""

    epoch: int
    step: int
    n_epochs: int | None
    n_rows: int
    batch_rows: int
    n_steps_per_epoch: int

    def advance(self) -> BatchSpan | None:
        """Go on to the batch after the next and return the next; None if there is none."""
        epoch, start = self.epoch, self.step * self.batch_rows
        if self.n_epochs is not None and epoch >= self.n_epochs:
            return None
        self.epoch, self.step = divmod(epoch * self.n_steps_per_epoch + self.step + 1, self.n_steps_per_epoch)
        return BatchSpan(epoch, start, min(start + self.batch_rows, self.n_rows))


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows of an epoch's order."""

    epoch: int
    step: int
    arrays: dict[str, np.ndarray]
    """By key. Views that stay valid until the next batch is asked for."""

    @property
    def n_rows(self) -> int:
        """Rows in this batch."""
        return len(next(iter(self.arrays.values())))


@dataclass
class Segment:
    """Memory for consecutive rows of an epoch's order, and which rows it holds now."""

    stored: dict[str, np.ndarray]
    epoch: int = -1
    start: int = 0
    stop: int = 0
    error: BaseException | None = field(default=None)


class RowStream(Iterator[RowBatch]):
    """Iterator over batches; a context manager that stops the prefetching. Make one with ``CacheSplit.stream``."""

    def __init__(
        self,
        split: StreamedSplit,
        keys: Sequence[str],
        *,
        names: Sequence[str],
        batch_rows: int,
        seed: int,
        epoch: int,
        step: int,
        n_epochs: int | None,
        n_rows: int | None,
        drop_last: bool,
        n_threads: int,
        order: str,
    ) -> None:
        self._split, self._seed, self._order = split, seed, order
        self.sources = {key: split.source(key) for key in dict.fromkeys(keys)}
        self.names = dict(zip(names, keys, strict=True))
        """The key of every name that batches are asked for by."""
        self.specs = tuple(spec for source in self.sources.values() for spec in source.specs)
        self.batch_rows = batch_rows
        self._unit_rows = tuple(split.unit_rows) if n_rows is None else self._sample(n_rows)
        self.n_rows = sum(self._unit_rows)
        self._check(epoch, step, drop_last=drop_last)
        self.n_steps_per_epoch = self.n_rows // batch_rows if drop_last else -(-self.n_rows // batch_rows)
        epoch, step = divmod(epoch * self.n_steps_per_epoch + step, self.n_steps_per_epoch)
        self.position = Position(epoch, step, n_epochs, self.n_rows, batch_rows, self.n_steps_per_epoch)
        self._pool = ThreadPoolExecutor(n_threads)
        self._decoded = {key: self._decode_buffer(source) for key, source in self.sources.items()}
        self._stitched: dict[str, np.ndarray] = {}
        self._free: queue.SimpleQueue[Segment | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Segment] = queue.SimpleQueue()
        self._current: Segment | None = None
        self._prefetcher: threading.Thread | None = None
        self._closing = threading.Event()

    def _sample(self, n_rows: int) -> tuple[int, ...]:
        available = sum(self._split.unit_rows)
        if not 1 <= n_rows <= available:
            raise SettingsError(f"{self._split.root}: {n_rows:,} rows asked for, there are {available:,}")
        return sample_prefix(self._seed, self._split.name, self._split.unit_rows, n_rows)

    def _check(self, epoch: int, step: int, *, drop_last: bool) -> None:
        if self.batch_rows < 1 or self.n_rows < (self.batch_rows if drop_last else 1):
            raise SettingsError(
                f"{self._split.root}: batches of {self.batch_rows:,} rows cannot be drawn from {self.n_rows:,} "
                f"{self._split.name} rows; use batches of 1 to {self.n_rows:,} rows"
            )
        if epoch < 0 or step < 0:
            raise SettingsError(f"a stream cannot begin at epoch {epoch}, step {step}; both count from 0")
        if self._order not in ORDERS:
            raise SettingsError(f"there is no order {self._order!r}; use one of {', '.join(ORDERS)}")

    def _decode_buffer(self, source: StreamSource) -> np.ndarray | None:
        return None if source.encoding is None else source.encoding.decode_buffer(self.batch_rows)

    @property
    def state(self) -> StreamState:
        """The (epoch, step) of the next batch; a stream opened there serves exactly what this stream would."""
        return StreamState(self.position.epoch, self.position.step)

    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of one epoch."""
        return EpochPlan(self._seed, epoch, self._split.name, self._unit_rows, self._split.bucket_rows)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> RowBatch:
        span, stored = self.next_stored()
        decoded = {key: source.decode(stored, self._decoded[key]) for key, source in self.sources.items()}
        arrays = {name: decoded[key] for name, key in self.names.items()}
        return RowBatch(span.epoch, span.start // self.batch_rows, arrays)

    def next_stored(self) -> tuple[BatchSpan, dict[str, np.ndarray]]:
        """Return the next batch as stored, by array name: views that stay valid until the next is asked for."""
        span = self.position.advance()
        if span is None:
            self.close()
            raise StopIteration
        return span, self._rows(*span)

    def _rows(self, epoch: int, start: int, stop: int) -> dict[str, np.ndarray]:
        segment = self._segment_at(epoch, start)
        if stop <= segment.stop:
            return self._cut(segment, start, stop)
        if not self._stitched:
            self._stitched = self._buffers(self.batch_rows)
        filled = 0
        while start + filled < stop:
            segment = self._segment_at(epoch, start + filled)
            piece = self._cut(segment, start + filled, min(stop, segment.stop))
            n = len(next(iter(piece.values())))
            for name, rows in piece.items():
                self._stitched[name][filled : filled + n] = rows
            filled += n
        return {name: rows[:filled] for name, rows in self._stitched.items()}

    def _cut(self, segment: Segment, start: int, stop: int) -> dict[str, np.ndarray]:
        return {name: rows[start - segment.start : stop - segment.start] for name, rows in segment.stored.items()}

    def _segment_at(self, epoch: int, row: int) -> Segment:
        """Return the loaded segment that holds ``row``, giving the previous one back to the prefetcher."""
        while (
            self._current is None or self._current.epoch != epoch or not self._current.start <= row < self._current.stop
        ):
            if self._prefetcher is None:
                self._start_prefetching(epoch, row)
            if self._current is not None:
                self._free.put(self._current)
            self._current = self._ready.get()
            if self._current.error is not None:
                error = self._current.error
                self.close()
                raise error
        return self._current

    def _start_prefetching(self, epoch: int, row: int) -> None:
        order = self.open_order(epoch, self.batch_rows)
        n_rows = min(order.segment_rows, self.n_rows)
        for _ in range(order.n_buffers):
            self._free.put(Segment(self._buffers(n_rows)))
        self._prefetcher = threading.Thread(target=self._prefetch, args=(epoch, row), daemon=True)
        self._prefetcher.start()

    def open_order(
        self, epoch: int, segment_rows: int, kept: np.ndarray | None = None
    ) -> GatheredOrder | MaterialisedOrder:
        """Return what reads an epoch. Segments of a materialised one have ``segment_rows`` rows; see ``KeptOrder``."""
        plan = self.plan(epoch)
        if kept is not None:
            return KeptOrder(self._split, plan, self.specs, self._pool, kept)
        materialised = None if self._order == "gathered" else find_materialised(self._split, plan)
        if materialised is not None:
            return MaterialisedOrder(materialised, plan, self.specs, segment_rows)
        if self._order == "materialised":
            raise SettingsError(
                f"{self._split.root}: epoch {epoch} of {self._split.name} rows with seed {self._seed} was not "
                "materialised; run `pipeline shuffle`, or read with order='gathered'"
            )
        return GatheredOrder(self._split, plan, self.specs, self._pool)

    def _prefetch(self, epoch: int, row: int) -> None:
        """Fill free segments in the order they will be asked for, until the stream is closed."""
        try:
            while (n_epochs := self.position.n_epochs) is None or epoch < n_epochs:
                with closing(self.open_order(epoch, self.batch_rows)) as order:
                    for index in range(row // order.segment_rows, order.n_segments):
                        segment = self._free.get()
                        if segment is None or self._closing.is_set():
                            return
                        rows = order.n_rows(index)
                        # an epoch read the other way may have longer segments than the buffers were made for
                        if any(len(stored) < rows for stored in segment.stored.values()):
                            segment.stored = self._buffers(rows)
                        order.load(index, segment.stored)
                        segment.epoch, segment.start = epoch, index * order.segment_rows
                        segment.stop = segment.start + rows
                        self._ready.put(segment)
                epoch, row = epoch + 1, 0
        except BaseException as error:
            # handed to the consumer, which raises it
            self._ready.put(Segment({}, error=error))

    def _buffers(self, n_rows: int) -> dict[str, np.ndarray]:
        return {spec.name: aligned_rows(n_rows, spec.width, spec.memory_dtype) for spec in self.specs}

    def close(self) -> None:
        """Stop prefetching and let the memory go; a closed stream serves nothing more."""
        if self._prefetcher is not None:
            self._closing.set()
            self._free.put(None)
            self._prefetcher.join()
            self._prefetcher = None
        self._pool.shutdown()
        self.position.n_epochs = 0
        self._current = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
