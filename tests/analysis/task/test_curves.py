"""Task circuits: metrics, rankings and curves against numbers worked out by hand and runs made one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tailrace.analysis.interventions.forward import ForwardPass, forward
from tailrace.analysis.interventions.prompts import pad_prompts
from tailrace.analysis.splice.replacement import Transcoded, ZeroAblated
from tailrace.analysis.task.answers import (
    CorrectMinusIncorrect,
    answer_probabilities,
    divergences,
    neighbour_difference,
    probability_above_minus_below,
)
from tailrace.analysis.task.curves import Task, keep_top_features, keep_top_neurons, leave_one_out
from tailrace.analysis.task.ranking import last_activations, last_neurons, rank_by_variance
from tailrace.analysis.weights.model_weights import ModelWeights, Norm
from tailrace.analysis.weights.unembedding import logit_effects
from tailrace.storage.errors import TextError
from tests.support.spliced_models import autoencoder_site, mlp_site, random_transcoder, tiny_model

LISTS = [[2, 9, 17, 33, 40, 11], [2, 21, 8], [2, 60, 61, 62]]
PROMPTS = pad_prompts(LISTS)
CORRECT = [[5], [6, 7], [9]]
INCORRECT = [[8, 9], [5], [5, 6, 7]]
METRIC = CorrectMinusIncorrect(CORRECT, INCORRECT)


def passed(last_logits: Tensor) -> ForwardPass:
    """Return a pass of one-token prompts with these logits (prompts, vocab)."""
    return ForwardPass(pad_prompts([[0]] * len(last_logits)), last_logits[:, None])


# ---- metrics, by hand


def test_the_greater_than_metric_counts_the_starting_answer_as_below() -> None:
    # logits ln 1, ln 2, ln 3, ln 4 among four answers are probabilities .1 .2 .3 .4
    logits = torch.tensor([[9.0, 0.0, math.log(2), math.log(3), math.log(4)]]).expand(3, 5)
    probabilities = answer_probabilities(logits, torch.tensor([1, 2, 3, 4]))
    torch.testing.assert_close(probabilities[0], torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))
    scores = probability_above_minus_below(probabilities, torch.tensor([0, 1, 3]))
    torch.testing.assert_close(scores, torch.tensor([0.8, 0.4, -1.0], dtype=torch.float64))
    steps = neighbour_difference(probabilities, torch.tensor([1, 2, 2]))
    torch.testing.assert_close(steps, torch.tensor([0.2, 0.2, 0.2], dtype=torch.float64))
    even = torch.full((3, 4), 0.25, dtype=torch.float64)
    expected = sum(p * math.log(p / 0.25) for p in (0.1, 0.2, 0.3, 0.4))
    assert divergences(probabilities, even)[0].item() == pytest.approx(expected)


def test_correct_minus_incorrect_is_greater_than_where_its_answers_are_all_numbers() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    answers, start = [3, 7, 11, 20, 21], [0, 1, 2, 3]
    metric = CorrectMinusIncorrect([answers[s + 1 :] for s in start], [answers[: s + 1] for s in start])
    expected = probability_above_minus_below(answer_probabilities(logits, torch.tensor(answers)), torch.tensor(start))
    torch.testing.assert_close(metric(passed(logits)), expected)


def test_each_prompt_is_scored_among_its_own_answers_alone() -> None:
    logits = torch.zeros(2, 6)
    logits[0, 3] = 100.0  # no answer of prompt 0
    logits[1, 4] = math.log(3)
    metric = CorrectMinusIncorrect([[1], [4]], [[2], [0, 5]])
    # prompt 0: 1/2 − 1/2; prompt 1: 3/5 − 2/5
    assert metric(passed(logits)).tolist() == pytest.approx([0.0, 0.2])
    assert metric.part(slice(1, 2))(passed(logits[1:])).tolist() == pytest.approx([0.2])


def test_answers_that_cannot_be_scored_are_all_named() -> None:
    with pytest.raises(TextError) as caught:
        CorrectMinusIncorrect([[], [4], [4, 5]], [[], [], [5]])
    message = str(caught.value)
    assert "prompt 0 has no correct and no incorrect answer" in message
    assert "prompt 1 has no incorrect answer" in message
    assert "prompt 2: token 5 is a correct and an incorrect answer" in message


# ---- ranking


def test_variance_is_unbiased_and_ties_go_by_index() -> None:
    activations = torch.tensor([[1.0, 0.0, 2.0, 0.0], [3.0, 0.0, 2.0, 2.0], [5.0, 0.0, 2.0, 4.0]])
    ranking = rank_by_variance(activations)
    assert ranking.variance.tolist() == [4.0, 0.0, 0.0, 4.0]  # (4 + 0 + 4) / 2
    assert ranking.mean.tolist() == [3.0, 0.0, 2.0, 2.0]
    assert ranking.order.tolist() == [0, 3, 1, 2]
    assert ranking.n_active.tolist() == [3, 0, 3, 2]
    with pytest.raises(TextError, match="got 1, give at least two"):
        rank_by_variance(activations[:1])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_activations_are_those_at_each_prompts_own_last_token(family: str) -> None:
    transcoder, bridge = random_transcoder(), tiny_model(family).bridge
    hooks = ["blocks.1.mlp.hook_in", "blocks.1.mlp.hook_post"]
    alone = [forward(bridge, pad_prompts([tokens]), hooks=hooks).observed for tokens in LISTS]
    expected = torch.stack([transcoder.encode(one[hooks[0]][0, -1]) for one in alone])
    for batch in (64, 2):
        found = last_activations(bridge, PROMPTS, {mlp_site(1): transcoder}, batch)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    neurons = last_neurons(bridge, PROMPTS, [hooks[1]], batch=2)
    torch.testing.assert_close(neurons, torch.stack([one[hooks[1]][0, -1] for one in alone]), rtol=1e-4, atol=1e-5)


# ---- curves


def by_hand(family: str, function: Any) -> Tensor:
    """Return scores of prompts run one at a time with ``function`` (inputs → outputs) in place of MLP 1, BOS left."""
    scores = []
    for index, tokens in enumerate(LISTS):
        run = forward(tiny_model(family).bridge, pad_prompts([tokens]), substitutes={mlp_site(1): Transcoded(function)})
        scores.append(CorrectMinusIncorrect([CORRECT[index]], [INCORRECT[index]])(run))
    return torch.cat(scores)


def only(features: list[int]) -> Any:
    """Return a transcoder's forward pass with every feature but these at zero, written out."""
    transcoder = random_transcoder()

    def outputs(inputs: Tensor) -> Tensor:
        activations = transcoder.encode(inputs)
        total = transcoder.b_dec_out.expand(*inputs.shape[:-1], 16)
        for feature in features:
            total = total + activations[..., feature, None] * transcoder.W_dec[feature]
        return total

    return outputs


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("batch", [64, 2])
def test_keeping_the_first_n_features_is_the_transcoder_of_these_alone(family: str, batch: int) -> None:
    transcoder = random_transcoder()
    task = Task(tiny_model(family).bridge, PROMPTS, METRIC, batch=batch)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(5)).tolist()
    curve = keep_top_features(task, {mlp_site(1): transcoder}, order, [0, 3, 24])
    for row, count in zip(curve, (0, 3, 24), strict=True):
        torch.testing.assert_close(row, by_hand(family, only(order[:count])), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(curve[2], task.scores({mlp_site(1): Transcoded(transcoder)}), rtol=1e-4, atol=1e-6)
    assert (curve[0] - curve[2]).abs().max() > 1e-4


def test_leaving_a_feature_out_is_the_transcoder_of_all_others() -> None:
    task = Task(tiny_model().bridge, PROMPTS, METRIC)
    found = leave_one_out(task, {mlp_site(1): random_transcoder()}, [4, 9])
    for row, feature in zip(found, (4, 9), strict=True):
        expected = by_hand("gpt2", only([other for other in range(24) if other != feature]))
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-6)
    within = leave_one_out(task, {mlp_site(1): random_transcoder()}, [4], kept=[4, 5, 6])
    torch.testing.assert_close(within[0], by_hand("gpt2", only([5, 6])), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_no_neuron_leaves_the_mlps_bias_and_every_neuron_the_model(family: str) -> None:
    task = Task(tiny_model(family).bridge, PROMPTS, METRIC)
    site = autoencoder_site("blocks.1.mlp.hook_post", 64)
    curve = keep_top_neurons(task, [site], list(range(64)), [0, 64])
    torch.testing.assert_close(curve[1], task.scores(), rtol=1e-5, atol=1e-7)
    bias = forward(tiny_model(family).bridge, PROMPTS, substitutes={site: ZeroAblated()})
    assert torch.equal(curve[0], METRIC(bias))
    if family == "llama":  # no bias: the MLP is gone
        torch.testing.assert_close(curve[0], task.scores({mlp_site(1): ZeroAblated()}), rtol=1e-5, atol=1e-7)


# ---- logit lens


def test_the_effect_on_an_answer_is_decoder_by_unembedding_less_the_vocabularys_mean() -> None:
    W_U = torch.tensor([[1.0, 0.0, 2.0], [0.0, 4.0, -1.0]])
    plain = ModelWeights(W_E=torch.zeros(3, 2), W_U=W_U, final_norm=Norm("none"), layers=())
    # row (1, 2): logits 1, 8, 0, mean 3
    assert logit_effects(torch.tensor([[1.0, 2.0]]), plain, [2, 0]).tolist() == [[-3.0, -2.0]]
    gained = ModelWeights(torch.zeros(3, 2), W_U, Norm("rms", torch.tensor([2.0, 1.0])), ())
    # row (2, 2): logits 2, 8, 2, mean 4
    assert logit_effects(torch.tensor([[1.0, 2.0]]), gained, [1]).tolist() == [[4.0]]
    centred = ModelWeights(torch.zeros(3, 2), W_U, Norm("layer"), ())
    # (1, 2) less its mean is (−.5, .5): logits −.5, 2, −1.5, mean 0
    assert logit_effects(torch.tensor([[1.0, 2.0]]), centred, [0, 1, 2]).tolist() == [[-0.5, 2.0, -1.5]]
