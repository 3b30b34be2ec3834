"""Features, or neurons, that tell the prompts of a task apart: those whose activation varies most over the prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailrace.analysis.interventions.forward import forward
from tailrace.analysis.interventions.prompts import Prompts
from tailrace.analysis.splice.replacement import InPlaceCoder, weights_dtype
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import TextError
from tailrace.storage.hook_names import HookName


@dataclass(frozen=True, eq=False)
class Ranking:
    """Coordinates of activations (prompts, n) by how much they vary."""

    order: NDArray[np.int64]
    """(n,) most varying first; ties by index."""
    mean: NDArray[np.float64]
    """(n,) over prompts."""
    variance: NDArray[np.float64]
    """(n,) unbiased, over prompts."""
    n_active: NDArray[np.int64]
    """(n,) prompts on which it is above zero."""


def rank_by_variance(activations: Tensor) -> Ranking:
    """Rank activations (prompts, n) by their unbiased variance over prompts, Σ(a − ā)² / (prompts − 1), in float64.

    Raises TextError for fewer than two prompts, over which nothing varies.
    """
    values = activations.cpu().double().numpy()
    if len(values) < 2:
        raise TextError(f"features are ranked by how they vary over prompts; got {len(values)}, give at least two")
    variance = values.var(axis=0, ddof=1)
    order = np.argsort(-variance, kind="stable").astype(np.int64)
    return Ranking(order, values.mean(axis=0), variance, (values > 0).sum(axis=0).astype(np.int64))


def last_activations(bridge: Any, prompts: Prompts, site: Site, coder: InPlaceCoder, batch: int = 64) -> Tensor:
    """Return (prompts, d_sae) activations of ``coder`` at each prompt's last token, in the plain model."""
    rows = _last_values(bridge, prompts, site.hook_in, batch)
    return coder.encode(rows.to(weights_dtype(coder, rows.dtype)))


def last_neurons(bridge: Any, prompts: Prompts, hook: str, batch: int = 64) -> Tensor:
    """Return (prompts, n) the values of ``hook`` at each prompt's last token, in the plain model."""
    return _last_values(bridge, prompts, hook, batch)


def _last_values(bridge: Any, prompts: Prompts, hook: str, batch: int) -> Tensor:
    address = HookName.parse(hook)
    found = []
    for _, part in prompts.batches(batch):
        values = part.at_last(forward(bridge, part, hooks=[address.point]).observed[address.point])
        found.append(values.flatten(1) if address.head is None else values[:, address.head])
    return torch.cat(found)
