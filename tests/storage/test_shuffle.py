"""The shuffle plan is a uniformly random permutation decided by (seed, epoch) alone.

Statistical tests draw from fixed seeds, so they give the same answer every time; a threshold is the value that a right
implementation exceeds with probability 1e-4.
"""

from __future__ import annotations

from collections import Counter
from itertools import permutations, product
from math import comb, factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailrace.storage import shuffle
from tailrace.storage.shuffle import (
    EpochPlan,
    deal,
    default_bucket_rows,
    invert,
    philox,
    random_permutation,
    sample_prefix,
    unit_permutation,
)

CHI_SQUARED_1E_4 = {5: 25.7, 9: 33.7, 23: 57.3, 119: 185.2}
"""Degrees of freedom → the value exceeded with probability 1e-4."""

GOLDEN_WORDS = [11720934563522370391, 18247312453307326915]
GOLDEN_PERMUTATION = [6, 2, 5, 3, 7, 0, 4, 1]
GOLDEN_COUNTS = [[42, 43, 15], [38, 37, 25], [20, 20, 10]]
GOLDEN_PREFIX = (50, 50, 20)


def chi_squared(observed: Counter, probabilities: dict) -> float:
    n = sum(observed.values())
    assert observed.keys() <= probabilities.keys()
    return sum((observed[outcome] - n * p) ** 2 / (n * p) for outcome, p in probabilities.items())


def stored_order(plan: EpochPlan) -> list[tuple[int, int]]:
    """Return (unit, stored position) of every row in the order in which an epoch serves them."""
    served: list[tuple[int, int]] = []
    for bucket in range(plan.n_buckets):
        rows: list[tuple[int, int]] = [(-1, -1)] * plan.rows_in_bucket(bucket)
        for run in plan.runs(bucket):
            for position, destination in zip(range(run.start, run.stop), run.destinations.tolist(), strict=True):
                rows[destination] = (run.unit, position)
        served += rows
    return served


plans = st.builds(
    EpochPlan,
    seed=st.integers(0, 2**64),
    epoch=st.integers(0, 1000),
    split=st.sampled_from(["train", "heldout"]),
    unit_rows=st.lists(st.integers(0, 40), min_size=1, max_size=6).map(tuple).filter(any),
    bucket_rows=st.integers(1, 90),
)


@given(st.integers(0, 2**70), st.text(max_size=5), st.integers(0, 300))
def test_a_permutation_is_a_bijection_and_invert_undoes_it(seed: int, purpose: str, n: int) -> None:
    permutation = random_permutation(philox(seed, purpose), n)
    assert sorted(permutation.tolist()) == list(range(n))
    assert permutation[invert(permutation)].tolist() == list(range(n))


@given(plans)
def test_an_epoch_serves_every_row_once(plan: EpochPlan) -> None:
    rows = [(unit, position) for unit, n in enumerate(plan.unit_rows) for position in range(n)]
    assert sorted(stored_order(plan)) == rows


@given(plans)
def test_runs_of_a_unit_are_consecutive_from_bucket_to_bucket(plan: EpochPlan) -> None:
    ends = [0] * len(plan.unit_rows)
    for bucket in range(plan.n_buckets):
        runs = plan.runs(bucket)
        assert [run.unit for run in runs] == sorted(run.unit for run in runs)
        for run in runs:
            assert run.start == ends[run.unit]
            assert run.stop > run.start
            ends[run.unit] = run.stop
    assert tuple(ends) == plan.unit_rows


def test_the_same_seed_and_epoch_give_the_same_order_and_any_other_gives_another() -> None:
    base = EpochPlan(3, 0, "train", (50, 50, 20), 40)
    again = EpochPlan(3, 0, "train", (50, 50, 20), 40)
    assert stored_order(base) == stored_order(again)
    others = [
        EpochPlan(3, 1, "train", (50, 50, 20), 40),
        EpochPlan(4, 0, "train", (50, 50, 20), 40),
        EpochPlan(3, 0, "heldout", (50, 50, 20), 40),
    ]
    orders = [stored_order(plan) for plan in (base, *others)]
    assert len({tuple(order) for order in orders}) == 4
    assert unit_permutation(3, "train", 0, 50).tolist() != unit_permutation(3, "train", 1, 50).tolist()


def test_names_made_of_the_same_digits_do_not_share_a_stream() -> None:
    names = [(1, "train/bucket", 23, 4), (1, "train/bucket", 2, 34), (12, "train/bucket", 3, 4)]
    assert len({philox(seed, purpose, *indices).random_raw() for seed, purpose, *indices in names}) == 3


def test_every_permutation_of_four_rows_is_equally_likely() -> None:
    draws = Counter(tuple(random_permutation(philox(seed, "test"), 4).tolist()) for seed in range(12_000))
    uniform = {order: 1 / factorial(4) for order in permutations(range(4))}
    assert chi_squared(draws, uniform) < CHI_SQUARED_1E_4[23]


def test_every_order_of_two_units_through_three_buckets_is_equally_likely() -> None:
    # units of 3 and 2 rows, buckets of 2, 2 and 1: 5! = 120 orders
    draws: Counter = Counter()
    for seed in range(12_000):
        plan = EpochPlan(seed, 0, "train", (3, 2), 2)
        units = [unit_permutation(seed, "train", unit, n) for unit, n in enumerate((3, 2))]
        draws[tuple((3 * unit + int(units[unit][position])) for unit, position in stored_order(plan))] += 1
    uniform = {order: 1 / factorial(5) for order in permutations(range(5))}
    assert chi_squared(draws, uniform) < CHI_SQUARED_1E_4[119]


@given(st.integers(0, 2**32), st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(1, 40), st.booleans())
def test_deal_keeps_row_and_column_sums(seed: int, unit_rows: list[int], bucket_rows: int, tickets: bool) -> None:
    total = sum(unit_rows)
    sizes = np.array([min(bucket_rows, total - start) for start in range(0, total, bucket_rows)], np.int64)
    limit = 0 if tickets else 10**9
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "_NUMPY_POPULATION_LIMIT", limit)
        counts = deal(np.random.Generator(philox(seed, "test")), unit_rows, sizes)
    assert counts.sum(axis=1).tolist() == unit_rows
    assert counts.sum(axis=0).tolist() == sizes.tolist()
    assert (counts >= 0).all()


def tables_with_sums(unit_rows: tuple[int, ...], sizes: tuple[int, ...]) -> dict[tuple[tuple[int, ...], ...], float]:
    """Return the law of the table of counts when all rows are dealt at random, by enumerating every table.

    P(table) = ∏ unit rows! · ∏ bucket sizes! / (N! · ∏ counts!).
    """
    law = {}
    cells = len(unit_rows) * len(sizes)
    for flat in product(range(max(unit_rows) + 1), repeat=cells):
        table = tuple(flat[i : i + len(sizes)] for i in range(0, cells, len(sizes)))
        if tuple(map(sum, table)) == unit_rows and tuple(map(sum, zip(*table, strict=True))) == sizes:
            ways = np.prod([factorial(n) for n in (*unit_rows, *sizes)], dtype=object)
            law[table] = ways / (factorial(sum(unit_rows)) * np.prod([factorial(n) for n in flat], dtype=object))
    return law


def test_the_enumerated_law_is_a_law() -> None:
    law = tables_with_sums((2, 2), (3, 1))
    # the single place of bucket 1 goes to unit 0 or unit 1, each with probability 1/2
    assert law == {((1, 1), (2, 0)): 0.5, ((2, 0), (1, 1)): 0.5}


@pytest.mark.parametrize("limit", [10**9, 0], ids=["numpy", "tickets"])
def test_deal_follows_the_multivariate_hypergeometric_law(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "_NUMPY_POPULATION_LIMIT", limit)
    unit_rows, sizes = (3, 2, 1), (3, 3)
    law = tables_with_sums(unit_rows, sizes)
    assert sum(law.values()) == pytest.approx(1)
    generator = np.random.Generator(philox(0, f"law {limit}"))
    draws = Counter(tuple(map(tuple, deal(generator, unit_rows, np.array(sizes)).tolist())) for _ in range(20_000))
    assert len(law) == 6
    assert chi_squared(draws, law) < CHI_SQUARED_1E_4[5]


def test_populations_numpy_refuses_are_dealt_by_tickets() -> None:
    # numpy's own method refuses 1e9 rows or more; the small unit comes first, while that many remain
    counts = deal(np.random.Generator(philox(0, "large")), [1000], np.array([600, 400]))
    assert counts.tolist() == [[600, 400]]
    remaining = np.array([2 * 10**9, 10**9])
    drawn = shuffle._draw_by_tickets(np.random.Generator(philox(0, "large")), remaining, 3000)
    # binomial(3000, 2/3) within five standard deviations of 25.8
    assert abs(int(drawn[0]) - 2000) < 130
    assert drawn.sum() == 3000


@given(
    st.integers(0, 1000),
    st.lists(st.integers(1, 30), min_size=1, max_size=5),
    st.floats(0, 1),
)
def test_a_sample_takes_leading_rows_of_each_unit_and_the_number_asked_for(
    seed: int, unit_rows: list[int], share: float
) -> None:
    n_rows = max(1, round(share * sum(unit_rows)))
    taken = sample_prefix(seed, "train", unit_rows, n_rows)
    assert sum(taken) == n_rows
    assert all(0 <= n <= available for n, available in zip(taken, unit_rows, strict=True))


def test_every_set_of_rows_is_equally_likely_to_be_the_sample() -> None:
    # 2 of 3 + 2 rows: C(5, 2) = 10 sets, over caches that were shuffled with different seeds
    draws: Counter = Counter()
    for seed in range(8_000):
        taken = sample_prefix(seed, "train", (3, 2), 2)
        rows = [
            3 * unit + int(row)
            for unit, n in enumerate((3, 2))
            for row in unit_permutation(seed, "train", unit, n)[: taken[unit]]
        ]
        draws[tuple(sorted(rows))] += 1
    assert len(draws) == comb(5, 2)
    uniform = {chosen: 1 / comb(5, 2) for chosen in draws}
    assert chi_squared(draws, uniform) < CHI_SQUARED_1E_4[9]


def test_a_smaller_sample_is_drawn_anew_and_need_not_lie_inside_a_larger_one() -> None:
    # the share of each unit is drawn for each size by itself; docs/format.md says so
    samples = [sample_prefix(seed, "train", (50, 50), n) for seed in range(20) for n in (40, 41)]
    pairs = list(zip(samples[::2], samples[1::2], strict=True))
    assert any(small[unit] > large[unit] for small, large in pairs for unit in (0, 1))


@pytest.mark.parametrize(
    ("shard_rows", "n_rows", "expected"),
    [
        (262_144, 10, 262_144),  # one bucket holds everything
        (262_144, 60_000_000, 262_144),  # 262144² / 60e6 = 1145 rows a run
        (262_144, 134_000_000, 262_144),  # 512.8 rows a run
        (262_144, 135_000_000, 524_288),  # 509 rows a run would be too short
        (64, 1000, 1024),  # runs as long as a unit: all in one bucket
    ],
)
def test_buckets_double_until_runs_are_long_enough(shard_rows: int, n_rows: int, expected: int) -> None:
    assert default_bucket_rows(shard_rows, n_rows) == expected


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(1, 10**9))
def test_default_buckets_are_whole_shards(shard_power: int, n_rows: int) -> None:
    assert default_bucket_rows(2**shard_power, n_rows) % 2**shard_power == 0


def test_orders_on_disk_stay_readable_the_words_and_the_deal_are_fixed() -> None:
    # literal values: a NumPy or xxhash release that changes any of these would change published orders
    assert philox(0, "train/unit", 0).random_raw(2).tolist() == GOLDEN_WORDS
    assert unit_permutation(0, "train", 0, 8).tolist() == GOLDEN_PERMUTATION
    assert EpochPlan(0, 0, "train", (100, 100, 50), 100).counts.tolist() == GOLDEN_COUNTS
    assert sample_prefix(0, "train", (100, 100, 50), 120) == GOLDEN_PREFIX
