"""Verification: every byte of a cache is compared with what was recorded when it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

from tailrace.storage.activation_cache import ActivationCache, CacheSplit, open_alone, open_cache, read_settled
from tailrace.storage.artifact import (
    MANIFEST,
    FileRecord,
    Reads,
    check_files,
    check_request,
    read_bytes,
    unreadable,
    verify_artifact,
)
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
from tailrace.storage.generations import numbered, read_pruned
from tailrace.storage.layout import ArraySpec, array_metadata
from tailrace.storage.names import matching
from tailrace.storage.parsing import parse_json, read_regular

Progress = Callable[[int], None]
"""Called with the number of bytes that were just checked."""


def total_bytes(cache: ActivationCache) -> int:
    """Return the bytes of the shards that verifying a cache reads."""
    return sum(recorded.bytes for _, _, recorded in _shards(_readable(cache.path)[0]))


def verify_bytes(path: Path, progress: Progress = lambda _: None, reads: Reads = lambda _: True) -> list[str]:
    """Check every file of every generation of a cache; return a sentence for each difference.

    Of shards that are not to be read only the size is compared. Damage to one file keeps no other from being checked,
    except that nothing is known of shards whose record is damaged. Raises ArtifactMissing or ArtifactIncomplete where
    there is nothing published.
    """
    generations, problems = _readable(path)
    for check in _checks(path, generations, progress, reads):
        try:
            problems += check()
        except ArtifactCorrupt as error:
            problems.append(str(error))
        except OSError as error:  # a bad sector: the others are checked all the same
            problems.append(str(unreadable(error, Path(error.filename or path))))
    return list(dict.fromkeys(problems))


def _checks(
    path: Path, generations: list[ActivationCache], progress: Progress, reads: Reads
) -> Iterator[Callable[[], list[str]]]:
    """Yield what there is to check; each returns a sentence for every difference."""
    if generations:
        newest = generations[0]
        yield partial(_check_copy, newest)
        yield partial(_check_manifests, generations)
        yield partial(check_request, path, newest.manifest.request)
        yield partial(_check_metadata, newest)
    for generation in generations:
        yield partial(_check_superseded_metadata, generation)
    for split, name, recorded in _shards(generations):
        yield partial(
            read_settled, partial(split.group_of, name), partial(check_files, files={name: recorded}, reads=reads)
        )
        progress(recorded.bytes)
    for epoch in matching(path / EPOCHS, "*"):
        if (epoch / MANIFEST).exists():
            yield partial(verify_artifact, epoch, EPOCH_KIND)
            yield partial(_check_epoch_shards, epoch, reads)


def _readable(path: Path) -> tuple[list[ActivationCache], list[str]]:
    """Return the cache at every generation that is kept and can be read, the newest first, and a sentence of others.

    Where nothing says which those are, they are all that have a manifest of their own.
    """
    try:
        newest = open_cache(path)
        oldest = read_pruned(path).oldest
    except ArtifactCorrupt as error:
        found, problems, numbers = [], [str(error)], numbered(path)
    else:
        found, problems = [newest], []
        numbers = list(range(newest.generation - 1, oldest - 1, -1))
    opened: Callable[[Path, int], ActivationCache] = open_cache if found else open_alone
    for number in numbers:
        try:
            found.append(opened(path, number))
        except ArtifactCorrupt as error:
            problems.append(str(error))
    return found, problems


def _check_epoch_shards(epoch: Path, reads: Reads) -> list[str]:
    try:
        shards = EpochManifest.read(epoch).shards
    except ArtifactCorrupt:  # which verify_artifact says
        return []
    return check_files(epoch, shards, reads=reads)


def _check_copy(newest: ActivationCache) -> list[str]:
    """Check that a cache's manifest lies there under the name of its generation too."""
    copy = newest.path / manifest_name(newest.generation)
    try:
        open_cache(newest.path)
    except ArtifactCorrupt:  # which was said on opening it
        return []
    return [] if read_bytes(copy) == read_bytes(newest.path / MANIFEST) else [f"{copy}: differs from {MANIFEST}"]


def _check_manifests(generations: list[ActivationCache]) -> list[str]:
    """Check that manifests form one line of generations, and the files that each vouches for."""
    path = generations[0].path
    problems: dict[str, None] = {}
    for later, at in pairwise(generations):
        if at.generation + 1 == later.generation and at.manifest.digest != later.manifest.previous:
            name = path / manifest_name(at.generation)
            problems[f"{name}: generation {later.generation} grew on another one"] = None
    for at in generations:
        problems |= dict.fromkeys(check_files(path, at.manifest.files))
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
        n_rows = int(parse_json(data := read_regular(file))["shape"][0])
        return data == array_metadata(spec, n_rows, {})
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
                    try:
                        key = split.group_of(shard) / shard, recorded.checksum
                    except ArtifactCorrupt:  # the note of what was pruned, which was said on opening
                        continue
                    if key not in seen:
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
            try:
                if is_kept and read_bytes(file) != array_metadata(spec, n_rows, {}):
                    problems.append(f"{file}: differs from the metadata of the generation it belongs to")
            except ArtifactCorrupt as error:
                problems.append(str(error))
    return problems
