"""One run and its directory: what is written between steps, and what is left at the end.

Everything in ``metrics.jsonl`` and the weights is a function of settings and cache; rates and times go to
``timing.jsonl``. When checkpoints are written depends on the clock too, and must not matter: continuing from any of
them gives the same bytes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from training.batches import Batch, BatchStream
from training.checkpoint import Checkpoint, Checkpoints
from training.evaluate import HeldoutScore, evaluate
from training.metrics import JsonLines
from training.run import TrainingRun
from training.settings import TrainSettings
from training.trainer import Duty, PeriodicHook, every
from training.transcoder import CHECKPOINTS, METRICS, SNAPSHOTS, TIMING, WEIGHTS, save_weights

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60.0
"""A checkpoint is also written when the last one is this old, for runs whose steps take long."""
SHOW_EVERY = 10
"""Steps between looks at the loss by the progress bar: on a GPU each look makes the host wait."""

HeldoutBatches = Callable[[int | None], Iterable[Batch]]
"""Given a largest number of rows (None: all), returns raw held-out batches."""


class Session:
    """Keeps one run's logs, checkpoints and snapshots, and writes its results. A context manager."""

    def __init__(
        self,
        directory: Path,
        run: TrainingRun,
        settings: TrainSettings,
        *,
        n_steps: int,
        heldout: HeldoutBatches | None,
        checkpoint_steps: int = 1000,
        hooks: Sequence[tuple[int, PeriodicHook]] = (),
        quiet: bool = False,
    ) -> None:
        self.run = run
        self.n_steps = n_steps
        self.scores: dict[str, Any] = {}
        self._directory = directory
        self._settings = settings
        self._heldout = heldout
        self._checkpoint_steps = checkpoint_steps
        self._hooks = hooks
        self._quiet = quiet
        self._checkpoints = Checkpoints(directory / CHECKPOINTS)
        self._metrics: JsonLines | None = None
        self._timing: JsonLines | None = None
        self._bar: Any = None

    def checkpoint_steps(self) -> list[int]:
        """Return the steps this run could be continued from, ascending."""
        return self._checkpoints.steps()

    def resume(self, step: int | None) -> Mapping[str, Any] | None:
        """Continue from the checkpoint at ``step``, or begin where it is None; return the stream's state there."""
        n_bytes, stream_state = 0, None
        if step is not None:
            checkpoint = self._checkpoints.load(step)
            state = checkpoint.state
            self.run.load_state(checkpoint.tensors, state["run"], n_steps_done=step, n_rows_done=state["rows"])
            n_bytes, self.scores, stream_state = state["metrics_bytes"], state["scores"], state["stream"]
            logger.info("continuing at step %d of %d", step, self.n_steps)
        timing = self._directory / TIMING
        self._metrics = JsonLines(self._directory / METRICS, n_bytes)
        self._timing = JsonLines(timing, timing.stat().st_size if timing.exists() else 0)
        hidden = True if self._quiet else None  # None: hidden unless standard error is a terminal
        self._bar = tqdm(
            total=self.n_steps,
            initial=self.run.n_steps_done,
            unit="step",
            desc=self.run.name,
            disable=hidden,
        )
        self._started, self._rows_at_start = time.monotonic(), self.run.n_rows_done
        self._last_checkpoint = self._started
        return stream_state

    def duties(self, stream: BatchStream) -> list[Duty]:
        """Return what is due between steps. The checkpoint comes last, so that it holds all that was logged before."""
        settings = self._settings
        duties = [Duty(every(settings.log_every, self.n_steps), self._log_training)]
        if self._heldout is not None:
            duties.append(Duty(every(settings.evaluate_every, self.n_steps), self._evaluate))
        duties += [Duty(every(n, self.n_steps), self._call(hook)) for n, hook in self._hooks]
        snapshots = snapshot_steps(settings.snapshots, self.n_steps)
        duties += [
            Duty(snapshots.__contains__, self._save_snapshot),
            Duty(lambda step: step % SHOW_EVERY == 0 or step == self.n_steps, self._show),
            Duty(self._checkpoint_due, lambda step: self._save_checkpoint(step, stream)),
        ]
        return duties

    def export(self) -> list[str]:
        """Write the final weights; return the names of the files that make up the artifact."""
        save_weights(self._directory / WEIGHTS, self.run.folded())
        assert self._metrics is not None, "a session is resumed before it is exported"
        self._metrics.commit()
        snapshots = [snapshot_name(step) for step in snapshot_steps(self._settings.snapshots, self.n_steps)]
        return [WEIGHTS, METRICS, *snapshots]

    def summary(self) -> dict[str, Any]:
        """Return the final numbers: steps, rows, last training losses, held-out score."""
        return {"steps": self.run.n_steps_done, "rows": self.run.n_rows_done, **self.scores}

    def _log_training(self, step: int) -> None:
        run, latest = self.run, self.run.latest
        assert latest is not None
        assert self._metrics is not None
        assert self._timing is not None
        record = {
            **{name: float(value) for name, value in latest.losses.items()},
            "l0": int(latest.n_active.sum()) / run.latest_rows,
            "dead_fraction": float(run.firing.dead(self._settings.dead_after_steps).double().mean()),
            "lr": run.latest_lr,
            **run.latest_extras,
        }
        self._metrics.write({"step": step, "rows": run.n_rows_done, "split": "train", **record})
        self.scores["train"] = record
        seconds = time.monotonic() - self._started
        rate = (run.n_rows_done - self._rows_at_start) / seconds
        self._timing.write({"step": step, "seconds": round(seconds, 3), "rows_per_second": round(rate, 1)})

    def _evaluate(self, step: int) -> None:
        assert self._heldout is not None
        assert self._metrics is not None
        max_rows = None if step == self.n_steps else self._settings.evaluation_rows
        score: HeldoutScore = evaluate(self.run.predict, self._heldout(max_rows))
        record = score.record()
        self._metrics.write({"step": step, "rows": self.run.n_rows_done, "split": "heldout", **record})
        self.scores["heldout"] = record

    def _call(self, hook: PeriodicHook) -> Callable[[int], None]:
        def call(step: int) -> None:
            found = hook(step, self.run.folded())
            if found:
                assert self._metrics is not None
                self._metrics.write({"step": step, "rows": self.run.n_rows_done, "split": "model", **found})
                self.scores["model"] = dict(found)

        return call

    def _save_snapshot(self, step: int) -> None:
        save_weights(self._directory / snapshot_name(step), self.run.folded())

    def _show(self, step: int) -> None:
        latest = self.run.latest
        assert latest is not None
        if not self._bar.disable:
            shown = {"loss": f"{float(latest.losses['loss']):.4f}"}
            shown["L0"] = f"{int(latest.n_active.sum()) / self.run.latest_rows:.1f}"
            if fvu := self.scores.get("heldout", {}).get("fvu"):
                shown["FVU"] = f"{fvu:.4f}"
            rate = (self.run.n_rows_done - self._rows_at_start) / (time.monotonic() - self._started)
            shown["rows/s"] = f"{rate:,.0f}"
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def _checkpoint_due(self, step: int) -> bool:
        # None after the last step: the results themselves follow at once.
        if step == self.n_steps:
            return False
        return step % self._checkpoint_steps == 0 or time.monotonic() - self._last_checkpoint > CHECKPOINT_SECONDS

    def _save_checkpoint(self, step: int, stream: BatchStream) -> None:
        assert self._metrics is not None
        state = {
            "rows": self.run.n_rows_done,
            "run": self.run.state(),
            "stream": stream.state_dict(),
            "metrics_bytes": self._metrics.commit(),
            "scores": self.scores,
        }
        self._checkpoints.save(Checkpoint(step, self.run.state_tensors(), state))
        self._last_checkpoint = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for open_file in (self._metrics, self._timing, self._bar):
            if open_file is not None:
                open_file.close()


def snapshot_steps(n: int, n_steps: int) -> list[int]:
    """Return ``n`` evenly spaced steps strictly inside a run of ``n_steps``; fewer if the run is too short."""
    return sorted({round(n_steps * index / (n + 1)) for index in range(1, n + 1)} - {0, n_steps})


def snapshot_name(step: int) -> str:
    """Return a snapshot's file name inside the artifact."""
    return f"{SNAPSHOTS}/{step:09d}.safetensors"
