"""Where training begins: biases, decoder rows and encoder rows from the data or at random."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from tailrace.storage.errors import SettingsError
from tailrace.training.rows.geometric_median import geometric_median
from tailrace.training.rows.normalisation import Normalisation
from tests.support.resampled_runs import D_IN, D_OUT, SAE_SITE, PlantedSource, build, planted_rows, statistics_of

RELU = {"kind": "relu", "input_bias": True}


def test_biases_begin_as_the_means_of_the_cache() -> None:
    run = build({"architecture": RELU, "normalisation": "none"}, offset=2.0)
    sample = planted_rows(4096, 99_999, offset=2.0)  # the rows whose statistics ``build`` takes
    assert run.transcoder.b_dec is not None
    assert np.allclose(run.transcoder.b_dec.detach(), statistics_of(sample.inputs).mean, atol=1e-5)
    assert np.allclose(run.transcoder.b_dec_out.detach(), statistics_of(sample.outputs).mean, atol=1e-5)


def test_biases_begin_as_zero_if_asked_to() -> None:
    run = build({"architecture": RELU, "normalisation": "none", "bias_init": "zeros"}, offset=2.0)
    assert run.transcoder.b_dec is not None
    assert not bool(run.transcoder.b_dec.any())
    assert not bool(run.transcoder.b_dec_out.any())


@pytest.mark.parametrize("normalisation", ["none", "standard"])
def test_biases_begin_as_geometric_medians_of_inputs_and_of_outputs(normalisation: str) -> None:
    source = PlantedSource(offset=2.0)
    run = build(
        {
            "architecture": RELU,
            "normalisation": normalisation,
            "bias_init": "geometric_median",
            "bias_init_rows": 500,
        },
        row_source=source,
        offset=2.0,
    )
    assert source.asked == [(500, 0)]
    raw = source(500, 0).batch
    scales = run.normalisation
    assert isinstance(scales, Normalisation)
    assert run.transcoder.b_dec is not None
    found_in = run.transcoder.b_dec.detach() * scales.scale_in + scales.mean_in
    found_out = scales.restore(run.transcoder.b_dec_out.detach())
    # a median moves with its points, so normalising before or after makes no difference
    assert torch.allclose(found_in, geometric_median(raw.inputs).median, atol=1e-4)
    assert torch.allclose(found_out, geometric_median(raw.outputs).median, atol=1e-4)
    assert not torch.allclose(found_out, raw.outputs.mean(0).double(), atol=1e-4)


def test_a_decoder_from_data_has_the_directions_of_centred_outputs() -> None:
    source = PlantedSource(offset=2.0)
    run = build({"decoder_init": "data", "normalisation": "none"}, row_source=source, offset=2.0)
    assert source.asked == [(32, 0)]
    centred = source(32, 0).batch.outputs - run.normalisation.restore(run.transcoder.b_dec_out.detach())
    wanted = centred / centred.norm(dim=1, keepdim=True)
    assert torch.allclose(run.transcoder.W_dec.detach(), wanted.float(), atol=1e-5)


def test_with_fewer_rows_than_features_the_rest_are_random_directions(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run = build({"decoder_init": "data"}, row_source=PlantedSource(n_rows=20))
    assert "12 of 32 features begin as random directions" in caplog.text
    random = build({})
    assert torch.equal(run.transcoder.W_dec[20:], random.transcoder.W_dec[20:])
    assert not bool((run.transcoder.W_dec[:20] == random.transcoder.W_dec[:20]).all(1).any())
    assert torch.allclose(torch.linalg.vector_norm(run.transcoder.W_dec.detach(), dim=1), torch.ones(32), atol=1e-6)


def test_a_tied_encoder_is_the_decoder_and_an_independent_one_is_not() -> None:
    tied = build({"encoder_scale": 0.5}, site=SAE_SITE).transcoder
    assert torch.equal(tied.W_enc, 0.5 * tied.W_dec)
    independent = build({"encoder_scale": 0.5, "encoder_init": "independent"}, site=SAE_SITE).transcoder
    assert torch.equal(independent.W_dec, tied.W_dec)
    assert torch.allclose(torch.linalg.vector_norm(independent.W_enc.detach(), dim=1), torch.full((32,), 0.5))
    cosines = (independent.W_enc * tied.W_enc).sum(1).detach() / 0.25
    assert float(cosines.abs().mean()) < 0.5


def test_an_encoder_of_another_width_than_the_decoder_is_never_tied() -> None:
    tied, independent = (build({"encoder_init": kind}).transcoder for kind in ("tied", "independent"))
    assert D_IN != D_OUT
    assert torch.equal(tied.W_enc, independent.W_enc)


def test_a_kaiming_encoder_is_uniform_within_the_originals_bound() -> None:
    weights = build({"encoder_init": "kaiming", "encoder_scale": 1.0, "d_sae": 600}).transcoder.W_enc.detach()
    bound = (6 / 600) ** 0.5
    assert float(weights.abs().max()) <= bound
    # 7200 uniform numbers: the largest lies within 1 % of the bound, the variance is bound²/3
    assert float(weights.abs().max()) > 0.99 * bound
    assert float(weights.square().mean()) == pytest.approx(bound**2 / 3, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bias_init": "geometric_median"}, "bias_init: geometric_median"),
        ({"decoder_init": "data"}, "decoder_init: data"),
        (
            {"bias_init": "geometric_median", "decoder_init": "data"},
            "bias_init: geometric_median and decoder_init: data",
        ),
    ],
)
def test_beginning_from_rows_without_a_source_of_rows_is_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=f"{named} needs? training rows"):
        build(settings)
