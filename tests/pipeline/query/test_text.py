"""Answers in text: every value on one line, and every token visible."""

from __future__ import annotations

import pyarrow as pa
import pytest

from tailrace.pipeline.query.stage import render_table


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" each", " each"),
        (" ", "' '"),
        ("    ", "'    '"),
        ("", ""),
        ("\n", "\\n"),
        ("\n\t  ", "\\n\\t"),
    ],
)
def test_a_token_of_spaces_alone_is_quoted_and_others_are_not(token: str, shown: str) -> None:
    lines = render_table(pa.table({"token": [token], "n": [1]})).splitlines()
    assert lines[-1].removesuffix("1").rstrip() == shown
    assert lines[-1].endswith("  1")


def test_an_answer_without_rows_says_so() -> None:
    assert render_table(pa.table({"feature": pa.array([], pa.int32())})).splitlines()[-1] == "(no rows)"


def test_tokens_inside_a_list_are_shown_alike() -> None:
    assert "[ a, '  ', b]" in render_table(pa.table({"window": [[" a", "  ", "b"]]}))


def test_the_last_column_takes_the_rest_of_the_line_and_others_are_cut() -> None:
    line = render_table(pa.table({"first": ["x" * 60], "last": ["y" * 200]})).splitlines()[-1]
    assert line == "x" * 47 + "…  " + "y" * 99 + "…"
    assert len(line) == 150
