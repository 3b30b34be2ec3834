"""Which pairs of a batch a selection takes, and their exact pre-activations, on a GPU and without a wait.

All pre-activations are computed once by a product in bfloat16 that is an upper bound of each (``select_programs``).
Whatever could be selected is above its cut in these *screened* numbers. Only those candidates are computed in float32,
in the order of features, and the selection is made among them. Candidates that are not selected stay, as zeros.

Where other processes have slices of the batch, what is the largest is decided among all: of a batch by adding up the
histograms of the search, digit by digit; of a row among the largest of each process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from tailrace.training.architectures.entries import Above, LargestOfBatch, LargestPerRow, Selection
from tailrace.training.kernels.device import operators
from tailrace.training.kernels.device.pairs import DevicePairs
from tailrace.training.rows.batch_reductions import ALONE, BatchReductions

EXTRA_COLUMNS = 4
"""What screened vectors are wider than the vectors."""
ALIGNMENT = 8
"""Columns: matrix products want rows of a multiple of 16 bytes."""


def screened_width(width: int) -> int:
    """Return the width of screened vectors."""
    return -(-(width + EXTRA_COLUMNS) // ALIGNMENT) * ALIGNMENT


class Screen:
    """The encoder as it is screened, kept from step to step, and the selection."""

    def __init__(self) -> None:
        self.features: Tensor | None = None
        """bfloat16 (d_sae, screened width); the optimiser writes rows that it changes."""
        self._state: tuple[int, int] | None = None
        self._arange: Tensor | None = None

    def is_fresh(self, W_enc: Tensor) -> None:
        """Take note that ``features`` are those of ``W_enc`` as it is now."""
        self._state = (id(W_enc), W_enc._version)

    def refresh(self, W_enc: Tensor) -> Tensor:
        """Return ``features``, rounded anew if something else than the optimiser has changed the weights."""
        if self.features is None or self._state != (id(W_enc), W_enc._version):
            if self.features is None:
                self.features = W_enc.new_empty(len(W_enc), screened_width(W_enc.shape[1]), dtype=torch.bfloat16)
                self._arange = torch.arange(len(W_enc) + 1, dtype=torch.int32, device=W_enc.device)
            norms = W_enc.new_empty(len(W_enc))
            operators.screen_vectors(W_enc.detach(), self.features, norms, False)
            self.is_fresh(W_enc)
        return self.features

    @torch.no_grad()
    def select(
        self,
        inputs: Tensor,
        W_enc: Tensor,
        bias: Tensor,
        selection: Selection,
        overflow: Tensor,
        n_slots: int,
        reductions: BatchReductions = ALONE,
    ) -> tuple[DevicePairs, Tensor]:
        """Return the pairs of ``inputs`` (layers, rows, width), in ``n_slots``, and their pre-activations (n_slots,).

        ``W_enc`` has the layers' features one after another. ``overflow`` int32 (1,) becomes 1 if the slots are too
        few, in which case the pairs are not those selected. ``reductions`` are those over the whole batch.
        """
        n_layers, n_rows, width = inputs.shape
        vectors = inputs.reshape(n_layers * n_rows, width)
        features = self.refresh(W_enc)
        floor = selection.floor if isinstance(selection, Above) else None
        operators.screen_bias(bias.detach(), floor, features, width)
        by_layer = features.view(n_layers, -1, features.shape[1])
        rows = vectors.new_empty(len(vectors), features.shape[1], dtype=torch.bfloat16)
        norms = vectors.new_empty(len(vectors))
        operators.screen_vectors(vectors, rows, norms, True)
        screened = torch.bmm(rows.view(n_layers, n_rows, -1), by_layer.mT) if n_layers > 1 else rows @ features.T
        screened = screened.view(len(vectors), -1)
        cuts, counts = vectors.new_empty(len(vectors)), _int32(len(vectors), vectors)
        n_wanted = 0 if isinstance(selection, Above) else selection.k * reductions.n_rows(n_rows)
        find = _Search(n_wanted, reductions)
        histograms = self._cut(screened, rows, by_layer, cuts, counts, selection, width, n_rows, find)
        ends = counts.cumsum(0, dtype=torch.int32)
        listed, of_rows = _int32(n_slots, vectors), _int32(n_slots, vectors)
        operators.write_pairs(screened, cuts, ends, counts, listed, of_rows, overflow, n_rows, len(W_enc))
        del screened
        ordered, order = torch.sort(listed, stable=True)
        assert self._arange is not None, "refreshed"
        bounds = torch.searchsorted(ordered, self._arange, out_int32=True)
        pre = vectors.new_empty(n_slots)
        operators.pair_dots(vectors, W_enc.detach(), bias.detach(), None, listed, of_rows, order, pre, 0, 0)
        match selection:
            case Above():
                pass
            case LargestPerRow(k):
                operators.keep_of_rows(pre, ends, counts, k)
                if reductions.shares_features:
                    _keep_among_all(pre, of_rows, ends, counts, k, reductions)
            case LargestOfBatch():
                _keep_of_batch(pre, ends, counts, histograms, find)
            case _:
                assert_never(selection)
        chosen_only = not isinstance(selection, Above)
        return DevicePairs(listed, of_rows, ends, counts, order, bounds, norms, self._arange, chosen_only), pre

    @staticmethod
    def _cut(
        screened: Tensor,
        rows: Tensor,
        features: Tensor,
        cuts: Tensor,
        counts: Tensor,
        selection: Selection,
        width: int,
        n_rows: int,
        find: _Search,
    ) -> Tensor:
        """Write each row's cut and count; return zeroed histograms for what is selected from the batch."""
        if isinstance(selection, Above):
            operators.count_of_rows(screened, rows, rows, cuts, counts, 0, width, n_rows)
            return cuts
        peaks = features[:, :, width + 2 : width + 4].amax(1)
        n_layers, n_features = features.shape[:2]
        per_row = selection.k if isinstance(selection, LargestPerRow) else -(-selection.k // n_layers)
        n_groups = operators.n_groups(per_row, n_features)
        if isinstance(selection, LargestPerRow) or n_groups == 0:
            k = selection.k if isinstance(selection, LargestPerRow) else 0
            operators.count_of_rows(screened, rows, peaks, cuts, counts, k, width, n_rows)
            of_batch = isinstance(selection, LargestOfBatch)
            return torch.zeros(4, 256, dtype=torch.int32, device=cuts.device) if of_batch else counts
        histograms = torch.zeros(6, 256, dtype=torch.int32, device=cuts.device)
        keys = torch.empty(len(cuts), n_groups, dtype=torch.int16, device=cuts.device)
        operators.maxima_of_rows(screened, rows, peaks, keys, width, n_rows)
        find(keys, histograms[4:])
        operators.count_of_batch(screened, histograms[4:], cuts, counts, find.n_wanted)
        return histograms


def _int32(n: int, like: Tensor) -> Tensor:
    return torch.empty(n, dtype=torch.int32, device=like.device)


@dataclass(frozen=True)
class _Search:
    """The n-th largest number of a batch, digit by digit."""

    n_wanted: int
    """Over all slices of the batch."""
    reductions: BatchReductions

    def __call__(self, values: Tensor, histograms: Tensor) -> None:
        """Count the digits of ``values`` that can be those of the n-th largest of all slices, into (levels, 256)."""
        for level, histogram in enumerate(histograms):
            operators.count_digits(values, histograms, self.n_wanted, level)
            if self.reductions is not ALONE:
                histogram.copy_(self.reductions.of_all(histogram))


def _keep_of_batch(pre: Tensor, ends: Tensor, counts: Tensor, histograms: Tensor, find: _Search) -> None:
    find(pre, histograms[:4])
    equal = torch.empty_like(counts)
    operators.count_equal(pre, ends, counts, histograms, equal, find.n_wanted)
    equal_ends = equal.cumsum(0, dtype=torch.int32)
    if find.reductions is not ALONE:
        equal_ends += find.reductions.of_earlier(equal_ends[-1])
    operators.keep_of_batch(pre, ends, counts, histograms, equal, equal_ends, find.n_wanted)


def _keep_among_all(
    pre: Tensor, rows: Tensor, ends: Tensor, counts: Tensor, k: int, reductions: BatchReductions
) -> None:
    """Set to zero what is among the k largest of its row here, and not among those of all processes."""
    is_kept = pre > 0
    ahead = torch.nn.functional.pad(is_kept.cumsum(0), (1, 0))  # before each slot
    begins = (ends - counts).clamp(max=len(pre))  # rows without room begin behind the last
    place = rows * k + ahead[:-1] - ahead[begins][rows]
    nowhere = len(ends) * k
    place = torch.where(is_kept, place, nowhere)
    largest = pre.new_zeros(nowhere + 1).scatter_(0, place, pre)[:-1].view(-1, k)
    kept = reductions.among_largest(largest, k)
    assert kept is not None, "not all features are at hand"
    pre.mul_(torch.nn.functional.pad(kept.flatten(), (0, 1))[place])
