"""The active pairs of the first rows: written to scratch files in the pass, sorted by feature afterwards.

An external sort in one step. Blocks come in row order and give their pairs by feature, so each run of features has a
scratch file of its own that is already in row order; moving its pairs to their feature sorts it. Memory of sorting: 12
bytes for each of ``SORTED_PAIRS`` pairs. Scratch space: 16 bytes a pair.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from tailrace.analysis.harvest import loops
from tailrace.analysis.harvest.block import EncodedBlock, FeaturePairs
from tailrace.analysis.harvest.one_pass import Plan, Subject
from tailrace.analysis.harvest.rows import RowBlock
from tailrace.analysis.harvest.table import feature_ranges
from tailrace.storage.artifact import is_disk_refusal, make_directory, storage_refused

RECORD: Final = np.dtype([("row", np.uint32), ("feature", np.uint32), ("activation", np.float32)])
LAST_ROW: Final = 2**32 - 1
"""Most rows that a record can number."""
SCRATCH_BYTES: Final = RECORD.itemsize + 4
"""Scratch space of a pair."""
SORTED_PAIRS: Final = 8 << 20
"""Pairs sorted in memory at once, or those of a single feature that has more."""

_FEATURES: Final = np.dtype(np.uint32)
_COUNTS: Final = np.dtype(np.int32)


class FeatureLists(NamedTuple):
    """The active features of consecutive rows."""

    features: NDArray[np.uint32]
    """(pairs,) in row order."""
    offsets: NDArray[np.int64]
    """(rows + 1,) where each row's features begin."""


class KeptPairs:
    """Accumulator of the pairs of the first ``n_rows`` rows, short of a context that does not end there."""

    def __init__(self, d_sae: int, n_rows: int, scratch: _ScratchFiles) -> None:
        self._limit = min(n_rows, LAST_ROW)
        self._scratch = [scratch]
        self.n_rows = 0
        """Rows whose pairs are kept."""
        self.n_pairs = np.zeros(d_sae, np.int64)
        """(d_sae,) pairs kept of each feature."""

    @classmethod
    def start(cls, subject: Subject, plan: Plan, first_unit: int) -> Self:  # noqa: ARG003 - an accumulator's signature
        """Return an empty accumulator."""
        return cls(subject.coder.d_sae, plan.activation_rows, _ScratchFiles(subject.scratch))

    def add(self, block: EncodedBlock) -> None:
        """Append a block's pairs. Raises StorageFull if the disk refuses."""
        n_rows = rows_within(block.rows, self._limit)
        if n_rows == 0:
            return
        scratch, pairs = self._scratch[0], block.pairs
        scratch.append("features", pairs.features[: pairs.offsets[n_rows]].astype(_FEATURES))
        scratch.append("counts", np.diff(pairs.offsets[: n_rows + 1]).astype(_COUNTS))
        kept = _of_first_rows(block.by_feature, n_rows, block.rows.n_rows)
        records = np.empty(len(kept.row), RECORD)
        records["row"] = block.rows.first_row + kept.row
        records["feature"] = kept.feature
        records["activation"] = kept.value
        for features in feature_ranges(len(self.n_pairs)):
            own = records[kept.offsets[features.start] : kept.offsets[features.stop]]
            if len(own):
                scratch.append(_name(features), own)
        self.n_pairs += np.diff(kept.offsets)
        self.n_rows += n_rows

    def end_unit(self) -> None:
        """Do nothing: pairs do not depend on where units end."""

    def merge(self, later: Self) -> None:
        """Append the pairs of rows that come after all rows counted here."""
        self._scratch += later._scratch
        self.n_pairs += later.n_pairs
        self.n_rows += later.n_rows

    def sorted_pairs(self, features: range) -> Iterator[FeaturePairs]:
        """Yield the pairs of one of ``feature_ranges``, as many features at a time as ``SORTED_PAIRS`` allows."""
        ends = np.cumsum(self.n_pairs[features.start : features.stop])
        start = 0
        while start < len(features):
            before = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + SORTED_PAIRS, side="right")))
            yield self._sort(features, range(features.start + start, features.start + stop))
            start = stop

    def _sort(self, stored: range, features: range) -> FeaturePairs:
        offsets = np.concatenate([[0], np.cumsum(self.n_pairs[features.start : features.stop])]).astype(np.int64)
        rows, values = np.empty(offsets[-1], np.int64), np.empty(offsets[-1], np.float32)
        cursor = offsets[:-1].copy()
        for scratch in self._scratch:
            records = scratch.read(_name(stored), RECORD)
            columns = (records["feature"], records["row"], records["activation"])
            loops.sort_by_feature(*columns, features.start, features.stop, cursor, rows, values)
        assert np.array_equal(cursor, offsets[1:]), "every pair that was counted is there"
        return FeaturePairs(features.start, offsets, rows, values)

    def row_counts(self) -> NDArray[np.int32]:
        """Return (n_rows,) how many features are active on each row kept."""
        return np.concatenate([scratch.read("counts", _COUNTS) for scratch in self._scratch])

    def feature_lists(self, n_pairs: int, n_rows: int | None = None) -> Iterator[FeatureLists]:
        """Yield the features of the first ``n_rows`` rows kept, in pieces of ``n_pairs`` pairs or one longer row."""
        left = self.n_rows if n_rows is None else n_rows
        for scratch in self._scratch:
            counts = scratch.read("counts", _COUNTS)[:left]
            features = scratch.read("features", _FEATURES)
            offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
            start = 0
            while start < len(counts):
                stop = max(start + 1, int(np.searchsorted(offsets, offsets[start] + n_pairs, side="right")) - 1)
                piece = features[offsets[start] : offsets[stop]]
                yield FeatureLists(piece, offsets[start : stop + 1] - offsets[start])
                start = stop
            left -= len(counts)


class KeptRows:
    """Accumulator of the context and position of each row of ``KeptPairs``. Memory: 16 bytes a row."""

    def __init__(self, n_rows: int) -> None:
        self._limit = min(n_rows, LAST_ROW)
        self._contexts: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        self._positions: list[NDArray[np.int64]] = [np.empty(0, np.int64)]

    @classmethod
    def start(cls, subject: Subject, plan: Plan, first_unit: int) -> Self:  # noqa: ARG003 - an accumulator's signature
        """Return an empty accumulator."""
        return cls(plan.activation_rows)

    def add(self, block: EncodedBlock) -> None:
        """Append a block's rows."""
        n_rows = rows_within(block.rows, self._limit)
        self._contexts.append(block.rows.context[:n_rows].copy())
        self._positions.append(block.rows.position[:n_rows].copy())

    def end_unit(self) -> None:
        """Do nothing: rows do not depend on where units end."""

    def merge(self, later: Self) -> None:
        """Append rows that come after all rows counted here."""
        self._contexts += later._contexts
        self._positions += later._positions

    @property
    def contexts(self) -> NDArray[np.int64]:
        """(rows,) context ids."""
        return _joined(self._contexts)

    @property
    def positions(self) -> NDArray[np.int64]:
        """(rows,) positions in their contexts."""
        return _joined(self._positions)


def _joined(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Join parts in place, so that the next call need not."""
    if len(parts) > 1:
        parts[:] = [np.concatenate(parts)]
    return parts[0]


def rows_within(rows: RowBlock, limit: int) -> int:
    """Return how many rows of a block belong to contexts that lie within the first ``limit`` rows."""
    n_rows = limit - rows.first_row
    if n_rows >= rows.n_rows:
        return rows.n_rows
    return int(np.searchsorted(rows.context, rows.context[n_rows], side="left")) if n_rows > 0 else 0


def _of_first_rows(pairs: FeaturePairs, n_rows: int, of_rows: int) -> FeaturePairs:
    if n_rows == of_rows:
        return pairs
    kept = pairs.row < n_rows
    n_before = np.concatenate([[0], np.cumsum(kept)])
    return FeaturePairs(pairs.first_feature, n_before[pairs.offsets], pairs.row[kept], pairs.value[kept])


def _name(features: range) -> str:
    return f"pairs-{features.start:06}"


class _ScratchFiles:
    """Files of items, by name, that only grow; two objects never share a file. In memory where no folder is given.

    After pickling, the same files are read, as long as their folder exists.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else folder / uuid.uuid4().hex
        self._in_memory: dict[str, list[NDArray[Any]]] = {}

    def append(self, name: str, items: NDArray[Any]) -> None:
        """Add items at the end of ``name``. Raises StorageFull if the disk refuses."""
        if self._folder is None:
            self._in_memory.setdefault(name, []).append(items.copy())
            return
        if not len(items):
            return
        path = self._folder / name
        make_directory(self._folder)
        try:
            # opened anew for every block, some seconds apart, so that no file stays open when the pass ends
            with path.open("ab") as file:
                file.write(np.ascontiguousarray(items).view(np.uint8).data)
        except OSError as error:
            if is_disk_refusal(error):
                raise storage_refused(error, path) from error
            raise

    def read(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return all items of ``name``, read-only; none if nothing was added."""
        if self._folder is None:
            parts = self._in_memory.get(name, [])
            items = np.concatenate(parts) if parts else np.empty(0, dtype)
        elif (path := self._folder / name).exists() and path.stat().st_size:
            items = np.asarray(np.memmap(path, dtype, mode="r"))
        else:
            items = np.empty(0, dtype)
        items.flags.writeable = False  # as a file mapping is, so that loops are compiled for one kind of array
        return items
