"""Answers in text: every value on one line, and every token visible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tailrace.pipeline import cli
from tailrace.pipeline.query import stage
from tailrace.pipeline.query.text_table import render_table
from tests.support.tables_by_hand import feature_row, publish_tables


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("each", "each"),
        (" each", "' each'"),
        (" it's", '" it\'s"'),
        (" ", "' '"),
        ("    ", "'    '"),
        ("", ""),
        ("\n", "\\n"),
        ("\n\t  ", "'\\n\\t  '"),
    ],
)
def test_a_token_with_a_space_at_an_end_is_quoted(token: str, shown: str) -> None:
    lines = render_table(pa.table({"token": [token], "n": [1]})).splitlines()
    assert lines[-1].removesuffix("1").rstrip() == shown
    assert lines[-1].endswith("  1")


def test_a_column_is_quoted_throughout_or_not_at_all() -> None:
    lines = render_table(pa.table({"token": [" war", "ward", None], "folder": ["a", "b", "c d"]})).splitlines()
    assert lines[2:] == ["' war'  a", "'ward'  b", "        c d"]


def test_what_a_terminal_would_obey_is_shown_as_its_code() -> None:
    assert "a\\x1b[31mred\\n\\x9b" in render_table(pa.table({"token": ["a\x1b[31mred\n\x9b"]}))


def test_a_token_that_looks_like_a_colour_reaches_a_pipe_whole(tmp_path: Path, capfdbinary: Any) -> None:
    publish_tables(tmp_path / "tables", [feature_row(0)], [])
    sql = "SELECT 'a' || chr(27) || '[31mred' AS y"
    cli.main(["query", sql, "--tables", str(tmp_path / "tables"), "--format", "csv"])
    assert capfdbinary.readouterr().out == b"y\na\x1b[31mred\n"


def test_an_answer_without_rows_says_so() -> None:
    assert render_table(pa.table({"feature": pa.array([], pa.int32())})).splitlines()[-1] == "(no rows)"


def test_the_items_of_a_list_are_shown_plainly() -> None:
    table = pa.table({"window": [[" a", "  ", "b", ","]], "x": [[1.5, None, 2.0]]})
    assert "[' a', '  ', 'b', ',']  [1.5, null, 2]" in render_table(table)


def test_the_widest_columns_are_cut_until_a_line_fits() -> None:
    table = pa.table({"first": ["x" * 60] * 2, "last": ["y" * 200] * 2, "n": [1, 2]})
    assert render_table(table, width=100).splitlines()[-1] == "x" * 46 + "…  " + "y" * 46 + "…" + "  2"
    assert max(map(len, render_table(table, width=150).splitlines())) == 150
    assert "x" * 60 in render_table(table, width=150)


def test_a_row_wider_than_the_line_is_shown_one_line_a_column() -> None:
    table = pa.table({"feature": [3], "tokens": [[" the", " of", " and"] * 3], "n": [1]})
    assert render_table(table, width=40).splitlines() == [
        "feature  3",
        "tokens   [' the', ' of', ' and', ' the',",
        "         ' of', ' and', ' the', ' of',",
        "         ' and']",
        "n        1",
    ]
    assert len(render_table(table, width=120).splitlines()) == 3
    long = render_table(pa.table({"histogram": [[1] * 5000], "n": [1]}), width=60).splitlines()
    assert len(long) == 7
    assert long[-2].strip() == "…"


def test_wide_characters_keep_columns_aligned() -> None:
    lines = render_table(pa.table({"token": ["日本", "é", "e\u0301"], "n": [1, 2, 3]})).splitlines()
    assert lines[2:] == ["日本   1", "é      2", "e\u0301      3"]


def test_ctrl_c_in_a_query_is_what_it_is_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise RuntimeError("Query interrupted")  # as DuckDB reports it

    publish_tables(tmp_path / "tables", [feature_row(0)], [])
    monkeypatch.setattr(stage, "open_views", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage.select("SELECT 1", tables=tmp_path / "tables")
