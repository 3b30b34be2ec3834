"""Statistics of one site's activations, gathered while rows are written and merged in unit order.

Rows are added in token order in blocks; a block of 256 rows is summed in float32 (relative error below 256 · 2⁻²⁴ of
the mean magnitude) and blocks are added up in float64. Everything is a sum, a count or an extremum, so merging units
in their order gives the same bits however many processes wrote them.

Sums over rows (by column, of squares about a shift, of a row, extremes) are compiled with numba, because NumPy needs
seven passes for the same: 0.16 µs instead of 0.75 µs for a row of 768 float16. A row's squared norm is summed in the
order that suits the processor's vectors, so its last bits depend on them.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
from pydantic import model_validator

from tailrace.storage.artifact import Count, Record
from tailrace.storage.bfloat16 import bits_to_float32
from tailrace.storage.compiled import compiled_loop

BLOCK_ROWS = 256


class RowSums(NamedTuple):
    """Sums over rows (n, d)."""

    shift: np.ndarray
    """float32 (d,): near the mean of the first block; ``sums`` and ``squares`` are taken about it."""
    sums: np.ndarray
    """float64 (d,): sum of rows less the shift."""
    squares: np.ndarray
    """float64 (d,): sum of their squares."""
    energies: np.ndarray
    """float32 (n,): squared norm of each row."""
    minimum: float
    maximum: float


def sum_rows(rows: np.ndarray) -> RowSums:
    """Return the sums of rows (n, d), n ≥ 1: float32, float16, or uint16 holding bfloat16 bits.

    If a value is not finite, or a squared norm leaves float32, some result is not finite; nothing is raised.
    """
    n, width = rows.shape
    shift = np.empty(width, np.float32)
    sums, squares = np.zeros(width, np.float64), np.zeros(width, np.float64)
    energies, extremes = np.empty(n, np.float32), np.empty(2, np.float32)
    bits = rows.view(f"int{8 * rows.itemsize}")
    _sum_blocks(bits, *_FORMS[rows.dtype.name], shift, sums, squares, energies, extremes)
    return RowSums(shift, sums, squares, energies, float(extremes[0]), float(extremes[1]))


def prepare_to_sum() -> None:
    """Load the compiled loop of ``sum_rows``: over half a second, to be spent while something is waited for."""
    sum_rows(np.zeros((1, 1), np.uint16))


_FLOAT16, _BFLOAT16, _FLOAT32 = range(3)
_FORMS = {
    "float16": (_FLOAT16, np.float32(2.0**112)),
    "uint16": (_BFLOAT16, np.float32(1)),
    "float32": (_FLOAT32, np.float32(1)),
}
"""By dtype: which bits its numbers have, and what they are to be multiplied by once they are float32's."""


@compiled_loop()
def _as_float32_bits(bits: np.ndarray, form: int, words: np.ndarray) -> None:  # pragma: no cover - compiled
    """Write the numbers of a row (d,), integers that hold their bits, to int32 ``words`` (d,) as float32's bits."""
    if form == _FLOAT16:
        # Exponent and mantissa move to float32's bits; a factor corrects the exponent's bias.
        for j in range(len(words)):
            words[j] = (np.int32(bits[j]) << np.int32(13)) & np.int32(-1879056384)  # 0x8FFFE000
    elif form == _BFLOAT16:
        for j in range(len(words)):
            words[j] = np.int32(bits[j]) << np.int32(16)
    else:
        for j in range(len(words)):
            words[j] = bits[j]


# reassociation alone: nothing is assumed about NaN or infinity
@compiled_loop("reassoc", "contract", "nsz")
def _squared_norm(row: np.ndarray, factor: float) -> Any:  # pragma: no cover - compiled
    energy = np.float32(0)
    for j in range(len(row)):
        value = row[j] * factor
        energy += value * value
    return energy


# Not reassociated: a shift subtracted from a sum instead of from each value would be rounded one way 256 times.
@compiled_loop("contract")
def _sum_blocks(
    bits: np.ndarray,
    form: int,
    factor: float,
    shift: np.ndarray,
    total: np.ndarray,
    total_squares: np.ndarray,
    energies: np.ndarray,
    extremes: np.ndarray,
) -> None:  # pragma: no cover - compiled
    """Fill the sums of rows (n, d), given as integers that hold their bits."""
    n, width = bits.shape
    words = np.empty(width, np.int32)
    row = words.view(np.float32)
    sums, squares = np.zeros(width, np.float32), np.zeros(width, np.float32)
    first = min(n, BLOCK_ROWS)
    mean = np.zeros(width, np.float64)
    for i in range(first):
        _as_float32_bits(bits[i], form, words)
        for j in range(width):
            mean[j] += np.float64(row[j] * factor)
    for j in range(width):
        shift[j] = np.float32(mean[j] / first)
    # As coarse as float16, so that deviations of 16-bit numbers are exact and no sum is rounded one way throughout.
    coarse = shift.view(np.uint32)
    for j in range(width):
        coarse[j] &= np.uint32(0xFFFFE000)
    lows, highs = np.full(width, np.inf, np.float32), np.full(width, -np.inf, np.float32)
    for start in range(0, n, BLOCK_ROWS):
        sums[:] = 0
        squares[:] = 0
        for i in range(start, min(n, start + BLOCK_ROWS)):
            _as_float32_bits(bits[i], form, words)
            energies[i] = _squared_norm(row, factor)
            for j in range(width):
                value = row[j] * factor
                lows[j] = value if value < lows[j] else lows[j]  # unlike min() it leaves NaN alone, and vectorises
                highs[j] = value if value > highs[j] else highs[j]
                deviation = value - shift[j]
                sums[j] += deviation
                squares[j] += deviation * deviation
        for j in range(width):
            total[j] += np.float64(sums[j])
            total_squares[j] += np.float64(squares[j])
    extremes[0], extremes[1] = lows.min(), highs.max()


MASSIVE_SHARE = 0.25
"""Activations are called massive if the longest 1 % of rows hold more than this share of the squared norms."""
_LARGEST_SUMMED = {"float32": 2.0**50, "uint16": 2.0**50, "float16": 65504.0}
"""Beyond these magnitudes sums of squares of wide rows could leave float32, or the number was no finite float16."""
_ENERGY_BINS_PER_OCTAVE = 4
_ENERGY_OCTAVES = 256
_N_ENERGY_BINS = _ENERGY_BINS_PER_OCTAVE * _ENERGY_OCTAVES
"""Bins of log2(squared norm) from 2⁻¹²⁸ to 2¹²⁸, four to an octave: the energy share of the largest rows is read off
with a quarter octave of slack in where "the largest 1 %" begins."""


def _zeros(n: int) -> np.ndarray:
    return np.zeros(n, np.float64)


class StatisticsRecord(Record):
    """The statistics of a unit's rows in its commit record; float64 vectors travel as base64."""

    width: int
    n_rows: Count
    total: str
    squared_deviations: str
    total_norm: float
    minimum: float
    maximum: float
    energy_bins: list[int]
    """Bins that have rows."""
    energy_counts: list[Count]
    energy_sums: list[float]

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        bins, counts, sums = self.energy_bins, self.energy_counts, self.energy_sums
        if not len(bins) == len(counts) == len(sums) or not all(0 <= number < _N_ENERGY_BINS for number in bins):
            raise ValueError(f"wanted a count and a sum for every energy bin, of 0 to {_N_ENERGY_BINS - 1}")
        for name in ("total", "squared_deviations"):
            if len(_decode(getattr(self, name))) != self.width:
                raise ValueError(f"{name}: wanted {self.width} float64 in base64")
        return self


@dataclass
class SiteStatistics:
    """Sums over rows of one side (input or output) of one site; ``d`` is its width."""

    width: int
    n_rows: int = 0
    total: np.ndarray = field(default_factory=lambda: _zeros(0))
    """float64 (d,): sum of rows."""
    squared_deviations: np.ndarray = field(default_factory=lambda: _zeros(0))
    """float64 (d,): sum of squared deviations from the mean row, which stays exact where means dwarf deviations."""
    total_norm: float = 0.0
    """Sum of Euclidean norms of rows."""
    minimum: float = float("inf")
    maximum: float = float("-inf")
    n_nonfinite: int = 0
    """Always 0 in a published cache: a non-finite activation stops the stage."""
    energy_counts: np.ndarray = field(default_factory=lambda: _zeros(_N_ENERGY_BINS))
    energy_sums: np.ndarray = field(default_factory=lambda: _zeros(_N_ENERGY_BINS))

    def __post_init__(self) -> None:
        """Start the sums at zero."""
        if not len(self.total):
            self.total, self.squared_deviations = _zeros(self.width), _zeros(self.width)

    @property
    def mean(self) -> np.ndarray:
        """float64 (d,): mean row."""
        return np.asarray(self.total / self.n_rows)

    @property
    def variance(self) -> np.ndarray:
        """float64 (d,): population variance of each dimension about its mean."""
        return np.asarray(self.squared_deviations / self.n_rows)

    @property
    def total_squares(self) -> np.ndarray:
        """float64 (d,): sum of squared rows."""
        return np.asarray(self.squared_deviations + self.total**2 / max(self.n_rows, 1))

    @property
    def mean_norm(self) -> float:
        """Mean Euclidean norm of a row."""
        return self.total_norm / max(self.n_rows, 1)

    @property
    def mean_square_norm(self) -> float:
        """Mean squared Euclidean norm of a row."""
        return float(self.total_squares.sum()) / max(self.n_rows, 1)

    @property
    def median_norm(self) -> float:
        """Median Euclidean norm of a row, to the width of a histogram's bin: within 9 %."""
        used = np.flatnonzero(self.energy_counts)
        middle = int(np.searchsorted(np.cumsum(self.energy_counts[used]), self.n_rows / 2))
        return self._norm_in(int(used[middle]))

    @property
    def largest_norm(self) -> float:
        """Largest Euclidean norm of a row, within 9 %."""
        return self._norm_in(int(np.flatnonzero(self.energy_counts)[-1]))

    def massive_note(self) -> str | None:
        """Return a sentence on rows of extreme norm, or None if no few rows dwarf all others."""
        share = self.energy_share()
        if share <= MASSIVE_SHARE:
            return None
        return (
            f"the longest 1 % of rows hold {share:.0%} of the energy, up to a norm of {self.largest_norm:,.0f} where "
            f"the median is {self.median_norm:,.1f}"
        )

    def _norm_in(self, energy_bin: int) -> float:
        return float(np.sqrt(self.energy_sums[energy_bin] / self.energy_counts[energy_bin]))

    def add(self, rows: np.ndarray) -> int | None:
        """Add rows (n, d): float32, float16 or uint16 bfloat16 bits.

        Returns None, or the index of the first row that holds a NaN or infinity, in which case nothing was added.
        """
        if not len(rows):
            return None
        sums = sum_rows(rows)
        if max(-sums.minimum, sums.maximum) > _LARGEST_SUMMED[rows.dtype.name] or not np.isfinite(sums.energies).all():
            wide = as_float32(rows).astype(np.float64)
            if not np.isfinite(wide).all():
                return int(np.argmax(~np.isfinite(wide).all(axis=1)))
            sums = _sum_in_float64(wide)
        n, energies = len(rows), sums.energies.astype(np.float64)
        partial = SiteStatistics(self.width, n)
        partial.total = sums.sums + n * sums.shift.astype(np.float64)
        partial.squared_deviations = np.maximum(sums.squares - sums.sums**2 / n, 0.0)
        partial.minimum, partial.maximum = sums.minimum, sums.maximum
        partial.total_norm = float(np.sqrt(energies).sum())
        bins = _energy_bins(energies)
        partial.energy_counts = np.bincount(bins, minlength=_N_ENERGY_BINS).astype(np.float64)
        partial.energy_sums = np.bincount(bins, weights=energies, minlength=_N_ENERGY_BINS)
        self.merge(partial)
        return None

    def merge(self, other: SiteStatistics) -> None:
        """Add the rows of ``other``. Deviations combine by the parallel rule of Chan, Golub and LeVeque (1979)."""
        if self.n_rows and other.n_rows:
            shift = other.mean - self.mean
            share = self.n_rows * other.n_rows / (self.n_rows + other.n_rows)
            self.squared_deviations = self.squared_deviations + other.squared_deviations + share * shift**2
        else:
            self.squared_deviations = self.squared_deviations + other.squared_deviations
        self.n_rows += other.n_rows
        self.total = self.total + other.total
        self.total_norm += other.total_norm
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)
        self.n_nonfinite += other.n_nonfinite
        self.energy_counts = self.energy_counts + other.energy_counts
        self.energy_sums = self.energy_sums + other.energy_sums

    def energy_share(self, fraction: float = 0.01) -> float:
        """Return the share of Σ‖row‖² held by the ``fraction`` of rows with the largest norms (to a bin's width)."""
        wanted = fraction * self.n_rows
        counts, sums = self.energy_counts[::-1], self.energy_sums[::-1]
        before = np.cumsum(counts) - counts
        taken = np.clip((wanted - before) / np.maximum(counts, 1), 0.0, 1.0)
        return float((taken * sums).sum() / max(float(sums.sum()), np.finfo(np.float64).tiny))

    def as_json(self) -> dict[str, Any]:
        """Return the exact sums as JSON; float64 vectors travel as base64."""
        used = np.flatnonzero(self.energy_counts)
        return {
            "width": self.width,
            "n_rows": self.n_rows,
            "total": _encode(self.total),
            "squared_deviations": _encode(self.squared_deviations),
            "total_norm": self.total_norm,
            "minimum": self.minimum,
            "maximum": self.maximum,
            "energy_bins": used.tolist(),
            "energy_counts": self.energy_counts[used].astype(int).tolist(),
            "energy_sums": self.energy_sums[used].tolist(),
        }

    @classmethod
    def of(cls, record: StatisticsRecord) -> Self:
        """Return the statistics written by ``as_json``."""
        counts, sums = _zeros(_N_ENERGY_BINS), _zeros(_N_ENERGY_BINS)
        counts[record.energy_bins] = record.energy_counts
        sums[record.energy_bins] = record.energy_sums
        return cls(
            record.width,
            record.n_rows,
            _decode(record.total),
            _decode(record.squared_deviations),
            record.total_norm,
            record.minimum,
            record.maximum,
            0,
            counts,
            sums,
        )


def _sum_in_float64(rows: np.ndarray) -> RowSums:
    """Return the sums of finite rows whose squares may be too large for float32."""
    shift = rows.mean(axis=0)
    deviations = rows - shift
    squares, energies = (deviations**2).sum(axis=0), (rows**2).sum(axis=1)
    return RowSums(shift, deviations.sum(axis=0), squares, energies, float(rows.min()), float(rows.max()))


def as_float32(rows: np.ndarray) -> np.ndarray:
    """Return activations as float32; uint16 is read as bfloat16 bits."""
    return bits_to_float32(rows) if rows.dtype == np.uint16 else rows.astype(np.float32, copy=False)


def _energy_bins(energies: np.ndarray) -> np.ndarray:
    logarithms = np.log2(np.maximum(energies, 2.0**-127))
    bins = np.floor(logarithms * _ENERGY_BINS_PER_OCTAVE).astype(np.int64) + _N_ENERGY_BINS // 2
    return np.asarray(np.clip(bins, 0, _N_ENERGY_BINS - 1))


def _encode(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f8").tobytes()).decode()


def _decode(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f8").copy()
