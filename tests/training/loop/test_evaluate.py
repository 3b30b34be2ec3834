"""Held-out scores against hand-computed cases, and rows of a cache as tensors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tailrace.storage.activation_cache import open_cache
from tailrace.storage.bfloat16 import float32_to_bits
from tailrace.training.dead_features.record import FiringRecord
from tailrace.training.loop.evaluate import evaluate, linear_fvu
from tailrace.training.rows.batches import Batch, CacheBatches, as_tensor, iter_once
from tests.support.training_caches import publish_cache, random_rows, small_cache


def predict_zero(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Predict (0, 0); of three features the first fires on every row, the second on none, the third on the first."""
    active = torch.zeros(len(inputs), 3, dtype=torch.bool)
    active[:, 0] = True
    active[0, 2] = True
    return torch.zeros(len(inputs), 2), active


TARGETS = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])


def test_fvu_is_pooled_error_over_spread_about_the_rows_own_mean() -> None:
    # error: 1 + 9 + 13 = 23; mean (2, 1): spread (1 + 1) + (1 + 1) + 4 = 8
    assert evaluate(predict_zero, [Batch(TARGETS, TARGETS)]).fvu == pytest.approx(23 / 8)


def test_scores_do_not_depend_on_how_rows_are_cut_into_batches() -> None:
    pieces = [Batch(TARGETS[:1], TARGETS[:1]), Batch(TARGETS[1:], TARGETS[1:])]
    assert evaluate(predict_zero, pieces).fvu == pytest.approx(23 / 8)


def test_l0_and_dead_fraction_count_firings() -> None:
    score = evaluate(predict_zero, [Batch(TARGETS, TARGETS), Batch(TARGETS, TARGETS)])
    assert score.n_rows == 6
    assert score.l0 == pytest.approx((6 + 0 + 2) / 6)
    assert score.dead_fraction == pytest.approx(1 / 3)


def test_l0_quantiles_are_numbers_of_features_that_rows_have() -> None:
    # batches of 1 and 3 rows: L0 of the rows is 2, then 2, 1, 1
    score = evaluate(predict_zero, [Batch(TARGETS[:1], TARGETS[:1]), Batch(TARGETS, TARGETS)])
    assert score.l0 == pytest.approx(6 / 4)
    assert list(score.l0_quantiles.items()) == [
        ("l0_min", 1),
        ("l0_p05", 1),
        ("l0_p25", 1),
        ("l0_p50", 1),  # the 2nd smallest of 4
        ("l0_p75", 2),
        ("l0_p95", 2),
        ("l0_max", 2),
    ]


def test_frequent_features_are_counted_and_weighted_by_their_firings() -> None:
    # 12 rows in 4 batches: the features fire on 12, 0 and 4 of them
    score = evaluate(predict_zero, [Batch(TARGETS, TARGETS)] * 4)
    assert score.frequent == {
        "freq_over_1_percent": pytest.approx(2 / 3),
        "normalized_freq_over_1_percent": pytest.approx(1),
        "freq_over_10_percent": pytest.approx(2 / 3),
        "normalized_freq_over_10_percent": pytest.approx(1),
    }

    def fire(inputs: Tensor) -> tuple[Tensor, Tensor]:
        active = torch.zeros(len(inputs), 3, dtype=torch.bool)
        active[0, 0] = active[:5, 1] = active[:, 2] = True  # of 100 rows: 1, 5 and 100
        return torch.zeros(len(inputs), 2), active

    rows = torch.arange(200.0).reshape(100, 2)
    assert evaluate(fire, [Batch(rows, rows)]).frequent == {
        "freq_over_1_percent": pytest.approx(2 / 3),  # exactly 1 percent is not over it
        "normalized_freq_over_1_percent": pytest.approx(105 / 106),
        "freq_over_10_percent": pytest.approx(1 / 3),
        "normalized_freq_over_10_percent": pytest.approx(100 / 106),
    }


def test_density_histogram_has_dead_features_in_its_first_bin_and_constant_ones_in_its_last() -> None:
    score = evaluate(predict_zero, [Batch(TARGETS, TARGETS)] * 4)
    counts = score.log10_frequency["counts"]
    # log10 of 0, 1/3 and 1 is -10, -0.477 and 0; bins are a quarter wide
    assert (len(counts), counts[0], counts[38], counts[39]) == (40, 1, 1, 1)
    assert score.mean_log10_frequency == pytest.approx((-10 + math.log10(1 / 3) + 0) / 3)
    assert "log10_frequency" not in score.record()


def test_fvu_survives_a_mean_far_larger_than_the_spread() -> None:
    targets = torch.tensor([[4096.0, 0.0], [4097.0, 0.0]])

    def predict(inputs: Tensor) -> tuple[Tensor, Tensor]:
        return targets + torch.tensor([0.5, 0.0]), torch.zeros(2, 1, dtype=torch.bool)

    assert evaluate(predict, [Batch(targets, targets)]).fvu == pytest.approx(0.5 / 0.5)


def test_fvu_of_targets_that_do_not_vary_is_none() -> None:
    assert evaluate(predict_zero, [Batch(TARGETS[:1], TARGETS[:1])]).fvu is None


def test_dead_features_are_those_quiet_for_the_whole_window() -> None:
    record = FiringRecord(3)
    for n_active in ([1, 0, 0], [0, 0, 2], [5, 0, 0]):
        record.update(torch.tensor(n_active))
    assert record.steps_since_fired.tolist() == [0, 3, 1]
    assert record.dead(after_steps=3).tolist() == [False, True, False]


def test_bfloat16_bits_become_bfloat16_without_a_copy() -> None:
    values = np.array([[1.0, -2.5], [math.pi, 0.0]], np.float32)
    bits = float32_to_bits(values)
    tensor = as_tensor(bits, "bfloat16")
    assert tensor.dtype == torch.bfloat16
    assert torch.equal(tensor, torch.from_numpy(values).bfloat16())
    bits[0, 0] = 0
    assert float(tensor[0, 0]) == 0.0


def test_read_only_rows_become_a_tensor_without_a_copy_or_a_warning() -> None:
    base = np.arange(6.0, dtype=np.float32)
    rows = base.view()
    rows.flags.writeable = False
    tensor = as_tensor(rows, "float32")
    base[0] = 9
    assert tensor.tolist() == [9, 1, 2, 3, 4, 5]


def test_batches_pair_inputs_with_their_outputs(tmp_path: Path) -> None:
    inputs = np.arange(300, dtype=np.float32)[:, None] * np.ones(4, np.float32)
    cache = open_cache(publish_cache(tmp_path / "cache", {"mlp": {"train": (inputs, 2 * inputs[:, :3])}}))
    seen = []
    with CacheBatches(cache.split("train"), [cache.sites["mlp"]], batch_rows=100, seed=1) as stream:
        for _ in range(stream.n_steps_per_epoch):
            batch = stream.next_batch()["mlp"]
            assert torch.equal(batch.outputs, 2 * batch.inputs[:, :3])
            seen += batch.inputs[:, 0].tolist()
    assert sorted(seen) == list(range(300))
    assert seen != sorted(seen)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_batches_are_float32_whatever_is_stored(tmp_path: Path, dtype: str) -> None:
    values = np.random.Generator(np.random.Philox(5)).integers(-8, 8, (64, 4)).astype(np.float32)  # exact in all three
    by_dtype: dict[str, np.ndarray] = {
        "float32": values,
        "float16": values.astype(np.float16),
        "bfloat16": float32_to_bits(values),
    }
    stored = by_dtype[dtype]
    cache = open_cache(publish_cache(tmp_path / "cache", {"mlp": {"train": (stored, stored)}}, dtype=dtype))
    (batch,) = iter_once(cache.split("train"), cache.sites["mlp"], batch_rows=64)
    assert batch.inputs.dtype == torch.float32
    assert sorted(batch.inputs.tolist()) == sorted(values.tolist())


def test_every_state_of_the_stream_continues_with_the_same_batches(tmp_path: Path) -> None:
    cache = open_cache(small_cache(tmp_path / "cache", n_rows=300))
    with CacheBatches(cache.split("train"), [cache.sites["mlp"]], batch_rows=64, seed=0) as stream:
        states, batches = [], []
        for _ in range(10):  # 4 batches to an epoch
            states.append(stream.state_dict())
            batches.append(stream.next_batch()["mlp"].inputs.clone())
        for start, state in enumerate(states):
            stream.load_state_dict(state)
            assert torch.equal(stream.next_batch()["mlp"].inputs, batches[start])


def test_partial_evaluation_reads_the_same_rows_every_time(tmp_path: Path) -> None:
    splits = {"train": random_rows(1, 64, 4, 3), "heldout": random_rows(2, 90, 4, 3)}
    cache = open_cache(publish_cache(tmp_path / "cache", {"mlp": splits}))
    first, again = (
        [
            batch.inputs.clone()
            for batch in iter_once(cache.split("heldout"), cache.sites["mlp"], batch_rows=16, max_rows=40)
        ]
        for _ in range(2)
    )
    assert [len(rows) for rows in first] == [16, 16, 8]
    assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))


def test_the_linear_baseline_is_the_least_squares_map_with_a_constant() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = 3 + torch.randn(400, 5, generator=generator, dtype=torch.float64)
    outputs = (inputs @ torch.randn(5, 3, generator=generator, dtype=torch.float64)).tanh() + 50
    fitted, scored = Batch(inputs[:300], outputs[:300]), Batch(inputs[300:], outputs[300:])
    design = np.c_[fitted.inputs.numpy(), np.ones(300)]
    weights = np.linalg.lstsq(design, fitted.outputs.numpy(), rcond=None)[0]
    error = scored.outputs.numpy() - np.c_[scored.inputs.numpy(), np.ones(100)] @ weights
    spread = scored.outputs.numpy() - scored.outputs.numpy().mean(0)
    pieces = [Batch(fitted.inputs[:120], fitted.outputs[:120]), Batch(fitted.inputs[120:], fitted.outputs[120:])]
    found = linear_fvu(pieces, [scored])
    assert found == pytest.approx((error**2).sum() / (spread**2).sum(), rel=1e-4)  # the ridge moves the fifth digit
    assert linear_fvu([Batch(inputs[:19], outputs[:19])], [scored]) is None  # 19 rows for 5 widths fit their noise
