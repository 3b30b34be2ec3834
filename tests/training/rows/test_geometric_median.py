"""The geometric median: the original's numbers, the definition, and what it does with rows that make no sense."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tailrace.storage.errors import NonFiniteActivation
from tailrace.training.rows.geometric_median import geometric_median

GOLDEN = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_four_points_have_the_golden_median_and_objectives(dtype: torch.dtype) -> None:
    found = geometric_median(GOLDEN.to(dtype), tolerance=1e-12)
    assert found.converged
    assert found.median.tolist() == pytest.approx([0.5, 0.5], abs=1e-9)
    assert found.objectives[0] == pytest.approx(2.558336, abs=1e-6)
    assert found.objectives[-1] == pytest.approx(2.121320, abs=1e-6)


def test_iterations_follow_the_originals_step_by_step() -> None:
    # m ← Σ x/d / Σ 1/d, written out for the first step from the mean (1.5, 1.5)
    distances = (GOLDEN.double() - 1.5).norm(dim=1)
    first = (GOLDEN.double() / distances[:, None]).sum(0) / (1 / distances).sum()
    found = geometric_median(GOLDEN.double(), tolerance=0.0, max_iterations=1)
    assert torch.allclose(found.median, first, atol=1e-12)
    assert (found.n_iterations, found.converged) == (1, False)
    assert found.objectives[1] == pytest.approx(float((GOLDEN - first).norm(dim=1).mean()), abs=1e-12)


def test_the_sum_of_directions_to_the_points_vanishes_at_the_median() -> None:
    points = torch.from_numpy(np.random.Generator(np.random.Philox(1)).standard_normal((5000, 40)))
    found = geometric_median(points.float(), tolerance=1e-12)
    differences = points - found.median
    residual = (differences / differences.norm(dim=1, keepdim=True)).mean(0).norm()
    assert float(residual) < 1e-5


@pytest.mark.parametrize("kind", ["isotropic", "massive", "clumps", "line"])
def test_the_median_is_as_close_to_the_optimum_as_the_tolerance_says(kind: str) -> None:
    """The mean distance changes by less than a millionth 1e-3 of itself away from where it is smallest."""
    rng = np.random.Generator(np.random.Philox(5))
    points = rng.standard_normal((2000, 24))
    if kind == "massive":
        points[:, :2] *= 50
        points[:20] *= 30
    elif kind == "clumps":
        points[:400] += 6
    elif kind == "line":
        points = np.concatenate([rng.exponential(size=(2000, 1)), points[:, :2] / 1000], axis=1)
    optimum = geometric_median(torch.from_numpy(points), tolerance=1e-13, max_iterations=20_000)
    assert optimum.converged
    for tolerance in (1e-4, 1e-6, 1e-8):
        found = geometric_median(torch.from_numpy(points), tolerance=tolerance)
        left = float((found.median - optimum.median).norm())
        assert found.converged
        assert left <= 1.5 * tolerance * found.objectives[-1]  # the moves' share is an estimate


def test_weights_count_like_repeated_points() -> None:
    weights = torch.tensor([1.0, 3.0, 1.0, 2.0])
    repeated = GOLDEN.repeat_interleave(weights.long(), dim=0)
    by_weight, by_hand = geometric_median(GOLDEN, weights), geometric_median(repeated)
    assert by_weight.objectives == pytest.approx(by_hand.objectives, rel=1e-6)
    assert torch.allclose(by_weight.median, by_hand.median, atol=1e-5)


def test_a_few_massive_rows_do_not_drag_the_median_as_they_do_the_mean() -> None:
    points = torch.from_numpy(np.random.Generator(np.random.Philox(2)).standard_normal((2000, 8))).float()
    points[:20] += 1000.0
    assert float(points.mean(0).norm()) > 25
    assert float(geometric_median(points).median.norm()) < 0.2


def test_a_common_offset_far_above_the_spread_costs_no_digits() -> None:
    points = torch.from_numpy(np.random.Generator(np.random.Philox(3)).standard_normal((3000, 8)))
    # 2^13 and multiples of 2^-8 are exact in float32, so only the arithmetic could lose digits
    points = (points * 256).round() / 256
    near, far = (geometric_median((points + offset).float()) for offset in (0.0, 8192.0))
    assert torch.allclose(far.median - 8192.0, near.median, atol=1e-6)


def test_equal_points_are_their_own_median() -> None:
    found = geometric_median(torch.full((7, 3), 2.5))
    assert found.median.tolist() == [2.5, 2.5, 2.5]
    assert found.converged


def test_bfloat16_and_strided_points_are_read_as_what_they_are() -> None:
    points = torch.from_numpy(np.random.Generator(np.random.Philox(4)).standard_normal((10, 300))).bfloat16().T
    assert not points.is_contiguous()
    assert torch.equal(geometric_median(points).median, geometric_median(points.float().contiguous()).median)


def test_points_and_weights_that_make_no_sense_are_refused_all_at_once() -> None:
    with pytest.raises(ValueError, match=r"points \(3,\).*weights \(2,\)"):
        geometric_median(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="weights: wanted numbers of at least 0"):
        geometric_median(GOLDEN, torch.tensor([1.0, -1.0, 0.0, 0.0]))
    with pytest.raises(NonFiniteActivation, match="not finite"):
        geometric_median(torch.tensor([[1.0], [math.nan]]))
