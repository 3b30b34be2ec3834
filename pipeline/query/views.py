"""Which tables a query sees: every Parquet file of the artifacts given, each a view.

A folder of Parquet files inside an artifact (``activations/``) is one table. Artifacts may be named, and their views
then lie in a schema of that name; those without a name share one, so no two of them may hold the same table. A folder
of tables, such as those of every layer, is one set of views with the rows of all, and a column that says whose. Files
of a user's own are views under the names given to them.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from tailrace.pipeline.artifacts.folders import artifacts_inside, as_path
from tailrace.pipeline.text.columns import BadRow
from tailrace.pipeline.text.files import COMPRESSIONS, TextFiles
from tailrace.pipeline.text.json_rows import JsonExamples
from tailrace.storage.artifact import MANIFEST, Manifest, published_file, published_kind
from tailrace.storage.compared import refuse_changed
from tailrace.storage.errors import ArtifactMismatch, SettingsError
from tailrace.storage.labels import LABELS, SCHEMA, labels_file
from tailrace.storage.names import home_path
from tailrace.storage.parsing import open_regular, parse_json
from tailrace.storage.tables import TableColumn, describe, read_schema, schema_of, table_of
from tailrace.training.architectures.manifest import METRICS, TIMING
from tailrace.training.loop.curves import find_runs

KINDS = ("tables", "sweep", "evaluation", "task", "transcoders")
"""What has Parquet tables: those of ``pipeline analyze``, ``runs`` of a sweep, ``tokens`` of an evaluation, ``curves``
and ``ranking`` of a task, ``layers`` of transcoders of all layers. Spelled out: what makes them loads torch."""

Tables = Path | Sequence[Path] | Mapping[str, Path]
"""One artifact, several, or several by name."""

ATTACHED = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
"""Files of a user's own that a query can see."""

COMPARED_BYTES = 1 << 30
"""Of a file, up to which a query compares it with its checksum first: half a second of reading that the query saves."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RESERVED = {"main", "temp", "information_schema", "pg_catalog"}
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")


FOLDER = TableColumn(
    "folder",
    "string",
    "",
    is_nullable=False,
    meaning="name of the folder inside, whose tables the row is of",
)


_NO_LABELS = (
    "NULL::INTEGER AS feature, '' AS label, '' AS note, false AS starred, NULL::TIMESTAMPTZ AS updated, '' AS author"
)


class View(NamedTuple):
    """A table as a query names it."""

    schema: str | None
    name: str
    files: tuple[Path, ...]
    """None of labels that nobody gave yet: a query that joins them works all the same."""
    folders: tuple[str, ...] | None = None
    """Of a folder of tables, the folder that each file lies in."""
    is_attached: bool = False
    """Whether it is a file of the user's own."""
    rows: pa.Table | None = None
    """Of a file that DuckDB does not read, what it holds."""

    @property
    def sql_name(self) -> str:
        """As it is written in SQL."""
        name = self.name if _NAME.fullmatch(self.name) else quote_identifier(self.name)
        return name if self.schema is None else f"{self.schema}.{name}"

    def columns(self) -> list[TableColumn]:
        """Return what every column holds, as the file itself says."""
        if self.rows is not None:
            return describe(self.rows.schema)
        own = describe(read_schema(self.files[0]) if self.files else SCHEMA)
        return own if self.folders is None else [FOLDER, *own]

    @property
    def select(self) -> str:
        """The SQL that reads it."""
        if not self.files:
            folder = "" if self.folders is None else f"NULL::VARCHAR AS {FOLDER.name}, "
            return f"SELECT {folder}{_NO_LABELS} WHERE false"
        if self.folders is None:
            return f"SELECT * FROM {_rows(self.files)}"
        by_folder: dict[str, list[Path]] = {}
        for folder, path in zip(self.folders, self.files, strict=True):
            by_folder.setdefault(folder, []).append(path)
        return " UNION ALL BY NAME ".join(
            f"SELECT {quote_literal(folder)} AS {FOLDER.name}, * FROM {_rows(paths)}"
            for folder, paths in by_folder.items()
        )


class LogView(View):
    """Lines that runs log, as a table: ``run``, ``step``, ``rows``, ``split``, and every number by its name.

    Numbers that only some lines have are null elsewhere.
    """

    def columns(self) -> list[TableColumn]:
        """Return what every column holds."""
        kinds = {"split": "string", "step": "int64", "rows": "int64"}
        meaning = f"as {self.name}.jsonl has it"
        own = [TableColumn(name, kinds.get(name, "double"), "", True, meaning) for name in self._names()]
        return [TableColumn("run", "string", "", False, "name of the run"), *own]

    @property
    def select(self) -> str:
        """The SQL that reads it: by a schema, so that DuckDB looks at each file once."""
        kinds = {"split": "VARCHAR", "step": "BIGINT", "rows": "BIGINT"}
        columns = ", ".join(f"{quote_literal(name)}: '{kinds.get(name, 'DOUBLE')}'" for name in self._names())
        return " UNION ALL BY NAME ".join(
            f"SELECT {quote_literal(run)} AS run, * FROM read_json({_literals([_pattern(str(path.absolute()))])}, "
            f"format = 'newline_delimited', ignore_errors = true, columns = {{{columns}}})"
            for run, path in zip(self.folders or (), self.files, strict=True)
        )

    def _names(self) -> list[str]:
        """Return the names of numbers, from the first lines of every kind and the last: histograms are left out."""
        names: dict[str, None] = {}
        for path in self.files:
            for line in _first_and_last_lines(path):
                names |= {name: None for name, value in line.items() if not isinstance(value, dict)}
        return list(names)


def _first_and_last_lines(path: Path, n_bytes: int = 1 << 17) -> Iterator[dict[str, Any]]:
    with open_regular(path) as log:
        head = log.read(n_bytes)
        log.seek(max(len(head), path.stat().st_size - n_bytes))
        for line in (head + log.read(n_bytes)).splitlines():
            with suppress(ValueError):  # where the parts meet, and where a line is being written
                yield parse_json(line)


def _log_views(schema: str | None, path: Path) -> list[View]:
    """Return ``metrics`` and ``timing`` of the runs at ``path``, finished or not; nothing where none lies."""
    views: list[View] = []
    for log in (METRICS, TIMING):
        logs = {run: folder / log for run, folder in find_runs(path).items() if (folder / log).is_file()}
        if logs:
            views.append(LogView(schema, log.partition(".")[0], tuple(logs.values()), tuple(logs)))
    return views


def find_views(tables: Tables, attached: Mapping[str, Path] | None = None) -> list[View]:
    """Return the views of all artifacts, and of a user's own files by name, which are read here.

    Raises ArtifactMissing and its like, and SettingsError where names clash or a file cannot be read.
    """
    if isinstance(tables, Path):
        tables = [tables]
    if isinstance(tables, Mapping):
        _check_names(tables)
        named: list[tuple[str | None, Path]] = list(tables.items())
    else:
        named = [(None, path) for path in tables]
    views = [view for name, path in named for view in _views(name, path)]
    _refuse_clashes(views, [path for name, path in named if name is None])
    return [*views, *_attached_views(attached or {}, views)]


def each_folder(tables: Tables) -> list[tuple[str, list[Path]]]:
    """Return for each tables inside a folder its name, and the artifacts with these in the folder's stead.

    None if no folder of tables is given, or artifacts have names.
    """
    if isinstance(tables, Mapping):
        return []
    paths = [tables] if isinstance(tables, Path) else list(tables)
    insides = [artifacts_inside(path, KINDS[0]) if not (path / MANIFEST).exists() else [] for path in paths]
    others = [path for path, inside in zip(paths, insides, strict=True) if not inside]
    return [(one.name, [one, *others]) for inside in insides for one in inside]


def parse_tables(given: Sequence[str]) -> Tables:
    """Read ``PATH`` or ``NAME=PATH`` of every artifact; raise SettingsError if only some have a name."""
    pairs = [_parse(text) for text in given]
    unnamed = [path for name, path in pairs if name is None]
    if not unnamed:
        names = [str(name) for name, _ in pairs]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise SettingsError(f"--tables: {', '.join(repeated)} names several artifacts; give each its own name")
        return {str(name): path for name, path in pairs}
    if len(unnamed) < len(pairs):
        raise SettingsError(
            f"--tables: {', '.join(map(str, unnamed))} has no name while others do; write NAME={unnamed[0]} too"
        )
    return unnamed


def parse_attached(given: Sequence[str]) -> dict[str, Path]:
    """Read ``NAME=PATH`` of every file, whose own name is taken where none is given; raise SettingsError for two."""
    attached: dict[str, Path] = {}
    for text in given:
        name, path = _parse(text)
        name = path.name.split(".")[0] if name is None else name
        if name in attached:
            raise SettingsError(f"--attach: {name} names several files; give each its own name, {name}2={path}")
        attached[name] = path
    return attached


def _attached_views(attached: Mapping[str, Path], views: Sequence[View]) -> list[View]:
    """Read every file; raise SettingsError that names each name and path that is wrong."""
    taken = {(view.schema or view.name).lower() for view in views} | _RESERVED
    problems, read = [], []
    for name, path in attached.items():
        if not _NAME.fullmatch(name) or name.lower() in taken:
            why = "names a table already" if name.lower() in taken else "is no name in SQL"
            problems.append(f"--attach {name}={path}: {name} {why}; write another, such as own={path}")
            continue
        try:
            read.append(_attached_view(name, home_path(path).resolve()))
        except (OSError, UnicodeError, csv.Error, ValueError, pa.ArrowException) as error:
            problems.append(f"--attach {name}={path}: {error}")
    if problems:
        raise SettingsError("\n".join(problems))
    return read


def _attached_view(name: str, path: Path) -> View:
    """Return the view of a file; raise ValueError, OSError or ArrowException if it cannot be read."""
    endings = [ending for ending in path.suffixes[-2:] if ending not in COMPRESSIONS]
    kind = ATTACHED.get(endings[-1].lower()) if endings else None
    if not path.exists():
        raise ValueError("there is no such file; check the path")
    if kind is None or (kind != "json" and path.suffix in COMPRESSIONS):
        raise ValueError(f"wanted a file that ends in {', '.join(ATTACHED)}")
    if kind == "parquet":
        pq.read_schema(path)
        return View(None, name, (path,), is_attached=True)
    rows = table_of(_json_rows(path), schema_of(_json_rows(path))) if kind == "json" else _csv_table(path)
    return View(None, name, (path,), is_attached=True, rows=rows)


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    rows = JsonExamples(TextFiles("json", (path,), (path.name,)))
    for row in rows:
        if isinstance(row, BadRow):
            raise ValueError(f"{rows.line} {row.reason}; repair or remove it")
        yield row


def _csv_table(path: Path) -> pa.Table:
    """Return a file of texts with a header: a column of numbers alone, or of true and false, is typed, an empty cell
    null; ``007`` and ``1,5`` are texts, and a column with one is texts as they are written.
    """
    lines = [*_csv_lines(path)]
    header, cells = lines[0], lines[1:]
    schema = schema_of(({name: _cell(text) for name, text in zip(header, line, strict=True)} for line in cells), header)
    is_text = [pa.types.is_string(field.type) for field in schema]
    rows = (
        {name: (text or None) if own else _cell(text) for name, text, own in zip(header, line, is_text, strict=True)}
        for line in cells
    )
    return table_of(rows, schema)


def _csv_lines(path: Path) -> Iterator[list[str]]:
    """Yield the header and every row; raise ValueError for a row of another length."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        header = next(reader, None)
        if header is None or len(set(header)) < len(header):
            raise ValueError("wanted a first line with a different name for every column")
        yield header
        for line in reader:
            if line and len(line) != len(header):
                raise ValueError(
                    f"line {reader.line_num} has {len(line)} cells, the first has {len(header)}; repair it"
                )
            if line:
                yield line


def _cell(text: str) -> str | int | float | bool | None:
    """Return what a cell says: what JSON would read as a number, true or false is that, and nothing is null."""
    if _NUMBER.fullmatch(text) and math.isfinite(float(text)):
        return float(text) if set(text) & set(".eE") else int(text)
    return {"": None, "true": True, "false": False, "True": True, "False": False}.get(text, text)


def _parse(text: str) -> tuple[str | None, Path]:
    name, equals, path = text.partition("=")
    is_named = equals and _NAME.fullmatch(name) and not as_path(text).exists()
    return (name if is_named else None, as_path(path if is_named else text))


def refuse_changed_tables(connection: duckdb.DuckDBPyConnection, sql: str, views: Sequence[View]) -> None:
    """Raise ArtifactCorrupt if a file of a table that ``sql`` names is not as its manifest says.

    DuckDB compares no checksums. Files of more than ``COMPARED_BYTES`` are compared by their size.
    """
    try:
        names = {name.lower() for name in connection.get_table_names(sql)}
    except duckdb.Error:  # of a statement with parameters or PIVOT it does not say them
        names = {view.name.lower() for view in views}
    for view in views:
        if view.name.lower() in names and view.rows is None:
            for path in view.files:
                refuse_changed(path, largest=COMPARED_BYTES)


def open_views(connection: duckdb.DuckDBPyConnection, views: Sequence[View]) -> None:
    """Make every view, after shutting everything but their files out for good."""
    files = [str(path.absolute()) for view in views if view.rows is None for path in view.files]
    connection.execute("SET autoinstall_known_extensions = false")
    connection.execute("SET autoload_known_extensions = false")
    connection.execute("SET python_enable_replacements = false")
    connection.execute("SET enable_progress_bar = false")  # it is drawn on standard output, whatever that is
    # both what is opened and the pattern by which it is found
    connection.execute(f"SET allowed_paths = {_literals([*files, *map(_pattern, files)])}")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    for schema in dict.fromkeys(view.schema for view in views if view.schema is not None):
        connection.execute(f"CREATE SCHEMA {quote_identifier(schema)}")
    for view in views:
        name = ".".join(quote_identifier(part) for part in (view.schema, view.name) if part is not None)
        if view.rows is not None:
            connection.register(view.name, view.rows)
        else:
            connection.execute(f"CREATE VIEW {name} AS {view.select}")


def _views(schema: str | None, path: Path) -> list[View]:
    """Return the views of an artifact, or of all tables in a folder together; of runs, what they logged too."""
    logs = _log_views(schema, path)
    if logs and published_kind(path) not in KINDS:
        return logs
    inside = artifacts_inside(path, KINDS[0]) if not (path / MANIFEST).exists() else []
    if not inside:
        return [*(View(schema, table, files) for table, files in _table_files(path).items()), *logs]
    files: dict[str, list[Path]] = {}
    folders: dict[str, list[str]] = {}
    for artifact in inside:
        for table, own in _table_files(artifact).items():
            files.setdefault(table, []).extend(own)
            folders.setdefault(table, []).extend([artifact.name] * len(own))
    return [View(schema, table, tuple(files[table]), tuple(folders[table])) for table in files]


def _table_files(artifact: Path) -> dict[str, tuple[Path, ...]]:
    """Return the Parquet files of each table of an artifact. Raises ArtifactCorrupt if one lies elsewhere."""
    # where nothing is published, Manifest.read says whether nothing lies there or something unfinished does
    kind = published_kind(artifact) or KINDS[0]
    if kind not in KINDS:
        raise ArtifactMismatch(
            f"{artifact}: is of kind {kind}, which has no tables; give tables, a run, a sweep or an evaluation"
        )
    found: dict[str, list[Path]] = {}
    if kind == KINDS[0]:  # no manifest lists labels, since they change
        found[LABELS] = [] if (labels := labels_file(artifact)) is None else [labels]
    manifest = Manifest.read(artifact, kind)
    for name in sorted(manifest.files):
        place = PurePosixPath(name)
        if place.suffix == ".parquet":
            table = place.stem if len(place.parts) == 1 else place.parts[0]
            found.setdefault(table, []).append(published_file(artifact, manifest, name))
    return {table: tuple(files) for table, files in found.items()}


def _check_names(names: Mapping[str, Path]) -> None:
    wrong = [name for name in names if not _NAME.fullmatch(name) or name.lower() in _RESERVED]
    if wrong:
        raise SettingsError(
            f"--tables: {', '.join(map(repr, wrong))} cannot name tables; use letters, digits and _, such as layer3"
        )


def _refuse_clashes(views: Sequence[View], unnamed: Sequence[Path]) -> None:
    shared: dict[str, list[str]] = {}
    for name in dict.fromkeys(view.name for view in views if view.schema is None):
        files = [view.files[0] for view in views if view.name == name and view.files]
        holders = [path for path in unnamed for file in files if path in file.parents]
        if len(holders) > 1:
            shared.setdefault(" and ".join(map(str, holders)), []).append(name)
    if shared:
        problems = [f"{', '.join(names)} in {holders}" for holders, names in shared.items()]
        raise SettingsError(
            f"--tables: the same tables lie in several places, {'; '.join(problems)}. "
            f"Name them all, --tables a={unnamed[0]} --tables b=…, and ask a.features"
        )


def quote_identifier(name: str) -> str:
    """Return the name of a table or schema as SQL has it, whatever it holds."""
    return '"' + name.replace('"', '""') + '"'


def quote_literal(text: str) -> str:
    """Return a string as SQL has it, whatever it holds."""
    return "'" + text.replace("'", "''") + "'"


def _literals(texts: Sequence[str]) -> str:
    return f"[{', '.join(map(quote_literal, texts))}]"


def _rows(paths: Sequence[Path]) -> str:
    """Return the SQL for the rows of files: of these alone, and with their own columns alone.

    A folder called ``k=2`` would be taken for a partition, and add a column.
    """
    return f"read_parquet({_literals([_pattern(str(path.absolute())) for path in paths])}, hive_partitioning = false)"


def _pattern(path: str) -> str:
    """Return the pattern that only ``path`` fits."""
    return re.sub(r"([*?\[])", r"[\1]", path)
