"""How the number of active features is spread over rows, as a few quantiles."""

from __future__ import annotations

import numpy as np
from torch import Tensor

SHARES = {"l0_min": 0.0, "l0_p05": 0.05, "l0_p25": 0.25, "l0_p50": 0.5, "l0_p75": 0.75, "l0_p95": 0.95, "l0_max": 1.0}
"""Name and share of each quantile."""


def l0_quantiles(l0: Tensor) -> dict[str, int]:
    """Return nearest-rank quantiles of ``l0`` (rows,) by name: the ⌈q · rows⌉-th smallest, a number some row has."""
    found = np.quantile(l0.cpu().numpy(), list(SHARES.values()), method="inverted_cdf")
    return dict(zip(SHARES, map(int, found), strict=True))
