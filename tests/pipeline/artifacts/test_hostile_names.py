"""Names that a well-sealed manifest gives lead nowhere: no file outside is read or written, and none runs as SQL."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tailrace.analysis.dashboards.feature_tables import FeatureTables
from tailrace.pipeline.analyze import many as analyze_each
from tailrace.pipeline.analyze.settings import AnalyzeSettings
from tailrace.pipeline.dashboard import stage as dashboard
from tailrace.pipeline.dashboard.serve import PublishedSite
from tailrace.pipeline.dashboard.settings import DashboardSettings
from tailrace.pipeline.evaluate import pareto
from tailrace.pipeline.formats import export
from tailrace.pipeline.formats.delphi import LatentTables, open_tables
from tailrace.pipeline.formats.settings import ExportSettings
from tailrace.pipeline.query import stage as query
from tailrace.pipeline.train import sweep
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import (
    MANIFEST,
    checksum_file,
    describe_files,
    read_sealed,
    seal,
    sync_files,
    verify_artifact,
)
from tailrace.storage.cache_verify import verify_bytes
from tailrace.storage.draft import Draft
from tailrace.storage.errors import ActionableError, ArtifactCorrupt, SettingsError
from tailrace.storage.materialise import materialise_epoch
from tailrace.storage.names import inside
from tailrace.storage.tables import read_table, write_table
from tailrace.training.architectures import TopK
from tests.support.cache_jobs import command
from tests.support.cross_layer_transcoders import publish_cross_layer, random_cross_layer
from tests.support.dashboard_tables import make_tables
from tests.support.layered_transcoders import mlp_site, publish_site_cache, publish_transcoder, random_transcoder
from tests.support.synthetic_cache import write_synthetic_cache
from tests.support.tables_by_hand import example_row, feature_row, publish_tables

HOSTILE = (
    *("/etc/passwd", "/dev/zero", "../secret", "a/../../secret", "a//secret", "./rows", ""),
    *("link", "pipe", "folder"),
)
SQL = "x\" AS SELECT 1; COPY (SELECT 666) TO 'features.parquet' (FORMAT parquet, USE_TMP_FILE false); --.parquet"
"""A name that a file can have, and that ends a quoted identifier."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder beside a secret, with a link to it, a pipe and a folder inside."""
    (tmp_path / "secret").write_text("secret")
    place = tmp_path / "place"
    (place / "folder").mkdir(parents=True)
    (place / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(place / "pipe")
    return place


def publish(path: Path) -> Path:
    return publish_transcoder(path, random_transcoder(TopK(k=4), mlp_site(0)), TopK(k=4), mlp_site(0))


def reseal(path: Path, change: Callable[[dict[str, Any]], object], name: str = MANIFEST) -> None:
    """Change a manifest and seal it again, as whoever made it might have."""
    content = {key: value for key, value in read_sealed(path / name).items() if key != "digest"}
    change(content)
    (path / name).write_bytes(seal(content))


def add_files(path: Path, names: tuple[str, ...]) -> None:
    recorded = {"bytes": 6, "checksum": "xxh3:0"}
    reseal(path, lambda content: content["files"].update(dict.fromkeys(names, recorded)))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_leads_elsewhere_or_to_no_file_is_refused(place: Path, name: str) -> None:
    with pytest.raises(ArtifactCorrupt, match="an artifact names files of its own folder only"):
        inside(place, name)
    with pytest.raises(ArtifactCorrupt):
        sync_files(place, [name])
    with pytest.raises(ArtifactCorrupt):
        describe_files(place, [name])


def test_names_inside_are_taken_whether_they_are_there_or_not(place: Path) -> None:
    (place / "inner").symlink_to("folder/rows")
    (place / "folder" / "rows").write_text("rows")
    for name in ("folder/rows", "inner", "missing", "folder/..rows", "k=2/x*.parquet", SQL):
        assert inside(place, name) == place / name


def test_verify_lists_every_such_name_and_goes_on(place: Path) -> None:
    with Draft(place.with_name("table"), "table", {}) as draft:
        (draft.path / "rows").write_text("rows")
        draft.publish({}, ["rows"])
    (draft.path / "rows").write_text("ROWS")
    for entry in ("link", "pipe", "folder"):
        shutil.move(place / entry, draft.path / entry)
    add_files(draft.path, HOSTILE)
    problems = verify_artifact(draft.path, "table")
    assert len(problems) == len(HOSTILE) + 1
    assert sum("names the file" in problem for problem in problems) == len(HOSTILE)


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    return publish_tables(tmp_path / "tables", [feature_row(0)], [example_row(0)])


def test_a_file_name_is_no_sql(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(tables / SQL, pa.schema([("v", pa.int32())]), [pa.record_batch({"v": pa.array([7], pa.int32())})])
    reseal(tables, lambda content: content["files"].update(describe_files(tables, [SQL])))
    before = {path.name: path.read_bytes() for path in tables.iterdir()}
    monkeypatch.chdir(tables)
    assert query.select("SELECT feature FROM features", Path()).to_pylist() == [{"feature": 0}]
    quoted = query.list_tables(Path()).to_pylist()[-1]["table"]
    assert query.select(f"SELECT v FROM {quoted}", Path()).to_pylist() == [{"v": 7}]
    assert query.select(f"SELECT v FROM a.{quoted}", {"a": Path()}).to_pylist() == [{"v": 7}]
    assert {path.name: path.read_bytes() for path in tables.iterdir()} == before


@pytest.mark.parametrize("folder", ["k=2", "t[1]", "~x", "a*b", "what?", "it's", 'a"b'])
def test_the_answer_does_not_depend_on_the_name_of_a_folder(
    tables: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("t1", "aXb"):  # which the names would fit as patterns
        publish_tables(tables.with_name(other), [feature_row(0, max=9.0)], [example_row(0)])
    shutil.copytree(tables, tables.with_name(folder))
    monkeypatch.chdir(tables.parent)
    wanted = query.select("SELECT * FROM features", tables)
    assert query.select("SELECT * FROM features", Path(folder)) == wanted
    assert query.select("SELECT * FROM features", tables.with_name(folder)) == wanted
    (tables.with_name("all") / folder).mkdir(parents=True)
    shutil.copytree(tables, tables.with_name("all") / folder, dirs_exist_ok=True)
    (row,) = query.select("SELECT folder, max FROM features", tables.with_name("all")).to_pylist()
    assert row == {"folder": folder, "max": 4.0}


@pytest.mark.parametrize("name", ["/etc/x.parquet", "../other/features.parquet", "pipe.parquet", "link.parquet"])
def test_tables_that_lie_elsewhere_are_not_read(tables: Path, name: str) -> None:
    other = publish_tables(tables.with_name("other"), [feature_row(0)], [example_row(0)])
    os.mkfifo(tables / "pipe.parquet")
    (tables / "link.parquet").symlink_to(other / "features.parquet")
    add_files(tables, (name,))
    with pytest.raises(ArtifactCorrupt, match="names the file"):
        query.select("SELECT 1", tables)
    with pytest.raises(ArtifactCorrupt, match="names the file"):
        query.list_tables(tables)


def test_a_table_that_is_a_pipe_is_no_table(tmp_path: Path) -> None:
    made = make_tables(tmp_path / "tables", d_sae=8).path
    for name in ("features.parquet", "layers.parquet"):
        (made / name).unlink()
        os.mkfifo(made / name)
    with pytest.raises(ArtifactCorrupt, match=r"features\.parquet.*no regular file"):
        read_table(made / "features.parquet")
    with pytest.raises(ArtifactCorrupt, match="no regular file"):
        FeatureTables(made).schema("features")
    with pytest.raises(ArtifactCorrupt, match="no regular file"):
        dashboard.run(DashboardSettings(), tables=made, output=tmp_path / "site", quiet=True)


def test_a_dashboard_hands_out_its_own_files_only(tmp_path: Path, place: Path) -> None:
    made = make_tables(tmp_path / "tables", d_sae=8).path
    site = dashboard.run(DashboardSettings(), tables=made, output=tmp_path / "site", quiet=True).path
    for entry in ("link", "pipe"):
        shutil.move(place / entry, site / entry)
    add_files(site, HOSTILE)
    served = PublishedSite(site)
    for name in HOSTILE:
        with suppress(ArtifactCorrupt):  # a refusal names what the manifest lists
            assert served.read(name) is None, name
    assert served.read("index.html") == (site / "index.html").read_bytes()


@pytest.mark.parametrize("module", ["../../x", "/x", "a/b", "..", ""])
def test_a_module_is_one_folder_of_the_export(tmp_path: Path, module: str, capsys: pytest.CaptureFixture[str]) -> None:
    coder = publish(tmp_path / "coder")
    before = sorted(tmp_path.rglob("*"))
    answer = command(
        capsys, "export", coder, "--to", "sparsify", "--module", module, "--out", tmp_path / "new" / "export"
    )
    assert (answer.code, "names a folder of the export" in answer.err) == (2, True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_site_names_no_folder_elsewhere(tables: Path, tmp_path: Path) -> None:
    cache = write_synthetic_cache(tmp_path / "cache", n_contexts=4, n_heldout_contexts=0)
    (tables / "activations").mkdir()
    reseal(tables, lambda content: content["inputs"].update(cache=cache.reference))
    reseal(tables, lambda content: content["request"]["settings"].update(split="train"))
    assert isinstance(open_tables([tables], cache.path, None)[0], LatentTables)
    reseal(tables, lambda content: content["site"].update(name="../../x", hook_in="a", hook_out="b"))
    with pytest.raises(SettingsError, match="with --module"):
        export.run(
            ExportSettings(), to="delphi", sources=[tables], cache=cache.path, output=tmp_path / "new" / "export"
        )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["../../x", "/etc", "a/b", ""])
@pytest.mark.parametrize("part", ["site", "split"])
def test_a_cache_names_its_own_folders(tmp_path: Path, part: str, name: str) -> None:
    path = write_synthetic_cache(tmp_path / "cache", n_contexts=4, n_heldout_contexts=0).path

    def change(content: dict[str, Any]) -> None:
        if part == "site":
            content["format"]["sites"][0]["name"] = name
        else:
            content["splits"][name] = content["splits"].pop("train")

    reseal(path, change)
    with pytest.raises(ArtifactCorrupt, match="as a split or site"):
        open_cache(path)
    assert len(verify_bytes(path)) == 1


@pytest.mark.parametrize("name", ["../secret", "/dev/zero", "commits/pipe"])
def test_a_cache_reads_its_own_records_only(tmp_path: Path, name: str) -> None:
    path = write_synthetic_cache(tmp_path / "cache", n_contexts=4, n_heldout_contexts=0).path
    os.mkfifo(path / "commits/pipe")
    for manifest in (MANIFEST, "manifest-0.json"):
        reseal(path, lambda content: content["splits"]["train"].update(unit_records=[[name]]), manifest)
        reseal(path, lambda content: content["files"].update({name: {"bytes": 1, "checksum": "xxh3:0"}}), manifest)
    with pytest.raises(ArtifactCorrupt, match="names the file"):
        open_cache(path).split("train").statistics("layer0", "in")
    (problem,) = verify_bytes(path)
    assert "names the file" in problem


@pytest.mark.parametrize("name", ["../../../secret", "/dev/zero", "token_id/c/pipe"])
def test_verifying_a_cache_lists_shards_that_lie_elsewhere(tmp_path: Path, name: str) -> None:
    path = write_synthetic_cache(tmp_path / "cache", n_contexts=4, n_heldout_contexts=0).path
    os.mkfifo(path / "train/token_id/c/pipe")
    (tmp_path / "secret").write_text("secret")
    record = "commits/0/train-unit-000000.json"
    content = json.loads((path / record).read_bytes())
    content["shards"][name] = {"bytes": 6, "checksum": "xxh3:0"}
    (path / record).write_text(json.dumps(content))
    found = {"bytes": (path / record).stat().st_size, "checksum": checksum_file(path / record)}
    for manifest in (MANIFEST, "manifest-0.json"):
        reseal(path, lambda content: content["files"].update({record: found}), manifest)
    (problem,) = verify_bytes(path)
    assert "names the file" in problem


def in_turn(task: Callable[[int], None], ids: Iterable[int]) -> None:
    for one in ids:
        task(one)


def test_verifying_an_epoch_lists_shards_that_lie_elsewhere(tmp_path: Path) -> None:
    cache = write_synthetic_cache(tmp_path / "cache", n_contexts=4, n_heldout_contexts=0)
    epoch = materialise_epoch(cache.split("train"), seed=0, epoch=0, run_tasks=in_turn)
    reseal(epoch, lambda content: content["shards"].update({"/dev/zero": {"bytes": 1, "checksum": "xxh3:0"}}))
    (problem,) = verify_bytes(cache.path)
    assert "'/dev/zero'" in problem


@pytest.mark.parametrize("status", ["finished", "diverged"])
@pytest.mark.parametrize("run", ["../coder", "/etc", ".."])
def test_a_sweep_reads_its_own_runs_only(tmp_path: Path, run: str, status: str) -> None:
    publish(tmp_path / "coder")
    with Draft(tmp_path / "sweep", sweep.KIND, {"runs": {"a": {"settings": {}}}}) as draft:
        runs = [{"name": "a", "status": status, "path": run, "digest": None}]
        draft.publish({"inputs": {}, "model": {"name": "m"}, "runs": runs}, [])
    with pytest.raises(ArtifactCorrupt, match="names the file"):
        sweep.read_result(tmp_path / "sweep")
    with pytest.raises(ActionableError, match="names the file"):
        pareto.collect([tmp_path / "sweep"])


def test_a_layer_gets_no_tables_elsewhere(tmp_path: Path) -> None:
    sites = [replace(mlp_site(layer), name=name) for layer, name in enumerate(("layer0", "../../x", "layer2"))]
    publish_cross_layer(tmp_path / "coder", random_cross_layer(), sites)
    publish_site_cache(tmp_path / "cache", [mlp_site(0)])
    with pytest.raises(ArtifactCorrupt, match="no folder of tables can be"):
        analyze_each.run(AnalyzeSettings(), transcoders=[tmp_path / "coder"], output=tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "coder"}
