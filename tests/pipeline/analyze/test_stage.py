"""The stages `analyze` and `query` on a real cache and a transcoder trained on it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tailrace.pipeline.analyze import analysis_pass
from tailrace.pipeline.analyze import stage as analyze
from tailrace.pipeline.analyze.settings import AnalyzeSettings
from tailrace.pipeline.analyze.stage import plan_of
from tailrace.pipeline.demo.stage import summary
from tailrace.pipeline.query import stage as query
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import verify_artifact
from tailrace.storage.draft import Draft
from tailrace.storage.errors import (
    ActionableError,
    ArtifactIncomplete,
    ArtifactMismatch,
    ArtifactMissing,
    SettingsError,
)
from tailrace.storage.names import temporary_path
from tailrace.storage.tables import read_table
from tailrace.training.architectures import TopK
from tailrace.training.architectures.transcoder import load_transcoder
from tailrace.training.loop.settings import TrainSettings
from tests.support.synthetic_cache import write_synthetic_cache

SETTINGS = AnalyzeSettings(examples=5, window_before=4, window_after=2, block_rows=50, without_model=True)
FILES = [f"{name}.parquet" for name in ("features", "examples", "rows", "coactivation", "layers")]
FILES.append("activations/features-000000-000023.parquet")


def train_on(cache, output):
    settings = TrainSettings(
        architecture=TopK(k=3), d_sae=24, steps=20, batch_rows=64, warmup_steps=1, decay_steps=1, lr=1e-2, seed=1
    )
    train.run(settings, cache=cache, output=output, compute=Compute(threads=1, quiet=True))
    return output


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The paths of a cache, a transcoder and tables over its held-out rows."""
    root = tmp_path_factory.mktemp("stages")
    write_synthetic_cache(root / "cache", n_heldout_contexts=20)
    train_on(root / "cache", root / "transcoder")
    analyze.run(
        SETTINGS,
        cache=root / "cache",
        transcoder=root / "transcoder",
        output=root / "tables",
        compute=Compute(quiet=True),
    )
    return root


def rerun(made, output, settings=SETTINGS, **paths):
    arguments = {"cache": made / "cache", "transcoder": made / "transcoder", "output": output, **paths}
    return analyze.run(settings, **arguments, compute=Compute(quiet=True))


def all_rows(made, split_name="heldout"):
    split = open_cache(made / "cache").split(split_name)
    keys = ["layer0/in", "layer0/out", "token_id", "context", "position", "document"]
    units = [split.read_unit(unit, keys) for unit in range(split.n_units)]
    return {key: np.concatenate([unit[key] for unit in units]) for key in keys}


def test_tables_of_a_real_cache_agree_with_encoding_its_rows_at_once(made):
    rows = all_rows(made)
    transcoder = load_transcoder(made / "transcoder")
    acts = transcoder.encode(torch.from_numpy(rows["layer0/in"])).numpy()
    table = read_table(made / "tables" / "features.parquet").to_pylist()
    assert [row["n_active"] for row in table] == (acts > 0).sum(axis=0).tolist()
    assert [row["max"] or 0.0 for row in table] == pytest.approx(acts.max(axis=0), rel=1e-5)
    result = analyze.read_result(made / "tables")
    outputs = rows["layer0/out"].astype(np.float64)
    error = (outputs - transcoder(torch.from_numpy(rows["layer0/in"])).numpy()) ** 2
    assert result.fvu == pytest.approx(error.sum() / ((outputs - outputs.mean(axis=0)) ** 2).sum(), rel=1e-5)
    assert (result.n_rows, result.n_features) == (20 * 15, 24)
    assert result.l0 == pytest.approx((acts > 0).sum(axis=1).mean())


def test_every_example_points_at_its_own_row_of_the_cache(made):
    rows = all_rows(made)
    acts = load_transcoder(made / "transcoder").encode(torch.from_numpy(rows["layer0/in"])).numpy()
    vocabulary = open_cache(made / "cache").vocabulary()
    table = read_table(made / "tables" / "examples.parquet").to_pylist()
    assert len(table) > 24
    for row in table:
        index = row["row"]
        assert row["activation"] == pytest.approx(acts[index, row["feature"]], rel=1e-5)
        for key in ("token_id", "context", "position", "document"):
            assert row[key] == rows[key][index]
        assert row["token"] == vocabulary[row["token_id"]]
        here = row["position"] - row["window_start"]
        assert row["window_token_ids"][here] == row["token_id"]
        assert row["window_activations"][here] == row["activation"]  # to the bit: it is the same number


def test_the_published_artifact_says_what_it_was_made_from_and_is_sound(made):
    assert verify_artifact(made / "tables", "tables") == []
    manifest = json.loads((made / "tables" / "manifest.json").read_text())
    assert manifest["inputs"]["cache"] == open_cache(made / "cache").reference
    assert manifest["request"]["settings"]["examples"] == 5
    assert set(manifest["files"]) == set(FILES)
    assert str(made) not in (made / "tables" / "manifest.json").read_text()


def test_running_again_elsewhere_gives_the_same_bytes(made, tmp_path):
    rerun(made, tmp_path / "again")
    for name in ("manifest.json", *FILES):
        assert (tmp_path / "again" / name).read_bytes() == (made / "tables" / name).read_bytes()


def test_tables_that_are_there_are_returned_and_other_settings_refused(made):
    before = (made / "tables" / "features.parquet").stat().st_mtime_ns
    assert rerun(made, made / "tables") == analyze.read_result(made / "tables")
    assert (made / "tables" / "features.parquet").stat().st_mtime_ns == before
    with pytest.raises(ArtifactMismatch, match=r"settings\.examples: there it is 5, asked for 6"):
        rerun(made, made / "tables", SETTINGS.model_copy(update={"examples": 6}))


def test_a_run_that_was_cut_short_is_finished_and_leaves_no_half_written_file(made, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Draft, "publish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            rerun(made, tmp_path / "t")
    half_written = temporary_path(tmp_path / "t" / "features.parquet")
    half_written.write_bytes(b"half")
    with pytest.raises(ArtifactIncomplete):
        analyze.read_result(tmp_path / "t")
    rerun(made, tmp_path / "t")
    assert (tmp_path / "t" / "manifest.json").read_bytes() == (made / "tables" / "manifest.json").read_bytes()
    assert not half_written.exists()


def test_activations_are_every_pair_of_the_rows_kept(made, tmp_path):
    rows = all_rows(made)
    acts = load_transcoder(made / "transcoder").encode(torch.from_numpy(rows["layer0/in"])).numpy()
    feature, row = np.nonzero(acts.T > 0)
    table = pq.read_table(made / "tables" / "activations")
    assert (table["feature"].to_pylist(), table["row"].to_pylist()) == (feature.tolist(), row.tolist())
    assert table["activation"].to_pylist() == pytest.approx(acts[row, feature], rel=1e-5)
    places = read_table(made / "tables" / "rows.parquet").to_pydict()
    assert places["row"] == list(range(20 * 15))
    for name in ("token_id", "context", "position", "document"):
        assert places[name] == rows[name].tolist()
    assert places["token"] == [f" token{token}" for token in rows["token_id"]]


def test_fewer_activations_or_none_can_be_kept_and_the_cost_is_said_first(made, tmp_path):
    heard: list[str] = []
    few = SETTINGS.model_copy(update={"activations": 40})
    arguments = {"cache": made / "cache", "transcoder": made / "transcoder", "compute": Compute(quiet=True)}
    analyze.run(few, output=tmp_path / "few", announce=heard.append, **arguments)
    assert heard[0].startswith("cost: ")
    assert "hold about 120 activations of 40 rows, and " in heard[0]  # 3 of each row
    kept = pq.read_table(tmp_path / "few" / "activations")
    assert max(kept["row"].to_pylist()) == 29  # two whole contexts of 15 rows
    assert kept.schema.metadata[b"activation_rows"] == b"30"
    heard.clear()
    none = SETTINGS.model_copy(update={"activations": "none"})
    analyze.run(none, output=tmp_path / "none", announce=heard.append, **arguments)
    assert "activations" not in heard[0]
    assert {path.name for path in (tmp_path / "none").glob("*.parquet")} == {
        f"{t}.parquet" for t in ("features", "examples", "layers")
    }
    assert not (tmp_path / "none" / "activations").exists()
    assert set(read_table(tmp_path / "none" / "examples.parquet")["kind"].to_pylist()) == {"top"}


def test_rows_are_timed_first_where_there_are_many_and_tables_are_the_same(made, tmp_path, monkeypatch):
    monkeypatch.setattr(analysis_pass, "_TIMED_FROM", 300)
    monkeypatch.setattr(analysis_pass, "_TIMED_ROWS", 60)
    heard: list[str] = []
    rerun(made, tmp_path / "t", announce=heard.append)
    assert re.search(r"over 300 rows, about \d+ s by rows just timed; at least", heard[0])
    assert (tmp_path / "t" / "manifest.json").read_bytes() == (made / "tables" / "manifest.json").read_bytes()


def test_activations_that_the_disk_cannot_hold_are_refused_before_the_pass(made, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(
        SettingsError, match=r"keeping about 900 activations takes 0\.0 GB.*keep fewer with --activations N"
    ):
        rerun(made, tmp_path / "t")


@pytest.mark.parametrize("value", ["some", "0", "-3"])
def test_a_number_of_activations_that_is_none_is_refused(value):
    with pytest.raises(SettingsError, match="activations"):
        AnalyzeSettings.read({"activations": value})


def test_quantities_and_words_are_read_as_rows_to_keep():
    assert plan_of(AnalyzeSettings.read({"activations": "2M"})).activation_rows == 2_000_000
    assert plan_of(AnalyzeSettings.read({"activations": "all"})).activation_rows == 2**32 - 1
    assert plan_of(AnalyzeSettings.read({"activations": "none"})).activation_rows == 0


def test_an_interrupted_pass_leaves_no_pairs_behind(made, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(analyze, "write_tables", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            rerun(made, tmp_path / "t")
    assert not (tmp_path / "t").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Draft, "publish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            rerun(made, tmp_path / "t")
    assert not (tmp_path / "t" / "spool").exists()
    (tmp_path / "t" / "spool").mkdir()  # as if it had been killed
    (tmp_path / "t" / "spool" / "pairs-000000").write_bytes(b"half")
    rerun(made, tmp_path / "t")
    assert not (tmp_path / "t" / "spool").exists()
    assert (tmp_path / "t" / "manifest.json").read_bytes() == (made / "tables" / "manifest.json").read_bytes()


def test_training_rows_can_be_read_and_limited(made, tmp_path):
    result = rerun(made, tmp_path / "t", AnalyzeSettings(split="train", rows=100, without_model=True))
    assert result.n_rows == 90  # six contexts of 15 rows; a seventh would be more than asked
    assert read_table(tmp_path / "t" / "layers.parquet")["split"].to_pylist() == ["train"]


def test_a_cache_without_the_split_is_refused(made, tmp_path):
    write_synthetic_cache(tmp_path / "cache", n_heldout_contexts=0)
    with pytest.raises(ArtifactMismatch, match="has no heldout rows, only train"):
        rerun(made, tmp_path / "t", cache=tmp_path / "cache")


def test_a_cache_without_the_site_is_refused_with_its_sites(made, tmp_path):
    write_synthetic_cache(tmp_path / "cache", widths=[("layer1", 8, 8), ("layer2", 8, 8)])
    with pytest.raises(ArtifactMismatch, match=r"no site 'layer0'.*it has layer1, layer2"):
        rerun(made, tmp_path / "t", cache=tmp_path / "cache")
    assert not (tmp_path / "t").exists()


def test_another_model_or_width_is_refused_with_both_values(made):
    cache = open_cache(made / "cache")
    site = dataclasses.replace(cache.sites["layer0"], d_in=16, dtype="bfloat16")
    transcoder = SimpleNamespace(path=made / "transcoder", model={"name": "other"}, site=site)
    with pytest.raises(ArtifactMismatch) as caught:
        analyze.check_same_site(cache, transcoder)
    message = str(caught.value)
    assert "model.name: there it is 'synthetic', asked for 'other'" in message
    assert "site.d_in: there it is 8, asked for 16" in message
    assert "dtype" not in message


def test_the_summary_shows_features_with_the_token_marked_in_its_text(made):
    lines = summary(made / "tables", n_features=3, n_tokens=2)
    examples = read_table(made / "tables" / "examples.parquet").to_pylist()
    assert lines
    for line in lines:
        own = [row for row in examples if row["feature"] == line.feature]
        assert line.max == own[0]["activation"]
        assert line.top_tokens[0] == own[0]["token"]
        assert len(line.top_tokens) <= 2
        assert f"»{own[0]['token']}«" in line.example
        assert line.example.replace("»", "").replace("«", "") == "".join(own[0]["window_tokens"])


# ---- query


def ask(made, sql, **arguments):
    return query.run(sql, tables=made / "tables", **arguments)


def test_sql_sees_one_view_per_table(made):
    answer = ask(made, "SELECT count(*) AS n FROM features JOIN layers ON true", format="parquet")
    assert answer.to_pylist() == [{"n": 24}]
    names = ask(made, "SHOW TABLES", format="parquet")["name"].to_pylist()
    assert names == ["activations", "coactivation", "examples", "features", "labels", "layers", "rows"]
    assert "histogram_edges" in ask(made, "DESCRIBE features")


def test_answers_come_as_table_csv_json_and_parquet(made, tmp_path):
    sql = "SELECT 1 AS id, 'a,b' AS text, [1, 2] AS list, NULL AS nothing, 'nan'::DOUBLE AS nan"
    assert (
        ask(made, sql)
        == "id  text  list    nothing  nan\n──  ────  ──────  ───────  ───\n 1  a,b   [1, 2]           nan\n"
    )
    assert ask(made, sql, format="csv") == 'id,text,list,nothing,nan\n1,"a,b","[1, 2]",,nan\n'
    row = {"id": 1, "text": "a,b", "list": [1, 2], "nothing": None, "nan": None}
    assert json.loads(ask(made, sql, format="json")) == [row]
    ask(made, "SELECT feature FROM features", format="parquet", output=tmp_path / "answer.parquet")
    assert pq.read_table(tmp_path / "answer.parquet")["feature"].to_pylist() == list(range(24))


def test_an_answer_without_rows_is_still_valid(made):
    sql = "SELECT feature FROM features WHERE false"
    assert ask(made, sql, format="csv") == "feature\n"
    assert json.loads(ask(made, sql, format="json")) == []


def test_a_long_answer_is_cut_on_screen_and_whole_in_a_file(made, tmp_path):
    sql = "SELECT range AS n FROM range(100)"
    assert "… 60 more rows" in ask(made, sql)
    ask(made, sql, output=tmp_path / "answer.txt")
    assert len((tmp_path / "answer.txt").read_text().splitlines()) == 102


def test_line_breaks_in_tokens_keep_a_row_on_one_line(made):
    assert "a\\nb" in ask(made, "SELECT 'a' || chr(10) || 'b' AS token")


def test_duckdbs_own_message_is_shown_with_the_tables(made):
    with pytest.raises(
        ActionableError,
        match=r"Table with name feature does not exist[\s\S]*Tables: activations, coactivation, examples, features",
    ):
        ask(made, "SELECT * FROM feature")
    with pytest.raises(ActionableError, match="syntax error"):
        ask(made, "SELEC 1")
    with pytest.raises(ActionableError, match="frequencies"):
        ask(made, "SELECT frequencies FROM features")


@pytest.mark.parametrize(
    "sql",
    [
        "COPY features TO '{root}/tables/features.parquet' (USE_TMP_FILE false)",
        "EXPLAIN ANALYZE COPY features TO '{root}/tables/features.parquet' (USE_TMP_FILE false)",
        "COPY features TO '{root}/stolen.parquet'",
        "INSTALL httpfs",
        "SET enable_external_access = true",
        "CREATE TABLE t AS SELECT 1",
        "SELECT 1; SELECT 2",
        "",
        "SELECT * FROM read_text('{root}/cache/manifest.json')",
        "SELECT * FROM '{root}/cache/manifest.json'",
        "SELECT * FROM 'https://example.com/t.parquet'",
        "SELECT * FROM pa",
    ],
)
def test_a_query_reads_the_tables_and_nothing_else(made, sql):
    before = (made / "tables" / "features.parquet").read_bytes()
    with pytest.raises(ActionableError):
        ask(made, sql.format(root=made))
    assert (made / "tables" / "features.parquet").read_bytes() == before
    assert not (made / "stolen.parquet").exists()


def test_an_answer_is_not_written_into_the_tables_nor_where_it_cannot_be(made):
    with pytest.raises(ActionableError, match="inside the published tables"):
        ask(made, "SELECT 1", output=made / "tables" / "x.csv")
    with pytest.raises(ActionableError, match="has no directory to lie in"):
        ask(made, "SELECT 1", output=made / "nowhere" / "x.csv")
    with pytest.raises(ActionableError, match="is a directory"):
        ask(made, "SELECT 1", output=made)


def test_what_is_no_table_artifact_is_refused(made, tmp_path):
    with pytest.raises(ArtifactMismatch, match="is of kind activation-cache, which has no tables; give tables, a run"):
        query.run("SELECT 1", tables=made / "cache")
    with pytest.raises(ArtifactMissing):
        query.run("SELECT 1", tables=tmp_path)


def test_the_default_connection_of_duckdb_is_left_alone(made):
    ask(made, "SELECT 1")
    assert duckdb.execute("SHOW TABLES").fetchall() == []
    assert isinstance(ask(made, "SELECT 1", format="parquet"), pa.Table)
