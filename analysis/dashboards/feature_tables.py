"""Published tables, read a run of features at a time; a missing table is None, a missing column is left out.

Tables differ in what they hold: those made without the language model have no promoted tokens and no connections, those
made with `--activations none` no activations. A page shows what is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tailrace.analysis.dashboards.values import visible_text, visible_token
from tailrace.storage.artifact import published_file
from tailrace.storage.formats import RESERVED_COLUMNS, TABLES_KIND
from tailrace.storage.labels import read_labels
from tailrace.storage.tables import TablesManifest, read_schema, read_table

KIND = TABLES_KIND
"""The kind of artifact read."""

_ACTIVATIONS = re.compile(r"activations/features-(\d+)-(\d+)\.parquet")


class FeatureTables:
    """A ``tables`` artifact. Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = TablesManifest.read(path)
        self._files = set(self.manifest.files)
        self._checked: dict[str, Path] = {}

    @property
    def n_features(self) -> int:
        """The number of features, dead ones included."""
        return self.manifest.n_features

    @cached_property
    def layer(self) -> dict[str, Any]:
        """The transcoder's row of the table ``layers``."""
        (row,) = read_table(self._file("layers.parquet")).to_pylist()
        return dict(row)

    @cached_property
    def n_bands(self) -> int:
        """The number of bands that examples were drawn from; 0 if none were."""
        bands = self.read("examples", columns=("band",))
        if bands is None or "band" not in bands.column_names:
            return 0
        last = pc.max(bands["band"]).as_py()
        return 0 if last is None else int(last) + 1

    @cached_property
    def token_ids_read(self) -> frozenset[int] | None:
        """The tokens that occur in the rows whose activations are kept; None if the tables keep none."""
        rows = self.read("rows", columns=("token_id",))
        return None if rows is None else frozenset(pc.unique(rows["token_id"]).to_pylist())

    def has(self, name: str) -> bool:
        """Return whether there is a table of this name."""
        return f"{name}.parquet" in self._files

    def schema(self, name: str) -> pa.Schema:
        """Return the schema of a table that exists, with the facts kept in its file."""
        return read_schema(self._file(f"{name}.parquet"))

    def read(self, name: str, features: range | None = None, columns: Sequence[str] | None = None) -> pa.Table | None:
        """Return the rows of a run of features (of all, if none are given), in the table's order; None without it.

        Columns that the table lacks are left out.
        """
        if not self.has(name):
            return None
        path = self._file(f"{name}.parquet")
        chosen = None if columns is None else [column for column in columns if column in read_schema(path).names]
        return read_table(path, chosen, None if features is None else _within(features))

    def descriptions(self) -> dict[int, str]:
        """Return in a word what each feature is about: its label, or its top token."""
        known = self.read("features", columns=("feature", "top_token"))
        assert known is not None, "tables always have the table of features"
        tokens = {row["feature"]: row.get("top_token") for row in known.to_pylist()}
        labels = {feature: one.label for feature, one in read_labels(self.path).items() if one.label}
        return {feature: visible_token(token) for feature, token in tokens.items() if token is not None} | {
            feature: visible_text(label) for feature, label in labels.items()
        }

    def about_documents(self, documents: pa.ChunkedArray) -> dict[int, str] | None:
        """Return a line with the kept columns of each of these documents, ``lang: en · source: web``; None without any.

        What is null is left out, long values are cut.
        """
        if not self.has("documents"):
            return None
        rows = read_table(self._file("documents.parquet"), where=pc.field("document").isin(pc.unique(documents)))
        kept = [name for name in rows.column_names if name not in RESERVED_COLUMNS]
        return {
            row["document"]: " · ".join(f"{name}: {_short(row[name])}" for name in kept if row[name] is not None)
            for row in rows.to_pylist()
        }

    def activations(self, features: range) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """Return feature and value of every stored activation of a run of features; None if none are stored."""
        files = list(self._activation_files())
        if not files:
            return None
        overlapping = [path for path, first, last in files if first < features.stop and last >= features.start]
        parts = [read_table(path, ["feature", "activation"], _within(features)) for path in overlapping]
        if not parts:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        joined = pa.concat_tables(parts)
        return joined["feature"].to_numpy().astype(np.int64), joined["activation"].to_numpy()

    def activation_of(self, feature: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return row and value of every stored activation of a feature, in the order of rows."""
        within = range(feature, feature + 1)
        for path, first, last in self._activation_files():
            if first <= feature <= last:
                own = read_table(path, ["row", "activation"], _within(within))
                return own["row"].to_numpy(), own["activation"].to_numpy()
        return np.empty(0, np.int64), np.empty(0, np.float32)

    def rows_of(self, document: int) -> pa.Table | None:
        """Return the kept rows of a document, in order; None if the tables keep no rows."""
        if not self.has("rows"):
            return None
        columns = ["row", "token", "context", "position"]
        return read_table(self._file("rows.parquet"), columns, pc.field("document") == document)

    def _file(self, name: str) -> Path:
        if name not in self._checked:
            self._checked[name] = published_file(self.path, self.manifest, name)
        return self._checked[name]

    def _activation_files(self) -> Iterator[tuple[Path, int, int]]:
        for name in sorted(self._files):
            if match := _ACTIVATIONS.fullmatch(name):
                yield self._file(name), int(match[1]), int(match[2])


def _short(value: object) -> str:
    """Return a value on one line, cut at 60 characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:59]}…"


def _within(features: range) -> pc.Expression:
    return (pc.field("feature") >= features.start) & (pc.field("feature") < features.stop)


def feature_slices(table: pa.Table, features: Sequence[int]) -> list[slice]:
    """Return the rows of each feature in a table that is sorted by feature."""
    column = table["feature"].to_numpy()
    starts = np.searchsorted(column, features, side="left")
    stops = np.searchsorted(column, features, side="right")
    return [slice(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True)]
