"""Where labels are seen: the list of a dashboard, and the notes of scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tailrace.pipeline.dashboard import stage as dashboard
from tailrace.pipeline.dashboard.serve import TablesSite
from tailrace.pipeline.dashboard.settings import DashboardSettings
from tailrace.pipeline.dashboard.site_data import unpack
from tailrace.pipeline.score.stage import Scores, about_features
from tailrace.pipeline.score.text import as_json, feature_note
from tailrace.storage.artifact import read_json
from tailrace.storage.errors import ArtifactMismatch
from tailrace.storage.labels import LabelEdit, edit_labels
from tests.support.dashboard_tables import MadeTables, make_tables


@pytest.fixture
def made(tmp_path: Path) -> MadeTables:
    return make_tables(tmp_path / "tables", d_sae=8, parts=())


def test_a_site_shows_labels_as_they_were_and_is_another_site_once_they_change(
    made: MadeTables, tmp_path: Path
) -> None:
    def site(name: str, **settings: object) -> Path:
        return dashboard.run(DashboardSettings(**settings), tables=made.path, output=tmp_path / name, quiet=True).path

    bare = site("bare")
    assert not {"label", "note", "starred"} & unpack((bare / "data/index.js").read_bytes()).keys()
    edit_labels(made.path, [LabelEdit(2, "ann", "votes\u202e", "two\nlines", starred=True)])
    index = unpack((site("labelled") / "data/index.js").read_bytes())
    assert index["label"] == ["", "", "votes[U+202E]", *[""] * 5]
    assert (index["note"][2], index["starred"]) == ("two\nlines", [0, 0, 1, 0, 0, 0, 0, 0])
    assert read_json(tmp_path / "labelled/manifest.json")["inputs"]["labels"].keys() == {"layer1"}
    with pytest.raises(ArtifactMismatch, match="labels: is not there, asked for"):
        site("bare")
    assert site("without", feature=(0, 1)) == tmp_path / "without"
    assert "labels" not in read_json(tmp_path / "without/manifest.json")["inputs"]
    assert site("blind", blind=True, feature=(2,)) == tmp_path / "blind"
    assert "votes" not in (tmp_path / "blind/item-0001.html").read_text()


def test_a_served_list_has_labels_as_they_are_now(made: MadeTables) -> None:
    def labels() -> list[str] | None:
        content = site.read("data/index.js")
        assert content is not None
        return unpack(content).get("label")

    site = TablesSite([made.path])
    assert labels() is None
    for label in ("votes", "elections"):
        edit_labels(made.path, [LabelEdit(0, "ann", label)])
        assert labels() == [label, *[""] * 7]
    assert site.read("data/index.js") is site.read("data/index.js")


def test_scores_tell_a_label_before_what_was_counted(made: MadeTables) -> None:
    edit_labels(made.path, [LabelEdit(2, "ann", "votes"), LabelEdit(3, "ann", note="only a note")])
    about = about_features(made.path, {10, 11, 12, 13}, 10, 8)
    assert list(about[12])[:2] == ["label", "frequency"]
    assert "label" not in about[13]
    scores = Scores("m", "t", "layer1", [2], True, False, [], {2: about[12]})
    assert feature_note(scores, 2).startswith("votes, active on ")
    assert as_json(scores)["features"][0]["label"] == "votes"
    assert np.isfinite(about[12]["max"])
