"""The most similar features of two dictionaries: against counting by hand, and never more than chance where they have
nothing to do with each other.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tailrace.analysis.harvest.coactivation import FEWEST_ROWS
from tailrace.analysis.matches import (
    Fires,
    Matches,
    Similar,
    fires,
    most_similar_decoders,
    most_similar_rows,
    next_context,
    rotated,
)

N_ROWS = 900


def drawn(n_features: int, seed: int) -> np.ndarray:
    """(rows, features) whether each fires."""
    rng = np.random.default_rng(seed)
    return rng.random((N_ROWS, n_features)) < rng.uniform(0.02, 0.3, n_features)


def as_fires(active: np.ndarray) -> Fires:
    feature, row = np.nonzero(active.T)
    return fires(feature, row, active.shape[1], len(active))


def test_the_nearest_decoder_rows_are_those_of_a_shuffled_copy() -> None:
    own = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    found = most_similar_decoders(3 * own, own[order])
    assert order[torch.from_numpy(found.feature)].tolist() == list(range(50))
    np.testing.assert_allclose(found.similarity, 1, atol=1e-6)
    own[7] = 0
    assert most_similar_decoders(own, own).feature[7] == -1
    assert np.isnan(most_similar_decoders(own, own).similarity[7])


def test_a_rotation_keeps_a_dictionary_s_own_cosines_and_is_the_same_for_a_seed() -> None:
    decoder = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    turned = rotated(decoder, 3)
    torch.testing.assert_close(turned @ turned.T, decoder @ decoder.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(turned, rotated(decoder, 3))
    assert not torch.allclose(turned, decoder, atol=0.1)


def test_phi_and_jaccard_are_those_counted_by_hand() -> None:
    own, other = drawn(7, 0), drawn(9, 1)
    other[:, 4] = own[:, 2] ^ (np.arange(N_ROWS) % 50 == 0)
    own[:, 5] = np.arange(N_ROWS) < FEWEST_ROWS - 1
    found = most_similar_rows(as_fires(own), as_fires(other))
    phi = np.corrcoef(own.T.astype(float), other.T.astype(float))[:7, 7:]
    there = [feature for feature in range(7) if feature != 5]
    assert found.feature[there].tolist() == phi[there].argmax(axis=1).tolist()
    np.testing.assert_allclose(found.similarity[there], phi[there].max(axis=1), rtol=1e-9)
    assert (found.feature[5], np.isnan(found.similarity[5])) == (-1, True)
    assert found.feature[2] == 4
    assert found.jaccard is not None
    both, either = (own[:, 2] & other[:, 4]).sum(), (own[:, 2] | other[:, 4]).sum()
    assert found.jaccard[2] == pytest.approx(both / either)


def test_features_that_fire_on_too_few_rows_are_nobody_s_match(monkeypatch: pytest.MonkeyPatch) -> None:
    own = drawn(3, 0)
    other = own.copy()
    own[FEWEST_ROWS - 1 :, 0] = other[FEWEST_ROWS - 1 :, 1] = False
    monkeypatch.setattr("tailrace.analysis.matches.COUNT_BYTES", 1)  # a feature at a time
    found = most_similar_rows(as_fires(own), as_fires(other))
    assert (found.feature[0], found.feature[2]) == (-1, 2)
    assert 1 not in found.feature


def test_the_row_at_the_same_position_of_the_next_context() -> None:
    contexts, positions = np.array([3, 3, 3, 8, 8, 9]), np.array([0, 1, 2, 0, 2, 1])
    assert next_context(contexts, positions).tolist() == [3, -1, 4, -1, -1, 1]


def test_moved_rows_are_those_with_a_new_name() -> None:
    moved = as_fires(np.array([[True, False], [True, True], [False, True]])).moved(np.array([1, -1, 0]), 2)
    assert (moved.rows.tolist(), moved.features.tolist(), moved.n_rows) == ([1, 0], [0, 1], 2)


@pytest.mark.parametrize("seed", range(3))
def test_unrelated_dictionaries_match_no_more_than_the_null_and_a_copy_altogether(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(800, 32, generator=generator), torch.randn(800, 32, generator=generator)
    unrelated = Matches(most_similar_decoders(a, b), most_similar_decoders(a, rotated(b, 1)))
    copy = Matches(most_similar_decoders(a, a), most_similar_decoders(a, rotated(a, 1)))
    assert unrelated.are_matched.mean() < 0.03  # 0.01 ± three standard errors of 800
    assert copy.are_matched.all()


def test_a_null_without_any_match_counts_every_match() -> None:
    nothing = Similar(np.array([-1, -1]), np.array([np.nan, np.nan]))
    found = Similar(np.array([0, -1]), np.array([0.1, np.nan]))
    assert Matches(found, nothing).are_matched.tolist() == [True, False]
    assert np.isnan(Matches(found, nothing).chance)
