"""Ends of large products, effects on logits, neighbours and pullbacks equal what whole matrices give."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from tailrace.analysis.weights import extremes, unembedding
from tailrace.analysis.weights.extremes import nearest_decoders
from tailrace.analysis.weights.model_weights import Norm
from tailrace.analysis.weights.pullback import mean_input_gradient, overlap, pullback
from tailrace.analysis.weights.stream import write_point
from tailrace.analysis.weights.unembedding import N_BINS, counted_by_sorting, token_effects
from tailrace.storage.errors import ModelError
from tests.support.made_up_weights import D_MODEL, D_VOCAB, made_up_weights, normalised


def random(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(extremes, "NUMBERS_AT_ONCE", 3 * D_VOCAB)


def test_ends_are_those_of_the_sorted_row_and_do_not_overlap() -> None:
    rows, columns = random(10, 4), random(4, 13, seed=4)
    products = rows @ columns
    for n, n_bottom in ((3, 3), (8, 5), (20, 0)):
        ends = extremes.ends_of_products(rows, columns, n)
        order = products.argsort(dim=1, descending=True)
        assert ends.top.indices.tolist() == order[:, :n].tolist()
        assert ends.bottom.indices.tolist() == order.flip(1)[:, :n_bottom].tolist()
        np.testing.assert_allclose(ends.top.values, products.sort(dim=1, descending=True).values[:, :n], rtol=1e-5)


def test_effects_on_tokens_are_decoder_rows_through_every_gain_on_the_way() -> None:
    weights = made_up_weights("layer")
    decoder = random(8, D_MODEL)
    writes = write_point("blocks.2.mlp.hook_out", weights)
    assert writes is not None
    seen: list[int] = []
    found = token_effects(decoder, writes, weights, progress=seen.append)
    stream = normalised(weights.layers[2].norm_mlp_out, decoder.double())
    expected = (normalised(weights.final_norm, stream) @ weights.W_U.double()).numpy()
    order = np.argsort(-expected, axis=1)
    assert found.promoted.indices.tolist() == order[:, :10].tolist()
    assert found.suppressed.indices.tolist() == order[:, ::-1][:, :10].tolist()
    np.testing.assert_allclose(found.promoted.values, -np.sort(-expected, axis=1)[:, :10], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.suppressed.values, np.sort(expected, axis=1)[:, :10], rtol=1e-4, atol=1e-5)
    assert seen == [3, 3, 2]


def test_the_histogram_counts_every_token_between_its_own_edges() -> None:
    weights = made_up_weights("rms")
    writes = write_point("blocks.0.hook_mlp_out", weights)
    assert writes is not None
    decoder = random(4, D_MODEL)
    found = token_effects(decoder, writes, weights)
    scores = torch.cat(list(extremes.products(normalised(weights.final_norm, decoder), weights.W_U))).numpy()
    for row, counts, edges in zip(scores, found.histogram, found.histogram_edges, strict=True):
        assert edges[0] == row.min()
        assert edges[-1] == row.max()
        np.testing.assert_allclose(edges, np.linspace(row.min(), row.max(), N_BINS + 1), rtol=1e-5, atol=1e-6)
        inside = [(row >= low) & (row < high) for low, high in pairwise(edges)]
        inside[-1] |= row == edges[-1]
        assert counts.tolist() == [int(bin_.sum()) for bin_ in inside]
        assert counts.sum() == D_VOCAB
    on_gpu = counted_by_sorting(torch.from_numpy(scores), torch.from_numpy(found.histogram_edges))
    assert np.array_equal(on_gpu.numpy(), found.histogram)


def test_a_decoder_row_of_zeros_touches_no_token() -> None:
    weights = made_up_weights()
    writes = write_point("blocks.0.hook_mlp_out", weights)
    assert writes is not None
    found = token_effects(torch.zeros(1, D_MODEL), writes, weights)
    assert found.histogram.sum() == D_VOCAB
    assert not found.histogram_edges.any()
    on_gpu = counted_by_sorting(torch.zeros(1, D_VOCAB), torch.from_numpy(found.histogram_edges))
    assert np.array_equal(on_gpu.numpy(), found.histogram)
    assert not found.promoted.values.any()


def test_weights_that_are_not_finite_are_refused_rather_than_counted() -> None:
    weights = made_up_weights()
    writes = write_point("blocks.0.hook_mlp_out", weights)
    assert writes is not None
    with pytest.raises(ModelError, match="not finite"):
        token_effects(torch.full((1, D_MODEL), torch.nan), writes, weights)


def test_a_bin_edge_belongs_to_the_bin_above_it() -> None:
    scores = np.array([[0, 1, 2, 2.9999998, 3, 50]], np.float32)
    edges = np.arange(51, dtype=np.float32)[None]
    counts = np.zeros((1, 50), np.int32)
    unembedding._count_into_bins(scores, edges, counts)
    assert counts[0, [0, 1, 2, 3, 49]].tolist() == [1, 1, 2, 1, 1]


def test_nearest_decoders_are_those_of_largest_cosine_without_the_feature_itself() -> None:
    decoder = random(12, 5)
    decoder[4] = 3 * decoder[9]  # the same direction at another length
    decoder[7] = 0
    found = nearest_decoders(decoder, 4)
    unit = decoder.double() / decoder.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
    cosines = (unit @ unit.T).numpy()
    np.fill_diagonal(cosines, -np.inf)
    np.testing.assert_allclose(found.values, -np.sort(-cosines, axis=1)[:, :4], atol=1e-6)
    assert found.indices[4, 0] == 9
    assert found.values[4, 0] == pytest.approx(1)
    assert all(feature not in row for feature, row in enumerate(found.indices))
    assert nearest_decoders(decoder[:3], 10).indices.shape == (3, 2)


def test_a_pullback_is_what_the_direction_reads_of_each_decoder_row() -> None:
    weights = made_up_weights()
    writes = write_point("blocks.1.mlp.hook_out", weights)
    assert writes is not None
    decoder, direction = random(9, D_MODEL), random(D_MODEL, seed=5)
    expected = normalised(weights.layers[1].norm_mlp_out, decoder.double()) @ direction.double()
    torch.testing.assert_close(pullback(decoder, writes, direction).double(), expected, rtol=1e-5, atol=1e-5)


def test_mean_input_gradient_weighs_rows_alike_however_they_are_cut() -> None:
    # a: means 0.5, 1 and 0; mean of the means of blocks of 3 rows and 1 row would be (1/3 + 1) / 2 for the first
    activations = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 2, 0], [1, 0, 0]])
    connection = torch.tensor([2.0, -3.0, 5.0])
    for sizes in ((4,), (3, 1), (1, 1, 2)):
        found = mean_input_gradient(connection, activations.split(sizes))
        assert found.mean.tolist() == [1, -3, 0]
        assert found.mean_when_active.tolist() == [2, -6, 0]  # a negative product counts like a positive one
        assert found.frequency.tolist() == [0.5, 0.5, 0]  # a feature that never fires has frequency zero, not 1 / rows


def test_mean_input_gradient_of_chosen_rows_is_the_mean_over_those_rows() -> None:
    activations = random(3, 5, 7).relu()
    places = torch.tensor([[0, 4], [2, 1], [2, 3]])
    connection = random(7, seed=6)
    chosen = activations[places[:, 0], places[:, 1]]
    expected = torch.stack([activations[c, p] * connection for c, p in places.tolist()]).double().mean(0)
    np.testing.assert_allclose(mean_input_gradient(connection, [chosen]).mean, expected, rtol=1e-6, atol=1e-7)


def test_a_mean_over_no_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="no rows"):
        mean_input_gradient(torch.ones(3), [])


def test_overlap_counts_features_that_both_rank_among_the_first() -> None:
    one, other = np.array([5.0, 4, 3, 2, 1]), np.array([1.0, 5, 4, 3, 2])
    assert overlap(one, other, [1, 2, 3, 5]) == [0, 0.5, 2 / 3, 1]
    assert overlap(np.zeros(4), np.zeros(4), [2]) == [1]
    with pytest.raises(ValueError, match=r"sizes \[0, 9\]"):
        overlap(one, other, [0, 9])


def test_a_norm_without_a_gain_lets_directions_pass() -> None:
    weights = made_up_weights("rms")
    bare = type(weights)(weights.W_E, weights.W_U, Norm("rms"), weights.layers)
    writes = write_point("blocks.0.hook_mlp_out", bare)
    assert writes is not None
    found = token_effects(weights.W_U.T[:1].contiguous(), writes, bare)
    assert found.promoted.values[0, 0] == pytest.approx(float((weights.W_U.T[0] @ weights.W_U).max()), rel=1e-5)
