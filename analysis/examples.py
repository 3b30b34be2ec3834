"""The strongest examples of every feature, kept in bounded memory while rows stream past.

**At most one example comes from a context**: the strongest row there, because neighbouring rows of one passage are
the same example again. Equal activations are ordered by row, the earlier first, so the kept set is a function of the
rows alone and not of how they were cut into blocks or workers.

Each example keeps the feature's activation at every row of its window when it is seen, since the context's rows are
at hand then; nothing is encoded a second time, and the numbers shown agree with the statistics to the bit.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from analysis.block import Block
from analysis.harvest import Plan, Subject


class Examples(NamedTuple):
    """Examples as parallel arrays, one entry each."""

    feature: NDArray[np.int64]
    activation: NDArray[np.float32]
    row: NDArray[np.int64]
    """Index of the row in the split's token order."""
    context: NDArray[np.int64]
    position: NDArray[np.int64]
    window: NDArray[np.float32]
    """(examples, before + 1 + after) the feature's activations around the example; NaN where the cache has no row."""

    @classmethod
    def empty(cls, window: int) -> Self:
        """Return no examples."""
        whole = np.empty(0, np.int64)
        return cls(whole, np.empty(0, np.float32), whole, whole, whole, np.empty((0, window), np.float32))

    def take(self, chosen: NDArray[np.integer]) -> Self:
        """Return the chosen entries, in the order given."""
        return type(self)._make(array[chosen] for array in self)


class TopExamples:
    """Accumulator of the ``n`` strongest examples per feature, sorted by feature, then by falling activation.

    Memory: up to 2·n examples per feature, each 36 bytes and 4 per row of its window.
    """

    def __init__(self, d_sae: int, n: int, before: int, after: int) -> None:
        self.n = n
        self.before = before
        self.after = after
        self._d_sae = d_sae
        self._kept = Examples.empty(before + 1 + after)
        self._waiting: list[Examples] = []
        self._n_waiting = 0
        self._threshold = np.zeros(d_sae, np.float32)
        """What a later row must exceed to be kept; stale (too low) while candidates wait, which costs only time."""

    @classmethod
    def start(cls, subject: Subject, plan: Plan, first_unit: int) -> Self:  # noqa: ARG003 - an accumulator's signature
        """Return an empty accumulator."""
        return cls(subject.coder.d_sae, plan.n_examples, plan.window_before, plan.window_after)

    @property
    def kept(self) -> Examples:
        """The examples so far."""
        self._settle()
        return self._kept

    def add(self, block: Block) -> None:
        """Take a block's candidates."""
        chosen = self._strongest_per_context(block)
        if not len(chosen):
            return
        row, feature = block.active.row[chosen], block.active.feature[chosen]
        candidates = Examples(
            feature=feature,
            activation=block.active.value[chosen],
            row=block.rows.first_row + row,
            context=block.rows.context[row],
            position=block.rows.position[row],
            window=block.window(row, feature, self.before, self.after),
        )
        self._wait(candidates)

    def end_unit(self) -> None:
        """Do nothing: the kept set does not depend on where units end."""

    def merge(self, later: Self) -> None:
        """Add the examples of rows that come after all of ours."""
        self._wait(later.kept)

    def _strongest_per_context(self, block: Block) -> NDArray[np.int64]:
        """Return which active pairs of the block are the strongest of their feature and context, and worth keeping."""
        row, feature, value = block.active
        worthy = np.flatnonzero(value > self._threshold[feature])
        key = block.context_index[row[worthy]] * self._d_sae + feature[worthy]
        strongest = np.zeros(block.n_contexts * self._d_sae, np.float32)
        np.maximum.at(strongest, key, value[worthy])
        equal = np.flatnonzero(value[worthy] == strongest[key])
        _, first = np.unique(key[equal], return_index=True)  # pairs are in row order, so the earliest row wins
        return worthy[equal[first]]

    def _wait(self, candidates: Examples) -> None:
        """Collect candidates and sort them seldom: when they are half as many as what is kept at most."""
        self._waiting.append(candidates)
        self._n_waiting += len(candidates.row)
        if self._n_waiting > self._d_sae * self.n // 2:
            self._settle()

    def _settle(self) -> None:
        if not self._waiting:
            return
        columns = zip(self._kept, *self._waiting, strict=True)
        self._kept = keep_strongest(Examples._make(np.concatenate(arrays) for arrays in columns), self.n)
        self._waiting, self._n_waiting = [], 0
        rank = rank_in_group(self._kept.feature)
        last = rank == self.n - 1
        self._threshold[self._kept.feature[last]] = self._kept.activation[last]


def keep_strongest(examples: Examples, n: int) -> Examples:
    """Return the ``n`` strongest examples per feature; of equal ones, the earlier row."""
    order = np.lexsort((examples.row, -examples.activation, examples.feature))
    return examples.take(order[rank_in_group(examples.feature[order]) < n])


def rank_in_group(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each entry's place, from 0, within its run of equal values."""
    starts = np.flatnonzero(np.concatenate([[True], groups[1:] != groups[:-1]])) if len(groups) else groups
    lengths = np.diff(np.append(starts, len(groups)))
    return np.arange(len(groups)) - np.repeat(starts, lengths)
