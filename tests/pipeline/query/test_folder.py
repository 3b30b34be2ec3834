"""Queries over a folder of tables: all of them as one, and whose each row is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tailrace.pipeline.query import stage as query
from tailrace.storage.errors import ArtifactMissing
from tests.support.cache_jobs import command
from tests.support.tables_by_hand import example_row, feature_row, publish_tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of three layers, and a file that is none of theirs."""
    place = tmp_path_factory.mktemp("layers") / "it's"
    for layer in (2, 3, 10):
        features = [feature_row(number, max=float(layer * 100 + number)) for number in range(layer)]
        publish_tables(place / f"layer{layer}", features, [example_row(0)], layer=layer)
    (place / "notes.txt").write_text("")
    return place


def test_rows_of_all_folders_are_seen_with_the_name_of_theirs(folder: Path) -> None:
    sql = "SELECT folder, count(*) AS n, max(max) AS top FROM features GROUP BY folder ORDER BY n"
    answer = query.select(sql, folder)
    assert answer.to_pylist() == [
        {"folder": "layer2", "n": 2, "top": 201.0},
        {"folder": "layer3", "n": 3, "top": 302.0},
        {"folder": "layer10", "n": 10, "top": 1009.0},
    ]


def test_columns_of_a_folder_begin_with_whose_a_row_is(folder: Path) -> None:
    listed = query.list_tables(folder).to_pylist()
    first = next(row for row in listed if row["table"] == "features")
    assert (first["column"], first["type"]) == ("folder", "string")
    assert "folder" not in {row["column"] for row in query.list_tables(folder / "layer2").to_pylist()}


def test_a_folder_may_be_named_beside_others(folder: Path) -> None:
    sql = "SELECT count(*) AS n FROM a.features JOIN b.features USING (feature) WHERE a.features.folder = 'layer10'"
    assert query.select(sql, {"a": folder, "b": folder / "layer3"}).to_pylist() == [{"n": 3}]


def test_each_folder_is_asked_by_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sql = "SELECT feature, max FROM features WHERE max > $least ORDER BY max DESC LIMIT 2"
    given: dict[str, Any] = {"format": "json", "parameters": {"least": 201}}
    answer = json.loads(query.run(sql, tables=folder, each=True, **given))
    names = ("layer2", "layer3", "layer10")
    alone = {name: json.loads(query.run(sql, tables=folder / name, each=True, **given)) for name in names}
    assert answer == [{"folder": name, **row} for name, rows in alone.items() for row in rows]
    assert [row["folder"] for row in answer] == ["layer3"] * 2 + ["layer10"] * 2
    assert command(capsys, "query", "SELECT folder FROM examples", "--tables", folder).out.count("layer") == 3


def test_a_folder_without_tables_is_still_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactMissing):
        query.select("SELECT 1", tmp_path)
