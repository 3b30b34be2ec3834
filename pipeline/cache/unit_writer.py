"""Filling and writing units beside the language model, so that the model is the only thing waited for.

Rows pass through two threads: one shuffles them into a unit's memory and sums their statistics, the other writes full
units to disk. Two units' memory is all that is held; a full disk queue holds the model back.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from tailrace.pipeline.cache.rows import Rows, UnitTask
from tailrace.storage.cache_format import CacheFormat
from tailrace.storage.cache_writer import UnitBuffer

_BATCHES_WAITING = 4


class UnitWriter:
    """Takes rows of unit after unit; commits each unit when its last row is there."""

    def __init__(
        self,
        root: Path,
        layout: CacheFormat,
        *,
        generation: int,
        seed: int,
        with_provenance: bool,
        on_commit: Callable[[dict[str, Any]], None],
    ) -> None:
        self._root, self._generation, self._seed, self._on_commit = root, generation, seed, on_commit
        self._free: SimpleQueue[UnitBuffer] = SimpleQueue()
        for _ in range(2):
            self._free.put(UnitBuffer(layout, with_provenance=with_provenance))
        self._filler, self._committer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._pending: deque[Future[Any]] = deque()
        self._room = threading.Semaphore(_BATCHES_WAITING)
        self._buffer: UnitBuffer | None = None
        self._failed = False

    def write(self, task: UnitTask, rows: Iterator[Rows]) -> None:
        """Hand over one unit; returns when its rows are on their way. Raises what went wrong with earlier ones."""
        self._submit(self._begin, task)
        for piece in rows:
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
            # rows after a gap would land in the wrong places, and a unit that is never full never frees its buffer
            self._failed = True
            raise
        finally:
            self._room.release()

    def _begin(self, task: UnitTask) -> None:
        self._buffer = self._free.get()
        self._buffer.begin(self._seed, task.split, task.unit, task.n_rows)

    def _fill(self, piece: Rows) -> None:
        assert self._buffer is not None, "a unit was begun"
        self._buffer.fill(piece.provenance, piece.activations)
        if self._buffer.is_full:
            self._pending.append(self._committer.submit(self._commit, self._buffer))
            self._buffer = None

    def _commit(self, buffer: UnitBuffer) -> None:
        try:
            self._on_commit(buffer.commit(self._root, self._generation))
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
