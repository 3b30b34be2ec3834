"""How sure a share of rows is."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Z_95: Final = 1.959963984540054
"""The standard normal's 97.5th percentile."""


def wilson_interval(
    n_hits: NDArray[np.int64], n_trials: int, z: float = Z_95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both ends (n,) of the Wilson score interval of shares ``n_hits`` (n,) / ``n_trials``.

    (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n), from Wilson 1927; unlike the plain one it is sensible for
    shares near 0. Trials are taken as independent, which neighbouring tokens are not: it is a lower bound of doubt.
    """
    share = n_hits / n_trials
    center = share + z * z / (2 * n_trials)
    spread = z * np.sqrt(share * (1 - share) / n_trials + (z / (2 * n_trials)) ** 2)
    scale = 1 + z * z / n_trials
    low = np.where(n_hits == 0, 0.0, (center - spread) / scale)
    high = np.where(n_hits == n_trials, 1.0, (center + spread) / scale)
    return low, high
