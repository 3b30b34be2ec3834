"""Writing a cache: a unit is gathered in memory in its final order, written as complete shards, then committed.

A unit counts as written if and only if its commit record exists. The record comes last and covers every array of
the unit at once, so a kill at any moment leaves each unit either complete or absent, and pairs never come apart: every
array of a unit is filled through the same permutation.

Contexts while a cache is being made: committed in blocks, read back when the model runs over them.

Contexts are fixed on disk before any activation is computed, so everything after is a pure function of them.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np

from tailrace.storage.artifact import (
    FileRecord,
    Record,
    canonical_json,
    check_files,
    checksum_bytes,
    make_directory,
    read_bytes,
    sync_directory,
    write_atomically,
)
from tailrace.storage.cache_format import (
    BEGUN,
    CONTEXT_ARRAYS,
    PROVENANCE,
    BlockRecord,
    CacheFormat,
    ShardsRecord,
    UnitRecord,
    block_record_name,
    seal_path,
    split_path,
    superseded_path,
    unit_record_name,
)
from tailrace.storage.compared import refuse_damaged
from tailrace.storage.errors import ArtifactCorrupt, NonFiniteActivation
from tailrace.storage.layout import ArraySpec
from tailrace.storage.memory import aligned_rows
from tailrace.storage.shard import read_rows, write_shard
from tailrace.storage.shuffle import invert, unit_permutation
from tailrace.storage.statistics import SiteStatistics, StatisticsRecord

logger = logging.getLogger(__name__)

_THREADS = 2
_PIECE_ROWS = 2048


class UnitBuffer:
    """The rows of one unit in memory, every array already in the unit's shuffled order. Reused from unit to unit.

    Memory is ``shard_rows`` times the bytes of a row over all arrays.
    """

    def __init__(self, layout: CacheFormat, *, with_provenance: bool = True) -> None:
        self.layout = layout
        self._encodings = layout.encodings()
        self._specs = (*(layout.provenance_specs() if with_provenance else ()), *layout.site_specs())
        self._rows = {spec.name: aligned_rows(layout.shard_rows, spec.width, spec.memory_dtype) for spec in self._specs}
        self._destinations = np.empty(0, np.int64)
        self._pool = ThreadPoolExecutor(_THREADS)
        self.n_rows = 0
        self._n_filled = 0
        self._first: tuple[int, int] | None = None
        self.statistics: dict[str, SiteStatistics] = {}

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    @property
    def is_full(self) -> bool:
        """Whether every row of the unit has been filled."""
        return self._n_filled == self.n_rows

    def begin(self, seed: int, split: str, unit: int, n_rows: int) -> None:
        """Start a unit of ``n_rows`` rows; its permutation depends on (seed, split, unit) alone."""
        self.split, self.unit, self.n_rows, self._n_filled, self._first = split, unit, n_rows, 0, None
        self._destinations = invert(unit_permutation(seed, split, unit, n_rows))
        self.statistics = {key: SiteStatistics(encoding.width) for key, encoding in self._encodings.items()}
        n_padded = min(-(-n_rows // self.layout.chunk_rows) * self.layout.chunk_rows, self.layout.shard_rows)
        for rows in self._rows.values():
            rows[n_rows:n_padded] = 0

    def fill(self, provenance: Mapping[str, np.ndarray], activations: Mapping[str, np.ndarray]) -> None:
        """Add the next rows in token order.

        ``provenance`` holds one array (n,) per name of PROVENANCE; ``activations`` one (n, width) per ``site/side``
        in the encoding's input dtype. Raises NonFiniteActivation naming site, side, context and position.
        """
        n = len(provenance["context"])
        assert self._n_filled + n <= self.n_rows, "more rows than the unit holds"
        if n and self._first is None:
            self._first = (int(provenance["context"][0]), int(provenance["position"][0]))
        destinations = self._destinations[self._n_filled : self._n_filled + n]
        for name in PROVENANCE:
            if name in self._rows:
                self._rows[name][destinations] = provenance[name]
        # pieces are independent and NumPy lets go of the interpreter, so threads share the work; their bounds do not
        # depend on the threads, and their statistics are merged in order
        pieces = [
            (key, start, self._pool.submit(self._fill_piece, key, activations[key][piece], destinations[piece]))
            for key in self._encodings
            for start in range(0, n, _PIECE_ROWS)
            for piece in (slice(start, start + _PIECE_ROWS),)
        ]
        for key, start, piece in pieces:
            statistics, bad = piece.result()
            if bad is not None:
                raise _nonfinite(self.split, key, provenance, start + bad)
            self.statistics[key].merge(statistics)
        self._n_filled += n

    def _fill_piece(self, key: str, rows: np.ndarray, destinations: np.ndarray) -> tuple[SiteStatistics, int | None]:
        """Store rows of one side at their destinations; return statistics and the first row that is not finite."""
        statistics = type(self.statistics[key])(rows.shape[1])
        bad = statistics.add(rows)
        if bad is None:
            for name, stored in self._encodings[key].encode(rows).items():
                self._rows[name][destinations] = stored
        return statistics, bad

    def commit(self, root: Path, generation: int) -> UnitRecord:
        """Write every array's shard, sync, then write the commit record, which is returned."""
        assert self.is_full, "a unit is committed when all its rows are there"
        assert self._first is not None, "a unit has rows"
        group = split_path(root, self.split)
        names = [spec.shard_name(self.unit) for spec in self._specs]

        def write(spec: ArraySpec, name: str) -> FileRecord:
            return write_shard(group / name, self._rows[spec.name], self.n_rows, spec)

        # two at a time: the disk is kept busy while a shard is synced
        pending = [self._pool.submit(write, *pair) for pair in zip(self._specs, names, strict=True)]
        wait(pending, return_when=FIRST_EXCEPTION)
        for shard in pending:
            shard.cancel()
        wait(pending)  # a shard still being written after a failure would leave its temporary file
        written: list[FileRecord] = [shard.result() for shard in pending if not shard.cancelled()]
        sync_shards(group, names)
        record = UnitRecord(
            split=self.split,
            unit=self.unit,
            n_rows=self.n_rows,
            first_context=self._first[0],
            first_position=self._first[1],
            shards=dict(zip(names, written, strict=True)),
            statistics={key: StatisticsRecord(**statistics.as_json()) for key, statistics in self.statistics.items()},
        )
        write_record(root, unit_record_name(generation, self.split, self.unit), record)
        return record


def write_context_block(
    root: Path, layout: CacheFormat, generation: int, split: str, block: int, arrays: Mapping[str, np.ndarray]
) -> None:
    """Write one block of contexts and its record. ``arrays``: tokens, documents, each (n ≤ block, context_length)."""
    group = split_path(root, split)
    n_contexts = len(arrays["tokens"])
    shards = {}
    for spec in layout.context_specs():
        rows = aligned_rows(spec.shard_rows, spec.width, spec.memory_dtype)
        rows[:n_contexts] = arrays[spec.name.removeprefix("contexts/")]
        name = spec.shard_name(block)
        shards[name] = write_shard(group / name, rows, n_contexts, spec)
    sync_shards(group, shards)
    record = BlockRecord(split=split, block=block, n_contexts=n_contexts, shards=shards)
    write_record(root, block_record_name(generation, split, block), record)


def write_record(root: Path, name: str, record: Record) -> None:
    """Write a commit record: from then on its unit or block counts as written."""
    write_sealed(root, name, canonical_json(record.as_json()))


def write_sealed(root: Path, name: str, data: bytes) -> None:
    """Write a file of an unfinished draft that is read back later, after its seal: its checksum in a file of its own.

    A published file is compared with its manifest; until there is one, seals vouch for what a killed process left.
    """
    for path, content in ((seal_path(root, name), checksum_bytes(data).encode()), (root / name, data)):
        make_directory(path.parent)
        write_atomically(path, content)


def read_sealed_file(root: Path, name: str) -> bytes:
    """Return what a file of an unfinished draft holds; raise ArtifactCorrupt if it was not written like that."""
    data, seal = read_bytes(root / name), seal_path(root, name)
    if seal.exists():
        is_whole = read_bytes(seal) == checksum_bytes(data).encode()
    else:
        is_whole = not seal_path(root, BEGUN).exists()  # release 0.1 sealed nothing, which the first file tells
    if not is_whole:
        raise ArtifactCorrupt(f"{root / name}: differs from what was written, by its checksum in {seal}")
    return data


RECHECKED_BYTES = 8 << 30
"""Bytes of finished shards that a continued command reads again, some seconds of it; of more, every n-th unit, the
newest among them. The sizes of all are compared. `pipeline verify` reads everything."""

AnyCommitRecord = TypeVar("AnyCommitRecord", bound=ShardsRecord)


def recall_record(
    root: Path, name: str, kind: type[AnyCommitRecord], group: Path, *, age: int, n_finished: int
) -> AnyCommitRecord | None:
    """Return a commit record of an unfinished draft and see that its shards below ``group`` are as it says.

    None, after a warning, if they or the record are not: they are to be written again. ``age``: how many of all
    ``n_finished`` came after it.
    """
    try:
        record = kind.parse(read_sealed_file(root, name), root / name)
    except ArtifactCorrupt as error:
        problems = [str(error)]
    else:
        n_bytes = n_finished * sum(shard.bytes for shard in record.shards.values())
        is_read = age % max(1, -(-n_bytes // RECHECKED_BYTES)) == 0
        problems = check_files(group, record.shards, largest=None if is_read else 0)
    if problems:
        logger.warning("%s; it is written again", problems[0])
        return None
    return record


def sync_shards(group: Path, shards: Iterable[str]) -> None:
    """Make the names of new shards survive a power cut, before a record vouches for them."""
    for folder in sorted({(group / name).parent for name in shards}):
        sync_directory(folder)


def _nonfinite(split: str, key: str, provenance: Mapping[str, np.ndarray], row: int) -> NonFiniteActivation:
    context, position = int(provenance["context"][row]), int(provenance["position"][row])
    return NonFiniteActivation(
        f"{key}: NaN or infinity in {split} context {context}, position {position} "
        f"(token id {int(provenance['token_id'][row])}, document {int(provenance['document'][row])}). "
        "Finished units are kept. Try --model-dtype float32, or leave this site out"
    )


_BLOCKS_KEPT = 4


class ContextBlocks:
    """The committed contexts of a split, in blocks of ``layout.block_contexts``; only the last may be short.

    ``published``: the files of the generation that this one continues, by name. What is read is compared with the
    records: every row is made from it.
    """

    def __init__(
        self,
        root: Path,
        layout: CacheFormat,
        generation: int,
        split: str,
        published: Mapping[str, FileRecord] = MappingProxyType({}),
    ) -> None:
        self._root, self._layout, self._generation, self._split = root, layout, generation, split
        self._published = published
        self._kept: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()

    def write(self, block: int, tokens: np.ndarray, documents: np.ndarray) -> None:
        """Commit one block: int32 tokens and uint32 documents, (n ≤ block_contexts, context_length)."""
        arrays = {"tokens": tokens, "documents": documents}
        write_context_block(self._root, self._layout, self._generation, self._split, block, arrays)
        self._kept.pop(block, None)

    def check(self, n_blocks: int) -> None:
        """Raise ArtifactCorrupt unless the first blocks are as they were written."""
        for block in range(n_blocks):
            self._committed(block)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and documents of contexts [start, stop), each (stop - start, context_length)."""
        size = self._layout.block_contexts
        blocks = [self._block(block) for block in range(start // size, -(-stop // size))]
        offset = start // size * size
        joined = [
            np.concatenate([block[name] for block in blocks])[start - offset : stop - offset] for name in blocks[0]
        ]
        return joined[0], joined[1]

    def _block(self, block: int) -> dict[str, np.ndarray]:
        if block not in self._kept:
            group, n_contexts = self._committed(block)
            specs = self._layout.context_specs()
            self._kept[block] = {
                name: read_rows(group, spec, block, n_contexts)
                for name, spec in zip(CONTEXT_ARRAYS, specs, strict=True)
            }
            if len(self._kept) > _BLOCKS_KEPT:
                self._kept.popitem(last=False)
        return self._kept[block]

    def _committed(self, block: int) -> tuple[Path, int]:
        """Return the group that holds a block as the newest generation committed it, and its number of contexts."""
        for generation in range(self._generation, -1, -1):
            name = block_record_name(generation, self._split, block)
            if (self._root / name).exists():
                break
        else:
            raise AssertionError(f"block {block} of {self._split} contexts was never committed")
        if (published := self._published.get(name)) is None:
            data = read_sealed_file(self._root, name)
        else:
            refuse_damaged(self._root, name, published)
            data = read_bytes(self._root / name)
        record = BlockRecord.parse(data, self._root / name)
        # a process killed before its commit may have replaced a published block by a longer one
        aside = superseded_path(self._root, self._generation - 1, self._split)
        is_aside = generation < self._generation and all((aside / shard).exists() for shard in record.shards)
        group = aside if is_aside else split_path(self._root, self._split)
        for shard, recorded in record.shards.items():
            refuse_damaged(group, shard, recorded)
        return group, record.n_contexts
