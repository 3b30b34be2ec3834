"""Rows of a split as blocks of whole contexts, in token order: what one pass over a cache reads.

A storage unit may begin and end in mid-context, so the edges of units and blocks differ: **a context belongs to the
unit in which the next context begins** (the last one, to the last unit). The rows of a unit's last context are carried
into the next unit even where they happen to be complete, because nothing in the unit says that they are. The blocks of
a unit are a function of the split and the settings alone, so units read by different workers give the blocks of one
long pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tailrace.storage.activation_cache import ActivationCache
from tailrace.storage.shuffle import philox, random_permutation


class TokenOrderSplit(Protocol):
    """The part of a cache's split that analysis reads; ``storage`` implements it."""

    @property
    def n_rows(self) -> int:
        """Rows of the split."""
        ...

    @property
    def n_units(self) -> int:
        """Units of the split."""
        ...

    def first_row(self, u: int, /) -> int:
        """Return the index in token order of the first row of unit ``u``."""
        ...

    def read_unit(self, u: int, keys: Sequence[str], /) -> dict[str, NDArray[np.generic]]:
        """Return the rows of unit ``u`` sorted by (context, position)."""
        ...

    def dtype(self, key: str, /) -> str:
        """Return the stored dtype of an array, e.g. ``bfloat16`` for an array read as uint16."""
        ...

    def context_tokens(self, context_ids: NDArray[np.integer], /) -> NDArray[np.int32]:
        """Return the token ids (contexts, positions) of contexts."""
        ...

    def context_documents(self, context_ids: NDArray[np.integer], /) -> NDArray[np.uint32]:
        """Return the document ids (contexts, positions) of contexts."""
        ...


class SampledSplit:
    """Contexts of a split with all their rows, drawn uniformly by ``seed``: as many as fit into ``n_rows``, at least 1.

    Rows are numbered among themselves; ``rows`` are their numbers in the split. Units without a drawn row are left out.
    """

    def __init__(self, split: TokenOrderSplit, n_rows: int, seed: int) -> None:
        starts = _context_starts(split)
        sizes = np.diff(starts, append=split.n_rows)
        order = random_permutation(philox(seed, "analyze/contexts"), len(starts))
        n_drawn = max(1, int(np.searchsorted(np.cumsum(sizes[order]), n_rows, side="right")))
        drawn = np.sort(order[:n_drawn])
        before = np.cumsum(sizes[drawn]) - sizes[drawn]
        self.rows: NDArray[np.int64] = np.arange(sizes[drawn].sum()) + np.repeat(starts[drawn] - before, sizes[drawn])
        """(n_rows,) the number in the split of each row."""
        self.n_contexts = n_drawn
        """Contexts that were drawn."""
        self.of_contexts = len(starts)
        """Contexts of the split that have rows."""
        self.split = split
        self._units = np.unique(units_of(split, self.rows))
        self._first_rows = np.searchsorted(self.rows, [split.first_row(unit) for unit in self._units])

    @property
    def n_rows(self) -> int:
        """Rows that were drawn."""
        return len(self.rows)

    @property
    def n_units(self) -> int:
        """Units with a drawn row."""
        return len(self._units)

    def first_row(self, u: int) -> int:
        """Return the index of the first row of a unit."""
        return int(self._first_rows[u])

    def read_unit(self, u: int, keys: Sequence[str]) -> dict[str, NDArray[np.generic]]:
        """Return the drawn rows of a unit, sorted by (context, position)."""
        unit = int(self._units[u])
        stop = self.first_row(u + 1) if u + 1 < self.n_units else self.n_rows
        drawn = self.rows[self.first_row(u) : stop] - self.split.first_row(unit)
        return {key: array[drawn] for key, array in self.split.read_unit(unit, keys).items()}

    def dtype(self, key: str) -> str:
        """Return the stored dtype of an array."""
        return self.split.dtype(key)

    def context_tokens(self, context_ids: NDArray[np.integer]) -> NDArray[np.int32]:
        """Return the token ids (contexts, positions) of contexts."""
        return self.split.context_tokens(context_ids)

    def context_documents(self, context_ids: NDArray[np.integer]) -> NDArray[np.uint32]:
        """Return the document ids (contexts, positions) of contexts."""
        return self.split.context_documents(context_ids)


def _context_starts(split: TokenOrderSplit) -> NDArray[np.int64]:
    """Return (contexts,) the index in token order of each context's first row."""
    starts, last = [], -1
    for unit in range(split.n_units):
        contexts = split.read_unit(unit, ["context"])["context"].astype(np.int64)
        starts.append(split.first_row(unit) + np.flatnonzero(np.diff(contexts, prepend=last)))
        last = contexts[-1]
    return np.concatenate(starts)


def in_split(split: TokenOrderSplit, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the numbers that rows have in the split itself, whether all of it is read or some contexts."""
    return split.rows[rows] if isinstance(split, SampledSplit) else rows


def units_of(split: TokenOrderSplit, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the unit of the split itself that each of ``rows`` lies in."""
    of = split.split if isinstance(split, SampledSplit) else split
    starts = [of.first_row(unit) for unit in range(of.n_units)]
    return np.searchsorted(starts, in_split(split, rows), side="right") - 1


class RowBlock(NamedTuple):
    """Consecutive rows of whole contexts. ``arrays`` are those asked for, in the dtype that storage returns."""

    unit: int
    """The unit that the block's contexts belong to."""
    first_row: int
    """Index in token order of the block's first row."""
    context: NDArray[np.int64]
    """(rows,) context id, ascending."""
    position: NDArray[np.int64]
    """(rows,) position in the context; ascending within a context, with gaps where rows were left out."""
    arrays: dict[str, NDArray[np.generic]]

    @property
    def n_rows(self) -> int:
        """Rows of the block."""
        return len(self.context)


class _RowRun(NamedTuple):
    """A run of rows in token order."""

    first_row: int
    arrays: dict[str, NDArray[np.generic]]

    @property
    def n_rows(self) -> int:
        return len(self.arrays["context"])

    def cut(self, start: int, stop: int) -> _RowRun:
        return _RowRun(self.first_row + start, {key: array[start:stop] for key, array in self.arrays.items()})

    def joined(self, later: _RowRun) -> _RowRun:
        arrays = {key: np.concatenate([array, later.arrays[key]]) for key, array in self.arrays.items()}
        return _RowRun(self.first_row, arrays)


def iter_blocks(
    split: TokenOrderSplit,
    keys: Sequence[str],
    *,
    block_rows: int,
    n_rows: int | None = None,
    units: range | None = None,
) -> Iterator[RowBlock]:
    """Yield the blocks of ``units`` (default: all), each at most ``block_rows`` rows or a single longer context.

    Only the first ``n_rows`` rows of the split are read, where given. A worker that begins at unit u reads the end
    of unit u - 1 too. Memory: one unit of the arrays asked for.
    """
    assert block_rows >= 1
    n_rows = min(n_rows or split.n_rows, split.n_rows)
    units = units if units is not None else range(split.n_units)
    wanted = [*dict.fromkeys([*keys, "context", "position"])]
    carry = _load_carry(split, wanted, units.start, n_rows) if len(units) else None
    for unit in units:
        rows = _load(split, unit, wanted, n_rows)
        is_last = unit + 1 == split.n_units or split.first_row(unit + 1) >= n_rows
        if rows is None:
            return
        kept = rows.n_rows if is_last else _last_context_start(rows)
        if kept == 0 and carry is not None and _is_same_context(carry, rows):
            carry = carry.joined(rows)
            continue
        yield from _cut_blocks(unit, carry, rows.cut(0, kept), keys, block_rows)
        carry = None if is_last else _copied(rows.cut(kept, rows.n_rows))
        del rows  # or it would be in memory while the next unit is read


def _load(split: TokenOrderSplit, unit: int, keys: Sequence[str], n_rows: int) -> _RowRun | None:
    """Return the rows of a unit that are among the first ``n_rows`` of the split, or None."""
    first_row = split.first_row(unit)
    if first_row >= n_rows:
        return None
    rows = _RowRun(first_row, split.read_unit(unit, keys))
    return rows.cut(0, min(rows.n_rows, n_rows - first_row))


def _load_carry(split: TokenOrderSplit, keys: Sequence[str], unit: int, n_rows: int) -> _RowRun | None:
    """Return the last context of the units before ``unit``, which a pass from the start carries into it."""
    carry: _RowRun | None = None
    for earlier in reversed(range(unit)):
        rows = _load(split, earlier, keys, n_rows)
        if rows is None:
            return None
        if carry is not None and not _is_same_context(rows, carry):
            break
        start = _last_context_start(rows)
        tail = rows.cut(start, rows.n_rows)
        carry = tail if carry is None else tail.joined(carry)
        if start > 0:
            break
    return carry


def _copied(rows: _RowRun) -> _RowRun:
    """Copy a few rows out of a unit, so that the unit's memory can go."""
    return _RowRun(rows.first_row, {key: array.copy() for key, array in rows.arrays.items()})


def _last_context_start(rows: _RowRun) -> int:
    contexts = rows.arrays["context"]
    return int(np.searchsorted(contexts, contexts[-1], side="left"))


def _is_same_context(earlier: _RowRun, later: _RowRun) -> bool:
    return bool(earlier.arrays["context"][-1] == later.arrays["context"][0])


def _cut_blocks(
    unit: int, carry: _RowRun | None, rows: _RowRun, keys: Sequence[str], block_rows: int
) -> Iterator[RowBlock]:
    """Cut ``carry`` followed by ``rows`` at context edges, copying only the block that holds the carry."""
    pieces = [piece for piece in (carry, rows) if piece is not None and piece.n_rows]
    if not pieces:
        return
    n_carry = pieces[0].n_rows if len(pieces) == 2 else 0
    edges = block_edges(np.concatenate([piece.arrays["context"] for piece in pieces]), block_rows)
    for start, stop in pairwise(edges):
        if start >= n_carry:
            block = pieces[-1].cut(start - n_carry, stop - n_carry)
        elif stop <= n_carry:
            block = pieces[0].cut(start, stop)
        else:
            block = pieces[0].cut(start, n_carry).joined(pieces[1].cut(0, stop - n_carry))
        contexts, positions = (block.arrays[key].astype(np.int64) for key in ("context", "position"))
        yield RowBlock(unit, block.first_row, contexts, positions, {key: block.arrays[key] for key in keys})


def block_edges(contexts: NDArray[np.generic], block_rows: int) -> list[int]:
    """Return the edges of blocks of as many whole contexts as fit into ``block_rows``, at least one context each.

    ``contexts`` (rows,) are ids. The first edge is 0, the last the number of rows.
    """
    starts = np.flatnonzero(np.concatenate([[True], contexts[1:] != contexts[:-1]]))
    ends = np.append(starts[1:], len(contexts))
    edges = [0]
    while edges[-1] < len(contexts):
        first_end = np.searchsorted(ends, edges[-1], side="right")
        last_fitting_end = np.searchsorted(ends, edges[-1] + block_rows, side="right") - 1
        edges.append(int(ends[max(first_end, last_fitting_end)]))
    return edges


def tokens_of(split: TokenOrderSplit, contexts: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return (n, context_length) the token ids of contexts, which may repeat."""
    distinct, index = np.unique(contexts, return_inverse=True)
    return split.context_tokens(distinct)[index]


def tokens_at(split: TokenOrderSplit, contexts: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return (n,) the token id at each position."""
    distinct, index = np.unique(contexts, return_inverse=True)
    return split.context_tokens(distinct)[index, positions]


def documents_at(
    split: TokenOrderSplit, contexts: NDArray[np.int64], positions: NDArray[np.int64]
) -> NDArray[np.uint32]:
    """Return (n,) the id of the document that the token at each position comes from."""
    distinct, index = np.unique(contexts, return_inverse=True)
    return split.context_documents(distinct)[index, positions]


@dataclass(frozen=True)
class ShownRows:
    """Rows of a site in token order, with what tables record of them."""

    split: TokenOrderSplit
    split_name: str
    site: str
    output_mean: NDArray[np.float64]
    """(d_out,) roughly the mean output."""
    vocabulary: Sequence[str]
    """Token id → its text."""
    cache: ActivationCache | None = None
    """The cache that other processes read them from; None for rows in this process only."""


def cached_rows(
    cache: ActivationCache, split_name: str, site: str, n_rows: int | None = None, seed: int = 0
) -> ShownRows:
    """Return the rows of a cache's split, or about ``n_rows`` of them: those of contexts drawn uniformly.

    Raises ArtifactMismatch if the cache has no such split.
    """
    split = cache.split(split_name)
    read = split if n_rows is None or n_rows >= split.n_rows else SampledSplit(split, n_rows, seed)
    return ShownRows(read, split_name, site, split.statistics(site, "out").mean, cache.vocabulary(), cache)
