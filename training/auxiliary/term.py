"""What loss terms for dead features share: who is dead, what the living leave unexplained, and their settings class."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from storage.settings import Settings
from training.architectures.base import Trace, Transcoder, exact
from training.batches import Batch
from training.dead_features import FiringRecord
from training.kernels.kernel import ExtraLoss
from training.objectives import Objective


class DeadFeatureTerm(ABC):
    """A term computed from the dead features alone; there is none in a step in which no feature is dead.

    Pre-activations are (rows, n_dead) here, whatever the kernel: dead features are the ones it does not look at.
    """

    name: str
    """Under which the term is logged."""

    def __init__(self, firing: FiringRecord, dead_after_steps: int) -> None:
        self._firing, self._dead_after_steps = firing, dead_after_steps

    def __call__(self, transcoder: Transcoder, batch: Batch, trace: Trace) -> dict[str, Tensor]:
        """Return the weighted term by its name, or nothing."""
        dead = self._firing.dead(self._dead_after_steps).nonzero().squeeze(1)
        if not len(dead):
            return {}
        # target − output: what dead features could add. (The original code took the *input* less the output.)
        residual = (batch.outputs - exact(trace.outputs, batch.outputs)).detach()
        pre = transcoder.pre_activations_of(dead, batch.inputs)
        return {self.name: self.term(pre, transcoder.W_dec.index_select(0, dead), residual, batch, trace)}

    @abstractmethod
    def term(self, pre: Tensor, decoder: Tensor, residual: Tensor, batch: Batch, trace: Trace) -> Tensor:
        """Return the weighted scalar.

        ``pre`` (rows, n_dead) and ``decoder`` (n_dead, d_out) are those of dead features; ``residual`` (rows, d_out)
        carries no gradient.
        """


class Auxiliary(Settings, ABC):
    """Settings of one auxiliary loss. A subclass adds ``kind: Literal[…]``, by which files and flags name it."""

    @abstractmethod
    def build(self, firing: FiringRecord, objective: Objective, *, dead_after_steps: int) -> ExtraLoss | None:
        """Return the loss, which reads the run's own ``firing``; None for none."""


def row_norms(values: Tensor) -> Tensor:
    """Return the norm of each row, (rows, 1)."""
    norms: Tensor = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    return norms
