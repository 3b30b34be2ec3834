"""The orders that the benchmark of the shuffle compares are those it says, and its intervals are right."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.shuffle_worth import interval, mixed


@pytest.mark.parametrize("buffer_rows", [4, 10, 64, 100, 1000])
def test_a_buffer_serves_every_row_once(buffer_rows: int) -> None:
    text = np.arange(100)
    assert sorted(mixed(text, buffer_rows, seed=0)) == text.tolist()


def test_a_buffer_serves_no_row_before_it_is_read() -> None:
    served = mixed(np.arange(1000), 100, seed=0)
    # half a buffer is served at a time, and the first half waits for a full buffer
    read = 100 + np.arange(1000) // 50 * 50
    assert (served < read).all()
    assert np.abs(served[:50] - np.arange(50)).max() > 10  # permuted, not passed through


def test_a_buffer_of_all_rows_is_one_permutation() -> None:
    served = mixed(np.arange(1000), 1000, seed=0)
    assert abs(np.corrcoef(served, np.arange(1000))[0, 1]) < 0.15  # five standard errors of 1/√1000


def test_the_interval_is_student_s_over_log_ratios() -> None:
    mean, low, high = interval([math.exp(x) for x in (0.01, 0.02, 0.03)])
    # standard error 0.01 / √3, times 4.303
    assert [math.log(x) for x in (mean, low, high)] == pytest.approx([0.02, 0.02 - 0.024843, 0.02 + 0.024843], abs=1e-6)
