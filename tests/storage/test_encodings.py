"""Storing changes values by no more than the declared error, and bfloat16 bits are converted exactly."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tailrace.storage.bfloat16 import BFloat16, bits_to_float32, float32_to_bits
from tailrace.storage.layout import RELATIVE_ERROR, Encoding, column_scale_of

ALL_BITS = np.arange(2**16, dtype=np.uint16)


def test_every_bfloat16_pattern_becomes_its_float32_value() -> None:
    expected = ALL_BITS.view(ml_dtypes.bfloat16).astype(np.float32)
    found = bits_to_float32(ALL_BITS)
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found), np.signbit(expected))


def test_every_bfloat16_pattern_survives_the_way_through_float32() -> None:
    values = bits_to_float32(ALL_BITS)
    numbers = ~np.isnan(values)
    assert np.array_equal(float32_to_bits(values)[numbers], ALL_BITS[numbers])
    assert np.isnan(bits_to_float32(float32_to_bits(values[~numbers]))).all()
    assert (~numbers).sum() == 2 * 127  # both signs, 127 mantissas


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1.0, 1.0),
        (1.0 + 2.0**-8, 1.0),  # halfway between 1 and 1 + 2⁻⁷: to the even mantissa, down
        (1.0 + 3 * 2.0**-8, 1.0 + 2 * 2.0**-7),  # halfway: to the even mantissa, up
        (1.0 + 2.0**-8 + 2.0**-23, 1.0 + 2.0**-7),  # just above halfway
        (-1.0 - 2.0**-8, -1.0),
        (3.4e38, float("inf")),  # beyond the largest bfloat16, 3.39e38
        (2.0**-133, 2.0**-133),  # the smallest bfloat16 above zero
        (2.0**-135, 0.0),
        (-0.0, -0.0),
        (float("inf"), float("inf")),
    ],
)
def test_float32_is_rounded_to_the_nearest_bfloat16_ties_to_even(value: float, rounded: float) -> None:
    found = bits_to_float32(float32_to_bits(np.array([value], np.float32)))
    assert found[0] == np.float32(rounded)
    assert np.signbit(found[0]) == np.signbit(rounded)


@given(hnp.arrays(np.uint32, 64))
def test_rounding_agrees_with_an_independent_implementation(raw: np.ndarray) -> None:
    values = raw.view(np.float32)
    numbers = values[~np.isnan(values)]
    with np.errstate(over="ignore"):
        expected = numbers.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert np.array_equal(float32_to_bits(numbers), expected)


def test_nan_stays_nan_even_where_its_kept_mantissa_is_zero() -> None:
    quiet = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(bits_to_float32(float32_to_bits(quiet))).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 2.0**-126])
def test_a_fill_value_is_written_as_the_number_it_stands_for(value: float) -> None:
    scalar = BFloat16().from_json_scalar(value, zarr_format=3)
    assert BFloat16().to_json_scalar(scalar, zarr_format=3) == value


def typical_rows(seed: int, n_rows: int, width: int) -> np.ndarray:
    """Rows like a language model's: columns of very different size, heavy tails, one outlier dimension."""
    generator = np.random.Generator(np.random.Philox(seed))
    sizes = np.exp(generator.standard_normal(width) * 1.5)
    sizes[3] = 300 * sizes.mean()
    rows = generator.standard_t(4, (n_rows, width)) * sizes
    return rows.astype(np.float32)


def through(encoding: Encoding, rows: np.ndarray) -> np.ndarray:
    return encoding.decode(encoding.encode(rows))


def stored_float(rows: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return bits_to_float32(float32_to_bits(rows))
    return rows.astype(dtype).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@given(hnp.arrays(np.float32, (3, 8), elements=st.floats(0.0001220703125, 60000, width=32)))
def test_a_stored_float_differs_by_at_most_the_declared_error(dtype: str, rows: np.ndarray) -> None:
    # from 2⁻¹³, where float16 still has all of its mantissa
    stored = stored_float(rows, dtype).astype(np.float64)
    error = np.linalg.norm(stored - rows, axis=1) / np.linalg.norm(rows.astype(np.float64), axis=1)
    assert error.max() <= RELATIVE_ERROR[dtype]


def int8_encoding(rows: np.ndarray) -> Encoding:
    return Encoding("x", "int8", rows.shape[1], column_scale_of((rows.astype(np.float64) ** 2).sum(0), len(rows)))


@given(
    hnp.arrays(np.float32, (5, 6), elements=st.floats(-(2.0**60), 2.0**60, width=32)),
    hnp.arrays(np.float32, 6, elements=st.floats(2.0**-20, 2.0**20, width=32)),
)
def test_int8_differs_by_at_most_half_a_step_in_every_dimension(rows: np.ndarray, column_scale: np.ndarray) -> None:
    encoding = Encoding("x", "int8", 6, column_scale)
    stored = encoding.encode(rows)
    step = stored["x/scale"].astype(np.float64)[:, None] * column_scale
    error = np.abs(encoding.decode(stored).astype(np.float64) - rows)
    # three float32 operations on the way, each off by 2⁻²⁴ of at most 127 steps
    assert (error <= step * (0.5 + 3 * 127 * 2.0**-24)).all()
    assert stored["x/q"].min() >= -127


def test_int8_keeps_rows_like_a_language_models_within_the_declared_error() -> None:
    rows = typical_rows(0, 4096, 256)
    found = through(int8_encoding(rows), rows).astype(np.float64)
    # in units of each column's size, which is what a model sees once it normalises its inputs
    scale = np.sqrt((rows.astype(np.float64) ** 2).mean(0))
    error = np.linalg.norm((found - rows) / scale, axis=1) / np.linalg.norm(rows / scale, axis=1)
    assert np.median(error) < RELATIVE_ERROR["int8"]


def test_int8_leaves_less_than_a_ten_thousandth_of_the_variance_unexplained() -> None:
    rows = np.random.Generator(np.random.Philox(1)).standard_normal((4096, 256)).astype(np.float32)
    rows[:, 3] *= 300
    rows[:, 10:20] *= 0.01
    residual = through(int8_encoding(rows), rows).astype(np.float64) - rows
    assert (residual**2).sum() / ((rows - rows.mean(0)) ** 2).sum() < 1e-4


def test_int8_keeps_every_dimension_alive_beside_an_outlier_dimension() -> None:
    # column 3 is 30,000 times as large as columns 10 to 19: with one scale per row these would all become 0
    rows = np.random.Generator(np.random.Philox(1)).standard_normal((4096, 256)).astype(np.float32)
    rows[:, 3] *= 300
    rows[:, 10:20] *= 0.01
    residual = through(int8_encoding(rows), rows).astype(np.float64) - rows
    unexplained = (residual**2).sum(0) / ((rows - rows.mean(0)) ** 2).sum(0)
    assert unexplained.max() < 2e-4


def test_a_row_of_zeros_stays_zero() -> None:
    encoding = Encoding("x", "int8", 4, np.ones(4, np.float32))
    assert np.array_equal(through(encoding, np.zeros((2, 4), np.float32)), np.zeros((2, 4)))


@pytest.mark.parametrize("value", [1e-45, 1e-44, 1e-42, 2.0**-126, 2.0**-119])
def test_the_smallest_rows_are_rounded_not_destroyed(value: float) -> None:
    # a step of value / 127 would be 0 or subnormal in float32: NaN, or more than 127 steps
    encoding = Encoding("x", "int8", 4, np.ones(4, np.float32))
    rows = np.full((1, 4), value, np.float32)
    assert np.abs(through(encoding, rows) - rows).max() <= 2.0**-127


def test_int8_step_of_a_hand_computed_row() -> None:
    # scaled by columns: (1, 2, -4); step 4/127; q = 31.75 → 32, 63.5 → 64, -127
    encoding = Encoding("x", "int8", 3, np.array([1, 10, 0.5], np.float32))
    stored = encoding.encode(np.array([[1, 20, -2]], np.float32))
    assert stored["x/q"].tolist() == [[32, 64, -127]]
    assert stored["x/scale"].tolist() == [pytest.approx(4 / 127)]
    decoded = encoding.decode(stored)
    assert decoded[0].tolist() == pytest.approx([32 * 4 / 127, 64 * 40 / 127, -2.0])


def test_column_scale_is_the_root_mean_square_and_one_for_a_dead_dimension() -> None:
    rows = np.array([[3, 0], [4, 0]], np.float64)
    assert column_scale_of((rows**2).sum(0), 2).tolist() == [pytest.approx(np.sqrt(12.5)), 1.0]


def test_decoding_into_given_memory_gives_the_same_values() -> None:
    rows = typical_rows(2, 50, 16)
    encoding = int8_encoding(rows)
    buffer = encoding.decode_buffer(64)
    assert buffer is not None
    found = encoding.decode(encoding.encode(rows), buffer)
    assert found.base is not None
    assert np.array_equal(found, through(encoding, rows))
