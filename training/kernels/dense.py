"""Plain autograd over dense activations: the step that every other kernel must agree with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from training.architectures.base import Transcoder
from training.batches import Batch
from training.entries import DenseEntries
from training.kernels.kernel import ExtraLoss, Precision, StepResult, finish
from training.objectives import Objective
from training.whole_batch import ALONE, WholeBatch


class DenseStep:
    """Five matrix products; in bfloat16 if asked for, the loss always in float32."""

    def __init__(self, precision: Precision = "float32", *, compiled: bool = False) -> None:
        self._autocast = precision == "bfloat16"
        self._pre: Callable[[Transcoder, Tensor], Tensor] = _pre_activations
        if compiled:
            self._pre = torch.compile(_pre_activations)

    def __call__(
        self,
        transcoder: Transcoder,
        batch: Batch,
        objective: Objective,
        extra: Sequence[ExtraLoss] = (),
        *,
        per_row: bool = False,
        whole: WholeBatch = ALONE,
    ) -> StepResult:
        """Set ``.grad`` of every parameter and return the loss terms."""
        transcoder.zero_grad(set_to_none=True)
        with torch.autocast(batch.inputs.device.type, dtype=torch.bfloat16, enabled=self._autocast):
            entries = DenseEntries(self._pre(transcoder, batch.inputs), transcoder.selection(), whole)
            trace = transcoder.trace(entries, batch, objective)
        return finish(transcoder, entries, trace, batch, extra, per_row=per_row)


def _pre_activations(transcoder: Transcoder, inputs: Tensor) -> Tensor:
    return transcoder.pre_activations(inputs)
