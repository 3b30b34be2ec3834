"""Batches in uniformly shuffled order, prefetched, resumable from two numbers.

A ``RowStream`` serves the order of an ``EpochPlan`` in segments (``tailrace.storage.orders``). A background thread
fills the next segment while batches are served from the current one as views. Memory is two segments.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import numpy as np

from tailrace.storage.errors import SettingsError
from tailrace.storage.layout import ArraySpec, Encoding
from tailrace.storage.memory import aligned_rows
from tailrace.storage.orders import GatheredOrder, KeptOrder, MaterialisedOrder, OrderedSplit, find_materialised
from tailrace.storage.shuffle import EpochPlan, sample_prefix

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
        self._reading: GatheredOrder | MaterialisedOrder | None = None
        """Of the epoch that is read."""
        self._closing = threading.Event()

    def _sample(self, n_rows: int) -> tuple[int, ...]:
        available = sum(self._split.unit_rows)
        if not 1 <= n_rows <= available:
            raise SettingsError(f"{self._split.root}: n_rows is {n_rows:,}, but must be 1 to {available:,}")
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
            raise SettingsError(f"order {self._order!r} is not known; use one of {', '.join(ORDERS)}")

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
            self.confirm()
            self.close()
            raise StopIteration
        return span, self._rows(*span)

    def _rows(self, epoch: int, start: int, stop: int) -> dict[str, np.ndarray]:
        segment = self._segment_at(epoch, start)
        if stop <= segment.stop:
            return self._cut(segment, start, stop)
        if not self._stitched:
            self._stitched = _buffers(self.specs, self.batch_rows)
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
            self._free.put(Segment(_buffers(self.specs, n_rows)))
        # the thread does not keep a stream that nobody has any more
        self._prefetcher = threading.Thread(target=_prefetch, args=(weakref.ref(self), epoch, row), daemon=True)
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

    def confirm(self) -> None:
        """Wait until the shards that are compared in this epoch are; raise ArtifactCorrupt for a damaged one.

        For whoever ends before the epoch does: rows of its first segment are served while shards are compared.
        """
        if self._reading is not None:
            self._reading.confirm()

    def close(self) -> None:
        """Stop prefetching and let the memory go; a closed stream serves nothing more."""
        if self._prefetcher is not None:
            self._closing.set()
            self._free.put(None)
            self._prefetcher.join()
            self._prefetcher = None
        self._pool.shutdown()
        self.position.n_epochs = 0
        self._current = self._reading = None

    def __del__(self) -> None:
        if getattr(self, "_prefetcher", None) is not None:  # else it could not be opened
            self._closing.set()
            self._free.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.confirm()
        finally:
            self.close()


def _prefetch(of: weakref.ref[RowStream], epoch: int, row: int) -> None:
    """Fill a stream's free segments in the order they will be asked for, until it is closed or gone."""
    stream = of()
    if stream is None:
        return
    free, ready, is_closing, position = stream._free, stream._ready, stream._closing, stream.position
    specs, batch_rows = stream.specs, stream.batch_rows
    try:
        while (n_epochs := position.n_epochs) is None or epoch < n_epochs:
            if (stream := of()) is None:
                return
            opened = stream._reading = stream.open_order(epoch, batch_rows)
            del stream
            with closing(opened) as order:
                for index in range(row // order.segment_rows, order.n_segments):
                    segment = free.get()
                    if segment is None or is_closing.is_set():
                        return
                    rows = order.n_rows(index)
                    # an epoch read the other way may have longer segments than the buffers were made for
                    if any(len(stored) < rows for stored in segment.stored.values()):
                        segment.stored = _buffers(specs, rows)
                    order.load(index, segment.stored)
                    segment.epoch, segment.start = epoch, index * order.segment_rows
                    segment.stop = segment.start + rows
                    ready.put(segment)
            epoch, row = epoch + 1, 0
    except BaseException as error:
        # handed to the consumer, which raises it
        ready.put(Segment({}, error=error))


def _buffers(specs: Iterable[ArraySpec], n_rows: int) -> dict[str, np.ndarray]:
    return {spec.name: aligned_rows(n_rows, spec.width, spec.memory_dtype) for spec in specs}
