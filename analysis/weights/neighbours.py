"""Which features of a transcoder write in nearly the same direction: cosines of decoder rows."""

from __future__ import annotations

import torch
from torch import Tensor

from tailrace.analysis.weights.extremes import Ends, blocks, largest

N_NEAREST = 10
"""Neighbours kept of every feature."""

_SMALLEST_NORM = 1e-12


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
        cosines[own - block.start, own] = -torch.inf  # itself, which is never among the others
        parts.append(largest(cosines, min(n, n_features - 1)))
    return Ends.joined(parts)
