"""Shares, differences and p-values of blind ratings against hand computation, brute force and their null laws."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from tailrace.analysis.blind.sampling import LiveRule, draw
from tailrace.analysis.blind.tally import Rating, compare, difference_interval, permutation_p_value, share, tally
from tailrace.storage.errors import SettingsError

RULE = LiveRule(min_log10_frequency=-4, min_active=4)


def test_wilson_s_interval_is_the_textbook_s():
    # 41 of 50: (0.82 + 1.9208/50 ± 1.96 √(0.82·0.18/50 + 0.9604/2500)) / (1 + 3.8415/50)
    found = share(41, 50)
    assert (found.low, found.high) == pytest.approx((0.6920, 0.9023), abs=1e-4)
    assert share(0, 50).low == 0
    assert share(50, 50).high == 1
    assert share(0, 10).high == pytest.approx(3.8415 / (10 + 3.8415), abs=1e-4)


def test_newcombe_s_interval_is_that_of_his_first_example():
    # Newcombe 1998, table II, example (a): 56/70 less 48/80, method 10: 0.0524 to 0.3339
    assert difference_interval(share(56, 70), share(48, 80)) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_the_reference_s_own_ratings_do_not_tell_its_dictionaries_apart():
    first = (
        [Rating("yes", False)] * 41 + [Rating("maybe", True)] * 6 + [Rating("maybe", False)] * 2 + [Rating("no", False)]
    )
    second = [Rating("yes", False)] * 38 + [Rating("maybe", False)] * 8 + [Rating("no", False)] * 4
    second = [*second[:34], *[Rating(one.verdict, True) for one in second[34:]]]
    found = tally(first, second)
    counts = {one.name: (one.first.count, one.second.count) for one in found.comparisons}
    assert counts == {
        "yes": (41, 38), "yes or maybe": (49, 46), "maybe": (8, 8), "no": (1, 4), "context-free": (6, 16),
    }  # fmt: skip
    by_name = {one.name: one for one in found.comparisons}
    assert by_name["yes"].low < 0 < by_name["yes"].high
    assert by_name["yes"].p_value > 0.5
    assert by_name["context-free"].high < 0
    assert by_name["context-free"].p_value < 0.05
    assert found.mean_score == pytest.approx((90 / 50, 84 / 50))
    assert found.p_value > 0.2


def every_assignment(items, n_first):
    for chosen in combinations(range(len(items)), n_first):
        first = [items[place] for place in chosen]
        yield first, [items[place] for place in range(len(items)) if place not in chosen]


@pytest.mark.parametrize(("first", "second"), [([2, 2, 1, 0], [0, 0, 1]), ([0, 0], [2, 2, 2]), ([1, 1], [1, 1])])
def test_the_p_value_is_the_share_of_assignments_that_are_as_extreme(first, second):
    def distance(one, other):
        return abs(sum(one) / len(one) - sum(other) / len(other))

    observed = distance(first, second)
    distances = [distance(*pair) for pair in every_assignment([*first, *second], len(first))]
    expected = sum(value >= observed - 1e-12 for value in distances) / len(distances)
    assert permutation_p_value(first, second) == pytest.approx(expected)


def test_two_certain_and_opposite_samples_of_five_have_the_smallest_p_value():
    assert permutation_p_value([1] * 5, [0] * 5) == pytest.approx(2 / 252)
    assert permutation_p_value([1, 0], [0, 1]) == 1


def test_under_the_null_a_p_value_is_as_small_as_it_says_and_no_smaller():
    """Over all assignments, which the null makes equally likely, P(p ≤ α) = α at every α that occurs."""
    items = [2, 2, 2, 1, 1, 0, 0, 0, 0]
    p_values = Counter(round(permutation_p_value(*pair), 12) for pair in every_assignment(items, 4))
    total = sum(p_values.values())
    assert len(p_values) > 5
    below = 0
    for value in sorted(p_values):
        below += p_values[value]
        assert below / total == pytest.approx(value)


def test_a_comparison_counts_what_holds():
    found = compare("yes", [1, 1, 0, 1], [0, 1])
    assert (found.first.count, found.first.of, found.second.count, found.second.of) == (3, 4, 1, 2)
    assert found.difference == pytest.approx(0.25)


# The draw


def dictionary(n=200, seed=0):
    generator = np.random.default_rng(seed)
    frequency = generator.uniform(-6, -1, n)
    frequency[::7] = np.nan
    return frequency, generator.integers(0, 12, n)


def test_a_draw_is_of_live_features_without_replacement_and_repeats_with_its_seed():
    frequency, n_active = dictionary()
    drawn = draw(frequency, n_active, 20, RULE, 3, "0")
    features = [one.feature for one in drawn]
    assert len(set(features)) == 20
    assert (frequency[features] > -4).all()
    assert (n_active[features] >= 4).all()
    assert drawn == draw(frequency, n_active, 20, RULE, 3, "0")
    assert drawn != draw(frequency, n_active, 20, RULE, 4, "0")
    assert drawn != draw(frequency, n_active, 20, RULE, 3, "1")


def test_a_feature_with_too_few_rows_is_replaced_at_its_own_place_and_remembered():
    frequency, n_active = dictionary()
    drawn = draw(frequency, n_active, 20, RULE, 3, "0")
    replaced = [feature for one in drawn for feature in one.replaced]
    assert replaced
    assert (n_active[replaced] < 4).all()
    assert (frequency[replaced] > -4).all()
    # without the rule the same order of features is walked through, one per place
    order = [one.feature for one in draw(frequency, np.full(200, 9), 20 + len(replaced), RULE, 3, "0")]
    assert order == [feature for one in drawn for feature in (*one.replaced, one.feature)]


def test_every_fitting_feature_is_drawn_equally_often():
    frequency, n_active = np.full(12, -2.0), np.array([9] * 8 + [1] * 4)
    counts = Counter(one.feature for seed in range(600) for one in draw(frequency, n_active, 2, RULE, seed, "0"))
    assert sorted(counts) == list(range(8))
    # binomial: 150 ± 11.5 each; five standard deviations
    assert all(abs(count - 150) < 58 for count in counts.values())


def test_too_few_live_features_say_what_to_change():
    with pytest.raises(SettingsError, match=r"0: 50 features are wanted, 3 of its 6 have .* --min-active"):
        draw(np.array([-1, -2, -3, -5, np.nan, -1.0]), np.array([9, 9, 9, 9, 9, 1]), 50, RULE, 0, "0")
