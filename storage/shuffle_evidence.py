"""Statistical evidence that the order in which an epoch serves its rows is a uniformly random permutation.

No finite test can prove that; it can only fail to find a difference. Each statistic below looks for one way in which
shuffles usually fall short (neighbours that stay together, batches that see a part of the data, drift over an epoch)
and is compared with its law under a truly uniform permutation. Two traps: the laws hold for a *whole* epoch, every
row once, and ``passed`` is expected to be False for a share of at most ``significance`` of perfect shuffles.

Laws give a two-sided p-value and the values they would accept at a level, without SciPy. The level is one statistic's
share of the family's significance, so the tails matter more than the middle: a law must be right at 1 in 1,000.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist

import numpy as np

from tailrace.storage.errors import ArtifactCorrupt, SettingsError
from tailrace.storage.shuffle import philox

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


SAMPLED_ROWS = 1 << 20
"""Statistics whose law must be simulated look at evenly spread batches of about this many rows in all."""

MINIMUM_BATCHES = 16
MINIMUM_BATCH_ROWS = 8
MINIMUM_NULL_DRAWS = 50
MAXIMUM_BLOCKS = 64
_N_STATISTICS = 9
_CHUNK_ROWS = 1 << 20
_REJECTED_SHARE = 0.01


@dataclass(frozen=True)
class EvidenceStatistic:
    """One statistic of a served order beside its law under a uniformly random permutation."""

    name: str
    description: str
    value: float
    expected: float
    """Mean under a uniformly random permutation."""
    null_low: float
    null_high: float
    """Values in [null_low, null_high] agree with a uniformly random permutation at the family's significance."""
    p_value: float
    """Two-sided, not corrected for the number of statistics; 0.0 means too small for a float."""
    within_null: bool
    """``p_value >= significance / number of statistics`` (Bonferroni)."""


@dataclass(frozen=True)
class ShuffleEvidence:
    """All statistics of one served epoch."""

    n_rows: int
    batch_rows: int
    n_documents: int
    n_null_draws: int
    significance: float
    """A perfect shuffle fails with at most this probability."""
    statistics: tuple[EvidenceStatistic, ...]

    @property
    def passed(self) -> bool:
        """Whether every statistic lies within its null interval."""
        return all(statistic.within_null for statistic in self.statistics)


def shuffle_evidence(
    token_order_index: np.ndarray,
    document: np.ndarray,
    *,
    batch_rows: int,
    seed: int,
    n_null_draws: int = 200,
    significance: float = 0.01,
) -> ShuffleEvidence:
    """Compare the order of one whole epoch with a uniformly random permutation of its rows.

    ``token_order_index`` int64 (n_rows,): index in token order of the row served i-th; of an epoch over a sample of
    rows, its rank within the sample. ``document`` uint32 (n_rows,): the document of that row. ``seed`` decides the
    simulated permutations only.

    Six statistics use all rows and a closed law: mean and variance over all n! orders are exact and the shape is
    taken as normal, Pearson III (document pairs, block chi-square) or Poisson (successors). For the three others
    (distinct documents and both Kolmogorov-Smirnov ones) no usable closed form exists; they look at evenly spread
    whole batches of ``SAMPLED_ROWS`` rows in all (every whole batch of a smaller epoch), and the same statistic of
    ``n_null_draws`` simulated samples of equally many rows without replacement gives their law, so it is right for
    the part that is looked at. Time is linear in n_rows; memory beside the arguments is about 9 bytes per row.

    p-values are two-sided. ``passed`` uses the Bonferroni correction over all statistics, which holds whatever their
    dependence. Counts of rare events err towards large p-values, so the true rate is somewhat below the bound; it is
    a bound as far as the shapes above hold, which the tests check on some hundred true permutations.

    Raises SettingsError for settings that leave too little to test, ArtifactCorrupt if the epoch does not serve every
    row once.
    """
    n_rows = len(token_order_index)
    if token_order_index.shape != (n_rows,) or document.shape != (n_rows,):
        raise ValueError(f"wanted two arrays (n_rows,), got {token_order_index.shape} and {document.shape}")
    _check_settings(n_rows, batch_rows, n_null_draws, significance)
    _check_permutation(token_order_index)
    level = significance / _N_STATISTICS
    document_rows = np.unique(document, return_counts=True)[1]
    statistics = (
        _same_document_pairs(document, document_rows, batch_rows, level),
        *_simulated(token_order_index, document, batch_rows, seed, n_null_draws, level),
        _autocorrelation(token_order_index, 1, "lag_1_autocorrelation_z", level),
        _autocorrelation(token_order_index, batch_rows, "lag_batch_autocorrelation_z", level),
        _block_chi_square(token_order_index, level),
        _successors(token_order_index, level),
        _rank_correlation(token_order_index, level),
    )
    assert len(statistics) == _N_STATISTICS
    return ShuffleEvidence(n_rows, batch_rows, len(document_rows), n_null_draws, significance, statistics)


def _check_settings(n_rows: int, batch_rows: int, n_null_draws: int, significance: float) -> None:
    problems = []
    if batch_rows < MINIMUM_BATCH_ROWS or n_rows < MINIMUM_BATCHES * batch_rows:
        problems.append(
            f"batch_rows is {batch_rows} for {n_rows} rows; wanted at least {MINIMUM_BATCH_ROWS} rows a batch and "
            f"{MINIMUM_BATCHES} batches, so pass batch_rows up to {n_rows // MINIMUM_BATCHES}"
            if n_rows >= MINIMUM_BATCHES * MINIMUM_BATCH_ROWS
            else f"there are {n_rows} rows; evidence needs {MINIMUM_BATCHES * MINIMUM_BATCH_ROWS} or more"
        )
    if n_null_draws < MINIMUM_NULL_DRAWS:
        problems.append(f"n_null_draws is {n_null_draws}; pass {MINIMUM_NULL_DRAWS} or more")
    if not 0 < significance < 0.5:
        problems.append(f"significance is {significance}; pass a false alarm rate between 0 and 0.5, such as 0.01")
    if problems:
        raise SettingsError("shuffle evidence: " + "; ".join(problems))


def _check_permutation(token_order_index: np.ndarray) -> None:
    n_rows = len(token_order_index)
    seen = np.zeros(n_rows, np.bool_)
    outside = bool(token_order_index.min() < 0 or token_order_index.max() >= n_rows)
    if not outside:
        seen[token_order_index] = True
    if outside or not seen.all():
        defect = "an index outside the epoch" if outside else f"{n_rows - np.count_nonzero(seen)} rows never served"
        raise ArtifactCorrupt(
            f"the epoch does not serve each of its {n_rows} rows once: {defect}; run `pipeline verify` on the cache "
            "to find damaged files, or test a whole epoch with no rows dropped"
        )


def _statistic(
    name: str, description: str, value: float, expected: float, null: Null, level: float, *, unit: float = 1.0
) -> EvidenceStatistic:
    """Report a statistic whose law is known for ``value`` in multiples of ``unit``."""
    scaled = (float(value / unit), float(expected / unit), null.low / unit, null.high / unit)
    return EvidenceStatistic(name, description, *scaled, null.p_value, null.p_value >= level)


def _run_lengths(batches: np.ndarray) -> np.ndarray:
    """Return how often each value occurs in each row of ``batches``, over all rows in one list, zeros left out."""
    ordered = np.sort(batches, axis=1)
    starts = np.ones(ordered.shape, np.bool_)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=starts[:, 1:])
    return np.diff(np.flatnonzero(starts), append=ordered.size)


def _batches(rows: np.ndarray, batch_rows: int) -> Iterator[np.ndarray]:
    """Yield all rows as (batches, batch_rows), some batches at a time, and the short last batch alone."""
    chunk, n_full = max(1, _CHUNK_ROWS // batch_rows) * batch_rows, len(rows) // batch_rows * batch_rows
    for start in range(0, n_full, chunk):
        yield rows[start : min(start + chunk, n_full)].reshape(-1, batch_rows)
    if n_full < len(rows):
        yield rows[None, n_full:]


def same_document_pairs(document: np.ndarray, batch_rows: int) -> int:
    """Return the number of row pairs that are of one document and in one batch, short last batch included."""
    lengths = (_run_lengths(batches) for batches in _batches(document, batch_rows))
    return sum(int((length * (length - 1) // 2).sum()) for length in lengths)


def _same_document_pairs(
    document: np.ndarray, document_rows: np.ndarray, batch_rows: int, level: float
) -> EvidenceStatistic:
    n = len(document)
    batches = np.full(-(-n // batch_rows), batch_rows)
    batches[-1] = n - (len(batches) - 1) * batch_rows
    moments = pair_moments(Groups.of(batches), Groups.of(document_rows), n)
    mean, sd = float(moments[0]), math.sqrt(moments[1])
    squares, cubes = (float(np.sum((batches / n) ** k) * np.sum(document_rows.astype(np.float64) ** k)) for k in (2, 3))
    value = same_document_pairs(document, batch_rows)
    null = pearson_null(value, mean, sd, level, skewness=table_skewness(squares, cubes), step=1.0)
    description = "pairs of rows of one document in one batch, over their expectation; all rows"
    return _statistic("same_document_pairs", description, value, mean, null, level, unit=mean or 1.0)


def kolmogorov_smirnov(positions: np.ndarray, n_rows: int) -> np.ndarray:
    """Return float64 (batches,): √rows · largest distance between a batch's positions and all of range(n_rows).

    ``positions`` (batches, rows) are indices in token order. The distance is of distribution functions, taken just
    before and at every position of the batch, which is where it is largest.
    """
    rows = positions.shape[1]
    ordered = np.sort(positions, axis=1).astype(np.float64)
    ordered /= n_rows
    steps = np.arange(rows + 1) / rows
    before = np.abs(ordered - steps[:-1]).max(axis=1)
    ordered += 1 / n_rows
    return np.asarray(np.maximum(before, np.abs(ordered - steps[1:]).max(axis=1)) * math.sqrt(rows))


def distinct_documents(documents: np.ndarray) -> float:
    """Return the mean number of different documents in a row of ``documents`` (batches, rows)."""
    return len(_run_lengths(documents)) / len(documents)


def _simulated(
    token_order_index: np.ndarray, document: np.ndarray, batch_rows: int, seed: int, n_null_draws: int, level: float
) -> tuple[EvidenceStatistic, ...]:
    """Return the statistics of single batches, each beside the same statistic of simulated batches."""
    n = len(document)
    n_batches = n // batch_rows
    n_sampled = min(n_batches, max(MINIMUM_BATCHES, SAMPLED_ROWS // batch_rows))
    sampled = np.linspace(0, n_batches - 1, n_sampled).round().astype(np.int64)
    shape = (n_batches, batch_rows)
    n_full = n_batches * batch_rows
    distances = kolmogorov_smirnov(token_order_index[:n_full].reshape(shape)[sampled], n)
    distinct = distinct_documents(document[:n_full].reshape(shape)[sampled])
    null_distances, null_distinct = np.empty((n_null_draws, n_sampled)), np.empty(n_null_draws)
    for draw in range(n_null_draws):
        generator = np.random.Generator(philox(seed, "shuffle-evidence", draw))
        rows = generator.choice(n, (n_sampled, batch_rows), replace=False)
        # the two laws are only ever used apart, so one draw serves as token-order indices and as positions in the order
        null_distances[draw] = kolmogorov_smirnov(rows, n)
        null_distinct[draw] = distinct_documents(document[rows])
    where = f"{n_sampled} of {n_batches} whole batches"
    return (
        _distinct_statistic(distinct, null_distinct, n_sampled, where, level),
        _mean_distance(distances, null_distances, where, level),
        _rejected_batches(distances, null_distances, where, level),
    )


def _distinct_statistic(
    distinct: float, null: np.ndarray, n_sampled: int, where: str, level: float
) -> EvidenceStatistic:
    law = student_null(distinct, null, level, step=1 / n_sampled)
    description = f"mean number of different documents in a batch; {where}"
    return _statistic("distinct_documents", description, distinct, float(null.mean()), law, level)


def _mean_distance(distances: np.ndarray, null: np.ndarray, where: str, level: float) -> EvidenceStatistic:
    value, means = float(distances.mean()), null.mean(axis=1)
    description = f"mean over batches of √rows × Kolmogorov-Smirnov distance to uniform token-order position; {where}"
    law = student_null(value, means, level)
    return _statistic("kolmogorov_smirnov_mean", description, value, float(means.mean()), law, level)


def _rejected_batches(distances: np.ndarray, null: np.ndarray, where: str, level: float) -> EvidenceStatistic:
    """Count batches beyond the simulated 99 % point; that point's own error adds 1/n_null_draws to the variance."""
    n_sampled = len(distances)
    count = int(np.count_nonzero(distances > np.quantile(null, 1 - _REJECTED_SHARE)))
    expected = _REJECTED_SHARE * n_sampled
    law = poisson_null(count, expected, level)
    description = f"share of batches whose Kolmogorov-Smirnov test rejects at 1 %; {where}"
    return _statistic("kolmogorov_smirnov_rejected", description, count, expected, law, level, unit=n_sampled)


def autocorrelation_z(token_order_index: np.ndarray, lag: int) -> float:
    """Return Σ d(i)·d(i+lag), d = index minus mean index, in standard deviations from its mean over all n! orders."""
    n = len(token_order_index)
    centre = (n - 1) / 2
    products = 0.0
    for start in range(0, n - lag, _CHUNK_ROWS):
        stop = min(start + _CHUNK_ROWS, n - lag)
        products += float(
            np.dot(token_order_index[start:stop] - centre, token_order_index[start + lag : stop + lag] - centre)
        )
    # sums over all rows of d² and d⁴; Σd = 0 turns the sums over distinct rows below into these two
    second = Fraction(n * (n**2 - 1), 12)
    fourth = second * Fraction(3 * n**2 - 7, 20)
    edges, touching = n - lag, 2 * max(0, n - 2 * lag)
    pairs, triples, quadruples = (math.perm(n, k) for k in (2, 3, 4))
    mean = -edges * second / pairs
    square = (
        edges * (second**2 - fourth) / pairs
        + touching * (2 * fourth - second**2) / triples
        + (edges**2 - edges - touching) * (3 * second**2 - 6 * fourth) / quadruples
    )
    return (products - float(mean)) / math.sqrt(square - mean**2)


def _autocorrelation(token_order_index: np.ndarray, lag: int, name: str, level: float) -> EvidenceStatistic:
    value = autocorrelation_z(token_order_index, lag)
    description = f"serial correlation of token-order positions {lag} rows apart, in standard deviations; all rows"
    return _statistic(name, description, value, 0.0, pearson_null(value, 0.0, 1.0, level), level)


def block_counts(token_order_index: np.ndarray, n_blocks: int) -> np.ndarray:
    """Return int64 (n_blocks, n_blocks): rows from block s of token order that are served in block t of the epoch.

    Block b is the indices i with ``i · n_blocks // n_rows == b``, so that sizes differ by one at most.
    """
    n = len(token_order_index)
    counts = np.zeros(n_blocks**2, np.int64)
    for start in range(0, n, _CHUNK_ROWS):
        source = token_order_index[start : start + _CHUNK_ROWS].astype(np.int64) * n_blocks // n
        served = np.arange(start, start + len(source)) * n_blocks // n
        counts += np.bincount(source * n_blocks + served, minlength=n_blocks**2)
    return counts.reshape(n_blocks, n_blocks)


def _block_chi_square(token_order_index: np.ndarray, level: float) -> EvidenceStatistic:
    n = len(token_order_index)
    n_blocks = min(MAXIMUM_BLOCKS, math.isqrt(n // 5))
    counts = block_counts(token_order_index, n_blocks)
    sizes = counts.sum(axis=0)
    expected = np.outer(sizes, sizes) / n
    value = float(((counts - expected) ** 2 / expected).sum())
    blocks = Groups.of(sizes, weight_by_rows=True)
    pair_mean, pair_variance = pair_moments(blocks, blocks, n)
    # χ² + n = n Σ count²/(size·size): every pair twice, and each row with itself, where unequal sizes add a variance
    # that is below 1e-8 of the sum and left out
    mean = float(n * (2 * pair_mean + Fraction(n_blocks**2, n)) - n)
    skewness = table_skewness(float((expected**2).sum()), float((expected**3).sum()))
    null = pearson_null(value, mean, 2 * n * math.sqrt(pair_variance), level, skewness=skewness)
    description = f"chi-square per degree of freedom of {n_blocks} source × {n_blocks} serving blocks; all rows"
    degrees = (n_blocks - 1) ** 2
    return _statistic("block_chi_square_per_df", description, value, mean, null, level, unit=degrees)


def successors(token_order_index: np.ndarray) -> int:
    """Return how many rows are served right after the row that precedes them in token order."""
    return int(np.count_nonzero(token_order_index[1:] == token_order_index[:-1] + 1))


def _successors(token_order_index: np.ndarray, level: float) -> EvidenceStatistic:
    n = len(token_order_index)
    count, mean = successors(token_order_index), (n - 1) / n
    description = "rows served right after their predecessor in token order; all rows"
    return _statistic("successors", description, count, mean, poisson_null(count, mean, level), level)


def rank_correlation(token_order_index: np.ndarray) -> float:
    """Return Spearman's correlation between the position in the epoch and the index in token order."""
    n = len(token_order_index)
    centre = (n - 1) / 2
    products = 0.0
    for start in range(0, n, _CHUNK_ROWS):
        index = token_order_index[start : start + _CHUNK_ROWS]
        products += float(np.dot(index - centre, np.arange(start, start + len(index)) - centre))
    return products * 12 / (float(n) * (float(n) ** 2 - 1))


def _rank_correlation(token_order_index: np.ndarray, level: float) -> EvidenceStatistic:
    value = rank_correlation(token_order_index)
    description = "Spearman correlation of the position in the epoch and the index in token order; all rows"
    null = pearson_null(value, 0.0, 1 / math.sqrt(len(token_order_index) - 1), level)
    return _statistic("rank_correlation", description, value, 0.0, null, level)
