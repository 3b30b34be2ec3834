"""Publishing: committed units become a generation of a cache.

A generation is the Zarr metadata that covers its rows, its statistics, and ``manifest-<g>.json``; ``manifest.json``, a
copy of the newest one, is replaced last. Existing files never change, except the metadata that every generation
extends, and the short last shards, which are kept under ``superseded/`` before a longer version replaces them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tailrace.storage.activation_cache import ActivationCache, CacheSplit
from tailrace.storage.artifact import (
    MANIFEST,
    FileRecord,
    check_files,
    checksum_bytes,
    digest,
    make_directory,
    remove_directory,
    seal,
    sync_directory,
    write_atomically,
)
from tailrace.storage.cache_format import (
    DRAFT,
    FORMAT_VERSION,
    KIND,
    VOCABULARY,
    CacheFormat,
    CacheManifest,
    SplitRecord,
    block_record_name,
    manifest_name,
    pieces,
    split_path,
    statistics_path,
    superseded_path,
    unit_record_name,
)
from tailrace.storage.cache_writer import read_sealed_file
from tailrace.storage.errors import ArtifactCorrupt
from tailrace.storage.layout import ArraySpec, array_metadata, group_metadata, small_array_files
from tailrace.storage.shuffle import default_bucket_rows

Change = Literal["create", "extend", "widen"]


@dataclass(frozen=True)
class SplitSize:
    """Rows and contexts of one split in a generation."""

    n_rows: int
    n_contexts: int
    counts: Mapping[str, int]
    """What became of the tokens, for the record: documents, tokens, rows left out, tokens of the partial context."""


@dataclass(frozen=True)
class Generation:
    """A generation about to be published."""

    root: Path
    number: int
    change: Change
    layout: CacheFormat
    """All sites, those of earlier generations included."""
    seed: int
    bucket_rows: int | None
    """None: chosen from the number of rows."""
    splits: Mapping[str, SplitSize]
    previous: CacheManifest | None
    """Of the generation before."""
    documents: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By split, the files of kept columns that this generation adds."""

    def unit_records(self, split: str) -> list[list[str]]:
        """Return the commit records that make up each unit of a split."""
        n_units = len(pieces(self.splits[split].n_rows, self.layout.shard_rows))
        before = self._before(split).unit_records
        records = []
        for unit in range(n_units):
            kept = before[unit] if unit < len(before) else []
            new = unit_record_name(self.number, split, unit)
            if not (self.root / new).exists():
                assert kept, f"unit {unit} of {split} was never committed"
                records.append(kept)
            else:
                records.append([*kept, new] if self.change == "widen" else [new])
        return records

    def block_records(self, split: str) -> list[str]:
        """Return the commit record of each block of contexts of a split."""
        n_blocks = len(pieces(self.splits[split].n_contexts, self.layout.block_contexts))
        before = self._before(split).block_records
        records = []
        for block in range(n_blocks):
            new = block_record_name(self.number, split, block)
            records.append(new if (self.root / new).exists() else before[block])
        return records

    def document_files(self, split: str) -> list[str]:
        """Return the files of kept columns of a split."""
        return [*self._before(split).documents, *self.documents.get(split, ())]

    def _before(self, split: str) -> SplitRecord:
        """Return what the generation before says of a split; it may have had none."""
        none = SplitRecord(n_rows=0, n_contexts=0, bucket_rows=0, counts={}, unit_records=[], block_records=[])
        return self.previous.splits.get(split, none) if self.previous else none


def publish_generation(
    generation: Generation, request: Mapping[str, Any], facts: Mapping[str, Any], files: Mapping[str, bytes]
) -> None:
    """Write metadata, statistics, ``files`` (name → bytes) and the manifests, then remove what drafts alone need.

    Every unit must have been committed; ArtifactCorrupt is raised if a record is no longer as it was written.

    ``facts`` goes into the manifest as it is (model, text, packing), and so does what a newer version wrote into that
    of the generation before.
    """
    root, layout, previous = generation.root, generation.layout, generation.previous
    written = {name: write_file(root / name, data) for name, data in files.items()}
    metadata = {name: write_file(root / name, data) for name, data in _metadata(generation)}
    splits: dict[str, dict[str, Any]] = {
        split: {
            "n_rows": size.n_rows,
            "n_contexts": size.n_contexts,
            "bucket_rows": generation.bucket_rows or default_bucket_rows(layout.shard_rows, size.n_rows),
            "counts": dict(size.counts),
            "unit_records": generation.unit_records(split),
            "block_records": generation.block_records(split),
            **({"documents": kept} if (kept := generation.document_files(split)) else {}),
        }
        for split, size in generation.splits.items()
    }
    content = {
        **((previous.model_extra or {}) if previous else {}),
        **facts,
        "cache_id": previous.cache_id if previous else cache_id_of(request),
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "generation": generation.number,
        "change": generation.change,
        "previous": previous.digest if previous else None,
        "request": dict(request),
        "seed": generation.seed,
        "format": layout.as_json(),
        "splits": splits,
    }
    records = [name for split in splits.values() for names in split["unit_records"] for name in names]
    records += [name for split in splits.values() for name in (*split["block_records"], *split.get("documents", ()))]
    known = dict(previous.files) if previous else {}
    written |= _unchanged_files(root, known, [*records, VOCABULARY] if previous else records)
    without_files = CacheManifest.parse(seal({**content, "files": {}, "metadata": {}}), root / MANIFEST)
    for name, data in _statistics(ActivationCache(root, without_files)):
        written[name] = write_file(root / name, data)
    content["files"] = {name: file.as_json() for name, file in written.items()}
    content["metadata"] = {name: file.as_json() for name, file in metadata.items()}
    sealed = seal(content)
    write_file(root / manifest_name(generation.number), sealed)
    write_atomically(root / MANIFEST, sealed)
    remove_directory(root / DRAFT)


def _unchanged_files(root: Path, known: Mapping[str, FileRecord], names: Sequence[str]) -> dict[str, FileRecord]:
    """Return the records of files that were written earlier: those of the generation before, or by their seals.

    Raises ArtifactCorrupt for every file that is no longer as it was written: nothing damaged is published.
    """
    files, problems = {}, []
    for name in names:
        try:
            if name in known:
                files[name] = known[name]
                problems += check_files(root, {name: known[name]})
            else:
                data = read_sealed_file(root, name)
                files[name] = FileRecord(bytes=len(data), checksum=checksum_bytes(data))
        except ArtifactCorrupt as error:
            problems.append(str(error))
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ArtifactCorrupt(
            f"{root}: is not published, since files of it changed after they were written; restore those of an "
            f"earlier generation, and run the same command again, which makes others anew:\n{lines}"
        )
    return files


def write_file(path: Path, data: bytes) -> FileRecord:
    """Write a file atomically, its folder first; return what a manifest says of it."""
    make_directory(path.parent)
    write_atomically(path, data)
    return FileRecord(bytes=len(data), checksum=checksum_bytes(data))


def _metadata(generation: Generation) -> Iterator[tuple[str, bytes]]:
    """Yield the Zarr metadata of every group and array of a generation."""
    layout = generation.layout
    yield "zarr.json", group_metadata({"kind": KIND, "format_version": FORMAT_VERSION})
    for split, size in generation.splits.items():
        yield f"{split}/zarr.json", group_metadata({})
        yield f"{split}/contexts/zarr.json", group_metadata({})
        yield f"{split}/sites/zarr.json", group_metadata({})
        for site in layout.sites:
            hooks = {"hook_in": site.hook_in, "hook_out": site.hook_out}
            yield f"{split}/sites/{site.name}/zarr.json", group_metadata(hooks)
        for encoding in layout.encodings().values():
            if encoding.column_scale is not None:
                yield f"{split}/{encoding.name}/zarr.json", group_metadata({"value": "q * scale * column_scale"})
                for name, data in small_array_files(encoding.column_scale, {}).items():
                    yield f"{split}/{encoding.name}/column_scale/{name}", data
        for spec in (*layout.provenance_specs(), *layout.site_specs()):
            yield f"{split}/{spec.name}/zarr.json", array_metadata(spec, size.n_rows, {})
        for spec in layout.context_specs():
            yield f"{split}/{spec.name}/zarr.json", array_metadata(spec, size.n_contexts, {})


def _statistics(cache: ActivationCache) -> Iterator[tuple[str, bytes]]:
    """Yield mean and variance of every side of every site as small Zarr arrays; the scalars are their attributes."""
    for split in cache.manifest.splits:
        for key, statistics in CacheSplit(cache, split).merged_statistics(list(cache.layout.encodings())).items():
            scalars = {
                "n_rows": statistics.n_rows,
                "mean_norm": statistics.mean_norm,
                "mean_square_norm": statistics.mean_square_norm,
                "minimum": statistics.minimum,
                "maximum": statistics.maximum,
                "n_nonfinite": statistics.n_nonfinite,
                "energy_share_of_largest_1_percent": statistics.energy_share(),
            }
            for name, values in (("mean", statistics.mean), ("variance", statistics.variance)):
                for file, data in small_array_files(values.astype(np.float64), scalars).items():
                    yield f"{statistics_path(cache.generation, split, key)}/{name}/{file}", data


def keep_superseded(cache: ActivationCache) -> None:
    """Link the short last shards of a published cache under ``superseded/``, before an extension replaces them.

    Safe to repeat. Readers look there first, so the published generation stays complete at every moment.
    """
    layout = cache.layout
    for name in cache.manifest.splits:
        split = cache.split(name)
        rows = (*layout.provenance_specs(), *layout.site_specs())
        for specs, n_rows in ((rows, split.n_rows), (layout.context_specs(), split.n_contexts)):
            for spec in specs:
                if n_rows % spec.shard_rows:
                    _link_aside(split, spec, n_rows)


def _link_aside(split: CacheSplit, spec: ArraySpec, n_rows: int) -> None:
    shard = spec.shard_name(n_rows // spec.shard_rows)
    aside = superseded_path(split.root, split.cache.generation, split.name)
    if (aside / shard).exists():
        return
    write_file(aside / spec.name / "zarr.json", array_metadata(spec, n_rows, {}))
    make_directory((aside / shard).parent)
    _link_or_copy(split_path(split.root, split.name) / shard, aside / shard)
    sync_directory((aside / shard).parent)


def _link_or_copy(source: Path, target: Path) -> None:
    """Link a file to a second name, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS):
            raise
        write_file(target, source.read_bytes())


def cache_id_of(request: Mapping[str, Any]) -> str:
    """Return the identity of a cache, from the digest of its request."""
    return digest(dict(request)).removeprefix("sha256:")[:16]
