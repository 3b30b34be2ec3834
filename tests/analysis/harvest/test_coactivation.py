from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from tailrace.analysis.harvest.activations import KeptPairs
from tailrace.analysis.harvest.coactivation import FEWEST_ROWS, count_coactivation, rows_counted
from tailrace.analysis.harvest.one_pass import Plan, gather
from tailrace.analysis.tables import coactivation as table
from tests.support.analysis_subject import FakeCoder, FakeSplit, activations, subject

PLAN = Plan(block_rows=40, activation_rows=10**6)


@pytest.fixture(scope="module")
def analysed():
    return subject(FakeSplit(60, unit_rows=50), FakeCoder(d_sae=40))


@pytest.fixture(scope="module")
def kept(analysed):
    return gather(analysed, PLAN, [KeptPairs])[KeptPairs]


def by_brute_force(is_active, floor=0.0, n_top=10):
    """Return (feature, other) → (both, jaccard, φ, rank) with φ by NumPy's correlation."""
    n_rows = len(is_active)
    listed = [f for f in range(is_active.shape[1]) if is_active[:, f].sum() >= max(FEWEST_ROWS, floor * n_rows)]
    found = {}
    for feature in listed:
        scored = []
        for other in listed:
            one, two = is_active[:, feature], is_active[:, other]
            both = int((one & two).sum())
            if other != feature and both and not one.all() and not two.all():
                phi = np.corrcoef(one, two)[0, 1]
                if phi > 1e-12:
                    scored.append((round(-phi, 12), other, both, both / int((one | two).sum()), phi))
        for rank, (_, other, both, jaccard, phi) in enumerate(sorted(scored)[:n_top]):
            found[feature, other] = (both, pytest.approx(jaccard), pytest.approx(phi), rank)
    return found


def as_found(parts):
    found = {}
    for part in parts:
        for row in zip(*part, strict=True):
            feature, other, *rest = (value.item() for value in row)
            found[feature, other] = tuple(rest)
    return found


def test_counts_and_measures_equal_brute_force(analysed, kept):
    found = as_found(count_coactivation(kept, 0.0))
    assert found == by_brute_force(activations(analysed) > 0)
    assert len(found) > 50


@pytest.mark.parametrize("count_bytes", [1, 500, 10**6])
@pytest.mark.parametrize("piece_pairs", [1, 100, 10**6])
def test_little_memory_gives_the_same(kept, count_bytes, piece_pairs):
    found = as_found(count_coactivation(kept, 0.0, count_bytes=count_bytes, piece_pairs=piece_pairs))
    assert found == as_found(count_coactivation(kept, 0.0))


def test_features_below_the_floor_are_left_out(analysed, kept):
    is_active = activations(analysed) > 0
    expected = by_brute_force(is_active, floor=0.45)
    assert as_found(count_coactivation(kept, 0.45)) == expected
    assert {feature for feature, _ in expected} < {feature for feature, _ in by_brute_force(is_active)}


def test_only_the_first_rows_are_counted_where_counting_would_take_long(analysed, kept):
    is_active = activations(analysed) > 0
    steps = np.cumsum(is_active.sum(axis=1) ** 2)
    assert rows_counted(kept, int(steps[199])) == 200
    assert rows_counted(kept, int(steps[199]) - 1) == 199
    assert rows_counted(kept) == len(is_active)
    assert as_found(count_coactivation(kept, 0.0, n_rows=200)) == by_brute_force(is_active[:200])


def test_the_table_is_sorted_and_says_what_was_counted(analysed, kept):
    harvest = gather(analysed, PLAN, table.TABLE.needs)
    rows = pa.Table.from_batches(table.compute(harvest, analysed, PLAN)).to_pylist()
    assert [(row["feature"], row["rank"]) for row in rows] == sorted((row["feature"], row["rank"]) for row in rows)
    assert table.TABLE.facts(harvest, analysed, PLAN) == {"coactivation_rows": "420", "fewest_active_rows": "10"}
