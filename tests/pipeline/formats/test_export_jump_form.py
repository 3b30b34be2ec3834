"""The common form of exports equals every architecture, and TopK's thresholds are the right order statistics."""

from __future__ import annotations

import pytest
import torch

from tailrace.analysis.weights.model_weights import Norm
from tailrace.pipeline.formats.calibration import calibrate, thresholds
from tailrace.pipeline.formats.jump_form import jump_form
from tailrace.storage.activation_cache import open_cache
from tailrace.training.architectures import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK
from tailrace.training.loop.evaluate import evaluate, predictor
from tailrace.training.rows.batches import iter_once
from tests.support.layered_transcoders import mlp_site, publish_site_cache, random_transcoder

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


def test_every_feature_fires_on_as_many_rows_as_under_topk():
    module = random_transcoder(TopK(k=3), SITE)
    before = (module.encode(INPUTS) > 0).sum(0)
    found = thresholds(module, INPUTS)
    pre = module.pre_activations(INPUTS)
    assert (before == 0).any()  # one that never fires among them
    assert ((pre > found).sum(0) == before).all()
    for feature, count in enumerate(before.tolist()):
        assert float(found[feature]) == max(0.0, float(pre[:, feature].sort(descending=True).values[count]))


def test_a_feature_that_fires_on_every_row_needs_no_threshold():
    module = random_transcoder(TopK(k=24), SITE)
    with torch.no_grad():
        module.b_enc.fill_(100)
    assert thresholds(module, INPUTS).tolist() == [0.0] * 24


def test_calibrated_topk_fires_as_often_as_before_and_says_what_that_cost(tmp_path):
    cache = open_cache(publish_site_cache(tmp_path / "cache", [SITE]))
    module = random_transcoder(TopK(k=3), SITE)
    form, cost = calibrate(module, cache, SITE, n_rows=10_000)
    train = torch.cat([batch.inputs for batch in iter_once(cache.split("train"), SITE, batch_rows=100)])
    assert ((form.encode(train) > 0).sum(0) == (module.encode(train) > 0).sum(0)).all()
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
