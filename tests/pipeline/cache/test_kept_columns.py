"""``--keep-columns``: what the dataset says of every document lies beside the cache, once, whatever happens."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailrace.analysis.dashboards.feature_tables import FeatureTables
from tailrace.pipeline.analyze import stage as analyze
from tailrace.pipeline.analyze.settings import AnalyzeSettings
from tailrace.pipeline.cache import context_packing
from tailrace.pipeline.cache import stage as cache
from tailrace.pipeline.dashboard.site_data import SiteData, unpack
from tailrace.pipeline.query.stage import select
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.text import packing
from tailrace.pipeline.text.columns import BadRow, check_kept, read_kept
from tailrace.pipeline.train import stage as train
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.cache_verify import verify_bytes
from tailrace.storage.errors import ArtifactMismatch, SettingsError, TextError
from tailrace.storage.tables import read_schema, schema_of, table_of
from tailrace.training.architectures import TopK
from tailrace.training.loop.settings import TrainSettings
from tests.support.cache_jobs import (
    HERE,
    Job,
    Kill,
    copy_cache,
    count_renames,
    differing,
    kill_until_done,
    run_cache,
    run_job,
    settings,
    small_blocks,
    speech_texts,
    tree,
)
from tests.support.text_files_written import open_text, write_jsonl

KEPT = "id,lang,score,is_speech"


def rows() -> list[dict[str, Any]]:
    """Pieces of speeches of 40 words; ids are of both types, and some rows say little."""
    words = " ".join(speech_texts()).split()[:1280]
    pieces = [" ".join(words[start : start + 40]) for start in range(0, len(words), 40)]
    return [
        {"text": text, "id": number if number % 2 else f"n{number}", "is_speech": number % 3 == 0, "unread": [number]}
        | ({"lang": "en"} if number != 4 else {})
        | ({"score": number / 4} if number != 5 else {"score": None})
        for number, text in enumerate(pieces)
    ]


def expected(row: dict[str, Any], number: int) -> dict[str, Any]:
    return {
        "document": number,
        "id": str(row["id"]),
        "lang": row.get("lang"),
        "score": row.get("score"),
        "is_speech": row["is_speech"],
    }


@pytest.fixture(scope="module", autouse=True)
def small_batches() -> Iterator[None]:
    """Few documents are read at once, so that an extension has more to read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BATCH_DOCUMENTS", 8)
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("text") / "pieces.jsonl", rows())


@pytest.fixture(scope="module")
def made(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kept") / "cache"
    run_cache(path, dataset=str(dataset), keep_columns=KEPT, tokens=300)
    return path


def check_documents(path: Path) -> dict[str, list[int]]:
    """Compare what is kept with the rows of the dataset, and with the documents of contexts; return these."""
    opened, seen = open_cache(path), {}
    for name in opened.manifest.splits:
        split = opened.split(name)
        documents = split.documents()
        numbers = documents["document"].to_pylist()
        assert len(set(numbers)) == len(numbers)
        assert documents.to_pylist() == [expected(rows()[number], number) for number in numbers]
        assert set(np.unique(split.context_documents(np.arange(split.n_contexts))).tolist()) <= set(numbers)
        seen[name] = numbers
    assert verify_bytes(path) == []
    return seen


def test_every_document_of_a_context_has_the_columns_of_its_row(made: Path) -> None:
    seen = check_documents(made)
    assert seen.keys() == {"train", "heldout"}
    assert not set(seen["train"]) & set(seen["heldout"])
    schema = open_cache(made).split("train").documents().schema
    assert schema.types == [pa.int64(), pa.string(), pa.string(), pa.float64(), pa.bool_()]


@pytest.fixture(scope="module")
def tables(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of the training rows, and in ``drawn`` of some of them."""
    root = tmp_path_factory.mktemp("tables")
    compute = Compute(threads=1, quiet=True)
    small = TrainSettings(architecture=TopK(k=3), d_sae=24, steps=10, batch_rows=64, warmup_steps=1, decay_steps=1)
    train.run(small, cache=made, output=root / "transcoder", compute=compute)
    for name, n_rows in (("all", None), ("drawn", 60)):
        chosen = AnalyzeSettings(split="train", examples=3, without_model=True, rows=n_rows)
        analyze.run(chosen, cache=made, transcoder=root / "transcoder", output=root / name, compute=compute)
    return root


@pytest.mark.slow
def test_tables_have_the_documents_of_their_rows_which_join_with_them(made: Path, tables: Path) -> None:
    kept = open_cache(made).split("train").documents().sort_by("document")
    found = select("SELECT * EXCLUDE split FROM documents", tables / "all")
    assert found.to_pylist() == kept.to_pylist()
    assert found.schema.types == kept.schema.types
    assert set(select("SELECT DISTINCT split FROM documents", tables / "all")["split"].to_pylist()) == {"train"}
    by_speech = select(
        "SELECT is_speech, count(*) AS n FROM rows JOIN documents USING (document) GROUP BY ALL ORDER BY ALL",
        tables / "all",
    ).to_pylist()
    numbers = select("SELECT document FROM rows", tables / "all")["document"].to_pylist()
    assert by_speech == [{"is_speech": told, "n": sum((n % 3 == 0) is told for n in numbers)} for told in (False, True)]
    assert read_schema(tables / "all" / "documents.parquet").field("lang").metadata


@pytest.mark.slow
def test_tables_of_some_rows_have_their_documents_alone(tables: Path) -> None:
    drawn, seen = (
        set(select(f"SELECT DISTINCT document FROM {name}", tables / "drawn")["document"].to_pylist())
        for name in ("documents", "rows")
    )
    assert drawn == seen
    assert len(drawn) < select("FROM documents", tables / "all").num_rows


@pytest.mark.slow
def test_an_example_on_a_page_says_what_its_document_is(tables: Path) -> None:
    opened = FeatureTables(tables / "all")
    pages = SiteData(opened, range(24), 8).pages({"features-000000"})
    examples = [record["examples"] for record in unpack(next(pages)[1])["features"]]
    lines = {d: line for own in examples for d, line in zip(own["document"], own["about"], strict=True)}
    assert lines
    for number, line in lines.items():
        row = expected(rows()[number], number)
        del row["document"]
        assert line == " · ".join(f"{name}: {value}" for name, value in row.items() if value is not None)


@pytest.mark.slow
def test_an_extension_keeps_the_same_columns_of_the_documents_it_reads(made: Path, tmp_path: Path) -> None:
    path = copy_cache(made, tmp_path / "cache")
    with small_blocks():
        cache.extend(path, 900, **HERE)
        cache.widen(path, "1", (), **HERE)
    assert len(check_documents(path)["train"]) > len(check_documents(made)["train"])
    assert open_cache(path, 0).split("train").documents().equals(open_cache(made).split("train").documents())


@pytest.mark.slow
def test_killed_while_packing_the_same_command_ends_with_the_same_bytes(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context_packing, "DOCUMENTS_PER_FILE", 4)
    changes = {"dataset": str(dataset), "keep_columns": KEPT, "tokens": 300}
    n_renames = count_renames(Job.cache(tmp_path / "cache", **changes).run)
    straight = tree(tmp_path / "cache")
    assert sum(name.startswith("documents/") for name in straight) > 2
    for at in (n_renames // 4, n_renames // 2):
        path = tmp_path / f"killed-{at}"
        job = FourPerFile.cache(path, **changes)
        codes = kill_until_done(job, [Kill(at)])
        assert codes == [-signal.SIGKILL, 0]
        assert differing(tree(path), straight) == []


class FourPerFile(Job):
    """A job whose files of documents hold four."""

    def run(self) -> None:
        context_packing.DOCUMENTS_PER_FILE, packing.BATCH_DOCUMENTS = 4, 8
        super().run()


@pytest.mark.slow
def test_a_worker_writes_the_same_bytes(made: Path, dataset: Path, tmp_path: Path) -> None:
    wanted = settings(dataset=str(dataset), keep_columns=KEPT, tokens=300)
    with small_blocks():
        cache.run(wanted, output=tmp_path / "cache", compute=Compute(threads=1, workers=1, quiet=True))
    assert differing(tree(tmp_path / "cache"), tree(made)) == []


def test_the_setting_is_recorded_only_where_it_is_used_and_takes_no_name_of_the_table() -> None:
    assert "keep_columns" not in settings().request()
    assert settings(keep_columns=" id , lang,id").kept_columns == ("id", "lang")
    with pytest.raises(SettingsError, match="document is a column of the table already"):
        settings(keep_columns="id,document")


def test_the_columns_come_from_every_source_of_text(tmp_path: Path) -> None:
    table = pa.table(
        {"text": ["a b", "c d"], "id": pa.array([7, None], pa.int32()), "at": pa.array([0, 1], pa.date32())}
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    write_jsonl(tmp_path / "ids.jsonl", [{"tokens": [1, 2], "id": "x"}, {"tokens": [3]}])
    read = {
        name: open_text_keeping(tmp_path / name, kept)
        for name, kept in (("rows.parquet", "id,at"), ("ids.jsonl", "id"))
    }
    assert read["rows.parquet"] == [{"id": 7, "at": "1970-01-01"}, {"id": None, "at": "1970-01-02"}]
    assert read["ids.jsonl"] == [{"id": "x"}, {"id": None}]


def open_text_keeping(path: Path, kept: str) -> list[dict[str, Any]]:
    return [document.kept for document in open_text(path, kept=kept.split(","))]


def test_lists_and_missing_columns_are_refused_together_by_name() -> None:
    schema = pa.schema([("text", pa.string()), ("tags", pa.list_(pa.string())), ("lang", pa.string())])
    check_kept(schema, ["lang", "text"], "d")
    with pytest.raises(TextError, match=r"(?s)tags: holds list.*lagn: there is no such column.*did you mean lang\?"):
        check_kept(schema, ["tags", "lagn", "lang"], "d")


def test_a_later_row_with_a_list_is_a_bad_row() -> None:
    bad = read_kept({"id": [1]}, ["id"])
    assert isinstance(bad, BadRow)
    assert "holds [1] in column 'id', which --keep-columns keeps" in bad.reason
    assert read_kept({"id": float("nan")}, ["id", "lang"]) == {"id": None, "lang": None}


def test_values_of_one_type_keep_it_and_others_become_texts() -> None:
    columns = {
        "whole": [1, None, 1 << 60],
        "number": [1, 2.5, None],
        "precise": [2.5, (1 << 60) + 1, None],
        "mixed": ["007", 7, True],
        "nested": [[1, "a"], None, {"b": None}],
        "empty": [None, None, None],
    }
    values = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    table = table_of(values, schema_of(values))
    kinds = [pa.int64(), pa.float64(), pa.string(), pa.string(), pa.string(), pa.string()]
    assert table.schema.types == kinds
    assert table["precise"].to_pylist() == ["2.5", "1152921504606846977", None]
    assert table["mixed"].to_pylist() == ["007", "7", "true"]
    assert table["nested"].to_pylist() == ['[1, "a"]', None, '{"b": null}']


@pytest.mark.slow
def test_a_cache_without_columns_has_no_documents(tmp_path: Path) -> None:
    assert run_job(Job.cache(tmp_path / "cache")) == 0
    assert not (tmp_path / "cache" / "documents").exists()
    assert "documents" not in json.loads((tmp_path / "cache" / "manifest.json").read_text())["splits"]["train"]
    with pytest.raises(ArtifactMismatch, match="--keep-columns"):
        open_cache(tmp_path / "cache").split("train").documents()
