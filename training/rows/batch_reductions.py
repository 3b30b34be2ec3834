"""Reductions over a batch, of which this process may hold a slice only: of its rows, or of the features.

Almost everything in a step is a mean over rows, and slices of a mean combine by themselves. The few things that do not
(the largest activations *of the batch*, a penalty on the *mean* L0, the smallest activation) ask this object, and so
does what is summed over features: what they write, a penalty. ``BatchReductions`` is the case of one process, in which
nothing needs to be asked; ``tailrace.training.loop.distributed`` has that of slices of rows, ``shards`` beside it that
of slices of features.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Cut(NamedTuple):
    """Where the n largest positive values of a batch end."""

    threshold: float
    """The n-th largest positive value among all candidates; 0 if there are fewer than n."""
    n_own: int
    """At most how many of the n largest are among the values at hand: they are the largest of these."""
    is_complete: bool
    """Whether the candidates are sure to hold all of the n largest."""


class BatchReductions:
    """Reductions over a batch that lies in one process, which has all features."""

    shares_features: ClassVar[bool] = False
    """Whether the features at hand are a slice of all."""

    def n_rows(self, own: int) -> int:
        """Return the batch's number of rows; ``own`` of them are at hand."""
        return own

    def n_features(self, own: int) -> int:
        """Return the number of features; ``own`` of them are at hand."""
        return own

    def total(self, counts: Tensor) -> Tensor:
        """Return the sum of integer ``counts`` of any shape over all slices of the rows."""
        return counts

    def of_all(self, counts: Tensor) -> Tensor:
        """Return the sum of integer ``counts`` of any shape over all slices, of rows or of features."""
        return self.total(self.over_features(counts))

    def of_earlier(self, counts: Tensor) -> Tensor:
        """Return the sum of integer ``counts`` of any shape over the slices before this one."""
        return torch.zeros_like(counts)

    def mean(self, own: Tensor) -> Tensor:
        """Return the batch's mean of something whose mean over the rows at hand is ``own``, a scalar.

        Its gradient is that of ``own``: weighted by rows and summed over slices, it is the gradient of the mean.
        """
        return own

    def least(self, own: Tensor) -> Tensor:
        """Return the smallest ``own``, a scalar, of all slices."""
        return own

    def share_of_largest(self, values: Tensor, n: int) -> int:
        """Return how many of the ``n`` largest positive values of the batch may be among ``values`` (any number,)."""
        return min(n, len(values))

    def cut(self, candidates: Tensor, certain: float, n: int) -> Cut:
        """Return where the ``n`` largest end if ``candidates`` hold every value at hand of at least ``certain``.

        If the answer is not complete, ask again with more candidates. With ``certain`` 0 it always is.
        """
        values = candidates.numpy()
        threshold = max(0.0, float(np.partition(values, -n)[-n])) if len(values) >= n else 0.0
        return Cut(threshold, n, threshold >= certain)

    def among_largest(self, values: Tensor, k: int) -> Tensor | None:  # noqa: ARG002
        """Return which of ``values`` (rows, at most k) are among the ``k`` largest of their row, bool; None for all.

        ``values`` are the largest of each row at the features at hand.
        """
        return None

    def over_features(self, own: Tensor) -> Tensor:
        """Return the sum over all features of what ``own`` sums over those at hand; its gradient is that of ``own``."""
        return own

    def once(self, constant: Tensor) -> Tensor:
        """Return what ``over_features`` makes ``constant``, whose gradient is as if no process shared the features."""
        return constant

    def all_features(self, own: Tensor) -> Tensor:
        """Return a value for each feature, (d_sae,), of those for the features at hand."""
        return own


ALONE = BatchReductions()
"""Those of a single process."""
