"""`pipeline label`: given by hand, to and from files, delphi's explanations, and refused where they do not belong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tailrace.pipeline.artifacts import removal
from tailrace.pipeline.label import stage
from tailrace.pipeline.query.stage import select
from tailrace.storage.errors import ArtifactMismatch, SettingsError
from tailrace.storage.labels import read_labels
from tests.support.cache_jobs import command
from tests.support.tables_by_hand import feature_row, publish_tables


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of tables of two layers."""
    for layer in (3, 4):
        publish_tables(tmp_path / "tables" / f"layer{layer}", [feature_row(n) for n in range(9)], [], layer=layer)
    return tmp_path / "tables"


@pytest.fixture
def tables(folder: Path) -> Path:
    return folder / "layer3"


def labels(tables: Path) -> dict[int, tuple[str, str, bool, str]]:
    return {one.feature: (one.label, one.note, one.starred, one.author) for one in read_labels(tables).values()}


def test_the_command_labels_shows_and_says_what_was_there(capsys: pytest.CaptureFixture[str], tables: Path) -> None:
    arguments = ["--note", "n" * 300, "--star", "--author", "ann"]
    assert "'votes', starred, note: " in command(capsys, "label", tables, "2,4", "votes", *arguments).out
    said = command(capsys, "label", tables, "2", "elections", "--author", "bob").out
    assert said.startswith("feature 2: 'elections', starred")
    assert "(was 'votes', starred, note: " in said
    assert len(said) < 400
    assert "elections" in command(capsys, "label", tables).out
    assert command(capsys, "label", tables, "8").out == "feature 8: no label\n"
    (shown,) = json.loads(command(capsys, "label", tables, "2", "--json").out)["labels"]
    assert (shown["label"], shown["starred"], shown["author"]) == ("elections", True, "bob")
    assert len(json.loads(command(capsys, "label", tables, "--json").out)["labels"]) == 2
    assert labels(tables)[4] == ("votes", "n" * 300, True, "ann")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["9", "x"], "FEATURE: not every part is a feature.*'9' is beyond the last feature, 8"),
        (["1", "x", "--export", "a.csv"], "give one of FEATURE, --import FILE and --export FILE"),
        (["--star"], "say which feature"),
        (["1", "--replace"], "--replace goes with --import"),
        (["--export", "labels.txt"], r"end it in \.csv, \.jsonl, \.parquet"),
        (["--import", "labels.txt"], r"wanted a file that ends in \.csv, \.jsonl, \.parquet, or delphi's folder"),
    ],
)
def test_what_cannot_be_is_refused(
    capsys: pytest.CaptureFixture[str], tables: Path, arguments: list[str], said: str
) -> None:
    answer = command(capsys, "label", tables, *arguments)
    assert answer.code != 0
    assert re.search(said, " ".join(answer.err.split()))


def test_of_a_folder_a_feature_is_named_with_its_layer(folder: Path) -> None:
    stage.run(folder, ["4:1,2"], label="four", author="ann")
    assert labels(folder / "layer3") == {}
    assert [feature for feature in labels(folder / "layer4")] == [1, 2]
    with pytest.raises(SettingsError, match="is of no layer here"):
        stage.run(folder, ["1"], label="x")


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_labels_go_to_a_file_and_come_back_the_same(folder: Path, tmp_path: Path, ending: str) -> None:
    stage.run(folder, ["layer3:0"], label='日本 "x", \U0001f5f3', note="two\n\nlines", starred=True, author="ann")
    stage.run(folder, ["layer4:5"], starred=True, author="bob")
    before = [labels(path) for path in (folder / "layer3", folder / "layer4")]
    assert stage.export_labels(folder, tmp_path / f"out.{ending}") == 2
    for path in (folder / "layer3", folder / "layer4"):
        (path / "labels.parquet").unlink()
    assert stage.import_labels(folder, tmp_path / f"out.{ending}").n_changed == 2
    assert [labels(path) for path in (folder / "layer3", folder / "layer4")] == before


def test_an_import_overwrites_only_when_told_to(tables: Path, tmp_path: Path) -> None:
    stage.run(tables, ["1"], label="war", author="ann")
    (tmp_path / "more.csv").write_text("feature,label,note\n1,peace,see 2\n2,ships,\n")
    imported = stage.import_labels(tables, tmp_path / "more.csv", author="tool")
    assert [(before.label, after.label) for _, before, after in imported.kept] == [("war", "peace")]
    assert labels(tables) == {1: ("war", "see 2", False, "tool"), 2: ("ships", "", False, "tool")}
    assert stage.import_labels(tables, tmp_path / "more.csv", replace=True).kept == []
    assert labels(tables)[1][0] == "peace"


def test_rows_that_cannot_be_taken_are_named_and_none_is(tables: Path, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    rows = [{"feature": 1, "label": "good"}, {"feature": "x"}, {"feature": 2, "label": 3}, {"feature": 3}]
    rows += [{"feature": 4, "label": "a", "transcoder": "sha256:ff"}, {"feature": 5, "starred": "perhaps"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "[1]\n{\n")
    with pytest.raises(SettingsError) as caught:
        stage.import_labels(tables, path)
    said = str(caught.value)
    assert "line 2: has no `feature` that is a whole number" in said
    assert "line 3: label: wanted text, got 3" in said
    assert "line 4: has none of `label`, `note` and `starred`" in said
    assert "and 2 more rows" in said
    assert labels(tables) == {}
    path.write_text('{"feature": 4, "label": "a", "transcoder": "sha256:ff"}\n')
    with pytest.raises(SettingsError, match=r"line 1: is of another transcoder \(transcoder sha256:ff\)"):
        stage.import_labels(tables, path)
    path.write_text('{"feature": 4, "label": "a"}\n')
    with pytest.raises(SettingsError, match="does not say which of 2 tables it is of; add a column `site`"):
        stage.import_labels(folder, path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="cannot be read"):
        stage.import_labels(tables, path)


def test_delphi_s_explanations_are_taken_by_module_and_long_ones_are_notes(tables: Path, tmp_path: Path) -> None:
    folder = tmp_path / "explanations"
    folder.mkdir()
    long = "fires on " + "very " * 60
    (folder / "layer3_latent2.txt").write_text(json.dumps("votes"))
    (folder / "layer3_latent7.txt").write_text(json.dumps({"explanation": long}))
    (folder / "layers.9.mlp_latent2.txt").write_text(json.dumps("other"))
    assert stage.import_labels(tables, folder).n_changed == 2
    there = labels(tables)
    assert there[2] == ("votes", "", False, "delphi")
    assert there[7] == (long[:199] + "…", long, False, "delphi")
    (folder / "layer3_latent8.txt").write_text("no JSON")
    with pytest.raises(SettingsError, match=r"layer3_latent8\.txt: has none of `label`"):
        stage.import_labels(tables, folder)
    with pytest.raises(SettingsError, match="has no explanation of layer4; there are some of layer3, layers"):
        stage.import_labels(tables.with_name("layer4"), folder)


def test_labels_are_a_view_with_and_without_rows(folder: Path, tables: Path) -> None:
    joined = "SELECT feature, label FROM features LEFT JOIN labels USING (feature) WHERE label IS NOT NULL"
    assert select(joined, tables).to_pylist() == []
    assert select("SELECT folder, feature FROM labels", folder).num_rows == 0
    stage.run(tables, ["3"], label="votes")
    assert select(joined, tables).to_pylist() == [{"feature": 3, "label": "votes"}]
    assert select("SELECT folder, label FROM labels", folder).to_pylist() == [{"folder": "layer3", "label": "votes"}]


def test_the_view_of_no_labels_has_the_columns_of_the_file(tables: Path) -> None:
    empty = select("SELECT * FROM labels", tables)
    stage.run(tables, ["3"], label="votes")
    assert select("SELECT * FROM labels LIMIT 0", tables).schema.remove_metadata() == empty.schema.remove_metadata()


def test_rm_refuses_tables_with_labels_unless_it_is_forced(folder: Path, tables: Path) -> None:
    assert len(removal.plan([tables], [folder])) == 1
    stage.run(tables, ["3"], label="votes")
    with pytest.raises(ArtifactMismatch, match="people labelled its features, and the labels would go, too"):
        removal.plan([tables], [folder])
    assert len(removal.plan([tables], [folder], is_forced=True)) == 1
