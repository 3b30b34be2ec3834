"""Writing one epoch's order to disk as sequential shards, for machines with little memory, slow disks or many readers.

A stream would gather the same order, so reading either way serves the same rows. Work is one task per bucket,
deterministic and idempotent: any number of workers may do them in any order, twice or after a crash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from tailrace.storage.activation_cache import CacheSplit, open_cache
from tailrace.storage.artifact import FileRecord, remove_directory
from tailrace.storage.cache_format import DRAFT, EPOCH_KIND, ShardsRecord, epoch_path, epoch_request
from tailrace.storage.cache_publish import write_file
from tailrace.storage.cache_writer import read_sealed_file, recall_record, sync_shards, write_record
from tailrace.storage.draft import Draft
from tailrace.storage.errors import SettingsError
from tailrace.storage.layout import ArraySpec, array_metadata, group_metadata
from tailrace.storage.memory import aligned_rows
from tailrace.storage.orders import GatheredOrder
from tailrace.storage.shard import write_shard
from tailrace.storage.shuffle import EpochPlan

RunTasks = Callable[[Callable[[int], None], Iterable[int]], None]
"""Calls a function with every id, in turn or on workers."""


class BucketRecord(ShardsRecord):
    """The commit record of a bucket."""

    bucket: int


def plan_epoch(split: CacheSplit, seed: int, epoch: int) -> EpochPlan:
    """Return the order of one epoch over all rows of a split."""
    return EpochPlan(seed, epoch, split.name, tuple(split.unit_rows), split.bucket_rows)


def materialise_epoch(split: CacheSplit, *, seed: int, epoch: int, run_tasks: RunTasks) -> Path:
    """Write and publish one epoch's order inside the cache; return its directory. Resumes at the bucket.

    Needs as much disk as the split itself and the memory of one bucket of the widest array per worker. Raises
    SettingsError if the cache's buckets are no multiple of its shards.
    """
    plan = plan_epoch(split, seed, epoch)
    if plan.n_buckets > 1 and plan.bucket_rows % split.layout.shard_rows:
        raise SettingsError(
            f"{split.root}: buckets of {plan.bucket_rows:,} rows are no whole shards of {split.layout.shard_rows:,} "
            "rows, so their copies would share files; read this cache without materialising it"
        )
    path = epoch_path(split.root, plan, split.cache.generation)
    with Draft(path, EPOCH_KIND, epoch_request(split.identity, plan), part_of=split.root) as draft:
        if draft.published:
            remove_directory(path / DRAFT)  # of a process that was killed right after it had published
            return path
        missing = _missing(path, plan.n_buckets)
        task = BucketTask(str(split.root), split.cache.generation, split.name, seed, epoch)
        run_tasks(task, missing)
        for name, data in _metadata(split, plan).items():
            write_file(path / name, data)
        shards = {}
        for bucket in range(plan.n_buckets):
            name = _record_name(bucket)
            shards.update(BucketRecord.parse(read_sealed_file(path, name), path / name).as_json()["shards"])
        records = [_record_name(bucket) for bucket in range(plan.n_buckets)]
        draft.publish({"shards": shards}, [*_metadata(split, plan), *records], beside=[*shards, DRAFT])
        remove_directory(path / DRAFT)
    return path


def _missing(path: Path, n_buckets: int) -> list[int]:
    """Return the buckets that are not written, or no longer as they were."""
    finished = [bucket for bucket in range(n_buckets) if (path / _record_name(bucket)).exists()]
    whole = {
        bucket
        for age, bucket in enumerate(reversed(finished))
        if recall_record(path, _record_name(bucket), BucketRecord, path, age=age, n_finished=len(finished))
    }
    return [bucket for bucket in range(n_buckets) if bucket not in whole]


class BucketTask:
    """Writes one bucket of an epoch; picklable, so that it runs on any worker that sees the cache."""

    def __init__(self, cache: str, generation: int, split: str, seed: int, epoch: int) -> None:
        self.cache, self.generation, self.split, self.seed, self.epoch = cache, generation, split, seed, epoch

    def __call__(self, bucket: int) -> None:
        """Write the bucket's shards of every array, then its record."""
        split = open_cache(self.cache, self.generation).split(self.split)
        plan = plan_epoch(split, self.seed, self.epoch)
        path = epoch_path(split.root, plan, self.generation)
        shards: dict[str, FileRecord] = {}
        with ThreadPoolExecutor(4) as pool:
            for spec in _specs(split):
                with closing(GatheredOrder(split, plan, [spec], pool)) as order:
                    shards.update(_write_bucket(path, order, plan, spec, bucket))
        sync_shards(path, shards)
        write_record(path, _record_name(bucket), BucketRecord(bucket=bucket, shards=shards))


def _write_bucket(
    path: Path, order: GatheredOrder, plan: EpochPlan, spec: ArraySpec, bucket: int
) -> dict[str, FileRecord]:
    n_rows = plan.rows_in_bucket(bucket)
    n_padded = -(-n_rows // spec.chunk_rows) * spec.chunk_rows
    rows = aligned_rows(n_padded, spec.width, spec.memory_dtype)
    order.load(bucket, {spec.name: rows})
    shards = {}
    for start in range(0, n_rows, spec.shard_rows):
        name = spec.shard_name((bucket * plan.bucket_rows + start) // spec.shard_rows)
        shards[name] = write_shard(path / name, rows[start:], min(spec.shard_rows, n_rows - start), spec)
    return shards


def _specs(split: CacheSplit) -> tuple[ArraySpec, ...]:
    return (*split.layout.provenance_specs(), *split.layout.site_specs())


def _metadata(split: CacheSplit, plan: EpochPlan) -> dict[str, bytes]:
    files = {f"{spec.name}/zarr.json": array_metadata(spec, plan.n_rows, {}) for spec in _specs(split)}
    groups = {"", "sites/", *(f"sites/{site.name}/" for site in split.layout.sites)}
    groups |= {f"{encoding.name}/" for encoding in split.layout.encodings().values() if encoding.dtype == "int8"}
    return {**{f"{group}zarr.json": group_metadata({}) for group in groups}, **files}


def _record_name(bucket: int) -> str:
    return f"commits/bucket-{bucket:06d}.json"
