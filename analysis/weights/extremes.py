"""Products of all features with all tokens, heads or features, a block at a time; only the ends are kept.

A matrix of features × tokens would be 4.9 GB for GPT-2 and 24,576 features; what is kept of a row is a few numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUMBERS_AT_ONCE = 1 << 24
"""Products held at a time: 64 MB of float32, a few times over while the ends are searched."""

N_NEAREST = 10
"""Neighbours kept of every feature."""
_SMALLEST_NORM = 1e-12


class Ends(NamedTuple):
    """The largest, or the smallest, entries of each row, the most extreme first."""

    indices: NDArray[np.int32]
    """(rows, n) which column."""
    values: NDArray[np.float32]
    """(rows, n)."""

    @classmethod
    def joined(cls, parts: list[Self]) -> Self:
        """Return the rows of several parts, one after the other."""
        return cls(np.concatenate([part.indices for part in parts]), np.concatenate([part.values for part in parts]))


def largest(scores: Tensor, n: int) -> Ends:
    """Return the ``n`` largest entries of each row of ``scores`` (rows, columns), all if there are fewer."""
    return _ends(scores, n, largest=True)


def smallest(scores: Tensor, n: int) -> Ends:
    """Return the ``n`` smallest entries of each row of ``scores`` (rows, columns), all if there are fewer."""
    return _ends(scores, n, largest=False)


def _ends(scores: Tensor, n: int, *, largest: bool) -> Ends:
    values, indices = scores.topk(min(n, scores.shape[-1]), dim=-1, largest=largest, sorted=True)
    return Ends(indices.to("cpu", torch.int32).numpy(), values.to("cpu", torch.float32).numpy())


class BothEnds(NamedTuple):
    """A row's largest and smallest entries without overlap."""

    top: Ends
    bottom: Ends

    @classmethod
    def joined(cls, parts: list[Self]) -> Self:
        """Return the rows of several parts, one after the other."""
        return cls(Ends.joined([part.top for part in parts]), Ends.joined([part.bottom for part in parts]))


def both_ends(scores: Tensor, n: int) -> BothEnds:
    """Return the ``n`` largest and the ``n`` smallest entries of each row; the largest go first if columns are few."""
    n_top = min(n, scores.shape[-1])
    return BothEnds(largest(scores, n_top), smallest(scores, min(n, scores.shape[-1] - n_top)))


def blocks(n_rows: int, n_columns: int) -> Iterator[slice]:
    """Cut rows so that ``NUMBERS_AT_ONCE`` products fit, at least one row each."""
    size = max(1, NUMBERS_AT_ONCE // max(1, n_columns))
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def ends_of_products(rows: Tensor, columns: Tensor, n: int) -> BothEnds:
    """Return both ends of ``rows @ columns`` for rows (n_rows, d) and columns (d, n_columns), block by block."""
    return BothEnds.joined([both_ends(scores, n) for scores in products(rows, columns)])


def products(rows: Tensor, columns: Tensor, carry: Callable[[Tensor], Tensor] | None = None) -> Iterator[Tensor]:
    """Yield ``carry(rows) @ columns`` a block of rows at a time, in float32."""
    for block in blocks(len(rows), columns.shape[1]):
        chosen = rows[block].float()
        yield (chosen if carry is None else carry(chosen)) @ columns


def nearest_decoders(decoder: Tensor, n: int = N_NEAREST) -> Ends:
    """Return for each row of ``decoder`` (d_sae, d_out) the ``n`` others of largest cosine with it, nearest first.

    A row of zeros has no direction and cosine 0 with all. Memory: the rows once more, and a few blocks of 64 MB.
    """
    rows = decoder.float()
    unit = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(_SMALLEST_NORM)
    n_features = len(unit)
    parts = []
    for block in blocks(n_features, n_features):
        cosines = unit[block] @ unit.T
        own = torch.arange(block.start, block.stop, device=cosines.device)
        cosines[own - block.start, own] = -torch.inf  # a row is not its own neighbour
        parts.append(largest(cosines, min(n, n_features - 1)))
    return Ends.joined(parts)
