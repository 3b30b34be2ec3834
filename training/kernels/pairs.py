"""The (row, feature) pairs of a batch, and products of matrices at these pairs alone, forwards and backwards.

No (rows, d_sae) tensor exists here. Gradients of the two weight matrices are added to ``.grad`` instead of being handed
to autograd: a new tensor of their size in every step would cost more in page faults than the products themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tailrace.training.architectures.entries import Entries
from tailrace.training.kernels import loops
from tailrace.training.kernels.loops import over_ranges
from tailrace.training.rows.batch_reductions import ALONE, BatchReductions


class Pairs:
    """Pairs sorted by row, and by feature within a row. On the CPU."""

    def __init__(self, rows: np.ndarray, features: np.ndarray, offsets: np.ndarray, d_sae: int) -> None:
        self.rows = rows
        """int64 (n_pairs,): the row of each pair."""
        self.features = features
        """int64 (n_pairs,)."""
        self.offsets = offsets
        """int64 (n_rows + 1,): where each row's pairs begin."""
        self.d_sae = d_sae

    def __len__(self) -> int:
        return len(self.features)

    @property
    def n_rows(self) -> int:
        """Number of rows, those without a pair included."""
        return len(self.offsets) - 1

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        order, offsets = np.empty(len(self), np.int64), np.empty(self.d_sae + 1, np.int64)
        loops.sort_by_feature(self.features, offsets, order)
        return order, offsets

    @property
    def order(self) -> np.ndarray:
        """int64 (n_pairs,): pairs in the order of features."""
        return self._sorted[0]

    @property
    def feature_offsets(self) -> np.ndarray:
        """int64 (d_sae + 1,): where each feature's pairs begin in ``order``."""
        return self._sorted[1]

    def keep(self, kept: np.ndarray) -> Pairs:
        """Return the pairs marked in ``kept``, bool (n_pairs,)."""
        n_before = np.concatenate([[0], np.cumsum(kept)])
        return Pairs(self.rows[kept], self.features[kept], n_before[self.offsets], self.d_sae)

    def split(self, ends: Sequence[int]) -> Pairs:
        """Return the same pairs with row r made into rows r·G … r·G + G − 1, one for each group of features."""
        group = np.searchsorted(np.asarray(ends), self.features, side="right")
        finer = self.rows * len(ends) + group
        offsets = np.searchsorted(finer, np.arange(self.n_rows * len(ends) + 1))
        split = Pairs(finer, self.features, offsets, self.d_sae)
        split.__dict__["_sorted"] = self._sorted
        return split

    def dots(self, by_row: Tensor, by_feature: Tensor) -> Tensor:
        """Return by_row[r] · by_feature[f] at every pair, (n_pairs,)."""
        out = np.empty(len(self), by_row.detach().numpy().dtype)
        left, right = by_row.detach().numpy(), by_feature.detach().numpy()
        over_ranges(
            self.d_sae,
            lambda start, stop: loops.dot_pairs(
                left, right, self.rows, self.order, self.feature_offsets, start, stop, out
            ),
        )
        return torch.from_numpy(out)

    def add_outer(self, weights: Tensor, by_row: Tensor, gradient: Tensor) -> None:
        """Add to gradient (d_sae, width) the sum over pairs (r, f) of weight · by_row[r] in row f."""
        numbers, left, out = weights.detach().numpy(), by_row.detach().numpy(), gradient.numpy()
        over_ranges(
            self.d_sae,
            lambda start, stop: loops.add_outer(
                numbers, left, self.rows, self.order, self.feature_offsets, start, stop, out
            ),
        )

    def dots_and_outer(self, weights: Tensor, by_row: Tensor, by_feature: Tensor, gradient: Tensor) -> Tensor:
        """Return ``dots(by_row, by_feature)`` and do ``add_outer(weights, by_row, gradient)``, in one pass."""
        left, right, numbers = (tensor.detach().numpy() for tensor in (by_row, by_feature, weights))
        out = np.empty(len(self), left.dtype)
        pairs = (self.rows, self.order, self.feature_offsets)
        work = partial(loops.dots_and_outer, left, right, numbers, *pairs, out, gradient.numpy())
        over_ranges(self.d_sae, work)
        return torch.from_numpy(out)

    def sums(self, weights: Tensor) -> Tensor:
        """Return the sum of each feature's weights, (d_sae,)."""
        out = np.empty(self.d_sae, weights.detach().numpy().dtype)
        loops.sum_by_feature(weights.detach().numpy(), self.order, self.feature_offsets, out)
        return torch.from_numpy(out)


class SparseEntries(Entries):
    """Pre-activations at pairs; ``pre`` is their value, already computed."""

    def __init__(
        self, pairs: Pairs, pre: Tensor, transcoder: Any, inputs: Tensor, reductions: BatchReductions = ALONE
    ) -> None:
        self.pairs = pairs
        self.reductions = reductions
        self.n_rows = pairs.n_rows
        self.pre = _Encode.apply(pre, transcoder.W_enc, transcoder.b_enc, transcoder.input_bias, inputs, pairs)  # type: ignore[no-untyped-call]
        self._features = torch.from_numpy(pairs.features)

    def at(self, per_feature: Tensor) -> Tensor:
        """Return each pair's feature's parameter."""
        gathered: Tensor = _Gather.apply(per_feature, self._features, self.pairs)  # type: ignore[no-untyped-call]
        return gathered

    def decode(self, values: Tensor, W_dec: Tensor) -> Tensor:
        """Return the sum of decoder rows of each row's pairs."""
        return decode_pairs(values, W_dec, self.pairs)

    def decode_groups(self, values: Tensor, W_dec: Tensor, ends: Sequence[int]) -> Tensor:
        """Return one sum per group of features."""
        return decode_pairs(values, W_dec, self.pairs.split(ends)).view(self.n_rows, len(ends), -1).transpose(0, 1)

    def count(self, active: Tensor) -> Tensor:
        """Return how many active pairs each feature has."""
        return torch.bincount(self._features[active], minlength=self.pairs.d_sae)

    def row_sums(self, values: Tensor) -> Tensor:
        """Return the sum over each row's pairs."""
        return sum_by_row(values, torch.from_numpy(self.pairs.rows), self.n_rows)


class _Encode(torch.autograd.Function):
    """Pre-activations ``W_enc (x − b_dec) + b_enc`` at pairs, whose values are given."""

    @staticmethod
    def forward(
        ctx: Any,
        pre: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,  # noqa: ARG004 - so that autograd passes its gradient on
        b_dec: Tensor | None,
        inputs: Tensor,
        pairs: Pairs,
    ) -> Tensor:
        ctx.save_for_backward(W_enc, b_dec, inputs)
        ctx.pairs = pairs
        return pre.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor, Tensor | None, None, None]:
        W_enc, b_dec, inputs = ctx.saved_tensors
        (gradient,) = gradients
        pairs: Pairs = ctx.pairs
        pairs.add_outer(gradient.contiguous(), inputs, W_enc.grad)
        of_bias = pairs.sums(gradient.contiguous())
        if b_dec is None:
            return None, None, of_bias, None, None, None
        W_enc.grad.addr_(of_bias, b_dec, alpha=-1)
        return None, None, of_bias, -(of_bias @ W_enc), None, None


class _Decode(torch.autograd.Function):
    """``values @ W_dec`` for values at pairs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.pairs = pairs
        return F.embedding_bag(
            torch.from_numpy(pairs.features),
            W_dec,
            torch.from_numpy(pairs.offsets),
            mode="sum",
            per_sample_weights=values,
            include_last_offset=True,
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        values, W_dec = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        gradient = gradients[0].contiguous()
        if W_dec.requires_grad:
            return pairs.dots_and_outer(values, gradient, W_dec, W_dec.grad), None, None
        return pairs.dots(gradient, W_dec), None, None


def decode_pairs(values: Tensor, W_dec: Tensor, pairs: Pairs) -> Tensor:
    """Return values @ W_dec (rows, d_out) for values at pairs; the gradient of ``W_dec`` is added to its ``.grad``."""
    decoded: Tensor = _Decode.apply(values, W_dec, pairs)  # type: ignore[no-untyped-call]
    return decoded


def sum_by_row(values: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """Return (n_rows,): the sum of the ``values`` at pairs, (n_pairs,), whose row it is; int64 for bool."""
    sums = torch.zeros(n_rows, dtype=torch.int64 if values.dtype == torch.bool else values.dtype)
    return sums.index_add_(0, rows, values.to(sums.dtype))


class _Gather(torch.autograd.Function):
    """A parameter of every feature at the feature of every pair."""

    @staticmethod
    def forward(ctx: Any, per_feature: Tensor, features: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return per_feature[features]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.pairs.sums(gradients[0].contiguous()), None, None
