"""The rows that a transcoder is shown when it is analysed, wherever they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tailrace.analysis.harvest.rows import TokenOrderSplit
from tailrace.storage.activation_cache import ActivationCache


@dataclass(frozen=True)
class ShownRows:
    """Rows of one site in token order, and what tables say of them."""

    split: TokenOrderSplit
    split_name: str
    site: str
    output_mean: NDArray[np.float64]
    """(d_out,) roughly the mean output."""
    vocabulary: Sequence[str]
    """Token id → its text."""
    cache: ActivationCache | None = None
    """Where other processes find them; None for rows that only this one has."""


def cached_rows(cache: ActivationCache, split_name: str, site: str) -> ShownRows:
    """Return the rows of a cache's split. Raises ArtifactMismatch if the cache has no such split."""
    split = cache.split(split_name)
    return ShownRows(split, split_name, site, split.statistics(site, "out").mean, cache.vocabulary(), cache)
