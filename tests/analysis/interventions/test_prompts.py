"""Prompts of different lengths run in one batch as they would alone, and every metric reads each at its own end."""

from __future__ import annotations

import pytest
import torch

from tailrace.analysis.interventions.forward import forward
from tailrace.analysis.interventions.metrics import FeaturePreActivation, LastLogits, LogitDifference
from tailrace.analysis.interventions.prompts import pad_prompts
from tailrace.analysis.splice.replacement import Transcoded
from tailrace.storage.errors import ModelError, TextError
from tests.support.spliced_models import mlp_site, random_transcoder, tiny_model

LISTS = [[2, 9, 17, 33, 40, 11], [2, 21, 8], [2, 60, 61, 62]]
FAMILIES = ("gpt2", "llama", "gemma2")


def test_padding_repeats_the_last_token_and_is_no_token() -> None:
    prompts = pad_prompts(LISTS)
    assert prompts.tokens[1].tolist() == [2, 21, 8, 8, 8, 8]
    assert prompts.lengths.tolist() == [6, 3, 4]
    assert prompts.is_token[1].tolist() == [True, True, True, False, False, False]
    assert prompts.at(-1).nonzero().tolist() == [[0, 5], [1, 2], [2, 3]]
    assert prompts.at(1).nonzero().tolist() == [[0, 1], [1, 1], [2, 1]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_padded_prompt_gives_the_logits_it_gives_alone(family: str, is_replaced: bool) -> None:
    # the reference read every row at the batch's last position, which is padding for the shorter ones
    bridge = tiny_model(family).bridge
    substitutes = {mlp_site(1): Transcoded(random_transcoder())} if is_replaced else {}
    together = forward(bridge, pad_prompts(LISTS), substitutes=substitutes)
    for index, tokens in enumerate(LISTS):
        alone = forward(bridge, pad_prompts([tokens]), substitutes=substitutes)
        torch.testing.assert_close(together.last_logits[index], alone.logits[0, -1], rtol=1e-5, atol=1e-5)
    assert (together.logits[1, -1] - together.last_logits[1]).abs().max() > 1e-3


def test_metrics_read_each_prompt_at_its_own_last_token() -> None:
    run = forward(tiny_model().bridge, pad_prompts(LISTS))
    rows = torch.stack([run.logits[0, 5], run.logits[1, 2], run.logits[2, 3]]).double()
    assert torch.equal(LogitDifference(7, 8)(run), rows[:, 7] - rows[:, 8])
    assert torch.equal(LogitDifference([7, 8, 9], 8)(run), rows[[0, 1, 2], [7, 8, 9]] - rows[:, 8])
    assert torch.equal(LastLogits(lambda logits: logits.softmax(1)[:, 4])(run), rows.softmax(1)[:, 4])


def test_a_features_pre_activation_is_its_encoder_row_on_what_its_site_reads() -> None:
    transcoder = random_transcoder()
    metric = FeaturePreActivation(transcoder, mlp_site(1), 7)
    run = forward(tiny_model().bridge, pad_prompts(LISTS), hooks=metric.hooks)
    inputs = run.observed["blocks.1.mlp.hook_in"]
    expected = torch.stack([inputs[0, 5], inputs[1, 2], inputs[2, 3]]) @ transcoder.W_enc[7] + transcoder.b_enc[7]
    torch.testing.assert_close(metric(run), expected.double(), rtol=1e-5, atol=1e-6)
    second = FeaturePreActivation(transcoder, mlp_site(1), 7, position=1)
    torch.testing.assert_close(
        second(run), (inputs[:, 1] @ transcoder.W_enc[7] + transcoder.b_enc[7]).double(), rtol=1e-5, atol=1e-6
    )


def test_batches_of_prompts_lose_the_padding_they_do_not_need() -> None:
    pieces = list(pad_prompts(LISTS).batches(2))
    assert [part for part, _ in pieces] == [slice(0, 2), slice(2, 3)]
    assert pieces[1][1].tokens.tolist() == [LISTS[2]]


def test_bad_prompts_positions_and_features_are_named() -> None:
    with pytest.raises(TextError, match="prompts 1, 2 have no tokens"):
        pad_prompts([[1], [], []])
    with pytest.raises(TextError, match="there are no prompts"):
        pad_prompts([])
    with pytest.raises(TextError, match=r"position 4 does not exist in prompt 1 \(3 tokens\), prompt 2 \(4 tokens\)"):
        pad_prompts(LISTS).at(4)
    with pytest.raises(TextError, match="position -5 does not exist in prompt 1"):
        pad_prompts(LISTS).at(-5)
    with pytest.raises(ModelError, match="site layer1: there is no feature 24; there are 0 to 23"):
        FeaturePreActivation(random_transcoder(), mlp_site(1), 24)
    with pytest.raises(ModelError, match=r"this model has no hook 'blocks\.1\.nothing'"):
        forward(tiny_model().bridge, pad_prompts(LISTS), hooks=["blocks.1.nothing"])
