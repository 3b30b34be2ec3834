"""The examples of every feature in turn, read from a table of any size one row group at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tailrace.storage.errors import ArtifactCorrupt, ArtifactMissing

_COLUMNS = (
    "feature", "kind", "band", "rank", "activation", "position", "window_start", "window_tokens", "window_activations",
)  # fmt: skip


def example_groups(path: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield each feature that has examples, ascending, with its rows of the table ``examples`` as dictionaries.

    Raises ArtifactMissing, or ArtifactCorrupt if features are not in order.
    """
    previous = -1
    for feature, rows in groupby(_rows(path), key=itemgetter("feature")):
        if feature <= previous:
            raise ArtifactCorrupt(f"{path}: is not sorted by feature; make the tables again")
        previous = feature
        yield feature, list(rows)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        raise ArtifactMissing(f"{path}: there is no such table; run pipeline analyze")
    with pq.ParquetFile(path) as file:
        columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=4096, columns=columns):
            yield from batch.to_pylist()
