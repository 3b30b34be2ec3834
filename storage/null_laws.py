"""Laws that statistics of an order have if the order is a uniformly random permutation, without SciPy.

Every law here gives a two-sided p-value and the values it would accept at a level. The level is one statistic's share
of the family's significance, so the tails matter more than the middle: a law must be right at 1 in 1,000.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist

import numpy as np

_POISSON_TAIL = 100
"""Counts beyond mean + 20 standard deviations + this have a probability that prints as 0."""


@dataclass(frozen=True)
class Null:
    """A two-sided p-value, and the interval of values that the law accepts at its level."""

    p_value: float
    low: float
    high: float


def _two_sided(z: float) -> float:
    return math.erfc(abs(z) / math.sqrt(2))


def _critical_z(level: float) -> float:
    return NormalDist().inv_cdf(1 - level / 2)


def pearson_null(
    value: float, mean: float, sd: float, level: float, *, skewness: float = 0.0, step: float = 0.0
) -> Null:
    """Return the null of a statistic by its first moments.

    A skewed law is Pearson III (a shifted gamma) through the cube-root transform of Wilson and Hilferty (1931).
    ``step`` is the least difference between two values of a count: deviations up to one step are not held against the
    order, without which a count of mean 0.01 would be rejected whenever it is 1.
    """
    deviation = math.copysign(max(0.0, abs(value - mean) - step), value - mean)
    if sd == 0:
        return Null(1.0 if abs(deviation) <= 1e-9 * abs(mean) else 0.0, mean - step, mean + step)
    z = deviation / sd
    limits = [-_critical_z(level), _critical_z(level)]
    if skewness > 1e-6:
        root = max(0.0, 1 + skewness * z / 2) ** (1 / 3)
        z = (root - 1) * 6 / skewness + skewness / 6
        roots = [max(0.0, 1 + (limit - skewness / 6) * skewness / 6) for limit in limits]
        limits = [(root**3 - 1) * 2 / skewness for root in roots]
    return Null(_two_sided(z), mean + limits[0] * sd - step, mean + limits[1] * sd + step)


def student_null(value: float, draws: np.ndarray, level: float, *, step: float = 0.0) -> Null:
    """Return the null of a statistic that is normal with the mean and variance estimated from simulated draws.

    Student's t with one more draw, brought to normal by Wallace (1959): exact to four digits above 10 draws.
    """
    freedom = len(draws) - 1
    sd = float(draws.std(ddof=1)) * math.sqrt(1 + 1 / len(draws))
    mean = float(draws.mean())
    shrink = (8 * freedom + 1) / (8 * freedom + 3)
    limit = math.sqrt(freedom * math.expm1((_critical_z(level) / shrink) ** 2 / freedom))
    deviation = max(0.0, abs(value - mean) - step)
    if sd == 0:
        return Null(1.0 if deviation <= 1e-9 * abs(mean) else 0.0, mean - step, mean + step)
    z = shrink * math.sqrt(freedom * math.log1p((deviation / sd) ** 2 / freedom))
    return Null(_two_sided(z), mean - limit * sd - step, mean + limit * sd + step)


def poisson_null(count: int, mean: float, level: float) -> Null:
    """Return the null of a Poisson count: twice the smaller of P(X <= count) and P(X >= count)."""
    counts = np.arange(int(mean + 20 * math.sqrt(mean)) + _POISSON_TAIL)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(counts[1:]))])
    probability = np.exp(counts * math.log(mean) - mean - log_factorials)
    at_most, at_least = np.cumsum(probability), np.cumsum(probability[::-1])[::-1]
    p_values = np.minimum(1.0, 2 * np.minimum(at_most, at_least))
    kept = np.flatnonzero(p_values >= level)
    return Null(float(p_values[count]) if count < len(counts) else 0.0, float(kept[0]), float(kept[-1]))


@dataclass(frozen=True)
class Groups:
    """Rows in disjoint groups; a pair of rows of one group has the group's weight, any other pair has none."""

    groups: Sequence[tuple[int, int, Fraction]]
    """(rows of a group, number of such groups, weight of a pair)."""

    @classmethod
    def of(cls, sizes: np.ndarray, *, weight_by_rows: bool = False) -> Groups:
        """Return groups of these sizes; a pair weighs 1, or one over the rows of its group."""
        distinct, counts = np.unique(sizes, return_counts=True)
        rows = zip(distinct.tolist(), counts.tolist(), strict=True)
        return cls([(size, count, Fraction(1, size if weight_by_rows else 1)) for size, count in rows])

    def sums(self) -> tuple[Fraction, Fraction, Fraction, Fraction]:
        """Return the sums of w, w² over pairs, and of w·w' over ordered pairs of pairs that share one row, no row."""
        once = sum((count * (n * (n - 1) // 2) * weight for n, count, weight in self.groups), Fraction())
        squared = sum((count * (n * (n - 1) // 2) * weight**2 for n, count, weight in self.groups), Fraction())
        touching = sum((count * n * (n - 1) * (n - 2) * weight**2 for n, count, weight in self.groups), Fraction())
        return once, squared, touching, once**2 - squared - touching


def pair_moments(a: Groups, b: Groups, n: int) -> tuple[Fraction, Fraction]:
    """Return mean and variance, over all n! orders, of the sum over row pairs of weight in ``a`` times weight in ``b``.

    Expands the square into pairs of pairs that are equal, share one row, or share none (Mantel 1967). Exact rational
    numbers: the variance is a difference of numbers that agree in up to 14 digits.
    """
    (a_once, a_squared, a_touching, a_apart), (b_once, b_squared, b_touching, b_apart) = a.sums(), b.sums()
    pairs, touching = n * (n - 1) // 2, n * (n - 1) * (n - 2)
    apart = pairs * ((n - 2) * (n - 3) // 2)
    mean = a_once * b_once / pairs
    second = a_squared * b_squared / pairs + a_touching * b_touching / touching + a_apart * b_apart / apart
    return mean, second - mean**2


def table_skewness(cell_squares: float, cell_cubes: float) -> float:
    """Return the skewness of a sum of squared table counts from Σλ² and Σλ³ over its expected counts λ.

    Third over second cumulant of λ-Poisson cells with their linear part taken out, as fixed margins do. It tends to
    1/√mean for rare pairs and to chi-square's √(8/df) for large counts.
    """
    return (cell_cubes + cell_squares / 2) / (cell_squares / 2) ** 1.5 if cell_squares else 0.0
