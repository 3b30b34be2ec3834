"""Verification: every byte of a cache is compared with what was recorded when it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

from tailrace.storage.activation_cache import ActivationCache, CacheSplit, open_cache, read_settled
from tailrace.storage.artifact import MANIFEST, FileRecord, Reads, check_files, check_request, verify_artifact
from tailrace.storage.cache_format import (
    EPOCH_KIND,
    EPOCHS,
    SPLITS,
    CacheFormat,
    EpochManifest,
    manifest_name,
    superseded_path,
    unit_record_name,
)
from tailrace.storage.errors import ArtifactCorrupt
from tailrace.storage.generations import read_pruned
from tailrace.storage.layout import ArraySpec, array_metadata
from tailrace.storage.names import matching
from tailrace.storage.parsing import parse_json

Progress = Callable[[int], None]
"""Called with the number of bytes that were just checked."""


def total_bytes(cache: ActivationCache) -> int:
    """Return the bytes of the shards that verifying a cache reads."""
    return sum(recorded.bytes for _, _, recorded in _shards(_generations(cache)))


def verify_bytes(path: Path, progress: Progress = lambda _: None, reads: Reads = lambda _: True) -> list[str]:
    """Check every file of every generation of a cache; return a sentence for each difference.

    Of shards that are not to be read only the size is compared. Damage to one file keeps no other from being checked,
    except that nothing is known of shards whose record is damaged. Raises ArtifactMissing or ArtifactIncomplete where
    there is nothing published.
    """
    try:
        cache = open_cache(path)
        generations = _generations(cache)
    except ArtifactCorrupt as error:
        return [str(error)]
    problems = _check_manifests(generations)
    problems += check_request(path, cache.manifest.request)
    problems += _check_metadata(cache)
    for generation in generations:
        problems += _check_superseded_metadata(generation)
    for split, name, recorded in _shards(generations):
        problems += read_settled(
            partial(split.group_of, name), partial(check_files, files={name: recorded}, reads=reads)
        )
        progress(recorded.bytes)
    for epoch in matching(path / EPOCHS, "*"):
        if (epoch / MANIFEST).exists():
            problems += verify_artifact(epoch, EPOCH_KIND)
            problems += check_files(epoch, _epoch_shards(epoch), reads=reads)
    return problems


def _generations(cache: ActivationCache) -> list[ActivationCache]:
    """Return the cache at every generation that is kept, the newest first."""
    older = range(cache.generation - 1, read_pruned(cache.path).oldest - 1, -1)
    return [cache, *(open_cache(cache.path, generation) for generation in older)]


def _epoch_shards(epoch: Path) -> dict[str, FileRecord]:
    try:
        return EpochManifest.read(epoch).shards
    except ArtifactCorrupt:
        return {}


def _check_manifests(generations: list[ActivationCache]) -> list[str]:
    """Check that manifests form one line of generations, and the files that each vouches for."""
    cache = generations[0]
    problems: dict[str, None] = {}
    newest = cache.path / manifest_name(cache.generation)
    if not newest.exists() or newest.read_bytes() != (cache.path / MANIFEST).read_bytes():
        problems[f"{newest}: differs from {MANIFEST}"] = None
    for later, at in pairwise(generations):
        if at.manifest.digest != later.manifest.previous:
            name = cache.path / manifest_name(at.generation)
            problems[f"{name}: generation {later.generation} grew on another one"] = None
    for at in generations:
        problems |= dict.fromkeys(check_files(cache.path, at.manifest.files))
    return list(problems)


def _check_metadata(cache: ActivationCache) -> list[str]:
    """Check the Zarr metadata of the newest generation; an unfinished growth may have lengthened its arrays already."""
    recorded = cache.manifest.metadata
    if (cache.path / unit_record_name(cache.generation + 1, SPLITS[0], 0)).parent.exists():
        lengthened = {f"{split}/{spec.name}/zarr.json": spec for split in SPLITS for spec in _specs(cache.layout)}
        recorded = {
            name: file
            for name, file in recorded.items()
            if name not in lengthened or not _is_lengthened(cache.path / name, lengthened[name])
        }
    return check_files(cache.path, recorded)


def _is_lengthened(file: Path, spec: ArraySpec) -> bool:
    try:
        n_rows = int(parse_json(file.read_bytes())["shape"][0])
        return file.read_bytes() == array_metadata(spec, n_rows, {})
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False


def _specs(layout: CacheFormat) -> tuple[ArraySpec, ...]:
    return (*layout.provenance_specs(), *layout.site_specs(), *layout.context_specs())


def _shards(generations: list[ActivationCache]) -> Iterator[tuple[CacheSplit, str, FileRecord]]:
    """Yield (split, shard, its record) as every generation would read it, nothing twice."""
    seen = set()
    for cache in generations:
        for name in cache.manifest.splits:
            split = cache.split(name)
            for record in split.readable_records():
                for shard, recorded in record.shards.items():
                    if (key := (split.group_of(shard) / shard, recorded.checksum)) not in seen:
                        seen.add(key)
                        yield split, shard, recorded


def _check_superseded_metadata(cache: ActivationCache) -> list[str]:
    """Compare the metadata of superseded groups with what it is derived from; nothing else records it."""
    problems = []
    for name in cache.manifest.splits:
        split, aside = cache.split(name), superseded_path(cache.path, cache.generation, name)
        for spec in _specs(cache.layout):
            n_rows = split.n_contexts if spec.name.startswith("contexts/") else split.n_rows
            file = aside / spec.name / "zarr.json"
            is_kept = (aside / spec.shard_name(n_rows // spec.shard_rows)).exists()
            if is_kept and not (file.exists() and file.read_bytes() == array_metadata(spec, n_rows, {})):
                problems.append(f"{file}: differs from the metadata of the generation it belongs to")
    return problems
