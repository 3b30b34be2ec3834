"""Parquet tables whose columns explain themselves: every field carries its meaning and its unit.

The same rows in the same batches give the same bytes: row groups are cut by row count alone, the writer's options
are fixed, and no time or path enters the file. (The library's name and version do, so bytes agree between equal
releases of pyarrow.) A file appears under its name only when it is complete and synced, and every page of it has a
checksum.

Meanings live in the Arrow schema that Parquet keeps beside the data: ``describe`` reads them back. Tools that
read plain Parquet, DuckDB among them, see names and types only.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from tailrace.storage.artifact import (
    JSON,
    Count,
    DerivedManifest,
    Inputs,
    Record,
    Reference,
    is_disk_refusal,
    refuse_replacing,
    shaped,
    storage_refused,
    sync_directory,
)
from tailrace.storage.cache_format import Site
from tailrace.storage.compared import refuse_changed
from tailrace.storage.errors import ArtifactCorrupt, ArtifactMissing
from tailrace.storage.formats import FOR_ONE_LAYER_ONLY, TABLES_KIND
from tailrace.storage.names import discard, inside, remove_abandoned, temporary_path

ROW_GROUP_ROWS = 65_536
"""Rows of a row group unless the table says otherwise: the least a reader must decompress."""

_MEANING = b"description"
_UNIT = b"unit"


class TableRecord(Record):
    """What a manifest says of a table."""

    n_rows: Count


class _DrawnRows(Record):
    drawn: str = ""
    n_rows: Count = 0
    of_rows: Count = 0


class TablesInputs(Inputs):
    """What tables were made from."""

    transcoder: Reference
    rows: Annotated[dict[str, JSON], shaped(_DrawnRows)] | None = None


class _TablesSettings(Record):
    split: str = ""
    rows: int | None = None


class _TablesRequest(Record):
    settings: _TablesSettings = Field(default_factory=_TablesSettings)


class TablesManifest(DerivedManifest):
    """The manifest of what ``pipeline analyze`` publishes."""

    of_kind = TABLES_KIND
    instead = FOR_ONE_LAYER_ONLY

    inputs: TablesInputs
    request: Annotated[dict[str, JSON], shaped(_TablesRequest)]
    site: Site
    tables: dict[str, TableRecord]

    @property
    def settings(self) -> dict[str, JSON]:
        """What the analysis was asked for; ``split`` and ``rows`` are always there."""
        return {"split": "", "rows": None, **self.request.get("settings", {})}

    @property
    def n_features(self) -> int:
        """How many features there are. Raises ArtifactCorrupt for tables without any."""
        if "features" not in self.tables:
            raise ArtifactCorrupt(
                "the manifest of these tables names no table of features; restore it or analyze again"
            )
        return self.tables["features"].n_rows


class TableColumn(NamedTuple):
    """What a column holds, in words."""

    name: str
    type: str
    unit: str
    is_nullable: bool
    meaning: str


def column(name: str, kind: pa.DataType, meaning: str, *, unit: str = "", nullable: bool = False) -> pa.Field:
    """Declare a column; ``meaning`` is one sentence, ``unit`` is empty for numbers without a unit."""
    metadata = {_MEANING: meaning.encode()} | ({_UNIT: unit.encode()} if unit else {})
    return pa.field(name, kind, nullable=nullable, metadata=metadata)


def describe(schema: pa.Schema) -> list[TableColumn]:
    """Return the name, type, unit and meaning of every column; fields declared elsewhere have an empty meaning."""
    return [_describe_field(field) for field in schema]


def _describe_field(field: pa.Field) -> TableColumn:
    metadata = field.metadata or {}
    meaning, unit = metadata.get(_MEANING, b"").decode(), metadata.get(_UNIT, b"").decode()
    return TableColumn(field.name, _type_name(field.type), unit, field.nullable, meaning)


def _type_name(kind: pa.DataType) -> str:
    """Name a type as a reader thinks of it: ``list<float>`` rather than Arrow's ``list<element: float>``."""
    return f"list<{_type_name(kind.value_type)}>" if pa.types.is_list(kind) else str(kind)


def write_table(
    path: Path,
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    *,
    row_group_rows: int = ROW_GROUP_ROWS,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write ``batches`` as one Parquet file at ``path``, holding one row group in memory; return the row count.

    ``path`` holds its old bytes or all the new ones. ``metadata`` is kept with the schema. Raises StorageFull if the
    disk refuses, ArtifactMismatch if ``path`` is no regular file; an exception of ``batches`` leaves nothing behind.
    """
    refuse_replacing(path)
    remove_abandoned(path)
    # sorted here, since Arrow keeps the order it is given
    schema = schema.with_metadata(dict(sorted((metadata or {}).items())) or None)
    temporary = temporary_path(path)
    try:
        n_rows = _write(temporary, schema, batches, row_group_rows)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        if is_disk_refusal(error):
            raise storage_refused(error, path) from error
        raise
    finally:
        discard(temporary)
    return n_rows


def _write(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], row_group_rows: int) -> int:
    n_rows = 0
    options: dict[str, Any] = {"compression": "zstd", "compression_level": 3, "version": "2.6"}
    with pq.ParquetWriter(path, schema, write_page_checksum=True, **options) as writer:
        for group in _regroup(schema, batches, row_group_rows):
            writer.write_table(group, row_group_size=group.num_rows)
            n_rows += group.num_rows
    return n_rows


def _regroup(schema: pa.Schema, batches: Iterable[pa.RecordBatch], n_rows: int) -> Iterator[pa.Table]:
    """Cut a stream of batches into tables of ``n_rows`` rows (the last may be shorter), whatever the batches' sizes."""
    waiting: list[pa.RecordBatch] = []
    n_waiting = 0
    for batch in batches:
        waiting.append(batch.cast(schema))
        n_waiting += batch.num_rows
        while n_waiting >= n_rows:
            table = pa.Table.from_batches(waiting, schema=schema)
            yield table.slice(0, n_rows).combine_chunks()
            waiting, n_waiting = table.slice(n_rows).to_batches(), n_waiting - n_rows
    if n_waiting:
        yield pa.Table.from_batches(waiting, schema=schema).combine_chunks()


def schema_of(rows: Iterable[Mapping[str, Any]], names: Sequence[str] | None = None) -> pa.Schema:
    """Return the types of columns of Python values: of ``names``, or of all in the order in which they come.

    A column is bool, int64, double or string where all its values are: whole numbers among others are doubles if that
    loses no digit. A column of several types, or of lists and objects, is string.
    """
    kinds: dict[str, set[str]] = {name: set() for name in names or ()}
    for row in rows:
        for name in row if names is None else names:
            own = kinds.setdefault(name, set())
            if (value := row.get(name)) is not None:
                own.add(_kind(value))
    return pa.schema([(name, _type_of(own)) for name, own in kinds.items()])


def table_of(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Return Python values as a table of the types that ``schema_of`` gave.

    In a column of texts, what is no text is spelled as JSON spells it. A name that a row lacks is null.
    """
    remaining = iter(rows)
    batches = []
    while batch := list(islice(remaining, ROW_GROUP_ROWS)):
        columns = [_array_of([row.get(field.name) for row in batch], field.type) for field in schema]
        batches.append(pa.RecordBatch.from_arrays(columns, schema=schema))
    return pa.Table.from_batches(batches, schema)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "integer" if abs(value) <= 1 << 53 else "long" if -(1 << 63) <= value < 1 << 63 else "text"
    return "double" if isinstance(value, float) else "text"


def _type_of(kinds: set[str]) -> pa.DataType:
    if kinds == {"bool"}:
        return pa.bool_()
    if kinds and kinds <= {"integer", "long"}:
        return pa.int64()
    return pa.float64() if kinds and kinds <= {"integer", "double"} else pa.string()


def _array_of(values: list[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_string(kind):
        values = [one if one is None or isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in values]
    return pa.array(values, kind)


def read_table(path: Path, columns: Sequence[str] | None = None, where: pc.Expression | None = None) -> pa.Table:
    """Return a Parquet file, or some of its columns and rows, as an Arrow table.

    Row groups without a row that ``where`` asks for are not read. What is read is compared with the pages' checksums,
    and a small file with the manifest that lists it. Raises ArtifactMissing or ArtifactCorrupt.
    """
    refuse_changed(path)
    wanted = list(columns) if columns is not None else None
    with _parquet(path):
        try:
            file = inside(path.parent, path.name)
            table = pq.read_table(file, columns=wanted, filters=where, page_checksum_verification=True)
        except FileNotFoundError as error:
            raise ArtifactMissing(f"{path}: there is no such table; run the command that makes it") from error
        _refuse_no_text(table.schema)
        table.validate(full=True)  # texts that are none, else met wherever one is used
        return table


def read_schema(path: Path) -> pa.Schema:
    """Return the schema of a Parquet file, with the meanings of its columns. Raises ArtifactCorrupt for no file."""
    refuse_changed(path)
    with _parquet(path):
        schema = pq.read_schema(inside(path.parent, path.name))
        _refuse_no_text(schema)
        return schema


@contextmanager
def _parquet(path: Path) -> Iterator[None]:
    """Raise ArtifactCorrupt for what pyarrow says of a damaged file, by whatever class it says it."""
    try:
        yield
    except pa.ArrowMemoryError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ArtifactCorrupt(f"{path}: cannot be read as Parquet ({error}); restore it or rebuild it") from error


def _refuse_no_text(schema: pa.Schema) -> None:
    """Raise UnicodeDecodeError for names and metadata that are no text: no checksum covers a file's footer."""
    for metadata in (schema.metadata, *(field.metadata for field in schema)):
        for part in itertools.chain.from_iterable((metadata or {}).items()):
            part.decode()
