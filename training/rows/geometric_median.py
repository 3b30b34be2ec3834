"""The point with the smallest mean distance to given points: a centre that a few massive activations cannot drag away.

Smoothed Weiszfeld iterations (Pillutla, Kakade & Harchaoui 2022, "Robust aggregation for federated learning", section
3): the mean of the points weighted by the inverse of their distance to the last estimate. The mean distance is flat
around its minimum, so it says little of where that lies. What is left of the way is told by the moves instead: each is
about the same share of the one before, so all that follow a move m of share q sum to m · q / (1 − q). Differences,
distances and sums are float64, whatever the points are.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tailrace.storage.compiled import compiled_loop
from tailrace.storage.errors import NonFiniteActivation


class GeometricMedian(NamedTuple):
    """The median, and how it was found."""

    median: Tensor
    """(width,), float64, on the CPU."""
    objectives: list[float]
    """Mean distance to the mean of the points, then to every estimate; the last is that of ``median``."""
    converged: bool
    """False if the iterations ran out first."""

    @property
    def n_iterations(self) -> int:
        """Estimates made after the first, the mean."""
        return len(self.objectives) - 1


def geometric_median(
    points: Tensor,
    weights: Tensor | None = None,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    smallest_distance: float = 1e-6,
) -> GeometricMedian:
    """Return the geometric median of ``points`` (rows, width), of equal ``weights`` unless (rows,) are given.

    Stops when the way left to the median is about ``tolerance`` times the mean distance. Distances below
    ``smallest_distance`` count as that, so an estimate may lie on a point. Raises ValueError for shapes or weights that
    make no sense, NonFiniteActivation if a point is not finite.
    """
    _check(points, weights)
    on_host = points.detach().cpu()
    rows = (on_host if on_host.dtype == torch.float64 else on_host.float()).contiguous().numpy()
    shares = np.ones(len(rows)) if weights is None else weights.detach().cpu().double().numpy()
    # all distances count as one immense one, so the first estimate is the weighted mean
    estimate = rows[0] + _move(rows, shares, rows[0].astype(np.float64), 1e100)[0]
    objectives: list[float] = []
    last = math.inf
    while True:
        shift, objective = _move(rows, shares, estimate, smallest_distance)
        if not np.isfinite(objective):
            raise NonFiniteActivation(
                f"geometric median: a row of the {len(rows):,} sampled is not finite; verify the cache"
            )
        objectives.append(objective)
        move = float(np.linalg.norm(shift))
        # the way left from here is this move and those after it; the first has none before it to compare with
        converged = move == 0 or (move < last < math.inf and move / (1 - move / last) <= tolerance * objective)
        if converged or len(objectives) > max_iterations:
            return GeometricMedian(torch.from_numpy(estimate), objectives, converged)
        estimate, last = estimate + shift, move


def _move(points: np.ndarray, weights: np.ndarray, centre: np.ndarray, smallest: float) -> tuple[np.ndarray, float]:
    """Return the weighted mean of points − centre, weights divided by distance, and the weighted mean distance."""
    total = np.zeros_like(centre)
    mass, distance = _add_towards(points, weights, centre, smallest, total)
    return total / mass, distance / float(weights.sum())


@compiled_loop("reassoc", "contract", "nsz")
def _add_towards(points: Any, weights: Any, centre: Any, smallest: float, total: Any) -> tuple[float, float]:
    """Add w/d · (x − centre) of every point x to ``total``; return the sums of w/d and of w · d.

    One pass over the points: the second look at one is answered by the processor's first-level cache.
    """
    width = points.shape[1]
    mass, distances = 0.0, 0.0
    for row in range(len(points)):
        point, square = points[row], 0.0
        for column in range(width):
            difference = point[column] - centre[column]
            square += difference * difference
        distance = np.sqrt(square)
        distances += weights[row] * distance
        weight = weights[row] / max(distance, smallest)
        mass += weight
        for column in range(width):
            total[column] += weight * (point[column] - centre[column])
    return mass, distances


def _check(points: Tensor, weights: Tensor | None) -> None:
    problems = []
    if points.ndim != 2 or not len(points) or not points.is_floating_point():
        problems.append(f"points {tuple(points.shape)} of {points.dtype}: wanted at least one row of floating numbers")
    if weights is not None:
        if weights.shape != points.shape[:1]:
            problems.append(f"weights {tuple(weights.shape)}: wanted one per row of points {tuple(points.shape)}")
        elif not bool((weights >= 0).all()) or not bool(weights.sum() > 0):
            problems.append("weights: wanted numbers of at least 0, one of them above")
    if problems:
        raise ValueError("geometric median: " + "; ".join(problems))
