"""Cards of a notebook: escaped, and without anything that a page would run or load."""

from __future__ import annotations

import math

from tailrace.storage.display import card, line, shown, table, tokens

HOSTILE = '<script>alert("x")</script>'


def test_no_text_becomes_markup() -> None:
    parts = (table([HOSTILE], [[HOSTILE]]), tokens([HOSTILE], [1.0]), line("", HOSTILE))
    html = card(HOSTILE, {HOSTILE: HOSTILE}, *parts, note=HOSTILE)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 8


def test_values_are_shown_as_people_read_them_and_missing_facts_are_left_out() -> None:
    assert [shown(value) for value in (11049, 0.270412, True, None, "k")] == ["11,049", "0.2704", "True", "–", "k"]
    html = card("Transcoder", {"FVU": 0.5, "L0": None})
    assert "FVU" in html
    assert "L0" not in html


def test_a_token_is_shaded_by_its_activation_and_one_without_a_row_is_not() -> None:
    none, weak, strong = tokens(["a"], [math.nan]), tokens(["a"], [0.1]), tokens(["a"], [1.0])
    assert "background" not in none
    shades = [float(html.split("rgba(245,133,24,")[1].split(")")[0]) for html in (weak, strong)]
    assert shades == sorted(shades)
    assert shades[0] < shades[1] <= 0.8  # the text stays readable
    assert tokens(["a", "b"], [0, 0], at=1).count("font-weight:bold") == 1
