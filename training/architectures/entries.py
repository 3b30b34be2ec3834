"""The pre-activations of a batch at the (row, feature) pairs that matter, in one of two forms.

Dense: all of them, (rows, d_sae). Sparse: one number for each pair that may be active, (n_pairs,). An architecture is
written once, elementwise and against ``Entries``; which form it gets is the kernel's affair.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tailrace.training.rows.batch_reductions import ALONE, BatchReductions


@dataclass(frozen=True)
class Above:
    """Pairs whose pre-activation exceeds a floor; the architecture gives zero to all others."""

    floor: Tensor | None = None
    """(d_sae,), without gradient; None: zero."""


@dataclass(frozen=True)
class LargestPerRow:
    """The ``k`` largest positive pre-activations of each row."""

    k: int


@dataclass(frozen=True)
class LargestOfBatch:
    """The ``k`` · rows largest positive pre-activations of the whole batch."""

    k: int


Selection = Above | LargestPerRow | LargestOfBatch


class Entries(ABC):
    """Pre-activations at pairs, with what turns values at the same pairs into outputs and counts."""

    pre: Tensor
    """(rows, d_sae) or (n_pairs,); carries the gradient to the encoder."""
    n_rows: int
    reductions: BatchReductions = ALONE
    """Over the whole batch that the rows are part of."""

    @abstractmethod
    def at(self, per_feature: Tensor) -> Tensor:
        """Return a parameter (d_sae,) in a shape that goes with ``pre``."""

    @abstractmethod
    def decode(
        self, values: Float[Tensor, "*pairs"], W_dec: Float[Tensor, "d_sae d_out"]
    ) -> Float[Tensor, "rows d_out"]:
        """Return values @ W_dec; gradients reach both."""

    @abstractmethod
    def decode_groups(
        self, values: Float[Tensor, "*pairs"], W_dec: Float[Tensor, "d_sae d_out"], ends: Sequence[int]
    ) -> Float[Tensor, "groups rows d_out"]:
        """Return what the features of each group write; group g ends before ``ends[g]``."""

    @abstractmethod
    def count(self, active: Bool[Tensor, "*pairs"]) -> Int[Tensor, " d_sae"]:
        """Return on how many rows each feature is ``active``, int64."""

    @abstractmethod
    def row_sums(self, values: Tensor) -> Tensor:
        """Return the sum of each row's ``values`` (as ``pre``), (rows,); int64 for bool."""


class DenseEntries(Entries):
    """Every pair. Entries outside a selection of the largest are zero and pass no gradient."""

    def __init__(self, pre: Tensor, selection: Selection, reductions: BatchReductions = ALONE) -> None:
        self.n_rows = len(pre)
        self.reductions = reductions
        self.pre = restrict(pre, selection, reductions)

    def at(self, per_feature: Tensor) -> Tensor:
        """Return ``per_feature`` itself, which broadcasts over rows."""
        return per_feature

    def decode(
        self, values: Float[Tensor, "*pairs"], W_dec: Float[Tensor, "d_sae d_out"]
    ) -> Float[Tensor, "rows d_out"]:
        """Return the matrix product."""
        return values @ W_dec

    def decode_groups(
        self, values: Float[Tensor, "*pairs"], W_dec: Float[Tensor, "d_sae d_out"], ends: Sequence[int]
    ) -> Float[Tensor, "groups rows d_out"]:
        """Return one matrix product per group."""
        bounds = zip([0, *ends], ends, strict=False)
        return torch.stack([values[:, start:end] @ W_dec[start:end] for start, end in bounds])

    def count(self, active: Bool[Tensor, "*pairs"]) -> Int[Tensor, " d_sae"]:
        """Return column sums."""
        return active.sum(0)

    def row_sums(self, values: Tensor) -> Tensor:
        """Return row sums."""
        return values.sum(1)


def restrict(
    pre: Float[Tensor, "rows d_sae"], selection: Selection, reductions: BatchReductions = ALONE
) -> Float[Tensor, "rows d_sae"]:
    """Return dense pre-activations with those a selection of the largest leaves out set to zero.

    ``reductions`` are those over the batch that the rows are part of.
    """
    match selection:
        case Above():
            return pre
        case LargestPerRow(k):
            largest = pre.detach().topk(min(k, pre.shape[1]), dim=1, sorted=False)
            kept = reductions.among_largest(largest.values, k)
            mask = torch.zeros_like(pre, dtype=torch.bool)
            return pre * (
                mask.scatter_(1, largest.indices, True) if kept is None else mask.scatter_(1, largest.indices, kept)
            )
        case LargestOfBatch(k):
            flat = pre.detach().flatten()
            mask, n_chosen = torch.zeros_like(flat, dtype=torch.bool), k * reductions.n_rows(len(pre))
            if reductions.shares_features and pre.is_cuda:  # as for a row, which lets no device wait
                largest = flat.topk(min(n_chosen, len(flat)), sorted=False)
                kept = reductions.among_largest(largest.values[None], n_chosen)
                assert kept is not None, "not all features are at hand"
                return pre * mask.scatter_(0, largest.indices, kept[0]).view_as(pre)
            chosen = flat.topk(reductions.share_of_largest(flat, n_chosen), sorted=False).indices
            return pre * mask.scatter_(0, chosen, True).view_as(pre)
        case _:
            assert_never(selection)
