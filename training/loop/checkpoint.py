"""Everything a run needs to continue bit for bit, in one file that appears whole or not at all.

A checkpoint is a safetensors file whose header also carries the run's JSON state: no pickle, and weights and position
cannot come from different steps. There is no random state to keep: every draw is derived from (seed, purpose, index).

They are written after so many steps, or once the last ones are old for what they cost. What is written when changes no
result: a run continued from any checkpoint ends with the same bytes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tailrace.storage.errors import ArtifactCorrupt
from tailrace.training.architectures.transcoder import write_tensors

KEPT = 2
"""Newest checkpoints kept, so that a damaged last one costs only its interval."""
_STATE = "state"

CHECKPOINT_SECONDS = 60.0
"""Age at which checkpoints that are cheap are followed by new ones, for runs whose steps take long."""
LARGEST_SHARE = 0.05
"""Of the time, that goes into checkpoints written for their age. Thirty runs side by side on a busy disk can take
minutes for a round of them: once a minute they would never come to train."""


class RunCheckpoint(NamedTuple):
    """A run at a step: tensors by name and JSON state."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in a directory of their own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save(self, checkpoint: RunCheckpoint) -> None:
        """Write a checkpoint, then remove all but the newest ``KEPT``."""
        state = {_STATE: json.dumps(checkpoint.state, sort_keys=True, allow_nan=False)}
        write_tensors(self._path(checkpoint.step), checkpoint.tensors, state)
        for old in self._paths()[:-KEPT]:
            old.unlink()

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints there are, ascending."""
        return [int(path.stem) for path in self._paths()]

    def latest(self) -> RunCheckpoint | None:
        """Return the newest checkpoint, or None if there is none; the errors are those of ``load``."""
        steps = self.steps()
        return self.load(steps[-1]) if steps else None

    def load(self, step: int) -> RunCheckpoint:
        """Return the checkpoint at ``step``.

        Raises ArtifactCorrupt if it cannot be read; deleting the file named falls back to the one before.
        """
        path = self._path(step)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                state = json.loads(file.metadata()[_STATE])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ArtifactCorrupt(
                f"{path}: is no readable checkpoint ({error}); delete it to continue from the one before it"
            ) from error
        return RunCheckpoint(int(path.stem), tensors, state)

    def discard_after(self, step: int) -> None:
        """Remove checkpoints newer than ``step``: a run continued from there would count them among those kept."""
        for path in self._paths():
            if int(path.stem) > step:
                path.unlink()

    def clear(self) -> None:
        """Remove every checkpoint and what a killed writer left: the run is published."""
        if self._directory.exists():
            shutil.rmtree(self._directory)

    def _path(self, step: int) -> Path:
        return self._directory / f"{step:09d}.safetensors"

    def _paths(self) -> list[Path]:
        return sorted(self._directory.glob("[0-9]*.safetensors"))


class CheckpointClock:
    """Tells all runs of one stream after which steps to write a checkpoint, the same to each.

    One is due every ``every_steps``, whatever it costs, and when the last round is ``CHECKPOINT_SECONDS`` old and so
    old that writing it took at most ``LARGEST_SHARE`` of the time since it began. ``now`` gives seconds that only rise.
    """

    def __init__(self, every_steps: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self._every_steps, self._now = every_steps, now
        self._began = now()
        """When the last round of checkpoints began; the training itself, before there is one."""
        self._took = 0.0
        """Seconds that its runs took to write it."""
        self._step = -1
        self._is_due = False

    def is_due(self, step: int) -> bool:
        """Return whether runs write a checkpoint after ``step``; the time is looked at once per step."""
        if step != self._step:
            self._step = step
            now = self._now()
            wait = max(CHECKPOINT_SECONDS, self._took / LARGEST_SHARE)
            self._is_due = step % self._every_steps == 0 or now - self._began >= wait
            if self._is_due:
                self._began, self._took = now, 0.0
        return self._is_due

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Count the time inside as spent on one run's checkpoint of the round that is due."""
        start = self._now()
        yield
        self._took += self._now() - start
