"""`pipeline dashboard`: what is written, that it is whole or absent, that text stays text, what is refused."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tailrace.analysis.dashboards.feature_tables import FeatureTables
from tailrace.pipeline import cli
from tailrace.pipeline.dashboard import site_data
from tailrace.pipeline.dashboard import stage as dashboard
from tailrace.pipeline.dashboard.settings import DashboardSettings
from tailrace.pipeline.dashboard.site_data import FEATURES_PER_FILE, pack, unpack
from tailrace.pipeline.dashboard.stage import site_files
from tailrace.storage.artifact import verify_artifact
from tailrace.storage.errors import ArtifactMismatch, ArtifactMissing
from tests.support.dashboard_tables import WORDS, MadeTables, make_tables

SCRIPTS = [path for path in site_files().values() if path.suffix == ".js"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeTables:
    return make_tables(tmp_path_factory.mktemp("made") / "tables")


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_site_holds_its_own_files_and_all_features(made: MadeTables, tmp_path: Path) -> None:
    result = dashboard.run(DashboardSettings(), tables=made.path, output=tmp_path / "site", quiet=True)
    assert (result.n_features, result.page.is_file()) == (70, True)
    assert verify_artifact(result.path, dashboard.KIND) == []
    written = [unpack(path.read_bytes()) for path in sorted((result.path / "data").glob("features-*.js"))]
    assert [page["feature"] for file in written for page in file["features"]] == list(range(70))
    assert [len(file["features"]) for file in written] == [FEATURES_PER_FILE, FEATURES_PER_FILE, 6]
    index = unpack((result.path / "data" / "index.js").read_bytes())
    assert index["feature"] == list(range(70))
    assert index["about"]["features_per_file"] == FEATURES_PER_FILE


def test_the_page_names_files_that_are_there_and_nothing_else(made: MadeTables, tmp_path: Path) -> None:
    result = dashboard.run(DashboardSettings(feature=("0",)), tables=made.path, output=tmp_path / "site", quiet=True)
    page = result.page.read_text()
    named = [name for name in re.findall(r'(?:src|href)="([^"]*)"', page) if name != "data:,"]
    assert named
    assert [name for name in named if not (result.path / name).is_file()] == []
    assert {name for name in site_files() if name != "index.html"} == set(named)
    everything = page + "".join(path.read_text() for path in (result.path / "site").iterdir())
    addresses = set(re.findall(r"\w+://[^\s\"')]*", everything))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which is not fetched


def test_architecture_and_text_are_those_of_what_lies_near_the_tables(tmp_path: Path) -> None:
    tables = FeatureTables(make_tables(tmp_path / "tables" / "own", d_sae=8, parts=()).path)
    data = site_data.SiteData(tables, [0], 8)
    about = unpack(data.index({}))["about"]
    assert (about["architecture"], about["text"]) == (None, {"cache": "c0", "dataset": None})
    near = {
        "transcoders/other": {"digest": "sha256:01", "architecture": {"kind": "relu"}, "request": "sha256:00"},
        "transcoders/own": {"digest": "sha256:00", "architecture": {"kind": "topk", "k": 8}},
        "cache": {"cache_id": "c0"},
    }
    for name, manifest in near.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
        (tmp_path / name / "request.json").write_text(json.dumps({"dataset": "texts/own.jsonl"}))
    (tmp_path / "transcoders" / "broken").mkdir()
    (tmp_path / "transcoders" / "broken" / "manifest.json").write_text("{ sha256:00 c0")
    about = unpack(site_data.SiteData(tables, [0], 8).index({}))["about"]
    assert about["architecture"] == {"kind": "topk", "k": 8}
    assert about["text"] == {"cache": "c0", "dataset": "own.jsonl"}


def test_only_chosen_features_are_written(made: MadeTables, tmp_path: Path) -> None:
    settings = DashboardSettings(feature=("3, 66-69", "66"))
    result = dashboard.run(settings, tables=made.path, output=tmp_path / "site", quiet=True)
    assert result.n_features == 5
    names = [path.stem for path in sorted((result.path / "data").glob("features-*"))]
    assert names == ["features-000000", "features-000064"]
    pages = unpack((result.path / "data" / "features-000064.js").read_bytes())["features"]
    assert [page["feature"] for page in pages] == [66, 67, 68, 69]


def test_a_killed_run_continues_and_ends_with_the_same_bytes(
    made: MadeTables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dashboard.run(DashboardSettings(), tables=made.path, output=tmp_path / "whole", quiet=True)
    made_files: list[str] = []

    def pack_twice(name: str, value: object) -> bytes:
        if len(made_files) == 2:
            raise KeyboardInterrupt
        made_files.append(name)
        return pack(name, value)

    with monkeypatch.context() as patch:
        patch.setattr(site_data, "pack", pack_twice)
        with pytest.raises(KeyboardInterrupt):
            dashboard.run(DashboardSettings(), tables=made.path, output=tmp_path / "site", quiet=True)
    with pytest.raises(Exception, match="never finished"):
        dashboard.read_result(tmp_path / "site")
    first = (tmp_path / "site" / "data" / f"{made_files[0]}.js").stat().st_mtime_ns
    dashboard.run(DashboardSettings(), tables=made.path, output=tmp_path / "site", quiet=True)
    assert contents(tmp_path / "site") == contents(whole.path)
    assert (tmp_path / "site" / "data" / f"{made_files[0]}.js").stat().st_mtime_ns == first


def test_seals_that_a_killed_run_left_beside_a_finished_site_are_deleted(made: MadeTables, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dashboard, "remove_directory", lambda _: None)
        dashboard.run(DashboardSettings(), tables=made.path, output=tmp_path / "site", quiet=True)
    assert (tmp_path / "site" / "draft").exists()
    dashboard.run(DashboardSettings(), tables=made.path, output=tmp_path / "site", quiet=True)
    assert not (tmp_path / "site" / "draft").exists()


def test_another_site_is_not_written_over(made: MadeTables, tmp_path: Path) -> None:
    dashboard.run(DashboardSettings(feature=("1",)), tables=made.path, output=tmp_path / "site", quiet=True)
    with pytest.raises(ArtifactMismatch, match=r"feature: there it is \['1'\], asked for \['2'\]"):
        dashboard.run(DashboardSettings(feature=("2",)), tables=made.path, output=tmp_path / "site", quiet=True)


def test_no_token_is_readable_as_markup_in_any_file(made: MadeTables, tmp_path: Path) -> None:
    result = dashboard.run(DashboardSettings(), tables=made.path, output=tmp_path / "site", quiet=True)
    call = re.compile(rb'dashboardData\("[a-z0-9-]+", "[A-Za-z0-9+/=]+"\);\n')
    files = list((result.path / "data").iterdir())
    assert all(call.fullmatch(path.read_bytes()) for path in files)
    assert any("<img" in text for path in files for text in unpack(path.read_bytes())["vocabulary"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_never_read_text_as_markup_or_program(script: Path) -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|createContextualFragment"
    assert re.findall(forbidden, script.read_text()) == []


@pytest.mark.parametrize("file", site_files().values(), ids=lambda path: path.name)
def test_files_of_the_site_fit_the_line_budget(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400


def test_packing_gives_back_what_was_packed_in_the_same_bytes() -> None:
    value = {"texts": [*WORDS, "名前", "\ud7ff"], "numbers": [1, 0.5, None, -3e-7]}
    assert unpack(pack("index", value)) == value
    assert pack("index", value) == pack("index", value)
    with pytest.raises(ValueError, match="not JSON compliant"):
        pack("index", [float("nan")])


def test_a_path_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactMissing, match="there are no tables here"):
        dashboard.run(DashboardSettings(), tables=tmp_path / "none", output=tmp_path / "site", quiet=True)


class Links(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if tag == "a" and name == "href"]


def test_a_blind_site_lists_items_and_keeps_their_features_in_a_key(made: MadeTables, tmp_path: Path) -> None:
    settings = DashboardSettings(blind=True, feature=("10-29",), seed=3)
    result = dashboard.run(settings, tables=made.path, output=tmp_path / "site", quiet=True)
    key = json.loads((result.path / "key.json").read_text())
    assert sorted(key.values()) == list(range(10, 30))
    assert [key[f"{item}"] for item in range(1, 21)] != list(range(10, 30))
    links = Links(result.page.read_text()).found
    assert links == [f"item-{item:04d}.html" for item in range(1, 21)]
    for item, name in enumerate(links, start=1):
        assert f"<h1>Item {item}</h1>" in (result.path / name).read_text()
    assert not (result.path / "data").exists()


def test_the_command_says_what_to_open_and_refuses_without_a_traceback(
    made: MadeTables, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "site"
    cli.main(["dashboard", str(made.path), "--out", str(out), "--feature", "5"])
    said = capsys.readouterr().out
    assert re.fullmatch(r".*index\.html: 1 features, 0\.\d MB in \d+ files; open it in a browser\n", said)
    with pytest.raises(SystemExit) as stop:
        cli.main(["dashboard", str(made.path), "--out", str(tmp_path / "other"), "--feature", "500"])
    told = capsys.readouterr().err
    assert (stop.value.code, "Traceback" in told) == (2, False)
    assert "'500' is beyond the last feature, 69" in told
