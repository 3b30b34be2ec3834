"""The shuffle's evidence: exact statistics and laws, a false alarm rate as stated, and power against poor shuffles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from tailrace.storage import shuffle_evidence as module
from tailrace.storage.errors import ArtifactCorrupt, SettingsError
from tailrace.storage.shuffle import EpochPlan, unit_permutation
from tailrace.storage.shuffle_evidence import (
    EvidenceStatistic,
    Groups,
    ShuffleEvidence,
    autocorrelation_z,
    block_counts,
    distinct_documents,
    kolmogorov_smirnov,
    pair_moments,
    pearson_null,
    poisson_null,
    rank_correlation,
    same_document_pairs,
    shuffle_evidence,
    student_null,
    successors,
)

CONTINUOUS = (
    "same_document_pairs",
    "distinct_documents",
    "kolmogorov_smirnov_mean",
    "lag_1_autocorrelation_z",
    "lag_batch_autocorrelation_z",
    "block_chi_square_per_df",
    "rank_correlation",
)
COUNTS = ("kolmogorov_smirnov_rejected", "successors")


def generator(*name: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(name)))


def documents_in_token_order(n_rows: int, mean_rows: int = 20) -> np.ndarray:
    sizes = generator(n_rows, mean_rows).geometric(1 / mean_rows, n_rows)
    return np.repeat(np.arange(n_rows, dtype=np.uint32), sizes)[:n_rows]


def by_name(evidence: ShuffleEvidence) -> dict[str, EvidenceStatistic]:
    return {statistic.name: statistic for statistic in evidence.statistics}


# Every statistic on a case small enough to count by hand.


def test_same_document_pairs_are_counted_within_batches_and_in_the_short_last_one() -> None:
    # batches (7 7 7 | 5 5 7 | 5 5): 3 pairs, 1 pair, 1 pair
    assert same_document_pairs(np.array([7, 7, 7, 5, 5, 7, 5, 5], np.uint32), 3) == 5


def test_distinct_documents_is_the_mean_over_batches() -> None:
    # 1 and 2 different documents
    assert distinct_documents(np.array([[7, 7, 7], [5, 7, 5]], np.uint32)) == 1.5


def test_kolmogorov_smirnov_is_the_largest_gap_between_distribution_functions() -> None:
    # Of 8 rows {0, 1, 2, 3}: after index 3 all of the batch lies in half of the data, a gap of 1 - 4/8.
    # {4, 5, 6, 7}: before index 4 none of it, a gap of 4/8. {1, 3, 5, 7}: at index 0 one row of eight, no batch row.
    positions = np.array([[3, 0, 2, 1], [7, 4, 6, 5], [7, 5, 3, 1]])
    assert kolmogorov_smirnov(positions, 8).tolist() == [0.5 * 2, 0.5 * 2, 0.125 * 2]


@pytest.mark.parametrize("lag", [1, 2, 4])
def test_autocorrelation_z_has_mean_0_and_variance_1_over_all_orders(lag: int) -> None:
    z = np.array([autocorrelation_z(np.array(order), lag) for order in itertools.permutations(range(6))])
    assert z.mean() == pytest.approx(0, abs=1e-12)
    assert z.var() == pytest.approx(1, rel=1e-12)


def test_autocorrelation_z_is_the_sum_of_products_in_standard_deviations() -> None:
    # d = -3/2, -1/2, 1/2, 3/2: products 3/4 - 1/4 + 3/4 = 5/4
    orders = [np.array(order) - 1.5 for order in itertools.permutations(range(4))]
    products = [float(order[:-1] @ order[1:]) for order in orders]
    assert autocorrelation_z(np.arange(4), 1) == pytest.approx((1.25 - np.mean(products)) / np.std(products))


def test_block_counts_cross_source_and_serving_blocks() -> None:
    # served: 0 5 1 | 2 3 4, source blocks {0 1 2} and {3 4 5}
    assert block_counts(np.array([0, 5, 1, 2, 3, 4]), 2).tolist() == [[2, 1], [1, 2]]


def test_successors_counts_rows_that_follow_their_predecessor() -> None:
    # 4→5 and 0→1, not 1→3 and not 3→2
    assert successors(np.array([4, 5, 0, 1, 3, 2])) == 2


def test_rank_correlation_is_one_for_identity_and_known_for_one_swap() -> None:
    # Spearman: 1 - 6 Σ(difference of ranks)² / (n(n² - 1)) = 1 - 6·2 / 60
    assert rank_correlation(np.arange(4)) == pytest.approx(1)
    assert rank_correlation(np.array([1, 0, 2, 3])) == pytest.approx(0.8)


def test_identity_order_has_the_values_that_can_be_counted() -> None:
    # 320 rows in 20 documents of 16, batches of 16: every batch is one document. isqrt(320 / 5) = 8 blocks.
    order = np.arange(320)
    evidence = by_name(shuffle_evidence(order, (order // 16).astype(np.uint32), batch_rows=16, seed=0))
    pairs, share_of_a_document = 20 * 120, 15 / 319
    assert evidence["same_document_pairs"].value == pytest.approx(pairs / (pairs * share_of_a_document))
    assert evidence["same_document_pairs"].expected == 1
    assert evidence["distinct_documents"].value == 1
    assert evidence["block_chi_square_per_df"].value == pytest.approx(320 * 7 / 49)
    assert evidence["block_chi_square_per_df"].expected == pytest.approx(320 / 319)
    assert evidence["successors"].value == 319
    assert evidence["kolmogorov_smirnov_rejected"].value == 1
    assert evidence["rank_correlation"].value == pytest.approx(1)
    # of a batch at rows 16b..16b+15 the gap is 1 - (b + 1)/20 after it or b/20 before it, whichever is larger
    gaps = [max(19 - b, b) / 20 * 4 for b in range(20)]
    assert evidence["kolmogorov_smirnov_mean"].value == pytest.approx(np.mean(gaps))


# Every closed law against all orders, or against a table.


@pytest.mark.parametrize("weight_by_rows", [False, True])
def test_pair_moments_are_those_of_all_orders(weight_by_rows: bool) -> None:
    batches, documents = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 1])

    def weights(groups: np.ndarray) -> np.ndarray:
        same = np.triu(groups[:, None] == groups, 1).astype(np.float64)
        return same / np.bincount(groups)[groups] if weight_by_rows else same

    symmetric = weights(documents) + weights(documents).T
    orders = [np.array(order) for order in itertools.permutations(range(6))]
    values = [float((weights(batches) * symmetric[np.ix_(order, order)]).sum()) for order in orders]
    a, b = (Groups.of(np.bincount(rows), weight_by_rows=weight_by_rows) for rows in (batches, documents))
    mean, variance = pair_moments(a, b, 6)
    assert float(mean) == pytest.approx(np.mean(values), rel=1e-12)
    assert float(variance) == pytest.approx(np.var(values), rel=1e-12)


def test_poisson_null_is_twice_the_smaller_tail() -> None:
    # Poisson(1): P(X >= 3) = 1 - 2.5/e = 0.0803, P(X <= 0) = 1/e; at 0.05 the counts 0..3 stay
    null = poisson_null(3, 1.0, 0.05)
    assert null.p_value == pytest.approx(2 * (1 - 2.5 / math.e))
    assert (null.low, null.high) == (0, 3)
    assert poisson_null(0, 1.0, 0.05).p_value == pytest.approx(2 / math.e)
    assert poisson_null(100_000, 1.0, 0.05).p_value == 0


def test_pearson_null_is_normal_without_skewness_and_chi_square_with_it() -> None:
    assert pearson_null(7.0, 1.0, 2.0, 0.05).p_value == pytest.approx(0.0026998, rel=1e-4)  # 3 standard deviations
    # chi-square of 10 degrees of freedom: 25.188 is the 0.5 % point of any table, 2.156 the 99.5 % point
    null = pearson_null(25.188, 10.0, math.sqrt(20), 0.01, skewness=math.sqrt(8 / 10))
    assert null.p_value == pytest.approx(0.01, rel=0.03)
    assert (null.low, null.high) == pytest.approx((2.156, 25.188), rel=0.03)


def test_student_null_has_the_quantile_of_a_table() -> None:
    # t of 20 degrees of freedom: 2.845 is the two-sided 1 % point; 21 draws of mean 0 and variance 1
    draws = np.concatenate([[0.0], np.tile([-1.0, 1.0], 10)])
    null = student_null(2.845 * math.sqrt(1 + 1 / 21), draws, 0.01)
    assert null.p_value == pytest.approx(0.01, rel=0.01)
    assert null.high == pytest.approx(2.845 * math.sqrt(1 + 1 / 21), rel=1e-3)


def test_a_count_one_step_from_a_rare_mean_is_no_evidence() -> None:
    # a Poisson count of mean 0.01 is 1 once in a hundred times, yet 10 standard deviations away
    assert pearson_null(1, 0.01, 0.1, 0.001, step=1).p_value == 1
    assert pearson_null(3, 0.01, 0.1, 0.001, step=1).p_value < 0.001


# The false alarm rate is as stated.


def kolmogorov_of(p_values: np.ndarray) -> float:
    """Return √n times the distance to uniform; 1.95 is its 0.1 % point."""
    ordered, steps = np.sort(p_values), np.arange(len(p_values) + 1) / len(p_values)
    gap = max(np.abs(ordered - steps[1:]).max(), np.abs(ordered - steps[:-1]).max())
    return float(gap * math.sqrt(len(p_values)))


def evidence_of_true_permutations(n_permutations: int) -> list[ShuffleEvidence]:
    documents = documents_in_token_order(4000)
    orders = [generator(1, index).permutation(4000) for index in range(n_permutations)]
    return [
        shuffle_evidence(order, documents[order], batch_rows=100, seed=index, n_null_draws=60, significance=0.1)
        for index, order in enumerate(orders)
    ]


def check_p_values(evidence: list[ShuffleEvidence]) -> None:
    p_values = {name: np.array([by_name(one)[name].p_value for one in evidence]) for name in by_name(evidence[0])}
    assert {*CONTINUOUS, *COUNTS} == p_values.keys()
    assert {name: kolmogorov_of(p_values[name]) for name in CONTINUOUS if kolmogorov_of(p_values[name]) > 1.95} == {}
    for name in COUNTS:  # p-values of small counts are lumpy and may only be too large
        assert np.mean(p_values[name] <= 0.05) < 0.1
        assert np.mean(p_values[name] > 0.5) > 0.4


def test_p_values_of_true_permutations_are_uniform_and_the_family_keeps_its_rate() -> None:
    evidence = evidence_of_true_permutations(240)
    check_p_values(evidence)
    # at most 0.1 · 240 = 24 expected; more than 39 has probability 0.1 %, fewer than 7 would mean no test at all
    assert 7 <= sum(not one.passed for one in evidence) <= 39


def test_p_values_are_uniform_when_only_some_batches_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLED_ROWS", 1700)
    evidence = evidence_of_true_permutations(160)
    assert by_name(evidence[0])["distinct_documents"].description.endswith("17 of 40 whole batches")
    check_p_values(evidence)


def planned_order(seed: int, unit_rows: tuple[int, ...], bucket_rows: int) -> np.ndarray:
    """Return the token-order index of every row an EpochPlan serves, without any file."""
    units = [unit_permutation(seed, "train", unit, n_rows) for unit, n_rows in enumerate(unit_rows)]
    firsts = np.cumsum(unit_rows) - unit_rows
    plan = EpochPlan(seed, 0, "train", unit_rows, bucket_rows)
    served = []
    for bucket in range(plan.n_buckets):
        rows = np.empty(plan.rows_in_bucket(bucket), np.int64)
        for run in plan.runs(bucket):
            rows[run.destinations] = firsts[run.unit] + units[run.unit][run.start : run.stop]
        served.append(rows)
    return np.concatenate(served)


def test_the_planned_shuffle_is_like_true_permutations() -> None:
    documents = documents_in_token_order(5000)
    orders = [planned_order(seed, (1024, 1024, 1024, 1024, 904), 700) for seed in range(60)]
    evidence = [
        shuffle_evidence(order, documents[order], batch_rows=128, seed=seed, n_null_draws=60)
        for seed, order in enumerate(orders)
    ]
    assert sum(not one.passed for one in evidence) <= 4  # 0.6 expected; 5 or more has probability 0.04 %
    check_p_values(evidence)


# Poor shuffles are rejected, each by the statistic that looks for its fault.

N_ROWS, BATCH_ROWS = 32_768, 256


def identity_order() -> np.ndarray:
    return np.arange(N_ROWS)


def shuffled_within_batches() -> np.ndarray:
    return generator(2).permuted(np.arange(N_ROWS).reshape(-1, BATCH_ROWS), axis=1).reshape(-1)


def shuffled_batches_in_order_inside() -> np.ndarray:
    return generator(3).permutation(np.arange(N_ROWS).reshape(-1, BATCH_ROWS)).reshape(-1)


def shuffled_chunks_through_a_window() -> np.ndarray:
    """Chunks of 128 rows in random order, then a buffer of 4,096 rows that serves a random one of them each time."""
    rng = generator(4)
    rows = rng.permutation(np.arange(N_ROWS).reshape(-1, 128)).reshape(-1)
    window, served = rows[:4096].copy(), []
    for place, row in zip(rng.integers(0, 4096, N_ROWS - 4096), rows[4096:], strict=True):
        served.append(window[place])
        window[place] = row
    return np.concatenate([served, rng.permutation(window)])


def shuffled_within_an_eighth() -> np.ndarray:
    return generator(5).permuted(np.arange(N_ROWS).reshape(8, -1), axis=1).reshape(-1)


def drifting() -> np.ndarray:
    """Sort by index plus noise ten times as wide as the data: a correlation of about 0.1."""
    return np.argsort(np.arange(N_ROWS) + generator(6).uniform(0, 10 * N_ROWS, N_ROWS))


DOCUMENT = {"same_document_pairs", "distinct_documents"}
PLACE = {"kolmogorov_smirnov_mean", "kolmogorov_smirnov_rejected", "block_chi_square_per_df"}
CORRELATION = {"lag_1_autocorrelation_z", "lag_batch_autocorrelation_z"}


@pytest.mark.parametrize(
    ("order", "faults"),
    [
        (identity_order, DOCUMENT | PLACE | CORRELATION | {"successors", "rank_correlation"}),
        (shuffled_within_batches, DOCUMENT | PLACE | CORRELATION | {"rank_correlation"}),
        (shuffled_batches_in_order_inside, DOCUMENT | PLACE | {"lag_1_autocorrelation_z", "successors"}),
        (shuffled_chunks_through_a_window, DOCUMENT | PLACE),
        (shuffled_within_an_eighth, DOCUMENT | PLACE | CORRELATION | {"rank_correlation"}),
        (drifting, {"block_chi_square_per_df", "rank_correlation"}),
    ],
)
def test_poor_shuffles_are_rejected_for_their_faults(order: Callable[[], np.ndarray], faults: set[str]) -> None:
    rows, documents = order(), documents_in_token_order(N_ROWS, mean_rows=60)
    evidence = shuffle_evidence(rows, documents[rows], batch_rows=BATCH_ROWS, seed=0)
    assert not evidence.passed
    assert faults - {statistic.name for statistic in evidence.statistics if not statistic.within_null} == set()


# What a report holds, and what is refused.


def test_a_report_is_decided_by_its_arguments_and_agrees_with_itself() -> None:
    documents, order = documents_in_token_order(3000), generator(7).permutation(3000)

    def report(seed: int) -> ShuffleEvidence:
        served = documents[order]
        return shuffle_evidence(order, served, batch_rows=90, seed=seed, n_null_draws=50, significance=0.05)

    evidence = report(1)
    assert evidence == report(1)
    assert evidence.statistics != report(2).statistics
    assert (evidence.n_rows, evidence.n_documents) == (3000, len(np.unique(documents)))
    for one in evidence.statistics:
        assert one.within_null == (one.null_low <= one.value <= one.null_high) == (one.p_value >= 0.05 / 9)
        assert one.null_low <= one.expected <= one.null_high


@pytest.mark.parametrize("rows_per_document", [1, 2000])
def test_documents_that_say_nothing_pass(rows_per_document: int) -> None:
    order = generator(8).permutation(2000)
    evidence = by_name(shuffle_evidence(order, (order // rows_per_document).astype(np.uint32), batch_rows=100, seed=0))
    assert evidence["same_document_pairs"].p_value == 1
    assert evidence["distinct_documents"].p_value == 1


def test_every_unusable_setting_is_named_at_once() -> None:
    order = np.arange(1000)
    with pytest.raises(SettingsError, match=r"batch_rows up to 62; n_null_draws is 10; .* significance is 1"):
        shuffle_evidence(order, order.astype(np.uint32), batch_rows=64, seed=0, n_null_draws=10, significance=1)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(SettingsError, match="there are 100 rows; evidence needs 128 or more"):
        shuffle_evidence(np.arange(100), np.zeros(100, np.uint32), batch_rows=8, seed=0)


@pytest.mark.parametrize(("replaced", "found"), [(5, "1 rows never served"), (1000, "outside"), (-1, "outside")])
def test_an_epoch_that_repeats_or_loses_a_row_is_refused(replaced: int, found: str) -> None:
    order = np.arange(1000)
    order[17] = replaced
    with pytest.raises(ArtifactCorrupt, match=found):
        shuffle_evidence(order, np.zeros(1000, np.uint32), batch_rows=50, seed=0)


def test_arrays_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="wanted two arrays"):
        shuffle_evidence(np.arange(1000), np.zeros(999, np.uint32), batch_rows=50, seed=0)
