"""Cross entropies and divergences of predictions, against numbers worked out by hand."""

from __future__ import annotations

from math import log

import numpy as np
import pytest
import torch
from torch import Tensor

from tailrace.analysis.evaluate import next_tokens
from tailrace.analysis.evaluate.next_tokens import next_token_divergences, next_token_losses, pattern_divergences
from tailrace.analysis.evaluate.recovered import recovered
from tailrace.analysis.splice.in_place import InPlaceSums


def logits_of(probabilities: list[list[list[float]]]) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().float() + 3  # softmax ignores a constant


P = logits_of([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1 / 3, 1 / 3, 1 / 3]]])
Q = logits_of([[[0.25, 0.5, 0.25], [0.1, 0.1, 0.8], [0.9, 0.05, 0.05]]])


def test_the_loss_at_a_position_is_of_the_token_after_it() -> None:
    # position 0 predicts token 1 with 0.25, position 1 predicts token 2 with 0.8; position 2 predicts nothing known
    losses = next_token_losses(P, torch.tensor([[0, 1, 2]]))
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, torch.tensor([[log(4), log(1.25)]]).double(), rtol=1e-6, atol=1e-7)


def test_losses_come_one_per_prediction_and_agree_with_a_loop_however_they_are_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, tokens = torch.randn(3, 7, 11, generator=generator), torch.randint(11, (3, 7), generator=generator)
    whole = next_token_losses(logits, tokens)
    expected = [[-logits[c, t].log_softmax(-1)[tokens[c, t + 1]] for t in range(6)] for c in range(3)]
    torch.testing.assert_close(whole, torch.tensor(expected).double(), rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(next_tokens, "_NUMBERS_AT_ONCE", 25)  # two positions at once
    torch.testing.assert_close(next_token_losses(logits, tokens), whole, rtol=1e-6, atol=1e-6)


def test_divergence_is_of_the_original_from_the_changed() -> None:
    # KL(p ‖ q) = 0.5 ln 2 + 0.25 ln ½ = 0.25 ln 2 at position 0, and 0 where both agree
    forward = next_token_divergences(P, Q)
    torch.testing.assert_close(forward, torch.tensor([[0.25 * log(2), 0.0]]).double(), rtol=1e-5, atol=1e-6)
    skewed = logits_of([[[0.98, 0.01, 0.01], [0.1, 0.1, 0.8], [0.2, 0.4, 0.4]]])
    there = 0.5 * log(0.5 / 0.98) + 0.5 * log(25)
    back = 0.98 * log(0.98 / 0.5) + 0.02 * log(0.04)
    assert next_token_divergences(P, skewed)[0, 0].item() == pytest.approx(there, rel=1e-5)
    assert next_token_divergences(skewed, P)[0, 0].item() == pytest.approx(back, rel=1e-5)


def test_equal_distributions_have_no_divergence_in_any_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(2, 5, 1000, generator=torch.Generator().manual_seed(1)).to(dtype)
        assert not next_token_divergences(logits, logits).any()


def test_patterns_diverge_in_nats_and_a_source_without_weight_is_no_infinity() -> None:
    original = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    changed = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])
    expected = 0.5 * log(2) + 0.5 * log(2 / 3)
    torch.testing.assert_close(
        pattern_divergences(original, changed), torch.tensor([[[0.0, expected]]]).double(), rtol=1e-5, atol=1e-7
    )
    gone = pattern_divergences(original, torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]]))[0, 0, 1].item()
    assert gone == pytest.approx(0.5 * log(0.5) + 0.5 * log(0.5 / torch.finfo(torch.float32).tiny), rel=1e-5)


@pytest.mark.parametrize(
    ("ablated", "spliced", "original", "share"),
    [
        (10.0, 4.0, 3.0, 6 / 7),
        (10.0, 3.0, 3.0, 1.0),
        (10.0, 11.0, 3.0, -1 / 7),
        (3.0, 4.0, 3.0, None),
        (2.9, 4.0, 3.0, None),
    ],
)
def test_the_share_recovered_is_of_what_ablation_costs(
    ablated: float, spliced: float, original: float, share: float | None
) -> None:
    assert recovered(ablated, spliced, original) == (None if share is None else pytest.approx(share))


def test_fvu_is_of_the_target_about_its_own_mean() -> None:
    # the reference divided by Σx² of the input: here that would give another number, and 0/0 for centred targets
    sums = InPlaceSums()
    sums.add(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([[1.0, 4.0], [3.0, 5.0]]), torch.tensor([2, 1]))
    sums.add(torch.tensor([[5.0, 5.0]]), torch.tensor([[5.0, 7.0]]), torch.tensor([3]))
    score = sums.score()  # errors 1 + 4; deviations from (3, 5): 4 + 0 + 4
    assert (score.n_rows, score.l0) == (3, 2.0)
    assert score.fvu == pytest.approx(5 / 8)


def test_fvu_does_not_lose_its_digits_to_a_large_mean_and_is_none_without_variance() -> None:
    rows = np.random.Generator(np.random.Philox(0)).standard_normal((500, 4)) * 0.01 + 1000
    outputs = torch.from_numpy(rows.astype(np.float32))
    exact = outputs.double()
    expected = ((0.001 * torch.ones_like(exact)) ** 2).sum() / ((exact - exact.mean(0)) ** 2).sum()
    for center in (None, rows.mean(0)):
        sums = InPlaceSums(center)
        for start in range(0, 500, 50):
            piece = outputs[start : start + 50]
            sums.add(piece, piece.double() + 0.001, torch.ones(50))
        assert sums.score().fvu == pytest.approx(float(expected), rel=0.05)  # float32 steps here are 6e-5
    constant = InPlaceSums()
    constant.add(torch.ones(3, 2), torch.zeros(3, 2), torch.ones(3))
    assert constant.score().fvu is None
    assert (InPlaceSums().score().fvu, InPlaceSums().score().l0) == (None, None)
