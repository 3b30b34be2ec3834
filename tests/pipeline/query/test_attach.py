"""``--attach``: a user's own file is a table beside the others, with the types its values have, and nothing else is."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tailrace
from tailrace.pipeline.query import stage as query
from tailrace.pipeline.query.views import parse_attached
from tailrace.storage.errors import ActionableError, SettingsError
from tests.support.cache_jobs import command
from tests.support.tables_by_hand import example_row, feature_row, publish_tables
from tests.support.text_files_written import write_jsonl


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("attach") / "tables"
    return publish_tables(root, [feature_row(0), feature_row(1)], [example_row(0)])


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write_jsonl(
        tmp_path / "own.jsonl", [{"feature": 1, "label": "war"}, {"feature": 0, "id": "007", "tags": [1]}]
    )


def ask(sql: str, tables: Path, **attached: Path) -> list[dict[str, Any]]:
    return query.select(sql, tables, attached=attached).to_pylist()


def test_a_file_joins_the_tables_by_its_name(
    tables: Path, own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sql = "SELECT feature, label, id, tags FROM features JOIN docs USING (feature) ORDER BY feature"
    wanted = [
        {"feature": 0, "label": None, "id": "007", "tags": "[1]"},
        {"feature": 1, "label": "war", "id": None, "tags": None},
    ]
    assert ask(sql, tables, docs=own) == wanted
    assert tailrace.query(sql, tables, attach={"docs": str(own)}).to_pylist() == wanted
    shown = command(capsys, "query", sql, "--tables", tables, "--attach", f"docs={own}", "--format", "json").out
    assert json.loads(shown) == wanted
    listed = command(capsys, "query", "--list", "--tables", tables, "--attach", own).out
    assert "own\n  feature" in listed
    monkeypatch.chdir(own.parent)
    assert parse_attached(["own.jsonl", "b=own.jsonl"]) == {"own": Path("own.jsonl"), "b": Path("own.jsonl")}


def test_every_kind_of_file_has_the_types_of_its_values(tables: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\ufeffid,n,x,ok,mixed\n007,1,1.50,true,1.50\n008,,2,False,\n", encoding="utf-8")
    (tmp_path / "b.tsv").write_text('id\ttext\n1\t"two\nlines"\n')
    pq.write_table(pa.table({"id": pa.array([1], pa.int16())}), tmp_path / "c[1].parquet")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"id": true}\n{"id": 2}\n'))
    assert ask("FROM a", tables, a=tmp_path / "a.csv") == [
        {"id": "007", "n": 1, "x": 1.5, "ok": True, "mixed": 1.5},
        {"id": "008", "n": None, "x": 2.0, "ok": False, "mixed": None},
    ]
    assert ask("FROM b", tables, b=tmp_path / "b.tsv") == [{"id": 1, "text": "two\nlines"}]
    assert ask("SELECT typeof(id) AS t FROM c", tables, c=tmp_path / "c[1].parquet") == [{"t": "SMALLINT"}]
    assert ask("FROM d ORDER BY id", tables, d=tmp_path / "d.jsonl.gz") == [{"id": "2"}, {"id": "true"}]
    (tmp_path / "e.csv").write_text("mixed\n1.50\nword\n1e999999\n")
    assert ask("FROM e", tables, e=tmp_path / "e.csv") == [{"mixed": "1.50"}, {"mixed": "word"}, {"mixed": "1e999999"}]


def test_nothing_else_of_the_disk_is_reachable_and_nothing_is_written(tables: Path, own: Path) -> None:
    secret = write_jsonl(own.parent / "secret.jsonl", [{"a": 1}])
    pq.write_table(pa.table({"a": [1]}), own.parent / "secret.parquet")
    pq.write_table(pa.table({"a": [1]}), own.parent / "open.parquet")
    attached = {"docs": own, "open": own.parent / "open.parquet"}
    for sql in (
        f"FROM read_json('{secret}')",
        f"FROM read_json('{own}')",
        f"FROM read_parquet('{own.parent}/*.parquet')",
        f"FROM '{own.parent}/secret.parquet'",
        f"SELECT content FROM read_text('{secret}')",
        "SELECT 1 FROM attached",
        f"COPY docs TO '{own.parent}/out.csv'",
        f"ATTACH '{own.parent}/x.db'",
        "INSERT INTO docs VALUES (1)",
        "SET enable_external_access = true",
    ):
        with pytest.raises(ActionableError):
            query.select(sql, tables, attached=attached)
    assert ask("SELECT count(*) AS n FROM docs, open", tables, **attached) == [{"n": 2}]


def test_every_file_and_name_that_is_wrong_is_named(tables: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": \n')
    (tmp_path / "short.csv").write_text("a,b\n1\n")
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    (tmp_path / "x.parquet").write_text("no")
    (tmp_path / "x.xlsx").write_text("no")
    attached = {
        "features": tmp_path / "short.csv",
        "a b": tmp_path / "short.csv",
        "gone": tmp_path / "gone.jsonl",
        "bad": tmp_path / "bad.jsonl",
        "short": tmp_path / "short.csv",
        "twice": tmp_path / "twice.csv",
        "p": tmp_path / "x.parquet",
        "sheet": tmp_path / "x.xlsx",
    }
    with pytest.raises(SettingsError) as caught:
        query.select("SELECT 1", tables, attached=attached)
    lines = str(caught.value).splitlines()
    wanted = ("names a table already", "is no name in SQL", "no such file", "row 2 (line 2) cannot be read as JSON")
    assert all(text in line for text, line in zip(wanted, lines, strict=False))
    assert "line 2 has 1 cells, the first has 2" in lines[4]
    assert "a different name for every column" in lines[5]
    assert "Parquet" in lines[6]
    assert "wanted a file that ends in .jsonl" in lines[7]
    with pytest.raises(SettingsError, match="names several files"):
        parse_attached(["a.jsonl", "b/a.csv"])


def test_a_ready_query_sees_attached_files_in_every_folder(tables: Path, own: Path) -> None:
    answer = query.run(
        "SELECT count(*) AS n FROM docs", tables=tables.parent, attached={"docs": own}, each=True, format="json"
    )
    assert json.loads(answer) == [{"folder": "tables", "n": 2}]
