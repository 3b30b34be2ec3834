"""Everything a run needs to continue bit for bit, in one file that appears whole or not at all.

A checkpoint is a safetensors file whose header also carries the run's JSON state: no pickle, and weights and position
cannot come from different steps. There is no random state to keep: every draw is derived from (seed, purpose, index).

They are written once the last ones are old for what they cost, or after so many steps where that is asked for. What is
written when changes no result: a run continued from any checkpoint ends with the same bytes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
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


class CheckpointWriter:
    """Writes the checkpoints of all runs of a stream in the order in which they were taken. A context manager.

    On a CPU at once. On a GPU a thread does it: the step goes on as soon as the tensors are copied on the device, or to
    the host where the device has no room. The order matters: a round that one run has finished, every run has begun,
    so that there is always a step that all can be continued from.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1, "checkpoints") if device.type == "cuda" else None
        self._copying: torch.cuda.Stream | None = None

    def write(self, checkpoints: Checkpoints, checkpoint: RunCheckpoint) -> Future[None]:
        """Write ``checkpoint`` as it is now; the future has the errors of ``Checkpoints.save``."""
        if self._thread is None:
            done: Future[None] = Future()
            checkpoints.save(checkpoint)
            done.set_result(None)
            return done
        if self._copying is None:
            self._copying = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        n_bytes = sum(value.nbytes for value in checkpoint.tensors.values() if value.is_cuda)
        on_device = n_bytes < torch.cuda.mem_get_info(self._device)[0] // 2
        taken = {
            name: value.detach().clone() if on_device or not value.is_cuda else value.detach().cpu()
            for name, value in checkpoint.tensors.items()
        }
        self._copying.wait_stream(torch.cuda.current_stream(self._device))
        return self._thread.submit(self._save, checkpoints, checkpoint._replace(tensors=taken), self._copying)

    @staticmethod
    def _save(checkpoints: Checkpoints, checkpoint: RunCheckpoint, copying: torch.cuda.Stream) -> None:
        with torch.cuda.stream(copying):
            tensors = {name: checkpoint.tensors.pop(name).cpu() for name in [*checkpoint.tensors]}
        checkpoints.save(checkpoint._replace(tensors=tensors))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown()


class CheckpointClock:
    """Tells all runs of one stream after which steps to write a checkpoint, the same to each.

    One is due when the last round is ``CHECKPOINT_SECONDS`` old and so old that writing it took at most
    ``LARGEST_SHARE`` of the time since it began; and every ``every_steps``, if given, whatever it costs. ``now`` gives
    seconds that only rise.
    """

    def __init__(self, every_steps: int | None, *, now: Callable[[], float] = time.monotonic) -> None:
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
            is_asked_for = self._every_steps is not None and step % self._every_steps == 0
            self._is_due = is_asked_for or now - self._began >= wait
            if self._is_due:
                self._began, self._took = now, 0.0
        return self._is_due

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Count the time inside as spent on one run's checkpoint of the round that is due."""
        start = self._now()
        yield
        self._took += self._now() - start
