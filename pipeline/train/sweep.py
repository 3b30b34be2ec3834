"""Sweeps: many settings trained side by side from one reading of the rows.

Every run lies in ``runs/<name>`` of the sweep and is the transcoder that ``pipeline train`` would have made of its
settings, byte for byte. A run whose loss or weights stop being finite, or that has no row to learn from, leaves a mark
and keeps its last checkpoints; the others go on. The sweep is published when all have ended, with one row for each in
``runs.parquet``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tailrace.pipeline.artifacts.manifests import RunRecord, SweepManifest
from tailrace.pipeline.live.settings import LiveSettings
from tailrace.pipeline.shared.compute import Compute, require_linux
from tailrace.pipeline.shared.worker_processes import completed, open_workers
from tailrace.pipeline.train.grid import SHARED
from tailrace.pipeline.train.model_scores import ModelScores
from tailrace.pipeline.train.run_set import RunContext, RunDraft, has_ended, kind_of, read_mark, train_drafts
from tailrace.pipeline.train.runs_table import DIVERGED, FINISHED, RUNS_TABLE, RunOutcome, write_runs
from tailrace.pipeline.train.settings import ModelScoreSettings
from tailrace.pipeline.train.sources import TrainingSource, known_problems
from tailrace.pipeline.train.stage import checkpoint_named, discard_draft, nothing_left_if_refused, open_source
from tailrace.pipeline.train.warm_start import WarmStart
from tailrace.storage.artifact import MANIFEST, REQUEST
from tailrace.storage.cache_format import Site
from tailrace.storage.display import card, share, table
from tailrace.storage.draft import Draft
from tailrace.storage.errors import NonFiniteActivation, SettingsError
from tailrace.storage.formats import ARTIFACT_FORMATS
from tailrace.storage.generations import CachePath
from tailrace.storage.names import inside
from tailrace.training.architectures.manifest import CHECKPOINTS, MARK, read_either_manifest
from tailrace.training.architectures.transcoder import describe_versions
from tailrace.training.loop.checkpoint import Checkpoints
from tailrace.training.loop.loggers import Logger
from tailrace.training.loop.session import PeriodicHook
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.loop.train_all import continued_together

KIND = SweepManifest.of_kind
FORMAT_VERSION = ARTIFACT_FORMATS[KIND]
RUNS = "runs"
"""Folder of the runs."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepResult:
    """A published sweep."""

    path: Path
    runs: list[RunOutcome]

    def _repr_html_(self) -> str:
        rows = [run.row() for run in self.runs]
        listed = table(
            ("run", "", "held-out FVU", "L0", "dead"),
            (
                (row["name"], row["status"], row["heldout_fvu"], row["heldout_l0"], share(row["heldout_dead_fraction"]))
                for row in rows
            ),
        )
        return card("Sweep", {"runs": len(rows)}, listed, note=self.path)


def run(
    runs: Mapping[str, TrainSettings],
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
) -> SweepResult:
    """Train ``runs``, by name, on the same batches and publish the sweep at ``output``.

    The other arguments are those of ``tailrace.pipeline.train.stage.run``, for all runs. Raises SettingsError with
    every problem of every run before anything is written, NonFiniteActivation if all runs diverge, and what
    ``tailrace.pipeline.train.stage.run`` does.
    """
    require_linux("training")
    check_shared(runs)
    if compute.has_workers and (live is not None or hooks):
        raise SettingsError(f"--workers {compute.workers}: not with live rows or hooks, which one process has; use 0")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SettingsError("a sweep trains in one process; start one run with torchrun, or the sweep without it")
    with checkpoint_named(output), compute.opened() as on, ExitStack() as stack:
        if fresh:
            discard_draft(output)
        stack.enter_context(nothing_left_if_refused(output))
        source = stack.enter_context(open_source(cache, live, next(iter(runs.values())), output, on))
        scores = ModelScores(model_scores or ModelScoreSettings(), source, model=model, device=compute.device_name)
        context = RunContext(on, scores, None if start_from is None else WarmStart(start_from), hooks, loggers)
        begun = (output / REQUEST).exists()
        sites = None if begun else _choose_sites(runs, context, source)
        requests = {name: context.request(settings, source) for name, settings in runs.items()}
        sweep = stack.enter_context(
            Draft(output, KIND, {"format": FORMAT_VERSION, "runs": requests}, discard_with="--fresh")
        )
        if not sweep.published:
            every = _Share(runs, requests, sites, output, compute, checkpoint_steps)
            if compute.has_workers:
                assert cache is not None, "workers read a cache"
                shares = [(share, cache, start_from, model_scores, model, loggers) for share in every.cut()]
                with open_workers(compute.workers) as submit:
                    for _ in completed(submit, _train_in_worker, shares):
                        pass
            drafts = every.train(source, context, stack)
            _publish(sweep, drafts)
        for folder in (output, *(output / RUNS / name for name in runs)):
            if (folder / MANIFEST).exists():
                Checkpoints(folder / CHECKPOINTS).clear()
    return read_result(output)


@dataclass(frozen=True)
class _Share:
    """Some runs of a sweep, and what it takes to train them here or in a worker."""

    runs: Mapping[str, TrainSettings]
    requests: Mapping[str, Mapping[str, Any]]
    sites: Mapping[str, Sequence[Site]] | None
    """None if they were chosen in an earlier process, and are not known here."""
    output: Path
    """Of the sweep."""
    compute: Compute
    checkpoint_steps: int | None

    def train(self, source: TrainingSource, context: RunContext, stack: ExitStack) -> dict[str, Draft]:
        """Train the runs that have not ended, from where they were left; return the drafts of all, held by ``stack``.

        Runs that can go on from a common step are trained side by side.
        """
        drafts = {
            name: stack.enter_context(Draft(self._folder(name), kind_of(self.runs[name]), request, inside=True))
            for name, request in self.requests.items()
        }
        unfinished = {name: draft for name, draft in drafts.items() if not has_ended(draft)}
        if not unfinished:
            return drafts
        chosen = _choose_sites(self.runs, context, source) if self.sites is None else self.sites
        steps = {name: Checkpoints(draft.path / CHECKPOINTS).steps() for name, draft in unfinished.items()}
        for group in continued_together(steps):
            train_drafts(
                source,
                {name: RunDraft(self.runs[name], chosen[name], unfinished[name]) for name in group},
                context,
                output=self.output,
                checkpoint_steps=self.checkpoint_steps,
                quiet=self.compute.quiet,
                others_go_on=True,
            )
        return drafts

    def cut(self) -> list[_Share]:
        """Return the runs that have not ended in shares for workers: those that go on from one step, dealt in turn."""
        left = [name for name in self.runs if not any((self._folder(name) / end).exists() for end in (MANIFEST, MARK))]
        steps = {name: Checkpoints(self._folder(name) / CHECKPOINTS).steps() for name in left}
        shares = []
        for group in continued_together(steps) if left else []:
            for first in range(min(self.compute.workers, len(group))):
                names = group[first :: self.compute.workers]
                own = {name: self.runs[name] for name in names}
                shares.append(replace(self, runs=own, requests={name: self.requests[name] for name in names}))
        return shares

    def _folder(self, name: str) -> Path:
        return self.output / RUNS / name


def _train_in_worker(
    share: _Share,
    cache: CachePath,
    start_from: Path | None,
    model_scores: ModelScoreSettings | None,
    model: str | None,
    loggers: Callable[[], list[Logger]],
) -> None:
    """Train a share in the process that this is a task of, on its device."""
    share = replace(share, compute=share.compute.in_worker())
    with share.compute.opened() as on, ExitStack() as stack:
        first = next(iter(share.runs.values()))
        source = stack.enter_context(open_source(cache, None, first, share.output, on))
        name = share.compute.device_name
        scores = ModelScores(model_scores or ModelScoreSettings(), source, model=model, device=name)
        start = None if start_from is None else WarmStart(start_from)
        share.train(source, RunContext(on, scores, start, loggers=loggers), stack)


def check_shared(runs: Mapping[str, TrainSettings]) -> None:
    """Raise SettingsError unless there are runs, and all of them read the same batches."""
    if not runs:
        raise SettingsError("a sweep of no runs; give --sweep NAME=VALUE,VALUE or --sweep-file")
    problems = []
    for name in SHARED:
        values = sorted({getattr(settings, name) for settings in runs.values()})
        if len(values) > 1:
            problems.append(f"{name}: all runs share one stream of batches, which it decides; got {values}")
    if problems:
        raise SettingsError("this sweep cannot be run:\n" + "\n".join(f"  {line}" for line in problems))


def _choose_sites(
    runs: Mapping[str, TrainSettings], context: RunContext, source: TrainingSource
) -> dict[str, list[Site]]:
    """Return every run's sites; raise SettingsError with every problem of every run."""
    if not source.is_loaded:
        early = [f"{name}: {line}" for name, settings in runs.items() for line in known_problems(settings, source)]
        if early:  # told before a language model is loaded for a run that is right
            raise SettingsError("\n".join(early))
    sites, problems = {}, []
    for name, settings in runs.items():
        try:
            sites[name] = context.sites(settings, source)
        except SettingsError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise SettingsError("\n".join(problems))
    return sites


def _publish(sweep: Draft, drafts: Mapping[str, Draft]) -> None:
    outcomes = [_outcome(name, draft) for name, draft in drafts.items()]
    if all(outcome.status == DIVERGED for outcome in outcomes):
        reasons = "\n".join(f"  {read_mark(draft.path / MARK)['reason']}" for draft in drafts.values())
        raise NonFiniteActivation(
            f"{sweep.path}: all {len(outcomes)} runs diverged, so there is nothing to publish; start with --fresh and "
            f"settings that these reasons ask for, or verify the cache:\n{reasons}"
        )
    write_runs(sweep.path / RUNS_TABLE, outcomes)
    digests = {
        outcome.name: read_either_manifest(sweep.path / outcome.path).digest
        for outcome in outcomes
        if outcome.status == FINISHED
    }
    sweep.publish(
        {
            "format": FORMAT_VERSION,
            **_described(sweep.path, outcomes),
            "runs": [
                {
                    "name": outcome.name,
                    "status": outcome.status,
                    "path": outcome.path,
                    "digest": digests.get(outcome.name),
                }
                for outcome in outcomes
            ],
            "versions": describe_versions(),
        },
        [RUNS_TABLE],
        beside=[CHECKPOINTS],
    )


def _described(path: Path, outcomes: Sequence[RunOutcome]) -> dict[str, Any]:
    """Return what the runs say of their common rows: the model is not loaded again for it."""
    finished = next(outcome for outcome in outcomes if outcome.status == FINISHED)
    manifest = read_either_manifest(path / finished.path)
    return {"inputs": manifest.inputs.as_json(), "model": manifest.model}


def _outcome(name: str, draft: Draft) -> RunOutcome:
    status = FINISHED if draft.published else DIVERGED
    run = RunRecord(name=name, status=status, path=f"{RUNS}/{name}", digest=None)
    return _read_outcome(draft.path.parent.parent, run, draft.request["settings"])


def read_result(path: Path) -> SweepResult:
    """Return what a published sweep says. Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch."""
    manifest = SweepManifest.read(path)
    requests = manifest.request["runs"]
    return SweepResult(path, [_read_outcome(path, run, requests[run.name]["settings"]) for run in manifest.runs])


def _read_outcome(sweep: Path, run: RunRecord, settings: dict[str, Any]) -> RunOutcome:
    name, status, path = run.name, run.status, run.path
    if status == DIVERGED:
        return RunOutcome(name, status, path, settings, read_mark(inside(sweep, f"{path}/{MARK}")))
    made = read_either_manifest(inside(sweep, f"{path}/{MANIFEST}").parent)
    sites = ",".join(site.name for site in made.sites)
    return RunOutcome(name, status, path, {**settings, "site": sites}, made.metrics.as_json())
