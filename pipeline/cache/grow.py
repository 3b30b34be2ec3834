"""The stages ``pipeline extend`` and ``pipeline widen``: more rows, or more sites of the same rows.

Each publishes a new generation of the cache. What was published before stays readable at every moment, with its own
order and statistics, and killed at any moment the same command continues.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tailrace.pipeline.cache.context_packing import ContextPacker, PackingProgress
from tailrace.pipeline.cache.draft import (
    PackingThread,
    UnitPlanner,
    begin_draft,
    forget_draft,
    forget_finished_draft,
    hook_options,
    keep_plan,
    log_event,
    recall_plan,
    write_units,
)
from tailrace.pipeline.cache.plan import (
    CachePlan,
    choose_dtypes,
    choose_scales,
    fixed_dtype,
    probe,
    probe_batches,
    refuse_other_inputs,
)
from tailrace.pipeline.cache.rows import RowMask, RowProducer
from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.cache.stage import (
    CacheResult,
    check_enough_rows,
    check_pairing,
    dataset_ended,
    last_packing,
    massive_warnings,
    packing_state,
    packing_state_name,
    unchanged,
)
from tailrace.pipeline.model.language_model import LanguageModel, load_language_model
from tailrace.pipeline.model.sites import SiteHooks
from tailrace.pipeline.shared.device import limited_threads
from tailrace.pipeline.shared.progress import RowProgress
from tailrace.pipeline.text.dataset import open_documents
from tailrace.pipeline.text.packing import ContextSource
from tailrace.storage.activation_cache import ActivationCache, open_cache
from tailrace.storage.cache_format import CacheFormat, Site
from tailrace.storage.cache_publish import Change, Generation, SplitSize, keep_superseded, publish_generation
from tailrace.storage.cache_writer import remove_temporary_files
from tailrace.storage.context_blocks import ContextBlocks
from tailrace.storage.draft import Lock
from tailrace.storage.errors import ArtifactMismatch, SettingsError, TextError


@dataclass(frozen=True)
class Place:
    """Where and how a stage runs; decides nothing about its result."""

    device: str = "cpu"
    threads: int | None = None
    quiet: bool = False
    model: str | None = None
    """Where the model lies now, if not where it was when the cache was made."""
    dataset: str | None = None
    """Where the dataset lies now, likewise."""


def extend(path: Path, tokens: int | Literal["all"], place: Place | None = None) -> CacheResult:
    """Add training rows to a cache until it holds ``tokens``; held-out rows stay as they are.

    Raises SettingsError if it holds more already, ArtifactMismatch for another model or text, and what
    ``tailrace.pipeline.cache.stage.run`` raises.
    """
    with _locked(path) as cache:
        n_rows = cache.split("train").n_rows
        if tokens == n_rows or (tokens == "all" and dataset_ended(path, cache.generation)):
            return unchanged(cache)
        if tokens != "all" and tokens < n_rows:
            raise SettingsError(f"{path}: holds {n_rows:,} training rows already; ask for more than that with --tokens")
        with _opened(path, place or Place()) as growth:
            return growth.extend(None if tokens == "all" else tokens)


def widen(path: Path, layers: str | None, hooks: Sequence[str] = (), place: Place | None = None) -> CacheResult:
    """Add sites to a cache by running its recorded contexts again, in its recorded order.

    Does nothing if they are there. Raises ModelError for hooks the model lacks, ArtifactMismatch for another model or
    for a site that is there under the same name with other hooks.
    """
    with _locked(path) as cache, _opened(path, place or Place()) as growth:
        wanted = growth.model.resolve_sites(layers, hooks)
        _refuse_taken_names(cache, wanted)
        new = [site for site in wanted if site.name not in cache.sites]
        return growth.widen(new) if new else unchanged(cache)


def _refuse_taken_names(cache: ActivationCache, wanted: Sequence[SiteHooks]) -> None:
    for site in wanted:
        held = cache.sites.get(site.name)
        if held is not None and (held.hook_in, held.hook_out) != (site.hook_in, site.hook_out):
            raise ArtifactMismatch(
                f"{cache.path}: its site {site.name} is {held.hook_in} -> {held.hook_out}, asked for {site.hook_in} -> "
                f"{site.hook_out}; give the new site another name with --hooks NAME={site.hook_in}:{site.hook_out}"
            )


@contextmanager
def _locked(path: Path) -> Iterator[ActivationCache]:
    open_cache(path)  # before the lock, which would create the directory
    lock = Lock(path)
    try:
        cache = open_cache(path)
        forget_finished_draft(path, cache.generation)
        yield cache
    except BaseException:
        lock.take_back()
        raise
    lock.release()


@contextmanager
def _opened(path: Path, place: Place) -> Iterator[Growth]:
    with limited_threads(place.threads):
        yield Growth(path, place)


class Growth:
    """A published cache about to get a new generation."""

    def __init__(self, root: Path, place: Place) -> None:
        self.root, self.place = root, place
        self.cache: ActivationCache = open_cache(root)
        moved = {"model": place.model, "dataset": place.dataset}
        self.settings = CacheSettings.read(
            {**self.cache.manifest["request"], "tokens": "all"},
            {name: value for name, value in moved.items() if value is not None},
            where=f"the request recorded in {root}",
        )
        remove_temporary_files(root)
        self.number = self.cache.generation + 1
        self.model: LanguageModel = load_language_model(self.settings, device=place.device)
        self._refuse_other("model", self.model.identity())
        self.row_mask: RowMask = self.settings.rows_of(self.model)
        self.contexts: CacheFormat = self.cache.layout  # for its contexts
        splits = tuple(self.cache.manifest["splits"])
        self.blocks = {split: ContextBlocks(root, self.contexts, self.number, split) for split in splits}
        self.progress = PackingProgress(self.settings.contexts_per_batch)

    def _refuse_other(self, part: str, found: Mapping[str, Any]) -> None:
        refuse_other_inputs(str(self.root), {part: self.cache.manifest[part]}, {part: found})

    def extend(self, tokens: int | None) -> CacheResult:
        """Continue packing where it stopped and write the units from the first short one on; None: to the end."""
        documents = open_documents(self.settings, self.settings.seed)
        self._refuse_other("text", documents.identity())
        plan = self._plan("extend", list(self._recorded_hooks()))
        keep_superseded(self.cache)
        packer = ContextPacker(self.root, self.contexts, self.blocks, self.row_mask)
        if not packer.restore():
            state = last_packing(self.root, self.cache.generation)["state"]
            packer.continue_from(state, {split: self.cache.split(split).n_contexts for split in self.blocks})
        packer.report(self.progress)
        source = ContextSource.of(
            self.settings,
            self.model,
            documents,
            {**{split: self.cache.split(split).n_rows for split in self.blocks}, "train": tokens},
            packer.state,
        )

        def check() -> None:
            self._check_more_rows()
            check_enough_rows(self.progress, source, tokens, self.settings.dataset)

        first = self.cache.split("train").n_rows // plan.layout.shard_rows
        planner = self._planner(plan, {"train": tokens}, {"train": first})
        n_new = None if tokens is None else tokens - first * plan.layout.shard_rows
        with (
            PackingThread(packer, source, self.progress, check),
            RowProgress(n_new, quiet=self.place.quiet, title="extending") as bar,
        ):
            self._write(plan, planner, bar, with_provenance=True)
            self.progress.wait_until_done()
            sizes = self._sizes()
            n_contexts = self.progress.n_contexts("train")
            sizes["train"] = SplitSize(planner.n_rows("train"), n_contexts, source.counts["train"])
            files = {packing_state_name(self.number): packing_state(source)}
            return self._publish("extend", plan.layout, sizes, bar, files)

    def _check_more_rows(self) -> None:
        n_rows = self.cache.split("train").n_rows
        if self.progress.n_rows("train") == n_rows:
            forget_draft(self.root)  # nothing was begun
            raise TextError(
                f"{self.settings.dataset}: has no row beyond the {n_rows:,} that {self.root} holds; make a new cache "
                "from more text"
            )

    def widen(self, new: Sequence[SiteHooks]) -> CacheResult:
        """Run every recorded context again and write the new sites of every unit."""
        for split in self.blocks:
            self._report_recorded(split)
        self.progress.finish()
        plan = self._plan("widen", new)
        sizes = self._sizes()
        targets = {split: size.n_rows for split, size in sizes.items()}
        planner = self._planner(plan, targets, {})
        with RowProgress(sum(targets.values()), quiet=self.place.quiet, title="widening") as bar:
            self._write(plan, planner, bar, with_provenance=False)
            before = self.cache.layout
            layout = dataclasses.replace(
                before,
                sites=(*before.sites, *plan.layout.sites),
                column_scales={**before.column_scales, **plan.layout.column_scales},
            )
            return self._publish("widen", layout, sizes, bar, {})

    def _recorded_hooks(self) -> Iterator[SiteHooks]:
        for site in self.cache.sites.values():
            yield SiteHooks(site.name, site.hook_in, site.hook_out)

    def _report_recorded(self, split: str) -> None:
        n_contexts, size = self.cache.split(split).n_contexts, self.contexts.block_contexts
        for start in range(0, n_contexts, size):
            tokens, _ = self.blocks[split].read(start, min(start + size, n_contexts))
            self.progress.add(split, self.row_mask(tokens).sum(axis=1))

    def _plan(self, change: Change, hooks: Sequence[SiteHooks]) -> CachePlan:
        begin_draft(self.root, change, self.number, {})
        kept = recall_plan(self.root)
        if kept is not None:
            if [hook.name for hook in kept.hooks] != [hook.name for hook in hooks]:
                raise ArtifactMismatch(
                    f"{self.root}: an unfinished `{change}` by {', '.join(hook.name for hook in kept.hooks)} lies "
                    f"here; finish that one first, with `pipeline {change} {self.root} {hook_options(kept.hooks)}`"
                )
            return kept
        layout = self.cache.layout if change == "extend" else self._widened_layout(hooks)
        plan = CachePlan(layout, tuple(hooks), {})
        keep_plan(self.root, plan)
        return plan

    def _widened_layout(self, hooks: Sequence[SiteHooks]) -> CacheFormat:
        """Return the format of the new sites alone, with the recorded shards, so that rows stay where they are."""
        fixed = fixed_dtype(self.settings.storage_dtype, self.model.dtype)
        seen = None
        if fixed in (None, "int8"):
            n = probe_batches(self.settings, self.cache.split("train").n_contexts)
            seen = probe(self.model, hooks, self._batches(n))
        dtypes = choose_dtypes(hooks, fixed, seen)
        widths = self.model.widths(hooks)
        sites = tuple(
            Site(hook.name, hook.hook_in, hook.hook_out, *widths[hook.name], dtypes[hook.name]) for hook in hooks
        )
        scales = choose_scales(hooks, dtypes, seen)
        return dataclasses.replace(self.cache.layout, sites=sites, column_scales=scales)

    def _batches(self, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
        size = self.settings.contexts_per_batch
        n_contexts = min(n * size, self.cache.split("train").n_contexts)
        tokens, _ = self.blocks["train"].read(0, n_contexts)
        return [(tokens[i : i + size], self.row_mask(tokens[i : i + size])) for i in range(0, n_contexts, size)]

    def _planner(self, plan: CachePlan, targets: Mapping[str, int | None], first: Mapping[str, int]) -> UnitPlanner:
        return UnitPlanner(self.progress, plan.layout, self.settings.contexts_per_batch, targets, first)

    def _write(self, plan: CachePlan, planner: UnitPlanner, bar: RowProgress, *, with_provenance: bool) -> None:
        check_pairing(self.model, plan.hooks, self._batches(1)[0][0], self.settings.model)
        producer = RowProducer(
            self.model, plan.hooks, plan.layout, self.blocks, self.row_mask, self.settings.contexts_per_batch
        )
        write_units(
            self.root,
            plan,
            planner,
            producer,
            bar,
            generation=self.number,
            seed=self.settings.seed,
            with_provenance=with_provenance,
        )

    def _sizes(self) -> dict[str, SplitSize]:
        splits = self.cache.manifest["splits"]
        return {
            name: SplitSize(split["n_rows"], split["n_contexts"], split["counts"]) for name, split in splits.items()
        }

    def _publish(
        self,
        change: Change,
        layout: CacheFormat,
        sizes: Mapping[str, SplitSize],
        bar: RowProgress,
        files: Mapping[str, bytes],
    ) -> CacheResult:
        manifest = self.cache.manifest
        bucket_rows = None if self.settings.bucket_rows == "auto" else self.settings.bucket_rows
        generation = Generation(
            self.root, self.number, change, layout, self.settings.seed, bucket_rows, sizes, previous=manifest
        )
        facts = {name: manifest[name] for name in ("model", "text", "packing")}
        publish_generation(generation, manifest["request"], facts, files)
        forget_draft(self.root)
        cache = open_cache(self.root)
        log_event(self.root, change, seconds=bar.seconds, n_rows=bar.n_new_rows)
        return CacheResult(self.root, cache, massive_warnings(cache), bar.n_new_rows, bar.seconds)
