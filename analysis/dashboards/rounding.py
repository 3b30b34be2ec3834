"""Numbers as pages keep them: a few significant digits, and None where there is none, as JSON wants it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

DIGITS = 4
"""Significant digits kept: more than a page shows, and half the bytes of all of them."""


def significant(values: ArrayLike, digits: int = DIGITS) -> NDArray[np.float64]:
    """Return ``values`` rounded to ``digits`` significant decimal digits; zero, NaN and infinities stay as they are."""
    given = np.asarray(values, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = np.floor(np.log10(np.abs(given)))
        places = np.where(np.isfinite(exponent), digits - 1 - exponent, 0.0)
        # A power of ten above 10²² is no exact float: a number that small is divided by one instead.
        scaled = np.where(places >= 0, given * 10.0 ** np.maximum(places, 0), given / 10.0 ** np.maximum(-places, 0))
        rounded = np.round(scaled)
        found = np.where(places >= 0, rounded / 10.0 ** np.maximum(places, 0), rounded * 10.0 ** np.maximum(-places, 0))
    return np.where(np.isfinite(given) & (given != 0), found, given)


def rounded_list(values: ArrayLike, digits: int = DIGITS) -> list[float | None]:
    """Return ``values`` as a list of rounded numbers; what is not finite becomes None."""
    return [value if np.isfinite(value) else None for value in significant(values, digits).tolist()]


def rounded(value: Any, digits: int = DIGITS) -> Any:
    """Return one value as a page keeps it: floats rounded, everything else as it is."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [rounded(item, digits) for item in value]
    return value
