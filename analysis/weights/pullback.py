"""Contributions of a transcoder's features to a later direction: from weights alone, on an input, and on average.

The *pullback* of a direction v of the stream onto a transcoder is p = W_dec v, one number per feature: how much a unit
of its activation adds to what v reads. On a row, feature i adds p_i · a_i (input × gradient); its mean over rows is
p_i · mean(a_i). Norms between the two divide by what depends on the text; that is left out, as everywhere here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tailrace.analysis.weights.stream import StreamPoint


def pullback(decoder: Tensor, writes: StreamPoint, direction: Tensor) -> Tensor:
    """Return (d_sae,) what ``direction`` (d_model,) of the stream reads of each row of ``decoder`` (d_sae, d_out)."""
    return writes.carry(decoder.float()) @ direction.float()


class MeanInputGradient(NamedTuple):
    """Input × gradient of every feature, averaged over rows; each (d_sae,) float64."""

    mean: NDArray[np.float64]
    """Over all rows."""
    mean_when_active: NDArray[np.float64]
    """Over the rows where the feature is active; 0 where it never is."""
    frequency: NDArray[np.float64]
    """Share of rows on which it is active; 0 for a feature that never is."""


def mean_input_gradient(connection: Tensor, activations: Iterable[Tensor]) -> MeanInputGradient:
    """Return the means of p ⊙ a for a pullback p, ``connection`` (d_sae,), and blocks of activations (rows, d_sae).

    Every row counts alike, however rows are cut into blocks, and so do contributions of either sign: a feature is
    active by its activation, not by the product. Sums are float64. Raises ValueError without rows.
    """
    weight = connection.double().cpu().numpy()
    total, n_active, n_rows = np.zeros(len(weight)), np.zeros(len(weight), np.int64), 0
    for block in activations:
        total += block.double().sum(dim=0).cpu().numpy()
        n_active += (block > 0).sum(dim=0).cpu().numpy()
        n_rows += len(block)
    if n_rows == 0:
        raise ValueError("no rows: a mean over none is not defined; give at least one block of activations")
    when_active = np.divide(total, n_active, out=np.zeros(len(weight)), where=n_active > 0)
    return MeanInputGradient(weight * total / n_rows, weight * when_active, n_active / n_rows)


def overlap(first: NDArray[np.floating], second: NDArray[np.floating], sizes: Sequence[int]) -> list[float]:
    """Return |top_k(first) ∩ top_k(second)| / k for every k of ``sizes``, the k features of largest value.

    Of equal values the feature of smaller index comes first. Raises ValueError if a size is not within 1 … d_sae.
    """
    wrong = [size for size in sizes if not 1 <= size <= len(first)]
    if wrong or len(first) != len(second):
        raise ValueError(
            f"sizes {wrong} of {len(first)} and {len(second)} features: wanted two arrays of equal length, and sizes "
            f"within 1 and {len(first)}"
        )
    orders = [np.argsort(-np.asarray(values, np.float64), kind="stable") for values in (first, second)]
    return [len(np.intersect1d(orders[0][:size], orders[1][:size])) / size for size in sizes]
