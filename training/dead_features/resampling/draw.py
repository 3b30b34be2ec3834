"""Drawing rows with probability proportional to weights, decided by the generator alone."""

from __future__ import annotations

import numpy as np


def draw_distinct(generator: np.random.Generator, weights: np.ndarray, n: int) -> np.ndarray:
    """Return int64 indices of at most ``n`` different rows, one after another ∝ ``weights`` (float64, at least 0).

    Rows of weight zero are never drawn, so there may be fewer; if all weights are zero, all rows are equally likely.
    (Efraimidis & Spirakis 2006: the smallest of exponential variables divided by the weights.)
    """
    weights = _usable(weights)
    waiting = np.full(len(weights), np.inf)
    np.divide(generator.standard_exponential(len(weights)), weights, out=waiting, where=weights > 0)
    n = min(n, int(np.count_nonzero(weights)))
    return np.asarray(np.argsort(waiting, kind="stable")[:n])


def draw_repeated(generator: np.random.Generator, weights: np.ndarray, n: int) -> np.ndarray:
    """Return int64 indices of ``n`` rows ∝ ``weights``, a row maybe several times; uniform if all weights are zero."""
    weights = _usable(weights)
    if not len(weights):
        return np.zeros(0, np.int64)
    ends = np.cumsum(weights)
    found = np.searchsorted(ends, generator.random(n) * ends[-1], side="right")
    # the product can round up to the total itself, which lies behind the last row that has a weight
    return np.asarray(np.minimum(found, np.flatnonzero(weights)[-1]))


def _usable(weights: np.ndarray) -> np.ndarray:
    """Return weights whose sum is finite and not zero, in the same proportions where they have any."""
    largest = weights.max(initial=0.0)
    if largest <= 0:
        return np.ones(len(weights))
    return np.asarray(weights / largest, np.float64)
