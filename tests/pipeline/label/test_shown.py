"""Where labels are seen: the list of a dashboard, and the notes of scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tailrace.pipeline.dashboard import stage as dashboard
from tailrace.pipeline.dashboard.serve import TablesSite
from tailrace.pipeline.dashboard.settings import DashboardSettings
from tailrace.pipeline.dashboard.site_data import SiteData, unpack
from tailrace.pipeline.score.stage import Scores, about_features
from tailrace.pipeline.score.text import as_json, feature_note
from tailrace.storage.artifact import read_json, verify_artifact
from tailrace.storage.errors import ArtifactMismatch
from tailrace.storage.labels import LabelEdit, edit_labels
from tests.support.dashboard_tables import MadeTables, make_tables


@pytest.fixture
def made(tmp_path: Path) -> MadeTables:
    return make_tables(tmp_path / "tables", d_sae=8, parts=())


def run(made: MadeTables, path: Path, **settings: object) -> Path:
    return dashboard.run(DashboardSettings(**settings), tables=made.path, output=path, quiet=True).path


def test_a_site_made_again_shows_the_labels_of_today(made: MadeTables, tmp_path: Path) -> None:
    site = run(made, tmp_path / "site")
    assert not {"label", "note", "starred"} & unpack((site / "data/index.js").read_bytes()).keys()
    bare = {path: path.stat() for path in site.rglob("*.js")}
    edit_labels(made.path, [LabelEdit(2, "ann", "votes\u202e", "two\nlines", starred=True)])
    run(made, site)
    index = unpack((site / "data/index.js").read_bytes())
    assert index["label"] == ["", "", "votes[U+202E]", *[""] * 5]
    assert (index["note"][2], index["starred"]) == ("two\nlines", [0, 0, 1, 0, 0, 0, 0, 0])
    assert read_json(site / "manifest.json")["inputs"]["labels"].keys() == {"layer1"}
    assert (site / "data/features-000000.js").stat() == bare[site / "data/features-000000.js"]  # was not made again
    edit_labels(made.path, [LabelEdit(2, "ann", "", "", starred=False)])
    assert "label" not in unpack((run(made, site) / "data/index.js").read_bytes())
    assert verify_artifact(site, "dashboard") == []
    before = (site / "manifest.json").stat()
    assert (run(made, site) / "manifest.json").stat() == before
    with pytest.raises(ArtifactMismatch, match="window: there it is 24, asked for 2"):
        run(made, site, window=2)
    assert run(made, tmp_path / "without", feature=(0, 1)) == tmp_path / "without"
    edit_labels(made.path, [LabelEdit(2, "ann", "votes")])
    assert "labels" not in read_json(run(made, tmp_path / "without", feature=(0, 1)) / "manifest.json")["inputs"]
    assert run(made, tmp_path / "blind", blind=True, feature=(2,)) == tmp_path / "blind"
    assert "votes" not in (tmp_path / "blind/item-0001.html").read_text()


def test_a_page_that_was_damaged_is_made_again_with_the_labels(made: MadeTables, tmp_path: Path) -> None:
    site = run(made, tmp_path / "site")
    page = site / "data/features-000000.js"
    good = page.read_bytes()
    page.write_bytes(good[:-9] + b"x" + good[-8:])
    (site / "mine.txt").write_text("precious")
    edit_labels(made.path, [LabelEdit(2, "ann", "votes")])
    with pytest.raises(ArtifactMismatch, match=r"no part of the dashboard: mine\.txt"):
        run(made, site)
    (site / "mine.txt").rename(tmp_path / "mine.txt")
    run(made, site)
    assert page.read_bytes() == good
    assert verify_artifact(site, "dashboard") == []


def test_labels_that_change_again_before_the_site_is_done_are_those_of_the_end(
    made: MadeTables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = run(made, tmp_path / "site")
    edit_labels(made.path, [LabelEdit(2, "ann", "votes")])
    with monkeypatch.context() as patched:
        patched.setattr(SiteData, "index", None)
        with pytest.raises(TypeError):
            run(made, site)
    assert not (site / "manifest.json").exists()
    edit_labels(made.path, [LabelEdit(2, "ann", "war")])
    assert unpack((run(made, site) / "data/index.js").read_bytes())["label"][2] == "war"
    assert verify_artifact(site, "dashboard") == []


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
