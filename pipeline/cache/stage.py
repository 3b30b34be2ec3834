"""The stage ``pipeline cache``: text in, a published activation cache out.

Contexts are packed and committed first, in a thread; the language model runs over them on a fixed grid; rows are
shuffled and written unit by unit beside it. Killed at any moment, the same command continues and ends with the same
bytes.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tailrace.pipeline.cache.context_packing import ContextPacker, PackingProgress
from tailrace.pipeline.cache.draft import (
    PackingThread,
    UnitPlanner,
    begin_draft,
    forget_draft,
    forget_finished_draft,
    keep_plan,
    log_event,
    nothing_left_behind,
    recall_plan,
    write_units,
)
from tailrace.pipeline.cache.plan import (
    CachePlan,
    choose_dtypes,
    choose_scales,
    complete_format,
    context_format,
    fixed_dtype,
    probe,
    probe_batches,
)
from tailrace.pipeline.cache.rows import RowProducer
from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.cache.workers import WorkerJob, Workers, write_units_on_workers
from tailrace.pipeline.model.language_model import LanguageModel, load_language_model
from tailrace.pipeline.model.sites import SiteHooks
from tailrace.pipeline.shared.device import limited_threads
from tailrace.pipeline.shared.progress import RowProgress
from tailrace.pipeline.text.dataset import open_documents
from tailrace.pipeline.text.holdout import HoldoutRule
from tailrace.pipeline.text.packing import ContextSource
from tailrace.pipeline.text.settings import RowFilter
from tailrace.pipeline.text.stream import DocumentStream
from tailrace.storage.activation_cache import ActivationCache, open_cache
from tailrace.storage.artifact import canonical_json, read_json
from tailrace.storage.cache_format import KIND, SPLITS, VOCABULARY
from tailrace.storage.cache_publish import Generation, SplitSize, publish_generation
from tailrace.storage.cache_writer import remove_temporary_files
from tailrace.storage.context_blocks import ContextBlocks
from tailrace.storage.draft import Draft
from tailrace.storage.errors import ArtifactMismatch, ModelError, OutOfMemoryError, TextError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheResult:
    """A published cache and what should be said about it."""

    path: Path
    cache: ActivationCache
    warnings: tuple[str, ...]
    n_new_rows: int
    seconds: float


def run(
    settings: CacheSettings,
    *,
    output: Path,
    device: str = "cpu",
    threads: int | None = None,
    compile_model: bool = False,
    workers: Workers | None = None,
    quiet: bool = False,
) -> CacheResult:
    """Write the cache that ``settings`` describe to ``output``; continue an unfinished one, return a finished one.

    Raises SettingsError, TextError, ModelError, ArtifactMismatch, ArtifactBusy, NonFiniteActivation,
    ActivationOverflow or StorageFull; finished units are kept whatever happens.
    """
    with limited_threads(threads), Draft(output, KIND, settings.request()) as draft:
        if draft.published:
            return _finished(settings, output)
        remove_temporary_files(output)
        with nothing_left_behind(output):
            model = load_language_model(settings, device=device, compile_model=compile_model)
            documents = open_documents(settings, settings.seed)
            job = CacheJob(settings, output, model, documents, device, threads, compile_model, quiet)
            try:
                return job.run(draft, workers)
            except OutOfMemoryError as error:
                # not on the same path: rows of two batch sizes differ in their last bits
                raise OutOfMemoryError(f"{error}, with --contexts-per-batch and another --out") from error


def _finished(settings: CacheSettings, output: Path) -> CacheResult:
    cache = open_cache(output)
    forget_finished_draft(output, cache.generation)
    rows = [open_cache(output, number).split("train").n_rows for number in range(cache.generation + 1)]
    is_there = dataset_ended(output, cache.generation) if settings.tokens == "all" else settings.tokens in rows
    if not is_there:
        raise ArtifactMismatch(
            f"{output}: is a finished cache of {rows[-1]:,} training rows, {settings.tokens} asked for; "
            "use `pipeline extend` to add rows, or another --out"
        )
    return unchanged(cache)


def unchanged(cache: ActivationCache) -> CacheResult:
    """Return the result of a stage that found everything done."""
    return CacheResult(cache.path, cache, massive_warnings(cache), 0, 0.0)


class CacheJob:
    """One run of the stage, from an open draft to a published cache."""

    def __init__(
        self,
        settings: CacheSettings,
        root: Path,
        model: LanguageModel,
        documents: DocumentStream,
        device: str,
        threads: int | None,
        compile_model: bool,
        quiet: bool,
    ) -> None:
        self.settings, self.root, self.model, self.documents = settings, root, model, documents
        self.device, self.threads, self.compile_model, self.quiet = device, threads, compile_model, quiet
        self.hooks = model.resolve_sites(settings.layers, settings.hooks)
        self.contexts = context_format(settings)
        self.row_mask = settings.rows_of(model)
        self.progress = PackingProgress(settings.contexts_per_batch)
        self.rule = HoldoutRule.parse(settings.holdout, settings.seed)
        splits = SPLITS if self.rule.holds_out else SPLITS[:1]
        self.blocks = {split: ContextBlocks(root, self.contexts, 0, split) for split in splits}

    def run(self, draft: Draft, workers: Workers | None) -> CacheResult:
        """Pack, compute, write and publish."""
        facts = begin_draft(self.root, "cache", 0, self._facts())
        packer = ContextPacker(self.root, self.contexts, self.blocks, self.row_mask)
        packer.restore()
        packer.report(self.progress)
        target = None if self.settings.tokens == "all" else self.settings.tokens
        source = self._source(packer.state, {"train": target})

        def check() -> None:
            check_enough_rows(self.progress, source, target, self.settings.dataset)

        with (
            PackingThread(packer, source, self.progress, check),
            RowProgress(target, quiet=self.quiet, title="caching") as bar,
        ):
            plan = self._plan(target, facts)
            producer = RowProducer(
                self.model, plan.hooks, plan.layout, self.blocks, self.row_mask, self.settings.contexts_per_batch
            )
            check_pairing(self.model, plan.hooks, self._batches(1)[0][0], self.settings.model)
            targets = {split: target if split == "train" else None for split in self.blocks}
            planner = UnitPlanner(self.progress, plan.layout, self.settings.contexts_per_batch, targets)
            self._write(plan, planner, producer, bar, workers)
            self.progress.wait_until_done()
            sizes = {
                split: SplitSize(planner.n_rows(split), self.progress.n_contexts(split), source.counts[split])
                for split in self.blocks
            }
            result = self._publish(draft, plan, sizes, packing_state(source), bar)
        forget_draft(self.root)
        return result

    def _write(
        self, plan: CachePlan, planner: UnitPlanner, producer: RowProducer, bar: RowProgress, workers: Workers | None
    ) -> None:
        if workers is None:
            write_units(self.root, plan, planner, producer, bar, generation=0, seed=self.settings.seed)
            return
        job = WorkerJob(
            root=str(self.root.resolve()),
            settings=self.settings.model_dump_json(),
            plan=json.dumps(plan.as_json()),
            generation=0,
            seed=self.settings.seed,
            with_provenance=True,
            device=self.device,
            threads=workers.model_threads,
            compile_model=self.compile_model,
        )
        write_units_on_workers(workers, job, planner, bar, self.root)

    def _source(self, state: Any, targets: Mapping[str, int | None]) -> ContextSource:
        return ContextSource.of(self.settings, self.model, self.documents, targets, state)

    def _batches(self, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the first training batches, as (tokens, kept positions)."""
        size = self.settings.contexts_per_batch
        self.progress.wait_for_contexts("train", n * size)
        n_contexts = min(n * size, self.progress.n_contexts("train"))
        tokens, _ = self.blocks["train"].read(0, n_contexts)
        pieces = [tokens[start : start + size] for start in range(0, n_contexts, size)]
        return [(piece, self.row_mask(piece)) for piece in pieces]

    def _plan(self, target: int | None, facts: dict[str, Any]) -> CachePlan:
        plan = recall_plan(self.root)
        if plan is not None:
            return plan
        if target is None:
            self.progress.wait_until_done()
        n_rows = target or self.progress.n_rows("train")
        fixed = fixed_dtype(self.settings.storage_dtype, self.model.dtype)
        seen = None
        if fixed in (None, "int8"):
            n_contexts = -(-n_rows // max(1, self.settings.context_length - 1))
            seen = probe(self.model, self.hooks, self._batches(probe_batches(self.settings, n_contexts)))
        dtypes = choose_dtypes(self.hooks, fixed, seen)
        scales = choose_scales(self.hooks, dtypes, seen)
        widths = self.model.widths(self.hooks)
        layout = complete_format(self.settings, self.contexts, self.hooks, widths, dtypes, scales, n_rows)
        plan = CachePlan(layout, tuple(self.hooks), facts)
        keep_plan(self.root, plan)
        return plan

    def _facts(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "model": self.model.identity(),
            "text": self.documents.identity(),
            "packing": {
                "context_length": settings.context_length,
                "bos_token_id": self.model.bos_token_id,
                "separator_token_id": self.model.separator_token_id,
                "contexts_per_batch": settings.contexts_per_batch,
                "row_filter": RowFilter.model_validate(
                    settings.model_dump(include=set(RowFilter.model_fields))
                ).model_dump(mode="json"),
                "holdout": settings.holdout,
            },
        }

    def _publish(
        self, draft: Draft, plan: CachePlan, sizes: Mapping[str, SplitSize], state: bytes, bar: RowProgress
    ) -> CacheResult:
        bucket_rows = None if self.settings.bucket_rows == "auto" else self.settings.bucket_rows
        generation = Generation(
            self.root, 0, "create", plan.layout, self.settings.seed, bucket_rows, sizes, previous=None
        )
        files = {
            VOCABULARY: canonical_json({"tokens": self.model.vocabulary()}),
            packing_state_name(0): state,
        }
        publish_generation(generation, draft.request, plan.facts, files)
        cache = open_cache(self.root)
        rate = bar.n_new_rows / max(bar.seconds, 1e-9)
        log_event(self.root, "published", seconds=bar.seconds, tokens_per_second=rate, pid=os.getpid())
        return CacheResult(self.root, cache, massive_warnings(cache), bar.n_new_rows, bar.seconds)


def packing_state_name(generation: int) -> str:
    """Return the file that says where packing stands after a generation."""
    return f"packing/{generation}.json"


def packing_state(source: ContextSource) -> bytes:
    """Return what that file holds: the source's state, and whether it stopped because the dataset ended."""
    return canonical_json({"finished": source.finished, "state": source.state})


def last_packing(root: Path, generation: int) -> dict[str, Any]:
    """Return where packing stands at a generation, as the last one that packed anything left it."""
    packed = [root / packing_state_name(number) for number in range(generation + 1)]
    return dict(read_json([path for path in packed if path.exists()][-1]))


def dataset_ended(root: Path, generation: int) -> bool:
    """Return whether a generation holds every context of its dataset."""
    return bool(last_packing(root, generation)["finished"] == "dataset")


def check_enough_rows(progress: PackingProgress, source: ContextSource, target: int | None, dataset: str) -> None:
    """Raise TextError if the dataset ended before ``target`` training rows were packed."""
    n_rows = progress.n_rows("train")
    if n_rows == 0:
        raise TextError(
            f"{dataset}: gives no training row at all: its documents do not fill a single context "
            f"({source.counts['train']}). Use a shorter --context-length, or more text"
        )
    if target is not None and n_rows < target:
        raise TextError(
            f"{dataset}: ends after {n_rows:,} training rows, {target:,} asked for. Everything so far is kept: run the "
            f"same command with --tokens {n_rows} (or --tokens all), or start anew with more text"
        )


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
        elif not check.exact and check.relative_error > 1e-2:
            wrong.append(
                f"{hook.name}: {hook.hook_out} is not the MLP of {hook.hook_in} (relative error "
                f"{check.relative_error:.2g}) in {name}; give the right pair with --hooks"
            )
        elif not check.exact:
            logger.info("%s: pairs agree within %.1e, not bit for bit", hook.name, check.relative_error)
    if wrong:
        raise ModelError("\n".join(wrong))


def massive_warnings(cache: ActivationCache) -> tuple[str, ...]:
    """Return a warning for every site of which a small share of rows holds much of the output energy."""
    statistics = cache.split("train").output_statistics()
    return tuple(
        f"{site}: massive activations: {note}; squared error is about those few tokens and little else. Train there "
        "with --max-norm-multiple 10, which leaves them out, or at another layer"
        for site, sums in statistics.items()
        if (note := sums.massive_note())
    )
