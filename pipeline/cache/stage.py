"""The stages ``pipeline cache``, ``extend`` and ``widen``: text in, a published generation of a cache out.

Contexts are packed and committed first, in a thread; the language model runs over them on a fixed grid; rows are
shuffled and written unit by unit beside it. Killed at any moment, the same command continues and ends with the same
bytes. A cache that grows gets a new generation; what was published before stays readable at every moment, with its own
order and statistics.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tailrace.pipeline.cache.context_packing import (
    ContextPacker,
    PackingProgress,
    dataset_ended,
    last_packing,
    packing_state,
)
from tailrace.pipeline.cache.draft import (
    begin_draft,
    begun_request,
    begun_with,
    forget_draft,
    forget_finished_draft,
    hook_options,
    keep_plan,
    log_event,
    nothing_left_behind,
    recall_plan,
    refuse_other_inputs,
)
from tailrace.pipeline.cache.plan import FirstBatch, choose_sites, complete_format, context_format, probe_batches
from tailrace.pipeline.cache.rows import RowMaker, UnitRows
from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.cache.units import UnitFiles, UnitPlanner, write_units, write_units_on_workers
from tailrace.pipeline.model.language_model import LanguageModel, load_language_model
from tailrace.pipeline.model.sites import SiteHooks
from tailrace.pipeline.shared.compute import Compute, require_linux
from tailrace.pipeline.shared.progress import RowProgress
from tailrace.pipeline.text.dataset import open_documents
from tailrace.pipeline.text.holdout import HoldoutRule
from tailrace.pipeline.text.packing import ContextSource
from tailrace.pipeline.text.reading import Reading, choose_reading
from tailrace.pipeline.text.settings import RowFilter
from tailrace.pipeline.text.stream import DocumentStream
from tailrace.storage.activation_cache import ActivationCache, open_cache
from tailrace.storage.artifact import canonical_json
from tailrace.storage.cache_format import KIND, SPLITS, VOCABULARY, CacheFormat, Site, packing_name
from tailrace.storage.cache_publish import Change, Generation, SplitSize, keep_superseded, publish_generation
from tailrace.storage.cache_writer import ContextBlocks
from tailrace.storage.display import line
from tailrace.storage.draft import Draft, Lock
from tailrace.storage.errors import (
    ActivationOverflow,
    ArtifactMismatch,
    ModelError,
    NonFiniteActivation,
    OutOfMemoryError,
    SettingsError,
    TextError,
)
from tailrace.storage.generations import Generations
from tailrace.storage.layout import FLOAT16_NORMAL
from tailrace.storage.names import remove_temporary
from tailrace.storage.statistics import prepare_to_sum

logger = logging.getLogger(__name__)

WriteUnits = Callable[[UnitFiles, UnitPlanner, UnitRows, RowProgress], None]
"""Writes every unit that is missing: here, or in worker processes."""

_TITLES: dict[Change, str] = {"create": "caching", "extend": "extending", "widen": "widening"}


@dataclass(frozen=True)
class CacheResult:
    """A published cache and what should be said about it."""

    path: Path
    cache: ActivationCache
    """Open: until it is closed, or nobody has it any more, its generation is not pruned."""
    warnings: tuple[str, ...]
    n_new_rows: int
    seconds: float

    def _repr_html_(self) -> str:
        return self.cache._repr_html_() + "".join(line(escape(text), "warning") for text in self.warnings)


def run(
    settings: CacheSettings,
    *,
    output: Path,
    compile_model: bool = False,
    compute: Compute = Compute(),
) -> CacheResult:
    """Write the cache that ``settings`` describe to ``output``; continue an unfinished one, return a finished one.

    Raises SettingsError, TextError, ModelError, ArtifactMismatch, ArtifactBusy, NonFiniteActivation,
    ActivationOverflow or StorageFull; finished units are kept whatever happens.
    """
    require_linux("caching")
    settings = settings.for_device(compute.device_name, begun_request(output))
    with compute.opened(), Draft(output, KIND, settings.request()) as draft:
        if draft.published:
            return _finished(settings, output)
        with nothing_left_behind(output):
            begun = begun_with(output).get("model", {})
            settings = settings.in_dtype_of(begun)
            model = load_language_model(
                settings, device=compute.device_name, compile_model=compile_model, recorded=begun
            )
            documents = open_documents(settings, settings.seed, kept=settings.kept_columns)
            # workers may have other devices
            settings = settings.in_dtype_of({"dtype": str(model.dtype).removeprefix("torch.")})
            job = CacheJob(output, settings, model, quiet=compute.quiet)
            try:
                return job.create(documents, draft.request, compute, compile_model=compile_model)
            except OutOfMemoryError as error:
                # not on the same path: rows of two batch sizes differ in their last bits
                raise OutOfMemoryError(f"{error}, with --contexts-per-batch and another --out") from error


def extend(
    path: Path,
    tokens: int | Literal["all"],
    *,
    compute: Compute = Compute(),
    model: str | None = None,
    dataset: str | None = None,
    on_bad_row: str | None = None,
) -> CacheResult:
    """Add training rows to a cache until it holds ``tokens``; held-out rows stay as they are.

    ``model`` and ``dataset`` say where these lie now, if they moved; ``on_bad_row`` is the setting of that name. Raises
    SettingsError if it holds more already, ArtifactMismatch for another model or text, and what ``run`` raises.
    """
    require_linux("caching")
    with _locked(path) as cache, compute.opened():
        n_rows = cache.split("train").n_rows
        if tokens == n_rows or (tokens == "all" and dataset_ended(path, cache.generation)):
            return _unchanged(cache)
        if tokens != "all" and tokens < n_rows:
            raise SettingsError(f"{path}: holds {n_rows:,} training rows already; ask for more than that with --tokens")
        job = _reopened(cache, {"model": model, "dataset": dataset, "on_bad_row": on_bad_row}, compute)
        documents = open_documents(job.settings, job.settings.seed, kept=job.settings.kept_columns)
        return job.extend(documents, None if tokens == "all" else tokens)


def widen(
    path: Path,
    layers: str | None,
    hooks: Sequence[str] = (),
    *,
    compute: Compute = Compute(),
    model: str | None = None,
) -> CacheResult:
    """Add sites to a cache by running its recorded contexts again, in its recorded order.

    Does nothing if they are there. ``model`` says where it lies now, if it moved. Raises ModelError for hooks the model
    lacks, ArtifactMismatch for another model or for a site that is there under the same name with other hooks.
    """
    require_linux("caching")
    with _locked(path) as cache, compute.opened():
        job = _reopened(cache, {"model": model}, compute)
        wanted = job.model.resolve_sites(layers, hooks)
        _refuse_taken_names(cache, wanted)
        new = [site for site in wanted if site.name not in cache.sites]
        return job.widen(new) if new else _unchanged(cache)


def _finished(settings: CacheSettings, output: Path) -> CacheResult:
    cache = open_cache(output)
    forget_finished_draft(output, cache.generation)
    rows = Generations(output).train_rows
    is_there = dataset_ended(output, cache.generation) if settings.tokens == "all" else settings.tokens in rows
    if not is_there:
        raise ArtifactMismatch(
            f"{output}: is a finished cache of {rows[-1]:,} training rows, but --tokens is {settings.tokens}; "
            "use `pipeline extend` to add rows, or another --out"
        )
    return _unchanged(cache)


def _unchanged(cache: ActivationCache) -> CacheResult:
    """Return the result of a stage that has nothing to do."""
    return CacheResult(cache.path, cache, warnings_of(cache), 0, 0.0)


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


def _reopened(cache: ActivationCache, given: Mapping[str, str | None], compute: Compute) -> CacheJob:
    """Return the job that gives a published cache its next generation."""
    settings = CacheSettings.read(
        {**cache.manifest.request, "tokens": "all"},
        {name: value for name, value in given.items() if value is not None},
        where=f"the request recorded in {cache.path}",
    ).in_dtype_of(cache.manifest.model)
    remove_temporary(cache.path)
    model = load_language_model(settings, device=compute.device_name, recorded=cache.manifest.model)
    return CacheJob(cache.path, settings, model, cache, quiet=compute.quiet)


def _refuse_taken_names(cache: ActivationCache, wanted: Sequence[SiteHooks]) -> None:
    for site in wanted:
        held = cache.sites.get(site.name)
        if held is not None and SiteHooks.of(held) != site:
            raise ArtifactMismatch(
                f"{cache.path}: its site {site.name} is {held.hook_in} -> {held.hook_out}, not {site.hook_in} -> "
                f"{site.hook_out}; give the new site another name with --hooks NAME={site.hook_in}:{site.hook_out}"
            )


class CacheJob:
    """One run that gives a cache a new generation: the first, or another of the published ``cache``."""

    def __init__(
        self,
        root: Path,
        settings: CacheSettings,
        model: LanguageModel,
        cache: ActivationCache | None = None,
        *,
        quiet: bool,
    ) -> None:
        self.root, self.settings, self.model, self.cache, self.quiet = root, settings, model, cache, quiet
        self.model.may_record = True
        self.number = cache.generation + 1 if cache else 0
        self.contexts = cache.layout if cache else context_format(settings)
        """The format of contexts."""
        splits = SPLITS if HoldoutRule.parse(settings.holdout).holds_out else SPLITS[:1]
        self.recorded: dict[str, SplitSize] = {}
        """What the published generation holds."""
        self.request: Mapping[str, Any] = cache.manifest.request if cache else {}
        self.facts: Mapping[str, Any] = {}
        """Model, text and packing, for the manifest."""
        if cache:
            self.facts = cache.manifest.model_dump(include={"model", "text", "packing"})
            self._refuse_other("model", model.identity(cache.manifest.model))
            for split, size in cache.manifest.splits.items():
                self.recorded[split] = SplitSize(size.n_rows, size.n_contexts, size.counts)
        self.blocks = {
            split: ContextBlocks(root, self.contexts, self.number, split, cache.manifest.files if cache else {})
            for split in self.recorded or splits
        }
        self.row_mask = settings.rows_of(model)
        self.progress = PackingProgress(settings.contexts_per_batch, self.row_mask)

    def create(
        self,
        documents: DocumentStream,
        request: Mapping[str, Any],
        compute: Compute,
        *,
        compile_model: bool,
    ) -> CacheResult:
        """Make the first generation."""
        tokens = None if self.settings.tokens == "all" else self.settings.tokens
        hooks = self.model.resolve_sites(self.settings.layers, self.settings.hooks)
        self.request = request
        begun = begun_with(self.root)
        reading = choose_reading(self.settings, self.model, documents, begun.get("packing"))
        self.facts = begin_draft(self.root, "cache", 0, self._facts(documents, reading, begun.get("model", {})))

        def write(files: UnitFiles, planner: UnitPlanner, rows: UnitRows, bar: RowProgress) -> None:
            if not compute.has_workers:
                write_units(files, planner, rows, bar)
            else:
                write_units_on_workers(files, planner, bar, compute, self.settings, compile_model=compile_model)

        return self._pack_and_write(documents, tokens, lambda: self._first_layout(hooks, tokens), write)

    def extend(self, documents: DocumentStream, tokens: int | None) -> CacheResult:
        """Continue packing where it stopped and write the units from the first short one on; None: to the end."""
        assert self.cache is not None, "a published cache is extended"
        layout = self.cache.layout
        self._refuse_other("text", documents.identity())
        begin_draft(self.root, "extend", self.number, {})
        keep_superseded(self.cache)
        return self._pack_and_write(documents, tokens, lambda: layout, write_units)

    def widen(self, new: Sequence[SiteHooks]) -> CacheResult:
        """Run every recorded context again and write the new sites of every unit."""
        assert self.cache is not None, "a published cache is widened"
        before = self.cache.layout
        for split, size in self.recorded.items():
            self.progress.add_committed(split, self.blocks[split], size.n_contexts, self.contexts.block_contexts)
        self.progress.finish()
        begin_draft(self.root, "widen", self.number, {})
        added = self._kept_layout(lambda: self._added_layout(before, new))
        kept = [SiteHooks.of(site) for site in added.sites]
        if [hook.name for hook in kept] != [hook.name for hook in new]:
            raise ArtifactMismatch(
                f"{self.root}: an unfinished `widen` by {', '.join(hook.name for hook in kept)} lies "
                f"here; finish that one first, with `pipeline widen {self.root} {hook_options(kept)}`"
            )
        targets = {split: size.n_rows for split, size in self.recorded.items()}
        planner = UnitPlanner(self.progress, added, self.settings.contexts_per_batch, targets)
        with RowProgress(sum(targets.values()), quiet=self.quiet, title=_TITLES["widen"]) as bar:
            self._write(added, planner, bar, write_units, with_provenance=False)
            sites, scales = (*before.sites, *added.sites), {**before.column_scales, **added.column_scales}
            # not by `replace`, which would lose what a newer version wrote
            layout = CacheFormat(**{**vars(before), "sites": sites, "column_scales": scales})
            return self._publish("widen", layout, self.recorded, bar, {})

    def _pack_and_write(
        self,
        documents: DocumentStream,
        tokens: int | None,
        choose_layout: Callable[[], CacheFormat],
        write: WriteUnits,
    ) -> CacheResult:
        """Pack until there are ``tokens`` training rows, or to the end of the text, and write every missing unit.

        Held-out rows come with the first generation.
        """
        packer = ContextPacker(self.root, self.contexts, self.blocks, self.progress, self.number)
        if not packer.restore() and self.recorded:
            state = last_packing(self.root, self.number - 1)["state"]
            packer.continue_from(state, {split: size.n_contexts for split, size in self.recorded.items()})
        wanted = {**{split: size.n_rows for split, size in self.recorded.items()}, "train": tokens}
        reading = choose_reading(self.settings, self.model, documents, self.facts["packing"])
        source = ContextSource.of(self.settings, self.model, documents, wanted, packer.state, reading)
        change: Change = "extend" if self.recorded else "create"
        # the first unit that is missing or short
        first = self.recorded["train"].n_rows // self.contexts.shard_rows if self.recorded else 0
        n_new = None if tokens is None else tokens - first * self.contexts.shard_rows
        with (
            packer.running(source, lambda: self._check_rows(source, tokens)),
            ThreadPoolExecutor(1) as beside,
            RowProgress(n_new, quiet=self.quiet, title=_TITLES[change]) as bar,
        ):
            beside.submit(prepare_to_sum)
            layout = self._kept_layout(choose_layout)
            targets = {split: None for split in self.blocks if split not in self.recorded} | {"train": tokens}
            planner = UnitPlanner(self.progress, layout, self.settings.contexts_per_batch, targets, {"train": first})
            self._write(layout, planner, bar, write)
            self.progress.wait_until_done()
            sizes = self.recorded | {
                split: SplitSize(planner.n_rows(split), self.progress.n_contexts(split), source.counts[split])
                for split in targets
            }
            if source.first_problems:
                packing = {**self.facts["packing"], "bad_rows": source.first_problems}
                self.facts = {**self.facts, "packing": packing}
            files = {packing_name(self.number): packing_state(source)}
            if change == "create":
                files[VOCABULARY] = canonical_json({"tokens": self.model.vocabulary()})
            return self._publish(change, layout, sizes, bar, files, packer.documents.names())

    def _check_rows(self, source: ContextSource, target: int | None) -> None:
        """Raise TextError if the dataset ended before ``target`` training rows were packed, or gave none."""
        dataset, n_rows = self.settings.dataset, self.progress.n_rows("train")
        if self.recorded and n_rows == self.recorded["train"].n_rows:
            forget_draft(self.root)  # nothing was begun
            raise TextError(
                f"{dataset}: has no row beyond the {n_rows:,} that {self.root} holds; make a new cache from more text"
            )
        if n_rows == 0:
            if self.settings.roles and self.progress.n_contexts("train"):
                raise TextError(
                    f"{dataset}: gives no training row at all: no message is by --roles {self.settings.roles}; "
                    "ShareGPT's human and gpt are called user and assistant here"
                )
            raise TextError(
                f"{dataset}: gives no training row at all: its documents do not fill a single context "
                f"({source.counts['train']}). Use a shorter --context-length, or more text"
            )
        if target is not None and n_rows < target:
            raise TextError(
                f"{dataset}: ends after {n_rows:,} training rows of the {target:,} wanted. Everything so far is kept: "
                f"run the same command with --tokens {n_rows} (or --tokens all), or start anew with more text"
            )

    def _kept_layout(self, choose: Callable[[], CacheFormat]) -> CacheFormat:
        """Return the format that an interrupted run has settled on, or else choose and keep it."""
        layout = recall_plan(self.root)
        if layout is None:
            layout = choose()
            keep_plan(self.root, layout)
        if layout.block_contexts != self.contexts.block_contexts:
            raise ArtifactMismatch(
                f"{self.root}: an earlier release began this cache in blocks of {layout.block_contexts:,} contexts, "
                "which it could not have finished; delete it and run the same command again"
            )
        return layout

    def _first_layout(self, hooks: Sequence[SiteHooks], tokens: int | None) -> CacheFormat:
        if tokens is None:
            self.progress.wait_until_done()
        n_rows = tokens or self.progress.n_rows("train")
        n_contexts = -(-n_rows // max(1, self.settings.context_length - 1))
        sites, scales = self._chosen_sites(hooks, n_contexts)
        return complete_format(self.settings, self.contexts, sites, scales, n_rows)

    def _added_layout(self, before: CacheFormat, new: Sequence[SiteHooks]) -> CacheFormat:
        """Return the format of the new sites alone, with the recorded shards, so that rows stay where they are."""
        sites, scales = self._chosen_sites(new, self.recorded["train"].n_contexts)
        return dataclasses.replace(before, sites=sites, column_scales=scales)

    def _chosen_sites(
        self, hooks: Sequence[SiteHooks], n_contexts: int
    ) -> tuple[tuple[Site, ...], dict[str, list[float]]]:
        def probed() -> list[FirstBatch]:
            return self._first_batches(probe_batches(self.settings, n_contexts))

        return choose_sites(self.settings, self.settings.storage_dtype, self.model, hooks, probed)

    def _first_batches(self, n: int) -> list[FirstBatch]:
        """Return the first training batches; waits for their contexts."""
        size = self.settings.contexts_per_batch
        self.progress.wait_for_contexts("train", n * size)
        n_contexts = min(n * size, self.progress.n_contexts("train"))
        tokens, documents = self.blocks["train"].read(0, n_contexts)
        return [(tokens[i : i + size], documents[i : i + size], i) for i in range(0, n_contexts, size)]

    def _write(
        self,
        layout: CacheFormat,
        planner: UnitPlanner,
        bar: RowProgress,
        write: WriteUnits,
        *,
        with_provenance: bool = True,
    ) -> None:
        hooks = [SiteHooks.of(site) for site in layout.sites]
        check_pairing(self.model, hooks, self._first_batches(1)[0][0], self.settings.model)
        files = UnitFiles(self.root, layout, self.number, self.settings.seed, with_provenance)
        maker = RowMaker(self.model, layout.sites, self.row_mask, self.settings.contexts_per_batch)
        try:
            write(files, planner, UnitRows(maker, self.blocks), bar)
        except (ActivationOverflow, NonFiniteActivation) as error:
            raise type(error)(f"{error}. Finished units are kept") from error

    def _facts(self, documents: DocumentStream, reading: Reading, begun: Mapping[str, Any]) -> dict[str, Any]:
        settings = self.settings
        row_filter = settings.model_dump(include=set(RowFilter.model_fields))
        return {
            "model": self.model.identity(begun),
            "text": documents.identity(),
            "packing": {
                "context_length": settings.context_length,
                "bos_token_id": self.model.bos_token_id,
                "separator_token_id": self.model.separator_token_id,
                "contexts_per_batch": settings.contexts_per_batch,
                "row_filter": row_filter,
                "holdout": settings.holdout,
                **reading.as_json(),
            },
        }

    def _refuse_other(self, part: str, opened: Mapping[str, Any]) -> None:
        refuse_other_inputs(str(self.root), {part: self.facts[part]}, {part: opened})

    def _publish(
        self,
        change: Change,
        layout: CacheFormat,
        sizes: Mapping[str, SplitSize],
        bar: RowProgress,
        files: Mapping[str, bytes],
        documents: Mapping[str, Sequence[str]] | None = None,
    ) -> CacheResult:
        bucket_rows = None if self.settings.bucket_rows == "auto" else self.settings.bucket_rows
        previous = self.cache.manifest if self.cache else None
        generation = Generation(
            *(self.root, self.number, change, layout, self.settings.seed, bucket_rows, sizes),
            previous=previous,
            documents=documents or {},
        )
        publish_generation(generation, self.request, self.facts, files)
        cache = open_cache(self.root)
        log_event(self.root, change, seconds=bar.seconds, n_rows=bar.n_new_rows)
        return CacheResult(self.root, cache, warnings_of(cache), bar.n_new_rows, bar.seconds)


def check_pairing(model: LanguageModel, hooks: Sequence[SiteHooks], tokens: np.ndarray, name: str) -> None:
    """Raise ModelError if a layer's captured output is not its MLP of the captured input, within rounding.

    ``tokens`` (contexts, T) are what the model called ``name`` is run on; every site that is wrong is reported.
    """
    captured = model.capture(torch.from_numpy(tokens.astype(np.int64)), hooks)
    wrong = []
    for hook in hooks:
        check = model.compare_pair(hook, captured[hook.hook_in], captured[hook.hook_out])
        if not check.applicable:
            logger.info(
                "%s: pairing check not applicable: no MLP joins its hooks, or its weights are processed", hook.name
            )
        elif check.exact:
            continue
        elif not check.relative_error <= 1e-2 and bool(captured[hook.hook_out].isfinite().all()):
            # NaN is no agreement, but of the model's own NaN storing says more
            wrong.append(
                f"{hook.name}: {hook.hook_out} is not the MLP of {hook.hook_in} (relative error "
                f"{check.relative_error:.2g}) in {name}; give the right pair with --hooks"
            )
        else:
            logger.info("%s: pairs agree within %.1e, not bit for bit", hook.name, check.relative_error)
    if wrong:
        raise ModelError("\n".join(wrong))


def warnings_of(cache: ActivationCache) -> tuple[str, ...]:
    """Return a warning if bad rows of the text were passed over, and for every site with massive activations."""
    return (*bad_row_warnings(cache), *row_warnings(cache))


def bad_row_warnings(cache: ActivationCache) -> tuple[str, ...]:
    """Return how many rows of the text were no documents and were passed over, with the first of them."""
    n_bad = sum(split.counts.get("bad_rows", 0) for split in cache.manifest.splits.values())
    if not n_bad:
        return ()
    first = cache.manifest.packing["bad_rows"]
    rest = "" if n_bad == len(first) else f"\n  and {n_bad - len(first):,} more"
    rows = f"{n_bad:,} rows were no documents and" if n_bad > 1 else "1 row was no document and was"
    return (f"{rows} passed over:" + "".join(f"\n  {problem}" for problem in first) + rest,)


def row_warnings(cache: ActivationCache) -> tuple[str, ...]:
    """Return a warning for every site of which a small share of rows holds much of the output energy, and for every
    side that float16, if it was asked for, rounds to few digits or to zero.
    """
    split = cache.split("train")
    statistics = split.output_statistics()
    return tuple(
        f"{site}: massive activations: {note}; squared error is about those few tokens and little else. Train there "
        "with --max-norm-multiple 10, which leaves them out, or at another layer"
        for site, sums in statistics.items()
        if (note := sums.massive_note())
    ) + tuple(
        f"{site.name}/{side}: half of the rows have a root mean square below {FLOAT16_NORMAL:.1e}, where float16 keeps "
        "few digits or none; make the cache anew with --storage-dtype bfloat16 or float32"
        for site in cache.sites.values()
        for side in site.sides
        if site.dtype == "float16" != cache.manifest.model["dtype"]
        and cache.manifest.request["storage_dtype"] == "float16"
        and split.statistics(site.name, side).median_norm < FLOAT16_NORMAL * site.width(side) ** 0.5
    )
