"""Computes blocks in a background thread, one ahead of the stage that training is at.

The thread takes a permit for every block. A permit is given back with every stage that was served, which is when the
memory of a further block is free.

The buffer is memory for the stages of the mixing order. Rows are put where they will be served, so a batch is a slice.
Three stages lie in a ring: the one being served, and the two over which the rows of the block being computed are
spread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tailrace.pipeline.cache.rows import RowMaker, as_array, torch_dtype
from tailrace.pipeline.live.contexts import ContextBatches, TextPosition
from tailrace.pipeline.live.mixing import STAGES_IN_MEMORY, Mixing, Serving
from tailrace.storage.cache_format import Site
from tailrace.storage.statistics import SiteStatistics
from tailrace.training.rows.transfer import to_device


@dataclass(frozen=True)
class BlockStart:
    """Where the rows of a block begin: in which batch of contexts, and after how many of its rows."""

    position: TextPosition = field(default_factory=TextPosition)
    skipped_rows: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the start as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Return the start written by ``as_json``."""
        return cls(TextPosition.from_json(value["position"]), value["skipped_rows"])


class BlockProducer:
    """Fills ``memory`` with block after block from ``first_block`` on, which begins at the first batch's rows.

    Statistics are summed over block 0, if it is computed.
    """

    def __init__(
        self,
        batches: ContextBatches,
        maker: RowMaker,
        mixing: Mixing,
        memory: StageMemory,
        *,
        first_block: int,
        skipped_rows: int,
        n_blocks_ahead: int,
        model_lock: threading.Lock,
    ) -> None:
        self.statistics = {
            f"{site.name}/{side}": SiteStatistics(site.width(side)) for site in maker.sites for side in site.sides
        }
        self._batches, self._maker, self._mixing, self._memory = batches, maker, mixing, memory
        self._block, self._skipped, self._model_lock = first_block, skipped_rows, model_lock
        self._permits = threading.Semaphore(n_blocks_ahead)
        self._ready: queue.SimpleQueue[BlockStart | BaseException] = queue.SimpleQueue()
        self._stopped = threading.Event()
        # the last batch's rows, its position, and how many of its rows are in the buffer
        self._rows: Mapping[str, Tensor] = {}
        self._position = TextPosition()
        self._n, self._used = 0, 0
        self._thread = threading.Thread(target=self._run, name="live-blocks", daemon=True)
        self._thread.start()

    def wait_for_block(self) -> BlockStart:
        """Wait until the next block lies in memory and return where it began; raise what went wrong."""
        start = self._ready.get()
        if isinstance(start, BaseException):
            self._ready.put(start)  # for every later call
            raise start
        return start

    def stage_is_served(self) -> None:
        """Note that a stage's memory may be written to."""
        self._permits.release()

    def close(self) -> None:
        """Stop the thread; it may finish the batch it is at."""
        self._stopped.set()
        self._permits.release()
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                self._permits.acquire()
                start = None if self._stopped.is_set() else self._fill_block()
                if start is None:
                    return
                self._ready.put(start)
                self._block += 1
        except BaseException as error:
            # raised by whoever waits for the block
            self._ready.put(error)

    def _fill_block(self) -> BlockStart | None:
        """Compute one block and return where it began; None if it is to stop."""
        serving = self._mixing.serving(self._block)
        start, filled = None, 0
        while filled < self._mixing.block_rows:
            while self._used == self._n:
                if self._stopped.is_set():
                    return None
                self._compute_batch()
            if start is None:
                start = BlockStart(self._position, self._used)
            stop = min(self._n, self._used + self._mixing.block_rows - filled)
            piece = {key: rows[self._used : stop] for key, rows in self._rows.items()}
            self._memory.put(self._block, serving, filled, piece)
            if self._block == 0:
                self._sum(piece)
            filled += stop - self._used
            self._used = stop
        return start

    def _compute_batch(self) -> None:
        batch = next(self._batches)
        with self._model_lock:
            rows = self._maker.rows(batch.tokens, batch.documents, batch.position.context)
        self._rows, self._position, self._n = rows.activations, batch.position, len(rows)
        self._used, self._skipped = self._skipped, 0

    def _sum(self, piece: dict[str, Tensor]) -> None:
        for key, rows in piece.items():
            bad = self.statistics[key].add(as_array(rows.cpu()))
            assert bad is None, "rows were checked when they were made"


class StageMemory:
    """Rows of three consecutive stages by ``site/side``, in storage dtype.

    On a GPU nothing waits: what fills a stage and what reads it are asked for on one stream, in the order of permits.
    """

    def __init__(self, sites: Sequence[Site], block_rows: int, device: torch.device) -> None:
        self._device = device
        self._slots: list[dict[str, Tensor]] = [
            {
                f"{site.name}/{side}": torch.empty(
                    (block_rows, site.width(side)), dtype=torch_dtype(site), device=device
                )
                for site in sites
                for side in site.sides
            }
            for _ in range(STAGES_IN_MEMORY)
        ]

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole buffer."""
        return sum(rows.nbytes for slot in self._slots for rows in slot.values())

    def put(self, block: int, serving: Serving, first_row: int, rows: dict[str, Tensor]) -> None:
        """Put consecutive rows of a block, the first of which is its row ``first_row``, where they are served."""
        chosen = slice(first_row, first_row + len(next(iter(rows.values()))))
        is_later, target = serving.is_later[chosen], serving.target[chosen]
        for later in (False, True):
            picked = np.flatnonzero(is_later == later)
            picks, targets = (to_device(torch.from_numpy(rows), self._device) for rows in (picked, target[picked]))
            slot = self._slots[(block + later) % STAGES_IN_MEMORY]
            for key, values in rows.items():
                slot[key].index_copy_(0, targets, values.index_select(0, picks))

    def read(self, stage: int, start: int, stop: int) -> dict[str, Tensor]:
        """Return views of the rows served [start, stop) in a stage; valid until the stage is given back."""
        return {key: rows[start:stop] for key, rows in self._slots[stage % STAGES_IN_MEMORY].items()}
