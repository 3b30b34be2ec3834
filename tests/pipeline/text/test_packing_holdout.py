import numpy as np
import pytest

from tailrace.pipeline.text.holdout import HoldoutRule
from tailrace.pipeline.text.settings import CapturedContexts
from tailrace.storage.errors import SettingsError, TextError


def listed(text, n=60):
    rule = HoldoutRule.parse(text)
    return [d for d in range(n) if rule.is_candidate(d, None, limited=True)]


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("7::20", [7, 27, 47]),
        ("3,17", [3, 17]),
        ("5", [5]),
        ("0:1", [0]),
        (":3", [0, 1, 2]),
        ("10:20:5, 40", [10, 15, 40]),
    ],
)
def test_list_names_documents_by_index_or_slice(text, documents):
    assert listed(text) == documents


@pytest.mark.parametrize("text", ["0", "none", " 0 "])
def test_nothing_is_held_out_on_request(text):
    rule = HoldoutRule.parse(text)
    assert not rule.holds_out
    assert rule.target_rows(1000) == 0


@pytest.mark.parametrize("text", ["0.01", "1%", " 1 % "])
def test_share_may_be_a_decimal_or_a_percentage(text):
    assert HoldoutRule.parse(text) == HoldoutRule(0.01)


@pytest.mark.parametrize("text", ["", "x", "0.7", "-0.1", "1:2:0", "3,a", "nan", "5:-1"])
def test_anything_else_is_refused_with_examples(text):
    with pytest.raises(SettingsError, match="such as 7::20"):
        HoldoutRule.parse(text)


def test_chance_is_uniform_and_depends_on_the_seed():
    chances = np.array([HoldoutRule(seed=3).chance(d) for d in range(20_000)])
    # Mean of 20,000 uniform values: 0.5 with standard deviation 0.289 / √20,000 = 0.002.
    assert abs(chances.mean() - 0.5) < 0.01
    counts = np.histogram(chances, bins=10, range=(0, 1))[0]
    # Each bin: 2,000 expected, standard deviation √(20,000·0.1·0.9) = 42.
    assert np.all(np.abs(counts - 2000) < 210)
    assert HoldoutRule(seed=3).chance(5) != HoldoutRule(seed=4).chance(5)


def test_twice_the_share_are_candidates_while_a_number_of_rows_is_wanted():
    rule = HoldoutRule(0.05)
    limited = sum(rule.is_candidate(d, None, limited=True) for d in range(20_000))
    unlimited = sum(rule.is_candidate(d, None, limited=False) for d in range(20_000))
    assert abs(limited - 2000) < 210  # 42 is one standard deviation
    assert abs(unlimited - 1000) < 160  # 31 is one standard deviation


def test_first_documents_give_one_to_each_split():
    rule = HoldoutRule(0.5)
    first = rule.first_choices([4, 8, 15])
    assert first is not None
    assert rule.chance(first.held_out) == min(rule.chance(d) for d in (4, 8, 15))
    assert rule.chance(first.trained) == max(rule.chance(d) for d in (4, 8, 15))
    assert rule.is_candidate(first.held_out, first, limited=True)
    assert not rule.is_candidate(first.trained, first, limited=True)


def test_one_document_is_too_few():
    with pytest.raises(TextError, match="single document"):
        HoldoutRule(0.01).first_choices([0])


def test_target_is_the_share_of_the_training_rows():
    assert HoldoutRule(0.01).target_rows(60_000) == 600
    assert HoldoutRule(0.01).target_rows(10) == 1
    assert HoldoutRule(0.01).target_rows(None) is None
    assert HoldoutRule.parse("7::20").target_rows(1000) is None


@pytest.mark.parametrize(("number", "text"), [(0.05, "0.05"), (0, "0"), (3, "3")])
def test_a_share_may_be_a_number_as_in_a_file(number, text):
    assert CapturedContexts.read({"holdout": number}).holdout == text
