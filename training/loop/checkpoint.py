"""Everything a run needs to continue bit for bit, in one file that appears whole or not at all.

A checkpoint is a safetensors file whose header also carries the run's JSON state: no pickle, and weights and position
cannot come from different steps. There is no random state to keep: every draw is derived from (seed, purpose, index).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tailrace.storage.errors import ArtifactCorrupt
from tailrace.training.architectures.transcoder import write_tensors

KEPT = 2
"""Newest checkpoints kept, so that a damaged last one costs only its interval."""
_STATE = "state"


class Checkpoint(NamedTuple):
    """A run at a step: tensors by name and JSON state."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in a directory of their own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then remove all but the newest ``KEPT``."""
        state = {_STATE: json.dumps(checkpoint.state, sort_keys=True, allow_nan=False)}
        write_tensors(self._path(checkpoint.step), checkpoint.tensors, state)
        for old in self._paths()[:-KEPT]:
            old.unlink()

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints there are, ascending."""
        return [int(path.stem) for path in self._paths()]

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint, or None if there is none; the errors are those of ``load``."""
        steps = self.steps()
        return self.load(steps[-1]) if steps else None

    def load(self, step: int) -> Checkpoint:
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
        return Checkpoint(int(path.stem), tensors, state)

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
