"""Statistics of blind ratings of two dictionaries: shares with intervals, their difference, and its p-value.

Intervals of a share are Wilson's (1927), of a difference of two shares Newcombe's (1998, "Interval estimation for the
difference between independent proportions", method 10), which combines the two Wilson intervals. The p-value is exact:
if the dictionaries did not differ, every assignment of the ratings to them would be equally likely.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tailrace.analysis.harvest.histogram import wilson_interval

Verdict = Literal["yes", "maybe", "no"]
VERDICTS: tuple[Verdict, ...] = ("yes", "maybe", "no")
SCORES: dict[Verdict, int] = {"no": 0, "maybe": 1, "yes": 2}
"""A verdict as a number, for the comparison that uses all of them at once."""


@dataclass(frozen=True)
class Rating:
    """A rater's judgement of an item."""

    verdict: Verdict
    """Whether the feature has an interpretation."""
    context_free: bool
    """Whether it fires on single tokens whatever their context."""


@dataclass(frozen=True)
class Share:
    """A share of a dictionary's items, with its 95 % Wilson interval."""

    count: int
    of: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share itself."""
        return self.count / self.of


@dataclass(frozen=True)
class Comparison:
    """The share of one kind of rating in both dictionaries."""

    name: str
    first: Share
    second: Share
    low: float
    high: float
    """95 % interval of the difference, first less second."""
    p_value: float
    """Share of all assignments of the ratings to the dictionaries whose difference is at least as large."""

    @property
    def difference(self) -> float:
        """First less second."""
        return self.first.value - self.second.value


@dataclass(frozen=True)
class Tally:
    """The comparisons of all kinds of ratings, and of the mean score."""

    comparisons: list[Comparison]
    """Of ``yes``, ``yes or maybe``, ``maybe``, ``no`` and ``context-free``."""
    mean_score: tuple[float, float]
    """Mean of ``SCORES`` in both dictionaries."""
    p_value: float
    """Of the difference of mean scores: the test to report, as it uses every rating once."""


def tally(first: Sequence[Rating], second: Sequence[Rating]) -> Tally:
    """Compare the ratings of two dictionaries, one item or more of each."""
    kinds: dict[str, Callable[[Rating], bool]] = {
        "yes": lambda rating: rating.verdict == "yes",
        "yes or maybe": lambda rating: rating.verdict != "no",
        "maybe": lambda rating: rating.verdict == "maybe",
        "no": lambda rating: rating.verdict == "no",
        "context-free": lambda rating: rating.context_free,
    }
    comparisons = [
        compare(name, [int(holds(rating)) for rating in first], [int(holds(rating)) for rating in second])
        for name, holds in kinds.items()
    ]
    scores = [[SCORES[rating.verdict] for rating in ratings] for ratings in (first, second)]
    means = (sum(scores[0]) / len(first), sum(scores[1]) / len(second))
    return Tally(comparisons, means, permutation_p_value(*scores))


def compare(name: str, first: Sequence[int], second: Sequence[int]) -> Comparison:
    """Compare how often something holds (1) or not (0) in two samples."""
    shares = [share(sum(sample), len(sample)) for sample in (first, second)]
    low, high = difference_interval(*shares)
    return Comparison(name, shares[0], shares[1], low, high, permutation_p_value(first, second))


def share(count: int, of: int) -> Share:
    """Return ``count`` of ``of`` with the 95 % Wilson interval."""
    low, high = wilson_interval(np.array([count]), of)
    return Share(count, of, float(low[0]), float(high[0]))


def difference_interval(first: Share, second: Share) -> tuple[float, float]:
    """Return the 95 % interval of first less second: each limit is as far off as the two it is made of together."""
    difference = first.value - second.value
    down = math.hypot(first.value - first.low, second.high - second.value)
    up = math.hypot(first.high - first.value, second.value - second.low)
    return difference - down, difference + up


def permutation_p_value(first: Sequence[int], second: Sequence[int]) -> float:
    """Return the exact two-sided p-value of the difference of two means under exchange of labels.

    Scores are integers of few distinct values, so assignments are counted by how many of each value the first sample
    gets: n₁ of N items with sum s, over all (N choose n₁). Compared as integers, so that ties are exact.
    """
    n_first, n_all = len(first), len(first) + len(second)
    total = sum(first) + sum(second)
    ways: Counter[tuple[int, int]] = Counter({(0, 0): 1})  # (items taken, their sum) → number of assignments
    for value, there in Counter([*first, *second]).items():
        further: Counter[tuple[int, int]] = Counter()
        for (taken, so_far), number in ways.items():
            for more in range(min(there, n_first - taken) + 1):
                further[taken + more, so_far + more * value] += number * math.comb(there, more)
        ways = further
    observed = abs(sum(first) * n_all - total * n_first)
    extreme = sum(
        number
        for (taken, so_far), number in ways.items()
        if taken == n_first and abs(so_far * n_all - total * n_first) >= observed
    )
    return extreme / math.comb(n_all, n_first)
