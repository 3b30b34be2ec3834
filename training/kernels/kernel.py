"""What a kernel is: loss and gradients of one batch, computed however it likes.

A kernel leaves gradients in ``.grad`` and changes no weight: constraints, clipping and the optimiser come after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from tailrace.training.architectures.base import Trace, Transcoder, exact
from tailrace.training.architectures.entries import Entries
from tailrace.training.architectures.objectives import Objective
from tailrace.training.rows.batch_reductions import ALONE, BatchReductions
from tailrace.training.rows.batches import Batch

Precision = Literal["float32", "bfloat16"]


class PerRow(NamedTuple):
    """What happened on each row of a batch; computed only when asked for."""

    l0: Tensor
    """(rows,) int64: how many features fire."""
    l1: Tensor
    """(rows,): sum of the activations, in the unit in which a sparsity term counts them."""
    outputs: Tensor
    """(rows, d_out), predicted, normalised."""
    targets: Tensor
    """(rows, d_out), normalised."""


class StepResult(NamedTuple):
    """What a kernel reports besides the gradients; nothing of it carries a gradient."""

    losses: dict[str, Tensor]
    """Scalars by name: ``loss`` is the total, the sum of the others."""
    n_active: Tensor
    """(d_sae,) int64: on how many rows of the batch each feature fired."""
    outputs: Tensor
    """(rows, d_out), predicted, normalised."""
    n_rows: int
    """Rows of the batch: of all of it, where processes share it."""
    per_row: PerRow | None = None


class ExtraLoss(Protocol):
    """Loss terms that are not the architecture's: what revives dead features, what ties a transcoder to another."""

    def __call__(self, transcoder: Transcoder, batch: Batch, trace: Trace) -> dict[str, Tensor]:
        """Return terms by name, scalars, already weighted; empty where there is nothing to add."""
        ...


class StepKernel(Protocol):
    """Forward pass, loss and gradients."""

    def __call__(
        self,
        transcoder: Transcoder,
        batch: Batch,
        objective: Objective,
        extra: Sequence[ExtraLoss] = (),
        *,
        per_row: bool = False,
        reductions: BatchReductions = ALONE,
    ) -> StepResult:
        """Set ``.grad`` of every parameter to the gradient of the loss on ``batch`` (normalised rows).

        ``per_row`` asks for the result of that name. If ``batch`` is a slice of a larger one, whose
        ``reductions`` these are, gradients and losses are means over the slice, counts those of the larger one.
        """
        ...


@runtime_checkable
class StatefulKernel(Protocol):
    """A kernel whose choices depend on the steps before."""

    def state(self) -> dict[str, Any] | None:
        """Return what the next step depends on, as JSON."""
        ...

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Continue from ``state``."""
        ...


SPARSE_BELOW = 0.05
"""Share of active pairs below which the sparse step takes over."""
DENSE_ABOVE = 0.08
"""Share above which the dense step does; they cross at about 0.07 (`benchmarks/step_density.py`)."""


def suits_sparse(density: float, before: bool | None) -> bool:
    """Whether steps at a share of active pairs should be sparse; between the two shares, as ``before``."""
    return density < SPARSE_BELOW or (density <= DENSE_ABOVE and bool(before))


def finish(
    transcoder: Transcoder,
    entries: Entries,
    trace: Trace,
    batch: Batch,
    extra: Sequence[ExtraLoss],
    *,
    per_row: bool = False,
) -> StepResult:
    """Add the extra terms, run the backward pass, and let the transcoder learn what is not learnt by gradient."""
    terms, trace = dict(trace.terms), trace._replace(reductions=entries.reductions)
    for loss in extra:
        terms |= loss(transcoder, batch, trace)
    total = next(iter(terms.values())) if len(terms) == 1 else torch.stack([*terms.values()]).sum()
    total.backward()  # type: ignore[no-untyped-call]
    activations = trace.activations.detach()
    transcoder.end_step(activations, entries.reductions)
    losses = {"loss": total.detach(), **{name: term.detach() for name, term in terms.items()}}
    active, outputs = activations > 0, trace.outputs.detach()
    rows = None
    if per_row:
        l1 = entries.row_sums(exact(activations, batch.outputs)) / transcoder.activation_unit
        rows = PerRow(entries.row_sums(active), l1, outputs, batch.outputs)
    n_rows = entries.reductions.n_rows(len(batch.inputs))
    return StepResult(losses, entries.reductions.total(entries.count(active)), outputs, n_rows, rows)
