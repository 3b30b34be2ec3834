"""Inputs that nothing can use are refused where they enter, in a moment and with the reason."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tailrace.pipeline.artifacts.folders import as_path
from tailrace.pipeline.blind.ratings import read_ratings
from tailrace.pipeline.formats import circuit_tracer, dictionary_learning, saelens
from tailrace.pipeline.model.locations import loaded_files
from tailrace.pipeline.query import stage as query
from tailrace.pipeline.query.views import parse_tables
from tailrace.pipeline.shared.options import read_settings
from tailrace.pipeline.train import grid
from tailrace.pipeline.train.grid import MOST_RUNS, read_grid
from tailrace.storage.artifact import check_members, seal, write_output
from tailrace.storage.cache_format import HookName
from tailrace.storage.errors import ActionableError, ArtifactCorrupt, ArtifactMismatch, ModelError, SettingsError
from tailrace.storage.parsing import read_regular
from tailrace.training.loop.curves import read_run
from tailrace.training.loop.settings import TrainSettings
from tests.faults.inputs import RELEASED
from tests.released.values import MANIFESTS
from tests.support.cache_jobs import command


def test_a_grid_is_counted_before_it_is_built(tmp_path: Path) -> None:
    lists = {name: list(range(10)) for name in ("k", "lr", "seed", "steps", "d_sae", "log_every", "ema", "decay")}
    (tmp_path / "sweep.yaml").write_text(json.dumps(lists))
    with pytest.raises(SettingsError, match=f"has 100,000,000 runs, at most {MOST_RUNS:,}"):
        read_grid([], tmp_path / "sweep.yaml")
    (tmp_path / "points.yaml").write_text("[{k: 1}, {k: 2}, {k: 3}]")
    with pytest.raises(SettingsError, match="has 12,000 runs"):
        read_grid(["lr=" + ",".join(["1e-3"] * 4000)], tmp_path / "points.yaml")


def test_the_largest_grid_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "MOST_RUNS", 6)
    assert len(grid.grid_of({"k": range(3), "lr": [0.1, 0.2]})) == 6
    with pytest.raises(SettingsError, match="has 9 runs"):
        grid.grid_of({"k": range(3), "lr": [0.1, 0.2, 0.3]})


@pytest.mark.parametrize(
    "line",
    [
        ("info", "x" * 300),
        ("info", f"a/{'ß' * 200}"),
        ("info", "a/" * 3000),
        ("query", "FROM a", "--tables", "x" * 300),
    ],
)
def test_a_name_that_is_too_long_is_no_path(capsys: pytest.CaptureFixture[str], line: tuple[str, ...]) -> None:
    answer = command(capsys, *line)
    assert answer.code == 2
    assert "File name too long; give another path" in answer.err


def test_a_null_byte_is_in_no_path() -> None:
    with pytest.raises(SettingsError, match="null byte"):
        as_path("a\0b")


def test_a_home_that_nobody_has_is_a_folder_s_name() -> None:
    assert parse_tables(["~nobody-has-this-name/tables"]) == [Path("~nobody-has-this-name/tables")]


def test_a_file_of_the_longest_name_is_written(tmp_path: Path) -> None:
    output = tmp_path / ("x" * 255)
    (tmp_path / f".{'x' * 255}"[:200]).write_text("of somebody else")
    write_output(output, b"answer")
    assert output.read_bytes() == b"answer"
    assert len(list(tmp_path.iterdir())) == 2


def test_recorded_settings_are_objects(tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text('{"settings": {"lr": 1.0}, "live": [1]}')
    with pytest.raises(SettingsError, match="its settings are no JSON object"):
        read_settings(TrainSettings, tmp_path, {})


@pytest.mark.parametrize("line", [b'{"step": "x"}', b'{"rows": []}', b'{"split":\xff}', b'{"a":' * 10_000 + b"}"])
def test_a_log_with_a_line_that_is_none_is_refused(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "rows": 2, "split": "train"}\n' + line + b"\n")
    with pytest.raises(ArtifactCorrupt, match=r"metrics.jsonl: has a line that is none of a log"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "index", ["[" * 50_000, "[]", '{"weight_map": 1}', '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": "/x"}}']
)
def test_an_index_of_weights_names_files_of_its_folder(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"model.safetensors.index.json: .*get the model again"):
        loaded_files(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("metadata", [1], r"metadata is \[1\], wanted settings by name"),
        ("metadata", {"hook_name": 5}, "hook_name is 5, wanted a text"),
        ("metadata", {"model_from_pretrained_kwargs": 5}, "model_from_pretrained_kwargs is 5, wanted settings by name"),
        ("metadata", {"model_name": True}, "model_name is True, wanted a text"),
    ],
)
def test_settings_of_saelens_are_of_their_kinds(tmp_path: Path, key: str, value: object, reason: str) -> None:
    config = json.loads((RELEASED / "exports/saelens/cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ArtifactMismatch, match=reason):
        saelens.read(tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"trainer": 5}, "trainer is 5, wanted settings by name"),
        ({"trainer": {"dict_class": "AutoEncoderTopK", "k": "x"}}, "k is 'x', wanted a number"),
        ({"trainer": {"dict_class": "AutoEncoderTopK", "k": 0}}, "k: Input should be greater than or equal to 1"),
        ({"trainer": {"dict_class": "AutoEncoderTopK", "k": 2.5}}, "k: Input should be a valid integer"),
        ({"trainer": {"dict_class": "AutoEncoderTopK", "k": 1, "lm_name": []}}, r"lm_name is \[\], wanted a text"),
        (
            {"trainer": {"dict_class": "AutoEncoderTopK", "k": 1}, "buffer": "x"},
            "buffer is 'x', wanted settings by name",
        ),
    ],
)
def test_settings_of_dictionary_learning_are_of_their_kinds(tmp_path: Path, config: object, reason: str) -> None:
    tensors = {"encoder.weight": torch.zeros(3, 2), "encoder.bias": torch.zeros(3), "decoder.weight": torch.zeros(2, 3)}
    torch.save({**tensors, "b_dec": torch.zeros(2)}, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ArtifactMismatch, SettingsError), match=reason):
        dictionary_learning.read(tmp_path)


def test_settings_that_refer_to_themselves_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("scan: &a [*a]\n")
    weights = RELEASED / "exports/circuit-tracer/layer_1.safetensors"
    (tmp_path / "layer_1.safetensors").symlink_to(weights)
    with pytest.raises(SettingsError, match="refers to itself"):
        circuit_tracer.read(tmp_path / "layer_1.safetensors")


def test_dates_beyond_python_s_are_shown_as_what_they_are() -> None:
    sql = "SELECT 'infinity'::TIMESTAMP AS a, ['-infinity'::DATE] AS b, {'c': '290000-01-01'::TIMESTAMP} AS c"
    beyond = '{"c": "timestamp[us] 9089348860800000000"}'
    tables = RELEASED / "tables/topk"
    assert json.loads(query.run(sql, tables=tables, format="json")) == [
        {"a": "infinity", "b": ["-infinity"], "c": json.loads(beyond)}
    ]
    assert 'infinity,"[""-infinity""]"' in query.run(sql, tables=tables, format="csv")
    assert "infinity" in query.run(sql, tables=tables)


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_two_columns_of_a_name_are_refused_where_one_would_be_lost(form: query.Format) -> None:
    with pytest.raises(ActionableError, match="a is the name of several; give each its own with AS"):
        query.run("SELECT 1 AS a, 2 AS a", tables=RELEASED / "tables/topk", format=form)
    assert query.run("SELECT 1 AS a, 2 AS a", tables=RELEASED / "tables/topk", format="csv") == "a,a\n1,2\n"


@pytest.mark.parametrize("line", [("query", "\udcff"), ("score", "\udcff"), ("blind", "study", "note", "x", "\udcff")])
def test_an_argument_that_is_no_text_is_refused(capsys: pytest.CaptureFixture[str], line: tuple[str, ...]) -> None:
    answer = command(capsys, *line)
    assert answer.code == 2
    assert r"the argument '\udcff' is not UTF-8; write or rename it so" in answer.err


def _resealed(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """Return a copy of a released artifact whose manifest is changed and sealed again."""
    path = folder / "artifact"
    shutil.copytree(RELEASED / name, path)
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    del manifest["digest"]
    (path / "manifest.json").write_bytes(seal(manifest))
    return path


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("sweep", lambda one: one["request"]["runs"].pop("k=2"), r"runs: \['k=2'\] are not in the request"),
        ("sweep", lambda one: one["request"]["runs"]["k=2"].pop("settings"), "runs.k=2.settings: Field required"),
        ("tables/topk", lambda one: one["request"].update(settings=5), "settings: .*valid dictionary"),
        ("tables/topk", lambda one: one["tables"]["features"].update(n_rows=-1), "greater than or equal to 0"),
        ("evaluations/layers", lambda one: one.update(scores=[]), "at least 1 item"),
        ("evaluations/layers", lambda one: one["scores"][0].pop("spliced"), "spliced: Field required"),
        ("circuits/logit", lambda one: one["root"].update(value="x"), "value: .*valid number"),
        ("transcoders/topk", lambda one: one["model"].pop("name"), "model: .*name: Field required"),
        ("transcoders/topk", lambda one: one.update(d_sae=2**62), "d_sae: .*less than"),
        ("transcoders/topk", lambda one: one["metrics"]["heldout"].pop("fvu"), "fvu: Field required"),
        ("transcoders/topk", lambda one: one["site"].update(d_in=0), "d_in: .*greater than or equal to 1"),
        ("caches/float32-zstd", lambda one: one["splits"]["train"].update(n_rows=2**62), "wanted the records of"),
        ("caches/float32-zstd", lambda one: one["format"].update(shard_rows=0), "shard_rows: .*greater than"),
        ("caches/float32-zstd", lambda one: one["format"]["sites"][0].update(dtype="x"), "dtype: .*match pattern"),
    ],
)
def test_a_sealed_manifest_of_another_shape_is_refused(
    tmp_path: Path, name: str, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    path = _resealed(tmp_path, name, change)
    kind = MANIFESTS[json.loads((path / "manifest.json").read_text())["kind"]]
    with pytest.raises(ArtifactCorrupt, match=r"(?s)manifest.json: is not as wanted.*" + reason):
        kind.read(path)


STATEMENTS = (
    "FROM read_text('{secret}')",
    "FROM read_blob('{secret}')",
    "FROM read_csv('{secret}')",
    "FROM read_json('{secret}')",
    "FROM read_parquet('{outside}/*.parquet')",
    "FROM '{secret}'",
    "FROM '{outside}/other.parquet'",
    "FROM glob('{outside}/*')",
    "FROM parquet_schema('{outside}/other.parquet')",
    "FROM parquet_metadata('{outside}/other.parquet')",
    "FROM parquet_kv_metadata('{outside}/other.parquet')",
    "FROM sniff_csv('{secret}')",
    "FROM query('FROM read_text(''{secret}'')')",
    "FROM query_table('{outside}/other.parquet')",
    "SELECT getenv('HOME')",
    "SELECT (SELECT content FROM read_text('{secret}'))",
    "WITH a AS (FROM read_text('{secret}')) FROM a",
    "FROM features WHERE EXISTS (FROM read_text('{secret}'))",
    "FROM own UNION ALL FROM read_json('{secret}')",
    "SELECT * FROM features; COPY features TO '{outside}/stolen.csv'",
    "COPY features TO '{outside}/stolen.csv'",
    "COPY (SELECT 1) TO '{secret}'",
    "EXPLAIN ANALYZE COPY features TO '{outside}/stolen.csv'",
    "EXPORT DATABASE '{outside}/stolen'",
    "ATTACH '{outside}/stolen.db'",
    "ATTACH '{outside}/stolen.db' AS x (TYPE sqlite)",
    "CREATE TABLE a AS FROM features",
    "CREATE SECRET x (TYPE s3)",
    "INSTALL httpfs",
    "LOAD '{outside}/x.duckdb_extension'",
    "SET enable_external_access = true",
    "SET allowed_directories = ['/']",
    "SET lock_configuration = false",
    "RESET allowed_paths",
    "SET temp_directory = '{outside}/stolen'",
    "PRAGMA enable_external_access",
    "PRAGMA enable_profiling = 'json'",
    "CALL pragma_version(); DROP VIEW features",
    "DELETE FROM features",
    "UPDATE own SET a = 2",
    "INSERT INTO own VALUES (1)",
    "CHECKPOINT",
    "PREPARE a AS FROM read_text('{secret}')",
    "EXECUTE immediate('x')",
    "SELECT * FROM 'https://127.0.0.1/x.parquet'",
    "FROM read_parquet('s3://bucket/x')",
    "FROM connection",
    "FROM answer",
)
"""Statements that reach for something outside the tables or try to change something."""


def test_sql_reaches_nothing_outside_and_writes_nothing(tmp_path: Path) -> None:
    tables, outside = tmp_path / "tables", tmp_path / "outside"
    shutil.copytree(RELEASED / "tables/bare", tables)
    shutil.copytree(RELEASED / "sweep/runs", outside)
    shutil.copy(tables / "features.parquet", outside / "other.parquet")
    secret = outside / "secret.json"
    secret.write_text('{"a": "the words of a file outside"}')
    own = tmp_path / "own.jsonl"
    own.write_text('{"a": 1}\n')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    answered = {}
    for statement in STATEMENTS:
        sql = statement.format(secret=secret, outside=outside)
        with contextlib.suppress(ActionableError):
            answered[statement] = query.run(sql, tables=tables, attached={"own": own})
    assert answered == {}
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_hook_s_head_is_a_number_that_a_model_can_have() -> None:
    assert HookName.parse("blocks.0.attn.hook_z[" + "9" * 5000 + "]").head is None


def test_ratings_that_are_no_table_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text('item,"' + "x" * 200_000)
    with pytest.raises(SettingsError, match=r"ratings.csv: cannot be read as CSV"):
        read_ratings(tmp_path / "ratings.csv", 2)


def test_members_that_are_none_are_damage(tmp_path: Path) -> None:
    assert check_members(tmp_path, {"runs": [5, {"path": "a"}]}) == [
        f"{tmp_path}/manifest.json: lists {shown} as an artifact inside; wanted its path and digest"
        for shown in ("5", "{'path': 'a'}")
    ]


@pytest.fixture
def in_a_moment() -> Iterator[None]:
    """End a test that waits for a pipe, or reads a device that never ends."""

    def stop(*_: object) -> None:
        raise AssertionError("it does not end")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def _run_with(folder: Path, name: str, make: Callable[[Path], None]) -> Path:
    """Return a released transcoder of which one file is made into something else."""
    run = folder / "folder/run"
    shutil.copytree(RELEASED / "transcoders/topk", run)
    make(run / name)
    return run


ENDLESS = pytest.mark.parametrize("make", [_pipe, _device])


@ENDLESS
@pytest.mark.parametrize("words", ["info", "verify", "ls", "ls ..", "verify ..", "curves", "rm --force"])
@pytest.mark.usefixtures("in_a_moment")
def test_a_manifest_that_never_ends_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None], words: str
) -> None:
    run = _run_with(tmp_path, "manifest.json", make)
    name, *more = words.split()
    answer = command(capsys, name, str(run.parent if more == [".."] else run), *([] if more == [".."] else more))
    assert answer.code in (0, 1), answer
    if name in ("info", "verify"):
        assert "run/manifest.json: is no regular file but a pipe or a device" in answer.err + answer.out


@ENDLESS
@pytest.mark.parametrize("words", ["ls {folder}", "verify {folder}", "verify {run}", "rm --force {run}"])
@pytest.mark.usefixtures("in_a_moment")
def test_a_request_that_never_ends_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None], words: str
) -> None:
    run = _run_with(tmp_path, "request.json", make)
    answer = command(capsys, *words.format(folder=tmp_path, run=run).split())
    assert answer.code == (1 if "verify" in words else 0), answer
    if "verify" in words:
        assert "run/request.json: is no regular file" in answer.err + answer.out
    elif "rm" in words:
        assert not run.exists()


@ENDLESS
@pytest.mark.usefixtures("in_a_moment")
def test_a_log_and_a_lock_that_never_end_are_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None]
) -> None:
    (tmp_path / "request.json").write_text("{}")
    make(tmp_path / ".lock")
    make(tmp_path / "metrics.jsonl")
    assert command(capsys, "info", str(tmp_path)).code in (0, 1)
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").touch()
    assert command(capsys, "ls", str(tmp_path)).code == 0
    answer = command(capsys, "curves", str(tmp_path))
    assert answer.code == 1
    assert "metrics.jsonl: is no regular file but a pipe or a device, which may never end; restore it" in answer.err


def test_a_file_of_an_artifact_may_be_a_link_and_has_an_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"four")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link", 4) == b"four"
    with pytest.raises(ValueError, match="is longer than 0 MiB"):
        read_regular(tmp_path / "link", 3)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)
