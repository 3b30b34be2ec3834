"""What a kernel is: loss and gradients of one batch, computed however it likes.

A kernel leaves gradients in ``.grad`` and changes no weight: constraints, clipping and the optimiser come after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from training.architectures.base import Trace, Transcoder
from training.batches import Batch
from training.entries import Entries
from training.objectives import Objective

Precision = Literal["float32", "bfloat16"]


class StepResult(NamedTuple):
    """What a kernel reports besides the gradients; nothing of it carries a gradient."""

    losses: dict[str, Tensor]
    """Scalars by name: ``loss`` is the total, the sum of the others."""
    n_active: Tensor
    """(d_sae,) int64: on how many rows of the batch each feature fired."""
    outputs: Tensor
    """(rows, d_out), predicted, normalised."""


class ExtraLoss(Protocol):
    """Loss terms that are not the architecture's: what revives dead features, what ties a transcoder to another."""

    def __call__(self, transcoder: Transcoder, batch: Batch, trace: Trace) -> dict[str, Tensor]:
        """Return terms by name, scalars, already weighted; empty where there is nothing to add."""
        ...


class StepKernel(Protocol):
    """Forward pass, loss and gradients."""

    def __call__(
        self, transcoder: Transcoder, batch: Batch, objective: Objective, extra: Sequence[ExtraLoss] = ()
    ) -> StepResult:
        """Set ``.grad`` of every parameter to the gradient of the loss on ``batch`` (normalised rows)."""
        ...


def finish(
    transcoder: Transcoder,
    entries: Entries,
    trace: Trace,
    batch: Batch,
    extra: Sequence[ExtraLoss],
) -> StepResult:
    """Add the extra terms, run the backward pass, and let the transcoder learn what is not learnt by gradient."""
    terms = dict(trace.terms)
    for loss in extra:
        terms |= loss(transcoder, batch, trace)
    total = torch.stack([*terms.values()]).sum()
    total.backward()  # type: ignore[no-untyped-call]
    activations = trace.activations.detach()
    transcoder.end_step(activations)
    losses = {"loss": total.detach(), **{name: term.detach() for name, term in terms.items()}}
    return StepResult(losses, entries.count(activations > 0), trace.outputs.detach())
