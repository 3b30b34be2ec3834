"""Which pairs of a batch a selection takes, and their exact pre-activations, without a (rows, d_sae) tensor of either.

All pre-activations are computed once, chunk by chunk of rows, in bfloat16 where the processor has instructions for
it, and raised by a margin that covers what rounding can have taken away. Whatever could be selected is above its cut in
these *screened* numbers; only those few candidates are computed exactly, and the selection is made among them.

The margin. With x and w rounded to u and v, their product changes by at most ‖x − u‖ ‖v‖ + ‖x‖ ‖w − v‖
(Cauchy-Schwarz), whose norms are computed: about half of the 2⁻⁸ ‖x‖ ‖w‖ that rounding could do at worst. Sums are
float32. The result is rounded by at most 2⁻⁸ of itself, which leaves its sign alone and is allowed for where a cut is
not zero. So nothing is missed, whatever the scale of the activations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, assert_never

import numpy as np
import torch
from torch import Tensor

from tailrace.training.architectures.entries import Above, LargestOfBatch, LargestPerRow, Selection
from tailrace.training.kernels import loops
from tailrace.training.kernels.loops import over_ranges
from tailrace.training.kernels.pairs import Pairs
from tailrace.training.rows.batch_reductions import ALONE, BatchReductions

CHUNK_BYTES = 12 << 20
"""Size of the buffer of screened numbers, which should stay in the processor's cache: 256 rows of 24,576 bfloat16."""
_ROW_STEP = 32
"""Chunks are a multiple of this many rows: the matrix product is up to a fifth slower for a count such as 682."""
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-20, torch.float64: 2.0**-48}
"""Largest change of a number by rounding, with something to spare; in float32 and float64 by the order of sums."""
_SUMMING = {torch.bfloat16: 2.0**-20, torch.float32: 2.0**-20, torch.float64: 2.0**-48}
"""Largest change of a product by the order of its sum, in ‖x‖ ‖w‖."""
_GUESS = 0.9
"""Share of the last batch's threshold from which the next batch's candidates are collected."""
_GROUPS = 6
"""This times k groups are formed to find a row's cut: fewer would put more of the largest into one group."""


class Rounded(NamedTuple):
    """Vectors in the type that screening computes in, and what rounding took from them."""

    values: Tensor
    """(n, width)."""
    norms: Tensor
    """(n,) of the vectors before rounding."""
    lost: Tensor
    """(n,) of the vectors less their rounded values."""


class Candidates(NamedTuple):
    """Pairs among which the largest of a batch are looked for."""

    pairs: Pairs
    pre: Tensor
    """(n_pairs,) their exact pre-activations."""
    certain: float
    """Every pair whose pre-activation is at least this is among them."""
    smallest_guess: float
    """Below this a guess might as well be zero."""


class Selector:
    """Finds the pairs of a selection. Remembers nothing that changes a result."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._screened = torch.empty(0, dtype=dtype)
        self._columns = np.empty(1 << 16, np.int64)
        self._weights = torch.empty(0, 0, dtype=dtype)
        self._guess = -1.0

    @torch.no_grad()
    def select(
        self, inputs: Tensor, W_enc: Tensor, bias: Tensor, selection: Selection, reductions: BatchReductions = ALONE
    ) -> tuple[Pairs, Tensor]:
        """Return the selected pairs of ``inputs`` (rows, d_in) and their exact pre-activations (n_pairs,)."""
        rows, weights = self._rounded(inputs, W_enc)
        match selection:
            case Above(floor):
                raised = bias if floor is None else bias - floor
                pairs = self._above(rows, raised + self._margin(rows, weights), 0.0)
                pre = pairs.dots(inputs, W_enc) + bias[torch.from_numpy(pairs.features)]
                edge = 0.0 if floor is None else floor[torch.from_numpy(pairs.features)]
                return _kept(pairs, pre, (pre > edge).numpy())
            case LargestPerRow(k):
                of_row = self._row_margin(rows, weights)
                pairs = self._candidates(rows, bias + of_row.max(), partial(self._row_cuts, k, of_row.numpy()))
                pre = pairs.dots(inputs, W_enc) + bias[torch.from_numpy(pairs.features)]
                own = _kept(pairs, pre, keep_largest(pre, pairs.offsets, k))
                return _largest_of_rows(*own, k, reductions) if reductions.shares_features else own
            case LargestOfBatch(k):
                return self._largest_of_batch(inputs, W_enc, bias, (rows, weights), k, reductions)
            case _:
                assert_never(selection)

    @torch.no_grad()
    def candidates(self, inputs: Tensor, W_enc: Tensor, bias: Tensor, guess: float) -> Candidates:
        """Return the pairs of ``inputs`` (rows, d_in) whose pre-activation may exceed ``guess``."""
        return self._candidates_above(inputs, W_enc, bias, self._rounded(inputs, W_enc), guess)

    @torch.no_grad()
    def first_guess(self, inputs: Tensor, W_enc: Tensor, bias: Tensor, k: int) -> float:
        """Return a value that most rows' k-th largest pre-activations exceed."""
        return self._first_guess(self._rounded(inputs, W_enc), bias, k)

    @staticmethod
    def guess_after(threshold: float) -> float:
        """Return what to try for the batch after one whose smallest selected pre-activation was ``threshold``."""
        return _GUESS * threshold

    def _rounded(self, inputs: Tensor, W_enc: Tensor) -> tuple[Rounded, Rounded]:
        """Return rows and weights as they are screened; the weights in memory that the next call uses again."""
        if self._weights.shape != W_enc.shape:
            self._weights = torch.empty_like(W_enc, dtype=self._dtype)
        weights = round_rows(W_enc, self._weights)
        return round_rows(inputs, torch.empty_like(inputs, dtype=self._dtype)), weights

    def _candidates_above(
        self, inputs: Tensor, W_enc: Tensor, bias: Tensor, rounded: tuple[Rounded, Rounded], guess: float
    ) -> Candidates:
        margin = self._margin(*rounded)
        pairs = self._above(rounded[0], bias + margin, guess)
        pre = pairs.dots(inputs, W_enc) + bias[torch.from_numpy(pairs.features)]
        return Candidates(pairs, pre, guess * (1 + 2 * _ROUNDING[self._dtype]), 1e-3 * float(margin.max()))

    def _largest_of_batch(
        self,
        inputs: Tensor,
        W_enc: Tensor,
        bias: Tensor,
        rounded: tuple[Rounded, Rounded],
        k: int,
        reductions: BatchReductions,
    ) -> tuple[Pairs, Tensor]:
        """Return the k · rows largest, chosen among candidates above a guess if that many lie above it for sure."""
        n_wanted = k * reductions.n_rows(len(inputs))
        guess = self._guess if self._guess >= 0 else self._first_guess(rounded, bias, k)
        while True:
            candidates = self._candidates_above(inputs, W_enc, bias, rounded, guess)
            cut = reductions.cut(candidates.pre, candidates.certain, n_wanted)
            if cut.is_complete:
                break
            guess = guess / 2 if guess > candidates.smallest_guess else 0.0
        self._guess = self.guess_after(cut.threshold)
        kept = keep_largest(candidates.pre, np.array([0, len(candidates.pre)], np.int64), cut.n_own)
        return _kept(candidates.pairs, candidates.pre, kept)

    def _first_guess(self, rounded: tuple[Rounded, Rounded], bias: Tensor, k: int) -> float:
        """Return a value that most rows' k-th largest pre-activations exceed."""
        of_row = self._row_margin(*rounded)
        chunk = self._screen(rounded[0].values[: self._chunk_rows(len(bias))], bias + of_row.max())
        cuts = self._row_cuts(k, of_row.numpy(), chunk, 0) - float(of_row.max())
        return max(0.0, float(np.median(cuts)) / 2)

    def _row_cuts(self, k: int, margin: np.ndarray, chunk: Tensor, start: int) -> np.ndarray:
        """Return, for each screened row from ``start`` on, what the screened numbers of its k largest cannot lie below.

        Every number was raised by the largest row's margin, so that the cut of no row is negative.
        """
        n_rows, n_columns = chunk.shape
        own, raised = margin[start : start + n_rows].astype(np.float64), float(margin.max())
        share = 1 - 2 * _ROUNDING[self._dtype]
        positive = (raised - own) * share
        if k * _GROUPS > n_columns:
            return positive
        n_slabs = n_columns // (_GROUPS * k)
        ordered = _ordered(chunk)
        kth = np.empty(n_rows, ordered.dtype)
        over_ranges(n_rows, lambda start, stop: loops.kth_of_group_maxima(ordered, k, n_slabs, start, stop, kth))
        values = (
            torch.from_numpy(kth.view(np.int16)).view(torch.bfloat16)
            if kth.dtype == np.int16
            else torch.from_numpy(kth)
        )
        lowered: np.ndarray = values.double().numpy() * share - 2 * own
        return np.asarray(np.maximum(lowered, positive))

    def _above(self, rows: Rounded, bias: Tensor, cut: float) -> Pairs:
        return self._candidates(rows, bias, lambda chunk, start: np.full(len(chunk), cut))  # noqa: ARG005

    def _candidates(self, rows: Rounded, bias: Tensor, cuts_of: Callable[[Tensor, int], np.ndarray]) -> Pairs:
        """Return the pairs above their row's cut in screened numbers; ``cuts_of`` finds those of a chunk of rows."""
        columns, counts = [], []
        n_rows, n_chunk = len(rows.values), self._chunk_rows(len(bias))
        for start in range(0, n_rows, n_chunk):
            chunk = self._screen(rows.values[start : start + n_chunk], bias)
            chosen, n_chosen = self._collect(chunk, cuts_of(chunk, start))
            columns.append(chosen)
            counts.append(n_chosen)
        per_row = np.concatenate(counts)
        offsets = np.concatenate([[0], np.cumsum(per_row)])
        return Pairs(np.repeat(np.arange(n_rows), per_row), np.concatenate(columns), offsets, len(bias))

    def _chunk_rows(self, d_sae: int) -> int:
        n_rows = CHUNK_BYTES // (d_sae * self._screened.element_size())
        return max(_ROW_STEP, n_rows // _ROW_STEP * _ROW_STEP)

    def _margin(self, rows: Rounded, weights: Rounded) -> Tensor:
        """Return, for each feature, more than screening can be off for any of the rows; see the module docstring."""
        return self._bound(rows.norms.max(), rows.lost.max(), weights.norms, weights.lost)

    def _row_margin(self, rows: Rounded, weights: Rounded) -> Tensor:
        """Return, for each row, more than screening can be off for any feature."""
        return self._bound(rows.norms, rows.lost, weights.norms.max(), weights.lost.max())

    def _bound(self, norm: Tensor, lost: Tensor, weight_norm: Tensor, weight_lost: Tensor) -> Tensor:
        return (weight_norm + weight_lost) * (lost + norm * _SUMMING[self._dtype]) + norm * weight_lost

    def _screen(self, rows: Tensor, bias: Tensor) -> Tensor:
        """Return screened pre-activations (rows, d_sae), in memory that the next call uses again."""
        n_rows, d_sae = len(rows), len(bias)
        if self._screened.numel() < n_rows * d_sae:
            self._screened = torch.empty(max(n_rows, self._chunk_rows(d_sae)) * d_sae, dtype=self._dtype)
        out = self._screened[: n_rows * d_sae].view(n_rows, d_sae)
        raised = (bias + bias.abs() * _ROUNDING[self._dtype]).to(self._dtype)
        return torch.addmm(raised, rows, self._weights.T, out=out)

    def _collect(self, chunk: Tensor, cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ordered, counts = _ordered(chunk), np.empty(len(chunk), np.int64)
        limits = _ordered(_rounded_down(cuts, self._dtype))
        while True:
            n_found = loops.collect_above(ordered, limits, 0, len(chunk), self._columns, counts)
            if n_found >= 0:
                return self._columns[:n_found].copy(), counts
            self._columns = np.empty(2 * len(self._columns), np.int64)


def round_rows(rows: Tensor, out: Tensor) -> Rounded:
    """Round ``rows`` into ``out``; float32 to bfloat16 in one pass: 6 ms for 24,576 of width 768, 45 as tensors."""
    if rows.dtype == torch.float32 and out.dtype == torch.bfloat16:
        numbers, norms = rows.detach().contiguous().numpy(), np.empty((2, len(rows)), np.float32)
        bits, rounded = numbers.view(np.int32), out.view(torch.int16).numpy()
        over_ranges(len(rows), lambda start, stop: loops.round_rows(numbers, bits, start, stop, rounded, norms))
        return Rounded(out, *torch.from_numpy(norms))
    norms_of_rows = torch.linalg.vector_norm(rows, dim=1)
    out.copy_(rows)
    if rows.dtype == out.dtype:
        return Rounded(out, norms_of_rows, torch.zeros_like(norms_of_rows))
    return Rounded(out, norms_of_rows, torch.linalg.vector_norm(rows - out, dim=1))


def _ordered(values: Tensor) -> np.ndarray:
    """View numbers so that NumPy compares them; bfloat16 by its bits, among which positive numbers keep their order."""
    return values.view(torch.int16).numpy() if values.dtype == torch.bfloat16 else values.numpy()


def _rounded_down(cuts: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Return non-negative cuts in ``dtype``, none of them raised."""
    exact = torch.from_numpy(cuts)
    rounded = exact.to(dtype)
    return torch.where(rounded.double() > exact, rounded * (1 - 2 * _ROUNDING[dtype]), rounded)


def keep_largest(pre: Tensor, offsets: np.ndarray, k: int) -> np.ndarray:
    """Return which of the values are among the k largest positive ones of their stretch."""
    kept, values = np.zeros(len(pre), np.bool_), pre.numpy()
    if k == 0:  # other processes hold the whole batch's largest
        return kept
    over_ranges(len(offsets) - 1, lambda start, stop: loops.keep_largest(values, offsets, k, start, stop, kept))
    return kept


def _largest_of_rows(pairs: Pairs, pre: Tensor, k: int, reductions: BatchReductions) -> tuple[Pairs, Tensor]:
    """Return which of the ``k`` largest pairs of each row at hand are the largest of all features."""
    columns = np.arange(len(pairs)) - pairs.offsets[pairs.rows]
    values = pre.new_full((pairs.n_rows, k), -torch.inf)
    values[torch.from_numpy(pairs.rows), torch.from_numpy(columns)] = pre
    kept = reductions.among_largest(values, k)
    assert kept is not None, "not all features are at hand"
    return _kept(pairs, pre, kept.numpy()[pairs.rows, columns])


def _kept(pairs: Pairs, pre: Tensor, kept: np.ndarray) -> tuple[Pairs, Tensor]:
    return pairs.keep(kept), pre[torch.from_numpy(kept)]
