"""Plain autograd over dense activations: the step that every other kernel must agree with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tailrace.training.architectures.base import Trace, Transcoder
from tailrace.training.architectures.entries import DenseEntries, Selection
from tailrace.training.architectures.objectives import Objective
from tailrace.training.kernels.kernel import ExtraLoss, Precision, StepResult, finish
from tailrace.training.rows.batch_reductions import ALONE, BatchReductions
from tailrace.training.rows.batches import Batch

Forward = Callable[[Transcoder, Selection, Batch, Objective, BatchReductions], tuple[DenseEntries, Trace]]


class DenseStep:
    """Five matrix products; in bfloat16 if asked for, the loss always in float32.

    ``compiled`` fuses what lies between the products with ``torch.compile``, which needs a C++ compiler on a CPU and
    takes up to a minute for the first step.
    """

    def __init__(self, precision: Precision = "float32", *, compiled: bool = False) -> None:
        self._autocast = precision == "bfloat16"
        self._forward: Forward = torch.compile(_forward) if compiled else _forward

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
        """Set ``.grad`` of every parameter and return the loss terms."""
        transcoder.zero_grad(set_to_none=True)
        with torch.autocast(batch.inputs.device.type, dtype=torch.bfloat16, enabled=self._autocast):
            entries, trace = self._forward(transcoder, transcoder.selection(), batch, objective, reductions)
        return finish(transcoder, entries, trace, batch, extra, per_row=per_row)


def _forward(
    transcoder: Transcoder, selection: Selection, batch: Batch, objective: Objective, reductions: BatchReductions
) -> tuple[DenseEntries, Trace]:
    entries = DenseEntries(transcoder.pre_activations(batch.inputs), selection, reductions)
    return entries, transcoder.trace(entries, batch, objective)
