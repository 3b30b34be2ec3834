"""A published cache: its sites, splits, rows by unit, contexts and statistics.

Rows are read here unit by unit and in token order, which is what analysis wants; batches in training order come from
``CacheSplit.stream``.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from tailrace.storage.artifact import REQUEST, SMALL, FileRecord, published_file, read_json
from tailrace.storage.cache_format import (
    PROVENANCE,
    VOCABULARY,
    BlockRecord,
    CacheFormat,
    CacheManifest,
    CommitRecord,
    Site,
    SplitRecord,
    UnitRecord,
    manifest_name,
    pieces,
    split_path,
    superseded_path,
)
from tailrace.storage.compared import refuse_damaged
from tailrace.storage.display import card, table
from tailrace.storage.errors import ArtifactCorrupt, ArtifactMismatch, ArtifactMissing, SettingsError
from tailrace.storage.formats import LEFT_OUT
from tailrace.storage.generations import PRUNED, CacheAt, CachePath, Generations, Pin, read_pruned
from tailrace.storage.layout import ArraySpec, Side
from tailrace.storage.names import NO_FILE, folder_problem, home_path, inside, matching
from tailrace.storage.orders import Read
from tailrace.storage.parsing import parse_json, read_regular
from tailrace.storage.shard import read_rows
from tailrace.storage.shuffle import philox
from tailrace.storage.statistics import SiteStatistics
from tailrace.storage.stream import RowStream, StreamSource

if TYPE_CHECKING:  # a training run reads no tables
    import pyarrow as pa

logger = logging.getLogger(__name__)

ONE_IN = 64
"""Of so many large shards that are read in token order, one is compared with its record: reading it again and its
checksum take longer than reading it once."""


def open_cache(path: CachePath | str, generation: int | None = None) -> ActivationCache:
    """Open a published cache at a generation, by default at its newest; it is not pruned as long as it is open.

    Raises ArtifactMissing, ArtifactIncomplete, ArtifactCorrupt, or ArtifactMismatch for any other artifact.
    """
    if isinstance(path, CacheAt):
        generation, path = path.generation, path.path
    if not (generation is None or isinstance(generation, int)):
        raise SettingsError(f"generation: wanted a whole number, got {generation!r}")
    root = home_path(path)
    while True:
        newest = CacheManifest.read(root)
        number = newest.generation if generation is None else generation
        # a manifest beyond the newest belongs to a growth that was never published
        if not 0 <= number <= newest.generation:
            raise _unknown_generation(root, number, "has no generation")
        pin = Pin.of(root, number)
        oldest = read_pruned(root).oldest
        if number >= oldest:
            break
        if generation is not None:
            raise _unknown_generation(root, number, "was pruned: generation")
        if CacheManifest.read(root).generation < oldest:
            raise ArtifactCorrupt(
                f"{root / PRUNED}: says that generation {oldest} is the oldest, and the newest is {number}; restore it"
            )
        # another process added a generation and pruned the one before it meanwhile
    manifest = newest
    if number < newest.generation:
        if pin is None:
            name = root / manifest_name(number)
            raise ArtifactCorrupt(f"{name}: is missing; restore it, or open generation {newest.generation}")
        manifest = CacheManifest.read_file(root / manifest_name(number))
    _check_names(root, manifest)
    return ActivationCache(root, manifest, pin)


def open_alone(root: Path, generation: int) -> ActivationCache:
    """Return a cache as one generation's own manifest has it, whatever became of the newest: to see what is damaged.

    Raises ArtifactCorrupt.
    """
    pin = Pin.of(root, generation)
    manifest = CacheManifest.read_file(root / manifest_name(generation))
    _check_names(root, manifest)
    return ActivationCache(root, manifest, pin)


def _unknown_generation(root: Path, number: int, problem: str) -> ArtifactMissing:
    lines = "".join(f"\n  {line}" for line in Generations(root).lines())
    return ArtifactMissing(f"{root}: {problem} {number}; read one of those that are kept:{lines}")


def reopen_cache(path: CachePath, output: Path) -> ActivationCache:
    """Open a cache at the generation that the artifact or draft at ``output`` was begun with, else at its newest.

    ``output`` may be a folder of such. So a cache that has grown strands no unfinished run; a generation that ``path``
    names is opened whatever was begun. The errors are those of ``open_cache``.
    """
    cache = open_cache(path)
    if isinstance(path, CacheAt):
        return cache
    for request in (output / REQUEST, *matching(output, f"*/{REQUEST}")):
        with suppress(*NO_FILE, ValueError):
            begun = _generation_in(parse_json(read_regular(request)), cache.cache_id)
            if begun is not None and begun < cache.generation:
                newest = cache.generation
                logger.warning("%s: generation %d of 0 to %d is read: %s began with it", path, begun, newest, output)
                return open_cache(path, begun)
    return cache


def _generation_in(request: Any, cache_id: str) -> int | None:
    """Return the generation of a cache that a request names, wherever it does."""
    if isinstance(request, dict):
        if request.get("cache_id") == cache_id and isinstance(request.get("generation"), int):
            return int(request["generation"])
        return next((at for part in request.values() if (at := _generation_in(part, cache_id)) is not None), None)
    return None


def _check_names(root: Path, manifest: CacheManifest) -> None:
    """Raise ArtifactCorrupt if the folder of a split or site could lie outside the cache."""
    for name in (*manifest.splits, *(site.name for site in manifest.format.sites)):
        if (problem := folder_problem(name)) is not None:
            raise ArtifactCorrupt(
                f"{root}: its manifest names {name!r} as a split or site, which {problem}; restore it, or make the "
                "cache again"
            )


@dataclass(frozen=True, repr=False)
class ActivationCache:
    """A published activation cache at one generation."""

    path: Path
    manifest: CacheManifest
    pin: Pin | None = field(default=None, compare=False)
    """What keeps the generation from being pruned while this object lives."""

    @property
    def cache_id(self) -> str:
        """Identity of the cache, from its request; independent of its path."""
        return self.manifest.cache_id

    @property
    def generation(self) -> int:
        """0 when first published; one more each time the cache was extended or widened."""
        return self.manifest.generation

    @property
    def seed(self) -> int:
        """The seed of the shuffle inside units, and the default seed of epochs."""
        return self.manifest.seed

    @property
    def layout(self) -> CacheFormat:
        """How the arrays lie on disk."""
        return self.manifest.format

    @cached_property
    def sites(self) -> dict[str, Site]:
        """The cached sites by name."""
        return {site.name: site for site in self.layout.sites}

    @property
    def reference(self) -> dict[str, Any]:
        """What an artifact made from this cache records of it."""
        return {"cache_id": self.cache_id, "generation": self.generation, "digest": self.manifest.digest}

    @property
    def kept_columns(self) -> tuple[str, ...]:
        """Columns of the dataset that were kept for every document; ``CacheSplit.documents`` has them."""
        kept = self.manifest.request.get("keep_columns")
        return tuple(kept.split(",")) if kept else ()

    def split(self, name: str) -> CacheSplit:
        """Return the rows of ``train`` or ``heldout``; raise ArtifactMismatch if the cache has no such rows."""
        if name not in self.manifest.splits:
            raise ArtifactMismatch(
                f"{self.path}: has no {name} rows, only {', '.join(sorted(self.manifest.splits))}; "
                "use another split, or make the cache again with --holdout"
            )
        return CacheSplit(self, name)

    def vocabulary(self) -> list[str]:
        """Return the string of every token id."""
        return list(read_json(published_file(self.path, self.manifest, VOCABULARY, whole=True))["tokens"])

    def close(self) -> None:
        """Let the generation be pruned, while this object is still there; what it reads may be gone from now on."""
        if self.pin is not None:
            self.pin.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        rows = "".join(f", {name}={split.n_rows:,} rows" for name, split in self.manifest.splits.items())
        return f"ActivationCache({str(self.path)!r}, sites={list(self.sites)}{rows})"

    def _repr_html_(self) -> str:
        facts = {"model": self.manifest.model.get("name"), "context": f"{self.layout.context_length} tokens"}
        facts |= {f"{name} rows": f"{split.n_rows:,}" for name, split in self.manifest.splits.items()}
        sites = [
            (site.name, site.hook_in, site.hook_out, f"{site.d_in} → {site.d_out}", site.dtype)
            for site in self.sites.values()
        ]
        listed = table(("site", "input", "output", "widths", "stored as"), sites)
        return card("Activation cache", facts, listed, note=self.path)


@dataclass(frozen=True, repr=False)
class CacheSplit:
    """The training or the held-out rows of a cache."""

    cache: ActivationCache
    name: str

    def __repr__(self) -> str:
        return f"CacheSplit({str(self.cache.path)!r}, {self.name!r}, {self.n_rows:,} rows)"

    @property
    def root(self) -> Path:
        """The cache's directory."""
        return self.cache.path

    @property
    def identity(self) -> dict[str, Any]:
        """What a copy of this split's order records of the cache."""
        return self.cache.reference

    @property
    def _record(self) -> SplitRecord:
        return self.cache.manifest.splits[self.name]

    @property
    def layout(self) -> CacheFormat:
        """How the arrays lie on disk."""
        return self.cache.layout

    @property
    def n_rows(self) -> int:
        """Rows in this split."""
        return self._record.n_rows

    @property
    def n_contexts(self) -> int:
        """Contexts in this split; their rows may not all be stored."""
        return self._record.n_contexts

    @property
    def bucket_rows(self) -> int:
        """Rows that are shuffled together in memory when an epoch is gathered."""
        return self._record.bucket_rows

    @property
    def unit_rows(self) -> list[int]:
        """Rows of each unit."""
        return pieces(self.n_rows, self.layout.shard_rows)

    @property
    def n_units(self) -> int:
        """Units in this split."""
        return len(self.unit_rows)

    def first_row(self, unit: int) -> int:
        """Return the index, in token order, of a unit's first row."""
        return unit * self.layout.shard_rows

    def dtype(self, key: str) -> str:
        """Return the dtype in which ``key`` is served: bfloat16 comes as uint16 bits, int8 already as float32."""
        if key in PROVENANCE:
            return PROVENANCE[key]
        dtype = self.cache.sites[self.check_keys([key])[0].split("/")[0]].dtype
        return "float32" if dtype == "int8" else dtype

    def width(self, key: str) -> int | None:
        """Return the numbers per row of ``key``, None for provenance."""
        return None if key in PROVENANCE else self.layout.encodings()[self.check_keys([key])[0]].width

    def check_keys(self, keys: Sequence[str]) -> list[str]:
        """Return keys with ``site/out`` of an SAE site as ``site/in``; raise SettingsError for unknown ones."""
        stored = self.layout.encodings()
        resolved, problems = [], []
        for key in keys:
            site = self.cache.sites.get(key.split("/")[0])
            if key in PROVENANCE or key in stored:
                resolved.append(key)
            elif site is not None and key == f"{site.name}/out":
                resolved.append(f"{site.name}/in")
            else:
                problems.append(key)
        if problems:
            raise SettingsError(
                f"{self.cache.path}: no array {', '.join(map(repr, problems))}; "
                f"there are {', '.join([*stored, *PROVENANCE])}"
            )
        return resolved

    def read_shard(self, spec: ArraySpec, unit: int, read: Callable[[Path], Read]) -> Read:
        """Return ``read(group)`` for the Zarr group that holds a shard as it was at this generation.

        ``read`` is called again if an extension moved the shard meanwhile. Raises what it raises.
        """
        n_rows = self.n_contexts if spec.name.startswith("contexts/") else self.n_rows
        if (unit + 1) * spec.shard_rows <= n_rows:
            return read(split_path(self.cache.path, self.name))  # only a short last shard is ever replaced
        return read_settled(partial(self.group_of, spec.shard_name(unit)), read)

    def group_of(self, shard: str) -> Path:
        """Return the Zarr group that holds a shard file, by its path there, as it was at this generation.

        A short last shard that a later generation replaced lies in the ``superseded`` group of the last generation
        that had it. An extension may replace it the moment this returns: read through ``read_settled``.
        """
        generation = self.cache.generation
        while True:
            group = superseded_path(self.cache.path, generation, self.name)
            if (group / shard).exists():
                return group
            generation += 1
            if not (self.cache.path / manifest_name(generation)).exists():
                break
        # a pin keeps this from happening; where it reached no other machine, nothing of a later generation is read
        if read_pruned(self.cache.path).oldest > self.cache.generation:
            raise ArtifactMissing(f"{self.cache.path}: generation {self.cache.generation} was pruned while it was read")
        return split_path(self.cache.path, self.name)

    def source(self, key: str) -> StreamSource:
        """Return the arrays behind a key, as streams read them."""
        if key in PROVENANCE:
            spec = next(spec for spec in self.layout.provenance_specs() if spec.name == key)
            return StreamSource(key, None, (spec,))
        encoding = self.layout.encodings()[key]
        specs = encoding.specs(self.layout.shard_rows, self.layout.chunk_rows, self.layout.compression)
        return StreamSource(key, encoding, specs)

    def read_unit(self, unit: int, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the rows of one unit in token order: sorted by (context, position).

        Arrays are (rows, width) for activations (uint16 for bfloat16, float32 for int8) and (rows,) for provenance.
        """
        resolved, shards = self.check_keys(keys), self._shards_of_unit(unit)
        wanted = {"context", "position", *resolved} & PROVENANCE.keys()
        provenance = {name: self._read_stored(unit, name, shards) for name in wanted}
        order = np.lexsort((provenance["position"], provenance["context"]))
        rows = {}
        for key, name in zip(keys, resolved, strict=True):
            stored = provenance[name] if name in PROVENANCE else self._read_stored(unit, name, shards)
            rows[key] = stored[order]
        return rows

    def _read_stored(self, unit: int, key: str, shards: Mapping[str, FileRecord]) -> np.ndarray:
        source, n_rows = self.source(key), self.unit_rows[unit]
        return source.decode({spec.name: self._read_rows(spec, unit, n_rows, shards) for spec in source.specs})

    def _read_rows(self, spec: ArraySpec, unit: int, n_rows: int, shards: Mapping[str, FileRecord]) -> np.ndarray:
        """Return a shard's rows; of large shards one in ``ONE_IN``, drawn anew, is compared with its record."""
        is_drawn = random.randrange(ONE_IN) == 0
        self._compare(spec, unit, shards, None if is_drawn else SMALL)
        return self.read_shard(spec, unit, lambda group: read_rows(group, spec, unit, n_rows))

    def _compare(self, spec: ArraySpec, unit: int, shards: Mapping[str, FileRecord], largest: int | None) -> None:
        name = spec.shard_name(unit)
        if (recorded := shards.get(name)) is None:
            raise ArtifactCorrupt(f"{self.root}: no commit record of {self.name} lists {name}; restore the records")
        self.read_shard(spec, unit, lambda group: refuse_damaged(group, name, recorded, largest=largest))

    def _shards_of_unit(self, unit: int) -> dict[str, FileRecord]:
        records = [UnitRecord.read_file(self._file(name)) for name in self._record.unit_records[unit]]
        return {name: file for record in records for name, file in record.shards.items()}

    def compare_sample(self, specs: Sequence[ArraySpec], seed: int, epoch: int) -> None:
        """Compare shards of arrays with their records: all if they are few and small, else one drawn for the epoch.

        Raises ArtifactCorrupt.
        """
        generator = np.random.Generator(philox(seed, f"{self.name}/compared/{epoch}"))
        chosen = [(spec, unit) for unit in range(self.n_units) for spec in specs]
        if len(chosen) > ONE_IN or sum(spec.row_bytes for spec in specs) * self.n_rows > SMALL:
            chosen = [chosen[generator.integers(len(chosen))]]
        shards: dict[str, FileRecord] = {}
        for spec, unit in chosen:
            if spec.shard_name(unit) not in shards:
                shards = self._shards_of_unit(unit)
            self._compare(spec, unit, shards, None)

    def documents(self) -> pa.Table:
        """Return every document and what the dataset says of it in the columns that were kept, in the order read.

        A column whose values in all splits are of one type has it, others hold texts: ``tailrace.storage.tables``'s
        ``schema_of``. Raises ArtifactMismatch if no columns were kept.
        """
        from tailrace.storage.tables import schema_of, table_of

        kept = self.cache.kept_columns
        if not kept:
            raise ArtifactMismatch(
                f"{self.root}: keeps no columns of its dataset; make a cache with --keep-columns, such as id,source"
            )
        of_all = (row for name in self.cache.manifest.splits for row in self.cache.split(name)._read_documents())
        return table_of(self._read_documents(), schema_of(of_all, ("document", *kept)))

    def _read_documents(self) -> Iterator[dict[str, Any]]:
        for name in self._record.documents:
            with self._file(name).open(encoding="utf-8") as lines:
                yield from map(parse_json, lines)

    def context_tokens(self, contexts: np.ndarray) -> np.ndarray:
        """Return int32 (n, context_length): the token ids of contexts."""
        return self._read_contexts("contexts/tokens", contexts)

    def context_documents(self, contexts: np.ndarray) -> np.ndarray:
        """Return uint32 (n, context_length): the document of every token of contexts."""
        return self.marked_documents(contexts) & ~LEFT_OUT

    def marked_documents(self, contexts: np.ndarray) -> np.ndarray:
        """Return ``context_documents`` as stored: with LEFT_OUT where a message's role gives no rows."""
        return self._read_contexts("contexts/documents", contexts)

    def _read_contexts(self, name: str, contexts: np.ndarray) -> np.ndarray:
        spec = next(spec for spec in self.layout.context_specs() if spec.name == name)
        wanted = np.asarray(contexts, np.int64)
        values = np.empty((len(wanted), self.layout.context_length), spec.memory_dtype)
        sizes = pieces(self.n_contexts, spec.shard_rows)
        for block in np.unique(wanted // spec.shard_rows).tolist():
            record = BlockRecord.read_file(self._file(self._record.block_records[block]))
            rows = self._read_rows(spec, block, sizes[block], record.shards)
            inside = wanted // spec.shard_rows == block
            values[inside] = rows[wanted[inside] - block * spec.shard_rows]
        return values

    def statistics(self, site: str, side: Side) -> SiteStatistics:
        """Return the statistics of one side of a site over this split, merged from its units in order."""
        (key,) = self.check_keys([f"{site}/{side}"])
        return self.merged_statistics([key])[key]

    def merged_statistics(self, keys: Sequence[str]) -> dict[str, SiteStatistics]:
        """Return the statistics of several stored ``site/side``, from one pass over the commit records."""
        merged = {key: SiteStatistics(self.layout.encodings()[key].width) for key in keys}
        for record in self.unit_records():
            for key in merged.keys() & record.statistics.keys():
                merged[key].merge(SiteStatistics.of(record.statistics[key]))
        return merged

    def output_statistics(self) -> dict[str, SiteStatistics]:
        """Return the statistics of every site's output, by site, from one pass over the commit records."""
        keys = {site: self.check_keys([f"{site}/out"])[0] for site in self.cache.sites}
        merged = self.merged_statistics(list(keys.values()))
        return {site: merged[key] for site, key in keys.items()}

    def unit_records(self) -> Iterator[UnitRecord]:
        """Yield the commit records of this split's units, in unit order; a widened unit has several."""
        return (UnitRecord.read_file(self._file(name)) for names in self._record.unit_records for name in names)

    def first_contexts(self) -> list[int]:
        """Return the context of each unit's first row, in unit order; a context may span two units."""
        return [UnitRecord.read_file(self._file(names[0])).first_context for names in self._record.unit_records]

    def block_records(self) -> Iterator[BlockRecord]:
        """Yield the commit records of this split's blocks of contexts."""
        return (BlockRecord.read_file(self._file(name)) for name in self._record.block_records)

    def readable_records(self) -> Iterator[CommitRecord]:
        """Yield the commit records of units and blocks, but for those that are damaged."""
        units = [name for names in self._record.unit_records for name in names]
        kinds: list[tuple[type[CommitRecord], list[str]]] = [
            (UnitRecord, units),
            (BlockRecord, self._record.block_records),
        ]
        for kind, names in kinds:
            for name in names:
                with suppress(ArtifactCorrupt):
                    yield kind.read_file(self._file(name))

    def _file(self, record: str) -> Path:
        if not self.cache.manifest.files:  # a generation that is being published
            return inside(self.root, record)
        return published_file(self.root, self.cache.manifest, record, whole=True)

    def stream(
        self,
        keys: Sequence[str],
        *,
        batch_rows: int,
        seed: int | None = None,
        epoch: int = 0,
        step: int = 0,
        n_epochs: int | None = None,
        n_rows: int | None = None,
        drop_last: bool = False,
        n_threads: int = 4,
        order: str = "auto",
    ) -> RowStream:
        """Return batches in uniformly shuffled order, from (epoch, step) on.

        ``n_rows`` restricts every epoch to the same uniform sample of rows. ``order``: ``gathered`` reads the units,
        ``materialised`` an epoch written by ``pipeline shuffle``, ``auto`` the latter where it exists.
        """
        return RowStream(
            self,
            self.check_keys(keys),
            names=list(keys),
            batch_rows=batch_rows,
            seed=self.cache.seed if seed is None else seed,
            epoch=epoch,
            step=step,
            n_epochs=n_epochs,
            n_rows=n_rows,
            drop_last=drop_last,
            n_threads=n_threads,
            order=order,
        )


def read_settled(find: Callable[[], Path], read: Callable[[Path], Read]) -> Read:
    """Return ``read(find())``; read again until ``find`` names the same group before and after.

    An extension gives a short last shard its second name, below ``superseded``, before it renames a longer shard over
    the first name. So if the second name does not exist after the read, the shard had not been replaced, and sizes and
    checksums, which the two shards might share, need no comparison. An error of ``read`` is raised only in that case.
    """
    group = find()
    while True:
        try:
            value = read(group)
        except ArtifactCorrupt:
            if (now := find()) == group:
                raise
        else:
            if (now := find()) == group:
                return value
        group = now
