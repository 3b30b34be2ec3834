"""Which pairs of a batch a selection takes, and their exact pre-activations, without a (rows, d_sae) tensor of either.

All pre-activations are computed once, chunk by chunk of rows, in bfloat16 where the processor has instructions for
it, and raised by a margin that covers what rounding can have taken away. Whatever could be selected is above its cut in
these *screened* numbers; only those few candidates are computed exactly, and the selection is made among them.

The margin. With x and w rounded to u and v, their product changes by at most ‖x − u‖ ‖v‖ + ‖x‖ ‖w − v‖
(Cauchy-Schwarz), whose norms are computed: about half of the 2⁻⁸ ‖x‖ ‖w‖ that rounding could do at worst. Sums are
float32. The result is rounded by at most 2⁻⁹ of itself, which leaves its sign alone and is allowed for where a cut is
not zero. So nothing is missed, whatever the scale of the activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from training.entries import Above, LargestOfBatch, LargestPerRow, Selection
from training.kernels import loops
from training.kernels.pairs import Pairs
from training.kernels.threads import over_ranges
from training.whole_batch import ALONE, WholeBatch

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


class Selector:
    """Finds the pairs of a selection. Remembers nothing that changes a result."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._screened = torch.empty(0, dtype=dtype)
        self._columns = np.empty(1 << 16, np.int64)
        self._weights: Tensor | None = None
        self._guess = -1.0

    @torch.no_grad()
    def select(
        self, inputs: Tensor, W_enc: Tensor, bias: Tensor, selection: Selection, whole: WholeBatch = ALONE
    ) -> tuple[Pairs, Tensor]:
        """Return the selected pairs of ``inputs`` (rows, d_in) and their exact pre-activations (n_pairs,)."""
        margin = self._margin(inputs, self._take_weights(W_enc), W_enc)
        match selection:
            case Above(floor):
                raised = bias if floor is None else bias - floor
                pairs = self._above(inputs, W_enc, raised + margin, 0.0)
                pre = pairs.dots(inputs, W_enc) + bias[torch.from_numpy(pairs.features)]
                edge = 0.0 if floor is None else floor[torch.from_numpy(pairs.features)]
                return _kept(pairs, pre, (pre > edge).numpy())
            case LargestPerRow(k):
                slack = 2 * float(margin.max())
                pairs = self._candidates(inputs, W_enc, bias + margin, lambda chunk: self._row_cuts(chunk, k, slack))
                pre = pairs.dots(inputs, W_enc) + bias[torch.from_numpy(pairs.features)]
                return _kept(pairs, pre, _largest(pre, pairs.offsets, k))
            case LargestOfBatch(k):
                return self._largest_of_batch(inputs, W_enc, bias, margin, k, whole)
            case _:
                assert_never(selection)

    def _largest_of_batch(
        self, inputs: Tensor, W_enc: Tensor, bias: Tensor, margin: Tensor, k: int, whole: WholeBatch
    ) -> tuple[Pairs, Tensor]:
        """Return the k · rows largest, chosen among candidates above a guess if that many lie above it for sure."""
        n_wanted = k * whole.n_rows(len(inputs))
        guess = self._guess if self._guess >= 0 else self._first_guess(inputs, bias, margin, k)
        while True:
            pairs = self._above(inputs, W_enc, bias + margin, guess)
            pre = pairs.dots(inputs, W_enc) + bias[torch.from_numpy(pairs.features)]
            cut = whole.cut(pre, guess * (1 + 2 * _ROUNDING[self._dtype]), n_wanted)
            if cut.is_complete:
                break
            guess = guess / 2 if guess > 1e-3 * float(margin.max()) else 0.0
        self._guess = _GUESS * cut.threshold
        return _kept(pairs, pre, _largest(pre, np.array([0, len(pre)], np.int64), cut.n_own))

    def _first_guess(self, inputs: Tensor, bias: Tensor, margin: Tensor, k: int) -> float:
        """Return a value that most rows' k-th largest pre-activations exceed."""
        chunk = self._screen(inputs[: self._chunk_rows(len(bias))], bias + margin)
        return max(0.0, float(np.median(self._row_cuts(chunk, k, 2 * float(margin.max())))) / 2)

    def _row_cuts(self, chunk: Tensor, k: int, slack: float) -> np.ndarray:
        """Return, for each screened row, a value that none of its k largest exact pre-activations lies below."""
        n_rows, n_columns = chunk.shape
        if k * _GROUPS > n_columns:
            return np.zeros(n_rows)
        n_slabs = n_columns // (_GROUPS * k)
        ordered = _ordered(chunk)
        kth = np.empty(n_rows, ordered.dtype)
        over_ranges(n_rows, lambda start, stop: loops.kth_of_group_maxima(ordered, k, n_slabs, start, stop, kth))
        values = (
            torch.from_numpy(kth.view(np.int16)).view(torch.bfloat16)
            if kth.dtype == np.int16
            else torch.from_numpy(kth)
        )
        lowered: np.ndarray = values.double().numpy() * (1 - 2 * _ROUNDING[self._dtype]) - slack
        return np.asarray(np.maximum(lowered, 0.0))

    def _above(self, inputs: Tensor, W_enc: Tensor, bias: Tensor, cut: float) -> Pairs:
        return self._candidates(inputs, W_enc, bias, lambda chunk: np.full(len(chunk), cut))

    def _candidates(
        self, inputs: Tensor, W_enc: Tensor, bias: Tensor, cuts_of: Callable[[Tensor], np.ndarray]
    ) -> Pairs:
        """Return the pairs above their row's cut in screened numbers; ``cuts_of`` finds a chunk's cuts."""
        d_sae = len(W_enc)
        columns, counts = [], []
        n_chunk = self._chunk_rows(d_sae)
        for start in range(0, len(inputs), n_chunk):
            chunk = self._screen(inputs[start : start + n_chunk], bias)
            found, n_found = self._collect(chunk, cuts_of(chunk))
            columns.append(found)
            counts.append(n_found)
        per_row = np.concatenate(counts)
        offsets = np.concatenate([[0], np.cumsum(per_row)])
        rows = np.repeat(np.arange(len(inputs)), per_row)
        return Pairs(rows, np.concatenate(columns), offsets, d_sae)

    def _chunk_rows(self, d_sae: int) -> int:
        n_rows = CHUNK_BYTES // (d_sae * self._screened.element_size())
        return max(_ROW_STEP, n_rows // _ROW_STEP * _ROW_STEP)

    def _take_weights(self, W_enc: Tensor) -> Tensor:
        if self._weights is None or self._weights.shape != W_enc.shape:
            self._weights = torch.empty_like(W_enc, dtype=self._dtype)
        return self._weights.copy_(W_enc)

    def _margin(self, inputs: Tensor, rounded: Tensor, W_enc: Tensor) -> Tensor:
        """Return, for each feature, more than screening can be off for any of the rows; see the module docstring."""
        norms, lost = _norms(W_enc, rounded)
        of_inputs, lost_of_inputs = (found.max() for found in _norms(inputs, inputs.to(self._dtype)))
        return (norms + lost) * (lost_of_inputs + of_inputs * _SUMMING[self._dtype]) + of_inputs * lost

    def _screen(self, inputs: Tensor, bias: Tensor) -> Tensor:
        """Return screened pre-activations (rows, d_sae), in memory that the next call uses again."""
        assert self._weights is not None
        n_rows, d_sae = len(inputs), len(bias)
        if self._screened.numel() < n_rows * d_sae:
            self._screened = torch.empty(max(n_rows, self._chunk_rows(d_sae)) * d_sae, dtype=self._dtype)
        out = self._screened[: n_rows * d_sae].view(n_rows, d_sae)
        raised = (bias + bias.abs() * _ROUNDING[self._dtype]).to(self._dtype)
        return torch.addmm(raised, inputs.to(self._dtype), self._weights.T, out=out)

    def _collect(self, chunk: Tensor, cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ordered, counts = _ordered(chunk), np.empty(len(chunk), np.int64)
        limits = _ordered(_rounded_down(cuts, self._dtype))
        while True:
            n_found = loops.collect_above(ordered, limits, 0, len(chunk), self._columns, counts)
            if n_found >= 0:
                return self._columns[:n_found].copy(), counts
            self._columns = np.empty(2 * len(self._columns), np.int64)


def _norms(rows: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norm of each row, and of what it lost by rounding."""
    norms = torch.linalg.vector_norm(rows, dim=1)
    if rows.dtype == rounded.dtype:
        return norms, torch.zeros_like(norms)
    return norms, torch.linalg.vector_norm(rows - rounded, dim=1)


def _ordered(values: Tensor) -> np.ndarray:
    """View numbers so that NumPy compares them; bfloat16 by its bits, among which positive numbers keep their order."""
    return values.view(torch.int16).numpy() if values.dtype == torch.bfloat16 else values.numpy()


def _rounded_down(cuts: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Return non-negative cuts in ``dtype``, none of them raised."""
    exact = torch.from_numpy(cuts)
    rounded = exact.to(dtype)
    return torch.where(rounded.double() > exact, rounded * (1 - 2 * _ROUNDING[dtype]), rounded)


def _largest(pre: Tensor, offsets: np.ndarray, k: int) -> np.ndarray:
    """Return which of the values are among the k largest positive ones of their stretch."""
    kept, values = np.zeros(len(pre), np.bool_), pre.numpy()
    if k == 0:  # other processes hold the whole batch's largest
        return kept
    over_ranges(len(offsets) - 1, lambda start, stop: loops.keep_largest(values, offsets, k, start, stop, kept))
    return kept


def _kept(pairs: Pairs, pre: Tensor, kept: np.ndarray) -> tuple[Pairs, Tensor]:
    return pairs.keep(kept), pre[torch.from_numpy(kept)]
