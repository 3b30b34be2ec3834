"""The order of live mode: which rows are served when. Pure; touches no model and no text.

Fresh rows come in blocks of ``block_rows`` in the order of the text. Block j is permuted; its first half is served in
stage j, its second half in stage j + 1. So stage j mixes the second half of block j − 1 with the first half of block j,
again permuted. Stage 0 has only a first half. Every row is served exactly once, no more than two blocks after it was
computed, and all of it is decided by (seed, block) and (seed, stage): two numbers say where a run stands, where a
buffer that is refilled at random would have to be saved whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tailrace.storage.errors import SettingsError
from tailrace.storage.shuffle import invert, philox, random_permutation

STAGES_IN_MEMORY = 3
"""The stage that is served and the two that the block being computed belongs to."""


class Serving(NamedTuple):
    """Where the rows of a block, in text order, are served; both (block_rows,)."""

    is_later: np.ndarray
    """bool: in the stage after the block's own."""
    target: np.ndarray
    """int64: position in the order of that stage."""


@dataclass(frozen=True)
class Mixing:
    """The order that a seed and a block size decide; ``block_rows`` is even."""

    seed: int
    block_rows: int

    def stage_rows(self, stage: int) -> int:
        """Return how many rows a stage serves."""
        return self.block_rows if stage else self.block_rows // 2

    def serving(self, block: int) -> Serving:
        """Return where each row of a block is served."""
        half = self.block_rows // 2
        permuted = invert(random_permutation(philox(self.seed, "live", block), self.block_rows))
        is_later = permuted >= half
        target = np.empty(self.block_rows, np.int64)
        # a stage's rows before its own permutation: the older block's second half, then the newer block's first half
        older = half if block else 0
        target[~is_later] = invert(self._stage_order(block))[older + permuted[~is_later]]
        target[is_later] = invert(self._stage_order(block + 1))[permuted[is_later] - half]
        return Serving(is_later, target)

    def served(self, stage: int) -> np.ndarray:
        """Return int64 (stage_rows,): which row of the text, counted from the first, is served i-th in a stage."""
        served = np.empty(self.stage_rows(stage), np.int64)
        for block in range(max(stage - 1, 0), stage + 1):
            is_later, target = self.serving(block)
            here = is_later if block < stage else ~is_later
            served[target[here]] = block * self.block_rows + np.flatnonzero(here)
        return served

    def _stage_order(self, stage: int) -> np.ndarray:
        return random_permutation(philox(self.seed, "live/stage", stage), self.stage_rows(stage))


def buffer_rows_problem(buffer_rows: int, batch_rows: int) -> str | None:
    """Return what is wrong with a buffer that is too small however narrow its rows are; None if nothing is."""
    if buffer_rows >= 4 * batch_rows:
        return None
    return f"buffer_rows is {buffer_rows:,}, wanted at least {4 * batch_rows:,}: four batches"


def choose_block_rows(buffer_rows: int, buffer_bytes: int, row_bytes: int, batch_rows: int) -> int:
    """Return the rows of a block: at most half the buffer, as memory allows, in whole batches of both halves.

    Raises SettingsError, naming everything it depends on, if not even one batch of each half fits.
    """
    fitting = min(buffer_rows // 2, buffer_bytes // (STAGES_IN_MEMORY * row_bytes))
    block_rows = fitting // (2 * batch_rows) * (2 * batch_rows)
    if block_rows:
        return block_rows
    problem = buffer_rows_problem(buffer_rows, batch_rows)
    problems = [] if problem is None else [problem]
    needed = STAGES_IN_MEMORY * 2 * batch_rows * row_bytes
    if buffer_bytes < needed:
        problems.append(f"buffer_bytes is {buffer_bytes:,}, wanted at least {needed:,} for rows of {row_bytes:,} bytes")
    raise SettingsError(
        f"the live buffer cannot hold batches of {batch_rows:,} rows: {'; '.join(problems)}. Raise "
        f"{'them' if len(problems) > 1 else 'it'}, lower batch_rows, or train on fewer sites"
    )
