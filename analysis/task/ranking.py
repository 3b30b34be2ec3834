"""Features, or neurons, that tell the prompts of a task apart: those whose activation varies most over the prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailrace.analysis.interventions.forward import forward
from tailrace.analysis.interventions.prompts import Prompts
from tailrace.analysis.splice.replacement import InPlaceCoder, weights_dtype
from tailrace.storage.cache_format import HookName, Site
from tailrace.storage.errors import TextError


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


def last_activations(bridge: Any, prompts: Prompts, coders: Mapping[Site, InPlaceCoder], batch: int = 64) -> Tensor:
    """Return (prompts, d_sae) activations of ``coders`` at each prompt's last token, in the plain model.

    Those of several sites stand side by side.
    """
    rows = _last_values(bridge, prompts, [site.hook_in for site in coders], batch)
    pairs = zip(coders.values(), rows, strict=True)
    return torch.cat([coder.encode(own.to(weights_dtype(coder, own.dtype))) for coder, own in pairs], 1)


def last_neurons(bridge: Any, prompts: Prompts, hooks: Sequence[str], batch: int = 64) -> Tensor:
    """Return (prompts, n) the values of ``hooks``, side by side, at each prompt's last token, in the plain model."""
    return torch.cat(_last_values(bridge, prompts, hooks, batch), 1)


def _last_values(bridge: Any, prompts: Prompts, hooks: Sequence[str], batch: int) -> list[Tensor]:
    """Return (prompts, width) of each hook."""
    addresses = [HookName.parse(hook) for hook in hooks]
    found: list[list[Tensor]] = [[] for _ in hooks]
    for _, part in prompts.batches(batch):
        seen = forward(bridge, part, hooks=[address.point for address in addresses]).observed
        for own, address in zip(found, addresses, strict=True):
            values = part.at_last(seen[address.point])
            own.append(values.flatten(1) if address.head is None else values[:, address.head])
    return [torch.cat(own) for own in found]
