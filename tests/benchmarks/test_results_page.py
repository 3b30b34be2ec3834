"""docs/results.md says what the files of results say, and what was missed is called missed."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks.report import RESULTS
from benchmarks.results_page import PAGE, Ratio, page, results


def test_the_page_is_in_step_with_the_files_of_results() -> None:
    assert PAGE.read_text() == page(), "run: python -m benchmarks.results_page"


def test_every_ratio_of_every_newest_file_is_on_the_page_with_its_digits() -> None:
    text = PAGE.read_text()
    for name, result in results().items():
        section = text.split(f"### {name}\n")[1].split("\n### ")[0]
        written = dict(re.findall(r"^\| `([^`]+)` \| ([^ ]+) \|", section, re.M))
        recorded = json.loads((RESULTS / result["file"]).read_text())["ratios"]
        assert {key: float(value) for key, value in written.items()} == pytest.approx(recorded, rel=1e-5)


@pytest.mark.parametrize(
    ("value", "target", "spec", "text"),
    [
        (3.885, "≥ 4", "t", "3.9 (≥ 4: missed)"),
        (5.391, "≥ 4", "t", "5.4 (≥ 4)"),
        (1.103, "flat: ≤ 1.1", "4t", "1.103 (flat: ≤ 1.1: missed)"),
        (1.018, "flat: ≤ 1.1", "3t", "1.02 (flat: ≤ 1.1)"),
        (1.0, "1", "t", "1.0 (1)"),
        (47290.0, "", "t", "47,000"),
        (0.5882, "≥ 0.5", "", "0.59"),
    ],
)
def test_a_ratio_is_written_with_its_target_and_says_if_it_was_missed(
    value: float, target: str, spec: str, text: str
) -> None:
    result = {"ratios": {"it": value}, "targets": {"it": target}, "machine": {"cpu": "AMD"}}
    assert format(Ratio.of(result, "it"), spec).replace("\N{NO-BREAK SPACE}", " ") == text
