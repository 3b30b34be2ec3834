"""The common form of exports equals every architecture, and TopK's threshold is the right order statistic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.model_weights import Norm
from pipeline.exports.calibration import calibrate, largest_excluded
from pipeline.exports.jump_form import jump_form, needs_calibration
from storage.activation_cache import open_cache
from tests.layered_transcoders import mlp_site, publish_site_cache, random_transcoder
from training.architectures import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK
from training.batches import iter_once
from training.evaluate import evaluate, predictor

SITE = mlp_site(0, d_in=8, d_out=5)
INPUTS = torch.randn(500, 8, generator=torch.Generator().manual_seed(3)) * 2


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", [ReLU, JumpReLU, BatchTopK, Matryoshka, Gated])
def test_the_form_with_thresholds_is_the_same_function(kind, skip):
    module = random_transcoder(kind(skip=skip), SITE)
    form = jump_form(module)
    activations = module.encode(INPUTS)
    assert 0 < int((activations > 0).sum()) < activations.numel()
    torch.testing.assert_close(form.encode(INPUTS), activations, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(form.decode(form.encode(INPUTS), INPUTS), module(INPUTS), rtol=1e-5, atol=1e-5)


def test_a_gate_that_opens_late_becomes_a_threshold_and_one_that_opens_early_none():
    module = random_transcoder(Gated(), SITE, d_sae=2)
    own = dict(module.named_parameters())
    with torch.no_grad():
        own["r_mag"].zero_()
        own["b_mag"].copy_(torch.tensor([0.5, -0.5]))  # magnitude π + 0.5 where π > 0; π − 0.5 where that is positive
    form = jump_form(module)
    assert form.threshold is not None
    assert form.threshold.tolist() == [0.5, 0.0]


def test_a_threshold_of_zero_is_plain_relu():
    module = random_transcoder(BatchTopK(), SITE)
    dict(module.named_buffers())["threshold"].zero_()
    assert jump_form(module).threshold is None


def test_topk_alone_needs_calibration():
    kinds = [ReLU, JumpReLU, BatchTopK, Matryoshka, Gated, TopK]
    assert [kind for kind in kinds if needs_calibration(random_transcoder(kind(), SITE, d_sae=64))] == [TopK]


@pytest.mark.parametrize("skip", [False, True])
def test_folding_the_norm_gives_the_same_function_of_what_comes_before_its_gain(skip):
    form = jump_form(random_transcoder(JumpReLU(skip=skip), SITE))
    weight, bias = torch.randn(8) + 1, torch.randn(8)
    folded = form.before_gain(Norm("layer", weight, bias))
    after = INPUTS * weight + bias
    torch.testing.assert_close(folded.encode(INPUTS), form.encode(after), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        folded.decode(folded.encode(INPUTS), INPUTS), form.decode(form.encode(after), after), rtol=1e-4, atol=1e-4
    )


@settings(deadline=None, max_examples=60)
@given(
    blocks=st.lists(
        st.lists(st.floats(min_value=2.0**-100, max_value=2.0**100, width=32), max_size=20), min_size=1, max_size=4
    ),
    data=st.data(),
)
def test_the_wanted_number_of_values_exceeds_the_threshold_and_no_smaller_one_would_do(blocks, data):
    values = np.sort(np.concatenate([np.array(block, np.float32) for block in blocks]))
    n_kept = data.draw(st.integers(0, len(values) + 2))
    threshold = largest_excluded(lambda: (np.array(block, np.float32) for block in blocks), n_kept)
    if n_kept >= len(values):
        assert threshold == 0
    else:
        assert threshold == values[len(values) - n_kept - 1]
    if len(np.unique(values)) == len(values):
        assert (values > np.float32(threshold)).sum() == min(n_kept, len(values))


def test_calibrated_topk_fires_as_often_as_before_and_says_what_that_cost(tmp_path):
    cache = open_cache(publish_site_cache(tmp_path / "cache", [SITE]))
    module = random_transcoder(TopK(k=3), SITE)
    form, cost = calibrate(module, cache, SITE, n_rows=10_000)
    train = torch.cat([batch.inputs for batch in iter_once(cache.split("train"), SITE, batch_rows=100)])
    pre = module.pre_activations(train)
    kept = int((module.encode(train) > 0).sum())
    # by brute force: the threshold is the largest value that does not fire when `kept` do
    assert cost.threshold == float(pre.flatten().sort(descending=True).values[kept])
    assert int((form.encode(train) > 0).sum()) == kept
    heldout = evaluate(predictor(module), iter_once(cache.split("heldout"), SITE, batch_rows=100))
    assert (cost.rows, cost.measured_on, cost.measured_rows) == (512, "heldout", 256)
    assert cost.fvu_before == pytest.approx(heldout.fvu, rel=1e-5)
    rows = torch.cat([batch.inputs for batch in iter_once(cache.split("heldout"), SITE, batch_rows=100)])
    outputs = torch.cat([batch.outputs for batch in iter_once(cache.split("heldout"), SITE, batch_rows=100)]).double()
    error = (form.decode(form.encode(rows), rows).double() - outputs).square().sum()
    assert cost.fvu_after == pytest.approx(float(error / (outputs - outputs.mean(0)).square().sum()), rel=1e-5)
    assert cost.fvu_after != cost.fvu_before
    assert cost.l0_after == pytest.approx(float((form.encode(rows) > 0).sum() / len(rows)))
    assert "FVU" in cost.sentence()
