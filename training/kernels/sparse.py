"""The step at active pairs only: one matrix product over all features, everything else over the few that fire.

Exact: the matrix product, in bfloat16 where that pays, only says which pairs may be active (``select``). Gradients
agree with those of ``DenseStep`` in float64 to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.objectives import Objective
from tailrace.training.kernels.kernel import ExtraLoss, Precision, StepResult, finish
from tailrace.training.kernels.pairs import SparseEntries
from tailrace.training.kernels.select import Selector
from tailrace.training.rows.batch_reductions import ALONE, BatchReductions
from tailrace.training.rows.batches import Batch


class SparseStep:
    """For transcoders on the CPU. ``precision`` is that of the matrix product which screens, and of nothing else."""

    def __init__(self, precision: Precision = "float32") -> None:
        self._precision = precision
        self._selector: Selector | None = None

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
        inputs = batch.inputs.contiguous()
        selector = self._open(transcoder)
        bias, selection = transcoder.encoder_bias(), transcoder.selection()
        pairs, pre = selector.select(inputs, transcoder.W_enc, bias, selection, reductions)
        clear_gradients(transcoder)
        entries = SparseEntries(pairs, pre, transcoder, inputs, reductions)
        trace = transcoder.trace(entries, batch, objective)
        return finish(transcoder, entries, trace, batch, extra, per_row=per_row)

    def _open(self, transcoder: Transcoder) -> Selector:
        if self._selector is None:
            own = transcoder.W_enc.dtype
            self._selector = Selector(torch.bfloat16 if self._precision == "bfloat16" else own)
        return self._selector


def clear_gradients(transcoder: Transcoder) -> None:
    """Zero the gradients of encoder and decoders, whose memory is used again, and drop the others."""
    large = {"W_enc", *transcoder.unit_rows()}
    for name, parameter in transcoder.named_parameters():
        if name in large and parameter.grad is not None:
            parameter.grad.zero_()
        else:
            parameter.grad = torch.zeros_like(parameter) if name in large else None
