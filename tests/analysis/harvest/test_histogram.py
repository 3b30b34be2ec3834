from __future__ import annotations

import numpy as np
import pytest

from tailrace.analysis.harvest.histogram import (
    BINS_PER_OCTAVE,
    EDGES,
    N_BINS,
    QUANTILE_RELATIVE_ERROR,
    find_bins,
    quantiles,
)
from tests.support.analysis_subject import random


def test_sixteen_bins_double_the_value():
    assert EDGES[0] == 2.0**-16
    assert EDGES[BINS_PER_OCTAVE] == 2.0**-15
    assert EDGES[-1] == 2.0**16


def test_a_value_on_an_edge_is_in_the_bin_above_and_the_next_smaller_float_below():
    inner = EDGES[1:-1]
    assert np.array_equal(find_bins(inner), np.arange(1, N_BINS))
    assert np.array_equal(find_bins(np.nextafter(inner, np.float32(0))), np.arange(N_BINS - 1))


def test_bins_are_those_of_a_binary_search_for_any_positive_float():
    bits = random(0).integers(1, 0x7F800000, 100_000, dtype=np.uint32)
    values = np.concatenate([bits.view(np.float32), np.exp(random(1).normal(0, 3, 100_000)).astype(np.float32)])
    assert np.array_equal(find_bins(values), np.searchsorted(EDGES[1:-1], values, side="right"))


def test_values_beyond_the_range_count_in_the_outermost_bins():
    assert find_bins(np.array([1e-30, 1e30], np.float32)).tolist() == [0, N_BINS - 1]


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("n", [1, 2, 9, 1000])
def test_quantiles_are_within_the_stated_error_of_the_exact_ones(spread, n):
    values = np.exp(random(n).normal(0, spread, n)).astype(np.float32)
    counts = np.bincount(find_bins(values), minlength=N_BINS)[None]
    shares = (0.1, 0.5, 0.9, 0.99)
    exact = np.quantile(values, shares, method="inverted_cdf")
    found = quantiles(counts, shares, np.array([values.max()]))[0]
    assert np.all(np.abs(found - exact) <= QUANTILE_RELATIVE_ERROR * exact)
    assert QUANTILE_RELATIVE_ERROR < 0.022


def test_a_quantile_never_exceeds_the_largest_value():
    largest = np.float32(1.0)  # low edge of its bin, whose middle is 1.02
    counts = np.bincount(find_bins(np.array([largest])), minlength=N_BINS)[None]
    assert quantiles(counts, (0.5,), np.array([largest]))[0, 0] == 1.0


def test_an_empty_histogram_has_no_quantiles():
    assert np.isnan(quantiles(np.zeros((1, N_BINS), np.int64), (0.5,), np.zeros(1, np.float32))[0, 0])
