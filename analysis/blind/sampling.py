"""The features of a dictionary that are drawn for rating: a uniform sample of live features, decided by a seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tailrace.storage.errors import SettingsError
from tailrace.storage.shuffle import philox, random_permutation


@dataclass(frozen=True)
class LiveRule:
    """Conditions under which a feature may be drawn, and kept once drawn."""

    min_log10_frequency: float
    """A feature is live if log₁₀ of its frequency is above this."""
    min_active: int
    """A live feature that fires on fewer rows than this is replaced by another live feature."""


@dataclass(frozen=True)
class Drawn:
    """A feature in a slot of the sample."""

    feature: int
    replaced: tuple[int, ...]
    """Features drawn for this slot before it, which fire on too few rows."""


def draw(
    log10_frequency: NDArray[np.floating], n_active: NDArray[np.integer], n: int, rule: LiveRule, seed: int, name: str
) -> list[Drawn]:
    """Return ``n`` live features in random order, without replacement.

    ``log10_frequency`` (features,), NaN where a feature is dead, and ``n_active`` (features,) are a dictionary's;
    ``name`` gives it other draws than another dictionary with the same ``seed``. A feature with too few active rows is
    replaced in its own slot, so that the order says nothing about which were. Raises SettingsError if there are not
    enough.
    """
    live = np.flatnonzero(log10_frequency > rule.min_log10_frequency)  # NaN is above nothing
    enough = n_active >= rule.min_active
    n_fit = int(enough[live].sum())
    if n_fit < n:
        raise SettingsError(
            f"{name}: {n} features are wanted, {n_fit} of its {len(log10_frequency)} have a log10 frequency above "
            f"{rule.min_log10_frequency} and fire on {rule.min_active} rows or more; ask for fewer with --n, or lower "
            "--min-log10-frequency or --min-active"
        )
    order = iter(live[random_permutation(philox(seed, "blind/draw", *name.encode()), len(live))].tolist())
    return [_next(order, enough) for _ in range(n)]


def _next(order: Iterator[int], enough: NDArray[np.bool_]) -> Drawn:
    replaced: list[int] = []
    for feature in order:
        if enough[feature]:
            return Drawn(feature, tuple(replaced))
        replaced.append(feature)
    raise AssertionError("there are enough features: they were counted")
