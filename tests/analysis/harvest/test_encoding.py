"""The sparse way from rows to active pairs gives what a transcoder's own ``encode`` and ``forward`` give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tailrace.analysis.harvest.encoding import DenseEncoder, SparseEncoder, expected_density, open_encoder
from tailrace.training.architectures import ARCHITECTURES, BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK
from tailrace.training.kernels.pairs import Pairs
from tests.support.analysis_subject import FakeCoder, random

D_IN, D_OUT, D_SAE, ROWS = 16, 12, 96, 70
SETTINGS = {
    "relu": ReLU(),
    "topk": TopK(k=5),
    "batch_topk": BatchTopK(k=5),
    "jumprelu": JumpReLU(),
    "gated": Gated(),
    "matryoshka": Matryoshka(k=5, levels=3),
}
KINDS = [architecture.model_fields["kind"].default for architecture in ARCHITECTURES]


def transcoder_of(kind: str, *, skip: bool = False) -> Any:
    """Return a transcoder with random weights and few active features, as it is loaded."""
    made: Any = SETTINGS[kind].model_copy(update={"input_bias": False, "skip": skip}).build(D_IN, D_OUT, D_SAE)
    rng = random(3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(torch.from_numpy(rng.standard_normal(parameter.shape)))
            if name == "b_enc":
                parameter.sub_(4)
        if kind in ("batch_topk", "matryoshka"):
            made.threshold.fill_(1.5)
    return made.eval().requires_grad_(False)


def rows(scale=1.0):
    return torch.from_numpy(random(4).standard_normal((ROWS, D_IN), dtype=np.float32)) * scale


def dense_of(encoded):
    acts = np.zeros((len(encoded.predicted), encoded.pairs.d_sae), np.float32)
    acts[encoded.pairs.rows, encoded.pairs.features] = encoded.values
    return acts


def assert_in_order(pairs: Pairs):
    place = pairs.rows * pairs.d_sae + pairs.features
    assert np.all(np.diff(place) > 0)
    assert np.array_equal(pairs.offsets, np.searchsorted(pairs.rows, np.arange(pairs.n_rows + 1)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_pairs_values_and_predictions_are_those_of_the_transcoder(kind, scale):
    made, inputs = transcoder_of(kind, skip=True), rows(scale)
    encoder = open_encoder(made, "cpu", 0.01)
    assert isinstance(encoder, SparseEncoder)
    with torch.inference_mode():
        found = encoder(inputs)
        acts, predicted = made.encode(inputs).numpy(), made(inputs).numpy()
    assert 0 < len(found.values) < acts.size / 2
    assert_in_order(found.pairs)
    assert np.array_equal(dense_of(found) > 0, acts > 0)
    np.testing.assert_allclose(dense_of(found), acts, rtol=1e-4, atol=1e-5 * scale)
    np.testing.assert_allclose(found.predicted, predicted, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_way_is_the_transcoder_a_piece_at_a_time(kind, monkeypatch):
    made, inputs = transcoder_of(kind), rows()
    monkeypatch.setattr("tailrace.analysis.harvest.encoding.DENSE_BYTES", 4 * D_SAE * 16)  # pieces of 16 rows
    with torch.inference_mode():
        found = DenseEncoder(made)(inputs)
        acts = made.encode(inputs).numpy()
    assert_in_order(found.pairs)
    np.testing.assert_allclose(dense_of(found), acts, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.predicted, made(inputs).numpy(), rtol=1e-4, atol=1e-5)


def test_topk_fixes_how_many_pairs_are_active_at_most():
    assert expected_density(transcoder_of("topk")) == 5 / D_SAE
    assert expected_density(transcoder_of("batch_topk")) is None  # in use a threshold decides


def test_the_sparse_way_is_taken_where_few_pairs_are_active_and_all_weights_finite():
    made = transcoder_of("relu")
    assert isinstance(open_encoder(made, "cpu", 0.5), DenseEncoder)
    assert isinstance(open_encoder(made, "cpu", None), DenseEncoder)
    assert isinstance(open_encoder(FakeCoder(), "cpu", 0.01), DenseEncoder)
    made.W_enc[3, 3] = torch.nan
    assert isinstance(open_encoder(made, "cpu", 0.01), DenseEncoder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_is_not_passed_over(kind):
    inputs = rows()
    inputs[7, 2] = torch.nan
    with torch.inference_mode():
        predicted = open_encoder(transcoder_of(kind), "cpu", 0.01)(inputs).predicted
    assert np.isfinite(predicted[:7]).all()
    assert not np.isfinite(predicted[7]).all()
