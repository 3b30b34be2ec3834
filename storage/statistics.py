"""Statistics of one site's activations, gathered while rows are written and merged in unit order.

Rows are added in token order in blocks; a block of 256 rows is summed in float32 (relative error below 256 · 2⁻²⁴ of
the mean magnitude) and blocks are added up in float64. Everything is a sum, a count or an extremum, so merging units
in their order gives the same bits however many processes wrote them.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from storage.bfloat16 import bits_to_float32

_BLOCK_ROWS = 256
_SIGN = 0x8000
_SIGN_MAGNITUDE = (np.dtype(np.uint16), np.dtype(np.float16))
"""Dtypes of 16-bit floats in memory: bfloat16 bits and float16."""
_LARGEST_SQUARED = 2.0**50
"""Above this magnitude, sums of squares of wide rows could leave float32."""
_ENERGY_BINS_PER_OCTAVE = 4
_ENERGY_OCTAVES = 256
_N_ENERGY_BINS = _ENERGY_BINS_PER_OCTAVE * _ENERGY_OCTAVES
"""Bins of log2(squared norm) from 2⁻¹²⁸ to 2¹²⁸, four to an octave: the energy share of the largest rows is read off
with a quarter octave of slack in where "the largest 1 %" begins."""


def _zeros(n: int) -> np.ndarray:
    return np.zeros(n, np.float64)


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
        return self.total_norm / self.n_rows

    @property
    def mean_square_norm(self) -> float:
        """Mean squared Euclidean norm of a row."""
        return float(self.total_squares.sum()) / self.n_rows

    def add(self, rows: np.ndarray) -> int | None:
        """Add rows (n, d): float32, float16 or uint16 bfloat16 bits.

        Returns None, or the index of the first row that holds a NaN or infinity, in which case nothing was added.
        """
        if not len(rows):
            return None
        summed = _sum_blocks(rows, np.dtype(np.float32), _LARGEST_SQUARED)
        if summed is None:
            if not np.isfinite(_extremes(rows)).all():
                return int(np.argmax(~np.isfinite(as_float32(rows)).all(axis=1)))
            summed = _sum_blocks(rows, np.dtype(np.float64), np.inf)
        assert summed is not None, "finite numbers of float32 have squares in float64"
        partial, energies = summed
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
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Return the statistics written by ``as_json``."""
        counts, sums = _zeros(_N_ENERGY_BINS), _zeros(_N_ENERGY_BINS)
        counts[value["energy_bins"]] = value["energy_counts"]
        sums[value["energy_bins"]] = value["energy_sums"]
        return cls(
            value["width"],
            value["n_rows"],
            _decode(value["total"]),
            _decode(value["squared_deviations"]),
            value["total_norm"],
            value["minimum"],
            value["maximum"],
            0,
            counts,
            sums,
        )


def _sum_blocks(rows: np.ndarray, dtype: np.dtype[Any], largest: float) -> tuple[SiteStatistics, np.ndarray] | None:
    """Return sums over rows (n, d) and the squared norm of each row, float64 (n,).

    Works block by block, so that a block stays in the processor's cache through all its sums; deviations are taken
    from the mean of the first block, near enough to the mean of all for float32 sums not to cancel. Returns None as
    soon as a value is not finite or larger than ``largest``.
    """
    n, width = rows.shape
    partial = SiteStatistics(width, n)
    energies = np.empty(n, dtype)
    sums, squares, shift = _zeros(width), _zeros(width), np.zeros(width, dtype)
    scratch = np.empty((min(n, _BLOCK_ROWS), width), dtype)
    for start in range(0, n, _BLOCK_ROWS):
        piece = rows[start : start + _BLOCK_ROWS]
        minimum, maximum = _extremes(piece)
        if not max(-minimum, maximum) <= largest or not np.isfinite(maximum - minimum):
            return None
        partial.minimum, partial.maximum = min(partial.minimum, minimum), max(partial.maximum, maximum)
        block = _convert(piece, scratch[: len(piece)])
        if start == 0:
            shift = block.mean(axis=0, dtype=np.float64).astype(dtype)
        np.vecdot(block, block, out=energies[start : start + len(piece)])
        block -= shift
        sums += block.sum(axis=0)
        squares += np.einsum("ij,ij->j", block, block)
    partial.total = sums + n * shift.astype(np.float64)
    partial.squared_deviations = np.maximum(squares - sums**2 / n, 0.0)
    return partial, energies.astype(np.float64)


def _convert(rows: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Write finite rows as numbers of the dtype of ``out``, without allocating; bfloat16 and float16 by their bits."""
    if out.dtype != np.float32 or rows.dtype not in _SIGN_MAGNITUDE:
        out[...] = as_float32(rows)
    elif rows.dtype == np.uint16:
        bits = out.view(np.uint32)
        bits[...] = rows
        np.left_shift(bits, 16, out=bits)
    else:
        # NumPy converts float16 one number at a time. A sign-extended shift puts exponent and mantissa in their
        # places and the factor corrects the exponent's bias: exact for every finite number, subnormals included.
        extended = out.view(np.int32)
        extended[...] = rows.view(np.int16)
        np.left_shift(extended, 13, out=extended)
        np.bitwise_and(out.view(np.uint32), np.uint32(0x8FFFE000), out=out.view(np.uint32))
        np.multiply(out, np.float32(2.0**112), out=out)
    return out


def _extremes(rows: np.ndarray) -> tuple[float, float]:
    """Return the smallest and the largest value; either is not finite if and only if some value is not.

    16-bit floats are compared by their bits, 2 to 20 times as fast: as a signed integer the largest one is the largest
    positive number, as an unsigned one the most negative number, and NaN lies beyond infinity.
    """
    if rows.dtype not in _SIGN_MAGNITUDE:
        return float(rows.min()), float(rows.max())
    bits = rows.view(np.uint16)
    largest, most_negative = bits.view(np.int16).max(), bits.max()
    smallest_bits = most_negative if most_negative >= _SIGN else bits.min()
    largest_bits = largest.view(np.uint16) if largest >= 0 else bits.min()
    low, high = as_float32(np.array([smallest_bits, largest_bits], np.uint16).view(rows.dtype))
    return float(low), float(high)


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
