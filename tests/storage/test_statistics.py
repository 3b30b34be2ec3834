"""Statistics of activations: right on a case done by hand, the same however rows are cut up, off by a stated bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tailrace.storage.artifact import canonical_json
from tailrace.storage.bfloat16 import bits_to_float32, float32_to_bits
from tailrace.storage.compiled import CompiledLoop
from tailrace.storage.statistics import SiteStatistics, StatisticsRecord, _sum_blocks

BLOCK_ERROR = 128 * 2.0**-24
"""Relative error of a block's float32 sum, of the mean magnitude of what is summed (module docstring)."""


def gather(rows: np.ndarray, cuts: list[int] | None = None) -> SiteStatistics:
    statistics = SiteStatistics(rows.shape[1])
    for piece in np.split(rows, sorted(cuts or [])):
        if len(piece):
            assert statistics.add(piece) is None
    return statistics


def heavy_tailed(n_rows: int, width: int, seed: int = 0) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(seed))
    rows = generator.standard_normal((n_rows, width)) * np.exp(generator.standard_normal((n_rows, 1)) * 1.5)
    rows[:, 0] += 50
    return rows.astype(np.float32)


def test_a_case_done_by_hand() -> None:
    # norms 5, 13, 0; column means 8/3 and 16/3; E[x²] = 34/3 and 160/3
    statistics = gather(np.array([[3, 4], [5, 12], [0, 0]], np.float32))
    assert statistics.n_rows == 3
    assert statistics.mean.tolist() == pytest.approx([8 / 3, 16 / 3])
    assert statistics.variance.tolist() == pytest.approx([34 / 3 - 64 / 9, 160 / 3 - 256 / 9])
    assert statistics.mean_norm == pytest.approx(6)
    assert statistics.mean_square_norm == pytest.approx((25 + 169) / 3)
    assert (statistics.minimum, statistics.maximum) == (0, 12)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_dtype_is_read_as_the_numbers_it_holds(dtype: str) -> None:
    values = np.array([[1.5, -2.0], [0.25, 8.0]], np.float32)
    statistics = gather(float32_to_bits(values) if dtype == "bfloat16" else values.astype(dtype))
    assert statistics.total.tolist() == [1.75, 6.0]
    assert statistics.total_squares.tolist() == [2.3125, 68.0]


@given(st.integers(1, 700), st.lists(st.integers(0, 5), max_size=4))
def test_merged_pieces_are_the_whole_when_cut_at_blocks(n_rows: int, blocks: list[int]) -> None:
    rows = heavy_tailed(n_rows, 4)
    pieces = [gather(piece) for piece in np.split(rows, sorted(128 * block for block in blocks)) if len(piece)]
    merged = SiteStatistics(4)
    for piece in pieces:
        merged.merge(piece)
    whole = gather(rows)
    assert merged.n_rows == whole.n_rows
    assert (merged.minimum, merged.maximum) == (whole.minimum, whole.maximum)
    assert np.array_equal(merged.energy_counts, whole.energy_counts)
    # pieces are summed about the mean of their own first block: float32 rounding of each block differs, no more
    spread = np.abs(rows).sum(axis=0)
    np.testing.assert_allclose(merged.total, whole.total, rtol=0, atol=float(spread.max()) * 256 * 2.0**-24)
    np.testing.assert_allclose(merged.total_squares, whole.total_squares, rtol=256 * 2.0**-24)
    assert merged.total_norm == pytest.approx(whole.total_norm, rel=1e-12)


def test_variance_survives_a_mean_a_thousand_times_larger() -> None:
    rows = np.random.default_rng(0).normal(1000.0, 1.0, (4096, 3)).astype(np.float32)
    exact = rows.astype(np.float64).var(axis=0)
    # rows themselves are rounded to 2^-14 of their deviation at this offset; the sums must add nothing to that
    np.testing.assert_allclose(gather(rows).variance, exact, rtol=1e-5)
    np.testing.assert_allclose(gather(rows, [1000, 2500]).variance, exact, rtol=1e-5)


def test_the_same_pieces_merged_in_the_same_order_give_the_same_bits() -> None:
    rows = heavy_tailed(1000, 8)
    first, second = gather(rows, [300, 501]), gather(rows, [300, 501])
    assert canonical_json(first.as_json()) == canonical_json(second.as_json())


@given(st.lists(st.integers(0, 2000), max_size=5), st.integers(0, 5))
def test_means_and_variances_are_those_of_float64_within_the_stated_error(cuts: list[int], seed: int) -> None:
    rows = heavy_tailed(2000, 16, seed)
    exact = rows.astype(np.float64)
    statistics = gather(rows, cuts)
    mean_error = np.abs(statistics.mean - exact.mean(0))
    assert (mean_error <= BLOCK_ERROR * np.abs(exact).mean(0)).all()
    # Var = E[x²] − E[x]²: the first is off by BLOCK_ERROR · E[x²], the second by twice that of |E x| · E|x| ≤ E[x²]
    variance_error = np.abs(statistics.variance - exact.var(0))
    assert (variance_error <= 3 * BLOCK_ERROR * (exact**2).mean(0)).all()
    assert statistics.mean_norm == pytest.approx(np.linalg.norm(exact, axis=1).mean(), rel=BLOCK_ERROR)


def test_a_constant_dimension_has_no_negative_variance() -> None:
    assert (gather(np.full((1000, 3), 0.1, np.float32)).variance >= 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("row", [0, 127, 128, 299])
def test_the_first_row_that_is_not_finite_is_named_and_nothing_is_added(bad: float, row: int) -> None:
    rows = heavy_tailed(300, 4)
    rows[row, 2] = bad
    rows[299, 0] = bad
    statistics = gather(heavy_tailed(50, 4))
    before = canonical_json(statistics.as_json())
    assert statistics.add(rows) == row
    assert canonical_json(statistics.as_json()) == before


def test_nan_among_bfloat16_bits_is_found() -> None:
    rows = float32_to_bits(np.array([[1, 2], [3, float("nan")]], np.float32))
    assert np.isnan(bits_to_float32(rows)).any()
    assert SiteStatistics(2).add(rows) == 1


@pytest.mark.parametrize("value", [1e19, 3e38], ids=["only sums of squares overflow", "squares overflow"])
def test_finite_values_whose_squares_overflow_float32_are_summed_in_float64(value: float) -> None:
    rows = np.full((128, 1), value, np.float32)
    statistics = gather(rows)
    exact = float(rows[0, 0])
    assert statistics.mean[0] == pytest.approx(exact)
    assert statistics.total_squares[0] == pytest.approx(128 * exact**2)
    assert statistics.mean_norm == pytest.approx(exact)


def test_energy_share_of_a_case_done_by_hand() -> None:
    # one row of squared norm 100 among 99 of squared norm 1: the largest 1 % holds 100 of 199
    rows = np.ones((100, 1), np.float32)
    rows[40] = 10
    assert gather(rows).energy_share(0.01) == pytest.approx(100 / 199)
    # the largest 2 %: that row and one of the others
    assert gather(rows).energy_share(0.02) == pytest.approx(101 / 199)
    assert gather(rows).energy_share(1.0) == pytest.approx(1)


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1])
def test_energy_share_of_heavy_tails_is_exact_to_the_width_of_a_bin(fraction: float) -> None:
    rows = heavy_tailed(20_000, 8)[:, 1:]
    energies = np.sort((rows.astype(np.float64) ** 2).sum(1))[::-1]
    n_largest = int(fraction * len(rows))
    exact = energies[:n_largest].sum() / energies.sum()
    # only rows of the bin in which the largest 1 % begins are mixed up, whose energies differ by at most 2^(1/4)
    edge = energies[n_largest]
    in_bin = ((energies > edge / 2**0.25) & (energies < edge * 2**0.25)).sum()
    slack = in_bin * edge * (2**0.25 - 2**-0.25) / energies.sum()
    assert abs(gather(rows).energy_share(fraction) - exact) <= min(slack, 0.02)


def test_energy_share_of_zeros_is_zero() -> None:
    assert gather(np.zeros((10, 2), np.float32)).energy_share() == 0


def test_json_keeps_every_bit() -> None:
    statistics = gather(heavy_tailed(500, 6))
    again = SiteStatistics.of(StatisticsRecord(**statistics.as_json()))
    assert canonical_json(again.as_json()) == canonical_json(statistics.as_json())
    assert again.total.tobytes() == statistics.total.tobytes()
    assert again.energy_share() == statistics.energy_share()


def test_compiled_sums_are_kept_for_later_processes() -> None:
    rows = heavy_tailed(3, 8)
    gather(rows)
    later = CompiledLoop(_sum_blocks._function, ("contract",))  # as another process makes it
    later(
        rows.view(np.int32),
        *(2, np.float32(1)),
        *(np.empty(8, np.float32), np.zeros(8), np.zeros(8)),
        *(np.empty(3, np.float32), np.empty(2, np.float32)),
    )
    compiled: Any = later._compiled
    assert sum(compiled.stats.cache_hits.values()) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"energy_bins": [0, 10**12]}, "of 0 to 1023"),
        ({"energy_counts": [1]}, "a count and a sum for every energy bin"),
        ({"energy_counts": [1, -1]}, "greater than or equal to 0"),
        ({"total": "AAAA"}, "buffer size must be a multiple"),
        ({"squared_deviations": "ß"}, "ASCII"),
        ({"width": 10**12}, "wanted 1000000000000 float64"),
        ({"maximum": "x"}, "valid number"),
    ],
)
def test_a_record_of_statistics_is_whole(change: dict[str, object], reason: str) -> None:
    good = gather(np.array([[1.0, 2.0], [300.0, 4.0]], np.float32)).as_json()
    assert SiteStatistics.of(StatisticsRecord(**good)).n_rows == 2
    with pytest.raises(ValidationError, match=reason):
        StatisticsRecord(**{**good, **change})
