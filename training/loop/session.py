"""One run and its directory: what is written between steps, and what is left at the end.

Everything in ``metrics.jsonl`` and the weights is a function of settings and cache; rates and times go to
``timing.jsonl``. When checkpoints are written depends on the clock too, and must not matter: continuing from any of
them gives the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from tailrace.storage.artifact import FileRecord, check_files, describe_files
from tailrace.storage.errors import ArtifactCorrupt, SettingsError
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.manifest import CHECKPOINTS, METRICS, SNAPSHOTS, WEIGHTS
from tailrace.training.architectures.transcoder import save_weights, write_tensors
from tailrace.training.loop.checkpoint import CheckpointClock, CheckpointWriter, RunCheckpoint
from tailrace.training.loop.evaluate import HeldoutScore
from tailrace.training.loop.firing_frequency import LOG_SPARSITY, FiringWindow
from tailrace.training.loop.loggers import Logger
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.run_log import Extent, RunLog
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.loop.step_metrics import native_metrics, reference_metrics
from tailrace.training.rows.batches import BatchStream, SiteBatches

logger = logging.getLogger(__name__)

BEST = "best.safetensors"
"""The weights with the lowest held-out FVU, where they are kept."""

N_RESAMPLED = "resampled_features"
"""What a resampler calls the number of features it has resampled since the start."""

HeldoutBatches = Callable[[int | None], Iterable[SiteBatches]]
"""Given a largest number of rows (None: all), returns raw held-out batches."""


class PeriodicHook(Protocol):
    """What the caller wants done now and then, such as measuring the language model with the transcoder in place."""

    def __call__(self, step: int, transcoder: Transcoder, /) -> Mapping[str, float] | None:
        """Look at ``transcoder``, a folded copy as it would be published after ``step`` steps; return what to log."""
        ...


@dataclass(frozen=True)
class StepCallback:
    """An action after the steps for which ``due`` holds; it gets the number of steps done."""

    due: Callable[[int], bool]
    action: Callable[[int], None]


def every(n: int, last: int | None = None) -> Callable[[int], bool]:
    """Return a rule that holds after every ``n``-th step, and after step ``last``."""
    return lambda step: step % n == 0 or step == last


class Session:
    """Keeps one run's logs, checkpoints and snapshots, and writes its results. A context manager.

    ``loggers`` get every number that ``metrics.jsonl`` gets. Raises SettingsError if the best weights are wanted where
    there are no held-out rows to tell them by.
    """

    def __init__(
        self,
        directory: Path,
        run: TrainingRun,
        settings: TrainSettings,
        *,
        n_steps: int,
        heldout: HeldoutBatches | None,
        checkpoint_steps: int | None = None,
        hooks: Sequence[tuple[int, PeriodicHook]] = (),
        loggers: Sequence[Logger] = (),
        finish: Callable[[], None] | None = None,
    ) -> None:
        if settings.keep_best and heldout is None:
            raise SettingsError(
                f"{directory}: keep_best needs held-out rows, and there are none; leave it out, or cache with --holdout"
            )
        self.run = run
        self._intervals = settings.intervals(n_steps)
        run.wants_rows = every(self._intervals.log_every, n_steps)
        self.n_steps = n_steps
        self.finish = finish
        """Called once, after the last step; None: nothing."""
        self.scores: dict[str, Any] = {}
        self.directory = directory
        self._settings = settings
        self._heldout = heldout
        self._checkpoint_steps = checkpoint_steps
        self._hooks = hooks
        self._loggers = loggers
        self._checkpoints = run.checkpoints(directory / CHECKPOINTS)
        n_features, device = len(run.firing.steps_since_fired), run.transcoder.W_enc.device
        self._window = FiringWindow(n_features, settings.feature_sampling_window, device)
        self._n_resampled_logged = 0.0
        self._checkpoint: Future[None] | None = None
        self._log: RunLog | None = None
        self.written: dict[str, Any] = {}
        """What ``describe_files`` said of the run's files when they were written."""

    def checkpoint_steps(self) -> list[int]:
        """Return the steps this run could be continued from, ascending: those whose snapshots are as they were written.

        Raises ArtifactCorrupt where there are checkpoints, and none of them comes before the damage.
        """
        steps = self._checkpoints.steps()
        problems = {step: self._damaged_snapshots(step) for step in steps}
        for step, lines in problems.items():
            for problem in lines:
                logger.warning("%s; the run goes on from before step %d", problem, step)
        if steps and all(problems.values()):
            raise ArtifactCorrupt(f"{problems[steps[0]][0]}; restore it, or begin anew with --fresh or at another path")
        return [step for step in steps if not problems[step]]

    def _damaged_snapshots(self, step: int) -> list[str]:
        try:
            written = self._checkpoints.state(step).get("written", {})
        except ArtifactCorrupt:
            return []  # which ``resume`` says
        # the best weights may be those of a later step, which comes again
        snapshots = {name: FileRecord(**file) for name, file in written.items() if name.startswith(f"{SNAPSHOTS}/")}
        return check_files(self.directory, snapshots)

    def resume(self, step: int | None) -> Mapping[str, Any] | None:
        """Continue from the checkpoint at ``step``, or begin where it is None; return the stream's state there."""
        # Newer ones, of a run that was ahead, would push out those that it has in common with the others.
        self._checkpoints.discard_after(-1 if step is None else step)
        extent, stream_state = Extent(), None
        if step is not None:
            checkpoint = self._checkpoints.load(step)
            state = checkpoint.state
            self.run.load_state(checkpoint.tensors, state["run"], n_steps_done=step, n_rows_done=state["rows"])
            self._window.load_state(checkpoint.tensors)
            self._n_resampled_logged = state["n_resampled_logged"]
            extent = Extent(state["metrics_bytes"], state.get("metrics_checksum"))
            self.scores, stream_state = state["scores"], state["stream"]
            self.written = state.get("written", {})
            logger.info("continuing at step %d of %d", step, self.n_steps)
        self._log = RunLog(
            self.directory,
            loggers=self._loggers,
            run_name=self.directory.absolute().name,
            config=self._settings.model_dump(mode="json"),
            first_step=self.run.n_steps_done,
            first_row=self.run.n_rows_done,
            extent=extent,
        )
        return stream_state

    def callbacks(
        self, stream: BatchStream, clock: CheckpointClock | None = None, writer: CheckpointWriter | None = None
    ) -> list[StepCallback]:
        """Return what is due between steps.

        A look at the weights comes first: one that is not finite would be scored and, after the last step, published.
        The checkpoint comes last, so that it holds all that was logged before.

        ``clock`` and ``writer`` are those of all runs on the stream; by default of this one alone.
        """
        settings = self._settings
        self._writer = CheckpointWriter(torch.device("cpu")) if writer is None else writer
        clock = CheckpointClock(self._checkpoint_steps) if clock is None else clock
        callbacks = [
            StepCallback(self._is_scored, lambda _: self._refuse_non_finite_weights()),
            StepCallback(every(1), self._count_firings),
            StepCallback(every(self._intervals.log_every, self.n_steps), self._log_training),
        ]
        if self._heldout is not None:
            callbacks.append(StepCallback(every(self._intervals.evaluate_every, self.n_steps), self._evaluate))
        callbacks += [StepCallback(every(n, self.n_steps), self._call(hook)) for n, hook in self._hooks]
        snapshots = snapshot_steps(settings.snapshots, self.n_steps)
        callbacks += [
            StepCallback(snapshots.__contains__, self._save_snapshot),
            # None after the last step: the results themselves follow at once.
            StepCallback(
                lambda step: step != self.n_steps and clock.is_due(step),
                lambda step: self._save_checkpoint(step, stream, clock),
            ),
        ]
        return callbacks

    def _is_scored(self, step: int) -> bool:
        intervals = [self._intervals.evaluate_every, *(n for n, _ in self._hooks)]
        return step == self.n_steps or any(step % n == 0 for n in intervals)

    def _refuse_non_finite_weights(self) -> None:
        self.run.state_tensors()

    def export(self) -> list[str]:
        """Write the final weights; return the names of the files that make up the artifact."""
        assert self._log is not None, "a session is resumed before it is exported"
        self._wait_for_checkpoint()
        logged = self._log.commit()
        self.written[METRICS] = {"bytes": logged.n_bytes, "checksum": f"xxh3:{logged.checksum}"}
        files = [WEIGHTS, *(snapshot_name(step) for step in snapshot_steps(self._settings.snapshots, self.n_steps))]
        if "best" in self.scores:
            files.append(BEST)
        self._save(WEIGHTS)
        return [METRICS, *files, *map(log_sparsity_name, files)]

    def summary(self) -> dict[str, Any]:
        """Return the final numbers: steps, rows, last training losses, held-out score."""
        return {"steps": self.run.n_steps_done, "rows": self.run.n_rows_done, **self.scores}

    def _count_firings(self, step: int) -> None:
        assert self.run.latest is not None
        completed = self._window.update(self.run.latest.n_active, self.run.latest.n_rows)
        if completed or step == self.n_steps:
            self._write(step, "features", self._window.record())

    def _log_training(self, step: int) -> None:
        run, latest, settings = self.run, self.run.latest, self._settings
        assert latest is not None
        assert self._log is not None
        n_resampled = run.latest_extras.get(N_RESAMPLED, 0.0)
        native = native_metrics(
            latest,
            run.firing,
            lr=run.latest_lr,
            dead_after_steps=settings.dead_after_steps,
            extras=run.latest_extras,
        )
        reference = reference_metrics(
            latest,
            run.firing,
            self._window,
            lr=run.latest_lr,
            n_rows_done=run.n_rows_done,
            n_resampled=round(n_resampled - self._n_resampled_logged),
            dead_after_steps=settings.dead_after_steps,
            dead_feature_threshold=settings.dead_feature_threshold,
        )
        self._n_resampled_logged = n_resampled
        self._write(step, "train", {**native, **reference})
        self.scores["train"] = native
        self._log.write_timing(step, run.n_rows_done, self.n_steps)

    def _evaluate(self, step: int) -> None:
        score = self._score(None if step == self.n_steps else self._intervals.evaluation_rows)
        record = score.record()
        self._write(step, "heldout", {**record, "log10_frequency": score.log10_frequency})
        self.scores["heldout"] = record
        if self._settings.keep_best:
            # Only scores on the same rows compare, and the last one is over all of them.
            sampled = score.n_rows <= self._intervals.evaluation_rows
            self._keep_if_best(step, score if sampled else self._score(self._intervals.evaluation_rows))

    def _score(self, max_rows: int | None) -> HeldoutScore:
        assert self._heldout is not None
        return self.run.score(self._heldout(max_rows))

    def _keep_if_best(self, step: int, score: HeldoutScore) -> None:
        best = self.scores.get("best")
        learnt = score if score.ordinary is None else score.ordinary
        if learnt.fvu is not None and (best is None or learnt.fvu < best["fvu"]):
            self._save(BEST)
            self.scores["best"] = {"step": step, "fvu": learnt.fvu, "l0": score.l0, "n_rows": learnt.n_rows}

    def _call(self, hook: PeriodicHook) -> Callable[[int], None]:
        def call(step: int) -> None:
            scores = hook(step, self.run.folded())
            if scores:
                self._write(step, "model", scores)
                self.scores["model"] = dict(scores)

        return call

    def _save_snapshot(self, step: int) -> None:
        self._save(snapshot_name(step))

    def _save(self, name: str) -> None:
        """Write the weights as they are, and beside them how often features fire, log10."""
        save_weights(self.directory / name, self.run.folded())
        log10 = {LOG_SPARSITY: self._window.log10().to(torch.float32)}
        write_tensors(self.directory / log_sparsity_name(name), log10)
        self.written |= describe_files(self.directory, [name, log_sparsity_name(name)])

    def _write(self, step: int, split: str, record: Mapping[str, Any]) -> None:
        assert self._log is not None
        self._log.write(step, self.run.n_rows_done, split, record)

    def numbers(self) -> str:
        """Return the last loss, L0, held-out FVU and the rate, as a progress line has them."""
        shown = []
        if logged := self.scores.get("train"):  # a look at the step itself would make the host wait for a GPU
            shown += [f"loss {logged['loss']:.4g}", f"L0 {logged['l0']:.3g}"]
        if fvu := self.scores.get("heldout", {}).get("fvu"):
            shown.append(f"FVU {fvu:.4g}")
        if self._log is not None:
            shown.append(f"{self._log.rate(self.run.n_rows_done):,.0f} rows/s")
        return " ".join(shown)

    def _save_checkpoint(self, step: int, stream: BatchStream, clock: CheckpointClock) -> None:
        assert self._log is not None
        with clock.writing():
            logged = self._log.commit()
            state = {
                "rows": self.run.n_rows_done,
                "run": self.run.state(),
                "stream": stream.state_dict(),
                "metrics_bytes": logged.n_bytes,
                "metrics_checksum": logged.checksum,
                "n_resampled_logged": self._n_resampled_logged,
                "scores": self.scores,
                "written": dict(self.written),
            }
            tensors = {**self.run.state_tensors(), **self._window.state_tensors()}
            self._wait_for_checkpoint()
            self._checkpoint = self._writer.write(self._checkpoints, RunCheckpoint(step, tensors, state))

    def _wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint lies on the disk; raise what kept it from there."""
        if self._checkpoint is not None:
            pending, self._checkpoint = self._checkpoint, None
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._log is not None:
            self._log.close()


def snapshot_steps(n: int, n_steps: int) -> list[int]:
    """Return ``n`` evenly spaced steps strictly inside a run of ``n_steps``; fewer if the run is too short."""
    return sorted({round(n_steps * index / (n + 1)) for index in range(1, n + 1)} - {0, n_steps})


def log_sparsity_name(weights: str) -> str:
    """Return the name of the file beside ``weights`` that says how often its features fired."""
    if weights == WEIGHTS:
        return f"{LOG_SPARSITY}.safetensors"
    return f"{weights.removesuffix('.safetensors')}_{LOG_SPARSITY}.safetensors"


def snapshot_name(step: int) -> str:
    """Return a snapshot's file name inside the artifact."""
    return f"{SNAPSHOTS}/{step:09d}.safetensors"
