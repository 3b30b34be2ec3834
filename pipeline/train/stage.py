"""The stage ``pipeline train``: one transcoder, of one site or across layers, from a published cache or live rows.

From a cache it loads no language model. The precision that ``auto`` stands for is part of the request: a draft begun on
a machine with bfloat16 instructions must not be finished in float32 on another.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from tailrace.pipeline.live.settings import LiveSettings
from tailrace.pipeline.shared.compute import Compute, require_linux
from tailrace.pipeline.train.cost import Planned, cost_line
from tailrace.pipeline.train.model_scores import ModelScores
from tailrace.pipeline.train.run_set import BESIDE, RunContext, RunDraft, kind_of, train_beside, train_drafts
from tailrace.pipeline.train.runs_table import RUNS_TABLE
from tailrace.pipeline.train.settings import ModelScoreSettings
from tailrace.pipeline.train.sources import CacheSource, TrainingSource, choose_sites
from tailrace.pipeline.train.warm_start import WarmStart
from tailrace.storage.activation_cache import open_cache, reopen_cache
from tailrace.storage.artifact import MANIFEST, REQUEST, canonical_json, read_json
from tailrace.storage.display import card, share
from tailrace.storage.draft import Draft, Lock, some_of
from tailrace.storage.errors import ActionableError, ArtifactMismatch, DeviceLostError, NoOrdinaryRows, SettingsError
from tailrace.storage.generations import CachePath
from tailrace.storage.names import LOCK, files_below, is_temporary, matching
from tailrace.storage.parsing import read_regular
from tailrace.training.architectures.manifest import (
    CHECKPOINTS,
    MARK,
    METRICS,
    SNAPSHOTS,
    WEIGHTS,
    read_either_manifest,
)
from tailrace.training.loop.checkpoint import Checkpoints
from tailrace.training.loop.cost import check_memory
from tailrace.training.loop.distributed import device_of_process, open_group
from tailrace.training.loop.loggers import RUNS, Logger
from tailrace.training.loop.session import BEST, PeriodicHook, log_sparsity_name
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.loop.shards import refuse_shards

_OF_A_RUN = (
    *(LOCK, REQUEST, MANIFEST, MARK, METRICS, WEIGHTS, BEST),
    *map(log_sparsity_name, (WEIGHTS, BEST)),
    f"{SNAPSHOTS}/[0-9]*.safetensors",
    *BESIDE,
)
"""Files and folders that training may leave in a run's folder."""
_ALONE = (
    "--shard-features: shares the features out to the processes that torchrun starts, and this is the only one; use "
    "torchrun --standalone --nproc-per-node N, or leave it out"
)


@dataclass(frozen=True)
class TrainResult:
    """A published transcoder."""

    path: Path
    metrics: dict[str, Any]
    """``steps``, ``rows``, the last ``train`` losses and the ``heldout`` score over all held-out rows."""

    def __repr__(self) -> str:
        score = self.metrics.get("heldout") or {}
        shown = {"steps": self.metrics["steps"], **{name: score[name] for name in ("fvu", "l0") if name in score}}
        return f"TrainResult({str(self.path)!r}, {', '.join(f'{name}={value}' for name, value in shown.items())})"

    def _repr_html_(self) -> str:
        score = self.metrics.get("heldout") or {}
        facts = {
            "held-out FVU": score.get("fvu"),
            "L0": score.get("l0"),
            "dead": share(score["dead_fraction"]) if "dead_fraction" in score else None,
            "steps": self.metrics["steps"],
            "rows": self.metrics["rows"],
        }
        return card("Transcoder", facts, note=self.path)


def run(
    settings: TrainSettings,
    *,
    output: Path,
    cache: CachePath | None = None,
    live: LiveSettings | None = None,
    compute: Compute = Compute(),
    fresh: bool = False,
    checkpoint_steps: int | None = None,
    hooks: Sequence[tuple[int, PeriodicHook]] = (),
    start_from: Path | None = None,
    model_scores: ModelScoreSettings | None = None,
    model: str | None = None,
    loggers: Callable[[], list[Logger]] = list,
    shard_features: bool = False,
) -> TrainResult:
    """Train on the cache at ``cache``, or on ``live`` rows, and publish the transcoder at ``output``.

    An unfinished run at ``output`` with the same settings is continued, a finished one returned as it is; ``fresh``
    throws an unfinished one away first. ``hooks`` are (every so many steps, hook). ``start_from`` is a transcoder to
    start from. ``model`` says where the cache's language model lies if it moved, for ``model_scores``. ``loggers``
    makes a run's loggers, besides ``metrics.jsonl``. Raises SettingsError with every problem of the settings, and the
    errors of ``tailrace.storage.artifact.Draft`` and of opening what is given.

    Started by torchrun, several processes train the transcoder of a cache together; the first one writes its files.
    With ``shard_features`` each has a slice of the features, else of the rows.
    """
    require_linux("training")
    if compute.has_workers:
        raise SettingsError(
            f"--workers {compute.workers}: workers share the runs of a sweep; several processes train one transcoder "
            "if torchrun starts them"
        )
    compute = replace(compute, device=device_of_process(compute.device_name))
    with checkpoint_named(output), ExitStack() as stack:
        on = stack.enter_context(compute.opened())
        group = open_group(on, shards_features=shard_features)
        if shard_features and group is None:
            raise SettingsError(_ALONE)
        if group is not None:
            on = stack.enter_context(group).device
        if group is not None and live is not None:
            raise SettingsError("live rows come from one process; cache them to train with several")
        if fresh and (group is None or group.is_first):
            discard_draft(output)
        if group is None or group.is_first:
            stack.enter_context(nothing_left_if_refused(output))
        source = stack.enter_context(open_source(cache, live, settings, output, on))
        scores = ModelScores(model_scores or ModelScoreSettings(), source, model=model, device=compute.device_name)
        start = None if start_from is None else WarmStart(start_from)
        context = RunContext(on, scores, start, hooks, loggers, group)
        if group is not None and not group.is_first:
            if group.share_first(None):
                train_beside(source, settings, context, output=output)
            group.share_first(None)  # published
            return TrainResult(output, read_either_manifest(output).metrics.as_json())
        # What was begun is recognised, and what is published returned, before a language model is loaded for it.
        begun = (output / REQUEST).exists()
        sites = None if begun else context.sites(settings, source)
        request = context.request(settings, source)
        draft = stack.enter_context(Draft(output, kind_of(settings), request, discard_with="--fresh"))
        if group is not None:
            group.share_first(not draft.published)
        if not draft.published:
            chosen = context.sites(settings, source) if sites is None else sites
            drafts = {"transcoder": RunDraft(settings, chosen, draft)}
            train_drafts(source, drafts, context, output=output, checkpoint_steps=checkpoint_steps, quiet=compute.quiet)
        if group is not None:
            group.share_first(None)
        Checkpoints(output / CHECKPOINTS).clear()
    return TrainResult(output, read_either_manifest(output).metrics.as_json())


def plan(
    runs: Sequence[TrainSettings], cache: CachePath, compute: Compute = Compute(), *, shard_features: bool = False
) -> str:
    """Return what training ``runs`` side by side on the cache at ``cache`` costs, in a line; write nothing.

    With ``shard_features``, torchrun's processes are to share the features. Raises SettingsError with what does not fit
    the cache, and OutOfMemoryError for a GPU that is too small.
    """
    n_processes = os.environ.get("WORLD_SIZE", "1")
    n_shards = int(n_processes) if shard_features and n_processes.isdecimal() else 1
    if shard_features and n_shards <= 1:
        raise SettingsError(_ALONE)
    with compute.opened() as device:
        opened, first = open_cache(cache), runs[0]
        source = CacheSource(opened, batch_rows=first.batch_rows, order_seed=first.order_seed, device=device)
        n_rows, planned = source.cache.split("train").n_rows, []
        for settings in runs:
            sites = choose_sites(settings, source)
            if shard_features:
                refuse_shards(settings, sites, n_shards)
            widths = [(site.d_in, site.d_out) for site in sites]
            n_steps = settings.n_steps(n_rows, -(-n_rows // settings.batch_rows))
            planned.append(Planned(settings, widths, n_steps))
        check_memory([(run.settings, run.widths) for run in planned], device, n_shards=n_shards)
        return cost_line(planned, device, n_shards=n_shards)


@contextmanager
def open_source(
    cache: CachePath | None, live: LiveSettings | None, settings: TrainSettings, output: Path, device: torch.device
) -> Iterator[TrainingSource]:
    """Yield where rows come from: the cache, or the language model as it runs; raise SettingsError unless one is given.

    The rows of all runs that share it are in the order of ``settings``.
    """
    if (cache is None) == (live is None):
        raise SettingsError("train on a cache or on live rows: give one of them")
    if cache is not None:
        with reopen_cache(cache, output) as opened:
            yield CacheSource(opened, batch_rows=settings.batch_rows, order_seed=settings.order_seed, device=device)
        return
    from tailrace.pipeline.train.live_source import LiveSource  # seconds, which training from a cache does not need

    assert live is not None
    with closing(LiveSource(live, output, batch_rows=settings.batch_rows, device=device)) as source:
        yield source


@contextmanager
def checkpoint_named(output: Path) -> Iterator[None]:
    """Add to the error of a GPU that was lost inside from where the runs at ``output`` will go on."""
    try:
        yield
    except DeviceLostError as error:
        newest = [max(steps) for path in matching(output, f"**/{CHECKPOINTS}") if (steps := Checkpoints(path).steps())]
        step = f"the newest checkpoint is at step {min(newest):,}" if newest else "there is no checkpoint yet"
        raise DeviceLostError(f"{error}. {output}: {step}") from error


@contextmanager
def nothing_left_if_refused(output: Path) -> Iterator[None]:
    """Delete a draft that was begun inside for settings that turn out wrong: it would refuse the right ones.

    What steps have left is kept, whatever is refused after them.
    """
    begun = (output / REQUEST).exists()
    missing = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        yield
    except (SettingsError, NoOrdinaryRows):
        if not begun:
            with suppress(ActionableError, OSError):  # the refusal is reported
                if not _holds_work(output):
                    discard_draft(output)
            for folder in missing:
                with suppress(OSError):
                    folder.rmdir()
        raise


def _holds_work(path: Path) -> bool:
    """Return whether training has left anything at ``path``: weights, a checkpoint, a line of metrics, a run's end."""
    if any(matching(path, f"**/{name}") for name in (MANIFEST, MARK, "*.safetensors")):
        return True
    return any(log.stat().st_size for log in matching(path, f"**/{METRICS}"))


def discard_draft(path: Path) -> None:
    """Delete an unfinished run, so that the next one starts from nothing.

    Raises ArtifactMismatch where something published lies, a request that no run wrote, or a file that is no part of a
    run: a flag never deletes these.
    """
    if not (path / REQUEST).exists():
        return
    if (path / MANIFEST).exists():
        raise ArtifactMismatch(f"{path}: is published; delete it yourself, or choose another path, to train anew")
    if not _is_run(path / REQUEST):
        raise ArtifactMismatch(f"{path}: its {REQUEST} is not that of a run, so it is left alone; choose another path")
    if others := _files_of_others(path):
        raise ArtifactMismatch(
            f"{path}: holds files that are no part of a run: {some_of(others)}. Nothing was deleted: move them "
            "away and run the same command again, or choose another path"
        )
    lock = Lock(path)
    try:
        # The request goes last: a deletion that is cut short is still recognised as a draft.
        leftovers = [entry for entry in path.iterdir() if entry.name not in (LOCK, REQUEST)]
        for entry in [*leftovers, path / REQUEST]:
            if entry.is_symlink() and entry.name == CHECKPOINTS:
                Checkpoints(entry).clear()
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    except BaseException:
        lock.release()
        raise
    lock.remove()


def _files_of_others(path: Path) -> list[Path]:
    """Return the files below a run's draft, or below a sweep's, that training did not write, as ``publish`` does."""
    request = read_json(path / REQUEST)
    names = request.get("runs") if isinstance(request, dict) else None
    runs = {path / RUNS / name for name in (names if isinstance(names, dict) else ())}
    others = []
    for folder, known in [(path, (*_OF_A_RUN, RUNS_TABLE)), *((run, _OF_A_RUN) for run in sorted(runs))]:
        for file in files_below(folder, but=runs.__contains__):
            name = file.relative_to(folder)
            parts = [str(part) for part in (name, *name.parents)]
            if not is_temporary(name.name) and not any(fnmatchcase(part, one) for part in parts for one in known):
                others.append(file.relative_to(path))
    return others


def _is_run(request: Path) -> bool:
    """Tell whether a draft of a run, or of a sweep of runs, wrote its request."""
    content = read_json(request)
    settings = content.get("settings") if isinstance(content, dict) else None
    is_run = (isinstance(settings, dict) and "steps" in settings) or (isinstance(content, dict) and "runs" in content)
    return is_run and read_regular(request) == canonical_json(content)
