"""Rows of a stream in the memory of a GPU, brought there while batches are served, so that no step waits for them.

A segment of the stream, a bucket of its order as a rule, is read as it lies in files into pinned memory and copied on a
stream of its own; the GPU puts batches in their order, and makes float32 of what is stored. Its rows, and their order,
are those of the stream on the CPU. Two segments take turns. A cache that fits into the GPU's memory beside training is
kept there and read once; where not even two buckets fit, the host gathers, and segments are single batches.
"""

from __future__ import annotations

import copy
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tailrace.storage.layout import ArraySpec
from tailrace.storage.orders import Piece, cut_pieces
from tailrace.storage.shuffle import Span
from tailrace.storage.stream import BatchSpan, RowStream, StreamSource, StreamState
from tailrace.training.rows.transfer import pinned

SLOT_BYTES = 8 << 20
"""Pinned memory that is read into and copied from at once; more leaves the processor's cache (0.9 of the speed)."""
STEP_PER_WEIGHTS = 8
"""Memory that training takes at its peak, in weights: gradients, moments, bfloat16 copies and activations; 6 to 7 of
131,072 features (counted)."""
SPARE_BYTES = 1 << 30
"""Left free beside rows and what steps take, for scores and checkpoints."""
N_READERS = 4
"""Threads that read."""
N_SLOTS = 2 * N_READERS
"""While half of them are read into, the others are copied from."""

logger = logging.getLogger(__name__)


class DeviceRows:
    """The batches of a stream as float32 tensors on a CUDA device, by the names that the stream was opened with.

    ``n_steps`` may be set before the first batch: how many batches are asked for in all, counted from the first of the
    first epoch. A stream that will be read again is kept, if it fits.
    """

    def __init__(self, stream: RowStream, device: torch.device) -> None:
        self.n_steps = 0
        self._stream, self._device = stream, device
        self._position = copy.copy(stream.position)
        self._column_scales = {key: _column_scale(source, device) for key, source in stream.sources.items()}
        self._loader: _Loader | None = None
        self._n_served = 0

    @property
    def state(self) -> StreamState:
        """The (epoch, step) of the next batch."""
        return StreamState(self._position.epoch, self._position.step)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        """Return the next batch. The host waits for the reading threads alone, never for the device."""
        span = self._position.advance()
        if span is None:
            self.confirm()
            self.close()
            raise StopIteration
        if self._loader is None:
            self._loader = self._open_first(span)
        elif self._n_served == 1:
            self._reconsider(span)
        self._n_served += 1
        batch = self._cut(span)
        return {name: batch[key] for name, key in self._stream.names.items()}

    def _cut(self, span: BatchSpan) -> dict[str, Tensor]:
        assert self._loader is not None, "opened by the caller"
        n_rows = span.stop - span.start
        batch = {
            key: torch.empty(source.specs[0].shape(n_rows), dtype=torch.float32, device=self._device)
            for key, source in self._stream.sources.items()
        }
        row = span.start
        while row < span.stop:
            segment = self._loader.segment_at(span.epoch, row)
            end = min(span.stop, segment.stop)
            for key, source in self._stream.sources.items():
                part = batch[key][row - span.start : end - span.start]
                segment.decode(source, slice(row - segment.start, end - segment.start), self._column_scales[key], part)
            row = end
        return batch

    def _open_first(self, at: BatchSpan) -> _Loader:
        """Return what brings buckets, if they fit beside what the first step may take, else batches."""
        free = torch.cuda.mem_get_info(self._device)[0]
        if self._position.n_epochs is None:  # for training, of which the weights are there
            free -= STEP_PER_WEIGHTS * torch.cuda.memory_allocated(self._device)
        if self._bucket_bytes <= free - SPARE_BYTES:
            return self._open_buckets(at)
        stream, device = self._stream, self._device
        batches = [_Segment(_allocate(stream, stream.batch_rows, device), 0, device) for _ in range(3)]
        return _Loader(lambda _: _HostBatches(stream), batches, at, self._position.n_epochs)

    def _reconsider(self, at: BatchSpan) -> None:
        """Keep all rows if later epochs want them, or bring buckets, where there is room beside what a step took."""
        before, stream = self._loader, self._stream
        assert before is not None, "a batch was served"
        free = torch.cuda.mem_get_info(self._device)[0] + before.n_device_bytes
        step = torch.cuda.max_memory_allocated(self._device) - before.n_device_bytes
        is_read_again = self.n_steps > (at.epoch + 1) * stream.n_steps_per_epoch
        keeps = is_read_again and stream.n_rows * _row_bytes(stream) <= free - max(step, SPARE_BYTES)
        if not keeps and (before.is_of_buckets or self._bucket_bytes > free - SPARE_BYTES):
            return
        before.close()
        if not before.is_of_buckets:
            stream.close()  # what the host gathers with
        self._loader = before = None
        torch.cuda.empty_cache()
        self._loader = (self._open_kept(at) if keeps else None) or self._open_buckets(at)

    @property
    def _bucket_rows(self) -> int:
        return min(self._stream.plan(0).bucket_rows, self._stream.n_rows)

    @property
    def _bucket_bytes(self) -> int:
        return 2 * self._bucket_rows * _row_bytes(self._stream)

    def _open_buckets(self, at: BatchSpan) -> _Loader:
        stream, n_rows, device = self._stream, self._bucket_rows, self._device
        buckets = [_Segment(_allocate(stream, n_rows, device), n_rows, device) for _ in range(2)]
        return _Loader(lambda epoch: stream.open_order(epoch, n_rows), buckets, at, self._position.n_epochs)

    def _open_kept(self, at: BatchSpan) -> _Loader | None:
        stream, n_rows, bucket_rows = self._stream, self._stream.n_rows, self._bucket_rows
        try:
            stored = _allocate(stream, n_rows, self._device)
        except torch.OutOfMemoryError:  # it is free in pieces that are too small, or another program was faster
            return None
        n_bytes = n_rows * _row_bytes(stream)
        logger.info(
            "%s rows stay on %s (%.1f GB): later epochs read nothing", f"{n_rows:,}", self._device, n_bytes / 1e9
        )
        kept = np.zeros(n_rows, bool)
        segments = [_Segment(stored, bucket_rows, self._device) for _ in range(2)]
        return _Loader(lambda epoch: stream.open_order(epoch, bucket_rows, kept), segments, at, self._position.n_epochs)

    def confirm(self) -> None:
        """Do what ``RowStream.confirm`` does."""
        if self._loader is not None:
            self._loader.confirm()

    def close(self) -> None:
        """Stop reading, and let the memory go."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None
        self._stream.close()
        self._position.n_epochs = 0


def _row_bytes(stream: RowStream) -> int:
    return sum(spec.row_bytes for spec in stream.specs)


def _allocate(stream: RowStream, n_rows: int, device: torch.device) -> dict[str, Tensor]:
    return {spec.name: torch.empty(spec.shape(n_rows), dtype=_dtype(spec), device=device) for spec in stream.specs}


def _dtype(spec: ArraySpec) -> torch.dtype:
    dtype = getattr(torch, spec.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _column_scale(source: StreamSource, device: torch.device) -> Tensor | None:
    encoding = source.encoding
    return (
        None
        if encoding is None or encoding.column_scale is None
        else torch.from_numpy(encoding.column_scale).to(device)
    )


class _Segment:
    """Consecutive rows of an epoch's order on the device, as stored."""

    def __init__(self, stored: dict[str, Tensor], n_served: int, device: torch.device) -> None:
        self.stored = stored
        self.served = torch.empty(n_served, dtype=torch.int32, device=device)
        """Which row of ``stored`` is served i-th, where that is not the i-th."""
        self.is_in_order = False
        self.epoch, self.start, self.stop = -1, 0, 0
        self.error: BaseException | None = None
        self.copied, self.released = _event(), _event()

    def decode(self, source: StreamSource, rows: slice, column_scale: Tensor | None, out: Tensor) -> None:
        """Write the rows of one key that are served in ``rows``, counted from the segment's first, into ``out``."""
        parts = [self.stored[spec.name] for spec in source.specs]
        picked = [part[rows] if self.is_in_order else part.index_select(0, self.served[rows]) for part in parts]
        if column_scale is None:
            out.copy_(picked[0])
        else:  # in the order in which the host multiplies
            torch.mul(picked[0], picked[1][:, None], out=out)
            out.mul_(column_scale)


@dataclass
class _Slot:
    """Pinned memory on the host, and when the last copy out of it was over."""

    memory: Tensor
    is_free: torch.cuda.Event


class _Order(Protocol):
    """What fills the segments of an epoch: see ``GatheredOrder``."""

    segment_rows: int
    n_segments: int

    def n_rows(self, segment: int) -> int: ...
    def served(self, segment: int) -> np.ndarray | None: ...
    def pieces(self, segment: int, most_bytes: int) -> Iterator[Piece]: ...
    def read(self, piece: Piece, rows: np.ndarray) -> None: ...
    def confirm(self) -> None: ...
    def close(self) -> None: ...


class _HostBatches:
    """The batches of a stream that gathers on the host, as segments, from where the stream stands."""

    def __init__(self, stream: RowStream) -> None:
        self._stream, self._position = stream, stream.position
        self._stored: Mapping[str, np.ndarray] = {}
        self.segment_rows, self.n_segments = stream.batch_rows, stream.n_steps_per_epoch

    def n_rows(self, segment: int) -> int:
        return min(self.segment_rows, self._stream.n_rows - segment * self.segment_rows)

    def served(self, segment: int) -> None:  # noqa: ARG002
        return

    def pieces(self, segment: int, most_bytes: int) -> Iterator[Piece]:
        span, self._stored = self._stream.next_stored()
        assert span.start == segment * self.segment_rows, "segments are asked for in order"
        return cut_pieces([Span(0, 0, span.stop - span.start)], self._stream.specs, most_bytes)

    def read(self, piece: Piece, rows: np.ndarray) -> None:
        (span,) = piece.spans
        np.copyto(rows, self._stored[piece.spec.name][span.start : span.stop])

    def confirm(self) -> None:
        self._stream.confirm()

    def close(self) -> None: ...


class _Loader:
    """Fills segments in the order in which they will be asked for, in a thread that others read and copy for."""

    def __init__(
        self, open_order: Callable[[int], _Order], segments: list[_Segment], at: BatchSpan, n_epochs: int | None
    ) -> None:
        first = segments[0]
        self._n_epochs = n_epochs
        self._open_order, self._device = open_order, first.served.device
        self.is_of_buckets = len(first.served) > 0
        tensors = {id(tensor): tensor for segment in segments for tensor in (*segment.stored.values(), segment.served)}
        self.n_device_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self._copying: torch.cuda.Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        # the memory was another tensor's, which a kernel that is under way may still use
        self._copying.wait_stream(torch.cuda.current_stream(self._device))
        self._slots: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        largest = max(tensor.nbytes for tensor in tensors.values())
        self._slot_bytes = min(SLOT_BYTES, largest)
        slot_bytes = max(self._slot_bytes, first.served.nbytes)
        for _ in range(N_SLOTS):
            self._slots.put(_Slot(pinned([slot_bytes], torch.uint8), _event(blocking=True)))
        self._free: queue.SimpleQueue[_Segment | None] = queue.SimpleQueue()
        for segment in segments:
            self._free.put(segment)
        self._ready: queue.SimpleQueue[_Segment | BaseException] = queue.SimpleQueue()
        self._current: _Segment | None = None
        self._order: _Order | None = None
        self._is_closing = threading.Event()
        # else a thread's first call would take memory on the first GPU, whichever the rows go to
        self._pool = ThreadPoolExecutor(N_READERS, "rows", torch.cuda.set_device, (self._device,))
        self._thread = threading.Thread(target=self._run, args=(at.epoch, at.start), name="rows", daemon=True)
        self._thread.start()

    def segment_at(self, epoch: int, row: int) -> _Segment:
        """Return the segment that holds ``row``, for the current stream, and give the one before it back."""
        current = self._current
        while current is None or current.epoch != epoch or not current.start <= row < current.stop:
            if current is not None:
                current.released.record(torch.cuda.current_stream(self._device))
                self._free.put(current)
            filled = self._ready.get()
            if isinstance(filled, BaseException):
                self._current = None
                self._ready.put(filled)  # for every later call
                raise filled
            current = self._current = filled
            torch.cuda.current_stream(self._device).wait_event(current.copied)
        return current

    def _run(self, epoch: int, row: int) -> None:
        try:
            torch.cuda.set_device(self._device)
            while self._n_epochs is None or epoch < self._n_epochs:
                self._order = self._open_order(epoch)
                with closing(self._order) as order:
                    for index in range(row // order.segment_rows, order.n_segments):
                        segment = self._free.get()
                        if segment is None or self._is_closing.is_set():
                            return
                        self._fill(segment, order, index)
                        segment.epoch, segment.start = epoch, index * order.segment_rows
                        segment.stop = segment.start + order.n_rows(index)
                        self._ready.put(segment)
                epoch, row = epoch + 1, 0
        except BaseException as error:
            # raised by whoever asks for a batch
            self._ready.put(error)

    def _fill(self, segment: _Segment, order: _Order, index: int) -> None:
        self._copying.wait_event(segment.released)
        tasks: list[Future[None]] = []
        for piece in order.pieces(index, self._slot_bytes):
            rows = segment.stored[piece.spec.name][piece.first : piece.first + piece.n_rows]
            tasks.append(self._pool.submit(self._bring, rows, partial(order.read, piece)))
        served = order.served(index)
        segment.is_in_order = served is None
        if served is not None:
            numbers = served.astype(np.int32)
            target = segment.served[: len(numbers)]
            tasks.append(self._pool.submit(self._bring, target, lambda part: np.copyto(part, numbers)))
        for task in tasks:
            task.result()
        segment.copied.record(self._copying)

    def _bring(self, target: Tensor, fill: Callable[[np.ndarray], None]) -> None:
        """Fill a slot and copy it to ``target``, without waiting for the copy."""
        if self._is_closing.is_set():
            return
        slot = self._slots.get()
        try:
            slot.is_free.synchronize()
            rows = slot.memory[: target.nbytes].view(target.dtype).view(target.shape)
            fill((rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy())
            with torch.cuda.stream(self._copying):
                target.copy_(rows, non_blocking=True)
                slot.is_free.record(self._copying)
        finally:
            self._slots.put(slot)

    def confirm(self) -> None:
        """Do what ``RowStream.confirm`` does."""
        if self._order is not None:
            self._order.confirm()

    def close(self) -> None:
        """Stop; wait until nothing writes to the segments any more."""
        self._is_closing.set()
        self._free.put(None)
        self._thread.join()
        self._pool.shutdown()
        self._copying.synchronize()


def _event(*, blocking: bool = False) -> torch.cuda.Event:
    """Return an event; where it is ``blocking``, a thread that waits for it sleeps."""
    return torch.cuda.Event(blocking=blocking)  # type: ignore[no-untyped-call]
