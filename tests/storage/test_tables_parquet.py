from __future__ import annotations

import hashlib

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tailrace.storage.errors import ArtifactCorrupt, ArtifactMismatch, ArtifactMissing
from tailrace.storage.tables import column, describe, read_schema, read_table, write_table

SCHEMA = pa.schema(
    [
        column("feature", pa.int32(), "index of the feature"),
        column("mean", pa.float64(), "mean over active rows", unit="activation", nullable=True),
        column("tokens", pa.list_(pa.string()), "texts"),
    ]
)


def batch(start: int, stop: int) -> pa.RecordBatch:
    values = list(range(start, stop))
    return pa.RecordBatch.from_arrays(
        [
            pa.array(values, pa.int32()),
            pa.array([None if value % 3 == 0 else value / 2 for value in values], pa.float64()),
            pa.array([["a"] * (value % 4) for value in values], pa.list_(pa.string())),
        ],
        schema=SCHEMA,
    )


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_is_written_is_read_with_its_meanings(tmp_path):
    path = tmp_path / "features.parquet"
    assert write_table(path, SCHEMA, [batch(0, 10), batch(10, 15)], metadata={"bins": "16"}) == 15
    table = read_table(path)
    assert table.to_pylist() == pa.Table.from_batches([batch(0, 15)]).to_pylist()
    assert [(item.name, item.type, item.unit, item.is_nullable, item.meaning) for item in describe(table.schema)] == [
        ("feature", "int32", "", False, "index of the feature"),
        ("mean", "double", "activation", True, "mean over active rows"),
        ("tokens", "list<string>", "", False, "texts"),
    ]
    assert read_schema(path).metadata[b"bins"] == b"16"
    assert read_table(path, ["mean"]).column_names == ["mean"]
    assert read_table(path, ["feature"], pc.field("mean") > 6).to_pydict() == {"feature": [13, 14]}


def test_bytes_do_not_depend_on_how_rows_were_batched_or_when_or_where(tmp_path):
    one, other = tmp_path / "one.parquet", tmp_path / "other.parquet"
    write_table(one, SCHEMA, [batch(0, 40)], row_group_rows=16, metadata={"a": "1", "b": "2"})
    pieces = [batch(0, 3), batch(3, 35), batch(35, 36), batch(36, 40)]
    write_table(other, SCHEMA, pieces, row_group_rows=16, metadata={"b": "2", "a": "1"})
    assert digest(one) == digest(other)


def test_row_groups_have_the_rows_asked_for(tmp_path):
    path = tmp_path / "t.parquet"
    write_table(path, SCHEMA, [batch(0, 25), batch(25, 40)], row_group_rows=16)
    metadata = pq.ParquetFile(path).metadata
    assert [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)] == [16, 16, 8]
    assert metadata.row_group(0).column(0).compression == "ZSTD"


def test_a_table_without_rows_keeps_its_schema(tmp_path):
    path = tmp_path / "t.parquet"
    assert write_table(path, SCHEMA, []) == 0
    assert describe(read_table(path).schema) == describe(SCHEMA)


def test_a_failure_on_the_way_leaves_the_old_table_and_nothing_else(tmp_path):
    path = tmp_path / "t.parquet"
    write_table(path, SCHEMA, [batch(0, 5)])
    before = digest(path)

    def failing():
        yield batch(0, 5)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_table(path, SCHEMA, failing(), row_group_rows=2)
    assert digest(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.parquet"]


def test_a_column_that_may_not_be_null_is_refused_when_it_is(tmp_path):
    schema = pa.schema([column("mean", pa.float64(), "mean")])
    loose = pa.RecordBatch.from_arrays([pa.array([1.0, None])], names=["mean"])
    with pytest.raises(ValueError, match="null"):
        write_table(tmp_path / "t.parquet", schema, [loose])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_a_table_is_reported_with_its_path(tmp_path):
    (tmp_path / "t.parquet").mkdir()
    with pytest.raises(ArtifactMismatch, match=r"t\.parquet: is no regular file"):
        write_table(tmp_path / "t.parquet", SCHEMA, [batch(0, 5)])
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.parquet"]


def test_a_missing_table_and_a_broken_one_are_told_apart(tmp_path):
    with pytest.raises(ArtifactMissing, match="no such table"):
        read_table(tmp_path / "none.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ArtifactCorrupt, match=r"broken\.parquet: cannot be read as Parquet"):
        read_table(tmp_path / "broken.parquet")
