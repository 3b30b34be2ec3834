"""One site over several tables: names in the address, data by folder, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailrace.pipeline.dashboard import stage as dashboard
from tailrace.pipeline.dashboard.serve import TablesSite, open_site
from tailrace.pipeline.dashboard.settings import DashboardSettings
from tailrace.pipeline.dashboard.site_data import unpack
from tailrace.pipeline.dashboard.sites import open_tables
from tailrace.storage.artifact import read_json, verify_artifact
from tailrace.storage.errors import ArtifactMismatch, SettingsError
from tailrace.storage.labels import LabelEdit, edit_labels
from tests.support.dashboard_tables import make_tables
from tests.support.tables_by_hand import feature_row, publish_tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "tables"
    for seed, name in enumerate(("layer3", "k=8,seed=1")):
        make_tables(folder / name, d_sae=8, parts=(), seed=seed)
    return folder


def test_each_of_several_tables_has_its_own_folder_of_data(folder: Path, tmp_path: Path) -> None:
    edit_labels(folder / "layer3", [LabelEdit(2, "ann", "votes")])
    result = dashboard.run(DashboardSettings(), tables=folder, output=tmp_path / "site", quiet=True)
    assert result.n_features == 16
    listed = json.loads((result.path / "data/sites.js").read_text().removeprefix("window.dashboardSites = ")[:-2])
    assert [(one["at"], one["site"], one["features"]) for one in listed] == [
        ("k=8,seed=1", "layer1", 8),
        ("layer3", "layer1", 8),
    ]
    own = [unpack((result.path / f"data/{one['at']}/index.js").read_bytes()) for one in listed]
    assert own[0]["max"] != own[1]["max"]
    assert ["label" in one for one in own] == [False, True]
    assert '<script defer src="data/sites.js"></script>' in (result.path / "index.html").read_text()
    assert verify_artifact(result.path, "dashboard") == []
    manifest = read_json(result.path / "manifest.json")
    assert set(manifest["inputs"]["tables"]) == set(manifest["sites"]) == {"layer3", "k=8,seed=1"}
    assert set(manifest["inputs"]["labels"]) == {"layer3"}
    served = TablesSite([folder])
    for name in manifest["files"]:
        assert served.read(name) == (result.path / name).read_bytes(), name
    for name in ("data/index.js", "data/none/index.js", "data/../index.js", "data/layer3/none.js"):
        assert served.read(name) is None


def test_features_of_one_of_them_leave_the_others_out(folder: Path, tmp_path: Path) -> None:
    site = dashboard.run(DashboardSettings(feature=("layer3:1,2",)), tables=folder, output=tmp_path / "s", quiet=True)
    assert site.n_features == 2
    assert not (site.path / "data/k=8,seed=1").exists()
    assert unpack((site.path / "data/layer3/index.js").read_bytes())["feature"] == [1, 2]


def test_a_site_of_one_has_no_list_and_no_name(folder: Path, tmp_path: Path) -> None:
    site = dashboard.run(DashboardSettings(), tables=[folder / "layer3"], output=tmp_path / "s", quiet=True).path
    assert (site / "data/index.js").exists()
    assert not (site / "data/sites.js").exists()
    assert "sites.js" not in (site / "index.html").read_text().replace("site/sites.js", "")


def test_tables_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for run in ("a", "b"):
        publish_tables(tmp_path / run / "layer3", [feature_row(0)], [])
    assert list(open_tables([tmp_path / "a/layer3", tmp_path / "b/layer3"])) == ["a-layer3", "b-layer3"]
    with pytest.raises(SettingsError, match="is given twice"):
        open_tables([tmp_path / "a/layer3", tmp_path / "a/layer3"])
    publish_tables(tmp_path / "c" / "<b>", [feature_row(0)], [], model="another")
    with pytest.raises(SettingsError, match="its model is another than that of"):
        open_tables([tmp_path / "a/layer3", tmp_path / "c/<b>"])
    shutil.copytree(tmp_path / "c/<b>", tmp_path / "c/日本")
    assert list(open_tables([tmp_path / "c"])) == ["-b-", "日本"]


def test_similar_features_are_linked_both_ways_and_files_about_other_tables_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    paths = [folder / "layer3", folder / "k=8,seed=1"]
    edit_labels(paths[1], [LabelEdit(4, "ann", "votes")])
    rows = [
        {"side": "a", "feature": 6, "cosine_feature": 4, "cosine": 0.51239, "phi_feature": None, "phi": None},
        {"side": "b", "feature": 4, "cosine_feature": 6, "cosine": 0.51239, "phi_feature": 0, "phi": 0.25},
    ]
    sides = {side: {"tables": str(path), "digest": digest_of(path)} for side, path in zip("ab", paths, strict=True)}
    file = tmp_path / "matches.parquet"
    table = pa.Table.from_pylist(rows)
    pq.write_table(table.replace_schema_metadata({"summary": json.dumps(sides)}), file)
    site = dashboard.run(DashboardSettings(), tables=paths, output=tmp_path / "s", matches=[file], quiet=True).path
    found = {
        name: {one["feature"]: one["similar"] for one in features_of(site / f"data/{name}")}
        for name in ("layer3", "k=8,seed=1")
    }
    assert found["layer3"][6] == [["k=8,seed=1", "cosine", 4, 0.5124, "votes"]]
    assert found["k=8,seed=1"][4] == [["layer3", "cosine", 6, 0.5124, ""], ["layer3", "phi", 0, 0.25, ""]]
    assert found["layer3"][3] == []
    assert len(read_json(site / "manifest.json")["inputs"]["matches"]) == 1
    edit_labels(paths[1], [LabelEdit(4, "ann", "war")])
    dashboard.run(DashboardSettings(), tables=paths, output=site, matches=[file], quiet=True)
    similar = {one["feature"]: one["similar"] for one in features_of(site / "data/layer3")}
    assert similar[6] == [["k=8,seed=1", "cosine", 4, 0.5124, "war"]]
    served = TablesSite(paths, matches=[file]).read("data/layer3/features-000000.js")
    assert served == (site / "data/layer3/features-000000.js").read_bytes()
    with pytest.raises(SettingsError, match="both of which a site must show"):
        dashboard.run(DashboardSettings(), tables=paths[:1], output=tmp_path / "t", matches=[file], quiet=True)
    with pytest.raises(SettingsError, match="holds no matches"):
        dashboard.run(
            DashboardSettings(),
            tables=paths,
            output=tmp_path / "t",
            matches=[paths[0] / "features.parquet"],
            quiet=True,
        )
    for summary in ("{", '{"a": 1}', json.dumps(sides)):  # the last without the columns
        other = tmp_path / "other.parquet"
        pq.write_table(table.select(["feature"]).replace_schema_metadata({"summary": summary}), other)
        with pytest.raises(SettingsError, match=r"other.parquet: holds no matches"):
            dashboard.run(DashboardSettings(), tables=paths, output=tmp_path / "t", matches=[other], quiet=True)


def features_of(data: Path) -> list[dict[str, Any]]:
    features: list[dict[str, Any]] = unpack((data / "features-000000.js").read_bytes())["features"]
    return features


def digest_of(path: Path) -> str:
    digest: str = read_json(path / "manifest.json")["digest"]
    return digest


def test_what_no_site_can_show_together_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="of one dictionary's features"):
        dashboard.run(DashboardSettings(blind=True), tables=folder, output=tmp_path / "s", quiet=True)
    site = dashboard.run(DashboardSettings(feature=("0",)), tables=folder / "layer3", output=tmp_path / "s", quiet=True)
    with pytest.raises(ArtifactMismatch, match="is of kind dashboard, which cannot be served; give one dashboard"):
        open_site([folder, site.path])
