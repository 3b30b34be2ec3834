"""Which of many cases of a test run in ``make test``; the others are slow."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def quick(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """Return the cases of a parameter, all but ``chosen`` marked slow."""
    return [case if case in chosen else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def diagonal(*parameters: Iterable[Any]) -> list[Any]:
    """Return every combination of parameters, all but as few as show each value once marked slow."""
    values = [list(parameter) for parameter in parameters]
    longest = max(map(len, values))
    shown = {tuple(row % len(own) for own in values) for row in range(longest)}
    places = product(*(range(len(own)) for own in values))
    return [
        case if place in shown else pytest.param(*case, marks=pytest.mark.slow)
        for place, case in zip(places, product(*values), strict=True)
    ]
