"""The numbers of the training log against hand-computed cases."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from tailrace.training.architectures import ReLU
from tailrace.training.architectures.objectives import ReferenceObjective
from tailrace.training.dead_features.record import FiringRecord
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.kernels.kernel import PerRow, StepResult
from tailrace.training.kernels.sparse import SparseStep
from tailrace.training.loop.evaluate import l0_quantiles
from tailrace.training.loop.firing_frequency import EDGES, FiringWindow, histogram, log10_frequency
from tailrace.training.loop.session import snapshot_steps
from tailrace.training.loop.step_metrics import native_metrics, quality, reference_metrics
from tailrace.training.rows.batches import Batch

# Four rows; errors per row 1, 0, 4, 1. The mean is (1, 1), the squared distances from it 2, 2, 2, 2.
TARGETS = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
OUTPUTS = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0], [2.0, 3.0]])


def test_fvu_is_pooled_and_explained_variance_is_a_mean_over_rows_about_the_targets_mean() -> None:
    found = quality(OUTPUTS, TARGETS)
    assert found.fvu == pytest.approx(6 / 8)
    # shares explained: 1/2, 1, -1, 1/2; mean 1/4; squared deviations 1/16, 9/16, 25/16, 1/16 over n - 1 = 3
    assert found.explained_variance == pytest.approx(0.25)
    assert found.explained_variance_std == pytest.approx(math.sqrt(36 / 16 / 3))


def test_explained_variance_ignores_where_the_origin_is_and_the_scale() -> None:
    moved = quality(3 * OUTPUTS + 100, 3 * TARGETS + 100)
    assert moved == pytest.approx(quality(OUTPUTS, TARGETS), rel=1e-5)


def test_a_row_that_is_the_mean_has_no_share_to_explain() -> None:
    targets = torch.tensor([[0.0], [2.0], [1.0]])
    found = quality(torch.tensor([[0.0], [1.0], [5.0]]), targets)
    assert found.explained_variance == pytest.approx((1 + 0) / 2)
    assert found.fvu == pytest.approx((0 + 1 + 16) / 2)


def test_quality_of_targets_that_do_not_vary_is_none() -> None:
    assert quality(torch.zeros(3, 2), torch.ones(3, 2)) == (None, None, None)


def test_l0_quantiles_are_nearest_ranks() -> None:
    found = l0_quantiles(torch.arange(1, 101))
    assert list(found.values()) == [1, 5, 25, 50, 75, 95, 100]


def test_log10_frequency_of_a_feature_that_never_fired_is_minus_ten() -> None:
    found = log10_frequency(torch.tensor([0, 1, 1000]), 1000)
    assert found.tolist() == pytest.approx([-10, -3, 0], abs=1e-6)


def test_every_frequency_has_a_bin_of_the_histogram() -> None:
    # one value in the middle of every bin, and both ends
    middles = [(low + high) / 2 for low, high in pairwise(EDGES)]
    found = histogram(torch.tensor([*middles, -10.0, 0.0, math.log10(1 + 1e-10)], dtype=torch.float64))
    assert found == {"low": -10.0, "high": 0.0, "counts": [2, *[1] * 38, 3]}


def test_frequencies_come_from_the_last_completed_window_and_before_it_from_all_steps() -> None:
    window = FiringWindow(2, 2)
    assert not window.update(torch.tensor([4, 0]), 4)
    assert window.frequency().tolist() == [1.0, 0.0]
    assert window.update(torch.tensor([0, 2]), 8)  # a batch of another size: frequencies are shares of rows
    assert window.frequency().tolist() == [4 / 12, 2 / 12]
    assert not window.update(torch.tensor([4, 4]), 4)
    assert window.frequency().tolist() == [4 / 12, 2 / 12]
    assert window.update(torch.tensor([4, 0]), 4)
    assert window.frequency().tolist() == [1.0, 0.5]


@pytest.mark.parametrize("n_steps_before", range(6))
def test_a_window_continues_from_its_state(n_steps_before: int) -> None:
    counts = torch.arange(12).reshape(6, 2)
    whole, first, second = (FiringWindow(2, 3) for _ in range(3))
    for index, n_active in enumerate(counts):
        completed = whole.update(n_active, 5 + index)
        if index < n_steps_before:
            first.update(n_active, 5 + index)
            continue
        if index == n_steps_before:
            second.load_state({name: value.clone() for name, value in first.state_tensors().items()})
        assert second.update(n_active, 5 + index) == completed
        assert torch.equal(second.frequency(), whole.frequency())


def small_result() -> StepResult:
    rows = PerRow(torch.tensor([1, 2, 0, 1]), torch.tensor([1.0, 2.0, 0.0, 5.0]), OUTPUTS, TARGETS)
    losses = {"loss": torch.tensor(0.875), "reconstruction": torch.tensor(0.5), "ghost": torch.tensor(0.375)}
    return StepResult(losses, torch.tensor([3, 1, 0]), OUTPUTS, 4, rows)


def test_every_metric_of_the_original_code_has_its_name_and_formula() -> None:
    firing, window = FiringRecord(3), FiringWindow(3, 2000)
    for n_active, n_rows in (([0, 0, 0], 396), ([3, 1, 0], 4)):  # frequencies 3/400, 1/400 and 0
        firing.update(torch.tensor(n_active))
        window.update(torch.tensor(n_active), n_rows)
    found = reference_metrics(
        small_result(),
        firing,
        window,
        lr=3e-4,
        n_rows_done=400,
        n_resampled=2,
        dead_after_steps=2,
        dead_feature_threshold=0.005,
    )
    assert found == {
        "losses/mse_loss": 0.5,
        "losses/l1_loss": 2.0,  # (1 + 2 + 0 + 5) / 4
        "losses/ghost_grad_loss": 0.375,
        "losses/overall_loss": 0.875,
        "metrics/explained_variance": pytest.approx(0.25),
        "metrics/explained_variance_std": pytest.approx(math.sqrt(0.75)),
        "metrics/l0": 1.0,
        "metrics/n_resampled_neurons": 2,
        "sparsity/mean_passes_since_fired": pytest.approx(2 / 3),
        "sparsity/n_passes_since_fired_over_threshold": 1,
        "sparsity/below_1e-5": pytest.approx(1 / 3),
        "sparsity/below_1e-6": pytest.approx(1 / 3),
        "sparsity/dead_features": pytest.approx(2 / 3),
        "details/n_training_tokens": 400,
        "details/current_learning_rate": 3e-4,
    }


def test_native_metrics_keep_their_short_names() -> None:
    firing = FiringRecord(3)
    firing.update(torch.tensor([3, 1, 0]))
    found = native_metrics(small_result(), firing, lr=0.1, dead_after_steps=1, extras={"resampled_features": 7})
    quantiles = {"l0_min": 0, "l0_p05": 0, "l0_p25": 0, "l0_p50": 1, "l0_p75": 1, "l0_p95": 2, "l0_max": 2}
    assert found == {
        "loss": 0.875,
        "reconstruction": 0.5,
        "ghost": 0.375,
        "fvu": pytest.approx(0.75),
        "l0": 1.0,
        **quantiles,
        "dead_fraction": pytest.approx(1 / 3),
        "lr": pytest.approx(0.1),
        "resampled_features": 7,
    }


@pytest.mark.parametrize("kernel", [DenseStep(), SparseStep()], ids=["dense", "sparse"])
def test_a_step_reports_its_rows_when_asked(kernel: DenseStep | SparseStep) -> None:
    transcoder = ReLU(l1=0.5, input_bias=False).build(2, 2, 3)
    transcoder.activation_unit = 2.0
    with torch.no_grad():
        transcoder.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        transcoder.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    inputs = torch.tensor([[1.0, 2.0], [-3.0, 1.0], [0.0, 0.0], [4.0, -5.0]])
    batch = Batch(inputs, TARGETS)
    assert kernel(transcoder, batch, ReferenceObjective()).per_row is None
    result = kernel(transcoder, batch, ReferenceObjective(), per_row=True)
    assert result.per_row is not None
    # activations: (1, 2, 0), (0, 1, 2), none, (4, 0, 1)
    assert result.per_row.l0.tolist() == [2, 2, 0, 2]
    assert result.per_row.l1.tolist() == [1.5, 1.5, 0.0, 2.5]
    assert result.per_row.outputs.tolist() == [[1, 2], [2, 1], [0, 0], [5, 0]]
    assert torch.equal(result.per_row.targets, TARGETS)
    # so that l1 times the logged l1_loss is the penalty, whatever l1 is
    assert float(result.losses["sparsity"]) == pytest.approx(0.5 * 5.5 / 4)


def test_there_are_exactly_as_many_snapshots_as_asked_for_and_they_are_evenly_spaced() -> None:
    for n_steps in range(1, 40):
        for n in range(n_steps):
            steps = snapshot_steps(n, n_steps)
            assert len(steps) == n
            assert all(0 < step < n_steps for step in steps)
            gaps = {after - before for before, after in pairwise([0, *steps, n_steps])}
            assert max(gaps) - min(gaps) <= 1
